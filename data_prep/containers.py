"""The parts that image files consist of, found without decoding pixels: chunks of a PNG, segments of a JPEG."""

import re

PNG, JPEG, RIFF, BMP = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF", b"BM"  # first bytes
PPM_COMMENT = re.compile(rb"P[1-6](?:\s+\d+){0,3}\s*#|P[1-3]\s[^#]*#")  # in the header; in one of digits, anywhere
PNG_TEXT = {b"tEXt", b"zTXt", b"iTXt"}
ORIENTATION_TEXT = (b"XML:com.adobe.xmp\0", b"Raw profile type exif\0", b"Raw profile type APP1\0")
START_OF_SCAN, END_OF_IMAGE, HUFFMAN_TABLES = 0xDA, 0xD9, 0xC4
HUFFMAN_FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended, progressive
MANY_COEFFICIENTS, MOST_ZEROS_BETWEEN = 32, 3  # at least 8 coefficients that are alike in each of several blocks
# Frames that most decoders do not know: of lossless, arithmetic-coded and hierarchical JPEG, and JPEG-LS
RARE_FRAMES = dict.fromkeys((0xC3, 0xC7, 0xCB, 0xCF), "lossless JPEG") | {0xF7: "JPEG-LS"}
FRAMES = (*HUFFMAN_FRAMES, *RARE_FRAMES, 0xC5, 0xC6, 0xC9, 0xCA, 0xCD, 0xCE)
ZERO_RUN = bytes(64)  # zero bits for more than two blocks, in each of which they would be 63 coefficients of -1
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


def rare_jpeg(data: bytes) -> str | None:
    """Return which kind of JPEG, as DICOM files have them, this is if decoders for photographs cannot read it."""
    position = 2
    while data.startswith(JPEG) and (segment := data[position : position + 5])[:1] == b"\xff" and len(segment) == 5:
        if segment[1] in FRAMES:
            return RARE_FRAMES.get(segment[1]) or (f"JPEG of {segment[4]} bits a colour" if segment[4] != 8 else None)
        position += 2 + int.from_bytes(segment[2:4], "big")
    return None


def find_damage(data: bytes) -> str | None:
    """Return what is wrong with a JPEG that decoders may still show, with parts of it grey or shifted.

    Found are broken segments, and runs of zero bytes among the coded pixels, as a lost sector or a download that was
    padded leaves them. Other wrong bytes between valid segments are not: that would take a decoder that reports it.
    """
    if not data.startswith(JPEG):
        return None
    try:
        at = _find_zeroed(data)
    except ValueError as error:
        return str(error)
    except IndexError:
        return "a segment is too short"
    return None if at is None else f"zero bytes in place of coded pixels, from byte {at:,} on"


def _find_zeroed(data: bytes) -> int | None:
    """Return where the coded pixels of a JPEG have a run of zero bytes that no picture is coded as."""
    frame, symbols = None, {}
    for marker, start, end in jpeg_segments(data):
        if marker in HUFFMAN_FRAMES:
            frame = marker
        elif marker == HUFFMAN_TABLES:
            symbols |= _zero_symbols(data[start:end])
        elif marker == START_OF_SCAN and frame:
            at = data.find(ZERO_RUN, start, end)
            if at != -1 and not _may_be_zeros(data[start:end], symbols):
                return at
    return None


def _zero_symbols(segment: bytes) -> dict[int, int]:
    """Return the symbol that zero bits stand for in each Huffman table of a segment: the first, by the table's id."""
    symbols, at = {}, 4
    while at < len(segment):
        symbols[segment[at]] = segment[at + 17]
        at += 17 + sum(segment[at + 1 : at + 17])
    return symbols


def _may_be_zeros(scan: bytes, symbols: dict[int, int]) -> bool:
    """Whether zero bits in a scan can be a picture, as a plain area whose blocks end at once.

    They cannot where they would fill each block with coefficients that are all -1, or all the same negative number.
    """
    count = scan[4]
    first, last, approximation = (scan[place + 2 * count] for place in (5, 6, 7))
    if last - first < MANY_COEFFICIENTS or approximation >> 4:  # parts of a progressive picture that may all be alike
        return True
    used = [symbols.get(0x10 | scan[6 + 2 * number] & 15, 0) for number in range(count)]
    return not any(symbol & 15 and symbol >> 4 <= MOST_ZEROS_BETWEEN for symbol in used)


def end_of_image(data: bytes) -> int:
    """Return where the image of a JPEG, PNG, BMP or WebP ends; the length of other and of damaged files."""
    if data.startswith(JPEG):
        try:
            return jpeg_segments(data)[-1][2]
        except ValueError:
            return len(data)
    if data.startswith(PNG):
        return max((end for kind, _, end in png_chunks(data) if kind == b"IEND"), default=len(data))
    if data.startswith(BMP) and (size := int.from_bytes(data[2:6], "little")):
        return min(len(data), size)
    if data.startswith(RIFF):
        return min(len(data), 8 + int.from_bytes(data[4:8], "little"))
    return len(data)
