"""What `auto` becomes: by tokens, device and memory, once for a run and all its restarts."""

import json
from types import SimpleNamespace

import pytest
import torch
from peft import get_peft_model

import train_sft
from helpers.runs import train_args
from models.compilation import tokens_to_repay
from models.families import FAMILIES, published_config
from models.flops import language_weights
from models.loading import load_model
from models.lora import build_lora_config
from planning.shapes import build_without_weights, count_weights
from training import choices
from training.config import parse_config
from training.lengths import SampleLengths

CUDA = torch.device("cuda")


def on_gpu(*options, **changes):
    """Return the settings of skin.yaml as a GPU would see them."""
    settings = parse_config(["--use_cpu", "true", *options])
    values = {name: getattr(settings.training, name) for name in settings.training.to_dict()}
    values |= {"device": CUDA, "deepspeed_plugin": None, "world_size": 1}
    return settings._replace(training=SimpleNamespace(**(values | changes)))


def lengths_of(*totals):
    return SampleLengths(total=list(totals), image=[0] * len(totals))


def test_compiling_pays_from_two_million_tokens_on_in_a_7b_model_and_later_in_smaller_ones():
    weights = {name: count_weights(published_config(f"Qwen2.5-VL-{name}")).language for name in ("3B", "7B", "72B")}
    millions = {name: round(tokens_to_repay(count) / 1e6, 2) for name, count in weights.items()}
    assert millions == {"3B": 4.44, "7B": 1.89, "72B": 0.18}


@pytest.mark.parametrize("name", [max(family.shapes) for family in FAMILIES.values()])
def test_a_model_has_as_many_language_weights_as_its_plan_counts(name):
    config = published_config(name)
    assert language_weights(build_without_weights(config, torch.bfloat16)) == count_weights(config).language


def test_weights_in_nf4_and_with_lora_count_as_often(tiny_base):
    model = load_model(str(tiny_base), quantization="nf4", dtype=torch.float32)
    plain = load_model(str(tiny_base), quantization=None, dtype=torch.float32).requires_grad_(False)
    expected = language_weights(plain)
    adapted = get_peft_model(model, build_lora_config(model, r=4, lora_alpha=8))
    assert language_weights(adapted) == expected > 0


def test_the_tokens_of_a_run_are_those_of_all_its_epochs_or_steps_on_one_gpu():
    three = lengths_of(100, 200, 600)
    assert choices.tokens_a_gpu(three, on_gpu(world_size=2)) == 3 * 900 / 2
    assert choices.tokens_a_gpu(three, on_gpu("--max_steps", "10", "--pack_tokens", "1024")) == 10 * 4 * 1024
    padded = on_gpu("--max_steps", "10", "--packing", "false", "--per_device_train_batch_size", "2")
    assert choices.tokens_a_gpu(three, padded) == 10 * 4 * 2 * 300


@pytest.fixture(scope="module")
def seven_billion():
    return build_without_weights(published_config("Qwen2.5-VL-7B"), torch.bfloat16)


@pytest.mark.parametrize(
    ("settings", "samples", "found", "reason"),
    [
        (on_gpu(), 6400, True, "1.9 million tokens on each GPU, and it pays from 1.9 million on"),
        (on_gpu(), 5000, False, "1.5 million tokens on each GPU, and it pays from 1.9 million on"),
        (on_gpu(world_size=2), 6400, False, "1.0 million tokens on each GPU"),
        (on_gpu(device=torch.device("cpu")), 6400, False, "there is no GPU"),
        (on_gpu("--gradient_checkpointing", "selective"), 1, True, "selective needs it"),
        (on_gpu("--lora_target_experts", "--lora_dropout", "0"), 6400, False, "not with lora_target_experts: true"),
    ],
)
def test_layers_are_compiled_where_it_pays(seven_billion, monkeypatch, settings, samples, found, reason):
    monkeypatch.setattr(choices, "check_compiler", lambda: None)
    chosen, said = choices.repays_compiling(seven_billion, lengths_of(*[100] * samples), settings)
    assert chosen is found and reason in said


def test_without_a_compiler_a_long_run_is_not_compiled(seven_billion, monkeypatch):
    def missing():
        raise ValueError("compile_layers: this machine cannot; install gcc, or set it to false (no cc)")

    monkeypatch.setattr(choices, "check_compiler", missing)
    found = choices.repays_compiling(seven_billion, lengths_of(*[100] * 7000), on_gpu())
    assert found == (False, "this machine cannot; install gcc, or set it to false (no cc)")


def test_a_run_says_what_auto_became_and_keeps_it_when_it_resumes(tiny_base, demo_data, tmp_path, monkeypatch, capsys):
    words = train_args(tiny_base, demo_data, tmp_path, eval_strategy="no")
    train_sft.main([*words, "--max_steps", "2"])
    assert "compiling off: there is no GPU" in capsys.readouterr().out.splitlines()
    before = json.loads((tmp_path / "checkpoint-2" / "COMPLETE.json").read_text())
    assert before["run"]["settings"]["compile_layers"] is False
    assert json.loads((tmp_path / "facts.json").read_text())["settings"]["compile_layers"] is False
    monkeypatch.setattr(choices, "repays_compiling", lambda *args: pytest.fail("it was decided before"))
    train_sft.main([*words, "--allow_config_change", "true"])
    assert "compile_layers" not in capsys.readouterr().out
