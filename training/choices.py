"""What `auto` becomes in a run: decided once at its start, printed, and kept when it resumes."""

import math
from pathlib import Path

import torch
from accelerate.utils import gather_object
from peft import PeftModel
from transformers import ProcessorMixin

from collator import VisionSFTCollator
from common.console import print_rank0
from models.compilation import (
    check_compiler,
    keep_wide_products,
    language_layers,
    recompute_everything,
    takes_whole_layers,
    tokens_to_repay,
    wide_bytes,
)
from models.families import family_of
from models.flops import language_weights, wide_share
from training.checkpoints import read_identity
from training.data import TrainingData
from training.lengths import SampleLengths
from training.memory_probe import SPARE, fits, largest_batch, recomputing, try_step
from training.packing import PACK_SIZES, possible_packs
from training.settings import AUTO, Settings

EVERYTHING = "everything"  # the compiled layers keep their inputs alone
AMPLE = 3  # so many times the bytes of all wide products are free where they surely fit
COMPILING_LINE = "the layers are compiled before the first step, which takes up to a minute, and less the next time"


def keep_choices(settings: Settings, checkpoint: Path | None) -> Settings:
    """Return settings in which what `auto` became before the checkpoint stands in its place."""
    if checkpoint is None:
        return settings
    before = read_identity(checkpoint)["settings"]
    if settings.training.compile_layers == AUTO and isinstance(before.get("compile_layers"), bool):
        settings = settings.decided(compile_layers=before["compile_layers"])
    tokens = before.get("pack_tokens")
    if settings.pack_tokens is None:
        return settings.decided(pack_tokens=tokens)  # without effect; earlier versions wrote 8192
    if settings.pack_tokens == AUTO and tokens in possible_packs(settings.training.gradient_accumulation_steps):
        return settings.with_packs(tokens)  # those of another size are a change, see `check_resumable`
    return settings


def choose_compiling(model: PeftModel, data: TrainingData, settings: Settings) -> Settings:
    """Return settings that say whether layers are compiled, after a line about it."""
    chosen = settings.training.compile_layers
    if chosen == AUTO:
        answers = gather_object([repays_compiling(model, data.lengths["train"], settings)])
        chosen, reason = min(answers)  # one process without a compiler decides for all
        print_rank0(f"compiling {'on' if chosen else 'off'}: {reason}")
    if chosen:
        print_rank0(COMPILING_LINE)
    return settings.decided(compile_layers=chosen)


def repays_compiling(model: PeftModel, lengths: SampleLengths, settings: Settings) -> tuple[bool, str]:
    """Return whether compiling the layers saves more time than it takes, and a phrase that says why."""
    if settings.training.gradient_checkpointing == "selective":
        return True, "gradient_checkpointing: selective needs it"
    if settings.training.device.type != "cuda":
        return False, "there is no GPU"
    if reason := never_compiled(settings):
        return False, reason
    pays, phrase = is_long_enough(lengths, settings, language_weights(model))
    if pays:
        try:
            check_compiler()
        except ValueError as error:
            return False, str(error).removeprefix("compile_layers: ")
    return pays, phrase


def never_compiled(settings: Settings) -> str:
    """Return why `compile_layers: auto` compiles nothing, however long the run is; empty where it may."""
    return "not with lora_target_experts: true" if settings.data.lora_target_experts else ""


def is_long_enough(lengths: SampleLengths, settings: Settings, weights: int) -> tuple[bool, str]:
    """Return whether a run trains on enough tokens for compiling to pay, and a phrase that says so."""
    tokens, enough = tokens_a_gpu(lengths, settings), tokens_to_repay(weights)
    phrase = f"{tokens / 1e6:,.1f} million tokens on each GPU, and it pays from {enough / 1e6:,.1f} million on"
    return tokens >= enough, phrase


def tokens_a_gpu(lengths: SampleLengths, settings: Settings) -> float:
    """Return how many tokens each GPU trains on in the whole run, also where a part of it is done."""
    args, tokens = settings.training, sum(lengths.total)
    if args.max_steps <= 0:
        return args.num_train_epochs * tokens / args.world_size
    row = PACK_SIZES[0] if settings.pack_tokens == AUTO else settings.pack_tokens
    row = row or args.per_device_train_batch_size * tokens / len(lengths.total)
    return args.max_steps * args.gradient_accumulation_steps * row


def choose_recomputation(model: PeftModel, settings: Settings) -> bool | str:
    """Return what the backward pass computes again: True, False, or `AUTO` where a trial has to decide between these.

    Complete layers that are compiled do it by themselves: "selective" or `EVERYTHING`. The trial is
    `needs_recomputation`.

    Raises:
        ValueError: "selective" for layers that cannot be compiled as a whole.
    """
    args = settings.training
    sharded = args.shard_base
    whole = args.compile_layers is True and takes_whole_layers(model)
    choice = args.gradient_checkpointing
    if choice == "selective" and (sharded or not whole):
        name = "shard_base: true" if sharded else f"{family_of(model).name}, of whose layers only parts are compiled"
        raise ValueError(f"gradient_checkpointing: selective is not for {name}; set it to auto, or to true")
    if choice == AUTO and sharded:  # a process that runs out of memory in a trial would leave the others waiting
        print_rank0("gradient checkpointing on: shard_base is for models that need the memory")
        choice = True
    return {AUTO: "selective", True: EVERYTHING}.get(choice, choice) if whole else choice


