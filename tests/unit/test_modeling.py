"""Exactly the language model's linear layers are in NF4, exactly the LoRA weights train, and all else raises."""

import json
import os
import shutil
from collections import Counter

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import get_peft_model

from collator import VisionSFTCollator
from models.loading import check_quantized, load_model, load_processor, resolve_dtype
from models.lora import build_lora_config, check_targets, check_trainable, count_trainable, detach_vision_inputs
from training.trainer import pin_trainable_to_float32

LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0}


def load(base, quantization="nf4", **options):
    return load_model(str(base), quantization=quantization, dtype="bfloat16", **options)


def adapt(base, **flags):
    model = load(base)
    return get_peft_model(model, build_lora_config(model, **LORA, **flags))


def names_of(model, kind):
    return {name for name, module in model.named_modules() if isinstance(module, kind)}


def test_nf4_layers_are_exactly_the_language_models_linear_layers(tiny_base):
    model = load(tiny_base)
    quantised = names_of(model, Linear4bit)
    layers = [
        f"model.language_model.layers.{n}.{part}"
        for n in range(2)
        for part in (
            *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
            *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
        )
    ]
    assert quantised == set(layers)
    for name in quantised:
        layer = model.get_submodule(name)
        assert layer.weight.quant_state.quant_type == "nf4"
        assert layer.weight.quant_state.nested
        assert layer.compute_dtype == torch.float32  # on a CPU
    assert model.lm_head.weight.dtype == torch.float32
    assert not names_of(load(tiny_base, quantization=None), Linear4bit)


def test_double_quantisation_can_be_switched_off(tiny_base):
    model = load(tiny_base, double_quant=False)
    assert not model.model.language_model.layers[0].mlp.up_proj.weight.quant_state.nested


def test_check_quantized_raises_when_a_layer_is_in_the_wrong_precision(tiny_base):
    model = load(tiny_base, quantization=None)
    with pytest.raises(
        ValueError, match=r"14 layers do not have the requested precision, the first is model\.language"
    ):
        check_quantized(model, "nf4")
    with pytest.raises(ValueError, match="14 layers do not have the requested precision"):
        check_quantized(load(tiny_base), None)


@pytest.mark.parametrize(
    ("flags", "adapted"),
    [
        ({}, {"language model": 14}),
        ({"train_vision": True}, {"language model": 14, "vision tower": 10}),
        ({"train_merger": True}, {"language model": 14, "merger": 2}),
        ({"target_modules": ["q_proj", "v_proj"]}, {"language model": 4}),
    ],
)
def test_lora_reaches_exactly_the_requested_parts(tiny_base, flags, adapted):
    model = adapt(tiny_base, **flags)
    parts = Counter(
        "language model" if "language_model" in name else "merger" if "merger" in name else "vision tower"
        for name in model.targeted_module_names
    )
    assert parts == adapted
    counts = count_trainable(model)
    assert {part for part, count in counts.items() if count} == set(adapted)
    assert sum(counts.values()) == model.get_nb_trainable_parameters()[0]
    requested = {flag: flags.get(flag, False) for flag in ("train_vision", "train_merger")}
    check_trainable(model, **requested)


def test_a_target_that_no_language_layer_has_is_named(tiny_base):
    model = load(tiny_base)
    check_targets(model, None)
    with pytest.raises(ValueError, match=r"lora_target_modules: qkv, qproj not among down_proj, gate_proj, k_proj"):
        check_targets(model, ["q_proj", "qproj", "qkv"])


def test_an_adapter_as_base_model_is_refused(tiny_base, tmp_path):
    adapt(tiny_base).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is an adapter; name its base model"):
        load(tmp_path)


def test_a_missing_attention_package_gives_one_line(tiny_base):
    with pytest.raises(ValueError, match="attn_implementation: FlashAttention2") as error:
        load(tiny_base, attn_implementation="flash_attention_2")
    assert "\n" not in str(error.value)


def test_check_trainable_raises_when_something_else_trains(tiny_base):
    model = adapt(tiny_base)
    frozen = {"train_vision": False, "train_merger": False}
    check_trainable(model, **frozen)
    with pytest.raises(ValueError, match="vision tower: 0 trainable weights, expected some"):
        check_trainable(model, train_vision=True, train_merger=False)
    with_tower = adapt(tiny_base, train_vision=True)
    with pytest.raises(ValueError, match=r"vision tower: \d+ trainable weights, expected none"):
        check_trainable(with_tower, **frozen)
    model.get_parameter("base_model.model.lm_head.weight").requires_grad_(True)
    with pytest.raises(ValueError, match=r"1 trainable weights are not LoRA's, the first is .*lm_head\.weight"):
        check_trainable(model, **frozen)


def test_trainable_weights_are_pinned_to_float32(tiny_base):
    model = adapt(tiny_base)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    pin_trainable_to_float32(model)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def gradients(model, batch):
    model.zero_grad()
    torch.manual_seed(1)  # dropout
    model(**batch, use_cache=False).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("flags", [{}, {"train_vision": True, "train_merger": True}])
