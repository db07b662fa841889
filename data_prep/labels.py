"""Which label a text names: labels, their other spellings and names, in any script."""

from collections import Counter
from collections.abc import Callable, Iterable
from itertools import groupby
from operator import itemgetter

import regex

from common.unicode_text import normalise, original_span, simplify, word_class

from .inflection import SEPARATOR, Changes, find_changes
from .reading import describe, suggest

NONE, SEVERAL = "(none)", "(several)"
PATTERN_PREFIX = "re:"
MAX_SHOWN = 3  # references that name no label

LabelMap = dict[str, list[regex.Pattern]]
Reference = tuple[str, tuple[str, ...]]  # a sample's label, and its answers

# Before a name these make another word: "non-" in Chinese, Japanese and Thai, which have no borders of words.
_NEGATIONS = "(?<!(?:[不非未无無没沒]|ไม่))"
_ARABIC = regex.compile(r"\p{Arabic}")
_PROCLITICS = "(?:[وف]?(?:[بكل]?ال|لل|[بكل])?)"  # and, so; in, as, for; the: written with the next word
_NEGATIVE, _MINUS = regex.compile(r"[\p{Pd}\u2212](?=\d)"), regex.compile(r"(?<=\w)[\p{Pd}\u2212]$")
_FLAGS = regex.DOTALL | regex.IGNORECASE
_THOUGHT = regex.compile(r"<think(?:ing)?>.*?</think(?:ing)?>", _FLAGS)
_REST_OF_THOUGHT = regex.compile(r"^.*</think(?:ing)?>", _FLAGS)
_UNCLOSED = regex.compile(r"<think(?:ing)?>.*$", _FLAGS)


def build_label_map(
    labels: Iterable[str], synonyms: dict | None = None, references: Iterable[Reference] = ()
) -> LabelMap:
    """Return the patterns that find each label in an answer: its name and its synonyms.

    Case, white space, hyphens and everything that `normalise` removes do not matter. A name is found as a whole word
    where the script has spaces between words, and anywhere where it has none. Its inflected forms are learned from
    `references`, see `inflection`; an Arabic name is also found with its article and prefixes.

    Args:
        labels: the labels of the data.
        synonyms: label -> name or list of names; one that starts with "re:" is a regular expression, matched to the
            normalised text regardless of case.
        references: label and reference answers of each labelled sample.

    Raises:
        ValueError: no labels, a label of the data without an entry in `synonyms`, or an invalid expression.
    """
    names = _names_of(sorted(set(labels)), synonyms)
    label_map = _compile(names, Changes())
    split = {label: [split_name(n) for n in names[label] if not n.startswith(PATTERN_PREFIX)] for label in names}
    references = Counter(references)
    own, other = Counter(), Counter()
    for (label, texts), count in references.items():
        if label in label_map and not _is_named(label, texts, label_map):
            _count_changes(own, texts, split[label], count)
    if not own:
        return label_map
    for (label, texts), count in references.items():
        others = [words for name in split if name != label for words in split[name]]
        _count_changes(other, texts, others, count)
    return _compile(names, Changes(own, other), label_map)


def _names_of(labels: list[str], synonyms: dict | None) -> dict[str, list[str]]:
    """Return all names of each label, under the spelling of the data."""
    if not labels:
        raise ValueError("labels: no sample has a label")
    if synonyms is None:
        return {label: [label] for label in labels}
    check_names(synonyms)
    spelling = {label_key(label): label for label in labels}
    keys = {label_key(str(label)): str(label) for label in synonyms}
    if missing := [label for label in labels if label_key(label) not in keys]:
        near = suggest(missing[0], keys.values())
        raise ValueError(f"labels: the data have the label {missing[0]!r}, and the label map does not{near}")
    names = {spelling.get(label_key(str(label)), str(label)): words for label, words in synonyms.items()}
    names = {label: words if isinstance(words, list) else [words] for label, words in names.items()}
    return {label: [label, *map(str, names[label])] for label in sorted(names)}


