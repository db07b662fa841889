"""Which samples depend on each other: those of one patient or lesion, and those that show one image."""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence

from data_prep.split import join_groups


def image_keys(samples: Iterable[dict]) -> list[tuple[str, ...]]:
    """Return the images of each sample as a sorted tuple of keys: digests of embedded images, paths of others."""
    return [tuple(sorted(map(_image_key, sample["images"]))) for sample in samples]


def _image_key(image: dict) -> str:
    return hashlib.sha256(image["bytes"]).hexdigest() if image["bytes"] else image["path"]


def cluster_samples(rows: list[dict], images: Sequence[tuple[str, ...]] | None = None) -> list[int]:
    """Return the number of each row's cluster. Rows share it with one group of one source, one id or one image.

    Args:
        rows: `id`, `group` and `source` of each sample.
        images: see `image_keys`; not used when None.
    """
    members = defaultdict(list)
    for index, row in enumerate(rows):
        members["id", row["id"]].append(index)
        if row["group"]:
            members["group", row["source"], row["group"]].append(index)
        for key in images[index] if images else ():
            members["image", key].append(index)
    return join_groups(len(rows), list(members.values()))


def describe_clusters(rows: list[dict], clusters: list[int]) -> dict:
    """Return the number of clusters, what one of them is, and how many samples name a patient or lesion."""
    count, named = len(set(clusters)), sum(bool(row["group"]) for row in rows)
    unit = "patients or lesions" if named == len(rows) else "samples" if count == len(rows) else "independent groups"
    return {"clusters": count, "cluster_unit": unit, "samples_with_group": named}
