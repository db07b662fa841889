"""Private metadata of every kind is found, and in no copy that is embedded."""

import io
import zlib

import pytest
from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from data_prep.containers import drop_png_text, end_of_image, jpeg_segments, png_chunks
from data_prep.images import load_image
from data_prep.inspection import inspect_image
from data_prep.metadata import clean_copy
from helpers.profiles import DISPLAY_P3, make_profile

SECRET = b"Jane Doe"
NOISE = Image.effect_noise((90, 60), 60).convert("RGB")


def coded(kind="JPEG", tags=None, ifd=None, **options) -> bytes:
    exif = Image.Exif()
    for tag, value in (tags or {}).items():
        exif[tag] = value
    for number, values in (ifd or {}).items():
        exif.get_ifd(number).update(values)
    buffer = io.BytesIO()
    NOISE.save(buffer, kind, exif=exif, **options)
    return buffer.getvalue()


def segment(marker: int, payload: bytes) -> bytes:
    return bytes((0xFF, marker)) + (len(payload) + 2).to_bytes(2, "big") + payload


def chunk(kind: bytes, data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


def in_header(extra: bytes) -> bytes:
    plain = coded()
    return plain[:2] + extra + plain[2:]


def between_scans() -> bytes:
    plain = coded(progressive=True)
    scans = [start for marker, start, _ in jpeg_segments(plain) if marker == 0xDA]
    return plain[: scans[1]] + segment(0xFE, SECRET) + plain[scans[1] :]


def tiff(tags) -> bytes:
    info = ImageFileDirectory_v2()
    for tag, value in tags.items():
        info[tag] = value
        if isinstance(value, bytes):
            info.tagtype[tag] = 7
    buffer = io.BytesIO()
    NOISE.save(buffer, "TIFF", tiffinfo=info)
    return buffer.getvalue()


def digits(comment: bytes) -> bytes:
    values = b" ".join(b"%d" % value for value in NOISE.convert("RGB").tobytes())
    return b"P3\n%d %d\n255\n" % NOISE.size + values + comment + b"\n"


def phone_photo() -> bytes:
    buffer = io.BytesIO()
    NOISE.save(buffer, "MPO", save_all=True, append_images=[Image.new("RGB", (90, 60), "blue")])
    return buffer.getvalue()


TEXT = SECRET.decode()
ORIENTED = b"\x12\x01\x03\0\x01\0\0\0\x01\0\0\0"  # an entry of EXIF: orientation 1
PRIVATE = {
    "maker note": (coded(ifd={0x8769: {0x927C: SECRET}}), "person or device"),
    "host computer": (coded(tags={0x013C: TEXT}), "person or device"),
    "unique id": (coded(ifd={0x8769: {0xA420: TEXT}}), "person or device"),
    "document name": (coded(tags={0x010D: TEXT}), "text"),
    "page name": (coded(tags={0x011D: TEXT}), "text"),
    "an unknown tag": (coded(tags={0xC65F: TEXT}), "text"),
    "document name of a TIFF": (tiff({0x010D: TEXT}), "text"),
    "IPTC in a TIFF": (tiff({33723: SECRET}), "text"),
    "maker note of a HEIC": (coded("HEIF", ifd={0x8769: {0x927C: SECRET}}), "person or device"),
    "host computer of a WebP": (coded("WEBP", tags={0x013C: TEXT}), "person or device"),
    "behind a JPEG's end": (coded() + SECRET, "data behind the image"),
    "behind a progressive JPEG's end": (coded(progressive=True) + SECRET, "data behind the image"),
    "behind a PNG's end": (coded("PNG") + SECRET, "data behind the image"),
    "behind a WebP's end": (coded("WEBP") + SECRET, "data behind the image"),
    "a phone's second picture": (phone_photo(), "data behind the image"),
    "behind a BMP's end": (coded("BMP") + SECRET, "data behind the image"),
    "comment of a PPM": (coded("PPM").replace(b"P6\n", b"P6\n# " + SECRET + b"\n", 1), "text"),
    "comment behind a PPM's size": (coded("PPM").replace(b"\n255\n", b" # " + SECRET + b"\n255\n", 1), "text"),
    "comment of a PPM in digits": (digits(b"\n# " + SECRET), "text"),
    "EXIF without a place": (in_header(segment(0xE1, b"Exif\0\0II*\0\xff\xff\xff\xff" + SECRET)), "text"),
    "EXIF cut off": (in_header(segment(0xE1, b"Exif\0\0II*\0\x08\0\0\0\x02\0" + ORIENTED + SECRET)), "text"),
    "comment": (in_header(segment(0xFE, SECRET)), "text"),
    "comment between scans": (between_scans(), "text"),
    "XMP": (in_header(segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + SECRET)), "text"),
    "unknown segment": (in_header(segment(0xEB, b"JP" + SECRET)), "text"),
    "thumbnail in the wrong JFIF segment": (in_header(segment(0xE0, b"JFXX\0" + SECRET)), "text"),
    "text of a PNG": (coded("PNG")[:33] + chunk(b"tEXt", b"Author\0" + SECRET) + coded("PNG")[33:], "text"),
    "unknown chunk of a PNG": (coded("PNG")[:33] + chunk(b"prVt", SECRET) + coded("PNG")[33:], "text"),
}