def check_names(synonyms) -> None:
    """Raise ValueError unless a label map is a list of texts, or one text, for each label; see `build_label_map`."""
    if not isinstance(synonyms, dict):
        rule = "expected lines of the form 'label: [name, another name]'"
        raise ValueError(f"labels: {rule}, found {describe(synonyms)}")
    for label, words in synonyms.items():
        for word in words if isinstance(words, list) else [words]:
            if not isinstance(word, str | int | float) or isinstance(word, bool) or word == PATTERN_PREFIX:
                raise ValueError(f"labels: {label!r}: expected a list of names, found {describe(word)}")
    keys = Counter(label_key(str(label)) for label in synonyms)
    if twice := [key for key, count in keys.items() if count > 1]:
        raise ValueError(f"labels: the label map has {twice[0]!r} more than once")
    _check_owners(synonyms)


def _check_owners(synonyms: dict) -> None:
    """Raise ValueError for a name of two labels: an answer with it would name both, and so neither."""
    owners = {}
    for label, words in synonyms.items():
        for word in map(str, [label, *(words if isinstance(words, list) else [words])]):
            key = word if word.startswith(PATTERN_PREFIX) else label_key(word)
            if (owner := owners.setdefault(key, label)) != label:
                raise ValueError(f"labels: {word!r} is a name of {owner!r} and of {label!r}")


def unknown_labels(synonyms: dict, labels: Iterable[str]) -> list[str]:
    """Return the labels of a map that no sample has, each with the nearest label of the data, if one is near."""
    labels = sorted(labels)
    known = set(map(label_key, labels))
    return [f"{label!r}{suggest(str(label), labels)}" for label in synonyms if label_key(str(label)) not in known]


def _compile(names: dict[str, list[str]], changes: Changes, exact: LabelMap | None = None) -> LabelMap:
    return {
        label: [_compile_name(word, label, changes, exact or {}) for word in words] for label, words in names.items()
    }


def _compile_name(name: str, label: str, changes: Changes, exact: LabelMap) -> regex.Pattern:
    """Return the pattern of a name with its inflected forms, but for those that are another label's name."""
    if name.startswith(PATTERN_PREFIX):
        try:
            expression = simplify(name.removeprefix(PATTERN_PREFIX), "NFC")
            pattern = regex.compile(expression, regex.IGNORECASE | regex.FULLCASE)
            pattern.search("")
            return pattern
        except MemoryError as error:
            raise ValueError(f"labels: {label!r}: {name!r} calls itself without an end") from error
        except regex.error as error:
            raise ValueError(f"labels: {label!r}: {name!r} is not a regular expression: {error}") from error
    words = split_name(name)
    if not words:
        whose = "a label" if name == label else f"a name of {label!r}"
        rule = "has no letter or digit and would be found in every answer; rename it, or leave it out"
        raise ValueError(f"labels: {name!r}, {whose}, {rule}")
    parts = []
    for number, word in enumerate(words):
        changed = {form: " ".join([*words[:number], form, *words[number + 1 :]]) for form in changes.forms(word)}
        forms = [form for form, whole in changed.items() if set(named_labels(whole, exact)) <= {label}]
        alternatives = sorted({word, *forms}, key=lambda form: (-len(form), form))
        parts.append("(?:" + "|".join(map(regex.escape, alternatives)) + ")")
    before, after = _borders(words[0][0], words[-1][-1])
    return regex.compile(before + SEPARATOR.join(parts) + after, regex.V1)


def split_name(name: str) -> list[str]:
    """Return the normalised words of a name, between white space, hyphens and underscores; no final full stop."""
    return [word for word in regex.split(SEPARATOR, normalise(name).strip().rstrip(".,;:"), flags=regex.V1) if word]


def _borders(first: str, last: str) -> tuple[str, str]:
    """Return what must stand before and after a name with these first and last characters."""
    kinds = word_class(first), word_class(last)
    before = _NEGATIONS if kinds[0] is None else f"(?<!{kinds[0]})"
    proclitics = _PROCLITICS if _ARABIC.match(first) else ""
    return before + proclitics, r"(?!\p{M})" + (f"(?!{kinds[1]})" if kinds[1] else "")


def _count_changes(counts: Counter, texts: Iterable[str], names: list[list[str]], count: int) -> None:
    texts = [normalise(strip_thinking(text)) for text in texts]
    for words in names:
        found = {change for text in texts for change in find_changes(text, words)}
        counts.update(dict.fromkeys(found, count))


def _is_named(label: str, texts: Iterable[str], label_map: LabelMap) -> bool:
    return any(read_label(text, label_map) == label for text in texts)


