"""Coordinates in texts, as in `"bbox_2d": [x1, y1, x2, y2]`: found, and scaled to the image that the model gets.

A model answers in pixels of the resized image (Qwen2.5-VL) or in thousandths of the image's sides (Qwen2-VL,
Qwen3-VL). Annotations are in pixels of the image file, in fractions of 1, or, in `<box>(x1,y1),(x2,y2)</box>`, in
thousandths.
"""

import re
from functools import partial

from .sizes import fit_size

CONVENTIONS = ("resized", "relative")
RELATIVE_SIDE = 1000  # of an image in the second convention
MIN_PIXELS, MAX_PIXELS = 50176, 602112  # of configs/skin.yaml
# The names of Qwen's own format, and others where they are keys of JSON; then numbers, in lists or lists of lists.
# The older form of Qwen-VL and Qwen2-VL has thousandths always.
NUMBERS = r"[\s\d.,()\[\]eE+-]*\d[\s\d.,()\[\]eE+-]*"
COORDINATES = re.compile(
    r"""(?:\b(?:bbox|points?)_2d["']?|["'](?:bbox|bboxes|boxes|points?|polygon|coordinates)["'])\s*[:=]\s*"""
    rf"(?P<any>\[{NUMBERS}\])|<box>(?P<thousandths>{NUMBERS})</box>"
)
NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?")


def find_coordinates(messages: list[dict]) -> list[str]:
    """Return the coordinates in questions and answers, as they are written."""
    return [_numbers(match) for match in _find(messages)]


def _find(messages: list[dict]) -> list[re.Match]:
    return [match for message in messages for match in COORDINATES.finditer(message["content"])]


def _numbers(match: re.Match) -> str:
    return match[match.lastgroup]


def wrong_coordinates(sample: dict, *, min_pixels: int, max_pixels: int) -> str | None:
    """Return why coordinates of a sample are not those of the image that the model gets; None if they are.

    Args:
        sample: with `image_sizes`, upright `[width, height]` in px.
        min_pixels: smallest image area after resizing, px^2.
        max_pixels: largest image area after resizing, px^2.
    """
    found = _find(sample["messages"])
    if not found or not sample["image_sizes"]:
        return None
    if first := next((match for match in found if match["thousandths"]), None):
        return f"{first[0]} is in thousandths, which Qwen2-VL and Qwen3-VL expect, and Qwen2.5-VL does not"
    try:
        size = _only_size(sample["image_sizes"])
        fractions = [_read(match, size)[1] == (1, 1) for match in found]
    except ValueError as error:
        return str(error)
    fitted = fit_size(*size, min_pixels=min_pixels, max_pixels=max_pixels)
    if fitted == size or all(fractions):
        return None
    shown = f"of an image of {size[0]} x {size[1]} px, which the model gets at {fitted[0]} x {fitted[1]} px"
    return f"{_numbers(found[0])} {shown}"


def scale_coordinates(sample: dict, convention: str, *, min_pixels: int, max_pixels: int) -> str | None:
    """Write a sample's coordinates in a convention: "resized" (px of the resized image) or "relative" (thousandths).

    Returns:
        Why they cannot be written: outside of the image, not in pairs, or of several images of different sizes; None
        if they are.
    """
    found = _find(sample["messages"])
    right = convention == "relative" and all(match["thousandths"] for match in found)
    if not found or not sample["image_sizes"] or right:
        return None
    try:
        size = _only_size(sample["image_sizes"])
        limits = {"min_pixels": min_pixels, "max_pixels": max_pixels}
        target = (RELATIVE_SIDE, RELATIVE_SIDE) if convention == "relative" else fit_size(*size, **limits)
        rewrite = partial(_rewrite, size=size, target=target)
        for message in sample["messages"]:
            message["content"] = COORDINATES.sub(rewrite, message["content"])
    except ValueError as error:
        return str(error)
    return None


def _only_size(sizes: list[list[int]]) -> tuple[int, int]:
    if len(different := {tuple(size) for size in sizes}) > 1:
        shown = ", ".join(f"{width} x {height}" for width, height in sorted(different))
        raise ValueError(f"coordinates in a record of images of different sizes ({shown} px): of which image?")
    return different.pop()


def _read(match: re.Match, size: tuple[int, int]) -> tuple[list[float], tuple[int, int]]:
    """Return coordinates, x and y in turn, and what the whole image measures in their unit: px, 1 or thousandths.

    Raises:
        ValueError: they are not in pairs, or outside of the image.
    """
    text = _numbers(match)
    values = [float(number) for number in NUMBER.findall(text)]
    if len(values) % 2:
        raise ValueError(f"coordinates {text}: expected pairs of x and y, found {len(values)} numbers")
    whole = (RELATIVE_SIDE, RELATIVE_SIDE) if match["thousandths"] else size
    for index, value in enumerate(values):
        if not 0 <= value <= whole[index % 2]:
            unit = "thousandths" if match["thousandths"] else "px"
            limits = f"{whole[0]} x {whole[1]} {unit}"
            raise ValueError(f"coordinates {text}: {value:g} is outside of the image of {limits}")
    fractions = max(values) <= 1 and re.search(r"[.eE]", text) and not match["thousandths"]  # 1.0 is all of a side
    return values, (1, 1) if fractions else whole


def _rewrite(match: re.Match, size: tuple[int, int], target: tuple[int, int]) -> str:
    values, whole = _read(match, size)
    scaled = iter(round(value * target[n % 2] / whole[n % 2]) for n, value in enumerate(values))
    start, end = (place - match.start() for place in match.span(match.lastgroup))
    return match[0][:start] + NUMBER.sub(lambda _: str(next(scaled)), _numbers(match)) + match[0][end:]
