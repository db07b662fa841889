"""Sample lengths without decoding a pixel."""

import pytest
from datasets import Dataset

from collator import VisionSFTCollator
from packing import check_lengths, measure_lengths


def test_measured_lengths_equal_the_collated_ones(processor, demo_splits):
    train = demo_splits["train"]
    lengths = measure_lengths(train, processor)
    for sample, total, image in zip(train, lengths.total, lengths.image, strict=True):
        batch = VisionSFTCollator(processor)([sample])
        assert batch["input_ids"].size(1) == total
        assert (batch["mm_token_type_ids"] == 1).sum() == image == 16


def test_check_lengths_counts_what_is_too_long_and_names_the_longest(processor, demo_splits):
    train = demo_splits["train"]
    lengths = measure_lengths(train, processor)
    longest = max(lengths.total)
    check_lengths(lengths, train["id"], longest, split="train")
    check_lengths(lengths, train["id"], None, split="train")
    count = sum(total == longest for total in lengths.total)
    name = train["id"][lengths.total.index(longest)]
    rule = f"{count} of 32 train samples are over {longest - 1} tokens; the longest, '{name}', has {longest}, of "
    with pytest.raises(ValueError, match=rule + "which 16 are image"):
        check_lengths(lengths, train["id"], longest - 1, split="train")


def test_an_image_that_cannot_be_resized_is_named(processor):
    messages = [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "melanoma"}]
    narrow = Dataset.from_list([{"id": "x", "messages": messages, "image_sizes": [[2000, 12]]}])
    with pytest.raises(ValueError, match="sample 'x': too narrow: 2000 x 12 px under max_pixels 12544"):
        measure_lengths(narrow, processor)
