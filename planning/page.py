"""The plan that `plan_run.py` prints: tokens, steps, memory by part and by setting, time, warnings."""

import math
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from common.cli import announce

import torch
from datasets import Dataset, DatasetDict
from peft import PeftModel
from transformers import PreTrainedConfig, ProcessorMixin

from data_prep import join_folds, load_splits
from models.attention import VARLEN
from models.compilation import has_plain_layers, language_layers
from models.experts import format_experts
from models.families import family_of
from models.flops import recomputed_flop, shape_of_samples, useful_flop, wide_share, work_of
from models.lora import count_trainable
from models.quantization import STORED, describe_layers, format_stored, resolve_quantization, stored_quantization
from planning.activations import Activations, trace_model
from planning.estimates import (
    EMBEDDING_BUFFER,
    GB,
    GPUS,
    SHARE_OF_PEAK,
    MemoryPlan,
    describe_lengths,
    divide_weights,
    estimate_lengths,
    find_warnings,
    format_duration,
    format_plans,
    steps_per_epoch,
    trained_bytes,
)
from planning.selective import stored_by_layer
from planning.shapes import (
    add_lora,
    build_without_weights,
    count_weights,
    quantise_without_weights,
    read_config,
    weight_bytes,
)
from training.choices import is_long_enough, never_compiled
from training.config_checks import check_base
from training.data import open_processor, sample_by_weight
from training.lengths import SampleLengths, check_pack_limit, find_too_long, measure_lengths, select_lengths
from training.memory_probe import SPARE
from training.packing import possible_packs
from training.settings import AUTO, Settings, TrainingSettings

IMAGE_SHARE = 0.8  # of the tokens, if there is no data
PLAN_NAMES = {  # by (quantised, checkpointing)
    (True, False): "NF4, no checkpointing",
    (True, "selective"): "NF4, selective",
    (True, True): "NF4, checkpointing",
    (False, False): "not quantised, no checkpointing",
    (False, "selective"): "not quantised, selective",
    (False, True): "not quantised, checkpointing",
}
REFUSED = "the run refuses them, see max_length and too_long"
Plans = dict[tuple[bool, bool | str], MemoryPlan]  # by the keys of PLAN_NAMES


class Steps(NamedTuple):
    """Optimizer steps of a run, its epochs, and the samples of a full step (packs: of a mean one); None if unknown."""

    run: int | None
    epochs: float | None
    samples: float | None


def find_data(settings: Settings, *, offline: bool) -> DatasetDict | None:
    """Return the splits, "train" as an epoch sees it; None if there are none."""
    path = settings.data.dataset_path
    if offline and not Path(path).exists():
        return None
    try:
        splits = load_splits(path, settings.data.image_dir)
    except FileNotFoundError:
        return None
    splits = join_folds(splits, settings.data.fold)
    if not len(splits.get("train", ())):
        raise ValueError(f"dataset_path: {path} has no training split, only {sorted(splits)}")
    splits["train"] = sample_by_weight(splits["train"], settings.training.seed)
    return splits


def find_processor(settings: Settings, *, offline: bool) -> ProcessorMixin | None:
    """Return the model's processor; None if it cannot be loaded.

    Raises:
        ValueError: it is of an unknown family, or the pixel limits are wrong for it.
    """
    try:
        return open_processor(settings, local_files_only=offline)
    except ValueError as error:
        if error.__cause__ is None:  # it was loaded, and something about it is wrong
            raise
    return None


