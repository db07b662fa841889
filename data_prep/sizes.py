"""Sizes of images: limits, the size at which the model gets one, and what it costs in tokens."""

import os

MAX_IMAGE_PIXELS = 50_000_000  # a decoded RGB picture of this size takes 150 MB
# Sets another limit, px, for every command and its workers: a prepared data set stays usable for training.
PIXELS_VARIABLE = "DATA_PREP_MAX_IMAGE_PIXELS"
PILLOWS_LIMIT = 178_956_970  # Pillow opens no larger image
MAX_ASPECT_RATIO = 200  # MAX_RATIO of qwen_vl_utils
PATCH_CELL = 28  # px; in Qwen2.5-VL one language-model token covers a square of this side (patch 14 x merge 2)


def max_image_pixels() -> int:
    """Return the largest number of pixels of an image: 50 million, or that of the environment variable."""
    text = os.environ.get(PIXELS_VARIABLE) or str(MAX_IMAGE_PIXELS)
    if not text.isdecimal() or not 1 <= int(text) <= PILLOWS_LIMIT:
        raise ValueError(f"{PIXELS_VARIABLE}: expected a whole number from 1 to {PILLOWS_LIMIT}, found {text!r:.60}")
    return int(text)


def check_size(width: int, height: int) -> None:
    """Raise ValueError for a size, px, that the model does not support or that needs too much memory."""
    if width * height > (limit := max_image_pixels()):
        raise ValueError(f"too large: {width} x {height} px, at most {limit:,} px in all")
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise ValueError(f"too narrow: {width} x {height} px, at most {MAX_ASPECT_RATIO}:1")


def fit_size(width: int, height: int, *, min_pixels: int, max_pixels: int, cell: int = PATCH_CELL) -> tuple[int, int]:
    """Return the width and height, px, that the model gets an image in: multiples of `cell`.

    Args:
        width: decoded image width, px.
        height: decoded image height, px.
        min_pixels: smallest area after resizing, px^2.
        max_pixels: largest area after resizing, px^2.
        cell: side of the square that one token covers, px.

    Raises:
        ValueError: too many pixels, aspect ratio above 200, less than a cell wide or high, or min_pixels > max_pixels.

    Source:
        smart_resize in qwen_vl_utils.
    """
    from qwen_vl_utils import smart_resize  # imports torch, which `convert` should not wait for

    if min_pixels > max_pixels:
        raise ValueError(f"min_pixels {min_pixels} is above max_pixels {max_pixels}")
    check_size(width, height)
    fitted_height, fitted_width = smart_resize(
        height, width, factor=cell, min_pixels=min_pixels, max_pixels=max_pixels
    )
    if fitted_width * fitted_height == 0:
        raise ValueError(f"too narrow: {width} x {height} px under max_pixels {max_pixels}")
    return fitted_width, fitted_height


def fit_options(image_processor) -> dict[str, int]:
    """Return the keywords of `fit_size` that match a model's image processor."""
    limits = {"min_pixels": image_processor.size["shortest_edge"], "max_pixels": image_processor.size["longest_edge"]}
    return {**limits, "cell": image_processor.patch_size * image_processor.merge_size}


def count_image_tokens(height: int, width: int, *, min_pixels: int, max_pixels: int, cell: int = PATCH_CELL) -> int:
    """Return how many language-model tokens one image costs: one per cell; see `fit_size`."""
    width, height = fit_size(width, height, min_pixels=min_pixels, max_pixels=max_pixels, cell=cell)
    return width * height // cell**2
