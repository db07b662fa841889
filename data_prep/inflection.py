"""Endings and compounds of names, learned from the reference answers of a data set.

The rule: an inflected form of a name (`melanomdur`, `nevi`, `Melanomverdacht`, `меланомы`) is the name's word with

- up to `MAX_PART` letters after or before the whole word, as in a compound, or
- another ending: at most `MAX_CUT` of its last letters are replaced, by at most `MAX_ENDING`, and `MIN_STEM` stay.

Such a change is learned when the reference answers have it at the sample's own label, in samples whose label is not
named as it is written, more often than at other labels. It is then used for all words of at least `MIN_LETTERS`
letters. A shorter word takes only endings that it was itself seen with and that were learned from a longer one, so
that `no` is never found in `nodule`.
"""

from collections import Counter
from collections.abc import Iterable
from functools import cache

import regex

from common.unicode_text import word_class

MIN_LETTERS, MIN_STEM, MAX_CUT, MAX_ENDING, MAX_PART = 4, 3, 2, 4, 40
HANGUL = regex.compile(r"\p{Hangul}")
SEPARATOR = r"[\s\p{Pd}_]+"

Change = tuple[str, str, str]  # letters before the word, its ending that is replaced, the letters in its place


class Changes:
    """The changes that were learned; see the module.

    Args:
        own: how often each (word, change) stands at the sample's own label, in samples that are not read without it.
        other: how often at another label.
    """

    def __init__(self, own: Counter | None = None, other: Counter | None = None):
        own, other = own or Counter(), other or Counter()
        by_change = [Counter(), Counter()]
        for counts, pairs in zip(by_change, (own, other), strict=True):
            for (word, change), count in pairs.items():
                counts[change] += count if is_long(word) else 0
        self.of_all = {change for change, count in by_change[0].items() if count > by_change[1][change]}
        self.of_word = {pair for pair, count in own.items() if count > other[pair]}

    def forms(self, word: str) -> list[str]:
        """Return the inflected forms of a word."""
        return [
            before + word[: len(word) - len(old)] + new
            for before, old, new in sorted(self.of_all)
            if (is_long(word) or (word, (before, old, new)) in self.of_word)
            and word.endswith(old)
            and len(word) - len(old) >= (MIN_STEM if old else 1)
        ]


def is_long(word: str) -> bool:
    """Return whether a word has `MIN_LETTERS` letters; a syllable of Hangul has two or three."""
    return len(word) + len(HANGUL.findall(word)) >= MIN_LETTERS


def find_changes(text: str, words: list[str]) -> Iterable[tuple[str, Change]]:
    """Yield the word and its change wherever the words of a name stand in a text in another form."""
    if any(_stem(word) not in text for word in words):
        return
    loose = _loose_name(tuple(words))
    for start in _starts(text, words[0]):
        if match := loose.match(text, start):
            for word, form in zip(words, match.groups(), strict=True):
                if form != word:
                    yield word, _change(word, form)


def _starts(text: str, word: str) -> Iterable[int]:
    """Yield where the words of a text start that have a word's stem; a pattern tried everywhere would take long."""
    stem, letters, before = _stem(word), _letters_before(word[0]), None
    place = text.find(stem)
    while place >= 0:
        start = letters.match(text, before or 0, place).start()
        if start != before:
            yield start
        before, place = place, text.find(stem, place + 1)


def _stem(word: str) -> str:
    return word[: max(MIN_STEM, len(word) - MAX_CUT)] if is_long(word) else word


@cache
def _letters_before(character: str) -> regex.Pattern:
    """Return the pattern that reads backwards, from `endpos`, to the start of the word that a character is in."""
    kind = word_class(character)
    return regex.compile(f"(?r){kind}*" if kind else "(?r)", regex.V1)


@cache
def _loose_name(words: tuple[str, ...]) -> regex.Pattern:
    return regex.compile(SEPARATOR.join(f"({_loose_pattern(word)})" for word in words), regex.V1)


def _loose_pattern(word: str) -> str:
    """Return a pattern of a whole word that could be an inflected form; a word without a script's letters as it is."""
    kind, whole = word_class(word[0]), regex.escape(word)
    if kind is None or word_class(word[-1]) != kind:
        return whole
    before = f"{kind}{{0,{MAX_PART}}}" if is_long(word) else ""
    ending = f"{kind}{{0,{MAX_CUT + MAX_ENDING}}}"
    return f"(?<!{kind})(?:{before}{whole}{kind}{{0,{MAX_PART}}}|{regex.escape(_stem(word))}{ending})(?!{kind})"


def _change(word: str, form: str) -> Change:
    before, found, after = form.partition(word)
    if found:
        return before, "", after
    same = next(n for n in range(len(word), 0, -1) if form.startswith(word[:n]))
    return "", word[same:], form[same:]
