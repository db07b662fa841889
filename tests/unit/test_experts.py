"""Experts: their products, NF4, LoRA, and what is said about them."""

import copy
import re

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit, Params4bit
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForImageTextToText

from demo.tiny_model import save_tiny_model
from helpers.runs import TEXTS
from helpers.stored import save_stored
from helpers.weights import bytes_of
from models.experts import WEIGHTS, expert_layers, format_experts, nf4_name, stand_ins
from models.families import published_config
from models.loading import check_quantized, load_config, load_model
from models.lora import check_trainable, count_parameters, count_trainable
from planning.shapes import add_lora, build_without_weights, count_weights, weight_bytes
from training.build import attach_lora
from training.config import parse_config
from training.config_checks import check_base

FAMILIES = ("qwen3_vl_moe", "qwen3_5_moe")
LAYERS = 3
LORA = {"r": 3, "lora_alpha": 6, "lora_dropout": 0.0, "target_modules": None}  # a rank that has to be padded
FROZEN = {"train_vision": False, "train_merger": False}
IDS = torch.randint(0, 300, (2, 40), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=FAMILIES)
def base(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    save_tiny_model(folder, TEXTS, hidden_size=64, num_layers=LAYERS, family=request.param)
    return folder


def load(base, quantization=None, **options):
    return load_model(str(base), quantization=quantization, dtype="float32", **options)


def adapt(model, *, target_experts=True):
    """Add LoRA whose update is not zero."""
    model = attach_lora(model, {**LORA, **FROZEN, "target_experts": target_experts})
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.05, generator=generator)
    return model


def run(model):
    """Return logits and gradients of a step."""
    model.zero_grad()
    output = model(input_ids=IDS, labels=IDS, use_cache=False)
    output.loss.backward()
    return output.logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def check_equal(found, expected, atol):
    assert torch.allclose(found[0], expected[0], atol=atol)
    assert found[1].keys() == expected[1].keys()
    assert all(torch.allclose(gradient, expected[1][name], atol=atol) for name, gradient in found[1].items())


@pytest.mark.parametrize("lora", [None, False, True], ids=["no LoRA", "LoRA", "LoRA on experts"])
def test_products_are_those_of_transformers_and_peft(base, lora):
    """The reference loops over experts, and PEFT adds the update to all of their weights."""
    model = load(base) if lora is None else adapt(load(base), target_experts=lora)
    found = run(model)
    (model if lora is None else model.get_base_model()).set_experts_implementation("eager")
    check_equal(found, run(model), 5e-6)
    assert all(gradient.isfinite().all() for gradient in found[1].values())


@pytest.mark.parametrize("target_experts", [False, True])
def test_experts_in_nf4_compute_with_the_rounded_weights(base, target_experts):
    quantised = load(base, "nf4")
    plain = load(base)
    for path, layer in expert_layers(quantised).items():
        for name in WEIGHTS:
            weight = getattr(layer, nf4_name(name))
            rounded = dequantize_4bit(weight.data, weight.quant_state)
            original = getattr(plain.get_submodule(path), name)
            assert 0 < (rounded - original).abs().max() < 0.2 * original.abs().max()
            original.data.copy_(rounded)
    for name, layer in quantised.named_modules():
        if isinstance(layer, Linear4bit):
            plain.get_submodule(name).weight.data.copy_(dequantize_4bit(layer.weight.data, layer.weight.quant_state))
    found, expected = (run(adapt(model, target_experts=target_experts)) for model in (quantised, plain))
    check_equal(found, expected, 5e-6)


def test_an_expert_without_tokens_has_zero_gradients(base):
    model = adapt(load(base, "nf4"))
    for layer in expert_layers(model).values():
        gate = model.get_submodule(next(n for n, m in model.named_modules() if m is layer).split(".experts")[0]).gate
        gate.weight.data[1:] = 0
        gate.weight.data[0] = 0  # ties go to the same experts for each token
    _, gradients = run(model)
    experts = {name: g for name, g in gradients.items() if ".experts." in name and "lora_A" in name}
    assert len(experts) == 2 * LAYERS
    for gradient in experts.values():
        by_expert = gradient.view(4, -1).abs().sum(1)
        assert (by_expert > 0).sum() == 2 and gradient.isfinite().all()