@pytest.mark.parametrize(("data", "kind"), PRIVATE.values(), ids=PRIVATE)
def test_private_data_are_found_and_not_copied(tmp_path, data, kind):
    path = tmp_path / "x"
    path.write_bytes(data)
    assert inspect_image(str(path)).private == (kind,)
    copied, _ = clean_copy(str(path))
    (tmp_path / "copy").write_bytes(copied)
    assert SECRET not in copied
    assert inspect_image(str(tmp_path / "copy")).private == ()
    assert load_image(tmp_path / "copy").tobytes() == load_image(path).tobytes()
    if data[:2] == b"\xff\xd8":
        assert copied[:2] == b"\xff\xd8"  # a JPEG keeps its coded pixels


def test_a_preview_in_exif_is_found(tmp_path):
    preview = coded()
    ifd = b"\x02\0" + b"\x01\x02\x04\0\x01\0\0\0" + (44).to_bytes(4, "little")
    ifd += b"\x02\x02\x04\0\x01\0\0\0" + len(preview).to_bytes(4, "little") + bytes(4)
    exif = b"Exif\0\0II*\0\x08\0\0\0" + b"\0\0" + (14).to_bytes(4, "little") + ifd + preview
    (tmp_path / "x.jpg").write_bytes(in_header(segment(0xE1, exif)))
    assert inspect_image(str(tmp_path / "x.jpg")).private == ("preview",)
    copied, _ = clean_copy(str(tmp_path / "x.jpg"))
    assert len(copied) < len(preview) + 200


HARMLESS = {
    "camera and exposure": coded(tags={0x010F: "Canon", 0x0110: "EOS", 0x0131: "1.0"}, ifd={0x8769: {0x829A: 0.1}}),
    "resolution and profile": coded(dpi=(72, 72), icc_profile=make_profile(DISPLAY_P3)),
    "PNG with both": coded("PNG", dpi=(72, 72), icc_profile=make_profile(DISPLAY_P3)),
    "progressive with restarts": coded(progressive=True, restart_marker_rows=1),
    "padding behind the end": coded() + bytes(100),
    "TIFF": tiff({}),
    "BMP": coded("BMP"),
    "PPM": coded("PPM"),
    "PPM in digits": digits(b""),
}


@pytest.mark.parametrize("data", HARMLESS.values(), ids=HARMLESS)
def test_what_names_nobody_is_left_alone(tmp_path, data):
    (tmp_path / "x").write_bytes(data)
    assert inspect_image(str(tmp_path / "x")).private == ()


def test_a_clean_copy_keeps_its_colours(tmp_path):
    (tmp_path / "x.jpg").write_bytes(coded(icc_profile=make_profile(DISPLAY_P3)) + SECRET)
    copied, suffix = clean_copy(str(tmp_path / "x.jpg"))
    assert suffix == ".jpg" and b"ICC_PROFILE" in copied and SECRET not in copied
    assert load_image({"bytes": copied}).tobytes() == load_image(tmp_path / "x.jpg").tobytes()


def test_text_goes_and_what_turns_a_png_stays():
    plain = coded("PNG")
    turning = chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation='6'/>")
    mixed = plain[:33] + chunk(b"tEXt", b"Comment\0x") + turning + chunk(b"zTXt", b"A\0\0") + plain[33:]
    assert drop_png_text(mixed) == plain[:33] + turning + plain[33:]
    assert drop_png_text(plain) is plain
    assert drop_png_text(mixed[:70]) == mixed[:33] + mixed[54:70]  # a chunk that is cut is left to Pillow


def test_the_end_of_an_image_is_found():
    for kind in ("JPEG", "PNG", "WEBP", "BMP"):
        data = coded(kind)
        assert end_of_image(data + b"more") == len(data)
    assert [kind for kind, _, _ in png_chunks(coded("PNG"))][-1] == b"IEND"
    assert end_of_image(coded()[:200]) == 200
