"""Resuming: which checkpoint a run resumes from, and what must not have changed since."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path

from accelerate.utils import gather_object
from datasets import Dataset
from trl import ModelConfig, SFTTrainer

from common.console import print_rank0
from data_prep import fingerprint
from publishing.run_facts import library_versions
from training.checkpoints import MANIFEST, choose_checkpoint
from training.config import DataArguments, TrainingSettings
from training.distributed import WHOLE, asked_sharding


def differences(before: dict, now: dict) -> Iterator[tuple[str, object, object]]:
    """Yield the name of each entry that two nested dictionaries do not share, and its two values."""
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from differences(old, new)
        elif old != new:
            yield key, old, new


def check_same_run(path: Path, run: dict, *, fixed: tuple[str, ...], allow_change: bool) -> list[str]:
    """Compare a checkpoint's run with the one about to start, and return what differs in words.

    Args:
        path: the checkpoint.
        run: as given to `seal`.
        fixed: names of entries without which the checkpoint's weights would not fit the model.
        allow_change: let other entries differ.

    Raises:
        ValueError: an entry differs that may not; the message names all that do.
    """
    found = list(differences(json.loads((path / MANIFEST).read_text(encoding="utf-8"))["run"], run))
    changes = [f"{name} was {old!r} and is {new!r} now" for name, old, new in found]
    words = "; ".join(changes)
    if any(name in fixed for name, _, _ in found):
        raise ValueError(f"checkpoint {path}: {words}; its weights do not fit: choose another output_dir")
    if found and not allow_change:
        raise ValueError(
            f"checkpoint {path}: {words}; take that back, or go on with --allow_config_change true, "
            "or choose another output_dir"
        )
    return changes


def check_same_everywhere(run: dict) -> None:
    """Raise ValueError, in every process, when one would train on other data, settings or versions than the main one.

    Args:
        run: what has to be the same; JSON.
    """
    runs = gather_object([run])
    for process, other in enumerate(runs):
        for name, here, there in differences(runs[0], other):
            raise ValueError(
                f"process {process}: {name} is {there!r}, and {here!r} in process 0; "
                "all machines need the same data, settings and libraries"
            )


# Settings that a run may change when it goes on: they decide what is told, kept and measured, and not what is learnt.
WITHOUT_INFLUENCE = (
    "output_dir", "run_name", "project", "trackio_", "report_to", "logging_", "log_", "disable_tqdm", "debug",
    "skip_memory_", "dry_run",
    "save_", "resume_", "restore_", "allow_config_change", "load_best_", "metric_for_", "greater_is_", "push_", "hub_",
    "eval_", "per_device_eval_", "prediction_loss_", "batch_eval_", "bf16_full_", "fp16_full_", "do_", "include_",
    "dataloader_num_", "dataloader_pin_", "dataloader_persistent_", "dataloader_prefetch_", "local_rank", "ddp_",
    "gradient_checkpointing", "activation_checkpointing", "accelerator_config", "dataset_path", "image_dir",
    "model_name_or_path", "bnb_4bit_quant_storage",
)  # fmt: skip

# What the shape of the weights depends on.
FIXED = ("lora_r", "lora_target_modules", "use_dora", "freeze_vision_encoder", "train_merger", "name", "sharding")


def choose_start(training_args: TrainingSettings) -> str | None:
    """Return the checkpoint to go on from, None for a fresh start, and say which."""
    checkpoint, passed_over = choose_checkpoint(Path(training_args.output_dir), training_args.resume_from_checkpoint)
    for reason in passed_over:
        print_rank0(f"passed over {reason}")
    if checkpoint is not None:
        print_rank0(f"going on from {checkpoint}")
    return None if checkpoint is None else str(checkpoint)


def describe_for_resuming(
    data_args: DataArguments, training_args: TrainingSettings, model_args: ModelConfig, base: dict, train: Dataset
) -> dict:
    """Return what a run must have in common with the one whose checkpoint it goes on from; JSON, without paths."""
    settings = {**training_args.to_dict(), **dataclasses.asdict(data_args), **dataclasses.asdict(model_args)}
    order = hashlib.sha256(json.dumps(train["id"][:]).encode()).hexdigest()
    shared = {
        "settings": {key: x for key, x in settings.items() if not key.startswith(WITHOUT_INFLUENCE)},
        "base": {key: base[key] for key in ("name", "revision", "commit")},
        "data": {"training samples": fingerprint(train), "their order": order},
        "versions": library_versions(),
        "processes": training_args.world_size,
    }
    if (sharding := asked_sharding(training_args.deepspeed_plugin)) != WHOLE:
        shared["sharding"] = sharding  # its checkpoints have a form of their own
    return json.loads(json.dumps(shared, default=str))


def check_start(checkpoint: str | None, shared: dict, training_args: TrainingSettings) -> None:
    """Refuse to go on under other settings, data or versions, unless asked to; then say what changed."""
    if checkpoint is None:
        return
    allowed = training_args.allow_config_change
    for change in check_same_run(Path(checkpoint), shared, fixed=FIXED, allow_change=allowed):
        print_rank0(f"changed: {change}")


def describe_resuming(trainer: SFTTrainer, checkpoint: str | None, run: dict) -> list[str]:
    """Return a line when a run goes on with other steps than before: at the same one, of another number or size.

    Raises:
        ValueError: it would already be past its end.
    """
    if checkpoint is None:
        return []
    state = json.loads((Path(checkpoint) / "trainer_state.json").read_text(encoding="utf-8"))
    before = json.loads((Path(checkpoint) / MANIFEST).read_text(encoding="utf-8"))["run"]
    *_, steps = trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())
    step, batch, batch_before = state["global_step"], batch_of(run), batch_of(before)
    if step > steps:
        rule = "with fewer gradient_accumulation_steps a run of as many epochs has more"
        raise ValueError(f"checkpoint {checkpoint}: it is at step {step}, and the run has {steps} steps now; {rule}")
    if (steps, batch) == (state["max_steps"], batch_before):
        return []
    found = f"{state['max_steps']:,} with batches of {batch_before}"
    return [f"going on   at step {step:,} of {steps:,} with batches of {batch}; before, of {found}"]


def batch_of(run: dict) -> int:
    """Return how many rows a step takes in all processes."""
    sizes = (run["settings"][name] for name in ("per_device_train_batch_size", "gradient_accumulation_steps"))
    return math.prod(sizes) * run["processes"]
