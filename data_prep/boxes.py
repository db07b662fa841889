"""Coordinates in texts, as in `"bbox_2d": [x1, y1, x2, y2]`: found, and scaled to the image that the model gets.

A model answers in pixels of the resized image (Qwen2.5-VL) or in thousandths of the image's sides (Qwen2-VL,
Qwen3-VL). Annotations are in pixels of the image file, or in fractions of 1.
"""

import re
from functools import partial

from .records import DataError
from .sizes import fit_size

CONVENTIONS = ("resized", "relative")
RELATIVE_SIDE = 1000  # of an image in the second convention
MIN_PIXELS, MAX_PIXELS = 50176, 602112  # of configs/skin.yaml
# The names of Qwen's own format, and others where they are keys of JSON; then numbers, in lists or lists of lists
NUMBERS = r"\[[\s\d.,\[\]+-]*\d[\s\d.,\[\]+-]*\]"
COORDINATES = re.compile(
    rf"""(?:\b(?:bbox|points?)_2d["']?|["'](?:bbox|bboxes|boxes|points?|polygon|coordinates)["'])\s*[:=]\s*({NUMBERS})"""
)
NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)")


def find_coordinates(messages: list[dict]) -> list[str]:
    """Return the coordinates in questions and answers, as they are written."""
    return [found for message in messages for found in COORDINATES.findall(message["content"])]


def wrong_coordinates(sample: dict, *, min_pixels: int, max_pixels: int) -> str | None:
    """Return why coordinates of a sample are not those of the image that the model gets; None if they are.

    Args:
        sample: with `image_sizes`, upright `[width, height]` in px.
        min_pixels: smallest image area after resizing, px^2.
        max_pixels: largest image area after resizing, px^2.
    """
    found = find_coordinates(sample["messages"])
    if not found or not sample["image_sizes"]:
        return None
    try:
        size = _only_size(sample["image_sizes"])
        values = [_read(text, size) for text in found]
    except ValueError as error:
        return str(error)
    fitted = fit_size(*size, min_pixels=min_pixels, max_pixels=max_pixels)
    if fitted == size or all(_are_fractions(pairs) for pairs in values):
        return None
    return f"{found[0]} of an image of {size[0]} x {size[1]} px, which the model gets at {fitted[0]} x {fitted[1]} px"


def scale_coordinates(sample: dict, convention: str, *, min_pixels: int, max_pixels: int) -> None:
    """Write a sample's coordinates in a convention: "resized" (px of the resized image) or "relative" (thousandths).

    Raises:
        DataError: coordinates outside of the image, not in pairs, or of several images of different sizes.
    """
    if not find_coordinates(sample["messages"]) or not sample["image_sizes"]:
        return
    try:
        size = _only_size(sample["image_sizes"])
        limits = {"min_pixels": min_pixels, "max_pixels": max_pixels}
        target = (RELATIVE_SIDE, RELATIVE_SIDE) if convention == "relative" else fit_size(*size, **limits)
        rewrite = partial(_rewrite, size=size, target=target)
        for message in sample["messages"]:
            message["content"] = COORDINATES.sub(rewrite, message["content"])
    except ValueError as error:
        about = {"record": sample["record"], "sample_id": sample["id"], "source": sample["origin"]}
        raise DataError(str(error), **about) from error


def _only_size(sizes: list[list[int]]) -> tuple[int, int]:
    if len(different := {tuple(size) for size in sizes}) > 1:
        shown = ", ".join(f"{width} x {height}" for width, height in sorted(different))
        raise ValueError(f"coordinates in a record of images of different sizes ({shown} px): of which image?")
    return different.pop()


def _read(text: str, size: tuple[int, int]) -> list[float]:
    """Return coordinates, x and y in turn, in px or fractions of 1; ValueError if they are none of this image."""
    values = [float(number) for number in NUMBER.findall(text)]
    if len(values) % 2:
        raise ValueError(f"coordinates {text}: expected pairs of x and y, found {len(values)} numbers")
    for index, value in enumerate(values):
        if not 0 <= value <= size[index % 2]:
            raise ValueError(f"coordinates {text}: {value:g} is outside of the image of {size[0]} x {size[1]} px")
    return values


def _are_fractions(values: list[float]) -> bool:
    return max(values) <= 1 and any(value % 1 for value in values)


def _rewrite(match: re.Match, size: tuple[int, int], target: tuple[int, int]) -> str:
    values = _read(match[1], size)
    whole = (1, 1) if _are_fractions(values) else size
    scaled = iter(round(value * target[n % 2] / whole[n % 2]) for n, value in enumerate(values))
    return match[0][: match.start(1) - match.start()] + NUMBER.sub(lambda _: str(next(scaled)), match[1])
