"""torch.compile of complete layers: one compiled function for all layers of a kind, each called as before."""

import torch
from accelerate import PartialState
from bitsandbytes.functional import QuantState
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from transformers.modeling_layers import GradientCheckpointingLayer

from models.compat import set_up_compiler
from models.families import family_of
from models.recomputation import WIDE, is_wide, make_seeded, recompute_selected

Tensors = list[torch.Tensor]
BLOCK, KIND, SCALES_BLOCK = 64, "nf4", 256  # what `pack_state` takes; the last: of scales that are quantised too
BNB = torch.ops.bitsandbytes
# What compiling costs, whatever the model, and what it saves. On an H100, in packs of 8,192 tokens, a 7B model makes
# 6,319 tokens/s as it is; compiled, a step takes two fifths less time (benchmarks/README.md). It has 6.5 billion
# weights in linear language layers. Slower GPUs earn the same seconds with fewer tokens: this is the cautious side.
COMPILING, SAVED, UNCOMPILED = 60, 0.4, 6319 * 6.5e9  # s; share of a step's time; tokens x weights a second


def compile_layers(model: torch.nn.Module, *, whole: bool = True, keep: str | None = None) -> None:
    """Let torch.compile fuse the arithmetic within each layer of tower and language model, in place.

    The code of one layer serves all others, and packs of every length. The first steps take up to a minute longer.
    Gradient checkpointing stays outside of the compiled function, and is switched on and off as before.

    Args:
        model: with LoRA.
        whole: compile complete layers, which is fastest; else their parts, which suits layers that are recomputed from
            outside: complete ones took minutes to compile then. Of models that `takes_whole_layers` refuses, parts are
            compiled in any case.
        keep: let complete layers recompute the rest by themselves, see `recompute_selected` and `keep_wide_products`.

    Raises:
        ValueError: there is no working compiler.
    """
    check_compiler()
    set_up_compiler()
    layers = [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]
    if not whole or not takes_whole_layers(model):
        _compile_parts(layers, family_of(model).linear_attention)
        return
    model.enable_input_require_grads()  # else the first language layer would be compiled for itself
    device = next(model.parameters()).device
    kinds = {kind: compiled_class(kind, keep=keep) for kind in map(type, layers)}
    for layer in layers:
        for module in layer.modules():
            if type(module) is Linear4bit:
                make_opaque(module)
            elif type(module) is torch.nn.Dropout and keep is not None:
                make_seeded(module, device)
        layer.__class__ = kinds[type(layer)]


def tokens_to_repay(weights: int) -> int:
    """Return how many tokens a GPU must train on before compiling has saved the time that it costs.

    Args:
        weights: of the language model that a token passes, see `models.flops.language_weights`.
    """
    return round(COMPILING * UNCOMPILED / SAVED / weights)


def takes_whole_layers(model: torch.nn.Module) -> bool:
    """Return whether the compiler sees through complete layers: it does not see into linear attention and experts."""
    family = family_of(model)
    return not (family.linear_attention or family.experts)


def _compile_parts(layers: list[torch.nn.Module], linear_attention: str) -> None:
    for layer in layers:
        for name, part in layer.named_children():
            if not has_experts(part):
                # The rest of linear attention has kernels of its own, which the compiler cannot see into.
                (part.norm if name == linear_attention else part).compile(dynamic=True)


def keep_wide_products(model: torch.nn.Module, count: int) -> None:
    """Let the first `count` language layers of a selectively compiled model, and no others, keep their wide products.

    Layers that do so already are not compiled again.
    """
    layers = language_layers(model)
    for layer in layers[count:]:
        layer.__class__ = getattr(type(layer), "narrow", type(layer))
    kinds = {type(layer) for layer in layers[:count] if not hasattr(type(layer), "narrow")}
    wide = {kind: compiled_class(kind.__base__, keep=WIDE) for kind in kinds}
    for kind, new in wide.items():
        new.narrow = kind
    for layer in layers[:count]:
        layer.__class__ = wide.get(type(layer), type(layer))


