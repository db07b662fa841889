"""Batches are divided among processes by what they cost."""

import random
from itertools import chain

import pytest

from evaluation.batching import prompt_lengths
from evaluation.dealing import batch_costs, deal
from evaluation.questions import read_questions


def test_the_dearest_batches_go_first_and_each_process_keeps_their_order():
    costs = [9, 1, 1, 8, 1, 1, 7]
    shares = deal(list("abcdefg"), costs, 2)
    assert shares == [["a", "b", "c", "e", "f"], ["d", "g"]]
    assert deal([1], [5], 3) == [[1], [], []] and deal([], [], 2) == [[], []]


@pytest.mark.parametrize("seed", range(5))
def test_no_process_has_more_than_the_others_by_more_than_one_batch(seed):
    rng = random.Random(seed)
    costs = [rng.randint(1, 100) for _ in range(50)]
    shares = deal(list(range(50)), costs, 4)
    assert sorted(chain(*shares)) == list(range(50))
    loads = [sum(costs[n] for n in share) for share in shares]
    assert max(loads) - min(loads) <= max(costs)


def test_a_batch_costs_its_longest_prompt_for_each_row(demo_splits, processor):
    from collator import collate_prompts

    questions = read_questions(demo_splits["train"])
    lengths = prompt_lengths(questions, processor)
    for n in range(0, len(lengths), 7):
        tokens = collate_prompts(processor, [questions[n]])["input_ids"].size(1)
        assert 0 < tokens - lengths[n] < 40  # the chat template's own
    runs = {"adapter": questions, "validation": read_questions(demo_splits["validation"], generate=False)}
    batches = [("adapter", range(0, 8)), ("validation", range(0, 2))]
    longest = max(prompt_lengths(runs["validation"], processor)[:2])
    assert batch_costs(batches, runs, processor, 100) == [8 * (max(lengths[:8]) + 100), 2 * longest]
