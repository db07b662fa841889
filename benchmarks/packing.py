"""How fast samples are packed, and how full the packs are.

    python -m benchmarks.packing

Packs a million log-normal lengths (an image of 250 tokens and a text) into several budgets, once each.
"""

import os
import platform
import random
import time
from datetime import date

from training.packing import fill_rate
from training.samplers import PackSampler

COUNT = 1_000_000


def main() -> None:
    rng = random.Random(0)
    drawn = [250 + int(rng.lognormvariate(5, 0.8)) for _ in range(COUNT)]
    print(f"{date.today()}, {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    print(f"{COUNT:,} samples of {sum(drawn) / COUNT:.0f} tokens on average")
    for budget in (4096, 8192, 16384):
        lengths = [min(length, budget) for length in drawn]
        start = time.perf_counter()
        sampler = PackSampler(lengths, budget)
        seconds = time.perf_counter() - start
        filled = fill_rate(sampler, lengths, budget)
        print(f"packs of {budget:>6}: {len(sampler):>8,} in {seconds:5.2f} s, {filled:.1%} full")


if __name__ == "__main__":
    main()
