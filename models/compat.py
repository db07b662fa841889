"""Undocumented interfaces of transformers and bitsandbytes, watched by tests/unit/test_compat_models.py."""

from collections.abc import Callable

import torch
from bitsandbytes.nn import Linear4bit
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module


def set_attention(model: PreTrainedModel, name: str, function: Callable) -> None:
    """Register an attention function and let the complete model call it, with SDPA's masks.

    `set_attn_implementation` takes names with "flash" for packages, or for kernels on the Hub.
    """
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, sdpa_mask)
    model.config._attn_implementation = name


def get_attention(model: PreTrainedModel) -> str:
    """Return the name of the attention function that the model calls."""
    return model.config._attn_implementation


def keep_trainable_on_cpu(model: PreTrainedModel) -> None:
    """Keep evaluation from repacking NF4 weights in place: on CPUs with AVX512-BF16, training would then crash."""
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def is_stored_quantized(model: PreTrainedModel) -> bool:
    """Return whether a model was loaded from files that are quantised."""
    quantizer = getattr(model, "hf_quantizer", None)
    return quantizer is not None and quantizer.pre_quantized


def anchored_match(path: str, skipped: list[str]) -> bool:
    """Return whether transformers leaves a module in 16 bit because of `llm_int8_skip_modules`."""
    return not should_convert_module(path, skipped)


def default_16_bit_modules(model: PreTrainedModel) -> list[str]:
    """Return what transformers leaves in 16 bit without such a list: the LM head, and what is tied to others."""
    return get_keys_to_not_convert(model)


def allow_more_graphs() -> None:
    """Let a compiled function have 64 variants. Coincidences of sizes make new ones; past 8 torch ends the run."""
    torch._dynamo.config.recompile_limit = 64
