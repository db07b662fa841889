"""The one way in for an image: an upright RGB picture, or an error that says why not."""

import io
import math
import os
import stat
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_IMAGE_PIXELS = 50_000_000  # a decoded RGB picture of this size takes 150 MB
MAX_ASPECT_RATIO = 200  # the family's own limit, see smart_resize in qwen_vl_utils
PATCH_CELL = 28  # px; one language-model token covers a square of this side (patch 14 x merge 2)
SIXTEEN_BIT_MODES = ("I;16", "I;16L", "I;16B", "I;16N")


def load_image(source: str | os.PathLike | dict | Image.Image) -> Image.Image:
    """Decode an image whole and return it upright, in RGB, alpha over white.

    Args:
        source: a path, a PIL image, or what `datasets.Image(decode=False)` gives: `{"bytes", "path"}`.

    Raises:
        ValueError: not a file, not an image, broken, over `MAX_IMAGE_PIXELS`, or over `MAX_ASPECT_RATIO`.
        FileNotFoundError: no such file.
    """
    if isinstance(source, Image.Image):
        return _to_rgb(source)
    if isinstance(source, dict):
        source = io.BytesIO(source["bytes"]) if source.get("bytes") is not None else source["path"]
    if not isinstance(source, io.BytesIO):
        _check_file(Path(source))
    try:
        with Image.open(source) as image:
            check_size(image.width, image.height)
            return _to_rgb(image)
    except UnidentifiedImageError as error:
        raise ValueError("not an image") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"too large: {error}") from error
    except (OSError, SyntaxError, EOFError) as error:  # what Pillow's decoders raise for damaged files
        raise ValueError(f"broken image: {error}") from error


def _check_file(path: Path) -> None:
    """Refuse what is not a plain file before it is opened: reading a pipe or a device could hang."""
    try:
        info = path.stat()
    except FileNotFoundError as error:
        raise FileNotFoundError("no such file") from error
    if not stat.S_ISREG(info.st_mode):
        raise ValueError("not a plain file")
    if info.st_size == 0:
        raise ValueError("the file is empty (zero bytes)")


def check_size(width: int, height: int) -> None:
    """Raise ValueError for a size in px that the model cannot take, or that would fill the memory."""
    if width * height > MAX_IMAGE_PIXELS:
        raise ValueError(f"too large: {width} x {height} px, at most {MAX_IMAGE_PIXELS:,} px in all")
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise ValueError(f"too narrow: {width} x {height} px, at most {MAX_ASPECT_RATIO}:1")


def _to_rgb(image: Image.Image) -> Image.Image:
    image = ImageOps.exif_transpose(image)  # a decoded copy; phone photos are stored lying on their side
    if image.mode in SIXTEEN_BIT_MODES:  # convert("RGB") would clip all but the darkest 256 of 65,536 levels to white
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode!r} have no defined white; save the image with 8 or 16 bits")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def probe_image(path: str) -> tuple[int, int] | str:
    """Return `(width, height)` in px of the upright image, or the reason why it cannot be used (runs in a worker)."""
    try:
        return load_image(path).size
    except (ValueError, OSError) as error:
        return str(error)


def resolve_image(name: str, image_dir: Path) -> Path:
    """Return the absolute path of an image inside `image_dir` (which is resolved already).

    Raises:
        ValueError: the name is an address, or leads out of the folder.
    """
    shown = repr(name if len(name) <= 100 else name[:100] + "...")
    if "://" in name or name.startswith("data:"):
        raise ValueError(f"{shown} is an address, expected a path inside {image_dir}")
    if "\0" in name:
        raise ValueError(f"{shown} holds a NUL character")
    path = (image_dir / name).resolve()
    if not path.is_relative_to(image_dir):
        raise ValueError(f"{shown} leads out of the image folder {image_dir}")
    return path


def count_image_tokens(height: int, width: int, *, min_pixels: int, max_pixels: int) -> int:
    """Return how many language-model tokens one image costs.

    Args:
        height: decoded image height, px.
        width: decoded image width, px.
        min_pixels: smallest area after resizing, px^2.
        max_pixels: largest area after resizing, px^2.

    Returns:
        Tokens; one per 28 x 28 px cell (patch 14 x merge 2).

    Raises:
        ValueError: aspect ratio above 200, or min_pixels > max_pixels.

    Source:
        smart_resize in qwen_vl_utils; written out here because that package needs torch.
    """
    if min_pixels > max_pixels:
        raise ValueError(f"min_pixels {min_pixels} is above max_pixels {max_pixels}")
    check_size(width, height)
    rows, columns = (max(1, round(side / PATCH_CELL)) for side in (height, width))
    area = rows * columns * PATCH_CELL**2
    if area > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        rows, columns = (math.floor(side / shrink / PATCH_CELL) for side in (height, width))
    elif area < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rows, columns = (math.ceil(side * grow / PATCH_CELL) for side in (height, width))
    if rows * columns == 0:
        raise ValueError(f"too narrow: {width} x {height} px under max_pixels {max_pixels}")
    return rows * columns
