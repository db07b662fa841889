"""Sampling weights do what they say, and drawing by them is even."""

from collections import Counter

import pytest

from data_prep.balance import draw, effective_counts, sampling_weights

LABELS = ["nevus"] * 90 + ["melanoma"] * 10


@pytest.mark.parametrize(("balance", "expected"), [("none", (90, 10)), ("sqrt", (75, 25)), ("full", (50, 50))])
def test_effective_counts_follow_the_mode(balance, expected):
    weights = sampling_weights(LABELS, ["a"] * 100, balance=balance)
    counts = effective_counts(LABELS, weights)
    assert (counts["nevus"], counts["melanoma"]) == pytest.approx(expected)
    assert sum(weights) == pytest.approx(100)


def test_sources_get_the_shares_asked_for_and_labels_stay_balanced_within():
    sources = ["a"] * 50 + ["b"] * 50
    weights = sampling_weights(LABELS, sources, balance="full", shares={"a": 3, "b": 1})
    assert sum(weights[:50]) == pytest.approx(75)
    # source b holds 40 nevi at 1/90 and 10 melanomas at 1/10
    assert sum(weights[90:]) == pytest.approx(25 * 1 / (1 + 40 / 90))


def test_draw_takes_each_sample_about_as_often_as_its_weight_says():
    weights = sampling_weights(LABELS, ["a"] * 100, balance="full")
    drawn = draw(weights, seed=3)
    assert len(drawn) == 100
    assert Counter(LABELS[index] for index in drawn) == {"nevus": 50, "melanoma": 50}
    assert set(Counter(index for index in drawn if index >= 90).values()) == {5}
    assert draw([1.0] * 7, seed=0) == list(range(7))
    assert draw(weights, seed=3) == drawn != draw(weights, seed=0)


def test_no_training_samples_need_no_weights():
    assert sampling_weights([], [], balance="full") == []


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="balance: expected one of none, sqrt, full, found 'half'"):
        sampling_weights(["a"], ["b"], balance="half")
