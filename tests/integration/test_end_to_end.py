"""The commands that a user types, as real processes: started, killed, resumed, and asked."""

import signal
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from helpers.runs import train_args

ACCELERATE = [str(Path(sys.executable).with_name("accelerate")), "launch"]


def train_command(*args, **settings):
    return [*ACCELERATE, "train_sft.py", *train_args(*args, **settings)]


def call(*command):
    return subprocess.run([str(word) for word in command], capture_output=True, text=True)


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
    assert (killed / "training_metrics.png").exists()
    assert len((killed / "metrics.jsonl").read_text().splitlines()) >= 5
    codes, [text] = fork_server.run("train_sft", args)
    assert codes == [0] and f"resuming from {killed}/checkpoint-" in text
    left, right = (load_file(out / "adapter_model.safetensors") for out in (whole, killed))
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_the_main_job_from_annotations_to_an_answer(tiny_base, demo_raw, tmp_path):
    data, out = tmp_path / "data", tmp_path / "run"
    convert = ["convert", "--annotations", demo_raw / "annotations.json", "--images", demo_raw / "images"]
    assert call(sys.executable, "-m", "data_prep", *convert, "--out", data).returncode == 0
    assert call(*train_command(tiny_base, data, out)).returncode == 0
    question = ["--image", demo_raw / "images" / "0001.jpg", "--question", "What condition is shown?"]
    answered = call(sys.executable, "predict.py", "--adapter", out, *question, "--max-new-tokens", "4")
    assert answered.returncode == 0, answered.stderr
    assert len(answered.stdout.splitlines()) == 1


def test_an_error_is_one_line_and_the_launcher_can_be_told_to_add_nothing(tiny_base, demo_data, tmp_path):
    direct = call(sys.executable, "train_sft.py", *train_args(tiny_base, tmp_path / "nothing.json", tmp_path / "run"))
    assert direct.returncode == 1
    loading, line = direct.stderr.splitlines()
    assert loading.startswith("train_sft.py: loading libraries")
    assert line.startswith("error: no data at ") and "nothing.json" in line
    script, *args = train_command(tiny_base, tmp_path / "nothing.json", tmp_path / "run")[2:]
    launched = call(*ACCELERATE, "--quiet", "--num_processes", "1", script, *args)
    assert launched.returncode == 1
    assert line in launched.stderr.splitlines()
    assert "Traceback" not in launched.stderr