def test_no_weight_of_experts_is_kept_for_the_backward_pass(base):
    model, sizes = adapt(load(base, "nf4")), []
    least = min(layer.gate_up_proj_nf4.quant_state.shape.numel() for layer in expert_layers(model).values())

    def keep(x):
        if x.is_floating_point() and x.dim() == 3 and x.size(0) == 4:  # the experts
            sizes.append(x.numel())
        return x

    with saved_tensors_hooks(keep, lambda x: x):
        run(model)
    assert sizes and max(sizes) < least


def test_linear_layers_and_experts_are_in_nf4_and_routers_are_not(base):
    model = load(base, "nf4")
    in_nf4 = {name for name, p in model.named_parameters() if isinstance(p, Params4bit)}
    linear = {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, Linear4bit)}
    experts = {f"{path}.{nf4_name(name)}" for path in expert_layers(model) for name in WEIGHTS}
    assert len(experts) == 2 * LAYERS and in_nf4 == linear | experts
    assert all(name.startswith("model.language_model.layers.") for name in in_nf4)
    routers = [p for name, p in model.named_parameters() if name.endswith("mlp.gate.weight")]
    assert len(routers) == LAYERS and {p.dtype for p in routers} == {torch.float32}
    check_quantized(model, "nf4")
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.experts\.gate_up_proj does not have the requested"):
        check_quantized(model, None)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.experts\.gate_up_proj does not have the requested"):
        check_quantized(load(base), "nf4")


def test_experts_of_a_base_that_comes_in_4_bit_are_as_they_come(base, tmp_path):
    stored = save_stored(base, tmp_path, ["lm_head", "model.visual"])
    model = load(stored, "nf4")
    assert len({name for name, m in model.named_modules() if isinstance(m, Linear4bit)}) >= 4 * LAYERS
    weights = [getattr(layer, name) for layer in expert_layers(model).values() for name in WEIGHTS]
    assert len(weights) == 2 * LAYERS and {weight.dtype for weight in weights} == {torch.float32}
    planned = weight_bytes(load_config(str(stored)), quantized=True, double_quant=True, dtype=torch.float32)
    assert sum(planned.values()) == pytest.approx(bytes_of(model), rel=0.01) and "experts" in planned
    logits, gradients = run(adapt(model))
    assert logits.isfinite().all() and [name for name in gradients if ".experts." in name]


@pytest.mark.parametrize("target_experts", [False, True])
def test_lora_reaches_experts_only_when_requested(base, target_experts):
    model = adapt(load(base, "nf4"), target_experts=target_experts)
    counts = count_trainable(model)
    width, inner, experts = 64, 64, 4
    each = LORA["r"] * experts * ((width + 2 * inner) + (inner + width))
    assert counts["experts"] == (LAYERS * each if target_experts else 0)
    assert counts["language model"] > 0 and counts["other"] == 0
    assert not [name for name, p in model.named_parameters() if p.requires_grad and ".gate." in name]
    with pytest.raises(ValueError, match=r"experts: .* trainable weights, expected"):
        check_trainable(model, **FROZEN, target_experts=not target_experts)


def test_stand_ins_take_no_memory_and_are_not_counted(base):
    model = load(base, "nf4")
    before = bytes_of(model)
    model = adapt(model)
    assert len(stand_ins(model)) == 2 * LAYERS
    trainable, total = count_parameters(model)
    assert bytes_of(model) - before - 4 * trainable <= 8 * 2 * LAYERS
    others, total_of_others = count_parameters(adapt(load(base, "nf4"), target_experts=False))
    assert total - trainable == total_of_others - others


