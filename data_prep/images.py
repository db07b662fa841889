"""Loading of images: an upright RGB picture, or an error with the reason."""

import io
import os
import stat
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

from PIL import Image, PngImagePlugin, UnidentifiedImageError
from pillow_heif import register_heif_opener

from .colours import ORIENTATION, to_srgb
from .containers import PNG, drop_png_text, rare_jpeg
from .sizes import PILLOWS_LIMIT, check_size, max_image_pixels

FORMATS = ("JPEG", "PNG", "TIFF", "BMP", "GIF", "WEBP", "JPEG2000", "AVIF", "HEIF", "PPM")  # not EPS: runs programs
SWAPPED_SIDES = (5, 6, 7, 8)  # orientations that swap width and height
# A JPEG is decoded at least this much larger than requested. Less would give sharper images than the pretraining's.
DRAFT_HEADROOM = 4 / 3
# First bytes of images that are not read: (offset, bytes, name)
UNREAD_KINDS = (
    (0, b"\xff\x0a", "JPEG XL"),
    (0, b"\0\0\0\x0cJXL \r\n", "JPEG XL"),
    (128, b"DICM", "DICOM"),
    (0, b"SIMPLE  =", "FITS"),
    (0, b"8BPS", "Photoshop"),
    (0, b"\x76\x2f\x31\x01", "OpenEXR"),
    (0, b"II\xbc\x01", "JPEG XR"),
    (4, b"ftyp", "a film or a sequence of images, or damaged"),
)
MAX_HEAD = 4096  # first bytes of a file that tell its kind
UNREAD_ENDINGS = (".jxl", ".dcm")
NO_IMAGE = "not an image"
Fit = Callable[[int, int], tuple[int, int]]

register_heif_opener()
PngImagePlugin.MAX_TEXT_CHUNK = 1 << 24  # bytes; also limits an ICC profile, and those of printers have several MB
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # `check_size` has its own limit
warnings.filterwarnings("ignore", "Corrupt EXIF data", UserWarning)  # `private_metadata` finds it, and it is left out


def load_image(source: str | os.PathLike | dict | Image.Image, *, fit: Fit | None = None) -> Image.Image:
    """Decode an image and return it upright, in sRGB, alpha over white.

    Args:
        source: a path, a PIL image, or the `{"bytes", "path"}` of `datasets.Image(decode=False)`.
        fit: takes the upright width and height, px, and returns those to resize to. A JPEG that is more than
            `2 * DRAFT_HEADROOM` times as wide and high is then decoded at a half, a quarter or an eighth of its size.

    Raises:
        ValueError: not a file, not an image, broken, over `max_image_pixels()`, or over `MAX_ASPECT_RATIO`.
        FileNotFoundError: no such file.
    """
    if isinstance(source, Image.Image):
        check_size(source.width, source.height)
        upright = to_srgb(source)
        return upright.resize(fit(*upright.size)) if fit else upright
    if isinstance(source, dict):
        source = io.BytesIO(source["bytes"]) if source.get("bytes") is not None else source["path"]
    if isinstance(source, io.BytesIO):
        with open_image(source) as image:
            return decode(image, fit)
    check_file(Path(source))
    with Path(source).open("rb") as file, open_image(file) as image:
        return decode(image, fit)


@contextmanager
def open_image(file: io.BufferedIOBase):
    """Yield an image file, opened but not decoded; errors of Pillow's decoders within the block become ValueError."""
    head = file.read(MAX_HEAD)
    file.seek(0)
    try:
        yield Image.open(io.BytesIO(drop_png_text(file.read())) if head.startswith(PNG) else file, formats=FORMATS)
    except UnidentifiedImageError as error:
        raise ValueError(_describe_unread(head)) from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"too large: over {PILLOWS_LIMIT:,} px, at most {max_image_pixels():,} px in all") from error
    except MemoryError:
        raise
    except ValueError as error:
        raise ValueError(" ".join(str(error).split())) from error
    except Exception as error:
        # For damaged bytes decoders raise any type: OSError, SyntaxError, struct.error, ...
        raise ValueError(f"broken image: {' '.join(str(error).split())}") from error


def _describe_unread(head: bytes) -> str:
    """Return why a file cannot be read, by its first bytes."""
    kind = next((name for at, start, name in UNREAD_KINDS if head.startswith(start, at)), None) or rare_jpeg(head)
    return f"not an image that can be read: {kind}; save it as PNG or JPEG" if kind else NO_IMAGE


def is_image(path: Path) -> bool:
    """Whether a file is named like an image, or contains one, whether it can be used or not."""
    if path.suffix.lower() in UNREAD_ENDINGS or Image.registered_extensions().get(path.suffix.lower()) in Image.OPEN:
        return True
    try:
        check_file(path)
    except (OSError, ValueError):
        return False
    try:
        with path.open("rb") as file, open_image(file):
            return True
    except (OSError, ValueError) as error:
        return str(error) != NO_IMAGE


def decode(image: Image.Image, fit: Fit | None = None) -> Image.Image:
    """Return an opened image as `load_image` does."""
    check_size(image.width, image.height)
    # Only formats with several pictures have this attribute. In an MPO, written by phones, the others are previews or
    # depth maps.
    if getattr(image, "is_animated", False) and image.format != "MPO":
        raise ValueError("several frames or pages, expected one picture")
    if fit is None:
        return to_srgb(image)
    # Pillow gives the size of a TIFF as it is upright, and turns it while it reads the pixels
    turned = image.format != "TIFF" and image.getexif().get(ORIENTATION, 1) in SWAPPED_SIDES
    size = fit(*(image.size[::-1] if turned else image.size))
    return to_srgb(_draft(image, size[::-1] if turned else size)).resize(size)


def _draft(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Return a JPEG at the given size if it can be decoded at a fraction of its size that is still larger."""
    full_size = image.size
    drafted = image.draft(None, tuple(int(side * DRAFT_HEADROOM) + 1 for side in size))  # only affects JPEG
    if image.size == full_size:
        return image
    return image.resize(size, box=drafted[1])  # the box excludes the pixels added by rounding up


def check_file(path: Path) -> None:
    """Raise unless it is a regular file, before it is opened: reading a pipe or a device could hang."""
    try:
        info = path.stat()
    except FileNotFoundError as error:
        raise FileNotFoundError("no such file") from error
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(info.st_mode):
        raise ValueError("not a plain file")
    if info.st_size == 0:
        raise ValueError("the file is empty (zero bytes)")
