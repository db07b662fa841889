"""Bases that come quantised: used as they are, or refused by their configuration alone."""

import json
import re

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file

from helpers.stored import change_config, save_stored
from models.loading import load_config, load_model
from models.quantization import DEFAULTS, describe_stored, format_paths, format_stored, stored_readings
from training.config import parse_config
from training.config_checks import check_base

LANGUAGE, MLP = "model.language_model.layers.", ("down_proj", "gate_proj", "up_proj")
# One language MLP and one attention of the tower in 16 bit, in paths of today and of before transformers 4.52
TODAY = ["lm_head", "model.visual.merger", "model.visual.blocks.0.attn", f"{LANGUAGE}1.mlp"]
BEFORE = ["lm_head", "multi_modal_projector", "merger", "visual.blocks.0.attn", "model.layers.1.mlp"]
IN_16_BIT = {f"{LANGUAGE}1.mlp.{name}" for name in MLP}


@pytest.fixture
def stored(tiny_base, tmp_path):
    return save_stored(tiny_base, tmp_path / "stored", TODAY)


def load(folder, quantization="nf4", **options):
    return load_model(str(folder), quantization=quantization, dtype="float32", **options)


def in_4_bit(model):
    return {name for name, module in model.named_modules() if isinstance(module, Linear4bit)}


def test_a_base_in_4_bit_is_loaded_as_it_is(stored):
    model, file = load(stored), load_file(stored / "model.safetensors")
    layers = in_4_bit(model)
    assert len(layers) == 14 - 3 + 10 - 2 and not layers & IN_16_BIT
    for name in layers:
        weight, key = model.get_submodule(name).weight, name.replace("model.language_model.", "model.")
        key = key.replace("model.visual.", "visual.")
        assert torch.equal(weight.data, file[f"{key}.weight"])  # not quantised again
        assert torch.equal(weight.quant_state.absmax, file[f"{key}.weight.absmax"])
    rest = [p for p in model.parameters() if p.dtype != torch.uint8]
    assert {p.dtype for p in rest} == {torch.float32}  # a CPU computes in it
    assert model.get_submodule(f"{LANGUAGE}0.mlp.up_proj").compute_dtype == torch.float32


@pytest.mark.parametrize("tied", [False, True])
def test_a_list_of_an_older_version_means_the_same_layers(tiny_base, tmp_path, tied):
    from demo.tiny_model import save_tiny_model
    from helpers.runs import TEXTS

    if tied:
        tiny_base = tmp_path / "tied"
        save_tiny_model(tiny_base, TEXTS, hidden_size=64, num_layers=2, tied=True)
    stored = save_stored(tiny_base, tmp_path / "stored", TODAY)
    expected = load(stored)
    change_config(stored, quantization_config={"llm_int8_skip_modules": BEFORE}, transformers_version="4.49.0")
    model = load(stored)
    assert in_4_bit(model) == in_4_bit(expected) == stored_readings(model)[0]
    assert (model.lm_head.weight is model.model.language_model.embed_tokens.weight) == tied
    ids = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, expected(input_ids=ids).logits)


def test_a_base_saved_with_the_default_list_has_its_tower_in_4_bit(tiny_base, tmp_path):
    stored = save_stored(tiny_base, tmp_path / "stored", None)
    layers = in_4_bit(load(stored))
    assert len(layers) == 14 + 10 + 2 and "lm_head" not in layers


@pytest.mark.parametrize(
    ("skipped", "count", "first"),
    [
        ([*TODAY, f"{LANGUAGE}0.mlp"], 3, f"{LANGUAGE}0.mlp.down_proj"),
        (TODAY[:-1], 3, f"{LANGUAGE}1.mlp.down_proj"),
    ],
)
def test_a_file_that_contradicts_its_configuration_is_refused(stored, skipped, count, first):
    change_config(stored, quantization_config={"llm_int8_skip_modules": skipped})
    rule = f"{count} layers do not have the precision that config.json says, the first is {first}"
    with pytest.raises(ValueError, match=re.escape(rule)):
        load(stored)


