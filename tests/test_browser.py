"""Pages in a real browser, at the width of a laptop and of a phone: every image loads, nothing sticks out."""

import html
import json
import re
import shutil
import subprocess

import pytest
from planted import PlantedSet

from data_prep.__main__ import main as data_prep

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
    assert seen["headings"][:3] == ["Labels", "What an image costs", "Findings"]