def print_plan(
    settings: Settings, splits: DatasetDict | None, processor: ProcessorMixin | None, *, gpu: float | None = None,
    offline: bool = False, processes: int = 2,
) -> int:  # fmt: skip
    """Print the plan of a run; return 1 if it does not fit `gpu`, GB, or would refuse a sample, else 0.

    See `find_data` and `find_processor`. With `shard_base`, so many processes share the base model."""
    config = print_model(settings, offline=offline)
    lengths, share, args = None, IMAGE_SHARE, settings.training
    if splits is None:
        check_pack_limit(args.max_length, settings.pack_limit, None)
        path = settings.data.dataset_path
        print(f"data       none at {path}: only memory, at {100 * IMAGE_SHARE:.0f} % image tokens")
    else:
        lengths = count_lengths(splits["train"], processor, config, settings)
        check_pack_limit(args.max_length, settings.pack_limit, max(lengths.total))
        lengths = print_data(splits, lengths, settings, estimated=processor is None)
        share = sum(lengths.image) / sum(lengths.total)
    longest = max(lengths.total) if lengths is not None else args.max_length or 4096
    compiled, reason = plan_compiling(config, lengths, settings)
    batch = settings.pack_limit or args.per_device_train_batch_size * longest
    plans = plan_memory(config, settings, share, batch, compiled=compiled, processes=processes)
    if settings.pack_tokens == AUTO:
        room = None if args.shard_base else gpu  # the run tries no larger ones then
        settings = settings.with_packs(plan_packs(plans, settings, longest, room))
    batch = settings.pack_tokens or args.per_device_train_batch_size * longest
    steps = print_steps(lengths, settings)
    recompute = True if args.shard_base and args.gradient_checkpointing == AUTO else args.gradient_checkpointing
    key, chosen = choose_plan(plans, recompute, settings.model.load_in_4bit, batch, gpu)
    plans[key] = chosen
    needed = longest if settings.pack_tokens else batch
    print_memory(plans, chosen, batch, needed, offloading=args.activation_offloading)
    if lengths is not None:
        print_time(config, lengths, chosen, settings, steps.epochs, compiled=compiled)
    print(f"compiling  {'on' if compiled else 'off'}: {reason}")
    print_warnings(splits, args, steps)
    untied = not (args.offload_embedding or config.tie_word_embeddings)
    spare = chosen.fixed["embeddings, LM head"] // 2 + chosen.fixed.get(EMBEDDING_BUFFER, 0) if untied else 0
    verdict = print_verdict(list(plans.values()), chosen, batch, needed, gpu, spare=spare)
    known = lengths is not None and processor is not None
    return 1 if known and refuses_samples(lengths, splits, processor, settings) else verdict


def refuses_samples(train: SampleLengths, splits: DatasetDict, processor: ProcessorMixin, settings: Settings) -> bool:
    """Return whether the run would end for a sample over `max_length`, after a line about those of validation."""
    if settings.data.too_long != "error":
        return False
    limit, over = settings.training.max_length, []
    if settings.evaluates and "validation" in splits:
        over = find_too_long(measure_lengths(splits["validation"], processor), limit)
    if over:
        print(f"too long   {len(over):,} validation samples are over max_length {limit:,} too: {REFUSED}")
    return bool(over or find_too_long(train, limit))


def print_model(settings: Settings, *, offline: bool) -> PreTrainedConfig:
    name, revision = settings.model.model_name_or_path, settings.model.model_revision
    config, was_loaded = read_config(name, revision, local_files_only=offline)
    note = "" if was_loaded else ": cannot be read here, its shapes are known"
    print(f"model      {name}{note}")
    check_base(settings, config)
    if family_of(config).experts:
        quantization = resolve_quantization(name, config, settings.loading_options()["quantization"])
        options = {"quantization": quantization, "double_quant": settings.model.use_bnb_nested_quant}
        print(f"experts    {format_experts(config, **options, itemsize=plan_dtype(settings).itemsize)}")
    if stored_quantization(config):
        model = build_without_weights(config, torch.bfloat16)
        quantise_without_weights(model, STORED, torch.bfloat16)
        print(f"4 bit      {format_stored(describe_layers(model))}")
    return config


def plan_dtype(settings: Settings) -> torch.dtype:
    """Return the dtype of what is not in 4 bit, on a GPU."""
    return torch.bfloat16 if settings.model.dtype == "auto" else getattr(torch, settings.model.dtype)


def count_lengths(
    train: Dataset, processor: ProcessorMixin | None, config: PreTrainedConfig, settings: Settings
) -> SampleLengths:
    """Count tokens with the model's tokenizer, or estimate them without one."""
    if processor is not None:
        return measure_lengths(train, processor)
    family, data = family_of(config), settings.data
    least, most = family.pixel_limits
    limits = {"min_pixels": data.min_pixels or least, "max_pixels": data.max_pixels or most}
    check_pixel_limits(**limits, cell=family.token_side)
    return estimate_lengths(train, token_side=family.token_side, **limits)


