"""Sentences that the figures of an evaluation cannot be read without: on the screen, on the page and in the card."""

SAMPLES = "samples"
MEANINGS = {
    "accuracy": "share of the answers that name the right label and no other",
    "balanced_accuracy": "mean of the labels' recalls: a rare label counts as much as a frequent one",
    "macro_f1": "mean of the labels' F1, which false alarms lower too",
    "no_label": "share of the answers that name no label",
    "several_labels": "share that name more than one, which counts as wrong",
    "macro_auroc": "how well the labels' likelihoods rank the samples: 0.5 is chance, 1 is perfect",
    "calibration": "mean distance of confidence from accuracy: 0 is best",
    "bleu": "shared runs of up to four words",
    "chrf": "shared runs of characters",
    "rouge_l": "longest common sequence of words, from 0 to 1",
    "exact_match": "share of answers that are the reference, letter by letter",
    "length_ratio": "words of the answers by words of the references",
}


def has_clusters(metrics: dict) -> bool:
    """Return whether samples depend on each other, so that tables show both numbers."""
    return metrics.get("cluster_unit", SAMPLES) != SAMPLES


def describe_size(samples: int, clusters: int, unit: str) -> str:
    """Return "30 samples of 3 patients or lesions"."""
    return f"{samples:,} {SAMPLES}" + ("" if unit == SAMPLES else f" of {clusters:,} {unit}")


def trained_note(counts: dict) -> str:
    """Return what samples of the training among the evaluated ones mean, "" without them; see `load_runs`."""
    if not counts.get("trained"):
        return ""
    return (
        f"{counts['trained']:,} of these {counts['samples']:,} samples are of the training split: the figures say how "
        "well they were learnt, and not how new ones will be answered."
    )


def interval_notes(metrics: dict) -> list[str]:
    """Return what the intervals are of, or why there are none, after what comes before all figures.

    Args:
        metrics: the content of `metrics.json`.
    """
    notes = [note] if (note := trained_note(metrics.get("evaluated", {}))) else []
    if "clusters" not in metrics:  # of an earlier version
        return notes
    clusters, unit, needed = (metrics[key] for key in ("clusters", "cluster_unit", "clusters_needed"))
    if metrics["diagnosed"] and clusters < needed:
        notes.append(f"No intervals: they need at least {needed} {unit}, and the answers are of {clusters}.")
    elif metrics["diagnosed"]:
        notes.append(f"Ranges are 95 % intervals from a bootstrap over {unit}.")
        if any(run["diagnosis"]["accuracy"]["low"] is None for run in metrics["runs"].values() if "diagnosis" in run):
            notes.append(
                "An accuracy of 0 or 1 has no range, as no resample differs. That is not certainty: what happens in "
                f"{metrics['unseen_share']:.1%} of all {unit} is missed by {clusters} one time in twenty."
            )
        notes += _auroc_notes(metrics["runs"].get("adapter", {}), metrics.get("label_clusters_needed", 0), unit)
    if not metrics["samples_with_group"]:
        notes.append(
            "No sample names a patient or lesion ('group'): if some are of one patient, intervals and p-values are "
            "too small, and training may have seen the patients of the test."
        )
    return notes


def _auroc_notes(run: dict, needed: int, unit: str) -> list[str]:
    """Return why macro-AUROC has no range where a label has too few patients or lesions."""
    counts = {label: row["clusters"] for label, row in run["diagnosis"]["per_label"].items() if row.get("clusters")}
    few = min(counts, key=counts.get)
    if "probabilities" not in run or counts[few] >= needed:
        return []
    return [f"Macro-AUROC has no range: it needs at least {needed} {unit} of each label, and {few} has {counts[few]}."]


