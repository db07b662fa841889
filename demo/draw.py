"""Draw a small dermatology set: four conditions that differ in shape and colour, on skin of six tones."""

import argparse
import json
import math
import random
from pathlib import Path

from PIL import Image, ImageDraw, ImageFilter

from demo.languages import LANGUAGES, Language

SIZE = 112  # px a side: 4 x 4 language-model tokens
SKIN_TONES = {  # Fitzpatrick type -> RGB
    "I": (244, 215, 199),
    "II": (232, 190, 160),
    "III": (213, 164, 126),
    "IV": (181, 128, 92),
    "V": (132, 86, 60),
    "VI": (88, 58, 44),
}


def draw_blob(draw: ImageDraw.ImageDraw, rng: random.Random, x: float, y: float, radius: float, fill, rough: float):
    """Fill an outline around (x, y), px; rough 0 is a circle, 0.4 is ragged."""
    angles = [2 * math.pi * n / 24 for n in range(24)]
    radii = [radius * (1 + rng.uniform(-rough, rough)) for _ in angles]
    points = [(x + r * math.cos(a), y + r * math.sin(a)) for a, r in zip(angles, radii, strict=True)]
    draw.polygon(points, fill=fill)


def draw_melanoma(draw, rng, x, y, skin):
    draw_blob(draw, rng, x, y, rng.uniform(24, 32), (58, 34, 28), 0.35)
    for colour in ((24, 18, 20), (96, 52, 40), (44, 44, 66)):
        draw_blob(draw, rng, x + rng.uniform(-12, 12), y + rng.uniform(-12, 12), rng.uniform(7, 12), colour, 0.3)


def draw_psoriasis(draw, rng, x, y, skin):
    draw_blob(draw, rng, x, y, rng.uniform(26, 34), (196, 72, 64), 0.12)
    for _ in range(14):
        angle, distance = rng.uniform(0, 2 * math.pi), rng.uniform(0, 22)
        scale = (x + distance * math.cos(angle), y + distance * math.sin(angle))
        draw_blob(draw, rng, *scale, rng.uniform(3, 6), (240, 232, 226), 0.3)


def draw_vitiligo(draw, rng, x, y, skin):
    draw_blob(draw, rng, x, y, rng.uniform(24, 34), tuple(255 - (255 - c) // 6 for c in skin), 0.25)


def draw_urticaria(draw, rng, x, y, skin):
    for _ in range(9):
        spot = (rng.uniform(14, SIZE - 14), rng.uniform(14, SIZE - 14))
        draw_blob(draw, rng, *spot, rng.uniform(5, 9), (212, 84, 92), 0.1)


DRAW = {
    "melanoma": draw_melanoma,
    "psoriasis": draw_psoriasis,
    "vitiligo": draw_vitiligo,
    "urticaria": draw_urticaria,
}


def draw_image(condition: str, skin_type: str, rng: random.Random) -> Image.Image:
    """Return a drawn lesion of random position, size, light and blur, on skin of the given type."""
    light = rng.uniform(0.9, 1.05)
    skin = tuple(min(255, round(channel * light)) for channel in SKIN_TONES[skin_type])
    image = Image.new("RGB", (SIZE, SIZE), skin)
    middle = SIZE / 2
    x, y = middle + rng.uniform(-14, 14), middle + rng.uniform(-14, 14)
    DRAW[condition](ImageDraw.Draw(image), rng, x, y, skin)
    return image.filter(ImageFilter.GaussianBlur(rng.uniform(0.6, 1.6)))


def make_record(number: int, condition: str, skin_type: str, rng: random.Random, language: Language) -> dict:
    """Return a LLaVA record; every third one has two turns, first the skin tone and then the diagnosis."""
    question = rng.choice(list(language.questions))
    turns = [(question, language.answer(question, condition))]
    if number % 3 == 0:  # the first answer must not reveal the second
        light, dark = language.tone_answers
        turns.insert(0, (language.tone_question, light if skin_type in ("I", "II", "III") else dark))
    turns[0] = (f"<image>\n{turns[0][0]}", turns[0][1])
    return {
        "id": f"demo-{number:04d}",
        "image": f"{number:04d}.jpg",
        "conversations": [
            {"from": speaker, "value": value}
            for pair in turns
            for speaker, value in zip(("human", "gpt"), pair, strict=True)
        ],
        "label": language.name(condition),
        "skin_type": skin_type,
    }


def write_demo(folder: Path, *, count: int = 600, seed: int = 7, language: str = "en") -> Path:
    """Write `count` images and an annotation file, the same for each seed, and return the file's path.

    The images are the same in each of `LANGUAGES`.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    records = []
    for number in range(count):
        condition = sorted(DRAW)[number % len(DRAW)]
        skin_type = rng.choice(sorted(SKIN_TONES))
        draw_image(condition, skin_type, rng).save(folder / "images" / f"{number:04d}.jpg", quality=92)
        records.append(make_record(number, condition, skin_type, rng, LANGUAGES[language]))
    path = folder / "annotations.json"
    path.write_text(json.dumps(records, indent=1), encoding="utf-8")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=600)
    parser.add_argument("--language", choices=LANGUAGES, default="en", help="of questions, answers and labels")
    args = parser.parse_args()
    print(f"{args.count} drawn images and {write_demo(args.out, count=args.count, language=args.language)}")


if __name__ == "__main__":
    main()