def strip_thinking(text: str) -> str:
    """Return an answer without its `<think>` parts, also those that are cut off at the answer's start or end."""
    if "think" not in text.lower():
        return text
    return _UNCLOSED.sub("", _REST_OF_THOUGHT.sub("", _THOUGHT.sub("", text)))


def _find_spans(text: str, label_map: LabelMap) -> list[tuple[int, int, str]]:
    """Return start, end and label of each name in a normalised text that is not inside a longer one."""
    spans = sorted(
        (match.start(), -match.end(), label)
        for label, patterns in label_map.items()
        for pattern in patterns
        for match in pattern.finditer(text)
        if match.end() > match.start()
    )
    found, reached = [], 0  # longer ones come first, so that a name inside another ends where an earlier one reached
    for (start, end), same in groupby(spans, key=itemgetter(0, 1)):
        if -end > reached:
            found += [(start, -end, label) for *_, label in same]
            reached = -end
    return found


def named_labels(text: str, label_map: LabelMap) -> list[str]:
    """Return the labels that a text names, in the order of the map; what stands in `<think>` does not count.

    A match inside a longer match does not count: "melanocytic nevus" does not name "nevus" when both are labels.
    """
    named = {label for _, _, label in _find_spans(normalise(strip_thinking(text)), label_map)}
    return [label for label in label_map if label in named]


def read_label(text: str, label_map: LabelMap) -> str:
    """Return the one label that a text names, else `NONE` or `SEVERAL`."""
    labels = named_labels(text, label_map)
    return labels[0] if len(labels) == 1 else SEVERAL if labels else NONE


def find_label(text: str, label: str, label_map: LabelMap) -> tuple[int, int]:
    """Return where a text that names a label has its longest name of it: start and end."""
    spans = _find_spans(normalise(text), {label: label_map[label]})
    start, end, _ = max(spans, key=lambda span: (span[1] - span[0], -span[0]))
    return original_span(text, start, end)


def label_key(label: str) -> str:
    """Return what labels that are one label have in common, whatever their case, white space and Unicode form.

    A minus stays, as in `ER-` and `-1`: a dash between words is white space, and one that stands alone a bullet.
    """
    text = label.strip()
    before, after = bool(_NEGATIVE.match(text)), bool(_MINUS.search(text))
    return "-" * before + spelling_key(text[before : len(text) - after]) + "-" * after


def spelling_key(text: str) -> str:
    """Return a text without its case, its punctuation between words and its Unicode form."""
    return " ".join(split_name(text)) or text


def merge_spellings(values: Iterable[str | None], key: Callable[[str], str] = label_key) -> dict[str, str]:
    """Return, for each value that is spelled in several ways, its most frequent spelling.

    Args:
        values: of each sample, such as its label.
        key: what the spellings of one value share.
    """
    spellings = {}
    for value, count in sorted(Counter(value for value in values if value is not None).items()):
        spellings.setdefault(key(value), Counter())[value] = count
    return {value: counts.most_common(1)[0][0] for counts in spellings.values() if len(counts) > 1 for value in counts}


def references_of(samples: Iterable[dict]) -> list[Reference]:
    """Return label and answers of each labelled sample, from its `label` and `messages`."""
    return [
        (sample["label"], tuple(turn["content"] for turn in sample["messages"] if turn["role"] == "assistant"))
        for sample in samples
        if sample["label"] is not None
    ]


def describe_unread(references: list[Reference], label_map: LabelMap, *, quote: bool = True) -> str | None:
    """Return a warning if fewer than half of the labelled samples have an answer that names their label, else None.

    It quotes the first answers, which stay on this machine, if `quote`.
    """
    unread = [texts for label, texts in references if not _is_named(label, texts, label_map)]
    if 2 * len(unread) <= len(references):
        return None
    read, shown = len(references) - len(unread), ", ".join(f"{texts[-1]!r:.100}" for texts in unread[:MAX_SHOWN])
    quoted = f"; the first answers without it: {shown}" if quote else ""
    return (
        f"only {read} of {len(references)} labelled samples have a reference answer that names their label, and the "
        f"diagnoses of the others cannot be read{quoted}. "
        "Name the words for each label in a label map (--labels)"
    )
