"""Private metadata of image files: what there is, and copies without it."""

import io
from pathlib import Path

from PIL import Image
from PIL.ExifTags import IFD

from .colours import ORIENTATION
from .containers import JPEG, PNG, PPM_COMMENT, end_of_image, jpeg_segments, png_chunks
from .images import load_image

PRIVATE_TAGS = {
    "GPS": {IFD.GPSInfo, 33550, 33922, 34264},  # the last three place a GeoTIFF on the map
    "date": {0x0132, 0x9003, 0x9004},
    # artist, host computer, copyright, owner, serial numbers of body and lens, unique id, Windows' author, maker note
    "person or device": {0x013B, 0x013C, 0x8298, 0xA420, 0xA430, 0xA431, 0xA435, 0x9C9D, IFD.MakerNote},
    # description, document, page, comment, title, keywords
    "text": {0x010E, 0x010D, 0x011D, 0x9286, 0x9C9B, 0x9C9C, 0x9C9E, 0x9C9F},
}
# Tags of text or bytes that name no person, place or time; all others of such a type may. Make, model, software,
# interoperability, JPEG tables, ICC profile, versions, components, source, scene, filter, lens, padding
HARMLESS_TAGS = {0x010F, 0x0110, 0x0131, 0x0001, 0x0002, 347, 34675, 0x9000, 0xA000, 0x9101, 0xA300, 0xA301, 0xA302}
HARMLESS_TAGS |= {0xA433, 0xA434, 0x8828, 0xEA1C}
EXIF_SEGMENT = (0xE1, b"Exif\0")
# Further segments without metadata: JFIF, ICC profile, the places of a phone's further pictures, Adobe's colour space
PLAIN_SEGMENTS = ((0xE0, b"JFIF\0"), (0xE2, b"ICC_PROFILE\0"), (0xE2, b"MPF\0"), (0xEE, b"Adobe"))
PLAIN_CHUNKS = {b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS", b"gAMA", b"cHRM", b"sRGB", b"iCCP", b"sBIT", b"bKGD"}
PLAIN_CHUNKS |= {b"pHYs", b"hIST", b"sPLT", b"cICP", b"mDCV", b"cLLI", b"acTL", b"eXIf"}


def private_metadata(image: Image.Image, data: bytes) -> tuple[str, ...]:
    """Return the kinds of private metadata in an opened image, the bytes of whose file are `data`."""
    exif = image.getexif()
    tags = {**exif, **exif.get_ifd(IFD.Exif)}
    kinds = [kind for kind, private in PRIVATE_TAGS.items() if private & set(tags)]
    texts = [tag for tag, value in tags.items() if isinstance(value, str | bytes) and value and tag != IFD.MakerNote]
    listed = set().union(*PRIVATE_TAGS.values())
    if set(texts) - HARMLESS_TAGS - listed or {"comment", "photoshop", "xmp"} & set(image.info) or _has_text(data):
        kinds.append("text")
    if _has_unread_tags(image.info.get("exif"), exif):
        kinds.append("text")
    if exif.get_ifd(IFD.IFD1):
        kinds.append("preview")
    if data[end_of_image(data) :].strip(b"\0\r\n"):
        kinds.append("data behind the image")
    return tuple(dict.fromkeys(kinds))


def _has_unread_tags(block: bytes | None, exif: Image.Exif) -> bool:
    """Whether an EXIF block has bytes and no tags, or more tags than Pillow reads, as a damaged one."""
    block = (block or b"").removeprefix(b"Exif\0\0")
    order = "big" if block.startswith(b"MM") else "little"
    start = int.from_bytes(block[4:8], order)
    count = int.from_bytes(block[start : start + 2], order)
    if count:
        return len(exif) < count
    return bool(block[8:].strip(b"\0")) and not exif.get_ifd(IFD.IFD1)


def _has_text(data: bytes) -> bool:
    """Whether a PNG has texts or unknown chunks, a JPEG comments or unknown segments, or a PPM comments."""
    if PPM_COMMENT.match(data):
        return True
    if data.startswith(PNG):
        return not {kind for kind, _, _ in png_chunks(data)} <= PLAIN_CHUNKS
    if not data.startswith(JPEG):
        return False
    try:
        return any(not _is_plain(data, *segment, EXIF_SEGMENT) for segment in jpeg_segments(data))
    except ValueError:  # damaged, though it can be decoded
        return True


def _is_plain(data: bytes, marker: int, start: int, end: int, *others: tuple[int, bytes]) -> bool:
    """Whether a segment of a JPEG is needed for decoding, or one of `others`."""
    if not 0xE0 <= marker <= 0xEF and marker != 0xFE:
        return True
    return any(marker == known and data.startswith(name, start + 4) for known, name in (*PLAIN_SEGMENTS, *others))


def clean_copy(path: str) -> tuple[bytes, str]:
    """Return an image file with the same pixels and orientation but no metadata, and its suffix.

    A JPEG loses its metadata and what follows its end, and keeps its encoded pixels; other formats become an upright
    PNG.
    """
    data = Path(path).read_bytes()
    pixels = load_image({"bytes": data})
    if data.startswith(JPEG) and (stripped := _strip_jpeg(data)) is not None:
        try:
            if load_image({"bytes": stripped}).tobytes() == pixels.tobytes():
                return stripped, ".jpg"
        except ValueError:  # damaged, though it can be decoded
            pass
    buffer = io.BytesIO()
    Image.frombytes("RGB", pixels.size, pixels.tobytes()).save(buffer, "PNG")
    return buffer.getvalue(), ".png"


def _strip_jpeg(data: bytes) -> bytes | None:
    """Return a JPEG's segments for decoding and its orientation, up to the image's end; None if it is damaged."""
    with Image.open(io.BytesIO(data)) as image:
        orientation = image.getexif().get(ORIENTATION, 1)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation if orientation in range(1, 9) else 1
    payload = exif.tobytes()
    try:
        segments = jpeg_segments(data)
    except ValueError:
        return None
    kept = [data[start:end] for marker, start, end in segments if _is_plain(data, marker, start, end)]
    kept = [part for part in kept if not part.startswith(b"MPF\0", 4)]
    return b"".join([data[:2], b"\xff\xe1" + (len(payload) + 2).to_bytes(2, "big") + payload, *kept])
