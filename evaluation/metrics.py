"""Numbers from answers: how often the diagnosis is right, for whom, and how sure one can be of the number itself."""

from dataclasses import dataclass

import numpy as np
import sacrebleu
from rouge_score import rouge_scorer
from scipy import sparse
from scipy.stats import binomtest
from sklearn.metrics import precision_recall_fscore_support

from evaluation.label_matching import NONE, SEVERAL

RESAMPLES = 1000
AGE_BANDS = ((20, "under 20"), (40, "20 to 39"), (60, "40 to 59"), (80, "60 to 79"), (np.inf, "80 and over"))
FIGURES = ("accuracy", "balanced_accuracy", "macro_f1", "no_label", "several_labels")
DIGITS = 6  # of every number written down: enough to compare, and the same on every machine


@dataclass(frozen=True)
class Diagnoses:
    """What N answers say, by number: K labels, then none, then several.

    Attributes:
        labels: the K labels.
        true: each sample's label, shape (N,).
        answered: the label that each answer names, 0 to K + 1, shape (N,).
        groups: each sample's group, shape (N,); samples of one patient or lesion are not independent.
    """

    labels: list[str]
    true: np.ndarray
    answered: np.ndarray
    groups: np.ndarray

    def of(self, chosen: np.ndarray) -> "Diagnoses":
        return Diagnoses(self.labels, self.true[chosen], self.answered[chosen], self.groups[chosen])


def read_diagnoses(rows: list[dict], labels: list[str]) -> Diagnoses:
    """Number the labels of rows with `id`, `label`, `answered` and `group`; a row without a group is its own."""
    number = {label: index for index, label in enumerate((*labels, NONE, SEVERAL))}
    names = [("group", row["source"], row["group"]) if row["group"] else ("id", row["id"]) for row in rows]
    order = {name: index for index, name in enumerate(dict.fromkeys(names))}
    return Diagnoses(
        labels=list(labels),
        true=np.array([number[row["label"]] for row in rows], dtype=int),
        answered=np.array([number[row["answered"]] for row in rows], dtype=int),
        groups=np.array([order[name] for name in names], dtype=int),
    )


def resample(groups: np.ndarray, *, seed: int = 0, resamples: int = RESAMPLES) -> np.ndarray:
    """Draw whole groups with replacement and return how often each sample is drawn, shape (resamples, N)."""
    names, members = np.unique(groups, return_inverse=True)
    drawn = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), size=resamples)
    return drawn[:, members].astype(np.float64)


def interval(value: float, resampled: np.ndarray) -> dict:
    """Return a value with the middle 95 % of its resampled values; no interval where resampling cannot change it."""
    kept = resampled[~np.isnan(resampled)]
    if np.isnan(value):
        return {"value": None, "low": None, "high": None}
    low, high = np.percentile(kept, [2.5, 97.5]) if len(kept) else (value, value)
    if low == high:
        return {"value": rounded(value), "low": None, "high": None}
    return {"value": rounded(value), "low": rounded(low), "high": rounded(high)}


def rounded(value: float) -> float:
    return round(float(value), DIGITS)


def confusion(diagnoses: Diagnoses, weights: np.ndarray) -> np.ndarray:
    """Return how often each label is answered by what, for each row of weights: shape (R, K, K + 2)."""
    size = len(diagnoses.labels)
    cell = diagnoses.true * (size + 2) + diagnoses.answered
    ones = sparse.csr_matrix((np.ones(len(cell)), (np.arange(len(cell)), cell)), shape=(len(cell), size * (size + 2)))
    return (weights @ ones).reshape(len(weights), size, size + 2)


def figures(counts: np.ndarray) -> dict[str, np.ndarray]:
    """Return the diagnosis' figures for each of R tables of counts (R, K, K + 2): shapes (R,).

    Balanced accuracy and macro-F1 are means over the labels that occur. An answer without one label is wrong.
    """
    size = counts.shape[1]
    right = np.einsum("rkk->rk", counts[:, :, :size])
    support, answered, total = counts.sum(2), counts[:, :, :size].sum(1), counts.sum((1, 2))
    occurs = support > 0
    recall = np.divide(right, support, out=np.zeros_like(right), where=occurs)
    both = support + answered
    f1 = np.divide(2 * right, both, out=np.zeros_like(right), where=both > 0)
    return {
        "accuracy": right.sum(1) / total,
        "balanced_accuracy": recall.sum(1) / occurs.sum(1),
        "macro_f1": np.where(occurs, f1, 0).sum(1) / occurs.sum(1),
        "no_label": counts[:, :, size].sum(1) / total,
        "several_labels": counts[:, :, size + 1].sum(1) / total,
    }


def with_intervals(diagnoses: Diagnoses, names: tuple[str, ...] = FIGURES, *, seed: int = 0) -> dict[str, dict]:
    """Return the named figures with bootstrap intervals.

    An accuracy that no resample changes (all right, or all wrong) gets the exact binomial interval over the groups.
    """
    points = figures(confusion(diagnoses, np.ones((1, len(diagnoses.true)))))
    spread = figures(confusion(diagnoses, resample(diagnoses.groups, seed=seed)))
    found = {name: interval(points[name][0], spread[name]) for name in names}
    if found["accuracy"]["low"] is None:
        groups = len(np.unique(diagnoses.groups))
        low, high = binomtest(round(points["accuracy"][0] * groups), groups).proportion_ci()
        found["accuracy"] |= {"low": rounded(low), "high": rounded(high)}
    return found


