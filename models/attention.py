"""Attention within segments of any length: windows in the vision tower, packed samples in the language model."""

import inspect
from collections.abc import Callable
from functools import cache

import torch
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from models.compat import get_attention, set_attention
from models.linear_attention import keep_samples_apart

VARLEN = "varlen"  # in recipes
# What recipes and files may name. Any other name transformers takes for code on the Hub, which it fetches and runs.
IMPLEMENTATIONS = (VARLEN, "sdpa", "eager", "flash_attention_2", "flash_attention_3", "flash_attention_4")
# transformers passes all windows of the tower in one call only to implementations with "flash" in their name.
REGISTERED = "varlen_flash"
# torch 2.12 and later want to be told of fewer heads of keys and values; 2.11 takes them as they are.
GQA_OPTION = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


def check_attention(name: str | None, where: str = "") -> None:
    """Raise ValueError for the name of an attention that is none of `IMPLEMENTATIONS`."""
    if name is not None and name not in IMPLEMENTATIONS:
        rule = f"expected one of {', '.join(IMPLEMENTATIONS)}"
        raise ValueError(f"{where}attn_implementation: {rule}, found {name!r:.60}")


def use_varlen(model: PreTrainedModel) -> None:
    """Let the complete model attend by `varlen_attention`; padded batches and generation still use SDPA with masks."""
    set_attention(model, REGISTERED, varlen_attention)
    keep_samples_apart(model)


def uses_varlen(model: PreTrainedModel) -> bool:
    return get_attention(model) == REGISTERED


def with_unread_mask(model: PreTrainedModel, inputs: dict) -> dict:
    """Return a pack's inputs with a mask that `varlen_attention` does not read; others as they are.

    One of four dimensions is passed on as it is. Without one transformers would look for the samples' borders in the
    positions, for which the host waits for the GPU, and build one of (T, T); a pack of one sample would get none, for
    which compiled layers would be compiled anew.
    """
    if "text_cu_seqlens" not in inputs or not uses_varlen(model):
        return inputs
    return {**inputs, "attention_mask": inputs["input_ids"].new_ones(1, 1, 1, 1, dtype=torch.bool)}


