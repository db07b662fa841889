"""What the scripts of this folder measure; imports what every side's environment has."""

import json
import statistics
import time
from collections.abc import Callable
from itertools import pairwise

import torch
from transformers import TrainerCallback

TIMED = 4  # the last steps


class Clock(TrainerCallback):
    """Records when each optimizer step ends, and lets the memory of the steps count without that of loading."""

    def __init__(self):
        self.ends, self.batches = [], 1  # batches of a step

    def on_train_begin(self, args, state, control, **kwargs):
        self.batches = args.gradient_accumulation_steps
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def on_step_end(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())


def count_tokens(collate: Callable, seen: list[int]) -> Callable:
    """Return a collator that notes each batch's tokens in `seen`, without padding."""

    def counting(examples):
        batch = collate(examples)
        seen.append(int(batch["attention_mask"].sum()))
        return batch

    return counting


def note_held(model: torch.nn.Module) -> list[int]:
    """Return a list to which each forward pass on a GPU adds the bytes that it leaves there for the backward pass."""
    before, held = [], []

    def start(*args):
        before[:] = [torch.cuda.memory_allocated()]

    if torch.cuda.is_available():
        model.register_forward_pre_hook(start)
        model.register_forward_hook(lambda *args: held.append(torch.cuda.memory_allocated() - before[0]))
    return held


def report(clock: Clock, seen: list[int], held: list[int], model: torch.nn.Module) -> None:
    """Print the figures as a line of JSON, with the attention that ran; what is held says what a side recomputes."""
    seconds = statistics.median(b - a for a, b in pairwise(clock.ends[-TIMED - 1 :]))
    tokens = statistics.mean(seen) * clock.batches
    memory = torch.cuda.max_memory_reserved() / 1e9 if torch.cuda.is_available() else None
    ran = {"attention": str(model.config._attn_implementation)}
    ran |= {"held_gb": statistics.median(held[-TIMED:]) / 1e9} if held else {}
    speed = {"tokens_per_second": tokens / seconds, "tokens": tokens, "seconds": seconds, "memory_gb": memory}
    print(json.dumps({**speed, **ran}), flush=True)
