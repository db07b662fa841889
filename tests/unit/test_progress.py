"""Lines about long steps: few where there is no terminal, a bar where there is one, and always with the time left."""

import io
import subprocess
import sys
from types import SimpleNamespace

import pytest
from transformers import TrainerState

from common import progress as module
from common.progress import Progress, progress
from training import callbacks
from training.callbacks import ProgressLine


class Clock:
    """Stands for `monotonic`; `seconds` are set by the test."""

    seconds = 0.0

    def __call__(self):
        return self.seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(module, "monotonic", clock)
    monkeypatch.setattr(callbacks, "monotonic", clock)
    return clock


def take(items, clock, seconds):
    """Items that take so many seconds each."""
    for item in items:
        clock.seconds += seconds
        yield item


def test_a_short_step_prints_nothing_in_a_file(clock, capsys):
    assert list(progress(take(range(40), clock, 0.1), "decoding", 40, "images")) == list(range(40))
    assert capsys.readouterr() == ("", "")


def test_a_long_step_prints_after_five_seconds_and_then_each_minute(clock, capsys):
    assert len(list(progress(take(range(200), clock, 1), "answering", 200, "batches"))) == 200
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" of ")[0].split()[-1] for line in lines] == ["5", "65", "125", "185"]
    assert lines[0] == "answering  5 of 200 batches   03:15 left"
    assert lines[-1].endswith("   00:15 left")


def test_a_step_that_is_not_shown_prints_nothing(clock, capsys):
    assert len(list(progress(take(range(200), clock, 1), "answering", 200, "batches", shown=False))) == 200
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_a_bar(clock, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    assert len(list(progress(take(range(7), clock, 1), "decoding", 7, "images"))) == 7
    assert "decoding: 100%" in terminal.getvalue() and "7/7" in terminal.getvalue()


def test_the_time_left_is_of_the_pace_since_the_start(clock):
    shower = Progress("training", 100, "steps", done=40)
    assert shower.time_left() == ""
    clock.seconds = 30
    shower.advance(10)
    assert shower.time_left() == "   02:30 left"
    shower.advance(50)
    assert shower.time_left() == ""


def run(clock, *, steps, seconds, logging_steps=10):
    """Let the callback see a run of so many steps, each of so many seconds."""
    line, args = ProgressLine(), SimpleNamespace()
    state = TrainerState(max_steps=steps, logging_steps=logging_steps, is_world_process_zero=True)
    line.on_train_begin(args, state, None)
    for state.global_step in range(1, steps + 1):
        clock.seconds += seconds
        line.on_step_end(args, state, None)
        if state.global_step % logging_steps == 0:
            logs = {"loss": 1 / state.global_step, "learning_rate": 1e-4, "grad_norm": 0.5}
            line.on_log(args, state, None, logs=logs)
    line.on_train_end(args, state, None)


def test_a_run_prints_about_twenty_lines_however_many_logs_there_are(clock, capsys):
    run(clock, steps=600, seconds=0.125)
    lines = capsys.readouterr().out.splitlines()
    assert [int(line.split("/")[0].split()[-1]) for line in lines] == [10, *range(40, 600, 30), 600]
    assert lines[0] == "step     10/600   loss 0.1000   lr 1.00e-04   grad norm 0.500   01:13 left"
    assert lines[-1] == "step    600/600   loss 0.0017   lr 1.00e-04   grad norm 0.500"


def test_a_slow_run_prints_before_its_first_log_and_at_least_once_a_minute(clock, capsys):
    run(clock, steps=100, seconds=30, logging_steps=2)
    printed = capsys.readouterr()
    assert printed.err.splitlines()[0] == "training   1 of 100 steps   49:30 left"
    assert len(printed.out.splitlines()) == 50


def test_validation_shows_its_batches(clock, capsys):
    line, args, state = ProgressLine(), None, TrainerState(max_steps=9, is_world_process_zero=True)
    line.on_train_begin(args, state, None)
    for _ in range(4):
        clock.seconds += 3
        line.on_prediction_step(args, state, None, eval_dataloader=range(4))
    line.on_evaluate(args, state, None)
    line.on_log(args, state, None, logs={"eval_loss": 0.25})
    printed = capsys.readouterr()
    assert printed.err == "validation 3 of 4 batches   00:02 left\n"
    assert printed.out == "step      0/9   validation loss 0.2500\n"


def test_the_loading_of_libraries_is_announced_before_it_starts_and_not_for_help():
    code = "import sys; sys.argv = {}; from common.cli import *; announce_loading(); print('torch' in sys.modules)"
    said, helped = (
        subprocess.run([sys.executable, "-c", code.format(words)], capture_output=True, text=True)
        for words in (["a/b.py", "--x"], ["a/b.py", "--help"])
    )
    assert (said.stdout, helped.stdout) == ("False\n", "False\n")
    assert said.stderr == "b.py: loading libraries (about 10 s, the first time up to a minute)\n"
    assert helped.stderr == ""
