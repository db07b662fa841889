"""Arithmetic of training: the weights that a token passes, and the operations that they cost."""

import torch
from peft import PeftModel

from models.experts import WEIGHTS, count_active, expert_layers, nf4_name
from models.families import family_of


def language_weights(model: torch.nn.Module) -> int:
    """Return how many frozen weights of the language layers' matrix products a token passes; with or without LoRA."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    prefix = family_of(base).language_layers
    linears = [x for name, x in base.named_modules() if name.startswith(prefix) and is_frozen_linear(x)]
    weights = sum(x.in_features * x.out_features for x in linears)  # those in 4 bit have another shape
    return weights + count_active(base.config, sum(expert_sizes(base)))


def is_frozen_linear(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.Linear) and not module.weight.requires_grad


def expert_sizes(model: torch.nn.Module) -> list[int]:
    """Return the numbers of weights of all expert layers, in 16 bit or NF4."""
    names = [spelling for name in WEIGHTS for spelling in (name, nf4_name(name))]
    layers = expert_layers(model).values()
    found = [getattr(layer, name) for layer in layers for name in names if hasattr(layer, name)]
    return [getattr(getattr(weight, "quant_state", None), "shape", weight.shape).numel() for weight in found]
