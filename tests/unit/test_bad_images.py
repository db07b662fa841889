"""Every kind of image file that is unusual or bad, and what becomes of it: these pixels, or this reason."""

import io
import json
import os
import signal
import socket
import struct
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from collator import VisionSFTCollator, collate_prompts, load_pixels
from data_prep.check import check_images
from data_prep.containers import find_damage
from data_prep.convert import prepare
from data_prep.images import load_image
from data_prep.inspection import ImageInfo, inspect_image
from data_prep.sizes import fit_options, fit_size
from data_prep.sources import Source
from evaluation.examples import decode

WHITE, BLACK, RED, GREY = (255, 255, 255), (0, 0, 0), (255, 0, 0), (128, 128, 128)
NOISE = Image.effect_noise((120, 90), 60).convert("RGB")


def small(mode="RGB", colour="red", size=(30, 20)):
    return Image.new(mode, size, colour)


def coded(image=NOISE, kind="PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def file(data: bytes | Image.Image, name="x.jpg", **options):
    """Say how to make a file: of bytes, or of a picture in the kind that the name's ending stands for."""

    def make(folder: Path) -> Path:
        path = folder / name
        path.write_bytes(data) if isinstance(data, bytes) else data.save(path, **options)
        return path

    return make


def marked(orientation):
    """A picture stored black but for a white left edge, and the EXIF orientation that says how to hold it."""
    picture = small(colour="black", size=(40, 20))
    picture.paste("white", (0, 0, 10, 20))
    exif = Image.Exif()
    exif[0x0112] = orientation
    return file(picture, "x.png", exif=exif)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_header(width, height) -> bytes:
    """A PNG of a few bytes that says it is so large."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def with_chunk(kind: bytes, data: bytes, place: int = 33) -> bytes:
    """A red PNG with one more chunk, behind its header or elsewhere."""
    return coded(small())[:place] + chunk(kind, data) + coded(small())[place:]


def wrong_checksum() -> bytes:
    data = bytearray(coded())
    data[45] ^= 1
    return bytes(data)


def deep_rgb_png() -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 30, 20, 16, 2, 0, 0, 0))
    rows = (b"\0" + struct.pack(">HHH", 65535, 32768, 0) * 30) * 20
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def frames(kind, **options) -> bytes:
    return coded(small(), kind, save_all=True, append_images=[small(colour="blue")], **options)


def deep(value, brightest, name="x.png"):
    """A picture of 16 bits with one value, and another in a corner."""
    values = np.full((20, 30), value, np.uint16)
    values[0, 0] = brightest
    return file(Image.fromarray(values), name)


def transparent_palette() -> bytes:
    return coded(Image.new("P", (30, 20), 0), transparency=0)


def half_clear() -> Image.Image:
    return small("RGBA", (255, 0, 0, 128))


def named(name):
    return lambda folder: file(small(), "x.png")(folder).rename(folder / name)


def pipe(folder):
    os.mkfifo(folder / "x.jpg")
    return folder / "x.jpg"


def listening(folder):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(folder / "s"))
    return folder / "s"


def link(target, name="link.jpg"):
    def make(folder: Path) -> Path:
        (folder / name).symlink_to(target)
        return folder / name

    return make


def inner_link(folder):
    return link(file(small(), "x.png")(folder))(folder)


SMALL = (30, 20), RED
PACKED_TEXT = b"Comment\0\0" + zlib.compress(os.urandom(300) * 10_000)
# (name, how to make it, the upright size and the colour at (5, 5))
ACCEPTED = [
    ("16-bit PNG", deep(32768, 65535), (30, 20), GREY),
    ("16-bit PNG, dark", deep(255, 65535), (30, 20), BLACK),
    ("8 bits in a 16-bit PNG", deep(128, 255), (30, 20), GREY),
    ("10 bits in a 16-bit PNG", deep(512, 1023), (30, 20), GREY),
    ("12 bits in a 16-bit PNG", deep(2048, 4095), (30, 20), GREY),
    ("12 bits in a 16-bit TIFF", deep(2048, 4000, "x.tif"), (30, 20), GREY),
    ("14 bits in a 16-bit TIFF", deep(8192, 16383, "x.tif"), (30, 20), GREY),
    (
        "16-bit TIFF, big-endian",
        file(coded(Image.frombytes("I;16B", (30, 20), b"\x80\0" * 600), "TIFF")),
        (30, 20),
        GREY,
    ),
    ("16-bit PNG in colour", file(deep_rgb_png()), (30, 20), (255, 128, 0)),
    ("1-bit PNG", file(small("1", 1), "x.png"), (30, 20), WHITE),
    ("grey PNG", file(small("L", 128), "x.png"), (30, 20), GREY),
    ("grey and alpha", file(small("LA", (0, 0)), "x.png"), (30, 20), WHITE),
    ("alpha, clear", file(small("RGBA", (9, 9, 9, 0)), "x.png"), (30, 20), WHITE),
    ("alpha, half", file(half_clear(), "x.png"), (30, 20), (255, 127, 127)),
    ("palette", file(small().convert("P"), "x.png"), (30, 20), RED),
    ("palette with a clear colour", file(transparent_palette()), (30, 20), WHITE),
    ("CMYK JPEG", file(small("CMYK", (0, 0, 0, 0)), "x.jpg"), (30, 20), WHITE),
    ("CMYK TIFF", file(small("CMYK", (0, 255, 255, 0)), "x.tif"), (30, 20), RED),
    ("grey JPEG", file(small("L", 128), "x.jpg"), (30, 20), GREY),
    ("progressive JPEG", file(small(colour="white"), "x.jpg", progressive=True), (30, 20), WHITE),
    ("GIF of one frame", file(small(), "x.gif"), (30, 20), RED),
    ("WebP", file(small(), "x.webp", lossless=True), (30, 20), RED),
    ("BMP", file(small(), "x.bmp"), (30, 20), RED),
    ("PPM", file(small(), "x.ppm"), (30, 20), RED),
    ("JPEG 2000", file(small(), "x.jp2"), (30, 20), RED),
    ("AVIF", file(small(colour="white"), "x.avif"), (30, 20), WHITE),
    ("AVIF that is called .jpg", file(coded(small(colour="white"), "AVIF"), "x.jpg"), (30, 20), WHITE),
    ("HEIC", file(coded(small(colour="white"), "HEIF"), "x.heic"), (30, 20), WHITE),
    ("HEIC that is called .jpg", file(coded(small(colour="white"), "HEIF"), "x.jpg"), (30, 20), WHITE),
    ("PNG with 2 MB of text", file(with_chunk(b"tEXt", b"Comment\0" + bytes(2_000_000).replace(b"\0", b"x"))), *SMALL),
    ("PNG with 3 MB of packed text", file(with_chunk(b"zTXt", PACKED_TEXT)), *SMALL),
    ("PNG with 3 MB of Unicode text", file(with_chunk(b"iTXt", b"Comment\0\1\0\0\0" + PACKED_TEXT[9:])), *SMALL),
    ("PNG with 3 MB of text behind its pixels", file(with_chunk(b"zTXt", PACKED_TEXT, place=-12)), *SMALL),
    ("PNG with a comment of 64 MB", file(with_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(1 << 26)))), *SMALL),
    (
        "a phone's JPEG with a preview behind it",
        file(frames("MPO", quality=100, subsampling=0)),
        (30, 20),
        (254, 0, 0),
    ),
    ("held as stored", marked(1), (40, 20), WHITE),
    ("mirrored", marked(2), (40, 20), BLACK),
    ("upside down", marked(3), (40, 20), BLACK),
    ("upside down and mirrored", marked(4), (40, 20), WHITE),
    ("lying and mirrored", marked(5), (20, 40), WHITE),
    ("lying on its left side", marked(6), (20, 40), WHITE),
    ("lying on its other side and mirrored", marked(7), (20, 40), BLACK),
    ("lying on its right side", marked(8), (20, 40), BLACK),
    ("an orientation that does not exist", marked(9), (40, 20), WHITE),
    ("one pixel", file(small(size=(1, 1)), "x.png"), (1, 1), RED),
    ("as narrow as can be", file(small(size=(1, 200)), "x.png"), (1, 200), RED),
    ("as flat as can be", file(small(size=(200, 1)), "x.png"), (200, 1), RED),
    ("a PNG that is called .jpg", file(coded(small()), "x.jpg"), (30, 20), RED),
    ("a name without an ending", named("picture"), (30, 20), RED),
    ("a name in other letters", named("皮膚 صورة 🩺.png"), (30, 20), RED),
    ("bytes behind the picture's end", file(coded(small()) + bytes(1000)), (30, 20), RED),
    ("a link to a picture beside it", inner_link, (30, 20), RED),
]


def frame(marker: int, bits: int) -> bytes:
    """A JPEG whose header says that its pixels are coded in another way."""
    data = bytearray(coded(kind="JPEG"))
    start = data.index(b"\xff\xc0")
    data[start + 1], data[start + 4] = marker, bits
    return bytes(data)


NO_IMAGE, CUT = "not an image", "broken image: image file is truncated"
UNREAD = "not an image that can be read: {}; save it as PNG or JPEG"
FRAMES = "several frames or pages, expected one picture"
# (name, how to make it, the reason or its beginning)
REFUSED = [
    ("pipe", pipe, "not a plain file"),
    ("folder", lambda folder: folder, "not a plain file"),
    ("socket", listening, "not a plain file"),
    ("endless device", lambda folder: Path("/dev/zero"), "not a plain file"),
    ("silent device", lambda folder: Path("/dev/tty"), "not a plain file"),
    ("link to a device", link("/dev/zero"), "not a plain file"),
    ("link to nothing", link("gone.jpg"), "no such file"),
    ("link to itself", link("link.jpg"), "cannot be read: Too many levels of symbolic links"),
    ("missing", lambda folder: folder / "gone.jpg", "no such file"),
    ("name of 5,000 letters", lambda folder: folder / ("x" * 5000), "cannot be read: File name too long"),
    ("zero bytes", file(b""), "the file is empty (zero bytes)"),
    ("text", file(b"hello, not an image"), NO_IMAGE),
    ("web page", file(b"<!DOCTYPE html><html></html>"), NO_IMAGE),
    ("SVG", file(b"<svg xmlns='http://www.w3.org/2000/svg'/>"), NO_IMAGE),
    ("PDF", file(coded(kind="PDF")), NO_IMAGE),
    ("EPS, which is a program", file(coded(kind="EPS")), NO_IMAGE),
    ("icon", file(coded(kind="ICO")), NO_IMAGE),
    ("Targa", file(coded(kind="TGA"), "x.tga"), NO_IMAGE),
    ("zeros", file(bytes(5000)), NO_IMAGE),
    ("JPEG XL", file(b"\xff\x0a" + bytes(90), "x.jxl"), UNREAD.format("JPEG XL")),
    ("JPEG XL in a container", file(b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(90)), UNREAD.format("JPEG XL")),
    ("DICOM", file(bytes(128) + b"DICM" + bytes(90)), UNREAD.format("DICOM")),
    ("12-bit JPEG", file(frame(0xC1, 12)), UNREAD.format("JPEG of 12 bits a colour")),
    ("lossless JPEG of 16 bits", file(frame(0xC3, 16)), UNREAD.format("lossless JPEG")),
    ("JPEG-LS", file(frame(0xF7, 8)), UNREAD.format("JPEG-LS")),
    ("film", file(b"\0\0\0\x18ftypmp42" + bytes(90)), UNREAD.format("a film or a sequence of images, or damaged")),
    ("half a HEIC", file(coded(kind="HEIF")[:2000]), "Invalid input: Unexpected end of file"),
    ("HEIC of two pictures", file(frames("HEIF")), FRAMES),
    ("NumPy array", file(b"\x93NUMPY\x01\x00v\x00{'descr': '|u1'}"), NO_IMAGE),
    ("first bytes of a PNG", file(coded()[:8]), NO_IMAGE),
    ("first bytes of a JPEG", file(coded(kind="JPEG")[:4]), NO_IMAGE),
    ("half a JPEG", file(coded(kind="JPEG")[:2000]), CUT),
    ("half a progressive JPEG", file(coded(kind="JPEG", progressive=True)[:2000]), CUT),
    ("half a PNG", file(coded()[:5000]), CUT),
    ("half a GIF", file(coded(kind="GIF")[:5000]), CUT),
    ("half a TIFF", file(coded(kind="TIFF")[:5000]), CUT),
    ("half a packed TIFF", file(coded(kind="TIFF", compression="tiff_lzw")[:5000]), NO_IMAGE),
    ("half a BMP", file(coded(kind="BMP")[:5000]), CUT),
    ("half a WebP", file(coded(kind="WEBP")[:2000]), "broken image: "),
    ("half a JPEG 2000", file(coded(kind="JPEG2000")[:2000]), "broken image: "),
    ("half an AVIF", file(coded(kind="AVIF")[:2000]), NO_IMAGE),
    ("PNG with a wrong checksum", file(wrong_checksum()), "broken image: "),
    ("float TIFF", file(small("F", 0.5), "x.tif"), "pixels of mode 'F' have no defined white; save the image with 8"),
    ("32-bit TIFF", file(small("I", 70000), "x.tif"), "pixels of mode 'I' have no defined white; save the image with"),
    ("animated GIF", file(frames("GIF")), FRAMES),
    ("animated PNG", file(frames("PNG")), FRAMES),
    ("animated WebP", file(frames("WEBP")), FRAMES),
    ("TIFF of two pages", file(frames("TIFF")), FRAMES),
    ("bomb, PNG", file(png_header(7072, 7072)), "too large: 7072 x 7072 px, at most 50,000,000 px in all"),
    ("bomb, larger than Pillow opens", file(png_header(50_000, 50_000)), "too large: over 178,956,970 px, at most 50"),
    ("bomb, PNG of 4 terapixels", file(png_header(2_000_000, 2_000_000)), "too large: over 178,956,970 px, at most"),
    ("narrow", file(small(size=(1, 201)), "x.png"), "too narrow: 1 x 201 px, at most 200:1"),
    ("flat", file(small(size=(4001, 20)), "x.png"), "too narrow: 4001 x 20 px, at most 200:1"),
]


@pytest.fixture(autouse=True)
def within_thirty_seconds():
    """Nothing hangs: a pipe that is opened would wait for ever."""
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("took over 30 s"))
    signal.alarm(30)
    yield
    signal.alarm(0)


def names(cases):
    return [case[0] for case in cases]


@pytest.mark.parametrize(("name", "make", "size", "colour"), ACCEPTED, ids=names(ACCEPTED))
def test_an_unusual_image_comes_out_upright_in_rgb(tmp_path, name, make, size, colour):
    path = make(tmp_path)
    image = load_image(path)
    assert (image.mode, image.size) == ("RGB", size)
    assert image.getpixel((min(5, size[0] - 1), min(5, size[1] - 1))) == colour
    found = inspect_image(str(path))
    assert isinstance(found, ImageInfo) and found.size == size


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize(("name", "make", "reason"), REFUSED, ids=names(REFUSED))
def test_a_bad_image_is_refused_alike_by_preparation_training_and_prediction(tmp_path, name, make, reason):
    path = make(tmp_path)
    found = inspect_image(str(path))
    assert isinstance(found, str) and found.startswith(reason) and "\n" not in found
    for options in ({}, {"fit": lambda width, height: (28, 28)}):
        with pytest.raises((ValueError, OSError)) as error:
            load_image(str(path), **options)
        assert str(error.value).startswith(reason)


def test_the_tables_hold_as_many_cases_as_promised():
    assert len(ACCEPTED) + len(REFUSED) >= 40
    assert len(set(names(ACCEPTED) + names(REFUSED))) == len(ACCEPTED) + len(REFUSED)


def test_a_turned_photo_is_the_same_in_training_evaluation_and_prediction(tmp_path, processor):
    turned = marked(6)(tmp_path)
    upright = Image.fromarray(np.rot90(np.asarray(Image.open(turned)), -1))
    fit = partial(fit_size, **fit_options(processor.image_processor))
    messages = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "melanoma"}]
    examples = [{"id": "x", "images": [image], "messages": messages} for image in (str(turned), upright)]
    trained = [VisionSFTCollator(processor)([example])["pixel_values"] for example in examples]
    evaluated = [collate_prompts(processor, [{**one, "messages": messages[:1]}])["pixel_values"] for one in examples]
    assert all((values == trained[0]).all() for values in [*trained, *evaluated])
    predicted = decode(examples[0], fit=fit)["images"][0]
    assert predicted.tobytes() == load_pixels(examples[1], processor)[0].tobytes()


def limit(monkeypatch, value):
    monkeypatch.setenv("DATA_PREP_MAX_IMAGE_PIXELS", value)


def test_the_pixel_limit_can_be_set_and_holds_in_worker_processes(tmp_path, monkeypatch):
    small(size=(30, 29)).save(tmp_path / "a.png")
    (tmp_path / "a.json").write_text('[{"image": "a.png", "question": "q", "answer": "a"}]')
    for value, reason in [("869", "too large: 30 x 29 px, at most 869 px in all"), ("870", None)]:
        limit(monkeypatch, value)
        options = {"num_workers": 2, "show_progress": False, "split": (1, 0, 0)}
        if reason is None:
            assert len(prepare([Source(tmp_path / "a.json", tmp_path)], **options).splits["train"]) == 1
        else:
            with pytest.raises(ValueError, match=reason):
                prepare([Source(tmp_path / "a.json", tmp_path)], **options)


def test_a_raised_pixel_limit_lets_larger_images_in(tmp_path, monkeypatch):
    path = file(Image.new("1", (7072, 7072)), "x.png")(tmp_path)
    with pytest.raises(ValueError, match="too large: 7072 x 7072 px, at most 50,000,000 px in all"):
        load_image(Image.open(path))
    limit(monkeypatch, "60000000")
    assert load_image(path).size == (7072, 7072)


@pytest.mark.parametrize("value", ["0", "-5", "50MP", "1e9", "178956971"])
def test_a_pixel_limit_that_is_none_is_named(monkeypatch, value):
    limit(monkeypatch, value)
    rule = "DATA_PREP_MAX_IMAGE_PIXELS: expected a whole number from 1 to 178956970, found"
    with pytest.raises(ValueError, match=f"{rule} '{value}'"):
        load_image(small())


# Names of images that lead out of the image folder, or anywhere else; all are refused before anything is opened.
LINK = "is a link that leads out of the image folder; `python -m data_prep convert --follow-links` reads such files"
OUT, ADDRESS = "is outside the image folder", "is an address, expected a path inside the image folder"
ESCAPES = [
    ("../secret.png", OUT),
    ("a/../../secret.png", OUT),
    ("./.././secret.png", OUT),
    ("gone/../../secret.png", OUT),
    ("/etc/passwd", OUT),
    ("//etc/passwd", OUT),
    ("/dev/zero", OUT),
    ("/dev/stdin", OUT),
    ("/proc/self/environ", OUT),
    ("linked/secret.png", LINK),
    ("linked.png", LINK),
    ("device.png", LINK),
    ("loop.png", "cannot be followed: RuntimeError"),
    ("http://127.0.0.1:9/x.png", ADDRESS),
    ("https://127.0.0.1:9/x.png", ADDRESS),
    ("HTTP://127.0.0.1:9/x.png", ADDRESS),
    ("ftp://127.0.0.1/x.png", ADDRESS),
    ("s3://bucket/x.png", ADDRESS),
    ("file:///etc/passwd", ADDRESS),
    ("data:image/png;base64,AAAA", ADDRESS),
    ("x.png\0.jpg", "contains a NUL character"),
    ("file:/etc/passwd", "no such file"),
    ("http:/127.0.0.1/x.png", "no such file"),
    ("..\\secret.png", "no such file"),
    ("%2e%2e/secret.png", "no such file"),
    ("~/secret.png", "no such file"),
    (".", "not a plain file"),
    ("y" * 5000, "cannot be read: File name too long"),
]


@pytest.fixture
def no_requests(monkeypatch):
    """Let nothing leave the machine; the list names what tried."""
    tried = []

    def refuse(*args, **options):
        tried.append(args)
        raise OSError("no network in this test")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return tried


@pytest.mark.parametrize(("name", "reason"), ESCAPES, ids=[name[:30] for name, _ in ESCAPES])
def test_no_image_name_leads_out_of_the_folder(tmp_path, no_requests, name, reason):
    root = tmp_path / "images"
    root.mkdir()
    small().save(tmp_path / "secret.png")
    (root / "linked").symlink_to(tmp_path)
    (root / "linked.png").symlink_to(tmp_path / "secret.png")
    (root / "device.png").symlink_to("/dev/zero")
    (root / "loop.png").symlink_to(root / "loop.png")
    annotations = [{"id": "x", "image": name, "question": "q", "answer": "a"}]
    (tmp_path / "a.json").write_text(json.dumps(annotations))
    with pytest.raises(ValueError) as error:
        prepare([Source(tmp_path / "a.json", root)], show_progress=False, num_workers=1)
    assert str(error.value).startswith("a.json: record 0 (id 'x'), image ") and reason in str(error.value)
    assert len(str(error.value)) < 5200 and no_requests == []


@pytest.mark.parametrize(("orientation", "turned"), [(1, False), (3, True), (6, True)])
def test_a_turned_tiff_is_reported_with_its_upright_size(tmp_path, orientation, turned):
    exif = Image.Exif()
    exif[0x0112] = orientation
    small(size=(40, 20)).save(tmp_path / "x.tif", exif=exif)
    found = inspect_image(str(tmp_path / "x.tif"))
    assert (found.turned, found.size) == (turned, (20, 40) if orientation == 6 else (40, 20))


@pytest.mark.parametrize(("orientation", "turned"), [(0, False), (1, False), (2, True), (8, True), (9, False)])
def test_only_valid_orientations_turn_an_image(tmp_path, orientation, turned):
    assert inspect_image(str(marked(orientation)(tmp_path))).turned == turned


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda data: data, None),
        (lambda data: data + b"more", None),
        (lambda data: data[:-300] + b"\xff\x01\xff\x01" + data[-296:], "expected a marker of a JPEG segment"),
    ],
)
def test_a_jpeg_that_decoders_show_in_spite_of_damage_is_reported(tmp_path, damage, reason):
    picture = Image.effect_noise((160, 160), 90).convert("RGB")
    (tmp_path / "x.jpg").write_bytes(damage(coded(picture, "JPEG", restart_marker_rows=1)))
    found = inspect_image(str(tmp_path / "x.jpg"))
    assert isinstance(found, ImageInfo) and found.damage == reason
    sample = {"record": 0, "id": "x", "origin": "a.json", "images": ["x.jpg"], "files": ["x.jpg"]}
    kinds = [finding.kind for finding in check_images([sample], {"x.jpg": found})]
    assert ("damaged" in kinds) == (reason is not None)


def photo():
    """Smooth colours with noise, as of a camera."""
    colours = np.random.default_rng(0).integers(40, 230, (9, 12, 3), dtype=np.uint8)
    smooth = Image.fromarray(colours).resize((320, 240), Image.Resampling.BICUBIC)
    return Image.blend(smooth, Image.effect_noise((320, 240), 90).convert("RGB"), 0.2)


@pytest.mark.parametrize(
    "options", [{}, {"quality": 95}, {"subsampling": 0}, {"restart_marker_rows": 4}, {"quality": 30}]
)
@pytest.mark.parametrize(("place", "count"), [(0.3, 512), (0.9, 70)])
def test_zero_bytes_among_coded_pixels_are_reported_with_their_place(options, place, count):
    data = coded(photo(), "JPEG", **options)
    at = int(len(data) * place)
    damaged = data[:at] + bytes(count) + data[at + count :]
    start = at - (len(data[:at]) - len(data[:at].rstrip(b"\0")))
    assert find_damage(damaged) == f"zero bytes in place of coded pixels, from byte {start:,} on"
    assert (
        find_damage(data)
        is find_damage(data + bytes(5000))
        is find_damage(data[:at] + bytes(8) + data[at + 8 :])
        is None
    )


def test_a_picture_that_lost_its_second_half_is_reported():
    data = coded(photo(), "JPEG")
    half = len(data) // 2
    assert "zero bytes in place of coded pixels" in find_damage(data[:half] + bytes(len(data) - half - 2) + data[-2:])


def plain_pictures():
    """Pictures whose coded pixels have long runs of zero bits, and are right."""
    border, wide = Image.new("RGB", (640, 480)), Image.linear_gradient("L").resize((640, 480))
    border.paste(photo(), (160, 120))
    grid = Image.fromarray((np.indices((480, 640)).sum(0) // 8 % 2 * 255).astype(np.uint8))
    return [Image.new("RGB", (640, 480), colour) for colour in ("black", "white", "tan")] + [border, wide, grid]


@pytest.mark.parametrize("options", [{}, {"optimize": True}, {"progressive": True}])
@pytest.mark.parametrize("quality", [1, 30, 75, 90, 97, 100])
def test_plain_areas_are_no_damage(options, quality):
    for picture in plain_pictures():
        assert find_damage(coded(picture, "JPEG", quality=quality, **options)) is None
        assert (
            find_damage(coded(picture.transpose(Image.Transpose.ROTATE_90), "JPEG", quality=quality, **options))
            is None
        )


def test_a_jpeg_with_headers_that_are_too_short_is_damaged():
    data = coded(photo(), "JPEG")
    scan, tables = data.index(b"\xff\xda"), data.index(b"\xff\xc4")
    assert find_damage(data[: scan + 2] + b"\0\3\xf0" + bytes(99) + b"\xff\xd9") == "a segment is too short"
    assert find_damage(data[: tables + 2] + b"\0\4\0\0" + data[tables:]) == "a segment is too short"
