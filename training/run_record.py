"""What a run reports about itself: the table at its start, `run.json`, `facts.json`, trackers, the model card."""

import dataclasses
import json
import math
import os
from datetime import UTC, datetime
from pathlib import Path

from accelerate import PartialState
from accelerate.tracking import GeneralTracker
from peft import PeftModel
from trl import ModelConfig, SFTTrainer

from common.files import LOADING_SETTINGS
from models.lora import count_trainable
from publishing.model_card import write_card
from publishing.run_facts import add_facts, library_versions, progress
from training.build import loading_settings, mixed_precision
from training.config import DataArguments, TrainingSettings
from training.distributed import check_shared_folder
from training.lengths import SampleLengths
from training.trackers import TRACKERS, code_commit, open_trackers
from training.trainer import SETTINGS_WITH_TOKENS, PackedSFTTrainer

# What the model card tells of a recipe: no path, no name of a machine or a person.
TOLD_OF_MODEL = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "use_rslora", "use_dora")
TOLD_OF_DATA = ("freeze_vision_encoder", "train_merger", "min_pixels", "max_pixels", "pack_tokens", "fold")
TOLD_OF_TRAINING = (
    "max_length",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "optim",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "num_train_epochs",
    "max_steps",
    "train_sampling_strategy",
    "bf16",
    "fp16",
    "seed",
)


def prepare_output(training_args: TrainingSettings) -> None:
    """Make the output folder and see that all processes can write to it, before anything slow starts."""
    output_dir = Path(training_args.output_dir)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        probe = output_dir / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"output_dir: cannot write to {output_dir}: {error.strerror}") from error
    check_shared_folder(output_dir)


def start_tracking(
    data_args: DataArguments, training_args: TrainingSettings, model_args: ModelConfig, base: dict, data_facts: dict,
    *, goes_on: bool,
) -> list[GeneralTracker]:  # fmt: skip
    """Tell the trackers of the run, in place of the trainer's own callbacks, which would tell them its paths."""
    names = [name for name in training_args.report_to if name in TRACKERS]
    training_args.report_to = [name for name in training_args.report_to if name not in TRACKERS]
    config = {
        **told_settings(data_args, training_args, model_args),
        **{"base": base["name"], "base_commit": base["commit"], "data_fingerprint": data_facts["fingerprint"]},
        **{f"{name}_samples": split["samples"] for name, split in data_facts["splits"].items()},
        **{f"{name}_version": version for name, version in library_versions().items()},
        "code_commit": code_commit(),
    }
    output_dir, run_name = Path(training_args.output_dir), training_args.run_name
    about = {"project": training_args.project, "run_name": run_name, "output_dir": output_dir, "config": config}
    return open_trackers(names, **about, goes_on=goes_on)


def describe_run(trainer: SFTTrainer, lengths: SampleLengths) -> list[str]:
    """Return the table that stands at the start of a run: what it will see, train and take."""
    args, total, image = trainer.args, sum(lengths.total), sum(lengths.image)
    loader = trainer.get_train_dataloader()
    samples = f"{len(trainer.train_dataset):,} train"
    if trainer.eval_dataset is not None:
        samples += f", {len(trainer.eval_dataset):,} validation"
    batch = args.per_device_train_batch_size, args.gradient_accumulation_steps, args.world_size
    unit = "samples"
    if isinstance(trainer, PackedSFTTrainer):
        packs = len(loader) * args.world_size
        share, each = total / (packs * trainer.pack_tokens), len(lengths.total) / packs
        unit = f"packs of {trainer.pack_tokens:,} tokens ({share:.1%} full, {each:.1f} samples each)"
    _, steps_an_epoch, *_, steps = trainer.set_initial_training_values(args, loader)
    trainable, all_weights = trainer.model.get_nb_trainable_parameters()
    dtype = str(trainer.model.dtype).removeprefix("torch.")
    parts = ", ".join(f"{part} {n:,}" for part, n in count_trainable(trainer.model).items() if n)
    rows = {
        "samples": samples,
        "tokens": f"{total:,} an epoch, {image:,} of them image; the longest sample has {max(lengths.total):,}",
        "trainable": f"{trainable:,} of {all_weights:,} parameters ({trainable / all_weights:.2%}): {parts}",
        "batch": f"{math.prod(batch)} {unit} a step = {batch[0]} x {batch[1]} accumulated x {batch[2]} process(es)",
        "steps": f"{steps:,} ({steps / steps_an_epoch:.3g} epochs)",
        "device": f"{args.device}, weights in {dtype}, mixed precision {mixed_precision(trainer)}",
    }
    return [f"{name:<10} {value}" for name, value in rows.items()]


def write_run_facts(model_args: ModelConfig, base: dict, output_dir: Path) -> None:
    """Note beside the adapter how its base model is loaded, to the commit, so that predict.py loads the same."""
    if PartialState().is_main_process:
        settings = loading_settings(model_args)
        text = json.dumps({**settings, "revision": base["commit"] or settings["revision"]}, indent=2)
        (output_dir / LOADING_SETTINGS).write_text(text + "\n", encoding="utf-8")


def write_facts(
    data_args: DataArguments,
    training_args: TrainingSettings,
    model_args: ModelConfig,
    model: PeftModel,
    base: dict,
    data_facts: dict,
) -> None:
    """Note what the model card will say about the run; how far it came is added at its end."""
    if not PartialState().is_main_process:
        return
    trainable, all_weights = model.get_nb_trainable_parameters()
    parts = {part: count for part, count in count_trainable(model).items() if count}
    add_facts(
        Path(training_args.output_dir),
        base=base,
        data=data_facts,
        settings=told_settings(data_args, training_args, model_args),
        parameters={"trainable": trainable, "all": all_weights, "parts": parts},
        versions=library_versions(),
    )


def told_settings(data_args: DataArguments, training_args: TrainingSettings, model_args: ModelConfig) -> dict:
    """Return the settings that another run would need to come out alike, by their names in a recipe."""
    told = {}
    for settings, names in ((model_args, TOLD_OF_MODEL), (data_args, TOLD_OF_DATA), (training_args, TOLD_OF_TRAINING)):
        told |= {name: getattr(settings, name) for name in names}
    del told["num_train_epochs" if training_args.max_steps > 0 else "max_steps"]  # the one that has no effect
    return {**told, "processes": training_args.world_size}


def finish_card(trainer: SFTTrainer) -> None:
    """Write the model card, in place of the libraries' own, which name local paths."""
    if PartialState().is_main_process:
        (Path(trainer.args.output_dir) / SETTINGS_WITH_TOKENS).unlink()
        output_dir, state = Path(trainer.args.output_dir), dataclasses.asdict(trainer.state)
        kept_best = trainer.args.load_best_model_at_end and state["best_global_step"] is not None
        add_facts(output_dir, training=progress(state, datetime.now(UTC), finished=True, kept_best=kept_best))
        write_card(output_dir)
