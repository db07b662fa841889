"""Runs that are killed, stopped or out of disk space: do they end with the bytes of an undisturbed run?

    python -m benchmarks.reliability            # under 20 minutes on two cores
    python -m benchmarks.reliability --quick    # a few of each, in two minutes

A tiny Qwen2.5-VL with random weights is trained by `train_sft.py`'s own main in child processes, which are really
killed. The reference is the same run, undisturbed. One line for each check: how many of how many cases passed.
"""

import argparse
import os
import platform
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

from common.cli import run

import train_sft
from common.files import ADAPTER_WEIGHTS, read_json_lines
from data_prep import prepare_dataset
from demo.draw import write_demo
from demo.tiny_model import save_tiny_model
from training.checkpoints import MANIFEST, list_checkpoints, read_manifest

COMPARED = ("step", "loss", "grad_norm", "learning_rate", "num_tokens")
PACKED = {
    "packing": "true", "pack_tokens": 256, "max_length": 256, "attn_implementation": "varlen",
    "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1,
}  # fmt: skip
# 32 samples in batches of 2: 16 batches an epoch, which 3 does not divide; 10 or 11 packs.
SETTINGS = {
    "config": "configs/demo.yaml", "max_steps": 24, "save_steps": 4, "save_total_limit": 3, "logging_steps": 1,
    "eval_strategy": "no", "per_device_train_batch_size": 2, "lora_r": 4, "lora_dropout": 0.1, "disable_tqdm": "true",
}  # fmt: skip
# The n-th audit event of Python with this name, for a file of this name in a checkpoint.
POINTS = {
    "the adapter is written": ("open", "adapter_config.json"),
    "the processor is being written": ("open", "processor_config.json"),
    "all but the trainer's state is written": ("open", "trainer_state.json"),
    "everything is written, not yet sealed": ("open", f"{MANIFEST}.unfinished"),
    "the seal is about to appear": ("os.rename", f"{MANIFEST}.unfinished"),
    "an old checkpoint is being deleted": ("shutil.rmtree", "checkpoint-"),
}


def child(work: Callable[[], int | None], log: Path, setup: Callable[[], None] | None = None) -> int:
    """Start `work` in a process of its own and return the process's number; its output goes to `log`."""
    if number := os.fork():
        return number
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ["OMP_NUM_THREADS"] = "1"
    code = 1
    try:
        if setup is not None:
            setup()
        code = run(work)
        sys.stdout.flush()
    finally:
        os._exit(code)  # whatever happens, the child never continues as its parent


