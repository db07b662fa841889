"""Layers compiled as one function: classes, and what gradient checkpointing does to them."""

import pytest
import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from demo.tiny_model import save_tiny_model
from helpers.runs import TEXTS
from models import compilation
from models.attention import VARLEN
from models.compilation import (
    compile_layers,
    compiled_class,
    keep_wide_products,
    language_layers,
    recompute_everything,
)
from models.loading import load_model
from models.recomputation import NARROW, NOTHING, WIDE


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


def test_layers_that_keep_their_wide_products_are_not_compiled_anew_and_may_be_set_back(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    save_tiny_model(tmp_path, TEXTS, hidden_size=64, num_layers=3)
    model = load_model(str(tmp_path), dtype="float32", quantization=None, attn_implementation=VARLEN)
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


def test_with_another_attention_parts_of_layers_are_compiled(tmp_path, monkeypatch):
    """The tower's loops over its windows would not compile for batches of other numbers of images."""
    monkeypatch.setattr(compilation, "check_compiler", lambda: None)  # nothing runs
    save_tiny_model(tmp_path, TEXTS, hidden_size=64, num_layers=1)
    model = load_model(str(tmp_path), dtype="float32", quantization=None)
    compile_layers(model, keep=NARROW)
    layer = language_layers(model)[0]
    assert type(layer).forward.__name__ != "compile_wrapper" and type(layer).__base__ is GradientCheckpointingLayer
    assert layer._compiled_call_impl is None and layer.mlp._compiled_call_impl is not None


def test_layers_that_kept_their_products_may_keep_none(monkeypatch):
    kept = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(compilation, "recompute_selected", lambda forward, *, keep: kept.append(keep) or forward)
    layers = torch.nn.Sequential(Layer(), Layer())
    for layer, keep in zip(layers, (NARROW, WIDE), strict=True):
        layer.__class__ = compiled_class(Layer, keep=keep)
    recompute_everything(layers)
    assert kept == [NARROW, WIDE, NOTHING, NOTHING]
    assert [type(layer).__base__ for layer in layers] == [Layer, Layer]
