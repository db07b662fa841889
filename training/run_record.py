"""What a run reports about itself: the table at its start, `run.json`, `facts.json`, trackers, the model card."""

import dataclasses
import json
import math
import sys
from datetime import UTC, datetime
from pathlib import Path

from accelerate import PartialState
from peft import PeftModel

from common.files import LOADING_SETTINGS
from models.loading import resolve_dtype
from models.lora import count_parameters, count_trainable
from models.quantization import STORED, describe_stored
from publishing.model_card import write_card
from publishing.run_facts import add_facts, library_versions, training_progress
from training.callbacks import write_metrics
from training.data import TrainingData
from training.settings import Settings
from training.trackers import code_commit
from training.trainer import TRAINING_ARGS, SafeSFTTrainer

# What the model card and the trackers report of a recipe: no path, no name of a machine or a person.
REPORTED_MODEL_ARGS = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "use_rslora", "use_dora")
REPORTED_DATA_ARGS = (
    "freeze_vision_encoder", "train_merger", "lora_target_experts", "min_pixels", "max_pixels", "thinking", "fold",
)  # fmt: skip
REPORTED_TRAINING_ARGS = (
    "max_length", "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "optim",
    "per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "max_steps",
    "train_sampling_strategy", "compile_layers", "bf16", "fp16", "seed",
)  # fmt: skip


def reported_settings(settings: Settings) -> dict:
    """Return the settings that the model card and the trackers report, by their names in a recipe."""
    reported = {"pack_tokens": settings.pack_tokens, "processes": settings.training.world_size}
    names = {"model": REPORTED_MODEL_ARGS, "data": REPORTED_DATA_ARGS, "training": REPORTED_TRAINING_ARGS}
    for part, fields in names.items():
        reported |= {name: getattr(getattr(settings, part), name) for name in fields}
    del reported["num_train_epochs" if settings.training.max_steps > 0 else "max_steps"]  # the one without effect
    return reported


def write_run_record(settings: Settings, model: PeftModel, base: dict, data_facts: dict) -> None:
    """Write how the base model is loaded, to the commit, so that predict.py loads the same; and what the model card
    will say about the run, to which the progress is added at the end."""
    if not PartialState().is_main_process:
        return
    options = settings.loading_options()
    dtype = resolve_dtype(options["dtype"], settings.training.device)  # a CPU computes in float32
    options["dtype"] = str(dtype).removeprefix("torch.")
    if stored := describe_stored(model.get_base_model()):
        options |= {"quantization": STORED, "double_quant": stored["double_quant"], "stored_layers": stored}
    options |= {"revision": base["commit"] or options["revision"], "thinking": settings.data.thinking}
    text = json.dumps(options, indent=2)
    (settings.output_dir / LOADING_SETTINGS).write_text(text + "\n", encoding="utf-8")
    trainable, total = count_parameters(model)
    parts = {part: count for part, count in count_trainable(model).items() if count}
    add_facts(
        settings.output_dir,
        base=base,
        data=data_facts,
        settings=reported_settings(settings),
        parameters={"trainable": trainable, "all": total, "parts": parts},
        versions=library_versions(),
    )


def tracked_facts(settings: Settings, base: dict, data_facts: dict) -> dict:
    """Return what the trackers get of a run besides its curves; flat."""
    return {
        **reported_settings(settings),
        **{"base": base["name"], "base_commit": base["commit"], "data_fingerprint": data_facts["fingerprint"]},
        **{f"{name}_samples": split["samples"] for name, split in data_facts["splits"].items()},
        **{f"{name}_version": version for name, version in library_versions().items()},
        "code_commit": code_commit(),
    }


def describe_run(trainer: SafeSFTTrainer, data: TrainingData, settings: Settings) -> list[str]:
    """Return the table that is printed at the start of a run: its data, what it trains, its steps, its device,
    and which settings come too late for it."""
    args, lengths, pack_tokens = trainer.args, data.lengths["train"], settings.pack_tokens
    tokens, images = sum(lengths.total), sum(lengths.image)
    validation = f", {len(trainer.eval_dataset):,} validation" if trainer.eval_dataset is not None else ""
    loader = trainer.get_train_dataloader()
    rows = args.per_device_train_batch_size, args.gradient_accumulation_steps, args.world_size
    unit = "samples"
    if pack_tokens is not None:
        packs = len(loader) * args.world_size
        share, each = tokens / (packs * pack_tokens), len(lengths.total) / packs
        unit = f"packs of {pack_tokens:,} tokens ({share:.1%} full, {each:.1f} samples each)"
    _, steps_per_epoch, *_, steps = trainer.set_initial_training_values(args, loader)
    trainable, total = count_parameters(trainer.model)
    parts = ", ".join(f"{part} {n:,}" for part, n in count_trainable(trainer.model).items() if n)
    dtype = str(trainer.model.dtype).removeprefix("torch.")
    table = {
        "samples": f"{len(trainer.train_dataset):,} train{validation}",
        "tokens": f"{tokens:,} an epoch, {images:,} of them image; the longest sample has {max(lengths.total):,}",
        "trainable": f"{trainable:,} of {total:,} parameters ({trainable / total:.2%}): {parts}",
        "batch": f"{math.prod(rows)} {unit} a step = {rows[0]} x {rows[1]} accumulated x {rows[2]} process(es)",
        "steps": f"{steps:,} ({steps / steps_per_epoch:.3g} epochs)",
        "device": f"{args.device}, weights in {dtype}, mixed precision {mixed_precision(trainer)}",
    }
    lines = [*table.items(), *(("warning", text) for text in args.past_the_end(steps))]
    return [f"{name:<10} {value}" for name, value in lines]


def mixed_precision(trainer: SafeSFTTrainer) -> str:
    """Return the autocast dtype that is on; raise ValueError when it is not the recipe's."""
    expected = "bf16" if trainer.args.bf16 else "fp16" if trainer.args.fp16 else "no"
    actual = trainer.accelerator.mixed_precision
    if actual != expected:
        rule = f"the recipe's bf16 and fp16 say {expected}"
        raise ValueError(f"mixed_precision: accelerate's configuration says {actual}, {rule}")
    return "off" if actual == "no" else actual


def report_unsaved(trainer: SafeSFTTrainer) -> int:
    """Return the exit code of a finished run: 1, after a line, when its last checkpoint could not be saved."""
    if trainer.unsaved is None:
        return 0
    if PartialState().is_main_process:
        kept = f"the adapter in {trainer.args.output_dir} is complete"
        print(f"error: {trainer.unsaved}; {kept}", file=sys.stderr, flush=True)
    return 1


def finish_card(trainer: SafeSFTTrainer) -> None:
    """Write the model card, in place of the libraries' own, which name local paths."""
    if PartialState().is_main_process:
        output_dir, state = Path(trainer.args.output_dir), dataclasses.asdict(trainer.state)
        (output_dir / TRAINING_ARGS).unlink()
        write_metrics(trainer.state.log_history, output_dir / "metrics.jsonl")  # a full disk is an error now
        best = state["best_model_checkpoint"]  # None where a resumed run has lost it
        kept_best = trainer.args.load_best_model_at_end and best is not None and Path(best).is_dir()
        add_facts(output_dir, training=training_progress(state, datetime.now(UTC), finished=True, kept_best=kept_best))
        write_card(output_dir)
