"""The product of a 4-bit layer as one operation, with and without LoRA, and the kernel for weights on GPUs."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from peft import LoraConfig, get_peft_model
from torch import nn

from models.nf4_linear import (
    FusedLora,
    OpaqueLinear4bit,
    fuse_lora,
    is_plain_nf4,
    make_opaque,
    pack_state,
    unpack_state,
)
from models.sharding import join_scales


def quantised(*, double: bool, bias: bool, dtype: torch.dtype = torch.float32) -> Linear4bit:
    torch.manual_seed(0)
    layer = Linear4bit(64, 128, bias=bias, compute_dtype=torch.float32, quant_type="nf4")
    options = {"requires_grad": False, "quant_type": "nf4", "compress_statistics": double}
    layer.weight = Params4bit(torch.randn(128, 64, dtype=dtype), **options)
    layer.support_avx512bf16_for_cpu = False
    return layer.requires_grad_(False).to("cpu")


@pytest.mark.parametrize(
    ("double", "bias", "dtype"),
    [(True, True, torch.float32), (False, False, torch.float32), (True, True, torch.bfloat16)],
)
def test_the_operation_computes_what_bitsandbytes_does_forward_and_backward(double, bias, dtype):
    plain = quantised(double=double, bias=bias, dtype=dtype)
    ours = copy.deepcopy(plain)
    make_opaque(ours)
    x, copied = (torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2))
    expected = plain(x)
    state = ours.state_tensors, ours.out_features, ours.state_dtype
    found = torch.ops.skin.nf4_linear(copied, ours.bias, *state, None, None)
    assert torch.equal(found, expected) and torch.equal(ours(x), expected)
    upstream = torch.randn_like(expected)
    expected.backward(upstream)
    found.backward(upstream)
    assert torch.equal(copied.grad, x.grad)


@pytest.mark.parametrize("double", [True, False])
def test_the_product_of_a_layer_that_is_sharded_is_part_of_a_compiled_function(double):
    """With `fullgraph`, what the compiler cannot take in is an error."""
    plain = quantised(double=double, bias=False)
    layers = torch.nn.Sequential(copy.deepcopy(plain))
    join_scales(layers)
    torch.compiler.reset()
    x = torch.randn(1, 5, 64)
    found = torch.compile(layers, backend="eager", fullgraph=True, dynamic=True)(x)
    assert torch.equal(found, plain(x))


@pytest.mark.parametrize("double", [True, False])
def test_the_bytes_of_a_sharded_layer_survive_a_copy_by_way_of_float32(double):
    """FSDP2 gathers weights by `torch._foreach_copy_`, which on GPUs computes in float32."""
    layers = nn.Sequential(quantised(double=double, bias=False))
    nan = torch.tensor([0x7F, 0xFF, 0xA5, 0x7F, 0xC1, 0xFF], dtype=torch.uint8)  # NaNs of bfloat16, whatever the order
    layers[0].weight.data[: len(nan)] = nan[:, None]
    join_scales(layers)
    weight = layers[0].weight.detach()
    assert torch.equal(weight.to(torch.float32).to(weight.dtype).view(torch.uint8), weight.view(torch.uint8))


def test_packed_state_comes_back_and_another_kind_is_refused():
    state = quantised(double=True, bias=False).weight.quant_state
    _, back = unpack_state(pack_state(torch.zeros(1), state), (128, 64), torch.float32)
    assert back.nested and back.shape == (128, 64) and torch.equal(back.absmax, state.absmax)
    assert is_plain_nf4(state)
    state.quant_type = "fp4"
    assert not is_plain_nf4(state)
    with pytest.raises(ValueError, match="expected NF4 in blocks of 64, found fp4 in blocks of 64"):
        pack_state(torch.zeros(1), state)


def test_an_opaque_layer_is_still_a_4_bit_layer():
    layer = quantised(double=True, bias=False)
    make_opaque(layer)
    assert isinstance(layer, Linear4bit) and type(layer) is OpaqueLinear4bit
    assert layer.state_tensors[0].data_ptr() == layer.weight.data_ptr()


def adapted(**settings) -> nn.Module:
    """Return a 4-bit layer with LoRA, whose second factor is not zero."""
    layers = nn.Sequential(quantised(double=True, bias=True))
    layers.is_loaded_in_4bit = True  # as transformers leaves it, for PEFT
    model = get_peft_model(layers, LoraConfig(target_modules=["0"], r=4, lora_alpha=12, **settings))
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(2))
    return model.base_model.model[0]


def gradients(layer: nn.Module, run) -> list[torch.Tensor]:
    x = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    output = run(x)
    trained = [x, *(p for p in layer.parameters() if p.requires_grad)]
    return [output.detach(), *torch.autograd.grad(output.square().sum(), trained)]


def fused(layer: nn.Module) -> nn.Module:
    layer = copy.deepcopy(layer)
    make_opaque(layer.base_layer)
    fuse_lora(layer)
    return layer


def test_a_compiled_layer_with_lora_is_one_product_with_the_same_result_and_gradients():
    layer, seen = adapted(), []

    def backend(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    ours = fused(layer)
    assert type(ours) is FusedLora
    torch.compiler.reset()
    run = torch.compile(ours, backend=backend, fullgraph=True, dynamic=True)
    for found, expected in zip(gradients(ours, run), gradients(layer, layer), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
    assert sum("nf4_linear" in name for name in seen) == 1
    assert sum("linear" in name for name in seen) == 2, seen  # the other one is LoRA's first product


def test_without_a_compiler_and_with_the_adapter_off_the_layer_is_peft_s():
    layer = adapted()
    ours = fused(layer)
    for found, expected in zip(gradients(ours, ours), gradients(layer, layer), strict=True):
        assert torch.equal(found, expected)
    ours.enable_adapters(False)
    torch.compiler.reset()
    x = torch.randn(1, 5, 64)
    off = torch.compile(ours, backend="eager", fullgraph=True)(x)
    assert torch.equal(off, ours.base_layer(x)) and not torch.equal(off, layer(x))


def test_lora_on_a_layer_that_is_not_opaque_stays_as_it_is():
    layer = adapted()
    kind = type(layer)
    fuse_lora(layer)
    assert type(layer) is kind


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"lora_bias": True}])
def test_variants_of_lora_stay_as_they_are(settings):
    layer = adapted(**settings)
    kind = type(layer)
    make_opaque(layer.base_layer)
    fuse_lora(layer)
    assert type(layer) is kind


KERNEL = """
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Params4bit
from models.nf4_kernel import dequantise
from models.nf4_linear import BLOCK, SCALES_BLOCK, pack_state

KINDS = [((128, 64), torch.uint8), ((7, 64), torch.bfloat16), ((1, 257 * 64), torch.uint8), ((3, 22), torch.uint8)]
for double in (True, False):
    for shape, storage in KINDS:  # the last two: several blocks of scales, and half a block of weights
        options = {"quant_type": "nf4", "compress_statistics": double, "quant_storage": storage}
        weight = Params4bit(torch.randn(shape), requires_grad=False, **options).to("cpu")
        state = weight.quant_state
        for state.dtype in (torch.float32, torch.float16):  # the interpreter cuts bfloat16 off instead of rounding
            packed = pack_state(weight.data, state)
            found = dequantise(packed, shape, state.dtype, block=BLOCK, scales_block=SCALES_BLOCK)
            assert torch.equal(found, dequantize_4bit(weight.data, state)), (double, shape, storage, state.dtype)
print("equal")
"""


def test_the_kernel_of_gpus_unpacks_as_bitsandbytes_does():
    """By Triton's interpreter, which has to be chosen before Triton is imported."""
    pytest.importorskip("triton", reason="there is no Triton for this system")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", KERNEL]
    done = subprocess.run(command, env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.stdout.strip().endswith("equal"), done.stderr
