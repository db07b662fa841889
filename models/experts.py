"""Experts of mixture-of-experts models: frozen three-dimensional weights, in 16 bit or NF4, with LoRA in low rank.

Expert layers run `experts_forward`, which computes what transformers' own implementations do, and keeps no copy of a
weight for the backward pass. PEFT's `target_parameters` describe LoRA and hold its weights; where PEFT would add the
update to all experts of a layer, its two factors are multiplied with the tokens here.
"""

import re
from collections.abc import Callable
from functools import partial

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Params4bit
from torch.nn.functional import pad
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel

from models.compat import grouped_product, lora_factors, make_experts_quantizer, register_experts
from models.families import family_of
from models.quantization import STORED, nf4_bytes

WEIGHTS = ("gate_up_proj", "down_proj")  # of an expert layer, shape (E, out, in) each
FROZEN = "frozen_experts"  # the name under which transformers finds `experts_forward`
NF4_WITH_EXPERTS = "nf4_with_experts"  # the name under which it finds the quantizer
ALIGNED = 16  # bytes; grouped products on a GPU want rows that start at multiples of it


def nf4_name(weight: str) -> str:
    """Return the name of a weight's form in NF4."""
    return f"{weight}_nf4"


def expert_layers(model: PreTrainedModel) -> dict[str, torch.nn.Module]:
    """Return the modules that hold a layer's experts, by their path; with LoRA, the ones within PEFT's."""
    family = family_of(model)
    if not family.experts:
        return {}
    path = re.compile(rf".*\.\d+\.{re.escape(family.experts)}(\.base_layer)*")
    return {
        name: module
        for name, module in model.named_modules()
        if path.fullmatch(name) and not hasattr(module, "base_layer")
    }


def is_expert_weight(model: PreTrainedModel, path: str) -> bool:
    """Return whether a parameter of the base model belongs to its experts."""
    family = family_of(model)
    names = rf"\d+\.{re.escape(family.experts)}\.({'|'.join(WEIGHTS)})"
    return bool(family.experts and re.fullmatch(names, path.removeprefix(family.language_layers)))


def use_frozen_experts(model: PreTrainedModel, *, name: str = FROZEN, function: Callable | None = None) -> None:
    """Let the expert layers of a model compute by `experts_forward`; other models stay as they are.

    Args:
        model: with or without LoRA.
        name: of another `function` that they compute by.
        function: see `name`.
    """
    if expert_layers(model):
        register_experts(name, function or experts_forward)
        model.set_experts_implementation(name)


