"""Spellings of skin type, sex and site: what is written in several ways is one subgroup of an evaluation."""

import re
from collections import Counter
from functools import partial

from .labels import merge_spellings, spelling_key

# Words before a number of Fitzpatrick's scale
SCALE = re.compile(r"^(?:(?:fitzpatrick|fst|skin|photo|type|phototype|skintype|skin_type)\W*)+(?=[1-6ivx])")
ROMAN = {numeral: str(number) for number, numeral in enumerate(("i", "ii", "iii", "iv", "v", "vi"), start=1)}
SEXES = {"m": "male", "man": "male", "f": "female", "woman": "female"}
SPELLED = ("skin_type", "sex", "site")  # attributes in words


def attribute_key(name: str, text: str) -> str:
    """Return what the spellings of an attribute's value share: `IV`, `4`, `4.0` and `type iv` are one skin type."""
    key = spelling_key(text)
    if name == "skin_type":
        key = SCALE.sub("", key).removesuffix(".0")
        return ROMAN.get(key, key)
    return SEXES.get(key, key) if name == "sex" else key


def unify_attributes(samples: list[dict]) -> dict[str, Counter]:
    """Give the values of `SPELLED` one spelling; return how often each was there, by the one that is kept."""
    found = {}
    for name in SPELLED:
        spelling_of = merge_spellings((sample[name] for sample in samples), partial(attribute_key, name))
        for sample in samples:
            if (value := sample[name]) in spelling_of:
                found.setdefault(f"{name} {spelling_of[value]}", Counter())[value] += 1
                sample[name] = spelling_of[value]
    return found