def test_detached_vision_inputs_change_no_gradient_of_lora(tiny_base, processor, demo_splits, flags):
    model = adapt(tiny_base, **flags)
    for parameter in model.parameters():
        if parameter.requires_grad:  # B is zero at first, and A would have no gradient
            torch.nn.init.normal_(parameter, std=0.02, generator=torch.Generator().manual_seed(1))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    batch = VisionSFTCollator(processor)([demo_splits["train"][n] for n in range(3)])
    reached, tower = [], model.get_base_model().model.visual
    before = gradients(model.train(), batch)
    assert before.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    hook = detach_vision_inputs(model)
    tower.blocks[0].register_forward_pre_hook(lambda block, inputs: reached.append(inputs[0].requires_grad))
    after = gradients(model, batch)
    assert reached and not any(reached)
    for name, gradient in before.items():
        assert torch.equal(gradient, after[name]), name
    hook.remove()


def test_pixel_limits_take_effect_and_are_saved(tiny_base, tmp_path):
    processor = load_processor(str(tiny_base), min_pixels=784, max_pixels=12544)
    processor.save_pretrained(tmp_path)
    size = load_processor(str(tmp_path)).image_processor.size
    assert (size["shortest_edge"], size["longest_edge"]) == (784, 12544)
    with pytest.raises(ValueError, match="min_pixels 20000 is above max_pixels 12544"):
        load_processor(str(tmp_path), min_pixels=20000)


def test_pixel_limits_under_one_token_are_refused(tiny_base):
    for name in ("min_pixels", "max_pixels"):
        rule = f"{name}: expected at least 784, the area of one token, found 783"
        with pytest.raises(ValueError, match=rule):
            load_processor(str(tiny_base), **{name: 783})


@pytest.mark.parametrize(
    ("name", "reason"), [("/nowhere/model", ": no such folder"), ("someone/model", ", neither a folder nor")]
)
def test_a_missing_base_model_gives_one_line(name, reason):
    for load_part in (load_processor, load):
        with pytest.raises(ValueError, match=f"no .* in '{name}'{reason}") as error:
            load_part(name)
        assert "\n" not in str(error.value)


def test_what_keeps_a_folder_from_being_loaded_is_not_called_a_missing_model(tiny_base, tmp_path):
    with pytest.raises(ValueError, match=f"^no model in '{tmp_path}' that can be loaded: .*config.json"):
        load(tmp_path)
    with pytest.raises(ValueError, match=f"^no processor in '{tmp_path}': the folder has no processor_config.json$"):
        load_processor(str(tmp_path))


@pytest.mark.parametrize("part", [None, "", "text_config", "vision_config"])
@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_code_on_the_hub_is_no_attention(tiny_base, tmp_path, part, key):
    """transformers would fetch it and run it, if the package kernels is there."""
    with pytest.raises(ValueError, match=r"^attn_implementation: expected one of varlen, .*, found 'some/kernel'$"):
        load(tiny_base, attn_implementation="some/kernel")
    config = json.loads((tiny_base / "config.json").read_text())
    config[key] = "some/kernel" if part is None else {part: "some/kernel"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"^the config.json of {tmp_path}: attn_implementation: expected one of"):
        load(tmp_path)


@pytest.mark.parametrize("file", ["folder", "link in a circle"])
def test_weights_that_cannot_be_read_are_not_called_missing(tiny_base, tmp_path, file):
    folder = tmp_path / "base"
    shutil.copytree(tiny_base, folder)
    weights = folder / "model.safetensors"
    weights.unlink()
    weights.mkdir() if file == "folder" else weights.symlink_to(weights)
    with pytest.raises(ValueError, match=f"model '{folder}': model.safetensors cannot be read: it is no file"):
        load(folder)


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may read every file")
def test_weights_of_others_are_named_with_the_reason(tiny_base, tmp_path):
    shutil.copytree(tiny_base, tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").chmod(0)
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read: Permission denied"):
        load(tmp_path / "base")


def test_an_unknown_quantization_is_refused(tiny_base):
    with pytest.raises(ValueError, match="expected 'nf4', 'stored' or None, found 'int8'"):
        load(tiny_base, quantization="int8")


def test_a_cpu_computes_in_float32():
    assert resolve_dtype("bfloat16", torch.device("cpu")) == torch.float32


def test_training_continues_after_an_evaluation_in_nf4(tiny_base, processor):
    """On CPUs with AVX512-BF16 an evaluation repacks the weights, and the next training step used to crash."""
    model = adapt(tiny_base)
    assert not any(m.support_avx512bf16_for_cpu for m in model.modules() if isinstance(m, Linear4bit))
    inputs = dict(processor(text=["What condition is shown?"], return_tensors="pt"))
    for _ in range(2):
        model.train()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        model.eval()
        with torch.no_grad():
            model(**inputs)
