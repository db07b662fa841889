"""A model that only answers is faster and gives the same logits, with any of its adapters and without."""

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, get_peft_model
from peft.tuners import lora
from torch import nn

from benchmarks.gpu_7b import build_demo_processor, build_model
from collator import collate_prompts
from models.answering import expand_weights, expanded_bytes, fuse_lora, only_adapter, speed_up_answering
from models.lora import build_lora_config
from models.tower import FusedMLP

SHAPES = "Qwen2.5-VL-7B"


@pytest.fixture(scope="module")
def processor():
    return build_demo_processor(SHAPES)


@pytest.fixture
def inputs(processor, demo_splits):
    samples = [demo_splits["train"][n] for n in range(2)]
    return collate_prompts(processor, [{**s, "messages": s["messages"][:-1]} for s in samples])


def adapted(processor, **options):
    """A model in NF4 with two random adapters."""
    base = build_model(processor, True, torch.device("cpu"), SHAPES)
    model = get_peft_model(base, build_lora_config(base, r=4, lora_alpha=16, lora_dropout=0.3, **options))
    model.add_adapter("other", build_lora_config(base, r=8, lora_alpha=8, **options))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


@torch.inference_mode()
def all_logits(model, inputs):
    """The logits with each adapter and without."""
    found = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        found[name] = model(**inputs).logits
    with model.disable_adapter():
        found["base"] = model(**inputs).logits
    return found


def assert_same(found, expected):
    for name, logits in expected.items():
        torch.testing.assert_close(found[name], logits, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(expected["default"], expected["base"], atol=1e-2)
    assert not torch.allclose(expected["default"], expected["other"], atol=1e-2)


def test_the_faster_model_has_the_same_logits(processor, inputs):
    model = adapted(processor)
    expected = all_logits(model, inputs)
    speed_up_answering(model)
    speed_up_answering(model)  # of no further effect
    assert sum(isinstance(module, FusedMLP) for module in model.modules()) == 2
    assert_same(all_logits(model, inputs), expected)
    expand_weights(model)
    assert_same(all_logits(model, inputs), expected)


def test_an_adapter_in_the_tower_still_acts(processor, inputs):
    model = adapted(processor, train_vision=True)
    expected = all_logits(model, inputs)
    speed_up_answering(model)
    assert not any(isinstance(module, FusedMLP) for module in model.modules())
    assert_same(all_logits(model, inputs), expected)


def test_every_weight_in_4_bit_is_expanded_to_what_it_stands_for(processor):
    model = build_model(processor, True, torch.device("cpu"), SHAPES)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, Linear4bit)}
    x = {layer.in_features: torch.randn(3, layer.in_features) for layer in layers.values()}
    expected = {name: layer(x[layer.in_features]) for name, layer in layers.items()}
    assert expanded_bytes(model) == sum(4 * layer.in_features * layer.out_features for layer in layers.values())
    expand_weights(model)
    assert expanded_bytes(model) == 0
    for name, output in expected.items():
        layer = model.get_submodule(name)
        assert type(layer) is nn.Linear and not layer.weight.requires_grad
        torch.testing.assert_close(layer(x[layer.in_features]), output, atol=1e-5, rtol=1e-5)


def test_in_half_precision_a_fused_layer_is_no_less_exact():
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(256, 128)), LoraConfig(r=8, target_modules=["0"])).eval()
    layer = model.base_model.model[0]
    nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    x = torch.randn(64, 256)
    exact = layer.double()(x.double())
    layer.base_layer.bfloat16(), layer.lora_A.float(), layer.lora_B.float()
    with torch.inference_mode():
        stock = (layer(x.bfloat16()) - exact).abs().mean()
        model.dtype = torch.bfloat16
        assert fuse_lora(model) == 1 and layer.lora_A["default"].weight.dtype == torch.bfloat16
        fused = (layer(x.bfloat16()) - exact).abs().mean()
    assert 0 < fused < 1.1 * stock


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}, {"r": 4}])
def test_layers_that_add_more_than_a_plain_product_are_left_to_peft(options):
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(16, 8)), LoraConfig(target_modules=["0"], **options)).eval()
    layer, x = model.base_model.model[0], torch.randn(2, 16)
    nn.init.normal_(layer.lora_B["default"].weight)
    expected = layer(x)
    model.dtype = torch.float32
    fuse_lora(model)
    assert isinstance(layer, lora.Linear) and (only_adapter(layer) is None) == ("r" not in options)
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), expected)