def language_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    path = family_of(model).language_layers.removesuffix(".")
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return list(base.get_submodule(path))


def wide_bytes(model: torch.nn.Module, tokens: int, itemsize: int) -> int:
    """Return the bytes of the wide products of one language layer, for a batch of this many tokens."""
    linears = [module for module in language_layers(model)[0].modules() if isinstance(module, torch.nn.Linear)]
    return tokens * itemsize * sum(x.out_features for x in linears if is_wide(x.in_features, x.out_features))


def has_experts(module: torch.nn.Module) -> bool:
    """Return whether a module or a part of it has experts, whose products depend on where the tokens go."""
    return any(hasattr(part, "num_experts") for part in module.modules())


def check_compiler() -> None:
    """Raise ValueError unless a function can be compiled for this process's device."""
    try:
        torch.compile(torch.sin)(torch.ones(1, device=PartialState().device))
    except RuntimeError as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"compile_layers: this machine cannot; install gcc, or set it to false ({reason})") from error


def compiled_class(
    kind: type[GradientCheckpointingLayer], *, keep: str | None = None
) -> type[GradientCheckpointingLayer]:
    """Return a subclass whose forward pass is compiled; unless `keep` is None, with recomputation inside.

    transformers wraps the `forward` of each subclass to recompute it in the backward pass, so that checkpointing is
    around the compiled function. Set on an instance, a function would escape the wrapper, and nothing be recomputed.
    """
    plain = getattr(kind.forward, "__wrapped__", kind.forward)
    chosen = plain if keep is None else recompute_selected(plain, keep=keep)
    forward = torch.compile(chosen, dynamic=True, fullgraph=True)
    return type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})


class OpaqueLinear4bit(Linear4bit):
    """A 4-bit layer that a compiled graph holds as one operation: the compiler cannot see into bitsandbytes."""

    state_tensors: Tensors
    state_dtype: torch.dtype  # in which the weight comes out of 4 bit; a base that comes in 4 bit has its own

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.compiler.is_compiling():
            return super().forward(x)
        dtype = self.compute_dtype or x.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        return torch.ops.skin.nf4_linear(
            x.to(dtype), bias, self.state_tensors, self.out_features, self.state_dtype
        ).to(x.dtype)


def make_opaque(linear: Linear4bit) -> None:
    """Turn a loaded 4-bit layer into an `OpaqueLinear4bit`, which refers to the same weights."""
    linear.__class__ = OpaqueLinear4bit
    linear.state_tensors = pack_state(linear.weight.data, linear.weight.quant_state)
    linear.state_dtype = linear.weight.quant_state.dtype
    for tensor in linear.state_tensors:  # as of all parameters; each size as a variable would take seconds to trace
        torch._dynamo.mark_static(tensor)


def pack_state(weight: torch.Tensor, state: QuantState) -> Tensors:
    """Return the tensors of a 4-bit weight: a compiled graph takes tensors and no object that holds them."""
    nested_blocks = state.state2.blocksize if state.nested else SCALES_BLOCK
    if (state.blocksize, state.quant_type, nested_blocks) != (BLOCK, KIND, SCALES_BLOCK):
        raise ValueError(f"expected NF4 in blocks of 64, found {state.quant_type} in blocks of {state.blocksize}")
    nested = [state.offset, state.state2.absmax, state.state2.code] if state.nested else []
    return [weight, state.absmax, state.code, *nested]


