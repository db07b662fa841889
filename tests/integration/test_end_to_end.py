"""Commands as real processes: started, killed, resumed; and the one line of an error."""

import signal
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from helpers.runs import train_args

ACCELERATE = [str(Path(sys.executable).with_name("accelerate")), "launch"]


def test_a_killed_run_resumes_by_itself_and_ends_with_the_same_weights(fork_server, tiny_base, demo_data, tmp_path):
    settings = {"max_steps": 40, "save_steps": 10, "eval_steps": 10, "logging_steps": 5}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert fork_server.run("train_sft", train_args(tiny_base, demo_data, whole, **settings))[0] == [0]
    args = train_args(tiny_base, demo_data, killed, **settings)
    process = fork_server.start("train_sft", args)
    process.wait_until((killed / "checkpoint-20" / "trainer_state.json").exists)
    process.signal_group(signal.SIGKILL)
    assert process.wait() == [-signal.SIGKILL]
    assert not (killed / "adapter_model.safetensors").exists()
    assert len((killed / "metrics.jsonl").read_text().splitlines()) >= 5
    codes, [text] = fork_server.run("train_sft", args)
    assert codes == [0] and f"resuming from {killed}/checkpoint-" in text
    left, right = (load_file(out / "adapter_model.safetensors") for out in (whole, killed))
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_an_error_is_one_line_and_the_launcher_can_be_told_to_add_nothing(tiny_base, tmp_path):
    words = train_args(tiny_base, tmp_path / "nothing.json", tmp_path / "run")
    command = [*ACCELERATE, "--quiet", "--num_processes", "1", "train_sft.py", *map(str, words)]
    launched = subprocess.run(command, capture_output=True, text=True)
    assert launched.returncode == 1
    loading, line = [line for line in launched.stderr.splitlines() if line.startswith(("train_sft.py", "error"))]
    assert loading.startswith("train_sft.py: loading libraries")
    assert line.startswith("error: no data at ") and "nothing.json" in line
    assert "Traceback" not in launched.stderr
