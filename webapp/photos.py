"""Photos as the model sees them: upright, in sRGB, at its size, with what they cost in tokens."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from transformers import ProcessorMixin

from data_prep.images import load_image
from data_prep.sizes import fit_options, fit_size


@dataclass(frozen=True)
class Photo:
    """A photo at the model's size.

    Attributes:
        name: file name without its folder.
        image: upright, RGB.
        original_size: upright width and height before it was resized, px.
        tokens: language-model tokens that it costs.
    """

    name: str
    image: Image.Image
    original_size: tuple[int, int]
    tokens: int


def load_photo(source: str | os.PathLike | dict | Image.Image, name: str, processor: ProcessorMixin) -> Photo:
    """Load a photo as `load_image` does, at the size at which the model gets it.

    Raises:
        ValueError, FileNotFoundError: see `load_image`.
    """
    options, sizes = fit_options(processor.image_processor), []

    def fit(width: int, height: int) -> tuple[int, int]:
        sizes.append((width, height))
        return fit_size(width, height, **options)

    image = load_image(source, fit=fit)
    return Photo(name, image, sizes[0], image.width * image.height // options["cell"] ** 2)


def load_photos(paths: Iterable[str], processor: ProcessorMixin) -> tuple[list[Photo], list[str]]:
    """Return the photos that can be used, and a line with the reason for each that cannot."""
    photos, refused = [], []
    for path in paths:
        name = Path(path).name
        try:
            photos.append(load_photo(path, name, processor))
        except (ValueError, OSError) as error:
            refused.append(f"{name}: {error}")
    return photos, refused
