"""A loaded model becomes faster where it only answers; results differ by rounding."""

from collections.abc import Iterator
from functools import cache

import psutil
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from peft.tuners import lora
from torch import nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from models.tower import speed_up_frozen_tower

RESERVE = 0.5  # of the device's memory that is left for batches


def speed_up_answering(model: PreTrainedModel | PeftModel) -> None:
    """Make a model faster, in place, that is neither trained nor saved any more, and gets no more adapters.

    The tower's MLPs are fused, unless an adapter has layers in them; LoRA is added in one pass over a layer's outputs;
    and where memory suffices 4-bit weights are expanded to the dtype of the arithmetic, once and not for each batch.
    """
    model.requires_grad_(False)
    speed_up_frozen_tower(model.get_base_model() if isinstance(model, PeftModel) else model)
    fuse_lora(model)
    if expanded_bytes(model) <= spare_memory(model.device):
        expand_weights(model)


def fuse_lora(model: nn.Module) -> int:
    """Let LoRA layers add their product in place, in the dtype of the model; return how many layers that concerns."""
    layers = [module for module in model.modules() if type(module) in (lora.Linear, lora.Linear4bit)]
    for layer in layers:
        layer.__class__ = fused_class(type(layer))
        for side in (layer.lora_A, layer.lora_B):
            side.to(model.dtype)
    return len(layers)


@cache
def fused_class(kind: type) -> type:
    """Return a subclass of a LoRA layer whose forward pass is `W x + scaling B (A x)` without temporary outputs."""

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        adapter = only_adapter(self)
        if adapter is None or torch.is_grad_enabled() or args or kwargs:
            return kind.forward(self, x, *args, **kwargs)
        output = self.base_layer(x)
        down, up = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        inner = linear(x.to(down.dtype), down).to(output.dtype)
        rows = output.view(-1, output.size(-1))
        rows.addmm_(inner.view(-1, inner.size(-1)), up.t().to(output.dtype), alpha=self.scaling[adapter])
        return output

    return type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})


def only_adapter(layer: lora.LoraLayer) -> str | None:
    """Return the one adapter that a layer adds a plain product for, or None."""
    if layer.disable_adapters or layer.merged or layer.training or len(layer.active_adapters) != 1:
        return None
    [name] = layer.active_adapters
    plain = name in layer.lora_A and name not in layer.lora_variant and layer.lora_B[name].bias is None
    return name if plain else None


def layers_in_4_bit(model: nn.Module) -> Iterator[tuple[nn.Module, str, Linear4bit]]:
    """Yield each 4-bit linear layer with the module that holds it and its name there."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Linear4bit):
                yield parent, name, child


def expanded_bytes(model: nn.Module) -> int:
    """Return how many bytes the 4-bit linear layers would have in the dtype that they compute in."""
    layers = [layer for _, _, layer in layers_in_4_bit(model)]
    return sum(layer.in_features * layer.out_features * layer.compute_dtype.itemsize for layer in layers)


def spare_memory(device: torch.device) -> float:
    """Return how many bytes of the device are free beside the reserve."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
    else:
        memory = psutil.virtual_memory()
        free, total = memory.available, memory.total
    return free - RESERVE * total


def expand_weights(model: nn.Module) -> None:
    """Replace 4-bit linear layers by those of their weights, in the dtype that they compute in."""
    for parent, name, layer in layers_in_4_bit(model):
        plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(layer.compute_dtype)
        plain.weight = nn.Parameter(weight, requires_grad=False)
        if layer.bias is not None:
            plain.bias = nn.Parameter(layer.bias.data.to(layer.compute_dtype), requires_grad=False)
        setattr(parent, name, plain.train(layer.training))
    torch.cuda.empty_cache()  # of the 4-bit weights