def varlen_attention(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    attention_mask: torch.Tensor | None, scaling: float | None = None, dropout: float = 0.0,
    is_causal: bool | None = None, cu_seq_lens_q: torch.Tensor | None = None, max_length_q: int | None = None,
    text_cu_seqlens: torch.Tensor | None = None, text_max_seqlen: int | None = None,
    kernel: Callable | None = None, **kwargs,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """Attend within segments. The signature is that of attention functions in transformers.

    Args:
        module: the calling layer.
        query: shape (1, H, T, D) with segments, (B, H, T, D) without.
        key: shape (1, H or fewer, T, D).
        value: as `key`.
        attention_mask: of a batch without segments; see `sdpa_attention_forward`.
        scaling: of the scores; 1 / sqrt(D) when None.
        dropout: of the attention weights; must be 0 with segments.
        is_causal: whether later positions are hidden; the layer's own setting when None.
        cu_seq_lens_q: boundaries of the tower's windows, int32, shape (S + 1,), from 0 to T.
        max_length_q: longest window.
        text_cu_seqlens: boundaries of the packed samples, as `cu_seq_lens_q`.
        text_max_seqlen: longest sample.
        kernel: `run_kernel` or `run_by_length`; by device and dtype when None.

    Returns:
        Shape (1, T, H, D), and None in place of the weights.
    """
    cu_seqlens, longest = cu_seq_lens_q, max_length_q
    if cu_seqlens is None:
        cu_seqlens, longest = text_cu_seqlens, text_max_seqlen
    if cu_seqlens is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
    if dropout:
        raise ValueError(f"attention_dropout: expected 0 with attn_implementation: {VARLEN}, found {dropout}")
    causal = module.is_causal if is_causal is None else is_causal
    if kernel is None:
        half = query.dtype in (torch.float16, torch.bfloat16)
        kernel = run_kernel if half and _has_kernel(query.device) else run_by_length
        if kernel is run_by_length and torch.compiler.is_compiling():
            kernel = run_by_length_opaque
    return kernel(query, key, value, cu_seqlens, longest, scaling, causal), None


@torch.compiler.assume_constant_result
def _has_kernel(device: torch.device) -> bool:
    """Return whether PyTorch's kernel runs on the device: it needs an Ampere GPU or later, so not a T4."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


@torch.compiler.assume_constant_result
def takes_gqa(device: torch.device) -> bool:
    """Return whether the kernel is right with fewer heads of keys and values; else they are repeated."""
    return device.type != "cuda" or _try_gqa(device)  # elsewhere it is only traced


@cache  # below the mark for the compiler, which would look through it into the function
def _try_gqa(device: torch.device) -> bool:
    query, key, value = (
        torch.randn(16, heads, 64, device=device, dtype=torch.float16, requires_grad=True) for heads in (4, 2, 2)
    )
    offsets = torch.tensor([0, 5, 16], device=device, dtype=torch.int32)
    results = []
    # Hooks of its own: within a layer that is recomputed, the layer's would count the tensors of this trial.
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        for repeats in (1, 2):
            options = GQA_OPTION if repeats == 1 else {}
            sides = query, key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
            try:
                output = varlen_attn(*sides, offsets, offsets, 11, 11, window_size=(-1, 0), **options)
                gradients = torch.autograd.grad(output.float().square().sum(), (query, key, value))
            except (RuntimeError, ValueError):
                return False
            results.append((output, *gradients))
    return all(torch.allclose(a, b, atol=2e-2, rtol=2e-2) for a, b in zip(*results, strict=True))


def run_kernel(query, key, value, cu_seqlens, longest: int, scaling, causal: bool) -> torch.Tensor:
    """Run PyTorch's variable-length kernel (flash attention or cuDNN)."""
    fewer = key.size(1) < query.size(1)
    if fewer and not takes_gqa(query.device):
        key, value = (x.repeat_interleave(query.size(1) // key.size(1), dim=1) for x in (key, value))
        fewer = False
    query, key, value = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))  # (T, H, D)
    options = GQA_OPTION if fewer else {}
    window = (-1, 0) if causal else (-1, -1)
    output = varlen_attn(
        query, key, value, cu_seqlens, cu_seqlens, longest, longest, scale=scaling, window_size=window, **options
    )
    return output[None]


def run_by_length(query, key, value, cu_seqlens, longest: int, scaling, causal: bool) -> torch.Tensor:
    """Run SDPA once for all segments of one length: the results of one call a segment, with far fewer calls."""
    lengths = cu_seqlens.diff().tolist()
    groups = {}
    for number, length in enumerate(lengths):
        groups.setdefault(length, []).append(number)
    # Split, stacked and concatenated as (T, H, D), the layout in memory, so that complete rows are copied.
    query, key, value = (x[0].transpose(0, 1).split(lengths) for x in (query, key, value))
    outputs = [None] * len(lengths)
    for numbers in groups.values():
        stacked = [torch.stack([x[n] for n in numbers]).transpose(1, 2) for x in (query, key, value)]  # (S, H, L, D)
        output = scaled_dot_product_attention(
            *stacked, is_causal=causal, scale=scaling, enable_gqa=stacked[1].size(1) < stacked[0].size(1)
        )
        for number, segment in zip(numbers, output.transpose(1, 2), strict=True):
            outputs[number] = segment
    return torch.cat(outputs)[None]


def run_by_length_opaque(query, key, value, cu_seqlens, longest: int, scaling, causal: bool) -> torch.Tensor:
    """`run_by_length` as one operation of a compiled graph, which cannot know the lengths."""
    return torch.ops.skin.attend_by_length(query, key, value, cu_seqlens, scaling, causal)


@torch.library.custom_op("skin::attend_by_length", mutates_args=())
def _attend_by_length(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seqlens: torch.Tensor, scaling: float | None,
    causal: bool,
) -> torch.Tensor:  # fmt: skip
    return run_by_length(query, key, value, cu_seqlens, 0, scaling, causal).contiguous()


@_attend_by_length.register_fake
def _(query, key, value, cu_seqlens, scaling, causal):
    return query.new_empty(1, query.size(2), query.size(1), query.size(3))


@torch.library.custom_op("skin::attend_by_length_backward", mutates_args=())
def _attend_by_length_backward(
    gradient: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seqlens: torch.Tensor,
    scaling: float | None, causal: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Autograd is off within an operation, so the gradients are written out, for each segment."""
    lengths, scale = cu_seqlens.diff().tolist(), scaling or query.size(-1) ** -0.5
    gradient = gradient.transpose(1, 2)  # (1, H, T, D), as the others
    sides = zip(*(x[0].split(lengths, dim=1) for x in (gradient, query, key, value)), strict=True)
    parts = [_segment_gradients(*side, scale, causal) for side in sides]
    return tuple(torch.cat(tensors, dim=1)[None].contiguous() for tensors in zip(*parts, strict=True))


def _segment_gradients(gradient, query, key, value, scale: float, causal: bool) -> tuple[torch.Tensor, ...]:
    """Return the gradients of one segment's query, key and value, shape (H or fewer, L, D)."""
    heads, length, _ = key.shape
    dtype, grouped = (
        key.dtype,
        (heads, query.size(0) // heads, length, key.size(-1)),
    )  # query heads beside the key head that they share
    gradient, query = (x.float().reshape(grouped) for x in (gradient, query))
    key, value = (x.float()[:, None] for x in (key, value))
    scores = query @ key.transpose(-1, -2) * scale
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
    weights = scores.softmax(dim=-1)
    of_weights = gradient @ value.transpose(-1, -2)
    of_scores = weights * (of_weights - (of_weights * weights).sum(-1, keepdim=True)) * scale
    of_value, of_key = weights.transpose(-1, -2) @ gradient, of_scores.transpose(-1, -2) @ query
    return (of_scores @ key).flatten(0, 1).to(dtype), of_key.sum(1).to(dtype), of_value.sum(1).to(dtype)


@_attend_by_length_backward.register_fake
def _(gradient, query, key, value, cu_seqlens, scaling, causal):
    return tuple(x.new_empty(x.shape) for x in (query, key, value))


def _keep_for_backward(ctx, inputs, output) -> None:
    *tensors, ctx.scaling, ctx.causal = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, gradient):
    gradients = torch.ops.skin.attend_by_length_backward(gradient, *ctx.saved_tensors, ctx.scaling, ctx.causal)
    return *gradients, None, None, None


_attend_by_length.register_autograd(_backward, setup_context=_keep_for_backward)