def experts_forward(
    module: torch.nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor,
    product: Callable = grouped_product,
) -> torch.Tensor:  # fmt: skip
    """Return the weighted sum of each token's experts. The signature is that of expert functions in transformers.

    Args:
        module: see `expert_layers`.
        hidden_states: shape (T, D).
        top_k_index: the experts of each token, shape (T, K).
        top_k_weights: of these, shape (T, K).
        product: what multiplies with weights in 16 bit, see `grouped_product`.
    """
    tokens, top_k = top_k_index.shape
    experts, order = torch.sort(top_k_index.reshape(-1), stable=True)
    following = torch.arange(1, module.num_experts + 1, device=experts.device)
    ends = torch.searchsorted(experts, following).to(torch.int32)
    multiply = partial(_multiply, module, ends=ends, product=product)
    hidden = module._apply_gate(multiply("gate_up_proj", hidden_states[order // top_k]))
    output = multiply("down_proj", hidden) * top_k_weights.reshape(-1)[order, None]
    # A sum over K in a fixed order, where index_add on a GPU would add in any
    output = output[torch.argsort(order)].view(tokens, top_k, -1).sum(dim=1)
    return output.to(hidden_states.dtype)


def _multiply(
    module: torch.nn.Module, name: str, x: torch.Tensor, *, ends: torch.Tensor, product: Callable
) -> torch.Tensor:
    """Return the product of each token with a weight of its expert: (S, in), sorted by expert, to (S, out).

    Args:
        module: see `expert_layers`.
        name: one of `WEIGHTS`.
        x: the tokens.
        ends: where each expert's tokens end, int32, shape (E,).
        product: see `experts_forward`.
    """
    quantised = getattr(module, nf4_name(name), None)
    weight, factors = lora_factors(module, name)
    dtype = weight.dtype if quantised is None else quantised.quant_state.dtype
    x = x.to(dtype)  # autocast leaves grouped products alone
    if quantised is None:
        output = product(x, weight.transpose(-2, -1), ends)
    else:
        output = _FrozenProduct.apply(x, quantised, ends)
    for left, right, scaling in factors:
        left, right = _align(left.to(dtype), right.to(dtype))
        inner = product(x, right.transpose(-2, -1), ends)
        output = output + scaling * product(inner, left.transpose(-2, -1), ends)
    return output


def _align(left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Lay out LoRA's factors, shapes (E, out, r) and (E, r, in), row by row, the rank padded with zeros."""
    missing = -left.size(-1) % (ALIGNED // left.element_size())
    return pad(left, (0, missing)).contiguous(), pad(right, (0, 0, 0, missing)).contiguous()


class _FrozenProduct(torch.autograd.Function):
    """A product with weights in NF4, which are taken out of it for each pass and kept for none."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: Params4bit, ends: torch.Tensor) -> torch.Tensor:
        ctx.weight = weight
        ctx.save_for_backward(ends)
        return grouped_product(x, _out_of_nf4(weight).transpose(-2, -1), ends)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        (ends,) = ctx.saved_tensors
        return grouped_product(gradient.contiguous(), _out_of_nf4(ctx.weight), ends), None, None


def _out_of_nf4(weight: Params4bit) -> torch.Tensor:
    return dequantize_4bit(weight.data, weight.quant_state)


def with_experts(settings: BitsAndBytesConfig) -> BitsAndBytesConfig:
    """Return settings with which transformers stores experts in NF4 too, each weight as soon as it is read."""
    make_experts_quantizer(NF4_WITH_EXPERTS, is_expert=is_expert_weight, quantise=to_nf4, finish=name_nf4_weights)
    settings.quant_method = NF4_WITH_EXPERTS
    return settings


def to_nf4(weight: torch.Tensor, settings: BitsAndBytesConfig) -> Params4bit:
    """Return a weight in NF4, on its device."""
    return Params4bit(
        weight,
        requires_grad=False,
        compress_statistics=settings.bnb_4bit_use_double_quant,
        quant_type=settings.bnb_4bit_quant_type,
        quant_storage=settings.bnb_4bit_quant_storage,
    ).to(weight.device)


def name_nf4_weights(model: PreTrainedModel) -> None:
    """Give the quantised weights of expert layers names of their own, as their shape is another."""
    for module in expert_layers(model).values():
        for name in WEIGHTS:
            weight = getattr(module, name)
            delattr(module, name)
            setattr(module, nf4_name(name), weight)


def add_stand_ins(model: PreTrainedModel) -> None:
    """Give expert layers in NF4 weights of the shape that PEFT looks for: zeros, without memory."""
    for module in expert_layers(model).values():
        for name in WEIGHTS:
            quantised = getattr(module, nf4_name(name), None)
            if quantised is not None and not hasattr(module, name):
                zero = torch.zeros((), dtype=quantised.quant_state.dtype, device=quantised.device)
                shape = torch.Size(quantised.quant_state.shape)
                setattr(module, name, torch.nn.Parameter(zero.expand(shape), requires_grad=False))


def stand_ins(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Return the parameters that `add_stand_ins` made, by their paths."""
    return {
        f"{path}.{name}": getattr(module, name)
        for path, module in expert_layers(model).items()
        for name in WEIGHTS
        if hasattr(module, nf4_name(name)) and hasattr(module, name)
    }


def count_active(config: PreTrainedConfig, count: int) -> int:
    """Return how many of `count` experts' weights a token passes."""
    text = config.text_config
    return count * text.num_experts_per_tok // text.num_experts if count else 0


def format_experts(config: PreTrainedConfig, *, quantization: str | None, double_quant: bool, itemsize: int) -> str:
    """Return a line that says in what precision experts will be loaded, and what memory that takes.

    Args:
        config: of a model with experts.
        quantization: as `load_model` takes it; "stored" for a base that comes in 4 bit.
        double_quant: whether NF4's scales are quantised too.
        itemsize: bytes of a weight that is not in 4 bit.
    """
    with torch.device("meta"):
        layers = expert_layers(AutoModelForImageTextToText.from_config(config)).values()
    counts = [getattr(layer, name).numel() for layer in layers for name in WEIGHTS]
    sizes = [count * itemsize for count in counts]
    precision = f"{8 * itemsize} bit"
    if quantization == "nf4":
        sizes, precision = [nf4_bytes(count, double_quant=double_quant) for count in counts], "4 bit (NF4)"
    elif quantization == STORED:
        precision += ", as the base comes"
    return (
        f"{len(layers)} layers of {config.text_config.num_experts}, {sum(counts) / 1e9:.1f} billion weights in "
        f"{precision}: {sum(sizes) / 1e9:.1f} GB; routers in {8 * itemsize} bit"
    )
