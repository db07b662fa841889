"""Progress of a long step: a bar on a terminal; elsewhere, as in a log file, a line now and then."""

import sys
from collections.abc import Iterable, Iterator
from math import inf
from time import monotonic

from tqdm import tqdm

FIRST_SECONDS = 5  # without a line, at the start of a step
LINE_SECONDS = 60  # without a line, later


class Progress:
    """Counts the finished parts of a step, and says how long the rest will take.

    Args:
        what: the step, as "validation".
        total: number of its parts.
        unit: what the parts are, as "batches".
        done: parts that are finished already.
        shown: whether to show anything.
    """

    def __init__(self, what: str, total: int, unit: str, *, done: int = 0, shown: bool = True):
        self.what, self.total, self.unit, self.done, self.first = what, total, unit, done, done
        self.start = monotonic()
        self.due = self.start + FIRST_SECONDS if shown else inf
        bar = {"desc": what, "unit": f" {unit}", "initial": done, "dynamic_ncols": True, "leave": None}
        self.bar = tqdm(total=total, **bar) if shown and is_terminal(sys.stderr) else None

    def advance(self, count: int = 1) -> None:
        self.done += count
        if self.bar is not None:
            self.bar.update(count)
        elif monotonic() >= self.due and self.done < self.total:
            self.write(f"{self.what:<10} {self.done:,} of {self.total:,} {self.unit}", file=sys.stderr)

    def write(self, line: str, file=None) -> None:
        """Print a line with the time that is left, above the bar if there is one; to stdout when `file` is None."""
        self.due = monotonic() + LINE_SECONDS
        tqdm.write(f"{line}{self.time_left()}", file=file)
        (file or sys.stdout).flush()  # a log file is read while it grows

    def time_left(self) -> str:
        """Return "   01:30 left" at the pace so far, "" when nothing is known or left."""
        if not self.first < self.done < self.total:
            return ""
        pace = (monotonic() - self.start) / (self.done - self.first)
        return f"   {tqdm.format_interval(pace * (self.total - self.done))} left"

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def progress(items: Iterable, what: str, total: int, unit: str, *, shown: bool = True) -> Iterator:
    """Yield the items, and show how many have been taken; see `Progress`."""
    shower = Progress(what, total, unit, shown=shown)
    try:
        for item in items:
            yield item
            shower.advance()
    finally:
        shower.close()


def is_terminal(stream) -> bool:
    return stream is not None and stream.isatty()
