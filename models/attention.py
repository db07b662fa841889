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

VARLEN = "varlen"  # in recipes
# transformers passes all windows of the tower in one call only to implementations with "flash" in their name.
REGISTERED = "varlen_flash"
TAKES_GQA = "enable_gqa" in inspect.signature(varlen_attn).parameters  # since torch 2.12


def use_varlen(model: PreTrainedModel) -> None:
    """Let the complete model attend by `varlen_attention`; padded batches and generation still use SDPA with masks."""
    set_attention(model, REGISTERED, varlen_attention)


def uses_varlen(model: PreTrainedModel) -> bool:
    return get_attention(model) == REGISTERED


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
    return kernel(query, key, value, cu_seqlens, longest, scaling, causal), None


@cache
def _has_kernel(device: torch.device) -> bool:
    """Return whether PyTorch's kernel runs on the device: it needs an Ampere GPU or later, so not a T4."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def run_kernel(query, key, value, cu_seqlens, longest: int, scaling, causal: bool) -> torch.Tensor:
    """Run PyTorch's variable-length kernel (flash attention or cuDNN)."""
    if not TAKES_GQA and key.size(1) < query.size(1):
        key, value = (x.repeat_interleave(query.size(1) // key.size(1), dim=1) for x in (key, value))
    query, key, value = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))  # (T, H, D)
    options = {"enable_gqa": key.size(1) < query.size(1)} if TAKES_GQA else {}
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
