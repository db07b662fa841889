"""Selective recomputation: the backward pass keeps matrix products and attention, and computes the rest again."""

import hashlib
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

CHEAP = 8  # a product this many times wider than its input costs less to compute than to store: LoRA's second one
# What a layer keeps for its backward pass, besides its input: nothing; attention and the products that are no wider
# than their input; or those of gate and up too, most of a layer's activations and two fifths of its arithmetic.
KEPT = NOTHING, NARROW, WIDE = "nothing", "narrow", "wide"
ATTENTION = ("varlen_attn", "attend_by_length", "scaled_dot_product")  # in names of operations


def recompute_selected(forward: Callable, *, keep: str) -> Callable:
    """Return a layer's forward pass that keeps for the backward pass what is expensive to compute.

    It has to be compiled: the compiler then merges the recomputation with the backward pass.

    Args:
        forward: of the layer's class.
        keep: one of `KEPT`.
    """
    contexts = partial(create_selective_checkpoint_contexts, partial(choose, keep=keep))
    contexts.cache_hash = f"{keep} {rules_hash()}"  # else each run traces the layers' backward pass anew

    def selective(self, *args, **kwargs):
        return checkpoint(partial(forward, self), *args, use_reentrant=False, context_fn=contexts, **kwargs)

    return selective


@cache
def rules_hash() -> str:
    """Return a hash of the code that decides what is kept, and of the operations that it names."""
    files = [Path(__file__).with_name(name) for name in ("recomputation.py", "nf4_linear.py", "attention.py")]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def choose(context, op, *args, keep: str, **kwargs) -> CheckpointPolicy:
    """Return whether the results of an operation are kept."""
    if "randint" in str(op):  # seeds of dropout
        return CheckpointPolicy.MUST_SAVE
    if keep == NOTHING:
        return CheckpointPolicy.MUST_RECOMPUTE
    if any(name in str(op) for name in ATTENTION):
        return CheckpointPolicy.MUST_SAVE
    sizes = product_sizes(op, args)
    if sizes is None:
        return CheckpointPolicy.MUST_RECOMPUTE
    kept = sizes[1] <= sizes[0] or (keep == WIDE and is_wide(*sizes))
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.MUST_RECOMPUTE


def is_wide(inner: int, outer: int) -> bool:
    """Return whether a product is wider than its input, but not so wide that it is cheap to compute."""
    return inner < outer < CHEAP * inner


def product_sizes(op, args: tuple) -> tuple[int, int] | None:
    """Return the widths of a matrix product's input and output; None for another operation."""
    if op is torch.ops.skin.nf4_linear.default:
        x, _, _, outer, *_ = args
        return x.shape[-1], outer
    if op in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
        return args[-1].shape
    return None


class SeededDropout(nn.Dropout):
    """Dropout whose mask is a function of one random number, so that it can be computed again from that number.

    The compiler of torch 2.11 fails on random numbers that are recomputed, and would have to store whole masks.
    """

    scale: torch.Tensor  # a float would be an input of the compiled function, and what it is multiplied by be stored
    threshold: int

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return x
        seed = torch.randint(-(2**31), 2**31 - 1, (1,), dtype=torch.int32, device=x.device)
        return torch.where(hashed(seed, x.shape) >= self.threshold, x * self.scale, 0)


def make_seeded(dropout: nn.Dropout, device: torch.device) -> None:
    """Turn a dropout layer, in place, into a `SeededDropout` of the same rate for inputs on the device."""
    dropout.__class__ = SeededDropout
    dropout.scale = torch.tensor(1 / (1 - dropout.p), device=device)
    dropout.threshold = int(dropout.p * 2**31)


def hashed(seed: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Return a number from 0 to 2^31 - 1 for each element of a tensor of this shape, as good as random.

    Source:
        the finaliser of MurmurHash3 by Austin Appleby, over row, column and seed.
    """
    row = torch.arange(shape[:-1].numel(), dtype=torch.int32, device=seed.device).view(*shape[:-1], 1)
    column = torch.arange(shape[-1], dtype=torch.int32, device=seed.device)
    value = row * -1640531535 + column ^ seed
    for shift, factor in ((16, -2048144789), (13, -1028477387)):
        value = (value ^ (value >> shift & (1 << 32 - shift) - 1)) * factor  # a shift of signed numbers keeps the sign
    return (value ^ (value >> 16 & 0xFFFF)) & 0x7FFFFFFF
