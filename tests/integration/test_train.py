"""What training changes, what it leaves alone, and what it leaves behind on disk."""

import json
import math
import re
import shutil
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from common.cli import run

import pytest
import torch
from datasets import concatenate_datasets
from safetensors.torch import load_file
from transformers import TrainerCallback

import train_sft
from common import hub_client
from data_prep import load_splits
from data_prep.convert import prepare
from data_prep.sources import Source
from helpers.runs import PACKED, train_args
from models.flops import work_of
from models.loading import load_config, load_processor
from planning.shapes import build_without_weights
from publishing.run_facts import describe_base
from training.build import build_model, build_trainer, decide
from training.config import parse_config
from training.data import load_data, open_processor
from training.resume import describe_identity

ADAPTER = "adapter_model.safetensors"
SAMPLES = {"train": 32, "validation": 4, "test": 4}

needs_compiler = pytest.mark.skipif(not shutil.which("gcc"), reason="needs a C compiler")


def train(base, data, out, **settings):
    train_sft.main(train_args(base, data, out, **settings))
    return load_file(Path(out) / ADAPTER)


def metrics(out):
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def curve(out):
    return [tuple(row.get(key) for key in ("step", "loss", "eval_loss", "num_tokens")) for row in metrics(out)]


def assert_same_weights(left, right):
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def make_trainer(base, data, out, **settings):
    """Do what `main` does up to the first step."""
    settings = parse_config(train_args(base, data, out, **settings))
    processor = open_processor(settings)
    data = load_data(settings, processor)
    identity = describe_identity(settings, describe_base(str(base), None), data.splits["train"])
    torch.manual_seed(settings.training.seed)
    model = build_model(settings)
    settings, recompute = decide(model, processor, data, settings)
    return build_trainer(model, processor, data, settings, identity=identity, recompute=recompute)


@pytest.mark.parametrize("vision", ["true", "false"])
def test_after_two_steps_only_lora_weights_differ(tiny_base, demo_data, tmp_path, vision):
    # LoRA's B starts at zero, so its A moves from the second step on
    settings = {"max_steps": 2, "warmup_steps": 0, "freeze_vision_encoder": vision}
    trainer = make_trainer(tiny_base, demo_data, tmp_path, **settings)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    changed = {name for name, value in trainer.model.state_dict().items() if not torch.equal(value, before[name])}
    lora = {name for name, parameter in trainer.model.named_parameters() if "lora_" in name}
    assert changed == lora
    in_tower = {name for name in changed if "visual" in name}
    assert bool(in_tower) == (vision == "false")


def test_a_run_changes_none_of_its_settings(tiny_base, demo_data, tmp_path, monkeypatch):
    seen = []

    def values(settings):
        return [asdict(settings.data), settings.training.to_dict(), asdict(settings.model)]

    def parse(argv):
        settings = parse_config(argv)
        seen.append((settings, values(settings)))
        return settings

    monkeypatch.setattr(train_sft, "parse_config", parse)
    train(tiny_base, demo_data, tmp_path, **PACKED, gradient_checkpointing="auto", report_to="tensorboard")
    [(settings, before)] = seen
    assert values(settings) == before and settings.training.gradient_checkpointing == "auto"
    with pytest.raises(AttributeError):
        settings.data.pack_tokens = 1


