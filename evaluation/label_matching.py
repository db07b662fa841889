"""Which label an answer names, and the wording of an answer that names a label."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable

NONE, SEVERAL = "(none)", "(several)"
LABEL_PLACEHOLDER = "{label}"
PATTERN_PREFIX = "re:"


def build_label_map(labels: Iterable[str], synonyms: dict | None = None) -> dict[str, list[re.Pattern]]:
    """Return the patterns that find each label in an answer: its name and its synonyms.

    Args:
        labels: the labels of the data.
        synonyms: label -> list of names; one that starts with "re:" is a regular expression. Case does not matter, and
            a space in a name also matches hyphens, underscores and line breaks.

    Raises:
        ValueError: no labels, a label of the data without an entry in `synonyms`, or an invalid expression.
    """
    names = sorted(set(labels))
    if not names:
        raise ValueError("labels: no sample has a label")
    if synonyms is None:
        return {name: [_pattern(name, name)] for name in names}
    if not isinstance(synonyms, dict) or not all(isinstance(words, list) for words in synonyms.values()):
        raise ValueError("labels: expected lines of the form 'label: [name, another name]'")
    if missing := [name for name in names if name not in synonyms]:
        raise ValueError(f"labels: the data have the label {missing[0]!r}, and the label map does not")
    return {
        name: [_pattern(name, name), *(_pattern(str(word), name) for word in synonyms[name])]
        for name in sorted(map(str, synonyms))
    }


def _pattern(word: str, label: str) -> re.Pattern:
    if word.startswith(PATTERN_PREFIX):
        try:
            return re.compile(word.removeprefix(PATTERN_PREFIX), re.IGNORECASE)
        except re.error as error:
            raise ValueError(f"labels: {label!r}: {word!r} is not a regular expression: {error}") from error
    parts = [re.escape(part) for part in re.split(r"[\s_-]+", word.strip()) if part]
    if not parts:
        raise ValueError(f"labels: {label!r}: an empty name would match every answer")
    return re.compile(r"(?<!\w)" + r"[\s_-]+".join(parts) + r"(?!\w)", re.IGNORECASE)


def named_labels(text: str, label_map: dict[str, list[re.Pattern]]) -> list[str]:
    """Return the labels that a text names, in the order of the map.

    A match inside a longer match does not count: "melanocytic nevus" does not name "nevus" when both are labels.
    """
    spans = [
        (match.start(), match.end(), label)
        for label, patterns in label_map.items()
        for pattern in patterns
        for match in pattern.finditer(text)
        if match.end() > match.start()
    ]
    named = {
        label
        for start, end, label in spans
        if not any(s <= start and end <= e and e - s > end - start for s, e, _ in spans)
    }
    return [label for label in label_map if label in named]


def read_label(text: str, label_map: dict[str, list[re.Pattern]]) -> str:
    """Return the one label that a text names, else `NONE` or `SEVERAL`."""
    labels = named_labels(text, label_map)
    return labels[0] if len(labels) == 1 else SEVERAL if labels else NONE


def asks_for_label(sample: dict, label_map: dict[str, list[re.Pattern]]) -> bool:
    """Return whether a sample's reference answer names the sample's label and no other."""
    return sample["label"] is not None and read_label(sample["reference"], label_map) == sample["label"]


def answer_templates(samples: list[dict], label_map: dict[str, list[re.Pattern]]) -> dict[str, str]:
    """Return the most frequent wording of the answers to each question, with `{label}` in place of the label.

    One wording serves all labels, so that an article as in "This is an eczema." does not reveal the label. The key ""
    holds the most frequent wording of all questions.

    Args:
        samples: `question`, `reference` and `label` of samples that ask for the label.
        label_map: see `build_label_map`.
    """
    by_question, overall = defaultdict(Counter), Counter()
    for sample in samples:
        wording = _replace_label(sample["reference"], label_map[sample["label"]])
        by_question[sample["question"]][wording] += 1
        overall[wording] += 1
    templates = {question: wordings.most_common(1)[0][0] for question, wordings in by_question.items()}
    return {"": overall.most_common(1)[0][0] if overall else LABEL_PLACEHOLDER, **templates}


def _replace_label(reference: str, patterns: list[re.Pattern]) -> str:
    match = max((m for p in patterns for m in p.finditer(reference)), key=lambda m: m.end() - m.start())
    return reference[: match.start()] + LABEL_PLACEHOLDER + reference[match.end() :]
