"""Estimates for a run: tokens, steps, memory and time, from shapes and lengths."""

import math
import statistics
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace

from datasets import Dataset, DatasetDict

from data_prep.sizes import count_image_tokens
from planning.activations import Activations
from training.lengths import SampleLengths
from training.memory_probe import optimizer_bytes
from training.samplers import PackSampler

GB = 1e9
MEMORIES = (12, 16, 24, 40, 48, 80)  # GB, of common GPUs
LARGEST_BATCH = 128 * 1024  # tokens; no recipe has packs of that size
# Memory that PyTorch's allocator reserves but does not use, as a share of the activations; with it, the plan agrees
# with the memory reserved on an H100 (benchmarks/README.md). PyTorch does not count CUDA's context.
SLACK, CONTEXT = 0.25, 600_000_000
# TRL's fused LM head (trl.kernels.chunked_logprob) multiplies so many tokens and words at once, each way.
HEAD_TOKENS, HEAD_WORDS = 4096, 32768
# Dense bf16 with float32 sums, FLOP/s: data sheets of L4, A100 and H100 SXM, and NVIDIA's Ada white paper (RTX 4090).
GPUS = {"L4": 121e12, "RTX 4090": 165e12, "A100": 312e12, "H100": 989e12}
# Measured on an H100 with packs of 8,192 tokens: 275 TFLOP/s, and 408 compiled (benchmarks/README.md).
SHARE_OF_PEAK = {False: 275 / 989, True: 408 / 989}
HIGH_RATE, HIGH_RATE_SMALL, FEW_SAMPLES = 2e-4, 1e-4, 8  # for LoRA on a pretrained model
CHARACTERS_PER_TOKEN, SYSTEM_TOKENS, TURN_TOKENS, IMAGE_ENDS = 4, 11, 5, 2  # for estimates without a tokenizer


# Complete language layers under FSDP2: the one that runs, the next one, and the buffer that the next one arrives in.
FETCHED = 3
EMBEDDING_BUFFER = "buffer of the embedding"  # a part of a plan


@dataclass
class MemoryPlan:
    """GPU memory of one combination of quantisation and checkpointing.

    Attributes:
        name: of the combination.
        fixed: bytes that do not depend on the batch, by part.
        traced: activations of a batch of `tokens`; those of other batches are proportional.
        tokens: see `traced`.
        text_share: of the tokens; an upper bound for the share of answers.
        hidden: width of the language model.
        itemsize: bytes of a number in the layers.
        recomputed: share of the language layers' forward pass that the backward pass repeats.
        kept: bytes of each token that compiled layers keep besides.
        wide: bytes of each token that one more layer with its wide products would keep.
        layers: how many there are of these; the last one's MLP sees the answers' tokens alone, and keeps little.
        slack: what the allocator reserves beyond the activations, as a share of them.
    """

    name: str
    fixed: dict[str, int]
    traced: Activations
    tokens: int
    text_share: float
    hidden: int
    itemsize: int
    recomputed: float = 0.0
    kept: int = 0
    wide: int = 0
    layers: int = 0
    slack: float = SLACK

    def with_wide(self, count: int) -> "MemoryPlan":
        """Return the plan in which so many of the layers keep their wide products."""
        name, kept = f"{self.name}, {count} of {self.layers} wide", self.kept + min(count, self.layers - 1) * self.wide
        return replace(self, name=name, kept=kept, recomputed=self.recomputed * (1 - count / self.layers))

    def parts(self, tokens: int) -> dict[str, float]:
        """Return the bytes for a batch of `tokens` by part, at the peak."""
        scale, answers = tokens / self.tokens, tokens * self.text_share
        tower, saved, peak = (scale * x for x in (self.traced.tower, self.traced.saved, self.traced.peak))
        buffers = 2 * min(answers, HEAD_TOKENS) * HEAD_WORDS * self.itemsize
        logits = buffers + answers * self.hidden * (4 + 2 * self.itemsize)
        at_head = saved + logits > peak  # else the peak is in the layers' backward pass
        by_batch = {
            "activations, vision tower": tower,
            "activations, language layers": (saved if at_head else peak) - tower,
            "logits of the answers, in pieces": logits if at_head else 0,
        }
        slack = {"allocator's slack": self.slack * sum(by_batch.values())}
        kept = {"products that are not recomputed": tokens * self.kept}
        return {**self.fixed, **by_batch, **kept, **slack, "CUDA's context": CONTEXT}

    def total(self, tokens: int) -> float:
        return sum(self.parts(tokens).values())

    def largest(self, memory: float) -> int:
        """Return the tokens of the largest batch that fits `memory`, bytes: a multiple of 256."""
        sizes = range(256, LARGEST_BATCH + 1, 256)
        return 256 * bisect_right(sizes, memory, key=self.total)


def trained_bytes(count: int, optim: str, *, mixed: bool) -> dict[str, int]:
    """Return the bytes of trained weights in float32, their gradients and the optimizer's state.

    Args:
        count: trained weights.
        optim: of the recipe.
        mixed: whether autocast makes 16-bit copies.
    """
    each = 4 + 4 + (2 if mixed else 0)
    return {"LoRA and its gradients": count * each, "optimizer": round(count * optimizer_bytes(optim))}


