"""One way in for an image: upright, RGB, whole, or refused with a reason."""

import io
from pathlib import Path

import numpy as np
import pytest
import sklearn.datasets
from PIL import Image
from qwen_vl_utils.vision_process import smart_resize

from data_prep.images import load_image
from data_prep.sizes import count_image_tokens, fit_size


def saved(tmp_path, image, name, **options):
    path = tmp_path / name
    image.save(path, **options)
    return path


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "YCbCr", "LA", "RGBA"])
def test_every_mode_becomes_rgb(mode):
    assert load_image(Image.new(mode, (30, 30))).mode == "RGB"


def test_bytes_paths_and_pil_images_give_the_same_pixels(tmp_path):
    path = saved(tmp_path, Image.effect_noise((50, 40), 60).convert("RGB"), "n.png")
    sources = [path, str(path), Image.open(path), {"bytes": path.read_bytes(), "path": "gone.png"}]
    sources.append({"bytes": None, "path": str(path)})
    pixels = [load_image(source).tobytes() for source in sources]
    assert len(set(pixels)) == 1


PHOTOS = sorted((Path(sklearn.datasets.__file__).parent / "images").glob("*.jpg"))  # china.jpg, flower.jpg


@pytest.mark.parametrize("photo", PHOTOS, ids=lambda path: path.stem)
@pytest.mark.parametrize("size", [(239, 159), (160, 107), (119, 79), (80, 53), (59, 39), (40, 26)])
def test_a_jpeg_decoded_at_a_fraction_differs_by_three_levels_at_most(photo, size):
    drafted, whole = load_image(photo, fit=lambda width, height: size), load_image(photo).resize(size)
    difference = np.abs(np.asarray(drafted, dtype=int) - np.asarray(whole, dtype=int))
    assert 0 < difference.mean() < 3


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "MPO"])  # phones write the second: a JPEG with further pictures behind it
def test_a_jpeg_decoded_at_a_fraction_comes_out_upright(tmp_path, orientation, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path, Image.open(PHOTOS[0]), "p.jpg", format=kind, exif=exif)
    sizes = []
    drafted = load_image(path, fit=lambda *size: sizes.append(size) or tuple(side // 4 for side in size))
    whole = load_image(path)
    assert sizes == [whole.size] and drafted.size == tuple(side // 4 for side in whole.size)
    assert np.abs(np.asarray(drafted, dtype=int) - np.asarray(whole.resize(drafted.size), dtype=int)).mean() < 3


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["p.tif", "p.png", "p.webp", "p.avif"])
def test_a_turned_picture_of_any_format_is_fitted_upright(tmp_path, orientation, name):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path, Image.open(PHOTOS[0]).resize((90, 60)), name, exif=exif)
    sizes = []
    fitted = load_image(path, fit=lambda *size: sizes.append(size) or tuple(side // 2 for side in size))
    upright = (60, 90) if orientation > 4 else (90, 60)
    assert sizes == [upright] and load_image(path).size == upright
    assert fitted.tobytes() == load_image(path).resize(fitted.size).tobytes()


@pytest.mark.parametrize("orientation", [1, 6])
def test_what_is_no_much_larger_jpeg_is_decoded_whole(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    photo = Image.open(PHOTOS[0])
    cases = [("near.jpg", 240), ("same.jpg", 427), ("larger.jpg", 900), ("lossless.png", 40)]
    for name, side in cases:
        path = saved(tmp_path, photo, name, exif=exif)
        fitted = load_image(path, fit=lambda width, height, side=side: (side, side))
        assert fitted.tobytes() == load_image(path).resize((side, side)).tobytes()
    opened = Image.open(PHOTOS[0])  # a picture that is handed over stays as it is
    assert load_image(opened, fit=lambda width, height: (40, 40)).size == (40, 40) and opened.size == (640, 427)


def test_a_truncated_jpeg_is_refused_at_a_fraction_too():
    with pytest.raises(ValueError, match="broken image: image file is truncated"):
        load_image({"bytes": truncated_jpeg()}, fit=lambda width, height: (28, 28))


def truncated_jpeg():
    buffer = io.BytesIO()
    Image.effect_noise((200, 200), 60).save(buffer, "JPEG")
    return buffer.getvalue()[:3000]


@pytest.mark.parametrize("cell", [28, 32])
def test_size_and_tokens_of_an_image_follow_the_familys_rule(cell):
    rng = np.random.default_rng(0)
    for height, width in np.exp2(rng.uniform(3, 12, size=(3000, 2))).astype(int).tolist():
        limits = {"min_pixels": int(rng.choice([cell**2, 50176])), "max_pixels": int(rng.choice([200704, 1003520]))}
        if max(height, width) > 200 * min(height, width):
            continue
        expected = smart_resize(height, width, cell, **limits)
        if min(expected) > 0:
            assert fit_size(width, height, **limits, cell=cell) == expected[::-1]
            assert count_image_tokens(height, width, **limits, cell=cell) == expected[0] * expected[1] // cell**2


def test_count_image_tokens_refuses_what_cannot_be_resized():
    limits = {"min_pixels": 784, "max_pixels": 7840}
    with pytest.raises(ValueError, match="too narrow: 201 x 1 px"):
        count_image_tokens(1, 201, **limits)
    with pytest.raises(ValueError, match="too narrow: 1000 x 10 px under max_pixels 7840"):
        count_image_tokens(10, 1000, **limits)
    with pytest.raises(ValueError, match="min_pixels 10 is above max_pixels 5"):
        count_image_tokens(50, 50, min_pixels=10, max_pixels=5)
