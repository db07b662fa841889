"""How much faster `VisionSFTCollator` is than TRL's collator, from JPEG bytes to a batch, on one thread.

    python -m benchmarks.collate

Both get the same photographs, resized and with noise like a sensor's, and one question and answer, at 256 to 512
tokens an image, and collate alternately in one process. TRL's labels answers only, as ours does, and then everything,
its default. Then photographs decoded at a half, a quarter or an eighth of their size are compared with the same
decoded at full size, both at the largest size that is decoded so, where they differ most.
"""

import argparse
import io
import os
import platform
import statistics
import time
from datetime import date
from pathlib import Path

import numpy as np
import sklearn.datasets
import torch
from matplotlib.cbook import get_sample_data
from PIL import Image, ImageFilter
from trl.chat_template_utils import get_training_chat_template
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from collator import VisionSFTCollator
from data_prep.images import DRAFT_HEADROOM, load_image
from demo.tiny_model import build_processor

QUESTION, ANSWER = "What condition does this picture show?", "This is melanoma."
# Width and height in px, JPEG quality, samples in a batch.
CASES = ((600, 450, 92, 8), (600, 450, 98, 8), (4000, 3000, 92, 2), (4000, 3000, 95, 2))
PHOTOS = Path(sklearn.datasets.__file__).parent / "images"


def photographs(folder: Path | None) -> list[bytes]:
    """Return the JPEGs of a folder, or those that come with scikit-learn and matplotlib."""
    if folder:
        return [path.read_bytes() for path in sorted(folder.glob("*.jp*g"))]
    portrait = get_sample_data("grace_hopper.jpg", asfileobj=False)
    return [Path(path).read_bytes() for path in (*sorted(PHOTOS.glob("*.jpg")), portrait)]


def add_noise(photo: bytes, width: int, height: int, quality: int) -> bytes:
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8))
    resized = load_image({"bytes": photo}).resize((width, height))
    buffer = io.BytesIO()
    Image.blend(resized, noise.filter(ImageFilter.GaussianBlur(1)), 0.08).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def our_examples(files: list[bytes]) -> list[dict]:
    texts = (("user", "<image>" + QUESTION), ("assistant", ANSWER))
    messages = [{"role": role, "content": text} for role, text in texts]
    return [{"images": [{"bytes": file, "path": None}], "messages": messages} for file in files]


def their_examples(files: list[bytes]) -> list[dict]:
    """Images are opened and not yet decoded, as `datasets` returns them."""
    messages = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
    return [{"images": [Image.open(io.BytesIO(file))], "messages": messages} for file in files]


def time_collators(sides: dict, files: list[bytes], rounds: int) -> dict[str, list[float]]:
    """Return each side's times, ms a sample."""
    times = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, (collate, examples) in sides.items():
            start = time.perf_counter()
            collate(examples(files))
            if number:  # the first round warms up
                times[name].append((time.perf_counter() - start) / len(files) * 1000)
    return times


def draft_differences(photo: bytes, fraction: int) -> tuple[float, float]:
    """Return the mean and the 99th percentile of the difference that drafting makes, in 8-bit levels."""
    full = load_image({"bytes": photo})
    size = tuple(int((side // fraction - 1) / DRAFT_HEADROOM) for side in full.size)
    drafted = load_image({"bytes": photo}, fit=lambda width, height: size)
    levels = np.abs(np.asarray(drafted, dtype=int) - np.asarray(full.resize(size), dtype=int))
    return levels.mean(), np.percentile(levels, 99)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--photos", type=Path, help="folder of JPEGs to use instead of those from scikit-learn")
    args = parser.parse_args()
    torch.set_num_threads(1)
    processor = build_processor([QUESTION, ANSWER])
    processor.image_processor.size = {"shortest_edge": 256 * 28 * 28, "longest_edge": 512 * 28 * 28}
    answers = {"assistant_only_loss": True, "chat_template": get_training_chat_template(processor)}
    sides = {
        "ours": (VisionSFTCollator(processor), our_examples),
        "TRL, answers only": (DataCollatorForVisionLanguageModeling(processor, **answers), their_examples),
        "TRL, everything": (DataCollatorForVisionLanguageModeling(processor), their_examples),
    }
    photos = photographs(args.photos)
    print(f"{date.today()}, {platform.machine()}, {os.cpu_count()} cores, 1 thread, torch {torch.__version__}")
    for width, height, quality, count in CASES:
        files = [add_noise(photos[n % len(photos)], width, height, quality) for n in range(count)]
        print(f"{width}x{height}, {sum(map(len, files)) / count / 1000:,.0f} kB, batches of {count}; ms a sample")
        times = time_collators(sides, files, args.rounds)
        for name, durations in times.items():
            ratio = statistics.median(b / a for a, b in zip(times["ours"], durations, strict=True))
            print(f"  {name:18}{statistics.median(durations):7.1f}  {ratio:.2f}")
    for fraction in (2, 4, 8):
        means, tails = zip(*(draft_differences(photo, fraction) for photo in photos), strict=True)
        print(f"decoded at 1/{fraction}: mean difference {statistics.mean(means):.2f} of 255 levels,", end=" ")
        print(f"at most {max(means):.2f}; 99 % of pixels within {max(tails):.0f}")


if __name__ == "__main__":
    main()