def unpack_state(tensors: Tensors, shape: tuple[int, int], dtype: torch.dtype) -> tuple[torch.Tensor, QuantState]:
    """Return the weight and bitsandbytes' description of it, the reverse of `pack_state`."""
    weight, absmax, code, *nested = tensors
    settings = {"shape": torch.Size(shape), "code": code, "blocksize": BLOCK, "quant_type": KIND, "dtype": dtype}
    absmax = scales_of(absmax, shape, nested=bool(nested))
    if nested:
        offset, absmax_of_absmax, code_of_absmax = nested
        state2 = QuantState(absmax_of_absmax, code=code_of_absmax, blocksize=SCALES_BLOCK, dtype=torch.float32)
        settings |= {"offset": offset, "state2": state2}
    return weight, QuantState(absmax, **settings)


def scales_of(absmax: torch.Tensor, shape: tuple[int, int], *, nested: bool) -> torch.Tensor:
    """Return a weight's scales as what they are.

    Of sharded weights they are bytes under another dtype, and a byte longer where there would be an odd number.
    """
    return absmax.view(torch.uint8 if nested else torch.float32)[: -(-shape[0] * shape[1] // BLOCK)]


# Both call the operations of bitsandbytes alone: with the functions around them, Python takes a quarter longer.
def _linear(x: torch.Tensor, bias: torch.Tensor | None, state: Tensors, out_features: int, dtype: torch.dtype):
    weight, absmax, _, *nested = state
    shape = out_features, x.shape[-1]
    absmax = scales_of(absmax, shape, nested=bool(nested))
    if not nested:
        return BNB.gemm_4bit.default(x, weight, shape, absmax, BLOCK, KIND, bias=bias)
    offset, absmax_of_absmax, code = nested
    scales = {"absmax_8bit": absmax, "absmax_code": code, "absmax_offset": offset}
    return BNB.gemm_4bit.default(x, weight, shape, absmax_of_absmax, BLOCK, KIND, bias=bias, **scales)


def _linear_backward(gradient: torch.Tensor, state: Tensors, in_features: int, dtype: torch.dtype) -> torch.Tensor:
    weight, absmax, _, *nested = state
    shape = gradient.shape[-1], in_features
    absmax = scales_of(absmax, shape, nested=bool(nested))
    if nested:
        offset, absmax_of_absmax, code = nested
        absmax = BNB.dequantize_blockwise.default(absmax, absmax_of_absmax, code, SCALES_BLOCK, torch.float32) + offset
    weight = BNB.dequantize_4bit.default(weight, absmax, BLOCK, KIND, shape, dtype)
    return torch.matmul(gradient, weight.to(gradient.dtype))


# Not by `torch.library.custom_op`, whose wrapper takes as long as the rest of a call.
LIBRARY = torch.library.Library("skin", "FRAGMENT")
LIBRARY.define("nf4_linear(Tensor x, Tensor? bias, Tensor[] state, SymInt out_features, ScalarType dtype) -> Tensor")
LIBRARY.define("nf4_linear_backward(Tensor gradient, Tensor[] state, SymInt in_features, ScalarType dtype) -> Tensor")
for device in ("CPU", "CUDA"):
    LIBRARY.impl("nf4_linear", _linear, device)
    LIBRARY.impl("nf4_linear_backward", _linear_backward, device)


@torch.library.register_fake("skin::nf4_linear")
def _(x, bias, state, out_features, dtype):
    return x.new_empty(*x.shape[:-1], out_features)


@torch.library.register_fake("skin::nf4_linear_backward")
def _(gradient, state, in_features, dtype):
    return gradient.new_empty(*gradient.shape[:-1], in_features)


def _keep_for_backward(ctx, inputs, output) -> None:
    x, _, state, _, ctx.dtype = inputs
    ctx.in_features = x.shape[-1]
    ctx.save_for_backward(*state)


def _backward(ctx, gradient):
    """Only activations have gradients; weight and bias are frozen."""
    found = torch.ops.skin.nf4_linear_backward(gradient, list(ctx.saved_tensors), ctx.in_features, ctx.dtype)
    return found, None, [None] * len(ctx.saved_tensors), None, None


torch.library.register_autograd("skin::nf4_linear", _backward, setup_context=_keep_for_backward)
