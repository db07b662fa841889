"""Memory of complete compiled layers: what the backward pass finds stored, by the widths of their products."""

from typing import NamedTuple

import torch
from peft import PeftModel
from torch import nn

from models.compilation import language_layers
from models.recomputation import is_wide

# Tensors as wide as the MLP that the backward pass of a layer holds at once: gate, up, the gradients of their product
# through the base and through LoRA, and what dropout leaves of that product. The number was chosen to agree with the
# memory of an H100 (benchmarks/README.md); compiled for a CPU, a layer holds two or three more.
HELD = 5


class Stored(NamedTuple):
    """Bytes that a compiled language layer keeps of each token for the backward pass.

    Attributes:
        narrow: products that are no wider than their input, and what attention returns: always kept by selective
            recomputation.
        wide: products that are wider, as those of gate and up.
        inputs: of LoRA, with a byte for dropout's mask: kept besides where nothing is recomputed.
        held: by the one layer whose backward pass runs.
    """

    narrow: int
    wide: int
    inputs: int
    held: int


def stored_by_layer(model: PeftModel, dtype: torch.dtype) -> Stored:
    """Return what the first language layer keeps, computing in `dtype`; the model may be on the meta device.

    What is computed again from the products, and how, is in `models.recomputation.choose`.
    """
    layer, heads = language_layers(model)[0], model.config.text_config.num_attention_heads
    linears = {name: module for name, module in layer.named_modules() if isinstance(module, nn.Linear)}
    sizes = [(x.in_features, x.out_features) for x in linears.values()]
    attention = next(x.in_features for name, x in linears.items() if "o_proj" in name and "lora_" not in name)
    inputs = sum(x.in_features for name, x in linears.items() if "lora_A" in name)
    dropout = any(isinstance(module, nn.Dropout) and module.p for module in layer.modules())
    return Stored(
        narrow=dtype.itemsize * (attention + sum(outer for inner, outer in sizes if outer <= inner)) + 4 * heads,
        wide=dtype.itemsize * sum(outer for inner, outer in sizes if is_wide(inner, outer)),
        inputs=inputs * (dtype.itemsize + dropout),
        held=HELD * dtype.itemsize * max(outer for _, outer in sizes),
    )