@pytest.mark.parametrize(("quantization", "double_quant"), [("nf4", True), ("nf4", False), (None, False)])
@pytest.mark.parametrize("target_experts", [False, True])
def test_planned_weights_are_those_of_the_loaded_model(base, quantization, double_quant, target_experts):
    config = load_config(str(base))
    options = {"quantized": quantization is not None, "double_quant": double_quant, "dtype": torch.float32}
    planned = weight_bytes(config, **options)
    model = load(base, quantization, double_quant=double_quant)
    print(f"{quantization}: planned / loaded = {sum(planned.values()) / bytes_of(model):.4f}")
    assert sum(planned.values()) == pytest.approx(bytes_of(model), rel=0.01)
    assert ("experts, NF4" in planned) == (quantization == "nf4")
    settings = {**LORA, **FROZEN, "target_experts": target_experts}
    traced = add_lora(build_without_weights(config, torch.float32), settings)
    assert count_trainable(traced) == count_trainable(attach_lora(model, settings))


def test_precision_and_memory_of_experts_are_said():
    config, options = published_config("Qwen3-VL-30B-A3B"), {"double_quant": True, "itemsize": 2}
    line = "48 layers of 128, 29.0 billion weights in {}; routers in 16 bit"
    said = [format_experts(config, quantization=quantization, **options) for quantization in ("nf4", None, "stored")]
    assert said == [
        line.format("4 bit (NF4): 15.0 GB"),
        line.format("16 bit: 58.0 GB"),
        line.format("16 bit, as the base comes: 58.0 GB"),
    ]


def test_a_token_passes_few_experts():
    config = published_config("Qwen3-VL-30B-A3B")
    attention = 48 * 2 * 2048 * (32 + 4) * 128
    counts = count_weights(config)
    assert counts.language == attention + 48 * 8 * 3 * 2048 * 768
    assert counts.largest == 128 * 2 * 768 * 2048


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        (("--lora_dropout", "0.05"), "lora_dropout: LoRA on experts has none; set it to 0.0, or lora_target_experts"),
        (("--lora_dropout", "0", "--use_dora"), "use_dora: LoRA on experts has none; set it to False"),
        (("--lora_dropout", "0", "--compile_layers"), "compile_layers: not with lora_target_experts: true"),
    ],
)
def test_settings_that_lora_on_experts_lacks_are_refused(options, rule):
    words = ["--config", "configs/demo.yaml", "--model_name_or_path", "x", "--dataset_path", "x"]
    with pytest.raises(ValueError, match=re.escape(rule)):
        parse_config([*words, "--lora_target_experts", "true", *options])
    with pytest.raises(ValueError, match="router_aux_loss_coef: would have no effect; routers are not trained"):
        parse_config([*words, "--router_aux_loss_coef", "0.001"])


def test_experts_that_a_model_does_not_have_are_refused(base, tiny_base):
    words = ["--config", "configs/demo.yaml", "--dataset_path", "x", "--lora_dropout", "0"]
    words += ["--lora_target_experts", "true", "--model_name_or_path"]
    check_base(parse_config([*words, str(base)]), load_config(str(base)))
    with pytest.raises(ValueError, match=r"lora_target_experts: .* has no experts"):
        check_base(parse_config([*words, str(tiny_base)]), load_config(str(tiny_base)))
    with pytest.raises(ValueError, match=r"shard_base: .* has experts, which are not sharded here; set it to false"):
        check_base(parse_config([*words, str(base), "--shard_base", "true"]), load_config(str(base)))


def test_weights_of_another_shape_are_one_line(base, tmp_path):
    model = AutoModelForImageTextToText.from_pretrained(base)
    config = copy.deepcopy(model.config)
    config.text_config.moe_intermediate_size = 32
    model.save_pretrained(tmp_path)
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"its weights do not fit its config\.json: 6 have another shape"):
        load(tmp_path)
