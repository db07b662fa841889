"""Time of conversion and checks beside plain decoding of the same files, and their memory.

    python -m benchmarks.data_prep

Decodes 2,000 JPEGs of 600 x 450 px with Pillow alone in two processes, converts and checks them with two workers
(`data_prep.convert.prepare`), and writes the folder with the images embedded, alternately in one process; then runs
the complete command on 200,000 records that repeat 100 small images, in a process of its own.
"""

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from datasets import disable_progress_bars
from PIL import Image, ImageFilter

from data_prep.convert import prepare
from data_prep.sources import Source

WORKERS = 2


def draw(folder: Path, count: int) -> None:
    """Write `count` pictures of 260 kB, the mean of HAM10000's (2.6 GB for 10,015 images of 600 x 450 px)."""
    rng = np.random.default_rng(0)
    for number in range(count):
        base = Image.fromarray(rng.integers(40, 230, (9, 12, 3), dtype=np.uint8)).resize((600, 450), Image.BICUBIC)
        noise = Image.fromarray(rng.integers(0, 255, (450, 600, 3), dtype=np.uint8))
        picture = Image.blend(base, noise.filter(ImageFilter.GaussianBlur(0.5)), 0.25)
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


def seconds(function, *args, **kwargs) -> float:
    start = time.perf_counter()
    function(*args, **kwargs)
    return time.perf_counter() - start


def one_round(folder: Path) -> tuple[float, float, float]:
    """Return the seconds of plain decoding, of converting and checking, and of writing."""
    plain = seconds(decode_all, folder / "images")
    prepared = []
    source = Source(folder / "a.json", folder / "images")
    ours = seconds(lambda: prepared.append(prepare([source], num_workers=WORKERS, show_progress=False)))
    writing = seconds(prepared[0].splits.save_to_disk, str(folder / "out"))
    shutil.rmtree(folder / "out")
    return plain, ours, writing


def command(annotations: Path, images: Path, out: Path) -> list[str]:
    source = ["--annotations", str(annotations), "--images", str(images)]
    options = ["--out", str(out), "--overwrite", "--workers", str(WORKERS)]
    return [sys.executable, "-m", "data_prep", "convert", *source, *options]


def many_records(folder: Path, count: int) -> tuple[float, float]:
    """Return the seconds of the command, and the largest memory of any of its processes, GB."""
    (folder / "small").mkdir()
    for number in range(100):
        Image.effect_noise((64, 64), 50 + number).convert("RGB").save(folder / "small" / f"{number:05d}.jpg")
    write_records(folder / "many.json", count, 100)
    run = command(folder / "many.json", folder / "small", folder / "many")
    duration = seconds(subprocess.run, run, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return duration, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--records", type=int, default=200_000)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    disable_progress_bars()
    with TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "images").mkdir()
        draw(folder / "images", args.images)
        write_records(folder / "a.json", args.images, args.images)
        one_round(folder)  # warms the page cache and the imports
        rounds = [one_round(folder) for _ in range(args.rounds)]
        many_seconds, memory = many_records(folder, args.records)
    plain, ours, writing = (statistics.median(times) for times in zip(*rounds, strict=True))
    ratio = statistics.median(ours / plain for plain, ours, _ in rounds)
    print(f"{date.today()}, {platform.processor() or platform.machine()}, {os.cpu_count()} cores,", end=" ")
    print(f"Python {platform.python_version()}")
    print(f"plain decoding     {plain:6.2f} s for {args.images:,} images, {WORKERS} processes")
    print(f"convert and check  {ours:6.2f} s, {ratio:.2f} times as long")
    print(f"write the folder   {writing:6.2f} s more, images embedded")
    print(f"{args.records:,} records   {many_seconds:6.2f} s, at most {memory:.2f} GB in one process")


if __name__ == "__main__":
    main()