def check_pixel_limits(*, min_pixels: int, max_pixels: int, cell: int) -> None:
    """Raise ValueError for limits that the model's processor, which is not here, would refuse."""
    for name, limit in {"min_pixels": min_pixels, "max_pixels": max_pixels}.items():
        if limit < cell**2:
            raise ValueError(f"{name}: expected at least {cell**2}, the area of one token, found {limit}")
    if min_pixels > max_pixels:
        raise ValueError(f"min_pixels {min_pixels} is above max_pixels {max_pixels}")


def print_data(splits: DatasetDict, lengths: SampleLengths, settings: Settings, *, estimated: bool) -> SampleLengths:
    """Print counts and lengths of the data; return the lengths of the samples that the run will train on."""
    print(f"data       {', '.join(f'{len(split):,} {name}' for name, split in splits.items())}")
    print(f"tokens     {describe_lengths(lengths)}")
    if estimated:
        print("           (no tokenizer here: image tokens are exact, text counts as 4 characters a token)")
    limit, drop = settings.training.max_length, settings.data.too_long == "drop"
    over = set(find_too_long(lengths, limit))
    then = (", and left out" if drop else f": {REFUSED}") if over else ""
    print(f"too long   {len(over):,} samples are over max_length" + (f" {limit:,}" if limit else "") + then)
    if not drop:
        return lengths
    if len(over) == len(lengths.total):
        raise ValueError(f"too_long: all {len(over)} train samples are over max_length {limit}")
    return select_lengths(lengths, [n for n in range(len(lengths.total)) if n not in over])


def print_steps(lengths: SampleLengths | None, settings: Settings) -> Steps:
    """Print and return the optimizer steps of the run on one GPU; without data, only `max_steps` is known."""
    args, pack_tokens = settings.training, settings.pack_tokens
    limit = args.max_steps if args.max_steps > 0 else None
    if lengths is None:
        return Steps(limit, None, None)
    rows, accumulate = args.per_device_train_batch_size, args.gradient_accumulation_steps
    kept = [min(length, pack_tokens or length) for length in lengths.total]  # longer ones are reported above
    epochs = math.ceil(args.num_train_epochs) if limit is None else 1
    order = {"seed": settings.order_seed, "epochs": epochs}
    per_epoch = steps_per_epoch(kept, pack_tokens=pack_tokens, batch=rows, accumulate=accumulate, **order)
    total = limit or math.ceil(per_epoch * args.num_train_epochs)
    samples = len(kept) / per_epoch if pack_tokens else min(rows * accumulate, len(kept))
    steps = Steps(total, total / per_epoch, samples)
    unit = f"packs of {pack_tokens:,} tokens, {steps.samples:.0f} samples each" if pack_tokens else "samples"
    print(f"steps      {total:,} of {rows * accumulate} {unit}; {steps.epochs:.3g} epochs")
    return steps


def plan_compiling(config: PreTrainedConfig, lengths: SampleLengths | None, settings: Settings) -> tuple[bool, str]:
    """Return whether the run's layers will be compiled, on a GPU with a compiler, and a phrase that says why."""
    chosen = settings.training.compile_layers
    if chosen != AUTO:
        return chosen, "as the recipe says"
    if reason := never_compiled(settings):
        return False, reason
    if lengths is None or settings.training.gradient_checkpointing == "selective":
        return True, "if the run is long enough" if lengths is None else "gradient_checkpointing: selective needs it"
    return is_long_enough(lengths, settings, count_weights(config).language)


