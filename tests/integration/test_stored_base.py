"""A base that comes in 4 bit, from training to merging."""

import json
import shutil

from common.cli import run

import pytest
import torch

import eval_sft
import merge_adapter
import plan_run
import predict
import train_sft
from helpers.runs import train_args
from helpers.stored import change_config, save_stored
from helpers.weights import bytes_of
from models.adapters import loading_settings
from models.loading import load_config, load_model, load_processor
from planning.shapes import weight_bytes

SKIPPED = ["lm_head", "model.visual.merger", "model.language_model.layers.0.mlp.down_proj"]
IN_16_BIT = "model.language_model.layers.0.mlp.down_proj"
LINE = (
    "4 bit      23 layers, as the base comes (nf4, double quantised); of the language layers 1 are in 16 bit: "
    f"{IN_16_BIT}"
)


@pytest.fixture(scope="module")
def stored(tiny_base, tmp_path_factory):
    return save_stored(tiny_base, tmp_path_factory.mktemp("stored"), SKIPPED)


@pytest.fixture(scope="module")
def trained(stored, demo_data, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "adapter"
    train_sft.main(train_args(stored, demo_data, out, learning_rate=1e-2, eval_strategy="no"))
    return out


def ask(adapter, image, *options):
    question = ["--image", image, "--question", "What condition is shown?", "--max-new-tokens", "4"]
    return run(lambda: predict.main([str(word) for word in ("--adapter", adapter, *question, *options)]))


@pytest.fixture
def image(demo_raw):
    return demo_raw / "images" / "0001.jpg"


def error_of(capsys):
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_the_run_says_and_records_what_is_in_4_bit(stored, demo_data, tmp_path, capsys):
    train_sft.main(train_args(stored, demo_data, tmp_path, max_steps=1, save_steps=1, eval_strategy="no"))
    assert LINE in capsys.readouterr().out.splitlines()
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["quantization"] == "stored" and record["double_quant"] is True
    assert record["stored_layers"] == {
        "type": "nf4", "double_quant": True, "layers": 23, "language_layers_in_16_bit": [IN_16_BIT]
    }  # fmt: skip


def test_the_adapter_answers_on_the_same_base_only(trained, stored, tiny_base, image, tmp_path, capsys):
    assert ask(trained, image) == 0
    shutil.copytree(trained, tmp_path / "adapter")
    record = json.loads((trained / "run.json").read_text())
    record["stored_layers"]["layers"] = 24
    (tmp_path / "adapter" / "run.json").write_text(json.dumps(record))
    capsys.readouterr()
    assert ask(tmp_path / "adapter", image) == 1
    assert error_of(capsys) == (
        "error: the base is not the one of the training: its layers in 4 bit had layers 24, and have layers 23"
    )
    assert ask(trained, image, "--base", tiny_base) == 1
    assert "does not come in 4 bit, as the base of the training did" in error_of(capsys)
    assert ask(trained, image, "--base", tiny_base, "--quantization", "nf4") == 0
    assert ask(trained, image, "--quantization", "none") == 1
    assert "comes in 4 bit and cannot be loaded in 16 bit; name its 16-bit base" in error_of(capsys)


def test_an_adapter_from_elsewhere_gets_its_base_as_it_comes(trained, stored, image, tmp_path, capsys):
    shutil.copytree(trained, tmp_path / "adapter")
    (tmp_path / "adapter" / "run.json").unlink()
    assert ask(tmp_path / "adapter", image) == 0
    assert "using 16 bit" not in capsys.readouterr().err


def test_a_base_without_an_adapter_is_used_as_it_comes(stored, image, tmp_path):
    question = ["--image", str(image), "--question", "What condition is shown?", "--max-new-tokens", "4"]
    assert predict.main(["--base", str(stored), *question, "--out", str(tmp_path / "answers.jsonl")]) == 0
    assert loading_settings(None, base=str(stored), quantization="auto", dtype=None)["quantization"] == "stored"
    assert run(lambda: predict.main(["--base", str(stored), *question, "--quantization", "none"])) == 1


def test_an_evaluation_loads_the_same_base(trained, demo_data, tmp_path):
    words = ["--adapter", str(trained), "--dataset", str(demo_data), "--out", str(tmp_path), "--max-new-tokens", "4"]
    eval_sft.main([*words, "--baseline", "--no-probabilities"])
    assert json.loads((tmp_path / "metrics.json").read_text())["evaluated"]["questions"] == 5


def test_merging_asks_for_the_16_bit_base(trained, stored, tiny_base, tmp_path, capsys):
    words = ["--adapter", str(trained), "--out", str(tmp_path / "model")]
    assert run(lambda: merge_adapter.main(words)) == 1
    rule = "a merge adds the adapter to 16-bit weights: name the 16-bit base by --base"
    assert error_of(capsys) == f"error: {stored} comes in 4 bit, and {rule}"
    merge_adapter.main([*words, "--base", str(tiny_base)])
    merged = load_model(str(tmp_path / "model"), quantization=None, dtype="float32")
    before = load_model(str(tiny_base), quantization=None, dtype="float32")
    name = f"{IN_16_BIT}.weight"
    assert not torch.equal(merged.get_parameter(name), before.get_parameter(name).bfloat16().float())
    load_processor(str(tmp_path / "model"))


@pytest.mark.parametrize(
    "settings", [{"load_in_4bit": "false"}, {"bnb_4bit_quant_storage": "bfloat16", "dtype": "bfloat16"}]
)
def test_training_and_plan_refuse_a_recipe_that_contradicts_the_base(stored, demo_data, tmp_path, capsys, settings):
    for command in (train_sft, plan_run):
        words = train_args(stored, demo_data, tmp_path / "out", **settings)
        assert run(lambda command=command, words=words: command.main(words)) == 1
        assert error_of(capsys).startswith(f"error: {next(iter(settings))}: ")


def test_training_and_plan_refuse_a_gptq_base_before_its_weights(tiny_base, demo_data, tmp_path, capsys):
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base, ignore=shutil.ignore_patterns("*.safetensors"))
    change_config(base, quantization_config={"quant_method": "gptq", "bits": 4})
    for command in (train_sft, plan_run):
        words = train_args(base, demo_data, tmp_path / "out")
        assert run(lambda command=command, words=words: command.main(words)) == 1
        error = error_of(capsys)
        assert f"'{base}': it comes in GPTQ: training on it takes optimum and gptqmodel" in error


def test_the_plan_knows_what_is_in_4_bit(stored, demo_data, tmp_path, capsys):
    assert plan_run.main(train_args(stored, demo_data, tmp_path)) == 0
    page = capsys.readouterr().out
    assert LINE in page.splitlines()
    assert "NF4, checkpointing" in page and "not quantised" not in page


def test_a_dry_run_tries_a_tiny_model_of_such_a_base(stored, demo_data, tmp_path, capsys):
    train_sft.main(train_args(stored, demo_data, tmp_path / "out", dry_run="true"))
    assert "one forward and backward in a tiny model: loss" in capsys.readouterr().out


@pytest.mark.parametrize("double_quant", [True, False])
def test_planned_weights_are_those_of_the_loaded_base(tiny_base, tmp_path, double_quant):
    stored = save_stored(tiny_base, tmp_path, SKIPPED, bnb_4bit_use_double_quant=double_quant)
    model = load_model(str(stored), quantization="stored", dtype="float32")
    planned = weight_bytes(load_config(str(stored)), quantized=True, double_quant=True, dtype=torch.float32)
    print(f"planned / loaded = {sum(planned.values()) / bytes_of(model):.4f}")
    assert sum(planned.values()) == pytest.approx(bytes_of(model), rel=0.01)
