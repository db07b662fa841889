"""Copies are found exactly and fast; pictures that only resemble each other are not copies."""

import time

import numpy as np
import pytest

from data_prep.duplicates import MAX_DISTANCE, close_hashes, near_pairs


def hashes_with_neighbours(count, planted, seed=0):
    """Random 64-bit hashes, `planted` of which differ from another in 0 to 9 bits."""
    rng = np.random.default_rng(seed)
    hashes = rng.integers(0, 2**64, count, dtype=np.uint64)
    chosen = rng.choice(count, (planted, 2), replace=False)
    for original, copy in chosen:
        bits = rng.choice(64, rng.integers(0, 10), replace=False)
        hashes[copy] = hashes[original] ^ np.uint64(sum(1 << int(bit) for bit in bits))
    return hashes


def test_close_hashes_equal_brute_force():
    hashes = hashes_with_neighbours(5000, 1500)
    distance = np.bitwise_count(hashes[:, None] ^ hashes[None, :])
    expected = [(int(i), int(j)) for i, j in np.argwhere(distance <= MAX_DISTANCE) if i < j]
    assert len(expected) > 1000
    assert close_hashes(hashes) == expected


@pytest.mark.slow
def test_a_hundred_thousand_hashes_take_less_than_a_minute():
    hashes, mirrored = hashes_with_neighbours(100_000, 1000), hashes_with_neighbours(100_000, 0, seed=1)
    start = time.perf_counter()
    pairs = near_pairs(hashes, mirrored, np.zeros((100_000, 8, 8, 3), np.uint8))
    assert len(pairs) > 500
    assert time.perf_counter() - start < 60


def test_a_mirrored_copy_is_found_and_another_colour_is_not():
    hashes, mirrored = np.array([5, 9, 5], np.uint64), np.array([2**40 - 1, 5, 2**50 - 1], np.uint64)
    hashes[1] = 2**33 - 1
    thumbnails = np.zeros((3, 8, 8, 3), np.uint8)
    thumbnails[0, :, :4] = 200
    thumbnails[1, :, 4:] = 200  # the first one, mirrored
    thumbnails[2] = 90  # the hash of the first one, but another picture
    assert near_pairs(hashes, mirrored, thumbnails) == [(0, 1)]


def test_no_images_have_no_pairs():
    empty = np.zeros(0, np.uint64)
    assert near_pairs(empty, empty, np.zeros((0, 8, 8, 3), np.uint8)) == []
