"""What happens beside the training steps: a readable log line, and curves that a killed run leaves behind."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm
from transformers import ProgressCallback, TrainerCallback, TrainerState

from common.plots import plot_training
from publishing.hub import BackgroundPush


class ProgressLine(ProgressCallback):
    """A progress bar, and one short line for each log instead of a dictionary."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or self.training_bar is None:
            return
        if "loss" in logs:
            numbers = f"loss {logs['loss']:.4f}   lr {logs['learning_rate']:.2e}   grad norm {logs['grad_norm']:.3f}"
            self.training_bar.write(f"step {state.global_step:>6}/{state.max_steps}   {numbers}")
        elif "eval_loss" in logs:
            self.training_bar.write(
                f"step {state.global_step:>6}/{state.max_steps}   validation loss {logs['eval_loss']:.4f}"
            )


class CurvesCallback(TrainerCallback):
    """Keep `metrics.jsonl` and `training_metrics.png` in the output folder up to date.

    Both come from the trainer's own history, which every checkpoint carries, so that they are whole after a resume,
    and what a full disk did not take is written at the next log.
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
    """Take every saved checkpoint's adapter to the Hub but the last, which the end of the run brings."""

    def __init__(self, background: BackgroundPush):
        self.background = background

    def on_save(self, args, state, control, **kwargs):
        output_dir = Path(args.output_dir)
        saved = (output_dir / f"checkpoint-{state.global_step}").is_dir()  # not on a full disk
        if state.is_world_process_zero and saved and not control.should_training_stop:
            self.background.start(output_dir / f"checkpoint-{state.global_step}", output_dir)


def write_metrics(log_history: list[dict], path: Path) -> None:
    """Write one JSON object a line; the file is replaced in one go."""
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text("".join(json.dumps(row) + "\n" for row in log_history), encoding="utf-8")
    unfinished.replace(path)
