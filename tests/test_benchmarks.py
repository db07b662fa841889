"""The GPU benchmark's code runs: the same one, small, on a CPU."""

import json
import subprocess
import sys


def test_the_gpu_benchmark_measures_every_setting_on_a_tiny_model(tmp_path):
    out = tmp_path / "figures.json"
    command = [sys.executable, "-m", "benchmarks.gpu_7b", "--tiny", "--steps", "4", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    figures = json.loads(out.read_text())
    assert len(figures["rows"]) == 8 and all(row["tokens_per_second"] > 0 for row in figures["rows"])
    assert figures["agreement"]["packed, varlen"]["loss"] < 1e-5
    assert figures["agreement"]["packed, varlen"]["gradient"] < 1e-4
    assert "stock TRL, batch 1 x 4" in done.stdout.splitlines()[-8]
