"""The command blocks that a page marks as runnable run, in order, on a fresh copy of the folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.markdown import RUNNABLE

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RUN = [page for page in PAGES if RUNNABLE.search(page.read_text())]
LEFT_OUT = {"outputs", "data", "photos"}


def test_some_page_has_runnable_blocks():
    assert "first_try.md" in {page.name for page in RUN}


@pytest.mark.parametrize("page", RUN, ids=lambda page: page.name)
def test_the_runnable_blocks_of_a_page_run(page, tmp_path):
    for entry in ROOT.iterdir():
        if not entry.name.startswith(".") and entry.name not in LEFT_OUT:
            (tmp_path / entry.name).symlink_to(entry)
    blocks = RUNNABLE.findall(page.read_text())
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    shell = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", "".join(blocks)], cwd=tmp_path, env=environment, text=True,
        capture_output=True,
    )  # fmt: skip
    assert shell.returncode == 0, shell.stdout[-3000:] + shell.stderr[-3000:]