def choose_packs(
    model: PeftModel, processor: ProcessorMixin, data: TrainingData, settings: Settings, recompute: bool | str
) -> tuple[Settings, bool | str]:
    """Return settings with the largest pack that fits, and what is recomputed, after a line about it.

    Packs of the smallest size without recomputation are faster than larger ones with it (benchmarks/README.md).

    Args:
        model: as it will train, compiled or not.
        processor: the model's.
        data: of the run.
        settings: of the run.
        recompute: see `choose_recomputation`; `AUTO` stays what it is without a trial.
    """
    if settings.pack_tokens != AUTO:
        return settings, recompute
    longest = max(max(lengths.total) for lengths in data.lengths.values())
    sizes = sorted(possible_packs(settings.training.gradient_accumulation_steps, longest))
    size, mode, reason = sizes[0], recompute, "larger ones are for GPUs, without shard_base"
    if settings.training.device.type == "cuda" and not settings.training.shard_base:  # a trial needs the whole model
        modes = (False, True) if recompute == AUTO else (recompute,)
        size, mode, reason = first_that_fits(
            model, processor, data, settings, [(size, mode) for mode in modes for size in reversed(sizes)]
        )
    settings = settings.with_packs(size)
    print_rank0(f"packs of {size:,} tokens, {settings.training.gradient_accumulation_steps} a step: {reason}")
    return settings, mode


def first_that_fits(
    model: PeftModel, processor: ProcessorMixin, data: TrainingData, settings: Settings,
    choices: list[tuple[int, bool | str]],
) -> tuple[int, bool | str, str]:  # fmt: skip
    """Return the first pack and recomputation whose largest batch fits, else the last, and a phrase that says why."""
    reason = "no other is possible"
    for size, mode in choices[:-1]:
        with recomputing(model, mode):
            enough, phrase = largest_fits(model, processor, data, settings.decided(pack_tokens=size))
        reason = f"with {size:,}{' and nothing recomputed' if mode is False else ''}, {phrase}"
        if enough:
            return size, mode, reason
    return *choices[-1], reason


def needs_recomputation(model: PeftModel, processor: ProcessorMixin, data: TrainingData, settings: Settings) -> bool:
    """Return whether the largest batch fits only if activations are recomputed, after a line about it."""
    enough, reason = True, "there is no GPU"
    if settings.training.device.type == "cuda":
        with recomputing(model, False):
            enough, reason = largest_fits(model, processor, data, settings)
    print_rank0(f"gradient checkpointing {'off' if enough else 'on'}: {reason}")
    return not enough


def largest_fits(
    model: PeftModel, processor: ProcessorMixin, data: TrainingData, settings: Settings
) -> tuple[bool, str]:
    """Return what `fits` does of the largest batch; one process that lacks the memory decides for all."""
    answer = fits(model, collate_largest(processor, data, settings), **step_options(settings))
    return min(gather_object([answer]))


def collate_largest(processor: ProcessorMixin, data: TrainingData, settings: Settings) -> dict:
    """Return the largest batch of training, collated."""
    packed, lengths = settings.pack_tokens is not None, data.lengths["train"].total
    options = {"batch_size": settings.training.per_device_train_batch_size, "pack_tokens": settings.pack_tokens}
    samples = [data.splits["train"][n] for n in largest_batch(lengths, **options)]
    return VisionSFTCollator(processor, packed=packed)(samples)


def step_options(settings: Settings) -> dict:
    """Return the keywords of `try_step`."""
    args = settings.training
    return {
        "dtype": torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None,
        "optim": str(args.optim.value),
    }


def keep_what_fits(model: PeftModel, processor: ProcessorMixin, data: TrainingData, settings: Settings) -> float:
    """Let as many compiled layers keep their wide products as the GPU's memory has room for; all without a GPU.

    Where `auto` finds no room for what selective recomputation keeps at least, everything is computed again.

    Returns:
        The share of the language layers' products that is computed again.
    """
    count = layers = len(language_layers(model))
    if settings.training.device.type == "cuda":
        batch = collate_largest(processor, data, settings)
        count = min(gather_object([layers_with_room(model, batch, **step_options(settings))]))
    if count < 0 and settings.training.gradient_checkpointing == AUTO:
        print_rank0("gradient checkpointing on: there is no room for what selective recomputation keeps")
        recompute_everything(model)
        return 1.0
    count = max(0, count)
    print_rank0(f"gradient checkpointing selective: {count} of {layers} layers also keep their wide products")
    keep_wide_products(model, count)
    return wide_share(model) * (1 - count / layers)


def layers_with_room(model: PeftModel, batch: dict, *, dtype: torch.dtype | None, optim: str) -> int:
    """Return how many layers may keep their wide products, after one trial of a batch or two; -1 if it does not fit.

    Where memory is ample all keep them in the first: it compiles what the training will run.
    """
    layers, size = len(language_layers(model)), wide_bytes(model, batch["input_ids"].numel(), 2 if dtype else 4)
    free, _ = torch.cuda.mem_get_info()
    if free > AMPLE * size * layers:
        keep_wide_products(model, layers)
        used, free = try_step(model, batch, dtype=dtype, optim=optim)
        if used is not None and used <= (1 - SPARE) * free:
            return layers
        keep_wide_products(model, 0)
    used, free = try_step(model, batch, dtype=dtype, optim=optim)
    room = -1 if used is None else ((1 - SPARE) * free - used) / size
    return max(-1, min(layers, math.floor(room)))
