"""Printing from several processes."""

from accelerate import PartialState


def print_rank0(*lines: str) -> None:
    """Print the lines on the main process only."""
    if PartialState().is_main_process:
        print(*lines, sep="\n", flush=True)