def base_notes(metrics: dict) -> list[str]:
    """Return how the adapter differs from the base model, and which part of a gain is knowledge and which is form."""
    against = metrics.get("against_base", {})
    if "permutation_test" not in against:
        return []
    test, unit = against["permutation_test"], metrics["cluster_unit"]
    return [
        f"The accuracy differs from that of the base model alone by {_signed(against['accuracy']['difference'])}. "
        f"Only the adapter is correct on {test['better']:,} samples, only the base model on {test['worse']:,} "
        f"(permutation test over {against['clusters']:,} {unit}, p = {test['p']:.2g}).",
        *_gain_notes(against.get("gain"), metrics["runs"]["base"]["diagnosis"]),
    ]


def _gain_notes(gain: dict | None, base: dict) -> list[str]:
    form = f"The base model {form_problem(base)}."
    if gain is not None:
        knowledge = gain["knowledge"]
        return [
            f"{form} The likelihoods of the labels do not depend on such form: by them the adapter's accuracy differs "
            f"by {_signed(knowledge)}, p = {knowledge['p']:.2g}, which is knowledge. "
            f"The other {_signed(gain['form'])} of the difference is form."
        ]
    if base["no_label"]["value"] + base["several_labels"]["value"] > 0:
        return [f"{form} Part of the difference is form; without the likelihoods of the labels nobody knows how much."]
    return []


def form_problem(base: dict) -> str:
    """Return how often a run's answers name no label, or several; `base` is its `diagnosis`."""
    none, several = (base[key]["value"] for key in ("no_label", "several_labels"))
    return f"names no label in {none:.1%} of its answers" + (f" and several in {several:.1%}" if several else "")


def shuffled_notes(metrics: dict) -> list[str]:
    """Return the accuracy with the images of other samples, beside that on the same samples, and who is left out."""
    left_out, against = metrics.get("shuffled_left_out", 0), metrics.get("against_shuffled")
    reason = "without images, or no other sample shows as many other images"
    notes = []
    if against is not None and "our_accuracy" in against:
        unit = metrics["cluster_unit"]
        accuracy = metrics["runs"]["shuffled"]["diagnosis"]["accuracy"]["value"]
        size = describe_size(against["samples"], against["clusters"], unit)
        notes.append(
            f"With the images shuffled among the questions the accuracy is {accuracy:.3f}; on the same {size} it is "
            f"{against['our_accuracy']:.3f} with their own images (permutation test, p = "
            f"{against['permutation_test']['p']:.2g}). {metrics['shuffled_same_label']:.1%} of the shuffled images "
            "have the label of the original, which is the accuracy of a model that is always right about its image."
        )
    if left_out:
        notes.append(f"Left out of the shuffled control: {left_out:,} of {metrics['samples']:,} samples ({reason}).")
    return notes


def sensitivity_title(label: str, row: dict) -> str:
    """Return the name of a sensitivity with the origin of its threshold."""
    origin = {"validation": ", threshold from the validation split", "evaluated": ", threshold from the same samples"}
    return (
        f"sensitivity for {label} at {row['specificity']:.0%} specificity{origin.get(row.get('threshold_from'), '')}"
    )


def threshold_note(row: dict) -> str:
    """Return what a sensitivity's threshold was taken from, and what that means."""
    if row["threshold_from"] == "validation":
        return f"the threshold has that specificity on {row['threshold_negatives']:,} samples of the validation split"
    return "the threshold is from the evaluated samples themselves, which makes the sensitivity too high"


def abstention_note(level: dict) -> str:
    """Return what the evaluation says about answers to withhold; `level` is that of `abstention_level`."""
    samples = f"{level['samples']:,} of the validation split"
    if level["confidence"] is None:
        return f"At no confidence were {level['target']:.0%} of the answers right, of {samples}: rely on none of them."
    return (
        f"The level at which to abstain is a confidence, after temperature scaling, of {level['confidence']:.3f}: "
        f"{level['accuracy']:.1%} of the answers from there on were right, which are {level['coverage']:.1%} of the "
        f"{samples}."
    )


def _signed(metric: dict) -> str:
    value = f"{metric['value']:+.3f}"
    return value if metric["low"] is None else f"{value} ({metric['low']:+.3f} to {metric['high']:+.3f})"
