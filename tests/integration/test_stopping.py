"""Runs that are asked to stop: real processes, really signalled, in the ways that people launch them."""

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from helpers.runs import train_args
from training import signals
from training.checkpoints import read_manifest
from training.signals import EXIT_CODE, StopCallback, shield_workers, terminate_with_launcher

BIN = Path(sys.executable).parent
ADAPTER = "adapter_model.safetensors"
SETTINGS = {"max_steps": 48, "save_steps": 40, "eval_strategy": "no", "lora_dropout": 0.1, "dataloader_num_workers": 2}
LAUNCHERS = {
    "accelerate with one process": [str(BIN / "accelerate"), "launch", "--num_processes", "1"],
    "accelerate with two processes": [str(BIN / "accelerate"), "launch", "--multi_gpu", "--num_processes", "2"],
    "torchrun with two processes": [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"],
}


def start(launcher, base, data, out, **settings):
    command = [*LAUNCHERS[launcher], "train_sft.py", *train_args(base, data, out, **{**SETTINGS, **settings})]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env=environment, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_for_step(out, step, process):
    """Return when the run has logged a step."""
    deadline = time.monotonic() + 120
    path = Path(out) / "metrics.jsonl"
    while not (path.exists() and f'"step": {step}}}' in path.read_text()):
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def last_step(out):
    return max(int(step) for step in re.findall(r'"step": (\d+)}', (Path(out) / "metrics.jsonl").read_text()))


def processes_of(out):
    """Return the processes whose command line names the run's folder, and that have not ended."""
    left = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            command, state = (path / "cmdline").read_bytes(), (path / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if str(out).encode() in command and state != "Z":
            left.append(path.name)
    return left


def assert_nothing_left(left, *args):
    """Give the launcher's children a moment, as a killed launcher does not wait for them."""
    deadline = time.monotonic() + 30
    while left(*args):
        assert time.monotonic() < deadline, "processes are still there"
        time.sleep(0.1)


def assert_saved_at_once(out, seen, text):
    """Check that the one checkpoint is of the step that ran when the signal came, and return it."""
    [saved] = out.glob("checkpoint-*")
    step = read_manifest(saved)["step"]
    assert seen <= step <= last_step(out) + 1 and step < SETTINGS["save_steps"], text
    assert not (out / ADAPTER).exists()
    return saved


@pytest.mark.parametrize(
    "launcher",
    [name if "accelerate with two" in name else pytest.param(name, marks=pytest.mark.slow) for name in LAUNCHERS],
)
def test_sigterm_to_a_launcher_saves_within_a_step(tiny_base, demo_data, tmp_path, launcher):
    out = tmp_path / "run"
    process = start(launcher, tiny_base, demo_data, out)
    wait_for_step(out, 5, process)
    seen, sent = last_step(out), time.monotonic()
    process.terminate()
    text = process.communicate()[0]
    assert_nothing_left(processes_of, out)
    assert time.monotonic() - sent < 30
    if launcher == "accelerate with two processes":
        assert process.returncode == 1, text  # the launcher's own, whatever its processes end with
    assert_saved_at_once(out, seen, text)


def test_sigterm_to_all_processes_saves_within_a_step_and_the_same_command_resumes(
    fork_server, tiny_base, demo_data, tmp_path
):
    """As a terminal, Slurm and `timeout` send it: the workers get it too."""
    out = tmp_path / "run"
    args = train_args(tiny_base, demo_data, out, **SETTINGS)
    process = fork_server.start("train_sft", args)
    process.wait_until(lambda: (out / "metrics.jsonl").exists() and last_step(out) >= 5)
    seen, sent = last_step(out), time.monotonic()
    process.signal_group(signal.SIGTERM)
    assert process.wait() == [EXIT_CODE]
    assert_nothing_left(process.left)
    assert time.monotonic() - sent < 30
    [text] = process.texts()
    assert "SIGTERM: stopping after this step" in text
    assert f"stopped by SIGTERM at step {last_step(out)}; the same command resumes from checkpoint-" in text
    saved = assert_saved_at_once(out, seen, text)
    codes, [text] = fork_server.run("train_sft", args)
    assert codes == [0] and f"resuming from {saved}" in text
    whole = train_args(tiny_base, demo_data, tmp_path / "whole", **SETTINGS)
    assert fork_server.run("train_sft", whole)[0] == [0]
    left, right = (load_file(folder / ADAPTER) for folder in (out, tmp_path / "whole"))
    assert all(torch.equal(left[name], right[name]) for name in left)


def wait_for_end(process, seconds):
    deadline = time.monotonic() + seconds
    while Path(f"/proc/{process}/cmdline").exists() and Path(f"/proc/{process}/cmdline").read_bytes():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def test_a_worker_survives_the_signals_of_others_and_not_its_trainers():
    """A trainer that ends with batches still on their way terminates its workers, and waits for them."""
    loader = Accelerator(cpu=True).prepare(DataLoader(range(64), batch_size=2, num_workers=1))
    others = set(multiprocessing.active_children())  # of earlier tests in this process
    batches = iter(shield_workers(loader))
    assert next(batches).tolist() == [0, 1]
    [worker] = set(multiprocessing.active_children()) - others
    subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)
    assert not wait_for_end(worker.pid, 1)
    assert [next(batches).tolist() for _ in range(20)][-1] == [40, 41]
    worker.terminate()
    assert wait_for_end(worker.pid, 5)


def start_threads_and_shield(ready):
    for _ in range(4):
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
    signals._start_shielded(0, trainer=os.getppid(), init=None)
    ready.set()
    time.sleep(60)


def test_a_worker_in_which_a_library_has_started_threads_survives_too():
    """Linux gives a signal to any thread that does not block it."""
    fork = multiprocessing.get_context("fork")
    ready = fork.Event()
    worker = fork.Process(target=start_threads_and_shield, args=(ready,))
    worker.start()
    try:
        assert ready.wait(10)
        for _ in range(3):
            subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)
        assert not wait_for_end(worker.pid, 1.5)
        worker.terminate()  # as a trainer does; which thread gets it, and so whether its sender is seen, is open
        assert wait_for_end(worker.pid, 5)
    finally:
        worker.kill()
        worker.join()


def test_a_second_signal_ends_at_once(monkeypatch):
    stop, clock, killed = StopCallback(), [100.0], []
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(os, "kill", lambda process, number: killed.append((process, number)))
    before = signal.getsignal(signal.SIGINT)
    try:
        stop._receive(signal.SIGINT, None)
        clock[0] += 0.5  # a launcher forwards the same signal
        stop._receive(signal.SIGTERM, None)
        assert stop.signal == "SIGINT" and not killed
        clock[0] += 1
        stop._receive(signal.SIGINT, None)
        assert killed == [(os.getpid(), signal.SIGINT)]
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("parent", [0, 2**31 - 1])
def test_a_parent_outside_of_the_container_is_no_launcher(monkeypatch, parent):
    monkeypatch.setattr(os, "getppid", lambda: parent)
    terminate_with_launcher()
