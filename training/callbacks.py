"""Beside the training steps: a readable log line, curves on disk, pushes of checkpoints."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from time import monotonic

from tqdm import tqdm
from transformers import TrainerCallback, TrainerState, TrainingArguments

from common.files import atomic_write
from common.plots import plot_training
from common.progress import LINE_SECONDS, Progress
from publishing.hub import BackgroundPush
from training.speed import format_speed

DRAWING_SECONDS = 10  # at least, between two drawings of the curves: each takes half a second from the training


class ProgressLine(TrainerCallback):
    """A bar on a terminal, and short lines instead of a dictionary for each log.

    There is a line for each twentieth of the run, and at least one a minute; metrics.jsonl has every log.
    """

    def __init__(self):
        self.training = self.validation = None
        self.last_step, self.last_time = 0, -LINE_SECONDS

    def on_train_begin(self, args, state, control, **kwargs):
        shown = state.is_world_process_zero
        self.training = Progress("training", state.max_steps, "steps", done=state.global_step, shown=shown)

    def on_step_end(self, args, state, control, **kwargs):
        self.training.advance(state.global_step - self.training.done)

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        if self.validation is None:
            shown = state.is_world_process_zero
            self.validation = Progress("validation", len(eval_dataloader), "batches", shown=shown)
        self.validation.advance()

    def on_evaluate(self, args, state, control, **kwargs):
        if self.validation is not None:
            self.validation.close()
            self.validation = None

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or self.training is None:
            return
        step = f"step {state.global_step:>6}/{state.max_steps}"
        if "eval_loss" in logs:
            self.training.write(f"{step}   validation loss {logs['eval_loss']:.4f}")
        elif "loss" in logs and self._is_due(state):
            numbers = f"loss {logs['loss']:.4f}   lr {logs['learning_rate']:.2e}   grad norm {logs['grad_norm']:.3f}"
            self.training.write(f"{step}   {numbers}{format_speed(logs)}")
            self.last_step, self.last_time = state.global_step, monotonic()

    def _is_due(self, state: TrainerState) -> bool:
        passed = state.global_step - self.last_step
        ends = state.global_step + state.logging_steps > state.max_steps
        return ends or 20 * passed >= state.max_steps or monotonic() - self.last_time >= LINE_SECONDS

    def on_train_end(self, args, state, control, **kwargs):
        self.training.close()


class CurvesCallback(TrainerCallback):
    """Keep `metrics.jsonl` and `training_metrics.png` in the output folder up to date.

    Both are drawn from the trainer's history, which every checkpoint holds, so that they are complete after a resume,
    and what a full disk refused is written at the next log.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        self.drawn = monotonic()

    def on_step_end(self, args, state, control, **kwargs):
        if control.should_save:  # a row has means since the one before, and a run that resumes knows none of them
            control.should_log = True

    on_epoch_end = on_step_end

    def on_log(self, args, state, control, **kwargs):
        self._write(write_metrics, state, Path(args.output_dir) / "metrics.jsonl")

    def on_save(self, args, state, control, **kwargs):
        if monotonic() - self.drawn >= DRAWING_SECONDS:
            self._draw(args, state)

    def on_train_end(self, args, state, control, **kwargs):
        self._draw(args, state)

    def _draw(self, args: TrainingArguments, state: TrainerState) -> None:
        self._write(plot_training, state, Path(args.output_dir) / "training_metrics.png")
        self.drawn = monotonic()

    def _write(self, write: Callable[[list[dict], Path], None], state: TrainerState, path: Path) -> None:
        if not state.is_world_process_zero:
            return
        try:
            write(state.log_history, path)
        except OSError as error:
            tqdm.write(f"warning: {path.name} was not written: {error.strerror}; training continues", file=sys.stderr)


class PushCallback(TrainerCallback):
    """Push the adapter of every saved checkpoint but the last, which the end of the run pushes."""

    def __init__(self, background: BackgroundPush):
        self.background = background

    def on_save(self, args, state, control, **kwargs):
        output_dir = Path(args.output_dir)
        saved = (output_dir / f"checkpoint-{state.global_step}").is_dir()  # not on a full disk
        if state.is_world_process_zero and saved and not control.should_training_stop:
            self.background.start(output_dir / f"checkpoint-{state.global_step}", output_dir)


def write_metrics(log_history: list[dict], path: Path) -> None:
    """Write one JSON object a line; the file is replaced in one go."""
    atomic_write(path, "".join(json.dumps(row) + "\n" for row in log_history))
