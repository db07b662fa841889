"""A mixture of experts with LoRA on the experts too, from training to merging."""

import io
import json
import re
import shutil
from contextlib import redirect_stdout

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

import merge_adapter
import plan_run
import predict
import train_sft
from demo.tiny_model import save_tiny_model
from helpers.runs import TEXTS, rows_of, train_args
from models.experts import WEIGHTS
from models.loading import load_model

FAMILIES = ("qwen3_vl_moe", "qwen3_5_moe")
LAYERS = 3
SETTINGS = {
    "max_pixels": 12544,
    "max_length": 256,
    "lora_target_experts": "true",
    "lora_dropout": 0,
    "learning_rate": 1e-2,
    "warmup_steps": 0,
    "eval_strategy": "no",
}


@pytest.fixture(scope="module", params=FAMILIES)
def base(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    save_tiny_model(folder, TEXTS, hidden_size=64, num_layers=LAYERS, family=request.param)
    return folder


@pytest.fixture(scope="module")
def trained(base, demo_data, tmp_path_factory):
    """A run's folder, and what it printed."""
    out, screen = tmp_path_factory.mktemp("run") / "adapter", io.StringIO()
    with redirect_stdout(screen):
        train_sft.main(train_args(base, demo_data, out, **SETTINGS))
    return out, screen.getvalue()


@pytest.fixture(scope="module")
def adapter(trained):
    return trained[0]


def test_a_run_says_what_it_loads_and_trains(trained):
    out, text = trained
    assert "experts    3 layers of 4, 0.0 billion weights in 4 bit (NF4): 0.0 GB; routers in 32 bit" in text
    assert re.search(r"trainable +[\d,]+ of [\d,]+ parameters .*: experts 15,360, language model [\d,]+$", text, re.M)
    assert json.loads((out / "facts.json").read_text())["settings"]["lora_target_experts"] is True


def test_a_resumed_run_leaves_the_same_adapter_file(base, demo_data, adapter, tmp_path):
    shutil.copytree(adapter / "checkpoint-2", tmp_path / "checkpoint-2")
    train_sft.main(train_args(base, demo_data, tmp_path, **SETTINGS))
    files = [folder / "adapter_model.safetensors" for folder in (adapter, adapter / "checkpoint-2", tmp_path)]
    complete, half, resumed = (file.read_bytes() for file in files)
    assert resumed == complete != half


def test_recomputed_activations_leave_the_same_adapter(base, demo_data, adapter, tmp_path):
    if FAMILIES[1] in base.name:
        pytest.skip("its experts are the same, and its linear attention is slow on a CPU")
    train_sft.main(train_args(base, demo_data, tmp_path, **SETTINGS, gradient_checkpointing="true"))
    expected, found = (load_file(folder / "adapter_model.safetensors") for folder in (adapter, tmp_path))
    assert all(torch.allclose(found[name], value, atol=1e-6) for name, value in expected.items())


def test_routers_and_experts_weights_stay_and_each_expert_learns(adapter):
    tensors = load_file(adapter / "adapter_model.safetensors")
    assert not [name for name in tensors if ".gate." in name]
    learnt = {name: tensor for name, tensor in tensors.items() if "experts" in name and "lora_B" in name}
    assert len(learnt) == 2 * LAYERS
    for tensor in learnt.values():
        assert (tensor.view(tensor.size(0), -1, 4).abs().sum((0, 1)) > 0).all()


def test_the_adapter_is_plain_peft_for_the_16_bit_base(base, adapter):
    """Its answers there are those of this project's products, up to rounding."""
    ids = torch.arange(8, 48)[None]
    plain = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32), adapter)
    plain.get_base_model().set_experts_implementation("eager")
    ours = PeftModel.from_pretrained(load_model(str(base), quantization=None, dtype="float32"), adapter)
    with torch.no_grad():
        expected, found = (model(input_ids=ids).logits for model in (plain, ours))
    assert torch.allclose(found, expected, atol=1e-4)


def test_experts_are_merged_into_their_weights(base, adapter, tmp_path, capsys):
    merge_adapter.main(["--adapter", str(adapter), "--out", str(tmp_path / "model"), "--dtype", "float16"])
    out = capsys.readouterr().out
    distance, effect = map(float, re.search(r"logits +([\d.]+)% from .* base's by ([\d.]+)%", out).groups())
    assert distance < 1 < 10 < effect
    before, after = (
        AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float16).state_dict()
        for folder in (base, tmp_path / "model")
    )
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    experts = {f"model.language_model.layers.{n}.mlp.experts.{name}" for n in range(LAYERS) for name in WEIGHTS}
    assert experts < changed and not [name for name in changed if ".mlp.gate." in name]


def test_an_adapter_answers_about_images(adapter, demo_data, tmp_path):
    out = tmp_path / "answers.jsonl"
    predict.main(["--adapter", str(adapter), "--dataset", str(demo_data), "--out", str(out), "--max-new-tokens", "8"])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 4 and all(isinstance(row["prediction"], str) for row in rows)


def test_a_plan_and_a_dry_run_know_experts(base, demo_data, tmp_path, capsys):
    if FAMILIES[1] in base.name:
        pytest.skip("its experts are the same, and its linear attention is slow to trace")
    words = train_args(base, demo_data, tmp_path / "out", **SETTINGS)
    assert plan_run.main(words) == 0
    page = capsys.readouterr().out
    assert "experts    3 layers of 4, 0.0 billion weights in 4 bit (NF4)" in page
    assert "experts 15,360, language model" in page
    train_sft.main([*words, "--dry_run", "true"])
    assert "one forward and backward in a tiny model: loss" in capsys.readouterr().out


def test_two_processes_learn_as_one(base, mixed_data, fork_server, tmp_path):
    """The weights of experts in 4 bit have stand-ins, which are not copied between processes."""
    if FAMILIES[1] in base.name:
        pytest.skip("its experts are the same, and its linear attention is slow on a CPU")
    settings = {**SETTINGS, "max_steps": 3, "save_steps": 3, "per_device_train_batch_size": 1}
    one, two = tmp_path / "one", tmp_path / "two"
    runs = [
        fork_server.run("train_sft", train_args(base, mixed_data, one, **settings, gradient_accumulation_steps=2)),
        fork_server.run("train_sft", *[train_args(base, mixed_data, two, **settings)] * 2),
    ]
    for codes, outputs in runs:
        assert set(codes) == {0}, outputs
    curves = [torch.tensor(rows_of(out, "loss", "grad_norm")) for out in (one, two)]
    assert len(curves[0]) == 3
    torch.testing.assert_close(*curves, atol=1e-4, rtol=1e-4)
