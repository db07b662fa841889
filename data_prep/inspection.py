"""What the checks need to know of an image file, found by decoding it once."""

import io
import os
import signal
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import imagehash
import numpy as np
import xxhash
from PIL import Image, ImageOps

from common.progress import progress

from .colours import ORIENTATION, SIXTEEN_BIT_MODES, profile_name, tiff_tag, used_bits
from .containers import find_damage
from .images import check_file, decode, open_image
from .metadata import private_metadata

CHUNK = 16  # images that a process gets at a time
PARENT_SECONDS = 0.5  # between two looks whether the main process is still there
TURNED = range(2, 9)  # orientations; all others than these and 1 are invalid, and viewers ignore them


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """Properties of an image file.

    Attributes:
        size: upright width and height, px.
        mode: colour mode as stored.
        stamp: bytes of the file and time of its last change, ns, before it was read.
        digest: 128-bit hash of the file, the same for exact copies.
        hashes: perceptual hash of the upright image and of its mirror image, 64 bit each.
        thumbnail: 8 x 8 RGB, to distinguish equal hashes by chance from copies.
        turned: the file is stored rotated or mirrored, according to its EXIF data.
        private: kinds of private metadata, see `metadata.private_metadata`.
        profile: name of the ICC profile that was converted to sRGB, if any.
        bits: how many bits the values of a 16-bit image need; None for other images.
        damage: what is wrong with a file that can be decoded all the same; None if nothing is found.
        brightest: largest value of any colour, of 255, in a thumbnail.
    """

    size: tuple[int, int]
    mode: str
    stamp: tuple[int, int]
    digest: str
    hashes: tuple[int, int]
    thumbnail: bytes
    turned: bool
    private: tuple[str, ...]
    profile: str | None
    bits: int | None
    damage: str | None
    brightest: int


def inspect_image(path: str) -> ImageInfo | str:
    """Decode an image completely and return its properties, or the reason why it cannot be used."""
    try:
        check_file(Path(path))
        stamp = file_stamp(path)
        data = Path(path).read_bytes()
        with open_image(io.BytesIO(data)) as stored:
            tiff_orientation = tiff_tag(stored, ORIENTATION)  # which is lost when it is decoded
            mode, upright = stored.mode, decode(stored)  # first, so that a broken file has the error of `load_image`
            turned = (tiff_orientation or stored.getexif().get(ORIENTATION)) in TURNED
            private, profile = private_metadata(stored, data), profile_name(stored)
            bits = used_bits(stored) if mode in SIXTEEN_BIT_MODES else None
    except (ValueError, OSError) as error:
        return str(error)
    small = upright.resize((32, 32), Image.Resampling.LANCZOS, reducing_gap=2.0)
    grey = small.convert("L")
    return ImageInfo(
        size=upright.size,
        mode=mode,
        stamp=stamp,
        digest=xxhash.xxh3_128_hexdigest(data),
        hashes=(perceptual_hash(grey), perceptual_hash(ImageOps.mirror(grey))),
        thumbnail=small.resize((8, 8), Image.Resampling.BOX).tobytes(),
        turned=turned,
        private=private,
        profile=profile,
        bits=bits,
        damage=find_damage(data),
        brightest=max(high for _, high in small.getextrema()),
    )


def file_stamp(path: str) -> tuple[int, int]:
    """Return the bytes of a file and the time of its last change, ns. Raises OSError."""
    info = os.stat(path)  # noqa: PTH116  a Path for each image takes time
    return info.st_size, info.st_mtime_ns


def perceptual_hash(grey: Image.Image) -> int:
    """Return the 64-bit hash of a grey picture by its lowest 8 x 8 frequencies."""
    return int(np.packbits(imagehash.phash(grey).hash).view(">u8")[0])


def inspect_all(paths: list[str], num_workers: int | None, show_progress: bool) -> list[ImageInfo | str]:
    """Return what `inspect_image` does for each path, from a pool of processes, one for each core when None."""
    if not paths:
        return []
    perceptual_hash(Image.new("L", (32, 32)))  # loads what it needs once, here, and not in each worker
    try:
        # the pool starts all of its processes at once, needed or not
        workers = min(num_workers or usable_cores(), -(-len(paths) // CHUNK))
        with ProcessPoolExecutor(workers, initializer=_start_worker) as pool:
            try:
                results = pool.map(inspect_image, paths, chunksize=CHUNK)
                return list(progress(results, "decoding", len(paths), "images", shown=show_progress))
            finally:
                pool.shutdown(cancel_futures=True)  # after Ctrl-C, do not decode the rest first
    except BrokenProcessPool as error:
        reason = "a decoding process was killed, most likely out of memory; use fewer workers"
        raise ValueError(f"images: {reason}") from error


def _start_worker() -> None:
    """Leave Ctrl-C to the main process, which then ends its workers; SIGTERM ends each at once, and so does its end.

    Workers of a main process that was killed would wait for images for ever, and keep the lock of the output folder.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, args=[os.getppid()], daemon=True).start()


def _end_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(PARENT_SECONDS)
    os._exit(1)


def usable_cores() -> int:
    """Return the number of cores that this process may use, on systems that tell it."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux
    return len(affinity(0)) if affinity else min(os.cpu_count() or 1, 61)  # the most workers of a pool on Windows
