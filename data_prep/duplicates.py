"""Images that are the same picture: copied, re-encoded, resized, mirrored."""

from collections import defaultdict

import numpy as np

from .inspection import ImageInfo
from .split import join_groups

MAX_DISTANCE = 7  # differing bits of 64 between perceptual hashes
MAX_COLOUR_DIFFERENCE = 8.0  # mean difference of 8 x 8 RGB thumbnails, of 255
BANDS = 8  # hashes that differ in at most 7 bits agree in at least one of 8 bytes


def near_pairs(hashes: np.ndarray, mirrored: np.ndarray, thumbnails: np.ndarray) -> list[tuple[int, int]]:
    """Return the pairs of images that look alike, as they are or mirrored.

    Args:
        hashes: perceptual hash of each image, uint64, shape (N,).
        mirrored: the same of its mirror image, shape (N,).
        thumbnails: uint8, shape (N, 8, 8, 3).

    Returns:
        Sorted pairs `(i, j)`, i < j.
    """
    size = len(hashes)
    pairs = set()
    for i, j in close_hashes(np.concatenate([hashes, mirrored])):
        if i >= size or i == j - size:  # two mirror images repeat the originals' pair
            continue
        other = thumbnails[j] if j < size else thumbnails[j - size, :, ::-1]
        if np.abs(thumbnails[i].astype(int) - other).mean() <= MAX_COLOUR_DIFFERENCE:
            pairs.add((min(i, j % size), max(i, j % size)))
    return sorted(pairs)


def close_hashes(hashes: np.ndarray) -> list[tuple[int, int]]:
    """Return all pairs `(i, j)`, i < j, of 64-bit hashes that differ in at most `MAX_DISTANCE` bits.

    Exact: two such hashes agree in at least one of their eight bytes, so only hashes that share a byte are compared.
    """
    pairs = set()
    for band in range(BANDS):
        keys = (hashes >> np.uint64(8 * band)) & np.uint64(0xFF)
        order = np.argsort(keys, kind="stable")
        edges = np.flatnonzero(np.diff(keys[order])) + 1
        for bucket in np.split(order, edges):
            pairs.update(_close_in_bucket(hashes, bucket))
    return sorted(pairs)


def _close_in_bucket(hashes: np.ndarray, bucket: np.ndarray, block: int = 2048) -> set[tuple[int, int]]:
    pairs = set()
    for start in range(0, len(bucket), block):
        rows = bucket[start : start + block]
        distance = np.bitwise_count(hashes[rows, None] ^ hashes[None, bucket[start:]])
        for row, column in np.argwhere(distance <= MAX_DISTANCE):
            i, j = int(rows[row]), int(bucket[start + column])
            if column > row:
                pairs.add((min(i, j), max(i, j)))
    return pairs


def find_copies(infos: dict[str, ImageInfo]) -> tuple[dict[str, str], tuple[list[list[str]], list[list[str]]]]:
    """Return one path for each path's picture, and the sets of paths that are exact and near copies."""
    by_digest = defaultdict(list)
    for path in sorted(infos):
        by_digest[infos[path].digest].append(path)
    firsts = [paths[0] for paths in by_digest.values()]
    hashes = np.array([infos[path].hashes for path in firsts], dtype=np.uint64).reshape(-1, 2)
    thumbnails = np.frombuffer(b"".join(infos[path].thumbnail for path in firsts), np.uint8).reshape(-1, 8, 8, 3)
    pairs = near_pairs(hashes[:, 0], hashes[:, 1], thumbnails)
    roots = join_groups(len(firsts), [list(pair) for pair in pairs])
    alike = defaultdict(list)
    for path, root in zip(firsts, roots, strict=True):
        alike[root].append(path)
    picture_of = {path: firsts[roots[n]] for n, paths in enumerate(by_digest.values()) for path in paths}
    exact = [paths for paths in by_digest.values() if len(paths) > 1]
    return picture_of, (exact, [paths for paths in alike.values() if len(paths) > 1])
