"""The one way in for an image: an upright RGB picture, or an error that says why not."""

import io
import os
import stat
import warnings
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import imagehash
import numpy as np
import xxhash
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_IMAGE_PIXELS = 50_000_000  # a decoded RGB picture of this size takes 150 MB
# Names another limit, px, that holds for every command and its workers: what was prepared can be trained on.
PIXELS_VARIABLE = "DATA_PREP_MAX_IMAGE_PIXELS"
PILLOWS_LIMIT = 178_956_970  # Pillow opens no larger image
FORMATS = ("JPEG", "PNG", "TIFF", "BMP", "GIF", "WEBP", "JPEG2000", "AVIF", "PPM")  # EPS, for one, is a program
MAX_ASPECT_RATIO = 200  # MAX_RATIO of qwen_vl_utils
PATCH_CELL = 28  # px; in Qwen2.5-VL one language-model token covers a square of this side (patch 14 x merge 2)
ORIENTATION, GPS_IFD, EXIF_IFD = 0x0112, 0x8825, 0x8769  # EXIF tags
PRIVATE_TAGS = {
    "GPS": {GPS_IFD},
    "date": {0x0132, 0x9003, 0x9004},
    # artist, copyright, owner, serial numbers of body and lens, Windows' author
    "person or device": {0x013B, 0x8298, 0xA430, 0xA431, 0xA435, 0x9C9D},
    "text": {0x010E, 0x9286, 0x9C9B, 0x9C9C, 0x9C9E, 0x9C9F},  # description, comment, title, keywords
}
LYING = (5, 6, 7, 8)  # orientations that swap width and height
# How much larger than asked for a JPEG is decoded at least. Less would be sharper than what the model was trained on.
DRAFT_HEADROOM = 4 / 3
SIXTEEN_BIT_MODES = ("I;16", "I;16L", "I;16B", "I;16N")
Fit = Callable[[int, int], tuple[int, int]]

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # `check_size` refuses, or was told not to


def load_image(source: str | os.PathLike | dict | Image.Image, *, fit: Fit | None = None) -> Image.Image:
    """Decode an image and return it upright, in RGB, alpha over white.

    Args:
        source: a path, a PIL image, or what `datasets.Image(decode=False)` gives: `{"bytes", "path"}`.
        fit: takes the upright width and height, px, and returns those to resize to. A JPEG that is more than
            `2 * DRAFT_HEADROOM` times as wide and high is then decoded at a half, a quarter or an eighth of its size.

    Raises:
        ValueError: not a file, not an image, broken, over `max_image_pixels()`, or over `MAX_ASPECT_RATIO`.
        FileNotFoundError: no such file.
    """
    if isinstance(source, Image.Image):
        check_size(source.width, source.height)
        upright = _to_rgb(source)
        return upright.resize(fit(*upright.size)) if fit else upright
    if isinstance(source, dict):
        source = io.BytesIO(source["bytes"]) if source.get("bytes") is not None else source["path"]
    if not isinstance(source, io.BytesIO):
        _check_file(Path(source))
    with _plain_reasons():
        return _decode(Image.open(source, formats=FORMATS), fit)


def _decode(image: Image.Image, fit: Fit | None = None) -> Image.Image:
    check_size(image.width, image.height)
    # Only kinds of files that can hold several pictures have this attribute. In an MPO, which phones write, the others
    # are previews and depth maps.
    if getattr(image, "is_animated", False) and image.format != "MPO":
        raise ValueError("several frames or pages, expected one picture")
    if fit is None:
        return _to_rgb(image)
    turned = image.getexif().get(ORIENTATION, 1) in LYING
    size = fit(*(image.size[::-1] if turned else image.size))
    return _to_rgb(_draft(image, size[::-1] if turned else size)).resize(size)


def _draft(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Return a JPEG at the given size if it can be decoded at a fraction that is still larger, else as it is."""
    whole = image.size
    drafted = image.draft(None, tuple(int(side * DRAFT_HEADROOM) + 1 for side in size))  # does nothing but for JPEG
    if image.size == whole:
        return image
    return image.resize(size, box=drafted[1])  # the box leaves out what sides that do not divide were rounded up by


@contextmanager
def _plain_reasons():
    """Turn what Pillow's decoders raise for damaged files into ValueError."""
    try:
        yield
    except UnidentifiedImageError as error:
        raise ValueError("not an image") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"too large: over {PILLOWS_LIMIT:,} px, at most {max_image_pixels():,} px in all") from error
    except (ValueError, MemoryError):
        raise
    except Exception as error:
        # Damaged bytes lead decoders to raise anything: OSError, SyntaxError, struct.error, ...
        raise ValueError(f"broken image: {error}") from error


def _check_file(path: Path) -> None:
    """Refuse what is not a plain file before it is opened: reading a pipe or a device could hang."""
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


def max_image_pixels() -> int:
    """Return how many px an image may have: 50 million, or what the environment says."""
    text = os.environ.get(PIXELS_VARIABLE) or str(MAX_IMAGE_PIXELS)
    if not text.isdecimal() or not 1 <= int(text) <= PILLOWS_LIMIT:
        raise ValueError(f"{PIXELS_VARIABLE}: expected a whole number from 1 to {PILLOWS_LIMIT}, found {text!r:.60}")
    return int(text)


def check_size(width: int, height: int) -> None:
    """Raise ValueError for a size in px that the model cannot take, or that would fill the memory."""
    if width * height > (limit := max_image_pixels()):
        raise ValueError(f"too large: {width} x {height} px, at most {limit:,} px in all")
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise ValueError(f"too narrow: {width} x {height} px, at most {MAX_ASPECT_RATIO}:1")


