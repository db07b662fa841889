"""No group crosses splits, each label has its share, and the order of the rows does not matter."""

import random
from collections import Counter

import pytest

from data_prep.split import SPLITS, assign_splits, join_groups

FRACTIONS = (0.8, 0.1, 0.1)


def make_set(seed, size=2000):
    """Return ids, groups of 1 to 20 samples, and eight labels from frequent to rare."""
    rng = random.Random(seed)
    ids, groups, labels = [], [], []
    group = 0
    while len(ids) < size:
        group += 1
        label = rng.choices("abcdefgh", [100, 60, 40, 20, 10, 5, 3, 2])[0]
        for _ in range(min(20, int(rng.expovariate(0.5)) + 1)):
            ids.append(f"s{len(ids)}")
            groups.append(group)
            labels.append(label)
    return ids, groups, labels


@pytest.mark.parametrize("seed", range(20))
def test_groups_stay_whole_and_labels_keep_their_shares(seed):
    ids, groups, labels = make_set(seed)
    splits = assign_splits(ids, FRACTIONS, seed=seed, groups=groups, labels=labels)
    assert len(set(zip(groups, splits, strict=True))) == len(set(groups))
    whole = Counter(labels)
    for name, share in zip(SPLITS, FRACTIONS, strict=True):
        part = Counter(label for label, split in zip(labels, splits, strict=True) if split == name)
        assert part.total() / len(ids) == pytest.approx(share, abs=0.01)
        for label, count in whole.items():
            assert part[label] / part.total() == pytest.approx(count / len(ids), abs=0.02)


def test_the_order_of_the_rows_does_not_matter():
    ids, groups, labels = make_set(3)
    rows = list(zip(ids, groups, labels, strict=True))
    expected = dict(zip(ids, assign_splits(ids, FRACTIONS, seed=1, groups=groups, labels=labels), strict=True))
    random.Random(0).shuffle(rows)
    ids, groups, labels = map(list, zip(*rows, strict=True))
    again = dict(zip(ids, assign_splits(ids, FRACTIONS, seed=1, groups=groups, labels=labels), strict=True))
    assert again == expected
    assert dict(zip(ids, assign_splits(ids, FRACTIONS, seed=2, groups=groups, labels=labels), strict=True)) != expected


def test_five_folds_are_of_one_size():
    ids, groups, labels = make_set(5)
    names = tuple(f"fold_{n}" for n in range(5))
    sizes = Counter(assign_splits(ids, (0.2,) * 5, seed=0, groups=groups, labels=labels, names=names))
    assert set(sizes) == set(names)
    assert max(sizes.values()) - min(sizes.values()) <= 25


def test_a_split_with_no_share_stays_empty():
    assert set(assign_splits(["a", "b", "c"], (1.0, 0.0, 0.0), seed=0)) == {"train"}


def test_join_groups_follows_links_through_others():
    assert join_groups(7, [[4, 1], [], [1, 6], [2], [3, 5]]) == [0, 1, 2, 3, 1, 3, 1]
