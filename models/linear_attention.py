"""Packed samples in layers with linear attention: recurrence and convolution start anew at each of them."""

import math
from importlib.metadata import distributions, version

import torch
from packaging.version import Version
from transformers import PreTrainedModel
from transformers.utils import is_flash_linear_attention_available

from models.families import Family, family_of

# flash-linear-attention (ops/common/chunk_o.py) refuses the backward pass with the versions of Triton from the first
# to before the second, on GPUs of this compute capability or above: the compiled kernel is wrong there.
WRONG_TRITON, HOPPER = ("3.4.0", "3.7.1"), 9
# Rows are a multiple of so many tokens: behind the convolution the gradient's tokens lie side by side in memory, and
# an H100 multiplies 16-bit matrices whose rows do not start at 16 bytes at 150 TFLOP/s, a quarter of its speed.
ALIGNED = 8
TUNING_LINE = (
    "the kernels of linear attention are tuned when they first run, which takes minutes, and less the next time"
)


def check_kernels(family: Family, *, packed: bool) -> None:
    """Raise ValueError for a family with linear attention that could not train here, or not exactly.

    transformers' own recurrence, which runs everywhere, knows no borders of packs; flash-linear-attention's kernels,
    which transformers takes where they are installed, do not run backward with each Triton.
    """
    if not family.linear_attention:
        return
    if has_kernels(family):
        check_triton(family, version("triton"), torch.cuda.get_device_capability())
    elif packed:
        raise ValueError(
            f"packing: in {family.name}, samples of a pack stay apart only on a GPU with flash-linear-attention: "
            "pip install flash-linear-attention, or set packing: false and train_sampling_strategy: group_by_length"
        )


def has_kernels(family: Family) -> bool:
    """Return whether layers of the family run flash-linear-attention's kernels here."""
    return bool(family.linear_attention) and is_flash_linear_attention_available()


def is_installed(package: str) -> bool:
    return any(distributions(name=package))


def check_triton(family: Family, triton: str, capability: tuple[int, int]) -> None:
    """Raise ValueError for a version of Triton with which the kernels refuse the backward pass on such a GPU."""
    first, right = map(Version, WRONG_TRITON)
    if capability[0] >= HOPPER and first <= Version(triton) < right and not is_installed("tilelang"):
        raise ValueError(
            f"{family.name}: flash-linear-attention does not train with Triton {triton} on a GPU of compute "
            f"capability {capability[0]}.{capability[1]}, where Triton {first} to before {right} has wrong gradients: "
            f"pip install 'triton>={right}'"
        )


def keep_samples_apart(model: PreTrainedModel) -> None:
    """Let layers with linear attention start anew at each sample of a pack, by hooks; nothing for other models.

    The recurrence's kernel takes borders (`cu_seq_lens_q`); without the kernel, transformers raises. The convolution
    over the last few tokens takes none without one more package: each sample gets as many zeros in front of it as the
    convolution looks back, which is what it sees before the first token of a row.
    """
    family = family_of(model)
    language = model.get_submodule(family.language_layers.removesuffix(".layers."))
    if not family.linear_attention or getattr(language, "keeps_samples_apart", False):
        return
    language.keeps_samples_apart = True
    layers = [m for name, m in model.named_modules() if name.split(".")[-1] == family.linear_attention]
    gap = layers[0].conv_kernel_size - 1
    language.register_forward_pre_hook(lambda _, args, kwargs: (args, _add_layout(kwargs, gap)), with_kwargs=True)
    for layer in layers:
        layer.register_forward_pre_hook(_spread, with_kwargs=True)
        layer.register_forward_hook(_gather, with_kwargs=True)


def _add_layout(kwargs: dict, gap: int) -> dict:
    """Add the places of a pack's tokens in the row with gaps, and its borders, once for all layers."""
    cu_seqlens = kwargs.get("text_cu_seqlens")
    if cu_seqlens is None:
        return kwargs
    places, borders = spread_layout(cu_seqlens, kwargs["inputs_embeds"].size(1), gap)
    return {**kwargs, "spread_places": places, "spread_cu_seqlens": borders}


def spread_layout(cu_seqlens: torch.Tensor, length: int, gap: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return where the tokens of a pack go, shape (T,), when `gap` places follow each sample but the last.

    Behind the last one are as many as make the row a multiple of `ALIGNED`.

    Args:
        cu_seqlens: the samples' borders, shape (S + 1,), from 0 to T.
        length: T, tokens.
        gap: empty places between samples.

    Returns:
        The places, and the borders with them, int64: a gap belongs to the sample before it, which does not see it.
    """
    cu_seqlens, samples = cu_seqlens.long(), cu_seqlens.numel() - 1
    tokens = torch.arange(length, device=cu_seqlens.device)
    before = torch.bucketize(tokens, cu_seqlens[1:], right=True)  # samples that end before the token
    borders = cu_seqlens + gap * torch.arange(samples + 1, device=cu_seqlens.device)
    borders[-1] = row_length(length, samples, gap)
    return tokens + gap * before, borders


def row_length(tokens: int, samples: int, gap: int) -> int:
    """Return the length of the row of `spread_layout`."""
    return ALIGNED * math.ceil((tokens + gap * (samples - 1)) / ALIGNED)


def _spread(layer: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    if "spread_places" not in kwargs:
        return None
    hidden, places = kwargs["hidden_states"], kwargs["spread_places"]
    length = row_length(len(places), kwargs["spread_cu_seqlens"].numel() - 1, layer.conv_kernel_size - 1)
    row = hidden.new_zeros(1, length, hidden.size(2)).index_copy(1, places, hidden)
    return args, {**kwargs, "hidden_states": row, "cu_seq_lens_q": kwargs["spread_cu_seqlens"]}


def _gather(layer: torch.nn.Module, args: tuple, kwargs: dict, output: torch.Tensor) -> torch.Tensor | None:
    return output.index_select(1, kwargs["spread_places"]) if "spread_places" in kwargs else None