def plan_memory(
    config: PreTrainedConfig, settings: Settings, share: float, batch: int, *, compiled: bool, processes: int = 2
) -> Plans:
    """Return the plans of a batch of so many tokens, a share of them image; print how many parameters train.

    A base that comes in 4 bit has no plans without quantisation. Complete compiled layers alone recompute selectively.
    With `shard_base`, so many processes share the base, and layers recompute everything.
    """
    announce("tracing the model's memory", "5 to 30 s")
    dtype, lora, nested = plan_dtype(settings), settings.lora_options(), settings.model.use_bnb_nested_quant
    model = add_lora(build_without_weights(config, dtype), lora)
    counts = count_trainable(model)
    print(f"trainable  {sum(counts.values()):,} parameters: {', '.join(f'{k} {n:,}' for k, n in counts.items() if n)}")
    trained = trained_bytes(sum(counts.values()), settings.training.optim, mixed=dtype != torch.float32)
    traced, fixed = {}, {}
    for checkpointing in (False, True):
        step = {"tokens": batch, "image_tokens": int(share * batch), "checkpointing": checkpointing}
        traced[checkpointing] = trace_model(config, lora, dtype=dtype, **step)
    for quantized in (True,) if stored_quantization(config) else (True, False):
        weights = weight_bytes(config, quantized=quantized, double_quant=nested, dtype=dtype)
        if settings.training.offload_embedding:
            weights["LM head"] = weights.pop("embeddings, LM head") // 2  # which are of one shape
        if settings.training.shard_base:
            sizes = {"layers": config.text_config.num_hidden_layers, "tied": config.tie_word_embeddings}
            weights = divide_weights(weights, processes, **sizes)
        fixed[quantized] = weights | trained
    fixed[True]["one layer's weights out of NF4"] = count_weights(config).largest * dtype.itemsize
    sizes = {"tokens": batch, "text_share": 1 - share}
    sizes |= {"hidden": config.text_config.hidden_size, "itemsize": dtype.itemsize}
    kinds = {False: (traced[False], {}), True: (traced[True], {"recomputed": 1.0})}
    whole = settings.model.attn_implementation == VARLEN and has_plain_layers(model)
    if compiled and whole and not settings.training.shard_base:
        kinds = plan_whole_layers(model, traced[True], batch, dtype)
    return {
        (quantized, kind): MemoryPlan(PLAN_NAMES[quantized, kind], fixed[quantized], activations, **sizes, **extra)
        for quantized in fixed
        for kind, (activations, extra) in kinds.items()
    }


def plan_whole_layers(
    model: PeftModel, traced: Activations, batch: int, dtype: torch.dtype
) -> dict[bool | str, tuple[Activations, dict]]:
    """Return activations and further keywords of `MemoryPlan` for complete compiled layers, by what is recomputed.

    Args:
        model: with LoRA, without weights.
        traced: the step with checkpointing: there too a layer's input is stored.
        batch: tokens of the step.
        dtype: of the layers.
    """
    stored, layers = stored_by_layer(model, dtype), len(language_layers(model))
    compiled = replace(traced, peak=max(traced.tower_peak, traced.saved + batch * stored.held))
    all_kept = {"kept": layers * (stored.narrow + stored.wide + stored.inputs)}
    selective = {"kept": layers * stored.narrow, "wide": stored.wide, "layers": layers}
    return {
        False: (compiled, {**all_kept, "slack": 0}),
        "selective": (compiled, {**selective, "recomputed": wide_share(model), "slack": 0}),
        True: (traced, {"recomputed": 1.0}),
    }


def plan_packs(plans: Plans, settings: Settings, longest: int, gpu: float | None) -> int:
    """Return the packs that `pack_tokens: auto` becomes: the largest that fit, the smallest if `gpu` is None."""
    least = min(longest, settings.pack_limit)  # what is longer is reported elsewhere
    smallest, *larger = possible_packs(settings.training.gradient_accumulation_steps, least)
    quantized, checkpointing = settings.model.load_in_4bit, settings.training.gradient_checkpointing
    kinds = [checkpointing]
    if checkpointing == AUTO:
        kinds = ["selective"] if (quantized, "selective") in plans else [False, True]
    for kind, size in ((kind, size) for kind in kinds for size in reversed([smallest, *larger])):
        if gpu is not None and plans[quantized, kind].total(size) <= (1 - SPARE) * gpu * GB:
            return size
    return smallest


