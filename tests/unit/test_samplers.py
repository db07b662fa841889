"""Batches for padding: the same samples in each step for any number of processes, another order in each epoch."""

from itertools import chain, cycle, islice

import pytest

from training.samplers import EpochOrder, LengthGroupedOrder, PaddedSampler, split_evenly

SIZES = [1, 2, 7, 32, 33, 35]


def steps(sampler, processes):
    """Return the samples of each step of all processes together."""
    batches = list(sampler)
    assert len(batches) == len(sampler)
    return [list(chain(*batches[n : n + processes])) for n in range(0, len(batches), processes)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("processes", [2, 4])
def test_a_step_of_several_processes_holds_the_samples_of_one_process_with_a_larger_batch(size, processes):
    whole = list(PaddedSampler(EpochOrder(size, seed=3), 4))
    shared = steps(PaddedSampler(EpochOrder(size, seed=3), 4 // processes, processes=processes), processes)
    order = list(EpochOrder(size, seed=3))
    assert whole == [order[n : n + 4] for n in range(0, size, 4)]
    for one, many in zip(whole, shared, strict=True):
        assert many[: len(one)] == one
        # fewer samples than processes: each process needs one
        assert many[len(one) :] == list(islice(cycle(order), max(0, processes - len(one))))


@pytest.mark.parametrize("size", SIZES)
def test_without_the_last_samples_all_batches_are_full(size):
    batches = list(PaddedSampler(EpochOrder(size, seed=0), 2, processes=2, drop_last=True))
    assert len(batches) == size // 4 * 2 and all(len(batch) == 2 for batch in batches)


def test_the_order_depends_on_seed_and_epoch_alone():
    orders = set()
    for seed in (0, 1):
        for epoch in (0, 1):
            order = EpochOrder(20, seed=seed)
            order.set_epoch(epoch)
            assert list(order) == list(order) and sorted(order) == list(range(20))
            orders.add(tuple(order))
    assert len(orders) == 4
    assert list(EpochOrder(5, seed=0, shuffle=False)) == [0, 1, 2, 3, 4]


def test_samples_of_similar_length_share_a_step_of_all_processes():
    lengths = [10 * (n % 7) for n in range(64)]
    shuffled, grouped = EpochOrder(64, seed=0), LengthGroupedOrder(lengths, seed=0, group=4)
    spread = [
        sum(
            max(lengths[n] for n in step) - min(lengths[n] for n in step) for step in steps(PaddedSampler(order, 4), 1)
        )
        for order in (shuffled, grouped)
    ]
    assert spread[1] < 0.5 * spread[0]
    first = list(grouped)
    grouped.set_epoch(1)
    assert sorted(first) == list(range(64)) and list(grouped) != first


def test_parts_differ_by_one_at_most():
    assert split_evenly([1, 2, 3, 4, 5], 2) == [[1, 2], [3, 4, 5]]
    assert split_evenly([1, 2], 2) == [[1], [2]]


def test_no_batch_is_empty_however_few_samples_there_are():
    assert list(PaddedSampler(EpochOrder(1, seed=0), 1, processes=4)) == [[0]] * 4
    assert list(PaddedSampler(EpochOrder(3, seed=0, shuffle=False), 2, processes=8)) == [[n % 3] for n in range(8)]
