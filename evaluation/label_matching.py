"""Which samples ask for their label, and the wording of an answer that names a label."""

from collections import Counter, defaultdict

from data_prep.labels import LabelMap, describe_unread, find_label, label_key, read_label, strip_thinking

LABEL_PLACEHOLDER = "{label}"


def asks_for_label(sample: dict, label_map: LabelMap) -> bool:
    """Return whether a reference answer names the sample's label and no other, and no earlier turn gives it away."""
    if sample.get("label_known"):
        return False
    return sample["label"] is not None and read_label(sample["reference"], label_map) == sample["label"]


def describe_unread_rows(rows: list[dict], label_map: LabelMap, *, quote: bool) -> str | None:
    """Return the warning of `describe_unread` about the questions of a run; a sample may have several."""
    answers = defaultdict(list)
    for row in rows:
        if row["label"] is not None:
            answers[row["id"], row["label"]].append(row["reference"])
    return describe_unread([(label, tuple(texts)) for (_, label), texts in answers.items()], label_map, quote=quote)


def answer_templates(samples: list[dict], label_map: LabelMap) -> dict[str, str]:
    """Return the most frequent wording of the answers to each question, with `{label}` in place of the label.

    One wording serves all labels, so that an article as in "This is an eczema." does not reveal the label. The key ""
    holds the most frequent wording of all questions.

    Args:
        samples: `question`, `reference` and `label` of samples that ask for the label.
        label_map: see `build_label_map`.
    """
    by_question, overall = defaultdict(Counter), Counter()
    for sample in samples:
        wording = _replace_label(strip_thinking(sample["reference"]), sample["label"], label_map)
        by_question[sample["question"]][wording] += 1
        overall[wording] += 1
    templates = {question: wordings.most_common(1)[0][0] for question, wordings in by_question.items()}
    return {"": overall.most_common(1)[0][0] if overall else LABEL_PLACEHOLDER, **templates}


def label_forms(samples: list[dict], label_map: LabelMap) -> dict[tuple[str | None, str], str]:
    """Return how the answers to each question name each label where they do not use its own name, as "Yes".

    Such a form takes the place of the label in the question's wording. The question None holds the most frequent form
    of all questions.

    Args:
        samples: see `answer_templates`.
        label_map: see `build_label_map`.
    """
    forms = defaultdict(Counter)
    for sample in samples:
        label, text = sample["label"], strip_thinking(sample["reference"])
        form = text[slice(*find_label(text, label, label_map))]
        for question in (sample["question"], None):
            forms[question, label][label if label_key(form) == label_key(label) else form] += 1
    return {key: counts.most_common(1)[0][0] for key, counts in forms.items()}


def _replace_label(reference: str, label: str, label_map: LabelMap) -> str:
    start, end = find_label(reference, label, label_map)
    return reference[:start] + LABEL_PLACEHOLDER + reference[end:]
