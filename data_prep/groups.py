"""Which samples must stay in one split: those of one patient or lesion, of one picture, of one text-only question."""

import re
import unicodedata
from collections import Counter, defaultdict

import regex

from .check import Finding, about
from .records import IMAGE_MARKER
from .split import join_groups

# Texts that stand for a patient or lesion that is not known, and would make one group of all of these
NO_GROUP = {
    *("unknown", "n/a", "na", "n.a.", "nan", "none", "null", "<na>", "nat", "missing", "undefined", "?", "-", "--"),
    *("not available", "not applicable", "not known", "anonymous", "anonymized", "anonymised", "unidentified"),
    *("unbekannt", "inconnu", "desconocido", "desconhecido", "sconosciuto", "onbekend", "неизвестно", "未知", "不明"),
}
INVISIBLE, DASH = regex.compile(r"[\p{Cf}\p{Default_Ignorable_Code_Point}]"), regex.compile(r"[\p{Pd}\u2212]")
# A number that a spreadsheet or a program has written with the first of its digits alone
ROUNDED = re.compile(r"-?\d[.,]\d+e\+?\d+", re.IGNORECASE)


def is_no_group(name: str | None) -> bool:
    return name is None or _fold(name) in NO_GROUP


def group_key(name: str) -> str:
    """Return what the spellings of one group's name share.

    `5`, `5.0`, `005` and the same in another script's digits are one, so are `P 1` and `p 1`, and names that differ by
    the kind of their dashes or by characters that nobody sees.
    """
    key = "".join(str(unicodedata.decimal(sign, sign)) for sign in _fold(name))
    if number := re.fullmatch(r"(-?)0*(\d+)(?:\.0+)?", key):
        return "".join(number.groups())
    return key


def unify_groups(samples: list[dict]) -> list[Finding]:
    """Give all samples of a group its most frequent spelling; report the others, and groups of several sources."""
    members = defaultdict(list)
    for sample in samples:
        if sample["group"] is not None:
            members[group_key(sample["group"])].append(sample)
    findings = []
    for group in members.values():
        spellings = Counter(sample["group"] for sample in group)
        name = max(sorted(spellings), key=spellings.get)
        sources = sorted({sample["origin"] for sample in group})
        others = [sample["id"] for sample in group[1:]]
        if ROUNDED.fullmatch(name):
            detail = f"group {name!r} is a number that has lost its last digits, and may be of several patients"
            findings.append(about(group[0], "rounded group", detail, others=others))
        if len(spellings) > 1:
            detail = f"written {', '.join(map(repr, sorted(spellings)))}, taken as {name!r}"
            findings.append(about(group[0], "group spelling", detail, others=others))
        if len(sources) > 1:
            detail = f"group {name!r} is in {' and '.join(sources)}, taken as one patient or lesion"
            findings.append(about(group[0], "shared group", detail, others=others))
        for sample in group:
            sample["group"] = name
    return findings


def group_samples(samples: list[dict], picture_of: dict[str, str]) -> list[int]:
    """Return each sample's group: samples with one `group`, with copies of one picture, or without a picture and with
    the same questions share a group.

    Args:
        samples: with `group`, `images` and `messages`.
        picture_of: for each image path the path that stands for all copies of the picture.
    """
    members = defaultdict(list)
    for index, sample in enumerate(samples):
        if sample["group"] is not None:
            members["group", group_key(sample["group"])].append(index)
        for path in sample["images"]:
            members["picture", picture_of[path]].append(index)
        if not sample["images"]:
            members["question", question_key(sample["messages"])].append(index)
    return join_groups(len(samples), list(members.values()))


def question_key(messages: list[dict]) -> str:
    """Return what a sample asks, in all user turns, whatever its case and white space."""
    text = "\n".join(message["content"] for message in messages if message["role"] == "user")
    return _fold(text.replace(IMAGE_MARKER, " "))


def _fold(text: str) -> str:
    """Return a text in one Unicode form, without its case and invisible characters, with single spaces and "-"."""
    if not text.isascii():
        text = DASH.sub("-", INVISIBLE.sub("", unicodedata.normalize("NFKC", text)))
    return " ".join(text.casefold().split())
