"""Shapes of a model without its weights: configuration, model on the meta device, and bytes on a GPU."""

import copy
from collections import Counter
from typing import NamedTuple

import torch
from bitsandbytes.nn import Linear4bit
from peft import PeftModel, get_peft_model
from transformers import AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

from models.experts import WEIGHTS, count_active, expert_layers, name_nf4_weights, nf4_name, use_frozen_experts
from models.families import family_of, published_config
from models.loading import check_quantized, linear_names, load_config, nf4_config
from models.lora import build_lora_config, check_targets
from models.quantization import STORED, nf4_bytes, resolve_quantization, stored_quantization, stored_readings
from planning.compat import replace_with_bnb_linear


def read_config(
    model_name_or_path: str, revision: str | None = None, *, local_files_only: bool = False
) -> tuple[PreTrainedConfig, bool]:
    """Return a model's configuration, and whether it was loaded; False for published shapes that stand in for it.

    Args:
        model_name_or_path: Hub id or local folder.
        revision: Hub branch, tag or commit.
        local_files_only: download nothing.

    Raises:
        ValueError: it cannot be loaded and its shapes are unknown, or it is of an unknown family.
    """
    try:
        return load_config(model_name_or_path, revision=revision, local_files_only=local_files_only), True
    except ValueError as error:
        if config := published_config(model_name_or_path):
            return config, False
        raise ValueError(f"model_name_or_path: {error}") from error


def build_without_weights(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Return the model on the meta device: all shapes of `from_pretrained`, and no memory."""
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(copy.deepcopy(config), dtype=dtype)
    use_frozen_experts(model)
    return model.requires_grad_(False).train()


def with_layers(config: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    """Return the configuration of a model with fewer language layers."""
    config = copy.deepcopy(config)
    config.text_config.num_hidden_layers = layers
    if "layer_types" in config.text_config.to_dict():  # not in Qwen3-VL's
        config.text_config.layer_types = config.text_config.layer_types[:layers]
    return config


def add_lora(model: PreTrainedModel, settings: dict) -> PeftModel:
    """Put LoRA on a model on the meta device; `settings` are the keywords of `build_lora_config`."""
    check_targets(model, settings.get("target_modules"))
    with torch.device("meta"):
        return get_peft_model(model, build_lora_config(model, **settings))


def weight_bytes(
    config: PreTrainedConfig, *, quantized: bool, double_quant: bool, dtype: torch.dtype
) -> dict[str, int]:
    """Return the bytes of the base model's weights on the GPU, by part.

    Args:
        config: of the model.
        quantized: whether the language model's linear layers are in NF4, or those of a base that comes in 4 bit.
        double_quant: whether NF4's scales are quantised too; a base that comes in 4 bit has its own.
        dtype: of all other weights.
    """
    model, family = build_without_weights(config, dtype), family_of(config)
    quantization = resolve_quantization("the base", config, "nf4" if quantized else None)
    if quantization:
        quantise_without_weights(model, quantization, dtype)
    if quantization == STORED:
        double_quant = stored_quantization(config)["bnb_4bit_use_double_quant"]
    in_4_bit = {m.weight: (m.in_features * m.out_features) for m in model.modules() if isinstance(m, Linear4bit)}
    experts = set(expert_weights(model))
    embeddings = (model.get_input_embeddings().weight, model.get_output_embeddings().weight)  # the same if tied
    parts = Counter()
    other = "norms and biases" if quantized else "language layers"
    if quantized and experts:
        other = "norms, biases, routers"
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor in experts:
            in_nf4 = quantization == "nf4"
            size = nf4_bytes(tensor.numel(), double_quant=double_quant) if in_nf4 else tensor.nbytes
            parts["experts, NF4" if in_nf4 else "experts"] += size
        elif tensor in in_4_bit:
            part = "vision tower" if name.startswith(family.vision) else "language layers, NF4"
            parts[part] += nf4_bytes(in_4_bit[tensor], double_quant=double_quant)
        elif name.startswith(family.vision):
            parts["vision tower"] += tensor.nbytes
        else:
            parts["embeddings, LM head" if any(tensor is x for x in embeddings) else other] += tensor.nbytes
    return dict(parts)


def quantise_without_weights(model: PreTrainedModel, quantization: str, dtype: torch.dtype) -> None:
    """Turn the layers of a model on the meta device into 4-bit ones that loading with `quantization` would."""
    nf4 = nf4_config(family_of(model), dtype)
    skipped = nf4.llm_int8_skip_modules
    if quantization == STORED:
        in_4_bit = stored_readings(model)[0]
        skipped = [name for name in linear_names(model) if name not in in_4_bit]
    replace_with_bnb_linear(model, modules_to_not_convert=skipped, quantization_config=nf4)
    if quantization == "nf4":
        name_nf4_weights(model)
    check_quantized(model, quantization)


def expert_weights(model: PreTrainedModel) -> list[torch.Tensor]:
    """Return the weights of all experts, shape (E, out, in) each, also where `quantise_without_weights` was called."""
    names = [spelling for name in WEIGHTS for spelling in (name, nf4_name(name))]
    layers = expert_layers(model).values()
    return [getattr(layer, name) for layer in layers for name in names if hasattr(layer, name)]


class WeightCounts(NamedTuple):
    """Weights of the language layers that a token passes, of the vision tower, and of the largest language layer."""

    language: int
    tower: int
    largest: int


def count_weights(config: PreTrainedConfig) -> WeightCounts:
    model, family = build_without_weights(config, torch.bfloat16), family_of(config)
    names = linear_names(model, family.language_layers)
    language = [model.get_submodule(name).weight.numel() for name in names]
    experts = [weight.numel() for weight in expert_weights(model)]
    tower = sum(x.numel() for name, x in model.named_parameters() if name.startswith(family.vision))
    return WeightCounts(sum(language) + count_active(config, sum(experts)), tower, max([*language, *experts]))
