"""Where the time of one training step goes: kinds of kernels, the longest ones, the time without any, and launches."""

import time
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback

WORDS = {  # the first kind with a word of the kernel's name
    "4 bit": ("dequant", "quantize"),
    "linear attention": ("chunk_", "gated", "conv1d", "l2norm", "solve_tril", "recompute_w_u"),
    "attention": ("flash", "fmha", "attention"),
    "products": ("gemm", "nvjet", "cutlass", "sm90_", "sm80_", "grouped", "splitk"),
    "copies": ("memcpy", "memset"),
    "compiled elementwise": ("triton",),
    "reductions, sorting": ("reduce", "softmax", "sort", "scan", "cumsum"),
}


def launch_seconds(device: torch.device, count: int = 1000) -> float:
    """Return the host's time to launch one small kernel from Python, s: small packs wait for it, not for the GPU."""
    x = torch.zeros(8, device=device)
    for _ in range(2):  # the first time it is loaded
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(count):
            x.add_(1)
        seconds = time.perf_counter() - start
    return seconds / count


class ProfileCallback(TrainerCallback):
    """Profiles one step and prints its table.

    Args:
        step: the step to profile, counted from 1; a late one, as compiling and tuning take the first.
    """

    def __init__(self, step: int):
        self.step, self.profile = step, None

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step and torch.cuda.is_available():
            torch.cuda.synchronize()
            self.profile = profile(activities=[ProfilerActivity.CUDA])
            self.profile.start()

    def on_step_end(self, args, state, control, **kwargs):
        if self.profile is not None:
            torch.cuda.synchronize()
            self.profile.stop()
            kernels = [e for e in self.profile.events() if e.device_type == DeviceType.CUDA]
            print(describe([(e.name, e.time_range.start / 1e6, e.time_range.end / 1e6) for e in kernels]), flush=True)
            self.profile = None


def kind_of(name: str) -> str:
    """Return the kind of a kernel by its name."""
    low = name.lower()
    return next((kind for kind, words in WORDS.items() if any(word in low for word in words)), "elementwise")


def describe(kernels: Iterable[tuple[str, float, float]], longest: int = 12, gaps: int = 6) -> str:
    """Return the lines of a profile.

    Args:
        kernels: names, starts and ends, s.
        longest: how many kernels to name.
        gaps: how many of the times without a kernel to place.
    """
    ordered = sorted(kernels, key=lambda kernel: kernel[1])
    first, end = ordered[0][1], ordered[0][1]
    kinds, names, idle = defaultdict(float), defaultdict(lambda: [0.0, 0]), []
    for name, start, stop in ordered:
        if start > end:
            idle.append((start - end, end - first, name))
        end = max(end, stop)
        kinds[kind_of(name)] += stop - start
        names[name][0] += stop - start
        names[name][1] += 1
    whole = end - first
    lines = [f"one step: {whole * 1e3:.0f} ms, {sum(gap for gap, *_ in idle) / whole:.1%} of it without a kernel"]
    lines += [f"  {kind:<22}{kinds[kind] / whole:7.1%}" for kind in sorted(kinds, key=kinds.get, reverse=True)]
    for name in sorted(names, key=names.get, reverse=True)[:longest]:
        seconds, count = names[name]
        lines.append(f"  {seconds * 1e3:8.1f} ms {count:6} x {name[:90]}")
    for gap, at, name in sorted(idle, reverse=True)[:gaps]:
        lines.append(f"  none for {gap * 1e3:.1f} ms at {at * 1e3:.0f} ms, before {name[:60]}")
    return "\n".join(lines)
