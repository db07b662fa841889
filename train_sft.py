"""Fine-tune Qwen2.5-VL, or another model of its family, on questions and answers about images, by QLoRA.

accelerate launch train_sft.py --config configs/skin.yaml --output_dir outputs/skin
"""

import dataclasses
import hashlib
import itertools
import json
import math
import os
import sys
from datetime import UTC, datetime
from pathlib import Path

from cli import run

import torch
from accelerate import PartialState
from accelerate.tracking import GeneralTracker
from accelerate.utils import gather_object
from datasets import Dataset, DatasetDict, disable_progress_bars
from peft import PeftModel, get_peft_model
from torch.utils.data import BatchSampler
from transformers import ProcessorMixin, ProgressCallback, set_seed
from trl import ModelConfig, SFTTrainer

from callbacks import CurvesCallback, ProgressLine, PushCallback
from card import add_facts, describe_base, describe_data, library_versions, progress, write_card
from checkpoints import MANIFEST, check_same_run, choose_checkpoint
from collator import VisionSFTCollator
from config import DataArguments, TrainingSettings, lora_settings, parse_config
from data_prep import fingerprint, join_folds, load_splits
from data_prep.balance import draw
from distributed import (
    WHOLE,
    asked_sharding,
    check_same_everywhere,
    check_sharded,
    check_sharding,
    check_shared_folder,
    leave_together,
)
from hub import RUN_FACTS, BackgroundPush, open_repository, push_adapter
from memory import fits, largest_batch
from modeling import (
    build_lora_config,
    check_family,
    check_targets,
    check_trainable,
    compile_layers,
    count_trainable,
    end_gradients_at_tower,
    load_model,
    load_processor,
    pin_trainable_to_float32,
)
from packing import PackSampler, SampleLengths, check_lengths, measure_lengths
from plan_run import print_plan
from rehearsal import rehearse
from shapes import read_config
from stopping import StopCallback, end_early
from tracking import TRACKERS, TrackCallback, code_commit, open_trackers
from trainer import SETTINGS_WITH_TOKENS, PackedSFTTrainer, SafeSFTTrainer

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
TRIED = 3  # batches of a dry run
# What the shape of the weights depends on.
FIXED = ("lora_r", "lora_target_modules", "use_dora", "freeze_vision_encoder", "train_merger", "name", "sharding")


def main(argv: list[str] | None = None) -> int | None:
    data_args, training_args, model_args = parse_config(sys.argv[1:] if argv is None else argv)
    check_processes(training_args, model_args)
    disable_progress_bars()  # of datasets' own bookkeeping; decoding images has a bar of its own
    if training_args.dry_run:
        return dry_run(data_args, training_args, model_args)
    prepare_output(training_args)
    checkpoint = choose_start(training_args)
    check_family(model_args.model_name_or_path, revision=model_args.model_revision)
    repo_id = claim_repository(training_args)
    processor = open_processor(data_args, model_args)
    base = describe_base(model_args.model_name_or_path, model_args.model_revision)
    splits = load_data(data_args, training_args)
    data_facts = describe_data(splits, data_args.dataset_path)
    splits["train"] = draw_by_weight(splits["train"], training_args.seed)
    lengths = check_data(splits, processor, training_args)
    shared = describe_for_resuming(data_args, training_args, model_args, base, splits["train"])
    check_same_everywhere(shared)
    check_start(checkpoint, shared, training_args)
    pack_tokens = data_args.pack_tokens = data_args.pack_tokens if training_args.packing else None
    training_args.packing = False  # TRL's own, which takes no images
    trackers = start_tracking(data_args, training_args, model_args, base, data_facts, goes_on=checkpoint is not None)
    set_seed(training_args.seed)  # LoRA starts from random numbers
    model = build_model(data_args, model_args)
    write_run_facts(model_args, base, Path(training_args.output_dir))
    write_facts(data_args, training_args, model_args, model, base, data_facts)
    decide_checkpointing(model, processor, splits["train"], training_args, lengths["train"], pack_tokens)
    if training_args.compile_layers:
        say("the layers are compiled during the first steps, which then take two or three minutes")
        compile_layers(model)
    trainer = build_trainer(model, processor, splits, training_args, lengths, pack_tokens=pack_tokens, run=shared)
    stop = StopCallback()
    trainer.add_callback(stop)
    trainer.add_callback(TrackCallback(trackers))
    background = push_every_save(trainer, repo_id)
    say(*describe_run(trainer, lengths["train"]), *describe_resuming(trainer, checkpoint, shared))
    trainer.train(resume_from_checkpoint=checkpoint)
    if stop.signal is not None and trainer.state.global_step < trainer.state.max_steps:
        leave_together()
        return end_early(stop, trainer.state.global_step)
    trainer.save_model()
    leave_together()
    finish_card(trainer)
    say(f"adapter, processor, model card, metrics.jsonl and training_metrics.png are in {training_args.output_dir}")
    if background is not None:
        background.wait()
        say(f"pushed to {push_adapter(Path(training_args.output_dir), repo_id, **push_options(training_args))}")
    return None


