"""The level of confidence under which answers are withheld, found on the validation split."""

import numpy as np
import pytest

from evaluation.abstention import MIN_GIVEN, abstention_level
from evaluation.calibration import LabelScores, probability_metrics
from publishing.metric_notes import abstention_note

NEVER = {"target": 0.9, "confidence": None, "accuracy": None, "coverage": None}


def sure(confidences, correct):
    """Probabilities of two labels with these confidences in the first, and the true labels."""
    confidences = np.array(confidences)
    return np.stack([confidences, 1 - confidences], axis=1), np.where(correct, 0, 1)


def test_the_level_is_the_lowest_confidence_above_which_nine_of_ten_are_right():
    right = [True] * 36 + [False] * 14  # the fortieth answer is the last at which 36 are right of at most 40
    confidences = np.linspace(0.99, 0.5, 50)
    found = abstention_level(*sure(confidences, right))
    level = {"confidence": round(confidences[39], 6), "accuracy": 0.9, "coverage": 0.8}
    assert found == {"target": 0.9, "samples": 50, **level}


def test_with_all_right_the_level_is_the_lowest_confidence_that_was_seen():
    found = abstention_level(*sure(np.linspace(0.99, 0.6, 30), [True] * 30))
    assert (found["confidence"], found["accuracy"], found["coverage"]) == (0.6, 1.0, 1.0)


def test_a_few_confident_answers_are_no_level():
    right = [True] * (MIN_GIVEN - 3) + [False] * 30
    found = abstention_level(*sure(np.linspace(0.99, 0.5, len(right)), right))
    assert found == {**NEVER, "samples": len(right)}
    assert abstention_note(found).startswith("At no confidence were 90% of the answers right, of 47 of the validation")
    assert abstention_level(*sure([0.9] * (MIN_GIVEN - 1), [True] * (MIN_GIVEN - 1))) is None


def test_equal_confidences_are_given_or_withheld_together():
    right = [True] * 20 + [True] * 3 + [False] * 7  # ten answers at 0.6, of which three are right
    found = abstention_level(*sure([0.9] * 20 + [0.6] * 10, right))
    assert (found["confidence"], found["coverage"]) == (0.9, pytest.approx(20 / 30, abs=1e-6))


def test_the_level_is_in_the_metrics_after_temperature_scaling():
    true = np.array([0, 1] * 30)
    logits = np.stack([true == 0, true == 1], axis=1) * 6.0
    logits[:3] = logits[:3, ::-1]  # three of sixty are wrong
    validation = LabelScores(["a", "b"], logits, true, np.arange(60))
    found = probability_metrics(validation, validation=validation, sensitivity_of=[])
    level = 1 / (1 + np.exp(-6 / found["temperature"]))
    assert found["abstain"]["confidence"] == pytest.approx(level, abs=1e-4)
    assert found["abstain"]["accuracy"] == 0.95
    assert abstention_note(found["abstain"]) == (
        f"The level at which to abstain is a confidence, after temperature scaling, of {level:.3f}: 95.0% of the "
        "answers from there on were right, which are 100.0% of the 60 of the validation split."
    )
    assert "abstain" not in probability_metrics(validation, sensitivity_of=[])
