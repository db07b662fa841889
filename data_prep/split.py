"""Assigns samples to splits: complete groups, stratified by label."""

import hashlib
from collections import Counter, defaultdict
from functools import partial

SPLITS = ("train", "validation", "test")
# Names of given splits, in lower case
GIVEN_SPLITS = {
    **{name: name for name in SPLITS},
    **dict.fromkeys(("training", "trn"), "train"),
    **dict.fromkeys(("val", "valid", "validating", "dev"), "validation"),
    **dict.fromkeys(("testing", "tst"), "test"),
}


def check_fractions(fractions: tuple[float, float, float]) -> None:
    """Raise ValueError unless these are three shares that add up to 1."""
    if len(fractions) != 3 or not (min(fractions) >= 0 and abs(sum(fractions) - 1) <= 1e-6):  # nan is neither
        raise ValueError(f"split: expected shares of train, validation and test that add up to 1, found {fractions}")


def join_groups(size: int, links: list[list[int]]) -> list[int]:
    """Return each item's group: items that share a link, directly or through others, share a group.

    Args:
        size: number of items.
        links: lists of items that belong together.

    Returns:
        For each item the lowest item of its group.
    """
    parent = list(range(size))

    def root(item: int) -> int:
        while parent[item] != item:
            parent[item] = parent[parent[item]]
            item = parent[item]
        return item

    for first, *others in (link for link in links if len(link) > 1):
        for other in others:
            low, high = sorted((root(first), root(other)))
            parent[high] = low
    return [root(item) for item in range(size)]


def assign_splits(
    sample_ids: list[str],
    fractions: tuple[float, ...],
    *,
    seed: int,
    groups: list | None = None,
    labels: list[str | None] | None = None,
    names: tuple[str, ...] = SPLITS,
) -> list[str]:
    """Return the split of each sample, the same for the same samples and seed in any order.

    A group's samples get the same split. Groups are assigned largest first, each to the split that needs its labels
    most, so that each label's share in each split is close to the requested one; single samples, assigned last, even
    out the differences.

    Args:
        sample_ids: unique ids.
        fractions: share of each split; they add up to 1.
        seed: another seed gives another split.
        groups: group of each sample; one group a sample when None.
        labels: label of each sample; the same for all when None.
        names: name of each split.

    Raises:
        ValueError: the first split would be empty, and its share is not 0.
    """
    labels = labels or [None] * len(sample_ids)
    members = defaultdict(list)
    for index, group in enumerate(groups or sample_ids):
        members[group].append(index)
    totals = Counter(labels)
    missing = [{label: share * count for label, count in totals.items()} for share in fractions]

    def rank(indices: list[int]) -> tuple:
        random_order = min(hashlib.sha256(f"{seed}:{sample_ids[i]}".encode()).hexdigest() for i in indices)
        return -len(indices), min(totals[labels[i]] for i in indices), random_order

    result = [names[0]] * len(sample_ids)
    for indices in sorted(members.values(), key=rank):
        counts = Counter(labels[i] for i in indices)
        best = _neediest(counts, missing, fractions, totals)
        for label, count in counts.items():
            missing[best][label] -= count
        for index in indices:
            result[index] = names[best]
    if fractions[0] > 0 and names[0] not in result:
        raise ValueError(f"split: {fractions} leaves no {names[0]} sample out of {len(sample_ids)}")
    return result


def _neediest(counts: Counter, missing: list[dict], fractions: tuple[float, ...], totals: Counter) -> int:
    """Return the index of the split that misses the largest part of its share of a group's labels.

    Splits that the group would exceed by more than half of its size are excluded; when all are, the one that it
    exceeds least is returned. Ties go to the larger split, then to the one that misses most samples of any label.
    """

    def need(split: int) -> tuple[float, float, float]:
        missed, share = missing[split], fractions[split]
        score = sum(count * missed[label] / (share * totals[label]) for label, count in counts.items())
        return round(score, 9), share, sum(missed.values())

    def excess(split: int) -> tuple[float, float]:
        missed, share = missing[split], fractions[split]
        return round(max((count - missed[label]) / share for label, count in counts.items()), 9), -sum(missed.values())

    open_splits = [split for split, share in enumerate(fractions) if share > 0]
    fitting = [s for s in open_splits if all(count <= 2 * missing[s][label] for label, count in counts.items())]
    return max(fitting, key=need) if fitting else min(open_splits, key=excess)


def assign_all(
    samples: list[dict],
    groups: list[int],
    strata: list,
    *,
    fractions: tuple[float, float, float],
    seed: int,
    folds: int,
) -> list[str]:
    """Return each sample's split: the given one, else that of its group, else by group and stratum; then the folds.

    Given train and test splits are kept; a validation split that is not given is taken from train.

    Args:
        samples: with `id` and the given `split`, or None.
        groups: of each sample.
        strata: of each sample; each keeps its share in every split.
        fractions: shares of train, validation and test; they add up to 1.
        seed: another seed gives another split.
        folds: number of parts in place of train and validation, 0 for none.

    Raises:
        ValueError: the samples outside of test are of fewer groups than `folds`, or a split would be empty.
    """
    assign = partial(_assign, samples, groups, strata, seed)
    splits = [sample["split"] for sample in samples]
    given = {group: split for group, split in zip(groups, splits, strict=True) if split is not None}
    splits = [split or given.get(group) for group, split in zip(groups, splits, strict=True)]
    train, validation, _ = fractions
    if None in splits:
        splits = assign(splits, {None}, dict(zip(SPLITS, fractions, strict=True)))
    elif "validation" not in splits and validation > 0 and "train" in splits:
        share = validation / (train + validation)
        splits = assign(splits, {"train"}, {"train": 1 - share, "validation": share})
    parts = {f"fold_{number}": 1 / folds for number in range(folds)}
    if not parts:
        return splits
    splits = assign(splits, {"train", "validation"}, parts)
    if len(parts) > (filled := len(set(splits) - {"test"})):
        rule = "groups are never divided, and those outside of test are too few"
        raise ValueError(f"folds: {folds} parts, of which only {filled} would have samples: {rule}")
    return splits


def _assign(
    samples: list[dict], groups: list[int], strata: list, seed: int, splits: list, replaced: set, shares: dict
) -> list[str]:
    """Return the splits with those in `replaced` assigned again, by group and stratum, to the names in `shares`."""
    indices = [index for index, split in enumerate(splits) if split in replaced]
    assigned = assign_splits(
        [samples[index]["id"] for index in indices], tuple(shares.values()), seed=seed, names=tuple(shares),
        groups=[groups[index] for index in indices], labels=[strata[index] for index in indices],
    )  # fmt: skip
    new = dict(zip(indices, assigned, strict=True))
    return [new.get(index, split) for index, split in enumerate(splits)]
