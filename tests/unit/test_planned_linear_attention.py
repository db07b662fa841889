"""The stand-in for linear attention's kernels has their outputs' shapes and holds what they hold."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForImageTextToText

from demo.tiny_model import build_config, build_processor
from helpers.runs import TEXTS
from models.families import FAMILIES
from planning.linear_attention import CHUNK, TracedLinearAttention, _DeltaRule


@pytest.fixture
def layer():
    config = build_config(
        build_processor(TEXTS, family="qwen3_5").tokenizer, hidden_size=64, num_layers=2, family="qwen3_5"
    )
    model = AutoModelForImageTextToText.from_config(config)
    return getattr(model.model.language_model.layers[0], FAMILIES["qwen3_5"].linear_attention)


def test_it_has_the_shape_of_what_it_stands_for_and_gradients_everywhere(layer):
    x = torch.randn(1, 100, 64, requires_grad=True)
    output = TracedLinearAttention(layer)(hidden_states=x)
    assert output.shape == layer(hidden_states=x).shape
    output.sum().backward()
    assert x.grad.shape == x.shape and layer.in_proj_qkv.weight.grad is not None


def test_the_rule_saves_the_tensors_that_the_kernel_does():
    """Query, key, their norms, value, summed decay, beta, and each chunk's matrix; float32."""
    tokens, key_heads, heads, width = 130, 2, 4, 32
    saved = []
    query, key = (torch.randn(1, tokens, key_heads, width, requires_grad=True) for _ in range(2))
    value = torch.randn(1, tokens, heads, width, requires_grad=True)
    decay, beta = (torch.rand(1, tokens, heads, requires_grad=True) for _ in range(2))
    with saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        output = _DeltaRule.apply(query, key, value, decay, beta)
    sizes = [2 * key_heads * width, heads * width, 2 * heads, heads * CHUNK, 2 * key_heads]
    assert output.shape == value.shape and sum(saved) == tokens * sum(sizes)
