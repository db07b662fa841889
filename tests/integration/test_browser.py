"""Pages in a real browser, at the width of a laptop and of a phone: every image loads, nothing sticks out."""

import html
import json
import random
import re
import shutil
import subprocess

import pytest

from data_prep.__main__ import main as data_prep
from data_prep.labels import build_label_map
from demo.draw import draw_image
from evaluation.report import write_report
from evaluation.summary import summarise
from helpers.planted import PlantedSet

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
FLAGS += [
    "--disable-component-update",
    "--disable-sync",
    "--allow-file-access-from-files",
    "--virtual-time-budget=8000",
]
# Loads the page in a frame of a given width and writes what it measures into the document.
PROBE = """<!doctype html><body><iframe id="f" width="{width}" height="900" src="{page}"></iframe><pre id="out"></pre>
<script>
const errors = [], frame = document.getElementById("f");
frame.onload = () => {{
  const page = frame.contentDocument, images = [...page.images];
  frame.contentWindow.onerror = message => errors.push(message);
  document.getElementById("out").textContent = JSON.stringify({{
    errors, images: images.length, broken: images.filter(i => !i.complete || !i.naturalWidth).length,
    width: page.documentElement.scrollWidth, height: page.documentElement.scrollHeight,
    title: page.title, headings: [...page.querySelectorAll("h2")].map(h => h.textContent)
  }});
}};
</script></body>"""

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (apt-get install chromium)")


def measure(page, width, tmp_path):
    probe = tmp_path / f"probe-{width}.html"
    probe.write_text(PROBE.format(width=width, page=page.as_uri()), encoding="utf-8")
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", probe.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    return json.loads(html.unescape(re.search(r'<pre id="out">(.*?)</pre>', dom, re.DOTALL).group(1)))


@pytest.fixture(scope="module")
def data_page(tmp_path_factory):
    planted = PlantedSet(tmp_path_factory.mktemp("planted") / "set", count=120, each=2)
    out = planted.folder / "prepared"
    source = ["--annotations", str(planted.folder / "a.json"), "--images", str(planted.images)]
    data_prep(["convert", *source, "--on-error", "drop", "--out", str(out)])
    data_prep(["inspect", str(out)])
    return out / "report.html"


@pytest.mark.parametrize("width", [1280, 390])
def test_the_data_report_fits_and_loads_whole(data_page, tmp_path, width):
    seen = measure(data_page, width, tmp_path)
    assert seen["errors"] == []
    assert seen["images"] > 20 and seen["broken"] == 0
    assert seen["width"] <= width
    assert seen["title"] == "Data report: prepared"
    assert seen["headings"][:3] == ["Labels", "Tokens per image", "Findings"]


LABELS = ["melanoma", "vitiligo", "psoriasis", "urticaria", "dermatofibroma", "actinic keratosis or Bowen's disease"]


def evaluated_rows(rng):
    """Rows of three runs: an adapter that is often right, a base that talks nonsense, and one file with markup."""
    runs = {"adapter": [], "base": [], "shuffled": [], "validation": []}
    for index in range(90):
        label = LABELS[index % 6]
        facts = {"id": f"sample-{index}-" + "x" * 60, "label": label, "group": f"p{index // 2}", "index": index}
        facts |= {
            "skin_type": ["I", "III", "VI"][index % 3],
            "sex": ["f", "m"][index % 2],
            "age": str(index),
            "site": None,
        }
        facts |= {"source": "a", "question": "Which <b>diagnosis</b>? " * 6, "reference": f"This is {label}."}
        for run, chance in (("adapter", 0.8), ("base", 0.1), ("shuffled", 0.2), ("validation", 0.8)):
            said = label if rng.random() < chance else rng.choice(LABELS)
            scores = {name: rng.gauss(3 * (name == said), 1) for name in LABELS}
            text = "<script>x()</script>" * 9 if run == "base" else f"This is {said}."
            row = {"run": run, **facts, "prediction": text, "scores": scores}
            runs[run].append(row | ({"image_of": f"sample-{index ^ 1}-" + "x" * 60} if run == "shuffled" else {}))
    return runs


@pytest.fixture(scope="module")
def evaluation_page(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("evaluation"), random.Random(0)
    runs, label_map = evaluated_rows(rng), build_label_map(LABELS)
    columns = ["skin_type", "sex", "age", "site", "source"]
    found = summarise(runs, label_map, columns=columns, sensitivity_of=[], min_group=10)
    samples = [{"images": [draw_image("melanoma", "III", rng)]} for _ in range(90)]
    counts = {"evaluated": {"samples": 90, "of": 90, "questions": 90}, "max_new_tokens": 8}
    write_report(folder, {"split": "test", **counts, **found}, runs, label_map, samples)
    return folder / "report.html"


@pytest.mark.parametrize("width", [1280, 390])
def test_the_evaluation_fits_and_loads_whole(evaluation_page, tmp_path, width):
    seen = measure(evaluation_page, width, tmp_path)
    assert seen["errors"] == []
    assert seen["images"] > 15 and seen["broken"] == 0
    assert seen["width"] <= width
    assert seen["title"] == "Evaluation on test"
    assert seen["headings"][:4] == ["By label", "By subgroup", "Confidence", "Text"]
    assert "<script>x" not in evaluation_page.read_text()
    plots = {path.name for path in evaluation_page.parent.glob("*.png")}
    assert plots == {"confusion.png", "subgroups.png", "reliability.png", "abstention.png"}
