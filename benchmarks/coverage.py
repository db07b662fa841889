"""How often 95 % intervals cover the truth, and how often a test finds a difference that does not exist.

    python -m benchmarks.coverage

Patients differ in how often the answers about them are right, in each of two runs that are equally good on average.
Each row is 300 data sets of so many patients, with one to three samples each or with ten, evaluated by the functions
that `eval_sft.py` uses. The truth is the value in 100,000 patients. The last column is the share of data sets with an
interval of macro-AUROC.
"""

import itertools
import os
import platform
from datetime import date

import numpy as np

from evaluation.calibration import LabelScores, probability_metrics
from evaluation.comparison import compare_paired
from evaluation.metrics import MAIN_METRICS, Diagnoses, compute_metrics, confusion_counts, metrics_with_intervals

DRAWS = 300
MIN_INTERVALS = 50  # for a share of those that cover the truth; not all data sets have all of them
PATIENTS = (10, 15, 30, 60)
SAMPLES = {"1 to 3": (1, 3), "10": (10, 10)}
SKILLS = {0.71: (4, 1.6), 0.9: (9, 1)}  # mean: parameters of a beta distribution


def draw(rng: np.random.Generator, patients: int, samples: tuple[int, int], skill: tuple[float, float], size: int):
    """Return the diagnoses of two equally good runs, and the labels' scores of the first."""
    patient = np.repeat(np.arange(patients), rng.integers(samples[0], samples[1] + 1, patients))
    true = rng.integers(0, size, patients)[patient]
    labels = [str(number) for number in range(size)]
    runs = []
    for _ in range(2):
        right_share = rng.beta(*skill, patients)[patient]
        wrong = (true + rng.integers(1, size, len(true))) % size
        answered = np.where(rng.random(len(true)) < right_share, true, wrong)
        runs.append(Diagnoses(labels, true, answered, patient))
    logits = np.eye(size)[true] + rng.normal(0, 0.8, (patients, size))[patient] + rng.normal(0, 0.8, (len(true), size))
    return *runs, LabelScores(labels, logits, true, patient)


def true_values(rng: np.random.Generator, samples: tuple, skill: tuple, size: int) -> dict[str, float]:
    first, _, scores = draw(rng, 100_000, samples, skill, size)
    values = {name: value[0] for name, value in compute_metrics(confusion_counts(first)).items()}
    probability = np.exp(scores.logits) / np.exp(scores.logits).sum(1, keepdims=True)
    ranks = probability[:, 0].argsort().argsort()  # all labels are alike: the AUROC of the first is the mean
    positive = scores.true == 0
    above = ranks[positive].sum() - positive.sum() * (positive.sum() - 1) / 2
    values["macro_auroc"] = above / positive.sum() / (~positive).sum()
    return {name: values[name] for name in (*MAIN_METRICS, "macro_auroc")} | {"difference": 0.0}


def measure(rng: np.random.Generator, patients: int, samples: tuple, skill: tuple, size: int) -> dict[str, float]:
    """Return the share of intervals that cover the truth, by metric, and of p-values below 0.05."""
    truth = true_values(rng, samples, skill, size)
    covered, found = {name: [] for name in truth}, []
    for _ in range(DRAWS):
        first, second, scores = draw(rng, patients, samples, skill, size)
        against = compare_paired(first, second)
        intervals = metrics_with_intervals(first, MAIN_METRICS) | {"difference": against["accuracy"]["difference"]}
        intervals["macro_auroc"] = probability_metrics(scores, sensitivity_of=[])["macro_auroc"]
        for name, value in intervals.items():
            if value["low"] is not None:
                covered[name].append(value["low"] - 1e-6 <= truth[name] <= value["high"] + 1e-6)
        found.append(against["permutation_test"]["p"] < 0.05)
    shares = {name: float(np.mean(hits)) if len(hits) >= MIN_INTERVALS else np.nan for name, hits in covered.items()}
    return shares | {"p < 0.05": float(np.mean(found)), "auroc intervals": len(covered["macro_auroc"]) / DRAWS}


def main() -> None:
    print(f"{date.today()}, {platform.machine()}, {os.cpu_count()} cores, numpy {np.__version__}; {DRAWS} draws a row")
    titles = [*MAIN_METRICS, "macro_auroc", "difference", "p < 0.05", "auroc intervals"]
    print("| patients | samples each | labels | accuracy about | " + " | ".join(titles) + " |")
    print("|" + "---|" * (4 + len(titles)))
    for patients, (each, samples), size, (mean, skill) in itertools.product(
        PATIENTS, SAMPLES.items(), (2, 4), SKILLS.items()
    ):
        shares = measure(np.random.default_rng(0), patients, samples, skill, size)
        cells = [patients, each, size, mean, *(f"{shares[name]:.3f}" for name in titles)]
        print(f"| {' | '.join(map(str, cells))} |", flush=True)


if __name__ == "__main__":
    main()