def dry_run(data_args: DataArguments, training_args: TrainingSettings, model_args: ModelConfig) -> None:
    """Print the plan, take three batches through the collator and one of them through a tiny model; write nothing."""
    processor = open_processor(data_args, model_args)
    splits = load_data(data_args, training_args)
    splits["train"] = draw_by_weight(splits["train"], training_args.seed)
    lengths = check_data(splits, processor, training_args)["train"]
    print_plan(data_args, training_args, model_args, splits, processor)
    packs = data_args.pack_tokens if training_args.packing else None
    collate = VisionSFTCollator(processor, max_length=training_args.max_length, packed=packs is not None)
    rows = training_args.per_device_train_batch_size
    indices = PackSampler(lengths.total, packs) if packs else BatchSampler(range(len(lengths.total)), rows, False)
    batches = [collate([splits["train"][n] for n in some]) for some in itertools.islice(indices, TRIED)]
    config, _ = read_config(model_args.model_name_or_path, model_args.model_revision)
    settings = lora_settings(data_args, model_args)
    loss = rehearse(config, batches[0], settings, varlen=packs is not None, device=training_args.device)
    say(f"\ndry run    {len(batches)} batches collated, one forward and backward in a tiny model: loss {loss:.3f}")


def say(*lines: str) -> None:
    """Print once, however many processes there are."""
    if PartialState().is_main_process:
        print(*lines, sep="\n", flush=True)


def check_processes(training_args: TrainingSettings, model_args: ModelConfig) -> None:
    """Refuse what accelerate's configuration asks for and would go wrong, before anything slow starts."""
    storage = (model_args.bnb_4bit_quant_storage or "uint8") if model_args.load_in_4bit else None
    mixed = "bfloat16" if training_args.bf16 else "float16" if training_args.fp16 else None
    check_sharding(asked_sharding(training_args.deepspeed_plugin), storage=storage, mixed=mixed)


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


def choose_start(training_args: TrainingSettings) -> str | None:
    """Return the checkpoint to go on from, None for a fresh start, and say which."""
    checkpoint, passed_over = choose_checkpoint(Path(training_args.output_dir), training_args.resume_from_checkpoint)
    for reason in passed_over:
        say(f"passed over {reason}")
    if checkpoint is not None:
        say(f"going on from {checkpoint}")
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
        say(f"changed: {change}")


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


def claim_repository(training_args: TrainingSettings) -> str | None:
    """Make sure now that the adapter can be pushed later; return the repository's id in the process that will push.

    The trainer's own push is switched off: it would upload the whole output folder.
    """
    push, training_args.push_to_hub = training_args.push_to_hub, False
    if not push or not PartialState().is_main_process:
        return None
    repo_id = training_args.hub_model_id or Path(training_args.output_dir).resolve().name
    return open_repository(repo_id, **push_options(training_args))


def push_options(training_args: TrainingSettings) -> dict:
    return {"private": training_args.hub_private_repo is not False, "revision": training_args.hub_revision}


def open_processor(data_args: DataArguments, model_args: ModelConfig) -> ProcessorMixin:
    limits = {"min_pixels": data_args.min_pixels, "max_pixels": data_args.max_pixels}
    return load_processor(model_args.model_name_or_path, **limits, revision=model_args.model_revision)