class KeepGradients(TrainerCallback):
    """Copies the gradients of the first optimizer step."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


def test_accumulation_gives_the_loss_and_gradients_of_one_batch(tiny_base, demo_data, tmp_path):
    """Answers of different lengths: a mean over micro-batches would weigh short ones too much."""
    seen = {}
    for batch, steps in ((8, 1), (1, 8), (2, 4)):
        out = tmp_path / f"{batch}x{steps}"
        settings = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": steps, "max_steps": 1}
        trainer = make_trainer(tiny_base, demo_data, out, max_grad_norm=0, **settings)
        keep = KeepGradients()
        trainer.add_callback(keep)
        trainer.train()
        seen[batch] = trainer.state.log_history[0]["loss"], keep.gradients
    for batch in (1, 2):
        assert seen[batch][0] == pytest.approx(seen[8][0], rel=1e-5)
        for name, gradient in seen[8][1].items():
            torch.testing.assert_close(seen[batch][1][name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        pytest.param({"load_in_4bit": "false"}, marks=pytest.mark.slow),
        {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 1, "lora_dropout": 0.1},
    ],
    ids=["nf4", "not quantised", "accumulation and dropout"],
)
def test_a_resumed_run_ends_with_the_weights_of_one_never_stopped(tiny_base, demo_data, tmp_path, settings):
    settings = {"max_steps": 20, "save_steps": 10, "eval_steps": 5, "logging_steps": 3, **settings}
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    expected = train(tiny_base, demo_data, whole, **settings)
    stopped.mkdir()
    shutil.copytree(whole / "checkpoint-10", stopped / "checkpoint-10")
    resumed = train(tiny_base, demo_data, stopped, **settings)
    assert_same_weights(expected, resumed)
    assert any(value.abs().max() > 0 for name, value in expected.items() if "lora_B" in name)
    assert curve(whole) == curve(stopped)


def test_an_evaluation_leaves_the_random_state_of_the_training(tiny_base, demo_data, tmp_path):
    trainer = make_trainer(tiny_base, demo_data, tmp_path, lora_dropout=0.1)
    before = torch.get_rng_state()
    trainer.evaluate()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_run_that_has_ended_and_is_started_again_takes_no_step_more(tiny_base, demo_data, tmp_path):
    """Killed after its last checkpoint: in the middle of an epoch, and with a learning rate that is not 0 there."""
    settings = {"max_steps": 5, "save_steps": 5, "lr_scheduler_type": "constant", "eval_strategy": "no"}
    expected, lines = train(tiny_base, demo_data, tmp_path, **settings), curve(tmp_path)
    (tmp_path / ADAPTER).unlink()
    assert_same_weights(expected, train(tiny_base, demo_data, tmp_path, **settings))
    assert curve(tmp_path) == lines and lines[-1][0] == 5
    assert json.loads((tmp_path / "facts.json").read_text())["training"]["step"] == 5


def test_a_run_leaves_adapter_processor_curves_and_checkpoints(tiny_base, demo_data, tmp_path):
    train(tiny_base, demo_data, tmp_path, max_steps=6, save_steps=2, save_total_limit=2)
    files = {path.name for path in tmp_path.iterdir()}
    assert {ADAPTER, "adapter_config.json", "tokenizer.json", "processor_config.json", "chat_template.jinja"} <= files
    assert {"metrics.jsonl", "training_metrics.png", "run.json", "facts.json", "README.md"} <= files
    assert {name for name in files if name.startswith("checkpoint")} == {"checkpoint-4", "checkpoint-6"}
    in_checkpoint = {path.name for path in (tmp_path / "checkpoint-4").iterdir()}
    assert {ADAPTER, "processor_config.json", "tokenizer.json", "optimizer.pt", "rng_state.pth"} <= in_checkpoint
    size = load_processor(str(tmp_path / "checkpoint-4")).image_processor.size
    assert (size["shortest_edge"], size["longest_edge"]) == (12544, 12544)
    facts = json.loads((tmp_path / "run.json").read_text())
    assert facts == {
        "quantization": "nf4",
        "double_quant": True,
        "dtype": "float32",
        "attn_implementation": None,
        "revision": "main",
        "thinking": "off",
    }


def test_the_learning_rate_warms_up_and_falls_along_a_cosine(tiny_base, demo_data, tmp_path):
    peak, warmup, steps = 1e-3, 3, 12
    train(tiny_base, demo_data, tmp_path, max_steps=steps, warmup_steps=warmup, learning_rate=peak, logging_steps=1)
    logged = [row["learning_rate"] for row in metrics(tmp_path) if "loss" in row]
    after = [(n - warmup) / (steps - warmup) for n in range(warmup, steps)]
    expected = [peak * n / warmup for n in range(warmup)] + [peak * (1 + math.cos(math.pi * x)) / 2 for x in after]
    assert logged == pytest.approx(expected)


def test_gradients_are_clipped(tiny_base, demo_data, tmp_path):
    trainer = make_trainer(tiny_base, demo_data, tmp_path, max_steps=1, max_grad_norm=0.01)
    keep = KeepGradients()
    trainer.add_callback(keep)
    trainer.train()
    norm = torch.linalg.vector_norm(torch.stack([g.norm() for g in keep.gradients.values()]))
    assert norm == pytest.approx(0.01, rel=1e-3)
    assert trainer.state.log_history[0]["grad_norm"] > 0.1


def watch_layer(trainer):
    """Return a list that collects the dtype of a language layer's projection each time that it runs."""
    seen = []
    layer = trainer.model.get_submodule("base_model.model.model.language_model.layers.0.mlp.up_proj.lora_A.default")
    layer.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    return seen


