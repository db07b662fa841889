"""Undocumented interfaces of transformers and bitsandbytes, watched by tests/unit/test_compat_models.py."""

import logging
from collections.abc import Callable

import torch
from bitsandbytes.nn import Linear4bit
from torch.nn.utils.parametrize import is_parametrized
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.integrations.bitsandbytes import Bnb4bitQuantize
from transformers.integrations.moe import ExpertsInterface, _grouped_mm
from transformers.masking_utils import sdpa_mask
from transformers.quantizers import register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module


def set_attention(model: PreTrainedModel, name: str, function: Callable) -> None:
    """Register an attention function and let the complete model call it, with SDPA's masks.

    `set_attn_implementation` takes names with "flash" for packages, or for kernels on the Hub.
    """
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, sdpa_mask)
    model.config._attn_implementation = name


def attention_names(config: PreTrainedConfig) -> list[str | None]:
    """Return the attention that a configuration names: for the model, its text part and its tower."""
    return [part._attn_implementation for part in (config, config.get_text_config(), config.vision_config)]


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


def register_experts(name: str, function: Callable) -> None:
    """Let models compute their experts by a function, under a name for `set_experts_implementation`."""
    ExpertsInterface.register(name, function)


def grouped_product(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Return the products of rows (S, in) with weights (E, in, out), of which each has the rows up to its end."""
    return _grouped_mm(x, weight, ends)


def lora_factors(module: torch.nn.Module, name: str) -> tuple[torch.Tensor | None, list[tuple]]:
    """Return a parameter as it is stored, and the updates that PEFT has put on it for this forward pass.

    Returns:
        The parameter, and for each update its factors, shapes (E, out, r) and (E, r, in), and the scaling.
    """
    if not is_parametrized(module, name):
        return getattr(module, name, None), []
    chain = module.parametrizations[name]
    return chain.original, [(proxy.lhs, proxy.rhs, proxy.scaling) for proxy in chain]


def make_experts_quantizer(name: str, *, is_expert: Callable, quantise: Callable, finish: Callable) -> None:
    """Register a quantizer of transformers that is bitsandbytes' for linear layers, and another one for experts.

    Args:
        name: the `quant_method` that selects it.
        is_expert: says of a model and a parameter's path whether it belongs to experts.
        quantise: returns the parameter for such a weight and the settings of the quantisation.
        finish: called with the loaded model.
    """

    class QuantiseExperts(ConversionOps):
        def __init__(self, quantizer):
            self.quantizer, self.linear = quantizer, Bnb4bitQuantize(quantizer)

        def convert(self, input_dict, model=None, **kwargs):
            ((path, value),) = input_dict.items()
            if not is_expert(model, path):
                return self.linear.convert(input_dict, model=model, **kwargs)
            weight = value[0] if isinstance(value, list) else value
            return {path: quantise(weight, self.quantizer.quantization_config)}

    class ExpertsQuantizer(Bnb4BitHfQuantizer):
        def param_needs_quantization(self, model, param_name, **kwargs):
            return is_expert(model, param_name) or super().param_needs_quantization(model, param_name, **kwargs)

        def get_quantize_ops(self):
            return QuantiseExperts(self)

        def _process_model_after_weight_loading(self, model, **kwargs):
            finish(model)
            return super()._process_model_after_weight_loading(model, **kwargs)

    if name not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(name)(ExpertsQuantizer)


def ignore_in_ddp(model: torch.nn.Module, names: list[str]) -> None:
    """Keep DistributedDataParallel from copying parameters between processes."""
    torch.nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)


def set_up_compiler() -> None:
    """Let a compiled function have 64 variants, with the floats that it sees as constants, and say less.

    Coincidences of sizes make new variants; past 8 torch ends the run. Floats, which are rates and scales here, it
    would first make inputs, find that they are constants, and compile everything a second time. Of sharded layers,
    which it does not guard, it would make each width an input as well, and compile them for twice as long.
    """
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.specialize_float = True
    torch._dynamo.config.skip_fsdp_guards = False
    # asks users of selective recomputation to look for operations in place
    logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)