def load_data(data_args: DataArguments, training_args: TrainingSettings) -> DatasetDict:
    """Load the splits and check that those needed are there."""
    splits = load_splits(data_args.dataset_path, data_args.image_dir, show_progress=PartialState().is_main_process)
    splits = join_folds(splits, data_args.fold)
    if "train" not in splits or len(splits["train"]) == 0:
        raise ValueError(f"dataset_path: {data_args.dataset_path} has no training split, only {sorted(splits)}")
    if training_args.eval_strategy != "no" and len(splits.get("validation", ())) == 0:
        rule = "set eval_strategy: no, or prepare the data with one"
        raise ValueError(f"dataset_path: {data_args.dataset_path} has no validation split; {rule}")
    return splits


def draw_by_weight(train: Dataset, seed: int) -> Dataset:
    """Return the training split with its samples as often as `data_prep convert --balance` weighed them."""
    if set(train["weight"]) == {1.0}:
        return train
    indices = draw(train["weight"], seed=seed)
    say(f"drawn by weight: an epoch sees {len(set(indices)):,} different samples of {len(train):,}")
    return train.select(indices)


def check_data(
    splits: DatasetDict, processor: ProcessorMixin, training_args: TrainingSettings
) -> dict[str, SampleLengths]:
    """Refuse samples over max_length now and not in the middle of the night; return the lengths by split."""
    names = ["train", "validation"] if training_args.eval_strategy != "no" else ["train"]
    with PartialState().local_main_process_first():  # the others find them in the cache
        lengths = {name: measure_lengths(splits[name], processor) for name in names}
    for name in names[::-1]:
        check_lengths(lengths[name], splits[name]["id"], training_args.max_length, split=name)
    if training_args.train_sampling_strategy == "group_by_length":
        splits["train"] = splits["train"].add_column(training_args.length_column_name, lengths["train"].total)
    return lengths


def loading_settings(model_args: ModelConfig) -> dict:
    """Return the keywords of `load_model`: how the base model is loaded in training, and later for its adapter."""
    return {
        "quantization": "nf4" if model_args.load_in_4bit else None,
        "double_quant": model_args.use_bnb_nested_quant,
        "dtype": model_args.dtype,
        "attn_implementation": model_args.attn_implementation,
        "revision": model_args.model_revision,
    }


def build_model(data_args: DataArguments, model_args: ModelConfig) -> PeftModel:
    """Load the base model and put LoRA on it, on what was asked for and on nothing else."""
    storage = model_args.bnb_4bit_quant_storage or "uint8"  # changes no result, and no other command shards
    model = load_model(model_args.model_name_or_path, **loading_settings(model_args), quant_storage=storage)
    lora = lora_settings(data_args, model_args)
    check_targets(model, lora["target_modules"])
    model = get_peft_model(model, build_lora_config(model, **lora))
    check_trainable(model, train_vision=lora["train_vision"], train_merger=lora["train_merger"])
    return model


def decide_checkpointing(
    model: PeftModel, processor: ProcessorMixin, train: Dataset, training_args: TrainingSettings,
    lengths: SampleLengths, pack_tokens: int | None,
) -> None:  # fmt: skip
    """Replace `gradient_checkpointing: auto`: activations are recomputed where the largest batch would not fit."""
    if training_args.gradient_checkpointing != "auto":
        return
    on, why = False, "there is no GPU"
    if training_args.device.type == "cuda":
        positions = largest_batch(
            lengths.total, batch_size=training_args.per_device_train_batch_size, pack_tokens=pack_tokens
        )
        collate = VisionSFTCollator(processor, packed=pack_tokens is not None)
        dtype = torch.bfloat16 if training_args.bf16 else torch.float16 if training_args.fp16 else None
        found = gather_object([fits(model, collate([train[n] for n in positions]), dtype=dtype)])
        on, why = min(found)  # one process that lacks the memory decides for all
        on = not on
    say(f"gradient checkpointing {'on' if on else 'off'}: {why}")
    # transformers reads both names
    training_args.gradient_checkpointing = training_args.activation_checkpointing = on


