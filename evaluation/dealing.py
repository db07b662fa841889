"""Dividing batches among processes by what they cost, so that all end at about the same time."""

from collections.abc import Sequence

from transformers import ProcessorMixin

from evaluation.batching import prompt_lengths
from evaluation.questions import Questions


def deal(batches: list, costs: list[float], shares: int) -> list[list]:
    """Return the batches of each process: the dearest first, each to the one that has least; then in their order.

    Equal inputs give equal shares, so that each process can find its own.
    """
    numbers, loads = [[] for _ in range(shares)], [0.0] * shares
    for number in sorted(range(len(batches)), key=lambda number: -costs[number]):
        share = loads.index(min(loads))
        numbers[share].append(number)
        loads[share] += costs[number]
    return [[batches[number] for number in sorted(own)] for own in numbers]


def batch_costs(
    batches: list[tuple[str, Sequence[int]]],
    runs: dict[str, Questions],
    processor: ProcessorMixin,
    max_new_tokens: int,
) -> list[int]:
    """Return what each batch costs, in tokens: its rows are as long as the longest, and its answers as may be."""
    lengths = {name: prompt_lengths(questions, processor) for name, questions in runs.items()}
    return [
        len(indices) * (max(lengths[name][n] for n in indices) + (max_new_tokens if runs[name].generate else 0))
        for name, indices in batches
    ]