def divide_weights(parts: dict[str, int], processes: int, *, layers: int, tied: bool) -> dict[str, int]:
    """Return what one of several processes holds of the weights that FSDP2 shards.

    Args:
        parts: bytes of the weights, as `planning.shapes.weight_bytes` names them, or "LM head" without the embedding.
        processes: that share them.
        layers: of the language model.
        tied: whether the LM head has the embedding's weights, which are then not sharded.
    """
    ends = "embeddings, LM head"
    whole = {"norms and biases", ends} if tied else {"norms and biases"}
    divided = {name: size if name in whole else size // processes for name, size in parts.items()}
    language = sum(size for name, size in parts.items() if name.startswith("language layers"))
    divided["complete layers"] = FETCHED * language // layers
    if ends in parts and not tied:
        # the embedding arrives in a buffer of another stream, which later layers leave mostly empty
        divided[EMBEDDING_BUFFER] = max(0, parts[ends] // 2 - 2 * language // layers)
    return divided


def estimate_lengths(split: Dataset, *, token_side: int, min_pixels: int, max_pixels: int) -> SampleLengths:
    """Count image tokens from the images' sizes, and estimate those of the text from its characters.

    Args:
        split: in the schema of `data_prep`.
        token_side: side of the square that one token covers, px.
        min_pixels: smallest area after resizing, px^2.
        max_pixels: largest area after resizing, px^2.
    """
    total, image = [], []
    limits = {"min_pixels": min_pixels, "max_pixels": max_pixels, "cell": token_side}
    for messages, sizes in zip(split["messages"], split["image_sizes"], strict=True):
        image.append(sum(count_image_tokens(height, width, **limits) for width, height in sizes))
        text = sum(len(turn["content"]) for turn in messages) // CHARACTERS_PER_TOKEN
        total.append(image[-1] + text + SYSTEM_TOKENS + TURN_TOKENS * len(messages) + IMAGE_ENDS * len(sizes))
    return SampleLengths(total=total, image=image)


def describe_lengths(lengths: SampleLengths) -> str:
    total, image = sorted(lengths.total), sum(lengths.image) / sum(lengths.total)
    mean, median, high = statistics.mean(total), statistics.median(total), total[math.ceil(0.95 * len(total)) - 1]
    spread = f"{mean:,.0f} a sample, median {median:,.0f}, 95 % up to {high:,}, longest {total[-1]:,}"
    return f"{spread}; {100 * image:.0f} % image"


def steps_per_epoch(
    lengths: Sequence[int], *, pack_tokens: int | None, batch: int, accumulate: int, seed: int, epochs: int
) -> int:
    """Return the optimizer steps of an epoch, of packs (made as in training) or of `batch` samples."""
    if pack_tokens is not None:
        return len(PackSampler(lengths, pack_tokens, seed=seed, multiple=accumulate, epochs=epochs)) // accumulate
    return math.ceil(math.ceil(len(lengths) / batch) / accumulate)


def find_warnings(
    splits: DatasetDict | None, *, learning_rate: float, samples_per_step: float | None, warmup: int
) -> list[str]:
    """Return a line for each setting that is probably a mistake."""
    warnings = []
    few = samples_per_step is not None and samples_per_step < FEW_SAMPLES
    if learning_rate > (limit := HIGH_RATE_SMALL if few else HIGH_RATE):
        case = f"steps of {samples_per_step:.0f} samples" if few else "LoRA on a pretrained model"
        warnings.append(f"learning_rate {learning_rate:g} is high for {case}: above {limit:g}")
    if warmup < 3:
        warnings.append(f"warmup_steps: {warmup} are few; Adam's averages need some steps before the full rate")
    return warnings + _missing_labels(splits or {})


def _missing_labels(splits: DatasetDict | dict) -> list[str]:
    labels = {name: {label for label in split["label"] if label} for name, split in splits.items()}
    everywhere = set().union(*labels.values())
    missing = {name: sorted(everywhere - present) for name, present in labels.items()}
    return [f"{name} has no sample of {', '.join(absent)}" for name, absent in missing.items() if absent]


def format_plans(plans: list[MemoryPlan], chosen: MemoryPlan, *, needed: int) -> list[str]:
    """Return a table of fixed GB, GB for 1,000 tokens, and the largest batch by GPU memory.

    Args:
        plans: one in each line.
        chosen: gets a star.
        needed: tokens that a batch must have; smaller ones are shown as "-".
    """
    sizes = "".join(f"{f'{memory} GB':>9}" for memory in MEMORIES)
    lines = [f"{'largest batch, tokens':<33}{'fixed':>6}{'/1,000':>7}{sizes}"]
    for plan in plans:
        fixed, slope = sum(plan.fixed.values()) + CONTEXT, (plan.total(8192) - plan.total(4096)) / 4.096
        fits = [plan.largest(memory * GB) for memory in MEMORIES]
        cells = "".join(f"{tokens:>9,}" if tokens >= needed else f"{'-':>9}" for tokens in fits)
        lines.append(f"{'*' if plan is chosen else ' '} {plan.name:<31}{fixed / GB:>6.1f}{slope / GB:>7.2f}{cells}")
    return lines


def format_duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.2g} {unit}" if seconds < 10 * size else f"{seconds / size:.0f} {unit}"
    return "a minute or two" if seconds > 60 else "under a minute"
