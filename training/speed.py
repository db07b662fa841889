"""Tokens a second, FLOP/s and memory of the steps between two lines of the log."""

import time

import torch
from transformers import TrainerCallback

from models.flops import BatchShape, Work, recomputed_flop, useful_flop


class SpeedCallback(TrainerCallback):
    """Measures the steps of this process; evaluations, saves and the first step, which may compile, are left out.

    Args:
        work: of the model.
        device: of the model.

    Attributes:
        recomputed: share of the language layers' products that the backward pass repeats.
        ceiling: FLOP/s of a matrix product on the GPU; None without one, and MFU and HFU are then not reported.
    """

    def __init__(self, work: Work, *, device: torch.device):
        self.work, self.device = work, device
        self.recomputed, self.ceiling = 0.0, None
        self.started, self.since = False, None
        self.reset()

    def reset(self) -> None:
        self.seconds, self.shape = 0.0, BatchShape(0, 0, 0, 0)

    def add(self, shape: BatchShape) -> None:
        """Count a batch of the step that is running."""
        self.shape = BatchShape(*map(sum, zip(self.shape, shape, strict=True)))

    def on_train_begin(self, args, state, control, **kwargs):
        self.started = False
        self.reset()
        if self.device.type == "cuda":  # trials before the training may have taken more
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def on_step_end(self, args, state, control, **kwargs):
        now = time.perf_counter()
        if self.started:
            self.seconds += now - self.since
        else:
            self.started = True
            self.reset()
        self.since = now

    def on_evaluate(self, args, state, control, **kwargs):
        self.since = time.perf_counter()

    on_save = on_evaluate

    def read(self) -> dict[str, float]:
        """Return the figures since the last call by their names in `metrics.jsonl`; none without a finished step."""
        if not self.seconds:
            return {}
        useful = useful_flop(self.work, self.shape)
        done = useful + recomputed_flop(self.work, self.shape, self.recomputed)
        found = {"tokens_per_second": self.shape.tokens / self.seconds, "tflops": useful / self.seconds / 1e12}
        if self.ceiling:
            found |= {"mfu": useful / self.seconds / self.ceiling, "hfu": done / self.seconds / self.ceiling}
        if self.device.type == "cuda":
            found["reserved_gb"] = torch.cuda.max_memory_reserved(self.device) / 1e9
        self.reset()
        return {name: float(f"{value:.4g}") for name, value in found.items()}


def format_speed(logs: dict[str, float]) -> str:
    """Return the figures in a log as they stand in its line; nothing without them."""
    if "tokens_per_second" not in logs:
        return ""
    parts = [f"{logs['tokens_per_second']:,.0f} tokens/s", f"{logs['tflops']:.3g} TFLOP/s"]
    if "mfu" in logs:
        parts.append(f"MFU {logs['mfu']:.0%} HFU {logs['hfu']:.0%}")
    if "reserved_gb" in logs:
        parts.append(f"{logs['reserved_gb']:.1f} GB")
    return "   " + "   ".join(parts)