def _to_rgb(image: Image.Image) -> Image.Image:
    image.load()
    if image.getexif().get(ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)  # phone photos are stored lying on their side
    if image.mode in SIXTEEN_BIT_MODES:  # convert("RGB") would clip all but the darkest 256 of 65,536 levels to white
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode!r} have no defined white; save the image with 8 or 16 bits")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """What one pass over an image file found.

    Attributes:
        size: upright width and height, px.
        mode: colour mode as stored.
        digest: 128-bit hash of the file, the same for exact copies.
        hashes: perceptual hash of the upright image and of its mirror image, 64 bit each.
        thumbnail: 8 x 8 RGB, to tell a chance hit of the hash from a copy.
        turned: the file is stored lying or mirrored, and EXIF says so.
        private: kinds of metadata that do not belong into a data set: "GPS", "date", "person or device", "text".
    """

    size: tuple[int, int]
    mode: str
    digest: str
    hashes: tuple[int, int]
    thumbnail: bytes
    turned: bool
    private: tuple[str, ...]


def inspect_image(path: str) -> ImageInfo | str:
    """Decode an image whole and return what there is to know of it, or the reason why it cannot be used."""
    try:
        _check_file(Path(path))
        data = Path(path).read_bytes()
        with _plain_reasons(), Image.open(io.BytesIO(data), formats=FORMATS) as stored:
            check_size(stored.width, stored.height)  # first: to look for its EXIF data, Pillow decodes a PNG
            mode, turned, private = stored.mode, stored.getexif().get(ORIENTATION, 1) != 1, private_metadata(stored)
            upright = _decode(stored)
    except (ValueError, OSError) as error:
        return str(error)
    small = upright.resize((32, 32), Image.Resampling.LANCZOS, reducing_gap=2.0)
    grey = small.convert("L")
    return ImageInfo(
        size=upright.size,
        mode=mode,
        digest=xxhash.xxh3_128_hexdigest(data),
        hashes=(perceptual_hash(grey), perceptual_hash(ImageOps.mirror(grey))),
        thumbnail=small.resize((8, 8), Image.Resampling.BOX).tobytes(),
        turned=turned,
        private=private,
    )


def perceptual_hash(grey: Image.Image) -> int:
    """Return the 64-bit hash of a grey picture by its lowest 8 x 8 frequencies."""
    return int(np.packbits(imagehash.phash(grey).hash).view(">u8")[0])


def private_metadata(image: Image.Image) -> tuple[str, ...]:
    """Return which kinds of private metadata an opened image file carries."""
    exif = image.getexif()
    tags = {*exif, *exif.get_ifd(EXIF_IFD)}
    found = [kind for kind, wanted in PRIVATE_TAGS.items() if wanted & tags]
    texts = {key for key, value in image.info.items() if isinstance(value, str)} if image.format == "PNG" else set()
    if texts or {"comment", "photoshop", "xmp"} & set(image.info):
        found.append("text")
    return tuple(dict.fromkeys(found))


def clean_copy(path: str) -> tuple[bytes, str]:
    """Return an image file without its metadata, and the ending of its name: the same pixels and the same way up.

    A JPEG loses the segments that hold metadata and keeps its coded pixels; anything else becomes an upright PNG.
    """
    data = Path(path).read_bytes()
    with Image.open(io.BytesIO(data)) as image:
        kind, orientation = image.format, image.getexif().get(ORIENTATION, 1)
    pixels = load_image({"bytes": data})
    if kind == "JPEG" and orientation in range(1, 9):
        with suppress(ValueError, IndexError):  # damaged, though it can be decoded
            stripped = _strip_jpeg(data, orientation)
            if load_image({"bytes": stripped}).tobytes() == pixels.tobytes():
                return stripped, ".jpg"
    buffer = io.BytesIO()
    Image.frombytes("RGB", pixels.size, pixels.tobytes()).save(buffer, "PNG")
    return buffer.getvalue(), ".png"


def _strip_jpeg(data: bytes, orientation: int) -> bytes:
    """Keep a JPEG's segments for decoding (tables, JFIF, ICC, Adobe) and its orientation, up to the image's end."""
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    payload = exif.tobytes()
    kept = [data[:2], b"\xff\xe1" + (len(payload) + 2).to_bytes(2, "big") + payload]
    position = 2
    while data[position + 1] != 0xDA:  # start of scan: coded pixels follow
        length = 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        if data[position + 1] in (0xE0, 0xE2, 0xEE) or not 0xE0 <= data[position + 1] <= 0xFE:
            kept.append(data[position : position + length])
        position += length
    end = data.find(b"\xff\xd9", position)
    return b"".join([*kept, data[position : end + 2]])


def is_link(name: str) -> bool:
    return "://" in name


def resolve_image(name: str, image_dir: Path) -> Path:
    """Return the absolute path of an image inside `image_dir` (which is resolved already).

    Raises:
        ValueError: the name is an address, or leads out of the folder.
    """
    shown = repr(name if len(name) <= 100 else name[:100] + "...")
    if is_link(name) or name.startswith("data:"):
        raise ValueError(f"{shown} is an address, expected a path inside the image folder")
    if "\0" in name:
        raise ValueError(f"{shown} holds a NUL character")
    try:
        path = (image_dir / name).resolve()
    except (RuntimeError, OSError) as error:  # links that lead to each other
        raise ValueError(f"{shown} cannot be followed: {error.__class__.__name__}") from error
    if not path.is_relative_to(image_dir):
        raise ValueError(f"{shown} leads out of the image folder")
    return path


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
