"""ICC profiles, made from primaries and a gamma, and what colours in them are in sRGB."""

import struct

import numpy as np

# Columns: the primaries' XYZ, adapted to D50
DISPLAY_P3 = ((0.51512, 0.29198, 0.15710), (0.24120, 0.69225, 0.06657), (-0.00105, 0.04189, 0.78407))
ADOBE_RGB = ((0.60974, 0.20528, 0.14919), (0.31111, 0.62567, 0.06322), (0.01947, 0.06087, 0.74457))
PROPHOTO = ((0.79767, 0.13519, 0.03134), (0.28804, 0.71188, 0.00009), (0.00000, 0.00000, 0.82521))
SRGB = ((0.43607, 0.38515, 0.14307), (0.22249, 0.71687, 0.06061), (0.01392, 0.09708, 0.71410))
WHITE = (0.9642, 1.0, 0.8249)


def make_profile(primaries=None, gamma=2.2) -> bytes:
    """Return a profile of three primaries and a gamma, or of grey values without primaries."""
    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256)) + bytes(2)
    tags = {b"wtpt": _xyz(WHITE), b"desc": b"desc" + bytes(4) + struct.pack(">I", 5) + b"test\0" + bytes(78 + 1)}
    if primaries is None:
        tags[b"kTRC"] = curve
    else:
        for name, column in zip((b"rXYZ", b"gXYZ", b"bXYZ"), zip(*primaries, strict=True), strict=True):
            tags |= {name: _xyz(column), name[:1] + b"TRC": curve}
    start, table, body = 128 + 4 + 12 * len(tags), b"", b""
    for name, data in tags.items():
        table += name + struct.pack(">II", start + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    space = b"GRAY" if primaries is None else b"RGB "
    header = bytes(4) + struct.pack(">I", 0x02100000) + b"mntr" + space + b"XYZ " + bytes(12) + b"acsp" + bytes(28)
    header = struct.pack(">I", start + len(body)) + bytes(4) + header[4:]
    header += b"".join(struct.pack(">i", round(value * 65536)) for value in WHITE)
    return header.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def _xyz(values) -> bytes:
    return b"XYZ " + bytes(4) + b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def in_srgb(colour, primaries, gamma=2.2) -> list[int]:
    """Return what a colour of 8 bits is in sRGB."""
    linear = np.array(primaries) @ (np.array(colour) / 255) ** gamma
    linear = (np.linalg.inv(np.array(SRGB)) @ linear).clip(0, 1)
    coded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return [round(value) for value in (255 * coded).tolist()]
