"""Which samples share a sequence: packs of a token budget, by best fit."""

from bisect import bisect_left
from collections.abc import Iterable, Sequence

# Tokens of the packs that `pack_tokens: auto` chooses from. On an H100 packs of 8,192 tokens are a fifth faster than
# those of 4,096; packs of 16,384 take twice their memory and are no faster (benchmarks/README.md).
PACK_SIZES = (4096, 8192)


def possible_packs(accumulate: int, longest: int = 0) -> dict[int, int]:
    """Return the packs of `pack_tokens: auto`, tokens, each with the packs that a step accumulates.

    All steps have the same number of tokens: `accumulate`, of the recipe, counts packs of the smallest size.

    Args:
        accumulate: `gradient_accumulation_steps` of the recipe.
        longest: tokens that a pack must hold at least.
    """
    tokens = accumulate * PACK_SIZES[0]
    return {size: tokens // size for size in PACK_SIZES if tokens % size == 0 and size >= longest}


def pack_lengths(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Put items into as few packs as best fit finds, the longest items first.

    Args:
        lengths: of the items, tokens; none above the budget.
        budget: most tokens in a pack.

    Returns:
        For each pack the positions of its items.
    """
    packs, space, owner = [], [], []  # `space` left in open packs, sorted; `owner[i]` is the pack with `space[i]`
    for item in sorted(range(len(lengths)), key=lambda n: (-lengths[n], n)):
        index = bisect_left(space, lengths[item])
        if index == len(space):
            pack, left = len(packs), budget
            packs.append([])
        else:
            pack, left = owner.pop(index), space.pop(index)
        packs[pack].append(item)
        left -= lengths[item]
        index = bisect_left(space, left)
        space.insert(index, left)
        owner.insert(index, pack)
    return packs


def split_packs(packs: list[list[int]], count: int) -> list[list[int]]:
    """Return `count` packs: those with the most samples are halved until there are enough."""
    packs = list(packs)
    while len(packs) < count:
        largest = max(range(len(packs)), key=lambda n: len(packs[n]))
        pack = packs[largest]
        packs[largest : largest + 1] = [pack[::2], pack[1::2]]
    return packs


def fill_rate(packs: Iterable[list[int]], lengths: Sequence[int], budget: int) -> float:
    """Return the share of the packs' budget that is filled with samples."""
    packs = list(packs)
    return sum(lengths[n] for pack in packs for n in pack) / (budget * len(packs))
