"""The benchmarks of whole training steps run: the same code, small, on a CPU."""

import json
import subprocess
import sys

from benchmarks import train_step


def test_the_gpu_benchmark_measures_every_setting_on_a_tiny_model(tmp_path):
    out = tmp_path / "figures.json"
    command = [sys.executable, "-m", "benchmarks.gpu_7b", "--tiny", "--steps", "4", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    figures = json.loads(out.read_text())
    assert len(figures["rows"]) == 9 and all(row["tokens_per_second"] > 0 for row in figures["rows"])
    assert figures["agreement"]["packed, varlen"]["loss"] < 1e-5
    assert figures["agreement"]["packed, varlen"]["gradient"] < 1e-4
    assert "stock TRL, batch 1 x 4" in done.stdout.splitlines()[-9]


def test_the_benchmark_of_training_steps_gives_each_side_every_sample_once(capsys):
    found = train_step.main(["--tiny", "--rounds", "1"])
    assert list(found) == ["256-512 tokens an image", "about 110 tokens an image"]
    for paces in found.values():
        assert all(len(rounds) == 1 and rounds[0].seconds > 0 for rounds in paces.values())
        assert [rounds[0].samples for rounds in paces.values()] == [24, 24, 24]
        assert len({rounds[0].supervised for rounds in paces.values()}) == 1
        assert paces["ours"][0].total == paces["stock TRL"][0].total
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[-3:]] == ["ours", "stock TRL", "plain loop"]
    assert lines[-3].endswith(" 1.00")