def choose_plan(
    plans: Plans, checkpointing: bool | str, quantized: bool, batch: int, gpu: float | None
) -> tuple[tuple[bool, bool | str], MemoryPlan]:
    """Return the recipe's plan and its key, of memory that is unknown the smallest.

    `auto` recomputes all where there is no room for what selective recomputation keeps, or, if that is not possible,
    for everything. Selective recomputation keeps the wide products of as many layers as there is room for.

    Raises:
        ValueError: selective recomputation of layers that have no plan for it.
    """
    room = 0 if gpu is None else (1 - SPARE) * gpu * GB
    if checkpointing == AUTO:
        least = "selective" if (quantized, "selective") in plans else False
        unknown = gpu is None and least == "selective"
        checkpointing = least if unknown or plans[quantized, least].total(batch) <= room else True
    if (quantized, checkpointing) not in plans:
        rule = "not with shard_base, and only where complete layers are compiled; set it to auto, or to true"
        raise ValueError(f"gradient_checkpointing: selective is {rule}")
    plan = plans[quantized, checkpointing]
    if checkpointing == "selective":
        layers = plan.layers
        spare = (room - plan.total(batch)) / (plan.wide * batch)
        plan = plan.with_wide(max(0, min(layers, int(spare))))
    return (quantized, checkpointing), plan


def print_memory(plans: Plans, chosen: MemoryPlan, batch: int, needed: int, *, offloading: bool) -> None:
    total = chosen.total(batch) / GB
    print(f"\nmemory     {total:.1f} GB for a batch of {batch:,} tokens ({chosen.name}); in MB:")
    for part, size in chosen.parts(batch).items():
        if size >= 0.5e6:
            print(f"{size / 1e6:>17,.0f}  {part}")
    if offloading:
        print("           activation_offloading is not in the plan: the run needs less")
    print("", *format_plans(list(plans.values()), chosen, needed=needed), sep="\n")


def print_time(
    config: PreTrainedConfig, lengths: SampleLengths, chosen: MemoryPlan, settings: Settings, epochs: float, *,
    compiled: bool,
) -> None:  # fmt: skip
    work = work_of(add_lora(build_without_weights(config, plan_dtype(settings)), settings.lora_options()))
    shape = shape_of_samples(lengths.total, lengths.image, work.merge)
    flop = useful_flop(work, shape) + recomputed_flop(work, shape, chosen.recomputed)
    share = SHARE_OF_PEAK[compiled]
    times = [f"{name} {format_duration(epochs * flop / (peak * share))}" for name, peak in GPUS.items()]
    print(f"\ntime       {', '.join(times)}")
    print(f"           at {100 * share:.0f} % of their peak, which an H100 reaches with packs of 8,192 tokens")


def print_warnings(splits: DatasetDict | None, args: TrainingSettings, steps: Steps) -> None:
    options = {"learning_rate": args.learning_rate, "samples_per_step": steps.samples}
    warnings = find_warnings(splits, **options, warmup=args.get_warmup_steps(steps.run or 1000))
    warnings += args.past_the_end(steps.run) if steps.run else []
    print(*(f"\nwarning    {text}" for text in warnings), sep="")


def print_verdict(
    plans: list[MemoryPlan], chosen: MemoryPlan, batch: int, needed: int, gpu: float | None, *, spare: int
) -> int:
    """Print whether the run fits, and if not, whether it does without the `spare` bytes of the embedding, or which
    plan does; return the exit code."""
    if gpu is None:
        return 0
    size = f"{chosen.total(batch) / GB:.1f} GB with {chosen.name}"
    if chosen.total(batch) <= gpu * GB:
        print(f"fits       {gpu:g} GB: {size}")
        return 0
    print(f"too large  for {gpu:g} GB: {size}")
    fitting, offloaded = [], "with offload_embedding: true "
    if chosen.total(batch) - spare <= gpu * GB:
        fitting, spare = [f"{offloaded}it fits as it is"], 0
    rooms = {"": gpu * GB, offloaded: gpu * GB + spare} if spare else {"": gpu * GB}
    for condition, room in rooms.items():
        best = max(plans, key=lambda plan: plan.largest(room))
        if (tokens := best.largest(room)) >= needed:
            fitting.append(f"{condition}{best.name} fits, with batches of up to {tokens:,} tokens")
    for line in fitting or ["nothing in the table fits: use a smaller model, or lower max_pixels and max_length"]:
        print(f"           {line}")
    return 1
