"""The confidence under which an answer should be withheld: above it, nine of ten answers were right."""

import numpy as np

TARGET_ACCURACY = 0.9  # of the answers that are given
MIN_GIVEN = 20  # answers that a level must rest on; fewer are above it by chance


def abstention_level(probabilities: np.ndarray, true: np.ndarray) -> dict | None:
    """Return the lowest confidence from which on the answers are right as often as `TARGET_ACCURACY`.

    Args:
        probabilities: of K labels for N samples, shape (N, K).
        true: number of each sample's label, shape (N,).

    Returns:
        `target`, the number of `samples`, the level as `confidence`, the `accuracy` of the answers that have at least
        this confidence, and their share as `coverage`. The last three are None when no level gives `MIN_GIVEN` answers
        that are right so often. None for fewer samples than that.

    Source:
        Geifman and El-Yaniv, Selective Classification for Deep Neural Networks, 2017; here without their bound.
    """
    if len(true) < MIN_GIVEN:
        return None
    confidence, correct = probabilities.max(1), probabilities.argmax(1) == true
    order = np.argsort(-confidence, kind="stable")
    given = np.arange(1, len(true) + 1)
    accuracy = correct[order].cumsum() / given
    last_of_equals = np.append(np.diff(confidence[order]) < 0, True)  # equal ones are given or withheld together
    reached = np.flatnonzero((accuracy >= TARGET_ACCURACY) & (given >= MIN_GIVEN) & last_of_equals)
    found = {"target": TARGET_ACCURACY, "samples": len(true), "confidence": None, "accuracy": None, "coverage": None}
    if len(reached):
        most = reached[-1]
        values = confidence[order][most], accuracy[most], given[most] / len(true)
        found |= zip(("confidence", "accuracy", "coverage"), (round(float(value), 6) for value in values), strict=True)
    return found
