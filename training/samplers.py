"""Which samples make a batch, in which order: the same for any number of processes."""

import random
from collections.abc import Iterator, Sequence

from torch.utils.data import Sampler

from training.packing import pack_lengths, split_packs

WINDOW = 4096  # samples that are packed together


class EpochOrder(Sampler[int]):
    """The samples in an order of its own for each epoch and seed; accelerate and the trainer set the epoch."""

    def __init__(self, size: int, *, seed: int, shuffle: bool = True):
        self.size, self.seed, self.shuffle, self.epoch = size, seed, shuffle, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        order = list(range(self.size))
        if self.shuffle:
            random.Random(f"{self.seed}-{self.epoch}").shuffle(order)
        return iter(order)


class PackSampler(Sampler[list[int]]):
    """Batches of samples that fill a budget of tokens: what a batch sampler gives to a DataLoader.

    Samples are packed in windows of the shuffled order, so that packs are full and yet other ones in each epoch. Every
    epoch has the same number of packs, a multiple of `multiple`: where it has fewer, packs are split.

    Args:
        lengths: of the samples, tokens.
        budget: most tokens in a pack.
        seed: of the order.
        multiple: packs that one optimizer step takes, in all processes.
        epochs: how many will be asked for.
        shuffle: False gives the samples' own order, for evaluation.

    Raises:
        ValueError: a sample is over the budget, or there are too few samples for a step.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        budget: int,
        *,
        seed: int = 0,
        multiple: int = 1,
        epochs: int = 1,
        shuffle: bool = True,
    ):
        if (longest := max(lengths)) > budget:
            raise ValueError(f"pack_tokens: the longest sample has {longest} tokens, more than the {budget} of a pack")
        self.lengths, self.budget = lengths, budget
        self.sampler = EpochOrder(len(lengths), seed=seed, shuffle=shuffle)
        counts = []
        for epoch in range(epochs if shuffle else 1):
            self.sampler.set_epoch(epoch)
            counts.append(len(self._pack()))
        self.sampler.set_epoch(0)
        self.count = -(-max(counts) // multiple) * multiple
        if self.count > len(lengths):
            raise ValueError(f"pack_tokens: {len(lengths)} samples cannot fill the {multiple} packs of one step")

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[list[int]]:
        yield from split_packs(self._pack(), self.count)

    def _pack(self) -> list[list[int]]:
        """Pack window by window; what a window's emptiest pack holds goes on into the next window."""
        order, packs, left = list(self.sampler), [], []
        for start in range(0, len(order), WINDOW):
            window = left + order[start : start + WINDOW]
            own = [[window[n] for n in pack] for pack in pack_lengths([self.lengths[i] for i in window], self.budget)]
            left = []
            if start + WINDOW < len(order):
                left = own.pop(min(range(len(own)), key=lambda n: sum(self.lengths[i] for i in own[n])))
            random.Random(f"{self.sampler.seed}-{self.sampler.epoch}-{start}").shuffle(own)
            packs += own
        return packs
