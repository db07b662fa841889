"""The parts that image files consist of, found without decoding pixels: chunks of a PNG, segments of a JPEG."""

import re

PNG, JPEG, RIFF = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF"  # first bytes
PNG_TEXT = {b"tEXt", b"zTXt", b"iTXt"}
ORIENTATION_TEXT = (b"XML:com.adobe.xmp\0", b"Raw profile type exif\0", b"Raw profile type APP1\0")
START_OF_SCAN, END_OF_IMAGE = 0xDA, 0xD9
MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]", re.DOTALL)  # neither a stuffed byte nor a restart: ends a scan


def png_chunks(data: bytes) -> list[tuple[bytes, int, int]]:
    """Return the kind, start and end of each complete chunk up to the end of the image."""
    chunks, position = [], len(PNG)
    while (end := position + 12 + int.from_bytes(data[position : position + 4], "big")) <= len(data):
        chunks.append((data[position + 4 : position + 8], position, end))
        position = end
        if chunks[-1][0] == b"IEND":
            break
    return chunks


def drop_png_text(data: bytes) -> bytes:
    """Return a PNG without its texts, which can be large, but for those that may hold its orientation."""
    kept, start = [], 0
    for kind, position, end in png_chunks(data):
        if kind in PNG_TEXT and not data.startswith(ORIENTATION_TEXT, position + 8):
            kept.append(data[start:position])
            start = end
    return b"".join([*kept, data[start:]]) if kept else data


def jpeg_segments(data: bytes) -> list[tuple[int, int, int]]:
    """Return the marker, start and end of each segment up to the end of the image; a scan has its coded pixels.

    Raises:
        ValueError: the file is damaged, or ends within the image.
    """
    segments, position = [], 2
    while (marker := data[position : position + 2]) != bytes((0xFF, END_OF_IMAGE)):
        if len(marker) < 2 or marker[0] != 0xFF:
            raise ValueError("expected a marker of a JPEG segment")
        if marker[1] == 0xFF:  # a fill byte
            position += 1
            continue
        end = position + 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        if marker[1] == START_OF_SCAN:
            if (following := MARKER.search(data, end)) is None:
                raise ValueError("the coded pixels have no end")
            end = following.start()
        segments.append((marker[1], position, end))
        position = end
    return [*segments, (END_OF_IMAGE, position, position + 2)]


def find_damage(data: bytes) -> str | None:
    """Return what is wrong with the segments of a JPEG that decoders may still show, with parts of it grey or shifted.

    Damaged bytes between valid segments are not found: that would take a decoder that reports it.
    """
    if not data.startswith(JPEG):
        return None
    try:
        jpeg_segments(data)
    except ValueError as error:
        return str(error)
    return None


def end_of_image(data: bytes) -> int:
    """Return where the image of a JPEG, PNG or WebP ends; the length of other and of damaged files."""
    if data.startswith(JPEG):
        try:
            return jpeg_segments(data)[-1][2]
        except ValueError:
            return len(data)
    if data.startswith(PNG):
        return max((end for kind, _, end in png_chunks(data) if kind == b"IEND"), default=len(data))
    if data.startswith(RIFF):
        return min(len(data), 8 + int.from_bytes(data[4:8], "little"))
    return len(data)