def wait(number: int) -> int:
    """Return the exit code of a child, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])


class Workspace:
    """A folder with a base model, data, and the runs that use them."""

    def __init__(self, folder: Path):
        self.folder = folder

    def prepare(self) -> None:
        write_demo(self.folder / "raw", count=40)
        save_tiny_model(
            self.folder / "base", ["What condition is shown? This is melanoma."], hidden_size=64, num_layers=2
        )
        raw = self.folder / "raw"
        splits = prepare_dataset(raw / "annotations.json", raw / "images", show_progress=False)
        splits.save_to_disk(str(self.folder / "data"))

    def start(self, name: str, setup: Callable[[], None] | None = None, **settings) -> int:
        paths = {"model_name_or_path": "base", "dataset_path": "data", "output_dir": name}
        options = {**SETTINGS, **settings, **{key: self.folder / path for key, path in paths.items()}}
        arguments = [word for key, value in options.items() for word in (f"--{key}", str(value))]
        return child(lambda: train_sft.main(arguments), self.folder / f"{name}.log", setup)

    def train(self, name: str, setup: Callable[[], None] | None = None, **settings) -> int:
        return wait(self.start(name, setup, **settings))

    def reference(self, **settings) -> str:
        """Return the name of an undisturbed run."""
        name = "reference-" + "-".join(str(value) for value in settings.values())
        if not (self.folder / name).exists() and self.train(name, **settings):
            raise RuntimeError((self.folder / f"{name}.log").read_text())
        return name

    def same(self, name: str, other: str) -> bool:
        """Return whether two runs ended with the same adapter and the same curves."""
        return all(
            self.content(name, file) == self.content(other, file) is not None
            for file in (ADAPTER_WEIGHTS, "metrics.jsonl")
        )

    def content(self, name: str, file: str) -> list | bytes | None:
        path = self.folder / name / file
        if not path.is_file():
            return None
        if file == ADAPTER_WEIGHTS:
            return path.read_bytes()
        rows = read_json_lines(path)
        # without the summary, which has times
        return [[row[key] for key in COMPARED] for row in rows if "loss" in row]


def exact_resume(workspace: Workspace, quick: bool) -> tuple[int, int]:
    """Stop in the middle of an epoch, at its end, and with accumulation over an uneven last batch."""
    passed, cases = 0, []
    for base in ({}, {"load_in_4bit": "false"}):
        for form in ({}, PACKED):
            cases += [
                (4, {**base, **form, "dataloader_num_workers": 2}),
                (16 if not form else 10, {**base, **form, "save_steps": 16 if not form else 10}),
                (4, {**base, **form, "gradient_accumulation_steps": 3, "max_steps": 12, "save_steps": 2}),
            ]
    cases = cases[::4] if quick else cases
    for number, (stop, settings) in enumerate(cases):
        settings = {**settings, "save_total_limit": 20}
        reference, name = workspace.reference(**settings), f"resumed-{number}"
        (workspace.folder / name).mkdir()
        shutil.copytree(
            workspace.folder / reference / f"checkpoint-{stop}", workspace.folder / name / f"checkpoint-{stop}"
        )
        passed += workspace.train(name, **settings) == 0 and workspace.same(name, reference)
    return passed, len(cases)


def kill_at(event: str, name: str, after: int) -> Callable[[], None]:
    """Return a function that has a child killed at the n-th audit event of this name for a file."""

    def watch() -> None:
        remaining = [after]

        def hook(current: str, arguments: tuple) -> None:
            if current == event and name in str(arguments[0]) and "checkpoint-" in str(arguments[0]):
                remaining[0] -= 1
                if not remaining[0]:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)

    return watch


def killed_in_a_save(workspace: Workspace, quick: bool) -> tuple[int, int]:
    reference, passed = workspace.reference(), 0
    points = list(POINTS.items())[:: 2 if quick else 1]
    for number, (_, (event, file)) in enumerate(points):
        name = f"point-{number}"
        killed = workspace.train(name, kill_at(event, file, 1 if event == "shutil.rmtree" else 3))
        passed += killed == -signal.SIGKILL and workspace.train(name) == 0 and workspace.same(name, reference)
    return passed, len(points)


def killed_at_random(workspace: Workspace, quick: bool) -> tuple[int, int]:
    """Kill a run at random instants until it finishes, and check that no kill cost more than `save_steps` steps."""
    reference, rng, passed, kills, wanted = workspace.reference(), random.Random(0), 0, 0, 5 if quick else 50
    start = time.monotonic()
    workspace.train("timed")
    run_seconds, number = time.monotonic() - start, 0
    while kills < wanted:
        name, number = f"random-{number}", number + 1
        for _ in range(5):
            process = workspace.start(name)
            time.sleep(rng.uniform(0.3, 1) * run_seconds)
            os.kill(process, signal.SIGKILL)
            if wait(process) == 0:
                break
            kills += 1
            passed += lost_steps(workspace.folder / name) <= SETTINGS["save_steps"]
        if workspace.train(name) != 0 or not workspace.same(name, reference):
            passed = -1_000_000
    return passed, kills


def lost_steps(output_dir: Path) -> int:
    """Return how many steps were done after the newest complete checkpoint."""
    metrics = output_dir / "metrics.jsonl"
    done = max(map(int, re.findall(r'"step": (\d+)}', metrics.read_text())), default=0) if metrics.exists() else 0
    for path in list_checkpoints(output_dir):
        try:
            return max(0, done - read_manifest(path)["step"])
        except ValueError:
            continue
    return done


def full_disk(workspace: Workspace, quick: bool) -> tuple[int, int]:
    """Let every file above a size fail to be written, for sizes below each file of a checkpoint."""
    reference, passed = workspace.reference(), 0
    files = sorted({file.stat().st_size for file in list_checkpoints(workspace.folder / reference)[0].iterdir()})
    sizes = files[:: 4 if quick else 1]
    for number, size in enumerate(sizes):
        name = f"disk-{number}"
        code = workspace.train(name, lambda size=size: small_disk(size - 1))
        complete = [path for path in list_checkpoints(workspace.folder / name) if (path / MANIFEST).exists()]
        [read_manifest(path) for path in complete]  # raises if a sealed one is damaged
        # a run can finish although its last checkpoint could not be written, which it says by code 1
        if code != 0 and not (workspace.folder / name / ADAPTER_WEIGHTS).exists():
            workspace.train(name)
        passed += workspace.same(name, reference)
    return passed, len(sizes)


def small_disk(size: int) -> None:
    """Let this process write no file above `size` bytes, except its log."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def one_of_two(workspace: Workspace, quick: bool) -> tuple[int, int]:
    """Signal one of two processes to stop, at a random step: both save and end within 30 s."""
    rng, passed, tries = random.Random(2), 0, 3 if quick else 10
    for number in range(tries):
        name = f"ranks-{number}"
        ranks = [workspace.start(name, rank(r, port=29600 + number), max_steps=400, save_steps=400) for r in range(2)]
        time.sleep(rng.uniform(6, 12))
        os.kill(rng.choice(ranks), signal.SIGTERM)
        start = time.monotonic()
        codes = [wait(process) for process in ranks]
        [saved] = list_checkpoints(workspace.folder / name) or [None]
        passed += (
            codes == [75, 75] and time.monotonic() - start < 30 and saved is not None and bool(read_manifest(saved))
        )
    return passed, tries


