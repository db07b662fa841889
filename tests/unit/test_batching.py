"""Batches of similar length, images decoded ahead, and halves where memory is too short."""

import argparse
import threading
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from evaluation.batching import AHEAD, FittingParts, batch_size, load_ahead, make_batches


def test_batches_hold_prompts_of_similar_length_the_longest_first():
    assert make_batches([5, 90, 7, 80, 6], 2, 10, budget=0) == [[1, 3], [2, 4], [0]]


def test_auto_takes_as_many_rows_as_the_budget_of_tokens_allows():
    lengths = [40, 10, 10, 10, 10, 10]
    assert make_batches(lengths, "auto", 10, budget=60) == [[0], [1, 2, 3], [4, 5]]
    assert make_batches([40, 10], "auto", 10, budget=1) == [[0], [1]]


@pytest.mark.parametrize("text", ["0", "-1", "many", ""])
def test_a_batch_size_is_a_number_or_auto(text):
    assert (batch_size("auto"), batch_size("12")) == ("auto", 12)
    with pytest.raises(argparse.ArgumentTypeError):
        batch_size(text)


@pytest.fixture
def processor():
    sizing = SimpleNamespace(
        size={"shortest_edge": 28**2, "longest_edge": 56**2}, patch_size=14, merge_size=2, temporal_patch_size=2
    )
    return SimpleNamespace(image_processor=sizing)


def example(name, side=60):
    return {"id": name, "images": [Image.new("RGB", (side, side))], "messages": []}


def test_images_come_fitted_and_in_order_a_few_batches_ahead(processor):
    taken = []

    def batches():
        for n in range(6):
            taken.append(n)
            yield [example(f"{n}a"), example(f"{n}b")]

    loaded = load_ahead(batches(), processor, threads=2)
    first = next(loaded)
    assert [e["id"] for e in first] == ["0a", "0b"] and taken == list(range(AHEAD + 1))
    assert all(e["fitted"] and e["images"][0].size == (56, 56) for e in first)
    assert [e["id"] for batch in loaded for e in batch] == [f"{n}{c}" for n in range(1, 6) for c in "ab"]


def test_a_bad_image_is_named_where_its_batch_would_be_and_no_thread_stays(processor):
    before = threading.active_count()
    bad = {"id": "bad", "images": [{"bytes": b"no image", "path": None}], "messages": []}
    loaded = load_ahead(iter([[example("good")], [bad]]), processor, threads=2)
    assert next(loaded)[0]["id"] == "good"
    with pytest.raises(ValueError, match="sample 'bad', image 0"):
        next(loaded)
    assert threading.active_count() == before


def test_a_batch_that_does_not_fit_is_halved_and_later_ones_at_once(capsys):
    asked = []

    def ask(rows):
        asked.append(len(rows))
        if len(rows) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return [row * 10 for row in rows]

    parts = FittingParts(ask)
    assert parts(list(range(9))) == [n * 10 for n in range(9)]
    assert parts(list(range(4))) == [0, 10, 20, 30]
    assert asked == [9, 5, 3, 2, 3, 1, 3, 1]
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"out of memory with {a} questions: going on with {b}" for a, b in ((9, 5), (5, 3))]


def test_other_errors_and_single_questions_are_not_halved():
    def fail(error):
        raise error

    for error, rows in ((RuntimeError("shapes"), [1, 2]), (torch.OutOfMemoryError("CUDA out of memory."), [1])):
        with pytest.raises(RuntimeError, match=str(error)):
            FittingParts(lambda rows, error=error: fail(error))(rows)
