"""How long the samples are, without decoding a pixel, and which of them share a sequence."""

import random
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from datasets import Dataset, config
from datasets.fingerprint import Hasher
from torch.utils.data import Sampler
from transformers import ProcessorMixin

from data_prep import fingerprint
from data_prep.images import count_image_tokens
from data_prep.records import to_chat

WINDOW = 4096  # samples that are packed together


@dataclass
class SampleLengths:
    """Tokens of each sample of a data set.

    Attributes:
        total: tokens of the rendered chat, images included.
        image: how many of them are image.
    """

    total: list[int]
    image: list[int]


def measure_lengths(dataset: Dataset, processor: ProcessorMixin) -> SampleLengths:
    """Count tokens from the texts and the stored image sizes; the next time, find them in the cache of `datasets`.

    Args:
        dataset: a split in the schema of `data_prep`.
        processor: the model's processor with the pixel limits of the run.
    """
    rules = processor.tokenizer.get_vocab(), processor.chat_template, _sizing(processor)
    key = Hasher.hash([fingerprint(dataset), dataset["id"][:], *rules])
    folder = Path(config.HF_DATASETS_CACHE) / "sample_lengths"
    folder.mkdir(parents=True, exist_ok=True)
    counted = dataset.select_columns(["id", "messages", "image_sizes"]).map(
        partial(_count_tokens, processor=processor), batched=True, remove_columns=["id", "messages", "image_sizes"],
        cache_file_name=str(folder / f"{key}.arrow"), new_fingerprint=key,
    )  # fmt: skip
    return SampleLengths(total=counted["total"][:], image=counted["image"][:])


def _count_tokens(batch: dict, processor: ProcessorMixin) -> dict[str, list[int]]:
    image = [_image_tokens(*row, processor) for row in zip(batch["id"], batch["image_sizes"], strict=True)]
    texts = processor.apply_chat_template([to_chat(messages) for messages in batch["messages"]])
    ids = processor.tokenizer(texts)["input_ids"]
    # the text holds one token for each image already
    text = [len(row) - len(sizes) for row, sizes in zip(ids, batch["image_sizes"], strict=True)]
    return {"total": [t + i for t, i in zip(text, image, strict=True)], "image": image}


def _image_tokens(sample_id: str, sizes: list[list[int]], processor: ProcessorMixin) -> int:
    sizing = _sizing(processor)
    try:
        return sum(count_image_tokens(height, width, **sizing) for width, height in sizes)
    except ValueError as error:
        raise ValueError(f"sample {sample_id!r}: {error}") from error


def _sizing(processor: ProcessorMixin) -> dict[str, int]:
    """Return what decides how many tokens an image costs: the keywords of `count_image_tokens`."""
    own = processor.image_processor
    limits = {"min_pixels": own.size["shortest_edge"], "max_pixels": own.size["longest_edge"]}
    return {**limits, "cell": own.patch_size * own.merge_size}


def check_lengths(lengths: SampleLengths, sample_ids: list[str], max_length: int | None, *, split: str) -> None:
    """Raise ValueError when samples are longer than `max_length`; the message says how many and names the longest."""
    too_long = [n for n in range(len(sample_ids)) if max_length is not None and lengths.total[n] > max_length]
    if not too_long:
        return
    worst = max(too_long, key=lambda n: lengths.total[n])
    raise ValueError(
        f"max_length: {len(too_long)} of {len(sample_ids)} {split} samples are over {max_length} tokens; the longest, "
        f"{sample_ids[worst]!r}, has {lengths.total[worst]}, of which {lengths.image[worst]} are image: raise "
        "max_length or lower max_pixels"
    )


def pack_lengths(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Put items into as few packs as best fit finds, the longest items first.

    Args:
        lengths: of the items, tokens; none above the budget.
        budget: most tokens in a pack.

    Returns:
        For each pack the positions of its items.
    """
    packs, room, owner = [], [], []  # `room` is sorted; `owner` says which pack has it
    for item in sorted(range(len(lengths)), key=lambda n: (-lengths[n], n)):
        place = bisect_left(room, lengths[item])
        if place == len(room):
            pack, left = len(packs), budget
            packs.append([])
        else:
            pack, left = owner.pop(place), room.pop(place)
        packs[pack].append(item)
        left -= lengths[item]
        place = bisect_left(room, left)
        room.insert(place, left)
        owner.insert(place, pack)
    return packs


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


def split_packs(packs: list[list[int]], count: int) -> list[list[int]]:
    """Return `count` packs: those with the most samples are halved until there are enough."""
    packs = list(packs)
    while len(packs) < count:
        place = max(range(len(packs)), key=lambda n: len(packs[n]))
        pack = packs[place]
        packs[place : place + 1] = [pack[::2], pack[1::2]]
    return packs


def fill(packs: Iterable[list[int]], lengths: Sequence[int], budget: int) -> float:
    """Return the share of the packs' tokens that samples fill."""
    packs = list(packs)
    return sum(lengths[n] for pack in packs for n in pack) / (budget * len(packs))
