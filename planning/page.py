"""The page that `plan_run.py` prints: tokens, steps, memory by part and by setting, time, warnings."""

import math
from pathlib import Path
from typing import NamedTuple

import torch
from datasets import Dataset, DatasetDict
from transformers import PreTrainedConfig, ProcessorMixin
from trl import ModelConfig

from data_prep import join_folds, load_splits
from data_prep.balance import draw
from models.loading import load_processor
from models.lora import count_trainable
from planning.activations import trace_model
from planning.estimates import (
    GB,
    GPUS,
    SHARE_OF_PEAK,
    MemoryPlan,
    describe_lengths,
    duration,
    estimate_lengths,
    find_warnings,
    ladder_table,
    steps_an_epoch,
    trained_bytes,
    work,
)
from planning.shapes import add_lora, build_without_weights, count_weights, read_config, weight_bytes
from training.lengths import SampleLengths, measure_lengths
from training.memory_probe import SPARE
from training.settings import DataArguments, TrainingSettings, lora_settings

IMAGE_SHARE = 0.8  # of the tokens, where there is no data to count in
SETTINGS = {  # of the ladder: quantised, recomputing
    (True, False): "NF4, no checkpointing",
    (True, True): "NF4, checkpointing",
    (False, False): "not quantised, no checkpointing",
    (False, True): "not quantised, checkpointing",
}


class Steps(NamedTuple):
    """Optimizer steps of a run, the epochs that they make, and the samples of one step; None where not known."""

    run: int | None
    epochs: float | None
    samples: float | None


def find_data(data_args: DataArguments, seed: int, *, offline: bool) -> DatasetDict | None:
    """Return the splits as an epoch sees them, None when there is no such data."""
    if offline and not Path(data_args.dataset_path).exists():
        return None
    try:
        splits = load_splits(data_args.dataset_path, data_args.image_dir)
    except FileNotFoundError:
        return None
    splits = join_folds(splits, data_args.fold)
    if not len(splits.get("train", ())):
        raise ValueError(f"dataset_path: {data_args.dataset_path} has no training split, only {sorted(splits)}")
    if set(splits["train"]["weight"]) != {1.0}:
        splits["train"] = splits["train"].select(draw(splits["train"]["weight"], seed=seed))
    return splits


def find_processor(data_args: DataArguments, model_args: ModelConfig, *, offline: bool) -> ProcessorMixin | None:
    """Return the model's processor, None when it cannot be reached."""
    options = {"min_pixels": data_args.min_pixels, "max_pixels": data_args.max_pixels, "local_files_only": offline}
    try:
        return load_processor(model_args.model_name_or_path, **options, revision=model_args.model_revision)
    except ValueError:
        return None


def print_plan(
    data_args: DataArguments, training_args: TrainingSettings, model_args: ModelConfig, splits: DatasetDict | None,
    processor: ProcessorMixin | None, *, gpu: float | None = None, offline: bool = False,
) -> int:  # fmt: skip
    """Print the page and return 1 when the run does not fit `gpu`, GB, and else 0."""
    config = print_model(model_args, offline=offline)
    lengths, share = None, IMAGE_SHARE
    if splits is None:
        print(f"data       none at {data_args.dataset_path}: only memory, at {100 * IMAGE_SHARE:.0f} % image tokens")
    else:
        lengths = count_lengths(splits["train"], processor, config, data_args)
        share = sum(lengths.image) / sum(lengths.total)
        print_data(splits, lengths, training_args, guessed=processor is None)
    pack_tokens = data_args.pack_tokens if training_args.packing else None
    longest = max(lengths.total) if lengths is not None else training_args.max_length or 4096
    batch = pack_tokens or training_args.per_device_train_batch_size * longest
    steps = print_steps(lengths, training_args, pack_tokens)
    plans = plan_memory(config, data_args, training_args, model_args, share, batch)
    chosen = choose(plans, training_args.gradient_checkpointing, model_args.load_in_4bit, batch, gpu)
    longest = longest if pack_tokens else batch
    print_memory(plans, chosen, batch, longest)
    if lengths is not None:
        print_time(config, lengths, chosen, data_args, training_args, steps.epochs)
    print_warnings(splits, training_args, steps)
    return judge(list(plans.values()), chosen, batch, longest, gpu)


