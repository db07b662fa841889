"""One attention for segments of any length: windows in the vision tower, packed samples in the language model."""

import inspect
from functools import cache
from itertools import pairwise

import torch
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

VARLEN = "varlen"  # in recipes
# transformers hands the tower's windows over at once, and not one by one, to what has "flash" in its name.
REGISTERED = "varlen_flash"
TAKES_GQA = "enable_gqa" in inspect.signature(varlen_attn).parameters  # from torch 2.12 on


def use_varlen(model: PreTrainedModel) -> None:
    """Let the whole model attend by `varlen_attention`; padded batches and generation keep SDPA and its masks."""
    AttentionInterface.register(REGISTERED, varlen_attention)
    AttentionMaskInterface.register(REGISTERED, sdpa_mask)
    # `set_attn_implementation` would look for a package or a kernel on the Hub behind any name with "flash" in it.
    model.config._attn_implementation = REGISTERED


def varlen_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    pack_offsets: torch.Tensor | None = None,
    pack_longest: int | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Attend within segments, in the form that transformers calls attention functions.

    Args:
        module: the calling layer.
        query: shape (1, H, T, D) with segments, (B, H, T, D) without.
        key: shape (1, H or fewer, T, D).
        value: as `key`.
        attention_mask: of a batch without segments; see `sdpa_attention_forward`.
        scaling: of the scores; 1 / sqrt(D) when None.
        dropout: of the attention weights; must be 0 with segments.
        is_causal: whether later positions are hidden; the layer's own when None.
        cu_seq_lens_q: the tower's window borders, int32, shape (S + 1,), from 0 to T.
        max_length_q: longest window.
        pack_offsets: the packed samples' borders, int32, shape (S + 1,), from 0 to T.
        pack_longest: longest sample.

    Returns:
        Shape (1, T, H, D), and None in place of the weights.
    """
    offsets, longest = (cu_seq_lens_q, max_length_q) if cu_seq_lens_q is not None else (pack_offsets, pack_longest)
    if offsets is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
    if dropout:
        raise ValueError(f"attention_dropout: expected 0 with attn_implementation: {VARLEN}, found {dropout}")
    causal = module.is_causal if is_causal is None else is_causal
    attend = on_gpu if query.dtype in (torch.float16, torch.bfloat16) and _has_kernel(query.device) else _by_length
    return attend(query, key, value, offsets, longest, scaling, causal), None


@cache
def _has_kernel(device: torch.device) -> bool:
    """Tell whether PyTorch's kernel runs there: it needs an Ampere GPU or a later one, so that a T4 has none."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def on_gpu(query, key, value, offsets, longest: int, scaling, causal: bool) -> torch.Tensor:
    """Run PyTorch's variable-length kernel (flash attention or cuDNN)."""
    if not TAKES_GQA and key.size(1) < query.size(1):
        key, value = (side.repeat_interleave(query.size(1) // key.size(1), dim=1) for side in (key, value))
    query, key, value = (side[0].transpose(0, 1).contiguous() for side in (query, key, value))  # (T, H, D)
    options = {"enable_gqa": key.size(1) < query.size(1)} if TAKES_GQA else {}
    window = (-1, 0) if causal else (-1, -1)
    output = varlen_attn(
        query, key, value, offsets, offsets, longest, longest, scale=scaling, window_size=window, **options
    )
    return output[None]


def _by_length(query, key, value, offsets, longest: int, scaling, causal: bool) -> torch.Tensor:
    """Run SDPA once for all segments of one length: the same numbers as one call a segment, in far fewer calls."""
    lengths = [end - start for start, end in pairwise(offsets.tolist())]
    groups = {}
    for number, length in enumerate(lengths):
        groups.setdefault(length, []).append(number)
    # Split, stacked and put together again as (T, H, D), the layout in memory, so that whole rows are copied.
    sides = [side[0].transpose(0, 1).split(lengths) for side in (query, key, value)]
    outputs = [None] * len(lengths)
    for numbers in groups.values():
        own = [torch.stack([side[n] for n in numbers]).transpose(1, 2) for side in sides]  # (S, H, L, D)
        output = scaled_dot_product_attention(
            *own, is_causal=causal, scale=scaling, enable_gqa=key.size(1) < query.size(1)
        )
        for number, segment in zip(numbers, output.transpose(1, 2), strict=True):
            outputs[number] = segment
    return torch.cat(outputs)[None]
