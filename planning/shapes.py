"""The family's shapes without its weights: configurations, models on the meta device, and bytes on a GPU."""

import copy
import re
from collections import Counter
from typing import NamedTuple

import torch
from bitsandbytes.nn import Linear4bit
from peft import PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel
from transformers.integrations.bitsandbytes import replace_with_bnb_linear

from models.families import FAMILY, LANGUAGE_LAYERS, TABLE, VISION, tabled_config
from models.loading import check_quantized, quantization_config
from models.lora import build_lora_config, check_targets

BLOCK, SCALES_A_BLOCK = 64, 256  # NF4 weights that share a scale; scales that share one in double quantisation
CODES = 16 * 4, 256 * 4  # bytes of the tables of NF4's 16 values and of the 256 that scales are rounded to


def read_config(
    model_name_or_path: str, revision: str | None = None, *, local_files_only: bool = False
) -> tuple[PreTrainedConfig, bool]:
    """Return a model's configuration, and whether it was read; a known model that cannot be reached is in the table.

    Args:
        model_name_or_path: Hub id or local folder.
        revision: Hub branch, tag or commit.
        local_files_only: do not ask the Hub for what is not here yet.

    Raises:
        ValueError: it cannot be read and is not in the table either, or is of another family.
    """
    try:
        config = AutoConfig.from_pretrained(model_name_or_path, revision=revision, local_files_only=local_files_only)
    except (OSError, ValueError) as error:
        known = re.fullmatch(r"(?:Qwen/)?(Qwen[\d.]+-VL-\d+B)(?:-Instruct)?", model_name_or_path)
        if known is None or known[1] not in TABLE:
            first_line = str(error).strip().splitlines()[0]
            raise ValueError(f"model_name_or_path: cannot read {model_name_or_path!r}: {first_line}") from error
        return tabled_config(known[1]), False
    if type(config) not in FAMILY:
        rule = f"expected a model of {', '.join(FAMILY.values())}, found model_type {config.model_type!r}"
        raise ValueError(f"model_name_or_path: {model_name_or_path!r}: {rule}")
    return config, True


def build_without_weights(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Return the model on the meta device, with every shape and no memory, as `from_pretrained` would make it."""
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(copy.deepcopy(config), dtype=dtype)
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
    """Return the bytes of the base model's weights by part, as they will lie on the GPU.

    Args:
        config: the model's.
        quantized: whether the language model's linear layers are in NF4.
        double_quant: whether NF4's scales are quantised too.
        dtype: of everything else.
    """
    model = build_without_weights(config, dtype)
    if quantized:
        model = replace_with_bnb_linear(
            model,
            modules_to_not_convert=quantization_config(dtype).llm_int8_skip_modules,
            quantization_config=quantization_config(dtype, double_quant=double_quant),
        )
    check_quantized(model, quantized=quantized)
    in_4_bit = {m.weight: (m.in_features * m.out_features) for m in model.modules() if isinstance(m, Linear4bit)}
    ends = (model.get_input_embeddings().weight, model.get_output_embeddings().weight)  # one tensor in small models
    parts = Counter()
    other = "norms and biases" if quantized else "language layers"
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor in in_4_bit:
            parts["language layers, NF4"] += nf4_bytes(in_4_bit[tensor], double_quant=double_quant)
        elif name.startswith(VISION):
            parts["vision tower"] += tensor.nbytes
        else:
            parts["embeddings, LM head" if any(tensor is end for end in ends) else other] += tensor.nbytes
    return dict(parts)


def nf4_bytes(count: int, *, double_quant: bool) -> int:
    """Return the bytes of `count` weights of one layer in NF4, with scales and tables, as bitsandbytes stores them."""
    blocks, (values, rounded) = -(-count // BLOCK), CODES
    if not double_quant:
        return -(-count // 2) + 4 * blocks + values
    return -(-count // 2) + blocks + 4 * -(-blocks // SCALES_A_BLOCK) + 4 + values + rounded


class WeightCounts(NamedTuple):
    """Weights that a token of text passes, and a patch of an image; and those of the largest layer in 4 bit."""

    language: int
    tower: int
    largest: int


def count_weights(config: PreTrainedConfig) -> WeightCounts:
    model = build_without_weights(config, torch.bfloat16)
    modules = [x for name, x in model.named_modules() if name.startswith(LANGUAGE_LAYERS)]
    language = [x.weight.numel() for x in modules if isinstance(x, torch.nn.Linear)]
    tower = sum(x.numel() for name, x in model.named_parameters() if name.startswith(VISION))
    return WeightCounts(sum(language), tower, max(language))
