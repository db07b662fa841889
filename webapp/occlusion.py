"""Where the model looks: how much less likely an answer becomes when a patch of the photo is greyed out.

Source:
    Zeiler and Fergus, Visualizing and Understanding Convolutional Networks, 2014.
"""

from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageDraw

GRID = 8  # patches a side
BLUE, ORANGE = (0, 114, 178), (213, 94, 0)  # of Okabe and Ito, as in the plots
MAX_OPACITY = 0.8
PALENESS = 0.4
MAX_LOG = -1e-6  # of a likelihood; nearer to 0 its difference from 1 is rounding
MIN_SCALE = 0.1  # smaller drops get no strong colour
Box = tuple[int, int, int, int]


def patch_boxes(width: int, height: int, grid: int = GRID) -> list[Box]:
    """Return left, top, right and bottom, px, of `grid` x `grid` patches that cover an image, row by row."""
    columns, rows = (np.linspace(0, side, grid + 1).round().astype(int).tolist() for side in (width, height))
    return [
        (columns[x], rows[y], columns[x + 1], rows[y + 1])
        for y in range(grid)
        for x in range(grid)
    ]  # fmt: skip


def grey_of(image_processor) -> tuple[int, int, int]:
    """Return the grey that the model sees as zero: the mean that its processor subtracts."""
    return tuple(round(255 * mean) for mean in image_processor.image_mean)


def occlude(image: Image.Image, box: Box, grey: tuple[int, int, int]) -> Image.Image:
    """Return a copy of an image with a patch in grey."""
    covered = image.copy()
    covered.paste(grey, box)
    return covered


def occluded_examples(example: dict, number: int, grey: tuple[int, int, int], grid: int = GRID) -> Iterator[dict]:
    """Yield an example as it is, and then with each patch of its image `number` in grey."""
    images = example["images"]
    yield example
    for box in patch_boxes(*images[number].size, grid):
        covered = occlude(images[number], box, grey)
        yield {**example, "images": [*images[:number], covered, *images[number + 1 :]]}


def drops_of(scores: np.ndarray) -> np.ndarray:
    """Return how far the log-odds of each answer fall below those for the unchanged photo.

    A likelihood near 1 hardly changes by whatever is hidden; its odds do.

    Args:
        scores: log-likelihoods of K answers, of the photo as it is and then with each of P patches in grey, shape
            (1 + P, K).

    Returns:
        Shape (K, P); above 0 where the patch speaks for the answer.
    """
    logs = np.minimum(scores.astype(float), MAX_LOG)
    log_odds = logs - np.log(-np.expm1(logs))
    return (log_odds[0] - log_odds[1:]).T


def scale_of(drops: np.ndarray) -> float:
    """Return the drop that gets the strongest colour, of maps to compare, shape (K, P)."""
    return max(MIN_SCALE, float(abs(drops).max()))


def draw_map(image: Image.Image, drops: np.ndarray, scale: float, *, side: int = 512) -> Image.Image:
    """Return the photo, its longer side `side` px, with each patch tinted.

    Args:
        image: the photo at the model's size.
        drops: of each patch, row by row, see `drops_of`; orange above 0, blue below, the patch of the largest
            framed unless it is under half of `MIN_SCALE`.
        scale: the drop of the strongest colour; the same for maps that are compared.
        side: of the drawing, px.
    """
    zoom = side / max(image.size)
    size = tuple(max(1, round(length * zoom)) for length in image.size)
    base = image.convert("L").convert("RGB").resize(size, Image.Resampling.BICUBIC)  # colours are the map's
    base = Image.blend(base, Image.new("RGB", size, "white"), PALENESS)  # or a tint on dark skin could not be seen
    grid = round(len(drops) ** 0.5)
    boxes = patch_boxes(*size, grid)
    for box, drop in zip(boxes, drops, strict=True):
        opacity = MAX_OPACITY * min(1.0, abs(drop) / scale)
        patch = base.crop(box)
        tint = Image.new("RGB", patch.size, ORANGE if drop > 0 else BLUE)
        base.paste(Image.blend(patch, tint, opacity), box)
    if drops.max() >= MIN_SCALE / 2:
        left, top, right, bottom = boxes[int(drops.argmax())]
        for inset, colour in ((0, "white"), (2, "black")):
            frame = (left + inset, top + inset, right - 1 - inset, bottom - 1 - inset)
            ImageDraw.Draw(base).rectangle(frame, outline=colour, width=2)
    return base


def describe_map(label: str, drops: np.ndarray) -> str:
    """Return in words which patch the odds of a label depend on most."""
    grid, strongest = round(len(drops) ** 0.5), int(drops.argmax())
    if drops[strongest] < MIN_SCALE / 2:
        return f"No single patch makes {label} less likely when it is greyed out."
    row, column = strongest // grid + 1, strongest % grid + 1
    others = np.delete(drops, strongest).mean()
    return (
        f"Greying out the patch in row {row}, column {column} lowers the odds of {label} most: they are divided by "
        f"{np.exp(drops[strongest]):,.2f}, by {np.exp(others):.2f} on average over the other {len(drops) - 1} patches."
    )
