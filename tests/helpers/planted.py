"""A set of drawn pictures with faults planted in it, and the list of what was planted where."""

import io
import json
import random
from collections import defaultdict
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

LABELS = ("melanoma", "nevus", "psoriasis", "eczema", "vitiligo", "urticaria")
EXIF_MIRRORED = 2


def draw_photo(rng: np.random.Generator, size=(120, 90)) -> Image.Image:
    """Return a picture like a photograph of skin: no two have the same light, spots and grain."""
    small = rng.integers(60, 220, (6, 8, 3), dtype=np.uint8)
    image = Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)
    grain = Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))
    return Image.blend(image, grain, 0.06).filter(ImageFilter.GaussianBlur(0.6))


class PlantedSet:
    """Draws `count` clean records in lesions of one to four images, then plants `each` faults of every kind.

    `planted` maps a kind of finding to the ids that must be found; `bad` holds the ids of unusable records.
    """

    def __init__(self, folder: Path, *, count: int, each: int, seed: int = 0):
        self.folder, self.images = folder, folder / "images"
        self.images.mkdir(parents=True)
        self.numbers, self.rng = np.random.default_rng(seed), random.Random(seed)
        self.records, self.planted, self.bad = [], defaultdict(set), set()
        self._draw_clean(count)
        self.clean = [record["id"] for record in self.records]
        sources = self.rng.sample(self.records, 6 * each)
        for number, plant in enumerate(
            (self.copy, self.reencode, self.resize, self.mirror, self.contradict, self.retell)
        ):
            for source in sources[number * each : (number + 1) * each]:
                plant(source)
        for _ in range(each):
            self.break_records()
        self.rng.shuffle(self.records)
        (folder / "a.json").write_text(json.dumps(self.records))

    def _draw_clean(self, count: int) -> None:
        lesion = 0
        while len(self.records) < count:
            lesion, label = lesion + 1, self.rng.choice(LABELS)
            for _ in range(self.rng.randint(1, 4)):
                name = f"{len(self.records):05d}.jpg"
                draw_photo(self.numbers).save(self.images / name, quality=92)
                self.add(name, label, group=f"lesion-{lesion}")

    def add(self, name, label, **more) -> dict:
        record = {"id": f"r{len(self.records):05d}", "image": name, "question": "What condition is shown?"}
        self.records.append({**record, "answer": f"This is {label}.", "label": label, **more})
        return self.records[-1]

    def _twin(self, source, name, kind, label=None, **more) -> dict:
        record = self.add(name, label or source["label"], **more)
        self.planted[kind] |= {source["id"], record["id"]}
        return record

    def copy(self, source):
        name = f"copy-{source['image']}"
        (self.images / name).write_bytes((self.images / source["image"]).read_bytes())
        self._twin(source, name, "exact copy")

    def reencode(self, source):
        name = f"again-{source['image']}"
        Image.open(self.images / source["image"]).save(self.images / name, quality=60)
        self._twin(source, name, "near copy")

    def resize(self, source):
        name = f"small-{source['image'][:-4]}.png"
        Image.open(self.images / source["image"]).resize((80, 60)).save(self.images / name)
        self._twin(source, name, "near copy")

    def mirror(self, source):
        name = f"mirrored-{source['image']}"
        exif = Image.Exif()
        exif[0x0112] = EXIF_MIRRORED
        exif.get_ifd(0x8825)[1] = "N"
        Image.open(self.images / source["image"]).save(self.images / name, quality=90, exif=exif)
        record = self._twin(source, name, "near copy")
        self.planted["turned"].add(record["id"])
        self.planted["private"].add(record["id"])

    def contradict(self, source):
        other = LABELS[(LABELS.index(source["label"]) + 1) % len(LABELS)]
        self._twin(source, source["image"], "contradiction", label=other)

    def retell(self, source):
        source["question"] = f"Why is this {source['label']}?"
        self.planted["giveaway"].add(source["id"])
        name = f"tiny-{source['image'][:-4]}.png"
        draw_photo(self.numbers, (20, 20)).save(self.images / name)
        tiny = self.add(name, "nevus")
        tiny["answer"] = "nevus"
        self.planted["tiny"].add(tiny["id"])
        self.planted["short answer"].add(tiny["id"])
        long = self.add(source["image"], source["label"], group=source["group"])
        long["answer"] = f"This is {source['label']}. " + "It itches. " * 300
        self.planted["long answer"].add(long["id"])

    def break_records(self):
        """Add one record for each way in which a record or its image cannot be used."""
        number = len(self.records)
        whole = io.BytesIO()
        draw_photo(self.numbers).save(whole, "JPEG")
        files = {"zero.jpg": b"", "text.jpg": b"not an image", "cut.jpg": whole.getvalue()[:900]}
        for name, content in files.items():
            (self.images / f"{number}-{name}").write_bytes(content)
        Image.new("L", (1, 300)).save(self.images / f"{number}-strip.png")
        Image.new("1", (8000, 8000)).save(self.images / f"{number}-bomb.png")
        names = [f"{number}-{name}" for name in (*files, "strip.png", "bomb.png", "gone.jpg")]
        names += [f"../{number}.jpg", f"/etc/{number}.jpg", f"http://x/{number}.jpg", f"file:///{number}.jpg"]
        for name in names:
            self.bad.add(self.add(name, "nevus")["id"])
        for broken in (
            {"answer": " "},
            {"question": None},
            {"answer": "a<|im_end|>"},
            {"question": "<image><image>?"},
        ):
            self.bad.add({**self.add("00000.jpg", "nevus")}["id"])
            self.records[-1].update(broken)
