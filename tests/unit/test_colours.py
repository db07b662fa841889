"""Images in other colour spaces come out in sRGB, in training, prediction and evaluation alike."""

import io

import numpy as np
import pytest
from PIL import Image, ImageCms

from collator import load_pixels
from data_prep.images import load_image
from data_prep.inspection import inspect_image
from evaluation.examples import decode
from helpers.profiles import ADOBE_RGB, DISPLAY_P3, PROPHOTO, in_srgb, make_profile

SKIN = (200, 140, 110)


def coded(profile, colour=SKIN, kind="PNG", mode="RGB", **options) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (64, 48), colour).save(buffer, kind, icc_profile=profile, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "JPEG", "HEIF", "AVIF"])
@pytest.mark.parametrize("primaries", [DISPLAY_P3, ADOBE_RGB, PROPHOTO], ids=["P3", "Adobe RGB", "ProPhoto"])
def test_a_wide_colour_space_is_converted(primaries, kind):
    options = {"lossless": True} if kind == "WEBP" else {"quality": 100} if kind in ("JPEG", "HEIF", "AVIF") else {}
    data = coded(make_profile(primaries), kind=kind, **options)
    expected = in_srgb(SKIN, primaries)
    assert np.abs(np.subtract(expected, SKIN)).max() > 5
    assert np.abs(np.subtract(load_image({"bytes": data}).getpixel((20, 20)), expected)).max() <= 4


def test_alpha_palette_and_grey_are_converted_too():
    profile = make_profile(ADOBE_RGB)
    expected = in_srgb(SKIN, ADOBE_RGB)
    clear = load_image({"bytes": coded(profile, (*SKIN, 255), mode="RGBA")})
    assert np.abs(np.subtract(clear.getpixel((9, 9)), expected)).max() <= 2
    palette = Image.new("RGB", (64, 48), SKIN).quantize(2)
    buffer = io.BytesIO()
    palette.save(buffer, "PNG", icc_profile=profile)
    assert np.abs(np.subtract(load_image({"bytes": buffer.getvalue()}).getpixel((9, 9)), expected)).max() <= 2
    linear = make_profile(None, gamma=1.0)
    assert load_image({"bytes": coded(linear, 55, mode="L")}).getpixel((9, 9)) == (128, 128, 128)
    assert load_image({"bytes": coded(linear, (55, 255), mode="LA")}).getpixel((9, 9)) == (128, 128, 128)


@pytest.mark.parametrize(
    "profile",
    [
        ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
        b"no profile",
        make_profile(DISPLAY_P3)[:200],
        make_profile(None, gamma=1.0),  # of grey values, in an image in colour
    ],
    ids=["sRGB", "no profile", "cut", "another space"],
)
def test_srgb_and_unusable_profiles_leave_every_pixel(profile):
    assert load_image({"bytes": coded(profile)}).getcolors() == [(64 * 48, SKIN)]


def test_training_evaluation_and_prediction_see_the_same_colours(tmp_path, processor):
    (tmp_path / "a.jpg").write_bytes(coded(make_profile(DISPLAY_P3), kind="JPEG", quality=95))
    path = str(tmp_path / "a.jpg")
    (trained,) = load_pixels({"images": [path]}, processor)
    (embedded,) = load_pixels({"images": [{"bytes": (tmp_path / "a.jpg").read_bytes(), "path": None}]}, processor)
    (opened,) = load_pixels({"images": [Image.open(path)]}, processor)
    predicted = decode({"images": [path]}, fit=lambda *size: trained.size)["images"][0]
    assert trained.tobytes() == embedded.tobytes() == opened.tobytes() == predicted.tobytes()
    assert np.abs(np.subtract(trained.getpixel((9, 9)), in_srgb(SKIN, DISPLAY_P3))).max() <= 3


def test_a_profile_whose_name_is_damaged_is_used_all_the_same(tmp_path):
    profile = make_profile(DISPLAY_P3).replace(b"test\0", b"\xff\x9d\n\xfe\0")
    (tmp_path / "a.png").write_bytes(coded(profile))
    found = inspect_image(str(tmp_path / "a.png"))
    assert found.profile and "\n" not in found.profile
    assert load_image(tmp_path / "a.png").getpixel((0, 0)) != SKIN


@pytest.mark.parametrize("top", [255, 4095, 65535])
def test_a_tiff_in_which_zero_is_white_is_turned_round(tmp_path, top):
    """As exports of DICOM's MONOCHROME1 are, whatever their depth."""
    levels = np.linspace(0, top, 256).round().astype(np.uint8 if top == 255 else np.uint16).reshape(16, 16)
    Image.fromarray(levels).save(tmp_path / "black.tif")
    data = bytearray((tmp_path / "black.tif").read_bytes())
    entry = data.index(b"\x06\x01\x03\0\x01\0\0\0\x01\0")  # tag 262, one short, 1: zero is black
    data[entry + 8] = 0
    (tmp_path / "white.tif").write_bytes(data)
    black, white = (np.asarray(load_image(tmp_path / name), int) for name in ("black.tif", "white.tif"))
    assert black[0, 0].tolist() == [0, 0, 0] and black[-1, -1].tolist() == [255, 255, 255]
    assert (black + white == 255).all()


def test_the_inspection_names_the_profile_and_the_bits(tmp_path):
    (tmp_path / "a.png").write_bytes(coded(make_profile(DISPLAY_P3)))
    Image.fromarray(np.full((30, 30), 3000, np.uint16)).save(tmp_path / "b.png")
    first, second = (inspect_image(str(tmp_path / name)) for name in ("a.png", "b.png"))
    assert (first.profile, first.bits) == ("test", None)
    assert (second.profile, second.bits, second.brightest) == (None, 12, 187)


def test_a_pgm_of_16_bits_keeps_its_levels(tmp_path):
    levels = np.linspace(0, 65535, 256).round().astype(">u2").reshape(16, 16)
    (tmp_path / "a.pgm").write_bytes(b"P5 16 16 65535\n" + levels.tobytes())
    assert np.array_equal(np.asarray(load_image(tmp_path / "a.pgm"))[..., 0], levels >> 8)
