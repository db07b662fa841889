"""The product of a 4-bit layer, with LoRA's on top, as one operation of compiled functions."""

from collections.abc import Callable
from functools import cache

import torch
from bitsandbytes.functional import QuantState
from bitsandbytes.nn import Linear4bit
from peft.tuners import lora
from torch.nn.functional import linear

Tensors = list[torch.Tensor]
BLOCK, KIND, SCALES_BLOCK = 64, "nf4", 256  # what `pack_state` takes; the last: of scales that are quantised too
BNB = torch.ops.bitsandbytes


class OpaqueLinear4bit(Linear4bit):
    """A 4-bit layer that a compiled graph holds as one operation: the compiler cannot see into bitsandbytes."""

    state_tensors: Tensors
    state_dtype: torch.dtype  # in which the weight comes out of 4 bit; a base that comes in 4 bit has its own

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.compiler.is_compiling():
            return super().forward(x)
        return self.product(x)

    def product(
        self, x: torch.Tensor, lora_x: torch.Tensor | None = None, lora_b: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the layer's output, with LoRA's second product added if there is one.

        Args:
            x: shape (..., in).
            lora_x: LoRA's first product, shape (..., r).
            lora_b: LoRA's second factor, scaled, shape (out, r).
        """
        dtype = self.compute_dtype or x.dtype
        bias, lora_x, lora_b = (None if tensor is None else tensor.to(dtype) for tensor in (self.bias, lora_x, lora_b))
        state = self.state_tensors, self.out_features, self.state_dtype
        return torch.ops.skin.nf4_linear(x.to(dtype), bias, *state, lora_x, lora_b).to(x.dtype)


class FusedLora(lora.Linear4bit):
    """LoRA on an `OpaqueLinear4bit`: in a compiled graph the base's product and LoRA's are one operation.

    As two, the graph would hold both until the next elementwise operation, up to three more tensors as wide as the
    MLP, and read and write them in the backward pass.
    """

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        if not torch.compiler.is_compiling() or self.disable_adapters or self.merged:
            return super().forward(x, *args, **kwargs)
        (name,) = self.active_adapters
        first, second = self.lora_A[name], self.lora_B[name]
        into = x if torch.is_autocast_enabled() else x.to(first.weight.dtype)  # as PEFT
        lora_x = first(self.lora_dropout[name](into))
        return self.base_layer.product(x, lora_x, second.weight * self.scaling[name])


def fuse_lora(module: torch.nn.Module) -> None:
    """Turn PEFT's layer, in place, into a `FusedLora`, if its base is opaque and it has no variants and no bias."""
    if type(module) is lora.Linear4bit and isinstance(module.base_layer, OpaqueLinear4bit) and not module.lora_variant:
        active = [name for name in module.active_adapters if name in module.lora_A]
        if len(active) == 1 == len(module.active_adapters) and module.lora_B[active[0]].bias is None:
            module.__class__ = FusedLora


def make_opaque(layer: Linear4bit) -> None:
    """Turn a loaded 4-bit layer into an `OpaqueLinear4bit`, which refers to the same weights."""
    layer.__class__ = OpaqueLinear4bit
    layer.state_tensors = pack_state(layer.weight.data, layer.weight.quant_state)
    layer.state_dtype = layer.weight.quant_state.dtype


def is_plain_nf4(state: QuantState) -> bool:
    """Return whether a weight is in NF4 with the sizes of blocks that the operation takes."""
    nested_blocks = state.state2.blocksize if state.nested else SCALES_BLOCK
    return (state.blocksize, state.quant_type, nested_blocks) == (BLOCK, KIND, SCALES_BLOCK)


def pack_state(weight: torch.Tensor, state: QuantState) -> Tensors:
    """Return the tensors of a 4-bit weight: a compiled graph takes tensors and no object that holds them."""
    if not is_plain_nf4(state):
        raise ValueError(f"expected NF4 in blocks of 64, found {state.quant_type} in blocks of {state.blocksize}")
    nested = [state.offset, state.state2.absmax, state.state2.code] if state.nested else []
    tensors = [weight, state.absmax, state.code, *nested]
    for tensor in tensors:  # as of all parameters; each size as a variable would take seconds to trace
        torch._dynamo.mark_static(tensor)
    return tensors


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

    Of sharded weights they are bytes under another dtype, and up to three bytes longer.
    """
    return absmax.view(torch.uint8 if nested else torch.float32)[: -(-shape[0] * shape[1] // BLOCK)]


def weight_of(state: Tensors, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """Return a weight out of 4 bit.

    On CPUs by the operations of bitsandbytes alone: with the functions around them, Python takes a quarter longer.
    """
    weight, absmax, code, *nested = state
    absmax = scales_of(absmax, shape, nested=bool(nested))
    if weight.is_cuda:
        return kernel()([weight, absmax, code, *nested], shape, dtype, block=BLOCK, scales_block=SCALES_BLOCK)
    if nested:
        offset, absmax_of_absmax, code = nested
        absmax = BNB.dequantize_blockwise.default(absmax, absmax_of_absmax, code, SCALES_BLOCK, torch.float32) + offset
    return BNB.dequantize_4bit.default(weight, absmax, BLOCK, KIND, shape, dtype)


@cache
def kernel() -> Callable:
    """Return `models.nf4_kernel.dequantise`; only where a GPU is does Triton have to be there."""
    from models.nf4_kernel import dequantise

    return dequantise


def _linear(
    x: torch.Tensor, bias: torch.Tensor | None, state: Tensors, out_features: int, dtype: torch.dtype,
    lora_x: torch.Tensor | None, lora_b: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    product = linear(x, weight_of(state, (out_features, x.shape[-1]), x.dtype), bias)
    if lora_x is not None:
        product.flatten(0, -2).addmm_(lora_x.flatten(0, -2), lora_b.t())
    return product


def _linear_backward(gradient: torch.Tensor, state: Tensors, in_features: int, dtype: torch.dtype) -> torch.Tensor:
    weight = weight_of(state, (gradient.shape[-1], in_features), dtype)
    return torch.matmul(gradient, weight.to(gradient.dtype))


# Not by `torch.library.custom_op`, whose wrapper takes as long as the rest of a call.
LIBRARY = torch.library.Library("skin", "FRAGMENT")
STATE = "Tensor[] state, SymInt {}, ScalarType dtype"
LIBRARY.define(
    f"nf4_linear(Tensor x, Tensor? bias, {STATE.format('out_features')}, Tensor? lora_x, Tensor? lora_b) -> Tensor"
)
LIBRARY.define(f"nf4_linear_backward(Tensor gradient, {STATE.format('in_features')}) -> Tensor")
for device in ("CPU", "CUDA"):
    LIBRARY.impl("nf4_linear", _linear, device)
    LIBRARY.impl("nf4_linear_backward", _linear_backward, device)


@torch.library.register_fake("skin::nf4_linear")
def _(x, bias, state, out_features, dtype, lora_x, lora_b):
    return x.new_empty(*x.shape[:-1], out_features)


@torch.library.register_fake("skin::nf4_linear_backward")
def _(gradient, state, in_features, dtype):
    return gradient.new_empty(*gradient.shape[:-1], in_features)


def _keep_for_backward(ctx, inputs, output) -> None:
    x, _, state, _, ctx.dtype, lora_x, lora_b = inputs
    ctx.in_features, ctx.has_lora = x.shape[-1], lora_x is not None
    ctx.save_for_backward(*state, *((lora_x, lora_b) if ctx.has_lora else ()))


def _backward(ctx, gradient):
    """Only activations and LoRA have gradients; weight and bias are frozen."""
    saved = list(ctx.saved_tensors)
    lora_x, lora_b = (saved.pop(-2), saved.pop()) if ctx.has_lora else (None, None)
    found = torch.ops.skin.nf4_linear_backward(gradient, saved, ctx.in_features, ctx.dtype)
    of_lora_x = of_lora_b = None
    if ctx.has_lora:
        of_lora_x, of_lora_b = gradient @ lora_b, gradient.flatten(0, -2).t() @ lora_x.flatten(0, -2)
    return found, None, [None] * len(saved), None, None, of_lora_x, of_lora_b


torch.library.register_autograd("skin::nf4_linear", _backward, setup_context=_keep_for_backward)