@pytest.mark.parametrize(
    ("settings", "dtype", "runs"),
    [
        ({}, torch.float32, 1),
        ({"bf16": "true"}, torch.bfloat16, 1),
        ({"gradient_checkpointing": "true", "freeze_vision_encoder": "false"}, torch.float32, 2),
        ({"train_sampling_strategy": "group_by_length"}, torch.float32, 1),
    ],
)
def test_a_setting_takes_effect_and_the_loss_falls(tiny_base, demo_data, tmp_path, settings, dtype, runs):
    settings = {"learning_rate": 5e-3, "warmup_steps": 0, "eval_strategy": "no", **settings}
    trainer = make_trainer(tiny_base, demo_data, tmp_path, max_steps=12, **settings)
    seen = watch_layer(trainer)
    trainer.train()
    # LoRA's own weights stay in float32 under autocast, and without it so do its outputs
    assert len(seen) == 12 * runs
    assert set(seen) == {dtype}
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < 0.9 * losses[0]


def test_gradient_checkpointing_changes_nothing_but_the_memory(tiny_base, demo_data, tmp_path):
    plain = train(tiny_base, demo_data, tmp_path / "plain")
    recomputed = train(tiny_base, demo_data, tmp_path / "recomputed", gradient_checkpointing="true")
    for name, value in plain.items():
        torch.testing.assert_close(recomputed[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "settings",
    [pytest.param({}, marks=pytest.mark.slow), {**PACKED, "gradient_checkpointing": "true", "load_in_4bit": "true"}],
)
def test_an_embedding_in_the_hosts_memory_changes_no_weight(tiny_base, demo_data, tmp_path, settings):
    plain = train(tiny_base, demo_data, tmp_path / "plain", **settings)
    assert_same_weights(plain, train(tiny_base, demo_data, tmp_path / "host", offload_embedding="true", **settings))
    facts = [json.loads((tmp_path / name / "facts.json").read_text()) for name in ("plain", "host")]
    assert facts[0]["parameters"] == facts[1]["parameters"]


@pytest.mark.slow  # a minute of compiling
@needs_compiler
@pytest.mark.parametrize("checkpointing", ["true", "selective"])
def test_compiled_layers_learn_the_same(tiny_base, demo_data, tmp_path, checkpointing):
    settings = {**PACKED, "max_steps": 3, "lora_dropout": "0.0", "eval_strategy": "no"}
    plain = make_trainer(tiny_base, demo_data, tmp_path / "plain", **settings)
    options = {"compile_layers": "true", "gradient_checkpointing": checkpointing}
    compiled = make_trainer(tiny_base, demo_data, tmp_path / "compiled", **settings, **options)
    for trainer in (plain, compiled):
        trainer.train()
    kind = type(plain.model.get_base_model().model.language_model.layers[0])
    layers = compiled.model.get_base_model().model.language_model.layers
    assert not any(type(layer) is kind or layer.gradient_checkpointing for layer in layers)
    weights = compiled.model.state_dict()
    for name, value in plain.model.state_dict().items():
        torch.testing.assert_close(weights[name], value, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.slow  # a minute of compiling
@needs_compiler
@pytest.mark.parametrize("checkpointing", ["true", "false"])
def test_layers_compiled_with_another_attention_take_any_number_of_images(
    tiny_base, mixed_data, tmp_path, checkpointing
):
    """Samples one by one with an image or none, then an evaluation of several at once."""
    settings = {"per_device_train_batch_size": 1, "gradient_checkpointing": checkpointing, "lora_dropout": "0.0"}
    plain, compiled = (
        train(tiny_base, mixed_data, tmp_path / name, compile_layers=name, **settings) for name in ("false", "true")
    )
    for name, value in plain.items():
        torch.testing.assert_close(compiled[name], value, rtol=1e-3, atol=1e-5, msg=name)


def test_an_optimizer_in_8_bit_learns_too(tiny_base, demo_data, tmp_path):
    settings = {"learning_rate": 5e-3, "warmup_steps": 0, "eval_strategy": "no", "max_steps": 12}
    trainer = make_trainer(tiny_base, demo_data, tmp_path, optim="paged_adamw_8bit", **settings)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < 0.9 * losses[0]


def test_workers_make_the_same_batches(tiny_base, demo_data, tmp_path):
    # Workers that have read a whole epoch end at once.
    whole = {"max_steps": -1, "num_train_epochs": 1, "per_device_train_batch_size": 8}
    alone = train(tiny_base, demo_data, tmp_path / "alone", **whole)
    assert_same_weights(alone, train(tiny_base, demo_data, tmp_path / "workers", dataloader_num_workers=2, **whole))


def test_the_start_table_says_what_the_run_will_do(tiny_base, demo_data, tmp_path, capsys):
    settings = {"max_steps": -1, "num_train_epochs": 2, "gradient_accumulation_steps": 3, "eval_steps": 12}
    train(tiny_base, demo_data, tmp_path, save_steps=12, warmup_steps=12, **settings)
    out = capsys.readouterr().out
    assert "samples    32 train, 4 validation" in out
    assert "warning    warmup_steps: 12 cover all 12 steps of the run; the rate never reaches its peak" in out
    assert "of them image; the longest sample has" in out
    assert "batch      6 samples a step = 2 x 3 accumulated x 1 process(es)" in out
    assert "steps      12 (2 epochs)" in out
    assert json.loads((tmp_path / "checkpoint-12" / "trainer_state.json").read_text())["max_steps"] == 12


def test_a_push_without_a_token_ends_before_training(tiny_base, demo_data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(hub_client, "get_token", lambda: None)
    args = train_args(tiny_base, demo_data, tmp_path / "skin", push_to_hub="true")
    assert run(lambda: train_sft.main(args)) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line == "error: no token to push to skin with: log in with `hf auth login`, or set HF_TOKEN"
    assert not (tmp_path / "skin").exists()


def test_the_model_card_says_what_was_trained_on_what_and_how_far(tiny_base, demo_data, tmp_path):
    train(tiny_base, demo_data, tmp_path, lora_target_modules="q_proj")
    facts, card = json.loads((tmp_path / "facts.json").read_text()), (tmp_path / "README.md").read_text()
    assert facts["base"]["name"] == tiny_base.name
    assert {name: split["samples"] for name, split in facts["data"]["splits"].items()} == SAMPLES
    assert facts["settings"]["learning_rate"] == 1e-3
    assert facts["settings"]["max_steps"] == 4 and "num_train_epochs" not in facts["settings"]
    assert facts["settings"]["lora_target_modules"] == "q_proj"
    assert facts["parameters"]["parts"] == {"language model": facts["parameters"]["trainable"]}
    assert facts["versions"]["torch"] == torch.__version__.split("+")[0]
    done, last = facts["training"], metrics(tmp_path)
    assert (done["step"], done["steps"], done["finished"]) == (4, 4, True)
    assert done["eval_loss"] == next(row["eval_loss"] for row in reversed(last) if "eval_loss" in row)
    for said in ("not for diagnosis", f"`{facts['data']['fingerprint']}`", "| steps | 4 of 4 (0.25 epochs) |"):
        assert said in card
    for path in (tiny_base, demo_data, tmp_path):
        assert str(path) not in card + json.dumps(facts)


def test_the_card_of_the_best_adapter_names_its_step(tiny_base, demo_data, tmp_path):
    # of a falling loss, the largest is that of the first evaluation
    settings = {"load_best_model_at_end": "true", "metric_for_best_model": "loss", "greater_is_better": "true"}
    train(tiny_base, demo_data, tmp_path, max_steps=6, **settings)
    assert json.loads((tmp_path / "facts.json").read_text())["training"]["adapter_step"] == 2
    said = "| steps | 6 of 6 (0.38 epochs); the adapter is from step 2, the best in validation |"
    assert said in (tmp_path / "README.md").read_text()


ERRORS = {
    "no such data": ({"dataset_path": "/nowhere/a.json"}, "no file, no folder and no Hub data set id"),
    "data is a plain folder": ({"dataset_path": "tests"}, "is not a prepared data set"),
    "image folder without a file": ({"image_dir": "tests"}, "image_dir: goes with an annotation file"),
    "no such model": ({"model_name_or_path": "/nowhere"}, "no model in '/nowhere': no such folder"),
    "no such checkpoint": ({"resume_from_checkpoint": "/nowhere"}, "checkpoint /nowhere: no such folder"),
    "output is a file": ({"output_dir": "Makefile/x"}, "is a file, and Makefile/x cannot be in it"),
    "samples too long": ({"max_length": 20}, "train samples and 4 of 4 validation samples are over 20 tokens"),
    "limits the wrong way round": ({"max_pixels": 784}, "min_pixels 12544 is above max_pixels 784"),
    "fp16 on a CPU": ({"fp16": "true"}, "fp16: needs a GPU"),
    "no such layer": ({"lora_target_modules": "("}, "lora_target_modules: ( not among down_proj, gate_proj"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_what_a_user_can_get_wrong_ends_with_one_line_and_code_1(tiny_base, demo_data, tmp_path, capsys, case):
    settings, message = ERRORS[case]
    args = train_args(tiny_base, demo_data, tmp_path, **settings)
    assert run(lambda: train_sft.main(args)) == 1
    stderr = capsys.readouterr().err.strip().splitlines()
    assert stderr[-1].startswith("error: ") and message in stderr[-1]
    assert not any("Traceback" in line for line in stderr)


def test_a_data_set_without_validation_is_refused_unless_evaluation_is_off(tiny_base, demo_raw, tmp_path, capsys):
    records = json.loads((demo_raw / "annotations.json").read_text())[:4]
    (tmp_path / "few.json").write_text(json.dumps(records))
    settings = {"dataset_path": tmp_path / "few.json", "image_dir": demo_raw / "images"}
    args = train_args(tiny_base, None, tmp_path / "out", **settings)
    assert run(lambda: train_sft.main(args)) == 1
    assert "has no validation split; set eval_strategy: no" in capsys.readouterr().err
    assert run(lambda: train_sft.main([*args, "--eval_strategy", "no"])) == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora_r": 8}, "settings.lora_r was 4 and is 8 now; its weights do not fit"),
        ({"freeze_vision_encoder": "false", "allow_config_change": "true"}, "its weights do not fit"),
        (
            {"learning_rate": 0.5},
            "settings.learning_rate was 0.001 and is 0.5 now; undo that, or resume with --allow_",
        ),
        ({"load_in_4bit": "false"}, "settings.load_in_4bit was True and is False now; undo that"),
        ({"max_steps": 6}, "settings.max_steps was 4 and is 6 now; undo that"),
    ],
)
def test_a_run_does_not_go_on_with_other_settings(tiny_base, demo_data, tmp_path, capsys, settings, message):
    train(tiny_base, demo_data, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    args = train_args(tiny_base, demo_data, tmp_path, **settings)
    assert run(lambda: train_sft.main(args)) == 1
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_run_goes_on_with_other_settings_when_asked_to_and_says_what_changed(tiny_base, demo_data, tmp_path, capsys):
    train(tiny_base, demo_data, tmp_path)
    train(tiny_base, demo_data, tmp_path, max_steps=6, allow_config_change="true", report_to="none", save_steps=3)
    out = capsys.readouterr().out
    assert "changed: settings.max_steps was 4 and is 6 now" in out
    assert metrics(tmp_path)[-1]["step"] == 6


def test_a_run_does_not_go_on_with_other_data(tiny_base, demo_data, tmp_path, capsys):
    train(tiny_base, demo_data, tmp_path / "run")
    splits = load_splits(str(demo_data))
    splits["train"] = splits["train"].select(range(31))
    splits.save_to_disk(str(tmp_path / "fewer"))
    args = train_args(tiny_base, tmp_path / "fewer", tmp_path / "run")
    assert run(lambda: train_sft.main(args)) == 1
    assert re.search(
        r"checkpoint-4: data.their order was '\w+' and is '\w+' now; data.training samples", capsys.readouterr().err
    )


def test_auto_passes_over_a_broken_checkpoint_and_goes_on_from_the_one_before(tiny_base, demo_data, tmp_path, capsys):
    expected = train(tiny_base, demo_data, tmp_path)
    (tmp_path / "checkpoint-4" / ADAPTER).write_bytes(b"half")
    assert_same_weights(expected, train(tiny_base, demo_data, tmp_path))
    out = capsys.readouterr().out
    assert f"skipped checkpoint {tmp_path}/checkpoint-4: {ADAPTER} has 4 bytes instead of" in out
    assert f"resuming from {tmp_path}/checkpoint-2" in out


@pytest.mark.parametrize("packed", [False, True])
def test_gradients_that_are_not_finite_end_the_run_before_they_are_used(
    tiny_base, demo_data, tmp_path, capsys, packed
):
    """A weight of the base that is infinite for one token, as a damaged download would have it."""
    settings = {"max_steps": 8, "save_steps": 1, "eval_strategy": "no", **(PACKED if packed else {})}
    trainer = make_trainer(tiny_base, demo_data, tmp_path, **settings)
    spoil = SpoilAt(5)
    trainer.add_callback(spoil)
    with pytest.raises(ValueError, match="step 5: the gradients are not finite") as caught:
        trainer.train()
    [path] = tmp_path.glob("not_finite_step_*.json")
    left = json.loads(path.read_text())
    assert path.name == "not_finite_step_5_process_0.json" and left["step"] == 5 and left["gradients"]
    assert left["samples"] and all(sample["id"] in str(caught.value) for sample in left["samples"][:5])
    assert max(int(folder.name[11:]) for folder in tmp_path.glob("checkpoint-*")) == 4
    assert_finite_checkpoints(tmp_path)


class SpoilAt(TrainerCallback):
    """Makes the norm before the LM head infinite before a step, so that this step's gradients are not finite."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step - 1:
            model.get_base_model().model.language_model.norm.weight.data.fill_(float("inf"))


def assert_finite_checkpoints(out):
    for folder in out.glob("checkpoint-*"):
        assert all(value.isfinite().all() for value in load_file(folder / ADAPTER).values())


def test_weights_that_are_not_finite_are_never_saved(tiny_base, demo_data, tmp_path, capsys):
    """Steps so long that the weights overflow, while the gradients are still finite."""
    settings = {"learning_rate": 1e38, "warmup_steps": 0, "max_steps": 8, "save_steps": 1, "eval_strategy": "no"}
    args = train_args(tiny_base, demo_data, tmp_path, **settings)
    assert run(lambda: train_sft.main(args)) == 1
    assert re.search(r"step \d+: \d+ weights are not finite, the first is \S+; not saved", capsys.readouterr().err)
    assert_finite_checkpoints(tmp_path)


def test_weights_and_folds_decide_what_is_trained_on(tiny_base, demo_raw, tmp_path, capsys):
    records = json.loads((demo_raw / "annotations.json").read_text())
    rare = [record for n, record in enumerate(records) if record["label"] != "vitiligo" or n < 10]
    (tmp_path / "a.json").write_text(json.dumps(rare))
    source = Source(tmp_path / "a.json", demo_raw / "images")
    prepare([source], folds=3, balance="full", show_progress=False).splits.save_to_disk(str(tmp_path / "folds"))
    trainer = make_trainer(tiny_base, tmp_path / "folds", tmp_path / "run", fold=1)
    others = concatenate_datasets([load_splits(str(tmp_path / "folds"))[f"fold_{n}"] for n in (0, 2)])
    held, drawn = Counter(others["label"]), Counter(trainer.train_dataset["label"])
    assert held["vitiligo"] < drawn["vitiligo"]
    assert set(trainer.train_dataset["id"]) < set(others["id"])
    assert "sampled by weight: an epoch sees" in capsys.readouterr().out
    assert len(trainer.train_dataset) == len(others)
    assert trainer.eval_dataset["id"] == load_splits(str(tmp_path / "folds"))["fold_1"]["id"]


def test_a_packed_run_trains_counts_its_tokens_and_says_what_it_packs(tiny_base, demo_data, tmp_path, capsys):
    settings = {**PACKED, "max_steps": 12, "save_steps": 12, "eval_steps": 12, "learning_rate": 5e-3}
    train(tiny_base, demo_data, tmp_path, **settings)
    rows = metrics(tmp_path)
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < losses[0] and any("eval_loss" in row for row in rows)
    timed = [row for row in rows if "tokens_per_second" in row]
    assert len(timed) == len(losses) - 1  # not the first step
    assert all(row["tokens_per_second"] > 0 and row["tflops"] > 0 for row in timed)
    assert not any(name in row for row in rows for name in ("mfu", "hfu", "reserved_gb"))  # of GPUs
    work = work_of(build_without_weights(load_config(str(tiny_base)), torch.float32))
    per_token = rows[-1]["total_flos"] / next(row["num_tokens"] for row in reversed(rows) if "num_tokens" in row)
    assert per_token > 4 * work.language
    out = capsys.readouterr().out
    packs, full = re.search(r"batch +1 packs of 256 tokens \(([\d.]+)% full, ([\d.]+) samples each\)", out).groups()
    assert float(packs) > 85 and float(full) > 2
    total = int(re.search(r"tokens +([\d,]+) an epoch", out).group(1).replace(",", ""))
    epoch = next(row for row in rows if row.get("epoch") == 1.0)
    assert epoch["num_tokens"] == total


@pytest.mark.parametrize("stop", [4, 9, pytest.param(13, marks=pytest.mark.slow)])
def test_a_packed_run_that_was_stopped_ends_like_one_that_was_not(tiny_base, demo_data, tmp_path, stop):
    """In the middle of an epoch, at its end (9 packs) and in the middle of the second one; with workers."""
    settings = {**PACKED, "max_steps": 18, "save_steps": stop, "dataloader_num_workers": 2, "eval_strategy": "no"}
    settings |= {"save_total_limit": 9}
    whole = train(tiny_base, demo_data, tmp_path / "whole", **settings)
    assert math.ceil(epoch_steps(tmp_path / "whole")) == 9
    resumed = tmp_path / "resumed"
    resumed.mkdir()
    shutil.copytree(tmp_path / "whole" / f"checkpoint-{stop}", resumed / f"checkpoint-{stop}")
    assert_same_weights(whole, train(tiny_base, demo_data, resumed, **settings))
    assert curve(tmp_path / "whole") == curve(resumed)


def epoch_steps(out):
    last = metrics(out)[-1]
    return last["step"] / last["epoch"]


def test_packs_and_padded_batches_of_the_same_samples_have_the_same_gradients(tiny_base, demo_data, tmp_path):
    packed = make_trainer(tiny_base, demo_data, tmp_path, **PACKED)
    padded = make_trainer(tiny_base, demo_data, tmp_path, per_device_train_batch_size=1)
    samples = [packed.train_dataset[n] for n in next(iter(packed.get_train_dataloader().batch_sampler))]
    assert len(samples) > 2
    gradients = []
    for trainer in (packed, padded):
        loss = trainer.compute_loss(trainer.model, trainer.data_collator(samples))
        loss.backward()
        gradients.append([loss, *(p.grad for p in trainer.model.parameters() if p.grad is not None)])
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*gradients, strict=True))
