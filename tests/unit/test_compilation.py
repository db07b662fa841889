"""Layers compiled as one function: operations, classes, and what gradient checkpointing does to them."""

import copy

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from transformers.modeling_layers import GradientCheckpointingLayer

from demo.tiny_model import save_tiny_model
from helpers.runs import TEXTS
from models.compilation import compile_layers, compiled_class, keep_wide_products, language_layers
from models.loading import load_model
from models.nf4_linear import OpaqueLinear4bit, make_opaque, pack_state, unpack_state
from models.recomputation import NARROW
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
    found = torch.ops.skin.nf4_linear(copied, ours.bias, ours.state_tensors, ours.out_features, ours.state_dtype)
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


def test_packed_state_comes_back_and_another_kind_is_refused():
    state = quantised(double=True, bias=False).weight.quant_state
    _, back = unpack_state(pack_state(torch.zeros(1), state), (128, 64), torch.float32)
    assert back.nested and back.shape == (128, 64) and torch.equal(back.absmax, state.absmax)
    state.quant_type = "fp4"
    with pytest.raises(ValueError, match="expected NF4 in blocks of 64, found fp4 in blocks of 64"):
        pack_state(torch.zeros(1), state)


class Layer(GradientCheckpointingLayer):
    calls = 0

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)

    def forward(self, x):
        Layer.calls += 1
        return self.linear(x)


@pytest.mark.parametrize(("recompute", "calls"), [(True, 2), (False, 1)])
def test_a_compiled_layer_is_recomputed_only_when_checkpointing_is_on(monkeypatch, recompute, calls):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)  # counts calls of the original
    layer = Layer().train()
    layer.__class__ = compiled_class(Layer)
    layer.gradient_checkpointing = recompute
    layer._gradient_checkpointing_func = lambda f, *a: torch.utils.checkpoint.checkpoint(f, *a, use_reentrant=False)
    Layer.calls = 0
    layer(torch.randn(2, 4, requires_grad=True)).sum().backward()
    assert Layer.calls == calls and isinstance(layer, Layer) and type(layer).__name__ == "Layer"


def test_an_opaque_layer_is_still_a_4_bit_layer():
    layer = quantised(double=True, bias=False)
    make_opaque(layer)
    assert isinstance(layer, Linear4bit) and type(layer) is OpaqueLinear4bit
    assert layer.state_tensors[0].data_ptr() == layer.weight.data_ptr()


def test_layers_that_keep_their_wide_products_are_not_compiled_anew_and_may_be_set_back(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    save_tiny_model(tmp_path, TEXTS, hidden_size=64, num_layers=3)
    model = load_model(str(tmp_path), dtype="float32", quantization=None)
    compile_layers(model, keep=NARROW)
    layers = language_layers(model)
    narrow = [type(layer) for layer in layers]
    keep_wide_products(model, 2)
    wide = type(layers[0])
    assert [type(layer) for layer in layers] == [wide, wide, narrow[2]] and wide not in narrow
    keep_wide_products(model, 1)
    assert [type(layer) for layer in layers] == [wide, *narrow[1:]]
    keep_wide_products(model, 0)
    assert [type(layer) for layer in layers] == narrow
