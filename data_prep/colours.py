"""Colours of an opened image become upright 8-bit sRGB: bit depth, transparency, ICC profile."""

import io
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms, ImageOps

ORIENTATION = 0x0112  # EXIF tag
PHOTOMETRIC, WHITE_IS_ZERO = 262, 0  # tag of a TIFF, and its value for X-ray film and DICOM's MONOCHROME1
SIXTEEN_BIT_MODES = ("I;16", "I;16L", "I;16B", "I;16N")
BIT_DEPTHS = (8, 10, 12, 14, 16)  # of cameras and scanners, in a file of 16 bits
GREY_MODES = ("L", "LA", "La")
ALPHA_MODES = ("RGBA", "LA", "PA", "La", "RGBa")
PROFILE_SPACES = {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK"}
SRGB = ImageCms.createProfile("sRGB")
SAME_COLOURS = 3  # levels of 255 by which the colours of a profile that means sRGB may differ


def to_srgb(image: Image.Image) -> Image.Image:
    """Return an opened image upright, in sRGB, alpha over white.

    Values of 16 bits that need only 8, 10, 12 or 14 are scaled to fill the range. A damaged profile, or one of another
    colour space than the image's, is ignored, as viewers do.

    Raises:
        ValueError: 32-bit pixels, which have no defined white.
    """
    image.load()
    profile = image.info.get("icc_profile")
    white_is_zero = tiff_tag(image, PHOTOMETRIC) == WHITE_IS_ZERO
    if image.getexif().get(ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)  # phone photos are stored rotated
    if image.mode in SIXTEEN_BIT_MODES:  # convert("RGB") would clip all but the darkest 256 of 65,536 levels to white
        levels = (np.asarray(image) >> (used_bits(image) - 8)).astype(np.uint8)
        image = Image.fromarray(255 - levels if white_is_zero else levels)  # Pillow turns 8 bits round by itself
    elif image.mode == "I" and image.format == "PPM":  # Pillow scales 16 bits to fill the range
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode!r} have no defined white; save the image with 8 or 16 bits")
    if image.mode in ALPHA_MODES or "transparency" in image.info:
        image = _over_white(image)
    image = image if image.mode in PROFILE_SPACES else image.convert("RGB")
    if profile and (transform := find_transform(profile, image.mode)):
        return ImageCms.applyTransform(image, transform)
    return image if image.mode == "RGB" else image.convert("RGB")


def tiff_tag(image: Image.Image, tag: int) -> int | None:
    """Return a tag of an opened TIFF; None of another kind of image, or where there is none."""
    return getattr(image, "tag_v2", {}).get(tag)


def _over_white(image: Image.Image) -> Image.Image:
    coloured = image.convert("RGBA")
    coloured = Image.alpha_composite(Image.new("RGBA", image.size, "white"), coloured)
    return coloured.convert("L" if image.mode in GREY_MODES else "RGB")


def used_bits(image: Image.Image) -> int:
    """Return how many bits the values of a 16-bit image need: the next larger of `BIT_DEPTHS`."""
    needed = int(np.asarray(image).max()).bit_length()
    return next(bits for bits in BIT_DEPTHS if bits >= needed)


@lru_cache(maxsize=64)
def find_transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Return the transform from a profile to sRGB; None where the colours are sRGB's, or the profile is unusable."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if source.profile.xcolor_space.strip() != PROFILE_SPACES[mode]:
            return None
        transform = ImageCms.buildTransform(
            source, SRGB, mode, "RGB", ImageCms.Intent.RELATIVE_COLORIMETRIC, ImageCms.Flags.BLACKPOINTCOMPENSATION
        )
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None
    probe = _probe(mode)
    changed = np.asarray(ImageCms.applyTransform(probe, transform), dtype=int) - np.asarray(probe.convert("RGB"))
    return transform if np.abs(changed).max() > SAME_COLOURS else None


def _probe(mode: str) -> Image.Image:
    """Return an image with levels from dark to light in every channel, in all combinations."""
    levels = np.arange(0, 256, 51 if mode != "L" else 15, dtype=np.uint8)
    channels = len(Image.new(mode, (1, 1)).getbands())
    grid = np.stack(np.meshgrid(*[levels] * channels, indexing="ij"), axis=-1).reshape(-1, 1, channels)
    return Image.frombytes(mode, (1, len(grid)), grid.tobytes())


def profile_name(image: Image.Image) -> str | None:
    """Return the name of an image's ICC profile if its colours are converted to sRGB."""
    profile, mode = image.info.get("icc_profile"), "L" if image.mode in GREY_MODES else image.mode
    mode = mode if mode in PROFILE_SPACES else "L" if mode in SIXTEEN_BIT_MODES else "RGB"
    if not profile or find_transform(profile, mode) is None:
        return None
    try:
        name = ImageCms.getProfileDescription(ImageCms.ImageCmsProfile(io.BytesIO(profile)))
    except (ImageCms.PyCMSError, ValueError):  # damaged, though its colours can be read
        name = ""
    return " ".join(name.split())[:60] or "without a name"