def diagnosis(diagnoses: Diagnoses, *, seed: int = 0) -> dict:
    """Return every figure of the diagnosis, by label and as a confusion matrix."""
    counts = confusion(diagnoses, np.ones((1, len(diagnoses.true))))[0].astype(int)
    columns = [*diagnoses.labels, NONE, SEVERAL]
    every = range(len(diagnoses.labels))
    table = precision_recall_fscore_support(diagnoses.true, diagnoses.answered, labels=list(every), zero_division=0)
    per_label = {
        label: {name: rounded(figure[n]) for name, figure in zip(("precision", "recall", "f1"), table, strict=False)}
        | {"support": int(table[3][n])}
        for n, label in enumerate(diagnoses.labels)
    }
    wrong = [(int(counts[i, j]), i, j) for i in every for j in range(len(columns)) if i != j and counts[i, j]]
    top = sorted(wrong, key=lambda entry: (-entry[0], entry[1:]))[:10]
    return {
        **with_intervals(diagnoses, seed=seed),
        "per_label": per_label,
        "confusion": {"rows": diagnoses.labels, "columns": columns, "counts": counts.tolist()},
        "top_confusions": [{"label": columns[i], "answered": columns[j], "count": count} for count, i, j in top],
    }


def compare(ours: Diagnoses, theirs: Diagnoses, *, seed: int = 0) -> dict:
    """Return paired differences, ours minus theirs on the same samples in the same order, and McNemar's exact test."""
    weights, whole = resample(ours.groups, seed=seed), np.ones((1, len(ours.true)))
    points = [figures(confusion(diagnoses, whole)) for diagnoses in (ours, theirs)]
    spread = [figures(confusion(diagnoses, weights)) for diagnoses in (ours, theirs)]
    right, their_right = (diagnoses.answered == diagnoses.true for diagnoses in (ours, theirs))
    better, worse = int((right & ~their_right).sum()), int((~right & their_right).sum())
    p = binomtest(better, better + worse).pvalue if better + worse else 1.0
    return {
        name: {"difference": interval(points[0][name][0] - points[1][name][0], spread[0][name] - spread[1][name])}
        for name in FIGURES[:3]
    } | {"mcnemar": {"better": better, "worse": worse, "p": float(f"{p:.3g}")}}


def subgroups(rows: list[dict], diagnoses: Diagnoses, column: str, *, smallest: int, seed: int = 0) -> dict | None:
    """Return the figures for each value of a column, the worst group by accuracy, and the gap to the best.

    Groups of fewer than `smallest` samples are named without their figures: a share of three says nothing, and may
    point at a person. None when the column holds fewer than two values.
    """
    values = np.array([band(row[column]) if column == "age" else row[column] or "unknown" for row in rows])
    bands = [name for _, name in AGE_BANDS]
    order = {name: (bands.index(name) if name in bands else -1, name) for name in values.tolist()}
    names = sorted(order, key=lambda name: (name == "unknown", order[name]))
    if len(names) < 2:
        return None
    groups = {}
    for name in names:
        chosen = diagnoses.of(values == name)
        size = len(chosen.true)
        shown = with_intervals(chosen, FIGURES[:3], seed=seed) if size >= smallest else {"suppressed": True}
        groups[name] = {"samples": size, **shown}
    ranked = sorted((group["accuracy"]["value"], name) for name, group in groups.items() if "accuracy" in group)
    gap = rounded(ranked[-1][0] - ranked[0][0]) if ranked else 0.0
    worst = {"worst": ranked[0][1], "gap": gap} if gap else {}
    return {"groups": groups, **worst}


def band(age: str | None) -> str:
    """Return the band of an age in years; other texts, such as bands of a source's own, stay as they are."""
    try:
        years = float(age)
    except (TypeError, ValueError):
        return age or "unknown"
    return next(name for limit, name in AGE_BANDS if years < limit)


def text_scores(references: list[str], predictions: list[str]) -> dict:
    """Return BLEU and chrF of the whole set (0 to 100), mean ROUGE-L, share of exact matches, and ratio of words."""
    scorer = rouge_scorer.RougeScorer(["rougeL"])
    pairs = list(zip(references, predictions, strict=True))
    words = [sum(len(text.split()) for text in texts) for texts in (predictions, references)]
    return {
        "bleu": rounded(sacrebleu.corpus_bleu(predictions, [references]).score),
        "chrf": rounded(sacrebleu.corpus_chrf(predictions, [references]).score),
        "rouge_l": rounded(np.mean([scorer.score(*pair)["rougeL"].fmeasure for pair in pairs])),
        "exact_match": rounded(np.mean([reference.strip() == prediction.strip() for reference, prediction in pairs])),
        "length_ratio": rounded(words[0] / max(1, words[1])),
    }