def print_model(model_args: ModelConfig, *, offline: bool) -> PreTrainedConfig:
    name, revision = model_args.model_name_or_path, model_args.model_revision
    config, was_read = read_config(name, revision, local_files_only=offline)
    note = "" if was_read else ": cannot be read here, its shapes are known"
    print(f"model      {model_args.model_name_or_path}{note}")
    return config


def count_lengths(
    train: Dataset, processor: ProcessorMixin | None, config: PreTrainedConfig, data_args: DataArguments
) -> SampleLengths:
    """Count tokens with the model's own tokenizer, or estimate them where it cannot be reached."""
    if processor is not None:
        return measure_lengths(train, processor)
    cell = config.vision_config.patch_size * config.vision_config.spatial_merge_size
    least, most = (65536, 16777216) if config.model_type == "qwen3_vl" else (3136, 12845056)  # the processors' own
    limits = {"min_pixels": data_args.min_pixels or least, "max_pixels": data_args.max_pixels or most}
    return estimate_lengths(train, cell=cell, **limits)


def print_data(splits: DatasetDict, lengths: SampleLengths, training_args: TrainingSettings, *, guessed: bool) -> None:
    print(f"data       {', '.join(f'{len(split):,} {name}' for name, split in splits.items())}")
    print(f"tokens     {describe_lengths(lengths)}")
    if guessed:
        print("           (no tokenizer here: image tokens are exact, text counts as 4 characters a token)")
    limit = training_args.max_length
    over = sum(limit is not None and length > limit for length in lengths.total)
    print(f"too long   {over:,} samples are over max_length" + (f" {limit:,}" if limit else ""))


def print_steps(lengths: SampleLengths | None, training_args: TrainingSettings, pack_tokens: int | None) -> Steps:
    """Print and return the optimizer steps of the run on one GPU; without data they are known if the recipe says."""
    steps = training_args.max_steps if training_args.max_steps > 0 else None
    if lengths is None:
        return Steps(steps, None, None)
    rows, each = training_args.per_device_train_batch_size, training_args.gradient_accumulation_steps
    kept = [min(length, pack_tokens or length) for length in lengths.total]  # of what is over it, see above
    epochs = math.ceil(training_args.num_train_epochs) if steps is None else 1
    order = {"seed": training_args.seed, "epochs": epochs}
    an_epoch = steps_an_epoch(kept, pack_tokens=pack_tokens, batch=rows, accumulate=each, **order)
    steps = steps or math.ceil(an_epoch * training_args.num_train_epochs)
    found = Steps(steps, steps / an_epoch, len(kept) / an_epoch)
    unit = f"packs of {pack_tokens:,} tokens, {found.samples:.0f} samples each" if pack_tokens else "samples"
    print(f"steps      {steps:,} of {rows * each} {unit}; {found.epochs:.3g} epochs")
    return found


def plan_memory(
    config: PreTrainedConfig, data_args: DataArguments, training_args: TrainingSettings, model_args: ModelConfig,
    share: float, batch: int,
) -> dict[tuple[bool, bool], MemoryPlan]:  # fmt: skip
    """Return the plan of each setting for a batch of so many tokens, a share of them image; print what trains."""
    dtype = torch.bfloat16 if model_args.dtype == "auto" else getattr(torch, model_args.dtype)
    lora, nested = lora_settings(data_args, model_args), model_args.use_bnb_nested_quant
    counts = count_trainable(add_lora(build_without_weights(config, dtype), lora))
    print(f"trainable  {sum(counts.values()):,} parameters: {', '.join(f'{k} {n:,}' for k, n in counts.items() if n)}")
    trained = trained_bytes(sum(counts.values()), training_args.optim, mixed=dtype != torch.float32)
    traced, fixed = {}, {}
    for recomputing in (False, True):
        step = {"tokens": batch, "image_tokens": int(share * batch), "checkpointing": recomputing}
        traced[recomputing] = trace_model(config, lora, dtype=dtype, **step)
    for quantized in (True, False):
        fixed[quantized] = weight_bytes(config, quantized=quantized, double_quant=nested, dtype=dtype) | trained
    fixed[True]["one layer's weights out of NF4"] = count_weights(config).largest * dtype.itemsize
    sizes = {"tokens": batch, "text_share": 1 - share}
    sizes |= {"hidden": config.text_config.hidden_size, "width": dtype.itemsize}
    return {key: MemoryPlan(name, fixed[key[0]], traced[key[1]], **sizes) for key, name in SETTINGS.items()}


