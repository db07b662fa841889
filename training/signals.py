"""Stopping when asked to: SIGTERM and SIGINT end a run after the step that it is in, with a checkpoint."""

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from threading import Thread

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch.utils.data import DataLoader
from transformers import TrainerCallback

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: start the same command again
SIGNALS = (signal.SIGTERM, signal.SIGINT)
SAME_STOP = 1.0  # s; a launcher that passes a signal on sends it twice
LAST_STEP = 30  # s; how long launchers wait for a process that they have asked to stop
PARENT_DIED = 1  # PR_SET_PDEATHSIG of linux/prctl.h


class StopCallback(TrainerCallback):
    """Save, and end training, after the step in which any process was asked to stop. A second signal ends at once.

    Attributes:
        signal: name of the signal that this process or another one got; None when the run was not stopped.
    """

    def __init__(self):
        self.signal, self.asked_at, self.before = None, None, {}

    def on_train_begin(self, args, state, control, **kwargs):
        self.before = {number: signal.signal(number, self._ask) for number in SIGNALS}
        die_with_launcher()

    def on_train_end(self, args, state, control, **kwargs):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _ask(self, number, frame):
        if self.asked_at is None:
            self.signal, self.asked_at = signal.Signals(number).name, time.monotonic()
            print(f"{self.signal}: stopping after this step", file=sys.stderr, flush=True)
        elif time.monotonic() - self.asked_at > SAME_STOP:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def on_step_end(self, args, state, control, **kwargs):
        asked = torch.tensor(float(self.asked_at is not None), device=args.device)
        if reduce(asked, "sum") > 0:  # one process that was asked stops all
            self.signal = self.signal or "a signal to another process"
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False


def die_with_launcher() -> None:
    """Have Linux send SIGTERM when `accelerate launch` dies: with one process, it does not pass a signal on itself."""
    parent = Path(f"/proc/{os.getppid()}/cmdline")
    if sys.platform == "linux" and b"accelerate" in parent.read_bytes():
        ctypes.CDLL(None).prctl(PARENT_DIED, signal.SIGTERM)


def shield_workers(loader: DataLoader) -> DataLoader:
    """Let the workers of a loader that accelerate has prepared outlive a signal for a while: one to the whole group of
    processes must not take away the batches that the last step still needs."""
    if sys.platform == "linux" and loader.num_workers:
        start = partial(_start_shielded, trainer=os.getpid(), before=loader.worker_init_fn)
        # It iterates over the loader within; the copy that skips batches on resume is made from the one without.
        loader.worker_init_fn = loader.base_dataloader.worker_init_fn = start
    return loader


def _start_shielded(worker: int, *, trainer: int, before: Callable[[int], None] | None) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # for the thread that waits for them
    Thread(target=_outlive, args=(trainer,), daemon=True).start()
    if before is not None:
        before(worker)


def _outlive(trainer: int) -> None:
    """End this worker at once when its trainer asks for it, as it does when it ends, and later when others do."""
    while signal.sigwaitinfo(SIGNALS).si_pid != trainer:
        signal.alarm(LAST_STEP)
    os._exit(0)


def end_early(stop: StopCallback, step: int) -> int:
    """Say how to go on, once for all processes, and return the exit code."""
    if PartialState().is_main_process:
        print(f"stopped by {stop.signal} at step {step}; the same command resumes from checkpoint-{step}", flush=True)
    return EXIT_CODE