def rank(number: int, port: int) -> Callable[[], None]:
    """Return a function that makes a child one of two processes that train together."""
    variables = {
        "RANK": number,
        "LOCAL_RANK": number,
        "WORLD_SIZE": 2,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    return lambda: os.environ.update({key: str(value) for key, value in variables.items()})


def soak(workspace: Workspace, quick: bool) -> tuple[int, int]:
    """Many steps with many kills: the same bytes, and at most 5 % more memory than the undisturbed run."""
    steps, kills = (100, 2) if quick else (1000, 20)
    settings, rng = {"max_steps": steps, "save_steps": 10}, random.Random(1)
    start = time.monotonic()
    reference = workspace.reference(**settings)
    run_seconds, reference_memory = time.monotonic() - start, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    for _ in range(kills):
        process = workspace.start("soak", **settings)
        time.sleep(min(6, run_seconds / kills) + rng.uniform(2, 3))
        os.kill(process, signal.SIGKILL)
        wait(process)
    code = workspace.train("soak", **settings)
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / reference_memory
    print(f"  {steps} steps, {kills} kills: memory {memory:.3f} times that of the undisturbed run")
    return int(code == 0 and workspace.same("soak", reference) and memory <= 1.05), 1


CHECKS = {
    "stopped and resumed: the same bytes and curves": exact_resume,
    "killed at a named point of a save: the same bytes": killed_in_a_save,
    "killed at a random instant: same bytes, at most save_steps lost": killed_at_random,
    "a disk that is full at each file: the next start recovers": full_disk,
    "one of two processes signalled: both save and end with 75": one_of_two,
    "soak with kills: the same bytes, no more memory": soak,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few of each")
    parser.add_argument("--only", help="checks whose name contains this")
    args = parser.parse_args()
    print(f"{date.today()}, {platform.machine()}, {os.cpu_count()} cores", flush=True)
    failed = 0
    with tempfile.TemporaryDirectory() as name:
        workspace = Workspace(Path(name))
        wait(child(workspace.prepare, workspace.folder / "prepare.log"))
        for title, check in CHECKS.items():
            if args.only is None or args.only in title:
                start = time.monotonic()
                passed, count = check(workspace, args.quick)
                failed += passed != count
                print(f"{title}: {passed} of {count} ({time.monotonic() - start:.0f} s)", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
