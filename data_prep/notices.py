"""Lines about a preparation on the screen: what is skipped, renamed, not read, without a group, without a sample."""

import logging
from collections import Counter

from .reading import suggest
from .records import READ_KEYS
from .sources import Collected
from .unread import meant_key

MAX_KEYS = 5  # that are not read

logger = logging.getLogger(__name__)


def log_skipped(collected: Collected) -> None:
    """Warn about records that are skipped or renamed, and keys that are not read."""
    if collected.errors:
        logger.warning("%d of %d records rejected", len(collected.errors), collected.num_records)
    first_of = {error.reason: error for error in reversed(collected.skipped)}
    for reason, count in Counter(error.reason for error in collected.skipped).most_common(5):
        first = first_of[reason]
        place = f"{first.source}: record {first.record}"
        logger.warning("%d rows skipped by the mapping: %s (the first is %s)", count, reason, place)
    if collected.renamed:
        count, first = len(collected.renamed), collected.renamed[0]
        logger.warning("%d records repeat an id and were renamed; the first is %.80r now", count, first)
    keys = sorted(collected.unused_keys.items(), key=lambda item: (meant_key(item[0]) is None, -item[1]))
    for key, count in keys[:MAX_KEYS]:
        near = f"; use {meant!r}" if (meant := meant_key(key)) else suggest(key.lower(), READ_KEYS)
        logger.warning("the key %.80r of %d records is not read%s", key, count, near)


def log_empty_splits(splits: list[str], wanted: list[str], samples: list[dict], groups: list[int]) -> None:
    """Warn about requested splits that no sample is in, with the reason: given splits, or too few or large groups."""
    if empty := [name for name in wanted if name not in splits]:
        free = {group for sample, group in zip(samples, groups, strict=True) if not sample["split"]}
        whose = "samples without a given split" if any(sample["split"] for sample in samples) else "samples"
        most = max(Counter(sample["label"] for sample in samples if not sample["split"]).values(), default=0)
        reason = f"the {whose} are of {len(free)} independent group(s), never divided, at most {most} of a label, and "
        reason += "too few for such shares (--split)"
        if all(sample["split"] for sample in samples):
            reason = "every record names its split, and such splits are kept"
        logger.warning("no sample is in %s: %s", " and ".join(empty), reason)


def log_ungrouped(samples: list[dict]) -> None:
    """Warn when nothing says which samples are of one patient or lesion."""
    if not any(sample["group"] for sample in samples):
        meaning = (
            "one patient may be in training and test, which makes results too good and their intervals too narrow"
        )
        logger.warning("no sample names a patient or lesion (key 'group', or --group-by): %s", meaning)
