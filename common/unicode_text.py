"""Text of any script: one form for comparing, words, and the borders of words."""

import unicodedata
from bisect import bisect_right
from itertools import accumulate

import regex

# Scripts that put no spaces between words: Thai, Lao, Khmer, Burmese and others (line breaking class SA), Chinese and
# Japanese. There a name may stand anywhere, as after "this is".
_UNSPACED = r"\p{lb=SA}\p{Han}\p{Hiragana}"
# Runs of one of these classes are words; between two classes there is a border, as in "melanoma입니다".
_WORD_CLASSES = (r"[\p{Katakana}ー]", r"\p{Hangul}", rf"[\w--[{_UNSPACED}\p{{Katakana}}ー\p{{Hangul}}_]]")
_WORD = regex.compile(rf"[{_UNSPACED}]\p{{M}}*|" + "|".join(f"{kind}+" for kind in _WORD_CLASSES), regex.V1)
_PATTERNS = [regex.compile(kind, regex.V1) for kind in _WORD_CLASSES]
_SPACING = regex.compile(rf"([{_UNSPACED}]\p{{M}}*|[\u3000-\u303f\uff00-\uffef])", regex.V1)
# Invisible characters, Arabic's tatweel and vowel signs, Hebrew's points, Greek's accent, which capitals lack, the dot
# that is left of a small "İ".
_SIGNS = r"\u0591-\u05bd\u05bf-\u05c7\u0610-\u061a\u064b-\u065f\u0670\u06d6-\u06ed"
_SIGN = rf"[\p{{Cf}}\p{{Variation_Selector}}ـ[\p{{M}}&&[{_SIGNS}]]]"
_REMOVED = regex.compile(_SIGN + r"|(?<=i)\u0307|(?<=\p{Greek}\u0308?)\u0301", regex.V1)
# Letters that one word is written with by some and not by others, and apostrophes.
_SAME = str.maketrans("ıёىیکة’‘ʼʹ′´`＇", "iеييكه''''''''")
_CLUSTER = regex.compile(r"\X")


def normalise(text: str) -> str:
    """Return the form in which texts are compared: what looks alike, or differs by case alone, is the same.

    Composed and decomposed letters, full-width forms, curly and straight apostrophes become one form; zero-width
    characters, tatweel and the optional signs of Arabic and Hebrew are removed.
    """
    if text.isascii() and "`" not in text:
        return text.casefold()
    return simplify(unicodedata.normalize("NFKC", text).casefold(), "NFKC")


def simplify(text: str, form: str) -> str:
    """Return a text without optional signs, in a Unicode form ("NFC" or "NFKC"); the case stays."""
    decomposed = unicodedata.normalize(form.replace("C", "D"), text)
    return unicodedata.normalize(form, _REMOVED.sub("", decomposed)).translate(_SAME)


def original_span(text: str, start: int, end: int) -> tuple[int, int]:
    """Return where a span of `normalise(text)` stands in `text`."""
    if text.isascii():
        return start, end
    clusters = _CLUSTER.findall(text)
    lengths = {cluster: len(normalise(cluster)) for cluster in set(clusters)}
    ends = list(accumulate(map(lengths.get, clusters)))
    places = [0, *accumulate(map(len, clusters))]
    return places[bisect_right(ends, start)], places[bisect_right(ends, end - 1) + 1]


def split_words(text: str) -> list[str]:
    """Return the words of a text in lower case; in scripts without spaces, the characters."""
    return _WORD.findall(text.lower())


def space_characters(text: str) -> str:
    """Return a text with spaces around each character of the scripts that have none, for metrics that count words."""
    return text if text.isascii() else _SPACING.sub(r" \1 ", text)


def word_class(character: str) -> str | None:
    """Return the pattern of the characters that one word is made of with this one; None in scripts without spaces."""
    return next((kind for kind, p in zip(_WORD_CLASSES, _PATTERNS, strict=True) if p.fullmatch(character)), None)