def test_what_is_in_4_bit_is_described(stored):
    found = describe_stored(load(stored))
    expected = [f"{LANGUAGE}1.mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")]
    assert found == {"type": "nf4", "double_quant": True, "layers": 19, "language_layers_in_16_bit": expected}
    assert format_stored(found) == (
        "19 layers, as the base comes (nf4, double quantised); of the language layers 3 are in 16 bit: "
        f"{', '.join(expected)}"
    )
    assert format_paths(["a.0.up", "a.0.down", "a.3.up", "head"]) == "a.{0,3}.up, a.0.down, head"


def test_a_base_in_16_bit_has_no_description(tiny_base):
    assert describe_stored(load(tiny_base)) is None
    assert describe_stored(load(tiny_base, quantization=None)) is None


def test_another_precision_than_the_bases_is_refused(stored, tiny_base):
    with pytest.raises(ValueError, match="comes in 4 bit and cannot be loaded in 16 bit; name its 16-bit base"):
        load(stored, quantization=None)
    with pytest.raises(ValueError, match="does not come in 4 bit, as the base of the training did"):
        load(tiny_base, quantization="stored")
    assert in_4_bit(load(stored, quantization="stored")) == in_4_bit(load(stored))


@pytest.mark.parametrize(
    ("stored", "reason"),
    [
        ({"quant_method": "gptq", "bits": 4}, "GPTQ: training on it takes optimum and gptqmodel"),
        ({"quant_method": "awq", "bits": 4}, "AWQ: training on it takes gptqmodel"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "FP8: training on it takes kernels that are"),
        ({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}, "compressed-tensors: training on"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "8 bit (bitsandbytes)"),
        ({"quant_method": "hqq"}, "hqq, which this project does not train"),
    ],
    ids=lambda value: value["quant_method"] if isinstance(value, dict) else "",
)
def test_other_quantised_bases_are_refused_by_their_configuration_alone(tiny_base, tmp_path, stored, reason):
    (tmp_path / "config.json").write_text((tiny_base / "config.json").read_text())
    change_config(tmp_path, quantization_config=stored)
    rule = f"'{tmp_path}': it comes in {reason}"
    for check in (load_config, load):
        with pytest.raises(ValueError, match=re.escape(rule)) as error:
            check(str(tmp_path))
        assert "\n" not in str(error.value) and "take its 16-bit base" in str(error.value)


def test_a_recipe_that_contradicts_the_base_is_refused(stored, tiny_base):
    def check(base, *options):
        words = ["--config", "configs/demo.yaml", "--model_name_or_path", str(base), "--dataset_path", "x", *options]
        check_base(parse_config(words), load_config(str(base)))

    check(stored)
    check(tiny_base, "--load_in_4bit", "false")
    with pytest.raises(ValueError, match=r"load_in_4bit: false, but .*stored comes in 4 bit: set it to true, or name"):
        check(stored, "--load_in_4bit", "false")
    with pytest.raises(ValueError, match=r"bnb_4bit_quant_storage: expected uint8, in which .* comes"):
        check(stored, "--bnb_4bit_quant_storage", "bfloat16", "--dtype", "bfloat16")


def test_settings_that_a_configuration_leaves_out_have_bitsandbytes_defaults(tiny_base, tmp_path):
    stored = save_stored(tiny_base, tmp_path, TODAY, bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=False)
    config = json.loads((stored / "config.json").read_text())
    for name in DEFAULTS:
        assert config["quantization_config"].pop(name) == DEFAULTS[name]
    (stored / "config.json").write_text(json.dumps(config))
    found = describe_stored(load(stored))
    assert (found["type"], found["double_quant"], found["layers"]) == ("fp4", False, 19)