def choose(
    plans: dict[tuple[bool, bool], MemoryPlan], checkpointing: bool | str, quantized: bool, batch: int,
    gpu: float | None,
) -> MemoryPlan:  # fmt: skip
    """Return the recipe's own plan; `auto` recomputes where the memory is too small, or not given."""
    if checkpointing == "auto":
        checkpointing = gpu is None or plans[quantized, False].total(batch) > (1 - SPARE) * gpu * GB
    return plans[quantized, checkpointing]


def print_memory(plans: dict, chosen: MemoryPlan, batch: int, longest: int) -> None:
    total = chosen.total(batch) / GB
    print(f"\nmemory     {total:.1f} GB for a batch of {batch:,} tokens ({chosen.name}); in MB:")
    for part, size in chosen.parts(batch).items():
        if size >= 0.5e6:
            print(f"{size / 1e6:>17,.0f}  {part}")
    print("", *ladder_table(list(plans.values()), chosen, longest=longest), sep="\n")


def print_time(
    config: PreTrainedConfig, lengths: SampleLengths, chosen: MemoryPlan, data_args: DataArguments,
    training_args: TrainingSettings, epochs: float,
) -> None:  # fmt: skip
    passes, weights = 2 if chosen.name.endswith("no checkpointing") else 3, count_weights(config)
    an_epoch = work(
        lengths, language=weights.language, tower=weights.tower, passes=passes,
        patches=config.vision_config.spatial_merge_size**2,
        tower_passes=1 if data_args.freeze_vision_encoder else passes,
    )  # fmt: skip
    share = SHARE_OF_PEAK[training_args.compile_layers]
    times = [f"{name} {duration(epochs * an_epoch / (peak * share))}" for name, peak in GPUS.items()]
    print(f"\ntime       {', '.join(times)}")
    print(f"           at {100 * share:.0f} % of their peak, which an H100 reaches with packs of 8,192 tokens")


def print_warnings(splits: DatasetDict | None, training_args: TrainingSettings, steps: Steps) -> None:
    warmup = training_args.get_warmup_steps(steps.run or 1000)
    settings = {"learning_rate": training_args.learning_rate, "samples_a_step": steps.samples}
    found = find_warnings(splits, **settings, warmup=warmup, steps=steps.run)
    print(*(f"\nwarning    {text}" for text in found), sep="")


def judge(plans: list[MemoryPlan], chosen: MemoryPlan, batch: int, longest: int, gpu: float | None) -> int:
    """Say whether the run fits, and what would; return the exit code."""
    if gpu is None:
        return 0
    needed = f"{chosen.total(batch) / GB:.1f} GB with {chosen.name}"
    if chosen.total(batch) <= gpu * GB:
        print(f"fits       {gpu:g} GB: {needed}")
        return 0
    fitting = [plan for plan in plans if plan.largest(gpu * GB) >= longest]
    best = max(fitting, key=lambda plan: plan.largest(gpu * GB), default=None)
    print(f"too large  for {gpu:g} GB: {needed}")
    if best is None:
        print("           nothing in the table fits: take a smaller model, or lower max_pixels")
    else:
        print(f"           {best.name} fits, with batches of up to {best.largest(gpu * GB):,} tokens")
    return 1
