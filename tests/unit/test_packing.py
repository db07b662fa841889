"""Sample lengths without decoding a pixel; packs that are full, and other ones in each epoch."""

import random
import time
from pathlib import Path

import pytest
from datasets import Dataset

from collator import VisionSFTCollator
from training.lengths import check_pack_limit, describe_too_long, list_too_long, measure_lengths
from training.packing import fill_rate, pack_lengths
from training.samplers import PackSampler


def test_measured_lengths_equal_the_collated_ones(processor, demo_splits):
    train = demo_splits["train"]
    lengths = measure_lengths(train, processor)
    for sample, total, image in zip(train, lengths.total, lengths.image, strict=True):
        batch = VisionSFTCollator(processor)([sample])
        assert batch["input_ids"].size(1) == total
        assert (batch["mm_token_type_ids"] == 1).sum() == image == 16


def count_no_more(batch, processor):
    raise ValueError("counted anew")


def test_lengths_are_counted_once_for_a_data_set_and_pixel_limits(processor, demo_splits, monkeypatch):
    train = demo_splits["train"]
    lengths = measure_lengths(train, processor)
    monkeypatch.setattr("training.lengths._count_tokens", count_no_more)
    assert measure_lengths(train, processor) == lengths
    processor.image_processor.size["longest_edge"] = 56 * 56
    with pytest.raises(ValueError, match="counted anew"):
        measure_lengths(train, processor)
    monkeypatch.undo()
    assert set(measure_lengths(train, processor).image) == {4}


def test_a_sample_over_max_length_is_listed_with_its_tokens(processor, demo_splits):
    train = demo_splits["train"]
    lengths = measure_lengths(train, processor)
    longest = max(lengths.total)
    assert list_too_long({"train": train}, {"train": lengths}, longest) == []
    assert list_too_long({"train": train}, {"train": lengths}, None) == []
    rows = list_too_long({"train": train}, {"train": lengths}, longest - 1)
    assert len(rows) == sum(total == longest for total in lengths.total)
    first = {"split": "train", "id": train["id"][lengths.total.index(longest)], "tokens": longest}
    assert rows[0] == {**first, "image_tokens": 16, "images": 1}


FIT = {"min_pixels": 16 * 784, "max_pixels": 768 * 784, "cell": 28}


def too_long(tokens, image_tokens, images):
    return {"split": "train", "id": "x", "tokens": tokens, "image_tokens": image_tokens, "images": images}


@pytest.mark.parametrize(
    ("row", "pixels"),
    [
        (too_long(116, 16, 1), None),  # the text alone fills it
        (too_long(110, 16, 1), None),  # ten tokens of image are fewer than min_pixels
        (too_long(800, 768, 1), 68 * 784),
        (too_long(800, 768, 4), 17 * 784),
        (too_long(200, 0, 0), None),
    ],
)
def test_the_advice_names_max_pixels_only_where_it_can_help(row, pixels):
    said = describe_too_long([row], {"train": 7}, 100, FIT, path=Path("out/too_long.jsonl"))
    assert said.startswith(
        f"max_length: 1 of 7 train samples are over 100 tokens, listed in {Path('out/too_long.jsonl')}; the longest, "
        f"'x', has {row['tokens']}, of which {row['image_tokens']} are image: raise max_length to {row['tokens']}"
    )
    assert (f"lower max_pixels to {pixels}," in said) == ("max_pixels" in said) == (pixels is not None)
    assert said.endswith("or leave them out by too_long: drop")
    assert "raise max_length and pack_tokens to" in describe_too_long([row], {"train": 7}, 100, FIT, pack_tokens=100)


def test_max_length_above_a_pack_names_the_number_that_fits():
    check_pack_limit(4096, 4096, 604)
    check_pack_limit(None, None, 604)
    with pytest.raises(ValueError, match=r"found 4096 and 2048; the longest sample has 604, so set max_length: 604$"):
        check_pack_limit(4096, 2048, 604)
    with pytest.raises(ValueError, match=r"found None and 512; the longest sample has 604.* and pack_tokens: 604, or"):
        check_pack_limit(None, 512, 604)
    with pytest.raises(ValueError, match=r"found 4096 and 2048; set max_length: 2048 or less$"):
        check_pack_limit(4096, 2048, None)


def test_an_image_that_cannot_be_resized_is_named(processor):
    messages = [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "melanoma"}]
    row = {"id": "x", "messages": messages, "image_sizes": [[2000, 12]], "label": None}
    narrow = Dataset.from_list([row])
    with pytest.raises(ValueError, match="sample 'x': too narrow: 2000 x 12 px under max_pixels 12544"):
        measure_lengths(narrow, processor)


def log_normal(count, seed=0, budget=8192):
    rng = random.Random(seed)
    return [min(budget, 250 + int(rng.lognormvariate(5, 0.8))) for _ in range(count)]


@pytest.mark.parametrize("budget", [4096, 8192])
def test_packs_hold_every_sample_once_within_the_budget_and_are_full(budget):
    lengths = log_normal(20_000, budget=budget)
    packs = list(PackSampler(lengths, budget, seed=1))
    assert sorted(n for pack in packs for n in pack) == list(range(20_000))
    assert max(sum(lengths[n] for n in pack) for pack in packs) <= budget
    assert fill_rate(packs, lengths, budget) >= 0.97


def test_best_fit_is_as_good_as_can_be_on_small_cases():
    assert pack_lengths([5, 5, 5, 5], 10) == [[0, 1], [2, 3]]
    assert pack_lengths([7, 6, 3, 4], 10) == [[0, 2], [1, 3]]
    assert pack_lengths([10], 10) == [[0]]


def test_the_order_changes_by_epoch_and_seed_and_by_nothing_else():
    lengths = log_normal(500)

    def packs(seed, epoch):
        sampler = PackSampler(lengths, 8192, seed=seed, epochs=3)
        sampler.sampler.set_epoch(epoch)
        return list(sampler)

    assert packs(0, 1) == packs(0, 1)
    assert packs(0, 0) != packs(0, 1) != packs(1, 1)
    assert len(packs(0, 0)) == len(packs(0, 1)) == len(packs(0, 2))


@pytest.mark.parametrize("multiple", [1, 4, 6])
def test_every_epoch_fills_whole_steps(multiple):
    lengths = log_normal(300)
    sampler = PackSampler(lengths, 8192, seed=0, multiple=multiple, epochs=4)
    for epoch in range(4):
        sampler.sampler.set_epoch(epoch)
        packs = list(sampler)
        assert len(packs) == len(sampler) and len(sampler) % multiple == 0
        assert sorted(n for pack in packs for n in pack) == list(range(300)) and all(packs)


def test_without_shuffling_the_order_stays_for_all_epochs():
    sampler = PackSampler(log_normal(50), 8192, shuffle=False)
    first = list(sampler)
    sampler.sampler.set_epoch(3)
    assert list(sampler) == first


def test_what_cannot_be_packed_is_refused():
    with pytest.raises(
        ValueError, match="pack_tokens: the longest sample has 900 tokens, more than the 512 of a pack"
    ):
        PackSampler([100, 900], 512)
    with pytest.raises(ValueError, match="pack_tokens: 2 samples cannot fill the 4 packs of one step"):
        PackSampler([100, 100], 512, multiple=4)


@pytest.mark.slow
def test_a_million_lengths_are_packed_in_seconds():
    lengths = log_normal(1_000_000)
    start = time.perf_counter()
    sampler = PackSampler(lengths, 8192)
    assert time.perf_counter() - start < 10
    assert fill_rate(sampler, lengths, 8192) >= 0.97
