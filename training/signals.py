"""SIGTERM and SIGINT end a run after the current step, with a checkpoint."""

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from threading import Thread

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from training.checkpoints import describe_restart
from training.settings import Settings

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: start the same command again
MARKER = "UNSAVED_MARKER"  # names a file to make when a stop could not save; launchers hide the exit code
SIGNALS = (signal.SIGTERM, signal.SIGINT)
REPEAT_WINDOW = 1.0  # s; a launcher that forwards a signal sends it twice
GRACE_PERIOD = 30  # s; how long launchers wait for a process after a signal
PARENT_DIED = 1  # PR_SET_PDEATHSIG of linux/prctl.h


class StopCallback(TrainerCallback):
    """Save, and end training, after the step in which any process got a signal. A second signal ends at once.

    Attributes:
        signal: name of the signal that this process or another one got; None without one.
    """

    def __init__(self):
        self.signal, self.received_at, self.handlers = None, None, {}

    def on_train_begin(self, args, state, control, **kwargs):
        self.handlers = {number: signal.signal(number, self._receive) for number in SIGNALS}
        terminate_with_launcher()

    def on_train_end(self, args, state, control, **kwargs):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def _receive(self, number, frame):
        if self.received_at is None:
            self.signal, self.received_at = signal.Signals(number).name, time.monotonic()
            print(f"{self.signal}: stopping after this step", file=sys.stderr, flush=True)
        elif time.monotonic() - self.received_at > REPEAT_WINDOW:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def on_step_end(self, args, state, control, **kwargs):
        received = torch.tensor(float(self.received_at is not None), device=args.device)
        if reduce(received, "sum") > 0:  # a signal to one process stops all
            self.signal = self.signal or "a signal to another process"
            control.should_log = control.should_save = control.should_training_stop = True
            control.should_evaluate = False


def terminate_with_launcher() -> None:
    """Have Linux send SIGTERM when `accelerate launch` dies: with one process, it does not forward a signal itself."""
    with suppress(OSError):  # a parent outside of this container has no entry
        if sys.platform == "linux" and b"accelerate" in Path(f"/proc/{os.getppid()}/cmdline").read_bytes():
            ctypes.CDLL(None).prctl(PARENT_DIED, signal.SIGTERM)


def shield_workers(loader: DataLoader) -> DataLoader:
    """Let the workers of a loader that accelerate has prepared survive a signal for `GRACE_PERIOD`: one to the whole
    process group must not end the workers whose batches the last step still needs."""
    if sys.platform == "linux" and loader.num_workers:
        start = partial(_start_shielded, trainer=os.getpid(), init=loader.worker_init_fn)
        # It iterates over the loader within; the copy that skips batches on resume is made from the one without.
        loader.worker_init_fn = loader.base_dataloader.worker_init_fn = start
    return loader


def _start_shielded(worker: int, *, trainer: int, init: Callable[[int], None] | None) -> None:
    received = []  # when signals of others came

    def on_signal() -> None:
        if received and time.monotonic() - received[0] > REPEAT_WINDOW:
            os._exit(0)  # as a second signal ends the trainer
        received.append(time.monotonic())
        signal.alarm(GRACE_PERIOD)

    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    # Where a library has started threads before, one of these may get it: the sender is unknown then, and Python calls
    # its handler only when the main thread wakes, but writes to a pipe at once.
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    signal.set_wakeup_fd(write_end)
    for number in SIGNALS:
        signal.signal(number, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # for the thread that waits for them
    Thread(target=_survive, args=(trainer, on_signal), daemon=True).start()
    Thread(target=_watch, args=(read_end, on_signal), daemon=True).start()
    if init is not None:
        init(worker)


def _survive(trainer: int, on_signal: Callable[[], None]) -> None:
    """End this worker at once on a signal of its trainer, which sends one when it ends, and later on one of others."""
    while signal.sigwaitinfo(SIGNALS).si_pid != trainer:
        on_signal()
    os._exit(0)


def _watch(pipe: int, on_signal: Callable[[], None]) -> None:
    """Call `on_signal` for each byte that Python's wake-up pipe gets."""
    while os.read(pipe, 1):
        on_signal()


def end_early(stop: StopCallback, step: int, settings: Settings, *, unsaved: str | None) -> int:
    """Print how to resume, once for all processes, and return the exit code.

    Args:
        stop: of the run.
        step: at which it stopped.
        settings: of the run.
        unsaved: why there is no checkpoint of this step; None if there is one.
    """
    if PartialState().is_main_process:
        said = f"stopped by {stop.signal} at step {step}"
        restart = describe_restart(settings.output_dir, settings.training.resume_from_checkpoint, step)
        if unsaved is not None:
            print(f"error: {said}; {unsaved}; {restart}", file=sys.stderr, flush=True)
            if marker := os.environ.get(MARKER):
                Path(marker).touch()
        else:
            print(f"{said}; {restart}", flush=True)
    return EXIT_CODE if unsaved is None else 1