def needs_blanks(model: PeftModel, lengths: SampleLengths) -> bool:
    """Tell whether batches without images must be given a blank one: a trained vision tower that one process does not
    call would have no gradients there, which the others wait for."""
    counts = count_trainable(model)
    return 0 in lengths.image and counts["vision tower"] + counts["merger"] > 0


def build_trainer(
    model: PeftModel, processor: ProcessorMixin, splits: DatasetDict, training_args: TrainingSettings,
    lengths: dict[str, SampleLengths], *, pack_tokens: int | None, run: dict,
) -> SFTTrainer:  # fmt: skip
    """Wire the model, the data and our collator into TRL's trainer; with `pack_tokens`, into the one that packs."""
    training_args.remove_unused_columns = False  # the collator names a sample by its id
    packed = pack_tokens is not None
    blanks = needs_blanks(model, lengths["train"])
    if training_args.ddp_find_unused_parameters is None:
        training_args.ddp_find_unused_parameters = False  # every batch takes all weights that train
    make, packing = SafeSFTTrainer, {}
    if packed:
        make = PackedSFTTrainer
        packing = {f"{split}_lengths": own.total for split, own in lengths.items()} | {"pack_tokens": pack_tokens}
    trainer = make(
        model=model,
        args=training_args,
        data_collator=VisionSFTCollator(processor, max_length=training_args.max_length, packed=packed, blanks=blanks),
        train_dataset=splits["train"],
        eval_dataset=splits["validation"] if training_args.eval_strategy != "no" else None,
        processing_class=processor,
        callbacks=[CurvesCallback],
        run=run,
        **packing,
    )
    check_sharded(trainer.accelerator, asked_sharding(training_args.deepspeed_plugin))
    # The family says that its own loss takes no token count, and the trainer then averages micro-batches as if
    # they held equally many answer tokens. SFTTrainer computes the loss itself and does take it.
    trainer.model_accepts_loss_kwargs = True
    pin_trainable_to_float32(trainer.model)
    if not (training_args.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
        end_gradients_at_tower(trainer.model)  # the reentrant form would lose the gradients within the blocks
    if not training_args.disable_tqdm:
        trainer.remove_callback(ProgressCallback)  # prints dictionaries
        trainer.add_callback(ProgressLine)
    return trainer


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


def mixed_precision(trainer: SFTTrainer) -> str:
    """Return the autocast dtype that is really on; raise ValueError when it is not the recipe's."""
    asked = "bf16" if trainer.args.bf16 else "fp16" if trainer.args.fp16 else "no"
    found = trainer.accelerator.mixed_precision
    if found != asked:
        raise ValueError(
            f"mixed_precision: accelerate's configuration says {found}, the recipe's bf16 and fp16 say {asked}"
        )
    return "off" if found == "no" else found


def write_run_facts(model_args: ModelConfig, base: dict, output_dir: Path) -> None:
    """Note beside the adapter how its base model is loaded, to the commit, so that predict.py loads the same."""
    if PartialState().is_main_process:
        settings = loading_settings(model_args)
        text = json.dumps({**settings, "revision": base["commit"] or settings["revision"]}, indent=2)
        (output_dir / RUN_FACTS).write_text(text + "\n", encoding="utf-8")


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


def push_every_save(trainer: SFTTrainer, repo_id: str | None) -> BackgroundPush | None:
    """Push saved checkpoints in the background from now on, in the process that has claimed a repository."""
    if repo_id is None:
        return None
    background = BackgroundPush(repo_id, revision=trainer.args.hub_revision)
    trainer.add_callback(PushCallback(background))
    return background


def finish_card(trainer: SFTTrainer) -> None:
    """Write the model card, in place of the libraries' own, which name local paths."""
    if PartialState().is_main_process:
        (Path(trainer.args.output_dir) / SETTINGS_WITH_TOKENS).unlink()
        output_dir, state = Path(trainer.args.output_dir), dataclasses.asdict(trainer.state)
        kept_best = trainer.args.load_best_model_at_end and state["best_global_step"] is not None
        add_facts(output_dir, training=progress(state, datetime.now(UTC), finished=True, kept_best=kept_best))
        write_card(output_dir)


if __name__ == "__main__":
    sys.exit(run(main))
