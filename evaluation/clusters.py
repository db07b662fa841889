"""Which samples depend on each other: those of one patient or lesion, and those that show one image."""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence

from data_prep.groups import group_key, question_key
from data_prep.split import join_groups


def image_keys(samples: Iterable[dict]) -> list[tuple[str, ...]]:
    """Return the images of each sample as a sorted tuple of keys: digests of embedded images, paths of others."""
    return [tuple(sorted(map(_image_key, sample["images"]))) for sample in samples]


def _image_key(image: dict) -> str:
    return hashlib.sha256(image["bytes"]).hexdigest() if image["bytes"] else image["path"]


def cluster_samples(
    rows: list[dict],
    images: Sequence[tuple[str, ...]] | None = None,
    messages: Sequence[list[dict]] | None = None,
) -> list[int]:
    """Return the number of each row's cluster: rows of one sample, group, image or text-only question share it.

    The rules are those by which `data_prep.groups` keeps samples in one split: spellings of a group are one group,
    in all sources.

    Args:
        rows: `id` and `group` of each question's sample.
        images: see `image_keys`; not used when None.
        messages: turns up to each question, the last row of a sample with all of them; not used without `images`.
    """
    members, last = defaultdict(list), {row["id"]: index for index, row in enumerate(rows)}
    for index, row in enumerate(rows):
        members["id", row["id"]].append(index)
        if row["group"]:
            members["group", group_key(row["group"])].append(index)
        for key in images[index] if images else ():
            members["image", key].append(index)
        if images and messages and not images[index] and last[row["id"]] == index:
            members["question", question_key(messages[index])].append(index)
    return join_groups(len(rows), list(members.values()))


def describe_clusters(rows: list[dict], clusters: list[int]) -> dict:
    """Return the number of clusters, what one of them is, and how many samples name a patient or lesion."""
    count, named = len(set(clusters)), sum(bool(row["group"]) for row in rows)
    unit = "patients or lesions" if named == len(rows) else "samples" if count == len(rows) else "independent groups"
    return {"clusters": count, "cluster_unit": unit, "samples_with_group": named}
