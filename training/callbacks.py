"""Beside the training steps: a readable log line, curves on disk, pushes of checkpoints."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm
from transformers import ProgressCallback, TrainerCallback, TrainerState

from common.files import atomic_write
from common.plots import plot_training
from publishing.hub import BackgroundPush
from training.speed import format_speed


class ProgressLine(ProgressCallback):
    """A progress bar, and one short line for each log instead of a dictionary."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or self.training_bar is None:
            return
        if "loss" in logs:
            numbers = f"loss {logs['loss']:.4f}   lr {logs['learning_rate']:.2e}   grad norm {logs['grad_norm']:.3f}"
            self.training_bar.write(f"step {state.global_step:>6}/{state.max_steps}   {numbers}{format_speed(logs)}")
        elif "eval_loss" in logs:
            self.training_bar.write(
                f"step {state.global_step:>6}/{state.max_steps}   validation loss {logs['eval_loss']:.4f}"
            )


class CurvesCallback(TrainerCallback):
    """Keep `metrics.jsonl` and `training_metrics.png` in the output folder up to date.

    Both are drawn from the trainer's history, which every checkpoint holds, so that they are complete after a resume,
    and what a full disk refused is written at the next log.
    """

    def on_log(self, args, state, control, **kwargs):
        self._write(write_metrics, state, Path(args.output_dir) / "metrics.jsonl")

    def on_save(self, args, state, control, **kwargs):
        self._write(plot_training, state, Path(args.output_dir) / "training_metrics.png")

    on_train_end = on_save

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
