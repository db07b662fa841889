"""The benchmarks of whole training steps run: the same code, small, on a CPU."""

import json

import pytest
import torch

from benchmarks import first_answer, gpu_7b, gpu_answers, gpu_fsdp, gpu_peers, train_step
from benchmarks.peers.measure import note_held


@pytest.mark.slow
def test_the_gpu_benchmark_measures_every_setting_on_a_tiny_model(tmp_path, capsys):
    out = tmp_path / "results.json"
    gpu_7b.main(["--tiny", "--steps", "4", "--out", str(out)])
    results = json.loads(out.read_text())["models"]["Qwen2.5-VL-7B"]
    assert len(results["rows"]) == 9 and all(row["tokens_per_second"] > 0 for row in results["rows"])
    assert results["agreement"]["packed, varlen"]["loss"] < 1e-5
    assert results["agreement"]["packed, varlen"]["gradient"] < 1e-4
    assert "stock TRL, batch 1 x 4" in capsys.readouterr().out.splitlines()[-10]


@pytest.mark.parametrize(
    ("shapes", "setting"),
    [
        pytest.param("Qwen3-VL-8B", "without packing", marks=pytest.mark.slow),
        pytest.param("Qwen3.5-9B", "without packing", marks=pytest.mark.slow),
        ("Qwen3-VL-30B-A3B", "LoRA on experts"),
    ],
)
def test_the_gpu_benchmark_takes_other_shapes(shapes, setting, tmp_path):
    out = tmp_path / "results.json"
    gpu_7b.main(["--tiny", "--steps", "4", "--out", str(out), "--shapes", shapes, "--only", setting])
    [row] = json.loads(out.read_text())["models"][shapes]["rows"]
    assert row["flops"] > row["useful_flops"] > 0


def test_the_benchmark_of_answers_counts_all_runs_and_times_their_parts(tmp_path):
    out = tmp_path / "answers.json"
    gpu_answers.main(["--tiny", "--batch-size", "8", "--max-new-tokens", "4", "--out", str(out)])
    result = json.loads(out.read_text())
    assert (result["answers"], result["batch"], result["graphs"]) == (36, 8, 0)
    parts = result["parts_seconds"]
    assert set(parts) == {"image decoding", "patches and tower", "tokens", "prefill", "scoring", "decoding"}
    assert result["answers_per_second"] == pytest.approx(36 / result["seconds"][0], rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--compile"]])
def test_the_benchmark_of_several_gpus_finds_the_same_losses_in_all_parts(tmp_path, options):
    gpu_fsdp.main(["--tiny", "--steps", "4", "--out", str(tmp_path / "results.json"), *options])
    one, ddp, sharded = json.loads((tmp_path / "results.json").read_text())
    assert one["losses"] == pytest.approx(ddp["losses"], abs=1e-4)
    assert one["losses"] == pytest.approx(sharded["losses"], abs=1e-4)


@pytest.mark.slow
def test_the_first_answer_is_timed_from_the_start_of_the_command(tmp_path):
    result = first_answer.measure("Qwen2.5-VL-7B", tmp_path, tiny=True)
    stages = result["first_answer_stages"]
    assert set(stages) == {"imports", "base and adapter", "processor", "answer"} and stages["imports"] > 0
    assert len(result["first_answer_seconds"]) == 2 and min(result["first_answer_seconds"]) > 1
    assert not list(tmp_path.iterdir())


def test_the_gpu_benchmark_names_unknown_shapes():
    with pytest.raises(ValueError, match="--shapes: unknown Qwen9-VL-1B"):
        gpu_7b.main(["--tiny", "--shapes", "Qwen9-VL-1B"])


@pytest.mark.slow
def test_the_benchmark_of_training_steps_gives_each_side_every_sample_once(capsys):
    results = train_step.main(["--tiny", "--rounds", "1"])
    assert list(results) == ["256-512 tokens an image", "about 110 tokens an image"]
    for sides in results.values():
        assert all(len(rounds) == 1 and rounds[0].seconds > 0 for rounds in sides.values())
        assert [rounds[0].samples for rounds in sides.values()] == [24, 24, 24]
        assert len({rounds[0].supervised for rounds in sides.values()}) == 1
        assert sides["ours"][0].total == sides["stock TRL"][0].total
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[-3:]] == ["ours", "stock TRL", "plain loop"]
    assert lines[-3].endswith(" 1.00")


def test_what_a_forward_pass_leaves_on_the_gpu_is_noted(monkeypatch):
    allocated = iter([1000, 1600, 900, 950])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: next(allocated))
    model = torch.nn.Linear(2, 2)
    held = note_held(model)
    model(model(torch.ones(2)))
    assert held == [600, 50]


@pytest.mark.slow
def test_the_benchmark_of_peers_says_what_did_not_run(capsys):
    """Stock TRL runs in a process of its own, from files; Unsloth's packages are not here."""
    results = gpu_peers.main(["--tiny", "--only", "unsloth", "batch 4"])
    assert results["trl, flash attention 2, batch 4"]["tokens_per_second"] > 0
    assert "unsloth" in results["unsloth, batch 16"]["error"]
    assert "did not run" in capsys.readouterr().out.splitlines()[-2]
