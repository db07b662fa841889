"""Which samples make a batch, in which order: the same for any number of processes."""

import math
import random
from collections.abc import Iterator, Sequence
from itertools import cycle, islice, pairwise

import torch
from torch.utils.data import Sampler
from transformers import TrainingArguments
from transformers.trainer_pt_utils import get_length_grouped_indices

from training.packing import pack_lengths, split_packs

WINDOW = 4096  # samples that are packed together


class EpochOrder(Sampler[int]):
    """The samples in an order that depends on seed and epoch alone; accelerate and the trainer set the epoch."""

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


class LengthGroupedOrder(EpochOrder):
    """The same, with samples of similar length next to each other.

    Args:
        lengths: of the samples, tokens.
        seed: of the order.
        group: samples of one optimizer step in all processes, which get similar lengths.
    """

    def __init__(self, lengths: Sequence[int], *, seed: int, group: int):
        super().__init__(len(lengths), seed=seed)
        self.lengths, self.group = lengths, group

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(random.Random(f"{self.seed}-{self.epoch}").getrandbits(63))
        return iter(get_length_grouped_indices(self.lengths, self.group, generator=generator))


class PaddedSampler(Sampler[list[int]]):
    """Batches for padding: consecutive samples of an order, the same ones in each step for any number of processes.

    Process p of P takes batches p, p + P, ... The last samples of an epoch are shared evenly by all processes; where
    there are fewer samples than processes, the first ones of the order are added, as accelerate does, in turn.

    Args:
        order: the samples' order.
        batch_size: most samples in a batch.
        processes: that share a step.
        drop_last: leave out the last samples when they do not fill a batch in each process.
    """

    def __init__(self, order: EpochOrder, batch_size: int, *, processes: int = 1, drop_last: bool = False):
        self.sampler, self.step, self.processes, self.drop_last = order, batch_size * processes, processes, drop_last

    def __len__(self) -> int:
        steps = len(self.sampler) / self.step
        return self.processes * (math.floor(steps) if self.drop_last else math.ceil(steps))

    def __iter__(self) -> Iterator[list[int]]:
        order = list(self.sampler)
        for start in range(0, len(self) // self.processes * self.step, self.step):
            samples = order[start : start + self.step]
            missing = max(0, self.processes - len(samples))
            yield from split_evenly([*samples, *islice(cycle(order), missing)], self.processes)


def split_evenly(samples: list[int], parts: int) -> list[list[int]]:
    """Return `samples` in consecutive parts whose sizes differ by at most one."""
    borders = [len(samples) * part // parts for part in range(parts + 1)]
    return [samples[start:end] for start, end in pairwise(borders)]


class PackSampler(Sampler[list[int]]):
    """Batches of samples that fill a budget of tokens: what a batch sampler gives to a DataLoader.

    Samples are packed in windows of the shuffled order, so that packs are full and differ between epochs. Every epoch
    has the same number of packs, a multiple of `multiple`: where it has fewer, packs are split.

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
        """Pack window by window; the samples of a window's emptiest pack move to the next window."""
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


def count_epochs(args: TrainingArguments, steps_per_epoch: int) -> int:
    """Return how many epochs a run begins at most."""
    if args.max_steps > 0:
        return math.ceil(args.max_steps / steps_per_epoch) + 1
    return math.ceil(args.num_train_epochs)
