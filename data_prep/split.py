"""Which sample goes to which split."""

import hashlib

SPLITS = ("train", "validation", "test")


def check_fractions(fractions: tuple[float, float, float]) -> None:
    """Raise ValueError unless these are three shares that add up to 1."""
    if len(fractions) != 3 or min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-6:
        raise ValueError(f"split: expected shares of train, validation and test that add up to 1, found {fractions}")


def assign_splits(sample_ids: list[str], fractions: tuple[float, float, float], *, seed: int) -> list[str]:
    """Return the split of each sample, the same for the same ids and seed whatever their order.

    Args:
        sample_ids: unique ids.
        fractions: shares of train, validation and test; they add up to 1.
        seed: another seed gives another split.

    Raises:
        ValueError: the fractions are not three shares that add up to 1, or the training split would be empty.
    """
    check_fractions(fractions)
    ranked = sorted(sample_ids, key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest())
    num_validation, num_test = (round(len(ranked) * share) for share in fractions[1:])
    num_train = len(ranked) - num_validation - num_test
    if num_train < 1:
        raise ValueError(f"split: {fractions} leaves no training sample out of {len(ranked)}")
    names = ["train"] * num_train + ["validation"] * num_validation + ["test"] * num_test
    split_of = dict(zip(ranked, names, strict=True))
    return [split_of[name] for name in sample_ids]
