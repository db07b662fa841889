"""Resuming: which checkpoint a run resumes from, and what must not have changed since."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path

from accelerate.utils import gather_object
from datasets import Dataset
from peft import PeftModel

from common.console import print_rank0
from common.files import ADAPTER_WEIGHTS
from data_prep import fingerprint
from models.adapters import check_fit
from publishing.run_facts import library_versions
from training.checkpoints import choose_checkpoint, read_identity
from training.distributed import UNSHARDED, requested_sharding
from training.settings import Settings
from training.trainer import SafeSFTTrainer

# Settings that may change when a run resumes: they decide what is reported, kept and measured, and not what is learnt,
# or are compared in another way (the base model by name and commit, the data by fingerprint).
RESUME_IGNORED_PREFIXES = (
    "output_dir", "run_name", "project", "trackio_", "report_to", "logging_", "log_", "disable_tqdm", "debug",
    "skip_memory_", "dry_run",
    "save_", "resume_", "restore_", "allow_config_change", "load_best_", "metric_for_", "greater_is_", "push_", "hub_",
    "eval_", "per_device_eval_", "prediction_loss_", "batch_eval_", "bf16_full_", "fp16_full_", "do_", "include_",
    "dataloader_num_", "dataloader_pin_", "dataloader_persistent_", "dataloader_prefetch_", "local_rank", "ddp_",
    "gradient_checkpointing", "activation_checkpointing", "accelerator_config", "dataset_path", "image_dir",
    "model_name_or_path", "bnb_4bit_quant_storage", "too_long", "max_skipped_",
    "shard_base", "offload_embedding", "activation_offloading",
)  # fmt: skip
# What the shape of the weights depends on; it may not even change when the user allows changes.
IMMUTABLE = (
    "settings.lora_r", "settings.lora_target_modules", "settings.use_dora", "settings.freeze_vision_encoder",
    "settings.train_merger", "settings.lora_target_experts", "base.name", "sharding",
)  # fmt: skip


def choose_start(settings: Settings) -> Path | None:
    """Return the checkpoint to resume from, None for a new run, and print which."""
    checkpoint, skipped = choose_checkpoint(settings.output_dir, settings.training.resume_from_checkpoint)
    for reason in skipped:
        print_rank0(f"skipped {reason}")
    if checkpoint is not None:
        print_rank0(f"resuming from {checkpoint}")
    return checkpoint


def describe_identity(settings: Settings, base: dict, train: Dataset) -> dict:
    """Return what a run must have in common with the one whose checkpoint it resumes from; JSON, without paths.

    Do not rename keys: manifests of earlier checkpoints are compared by them.
    """
    merged = {**settings.training.to_dict(), **dataclasses.asdict(settings.data), **dataclasses.asdict(settings.model)}
    order = hashlib.sha256(json.dumps(train["id"][:]).encode()).hexdigest()
    identity = {
        "settings": {key: x for key, x in merged.items() if not key.startswith(RESUME_IGNORED_PREFIXES)},
        "base": {key: base[key] for key in ("name", "revision", "commit")},
        "data": {"training samples": fingerprint(train), "their order": order},
        "versions": library_versions(),
        "processes": settings.training.world_size,
    }
    if (sharding := requested_sharding(settings.training.deepspeed_plugin)) != UNSHARDED:
        identity["sharding"] = sharding  # its checkpoints have another format
    return json.loads(json.dumps(identity, default=str))


def differences(before: dict, now: dict, parent: str = "") -> Iterator[tuple[str, object, object]]:
    """Yield the path ("settings.lora_r") and both values of each entry that differs between nested dictionaries."""
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from differences(old, new, f"{parent}{key}.")
        elif old != new:
            yield f"{parent}{key}", old, new


def check_same_everywhere(identity: dict) -> None:
    """Raise ValueError, in every process, when one has other data, settings or versions than process 0."""
    for process, other in enumerate(identities := gather_object([identity])):
        for name, first, value in differences(identities[0], other):
            raise ValueError(
                f"process {process}: {name} is {value!r}, and {first!r} in process 0; "
                "all machines need the same data, settings and libraries"
            )


def check_resumable(checkpoint: Path | None, identity: dict, *, allow_change: bool) -> None:
    """Compare a checkpoint's run with the one about to start; print what changed where that is allowed.

    Args:
        checkpoint: see `choose_start`; with None there is nothing to compare.
        identity: see `describe_identity`.
        allow_change: let entries differ, except those that the shape of the weights depends on.

    Raises:
        ValueError: an entry differs that may not; the message names all that do.
    """
    if checkpoint is None:
        return
    changed = list(differences(read_identity(checkpoint), identity))
    lines = [f"{name} was {old!r} and is {new!r} now" for name, old, new in changed]
    if any(name in IMMUTABLE for name, _, _ in changed):
        rule = "its weights do not fit: choose another output_dir"
    elif changed and not allow_change:
        rule = "undo that, or resume with --allow_config_change true, or choose another output_dir"
    else:
        return print_rank0(*(f"changed: {line}" for line in lines)) if lines else None
    raise ValueError(f"checkpoint {checkpoint}: {'; '.join(lines)}; {rule}")


def check_weights(checkpoint: Path | None, model: PeftModel) -> None:
    """Raise ValueError unless a checkpoint's adapter fits the model; sharded ones have their own format and check."""
    if checkpoint is not None and (checkpoint / ADAPTER_WEIGHTS).is_file():
        check_fit(model, str(checkpoint))


def describe_resuming(trainer: SafeSFTTrainer, checkpoint: Path | None) -> list[str]:
    """Return a line when a run resumes with another number or size of steps: it continues at the same step number.

    Raises:
        ValueError: it would already be past its end.
    """
    if checkpoint is None:
        return []
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    *_, steps = trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())
    step, batch, batch_before = (
        state["global_step"],
        batch_rows(trainer.identity),
        batch_rows(read_identity(checkpoint)),
    )
    if step > steps:
        rule = "lower gradient_accumulation_steps or raise num_train_epochs"
        if trainer.args.max_steps > 0:  # steps are then counted, and not made from epochs and batches
            rule = f"set max_steps to {step} or more"
        raise ValueError(f"checkpoint {checkpoint}: it is at step {step}, and the run has {steps} steps now; {rule}")
    if (steps, batch) == (state["max_steps"], batch_before):
        return []
    before = f"{state['max_steps']:,} with batches of {batch_before}"
    return [f"resuming   at step {step:,} of {steps:,} with batches of {batch}; before, of {before}"]


def batch_rows(identity: dict) -> int:
    """Return how many rows an optimizer step takes in all processes."""
    sizes = (identity["settings"][name] for name in ("per_device_train_batch_size", "gradient_accumulation_steps"))
    return math.prod(sizes) * identity["processes"]
