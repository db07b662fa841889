"""How long `data_prep convert` takes beside plain decoding of the same files, and how its memory grows.

    python -m benchmarks.data_prep

Decodes 2,000 JPEGs of 600 x 450 px with Pillow alone in two processes, and converts and checks them with two workers,
in turn; then converts 200,000 records that repeat 100 images. Both sides run in processes of their own.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image, ImageFilter

WORKERS = 2


def draw(folder: Path, count: int) -> None:
    """Write `count` pictures of 260 kB, the mean of HAM10000's (2.6 GB for 10,015 images of 600 x 450 px)."""
    rng = np.random.default_rng(0)
    for number in range(count):
        base = Image.fromarray(rng.integers(40, 230, (9, 12, 3), dtype=np.uint8)).resize((600, 450), Image.BICUBIC)
        grain = Image.fromarray(rng.integers(0, 255, (450, 600, 3), dtype=np.uint8))
        picture = Image.blend(base, grain.filter(ImageFilter.GaussianBlur(0.5)), 0.25)
        picture.save(folder / f"{number:05d}.jpg", quality=97)


def write_records(path: Path, count: int, images: int) -> None:
    records = [
        {
            "id": f"r{n}",
            "image": f"{n % images:05d}.jpg",
            "question": "What?",
            "answer": "It is a nevus.",
            "label": "nevus",
        }
        for n in range(count)
    ]
    path.write_text(json.dumps(records))


def decode(path: str) -> None:
    with Image.open(path) as image:
        image.load()


def decode_all(folder: Path) -> None:
    paths = sorted(str(path) for path in folder.glob("*.jpg"))
    with ProcessPoolExecutor(WORKERS) as pool:
        list(pool.map(decode, paths, chunksize=16))


def timed(command: list[str]) -> tuple[float, float]:
    """Return the seconds that a command takes, and the largest memory of any of its processes, GB."""
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6


def convert(annotations: Path, images: Path, out: Path) -> list[str]:
    source = ["--annotations", str(annotations), "--images", str(images)]
    options = ["--out", str(out), "--overwrite", "--workers", str(WORKERS)]
    return [sys.executable, "-m", "data_prep", "convert", *source, *options]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--records", type=int, default=200_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--decode", type=Path, help=argparse.SUPPRESS)  # the child that only decodes
    args = parser.parse_args()
    if args.decode:
        decode_all(args.decode)
        return
    with TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "images").mkdir()
        draw(folder / "images", args.images)
        write_records(folder / "a.json", args.images, args.images)
        plain, ours = [], []
        for _ in range(args.rounds):
            plain.append(timed([sys.executable, "-m", "benchmarks.data_prep", "--decode", str(folder / "images")])[0])
            ours.append(timed(convert(folder / "a.json", folder / "images", folder / "out"))[0])
        write_records(folder / "many.json", args.records, 100)
        seconds, memory = timed(convert(folder / "many.json", folder / "images", folder / "many"))
    ratios = [a / b for a, b in zip(ours, plain, strict=True)]
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    print(f"plain decoding     {statistics.median(plain):6.2f} s for {args.images:,} images, {WORKERS} processes")
    print(f"convert and check  {statistics.median(ours):6.2f} s, {statistics.median(ratios):.2f} times as long")
    print(f"{args.records:,} records  {seconds:6.2f} s, at most {memory:.2f} GB in one process")


if __name__ == "__main__":
    main()
