"""The notebook runs from top to bottom, with a real kernel, on the demo's model and a CPU."""

import json
import os
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from notebooks.build import NOTEBOOK

ROOT = Path(__file__).parents[2]
LEFT_OUT = {"outputs", "data"}


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch):
    for entry in ROOT.iterdir():
        if not entry.name.startswith(".") and entry.name not in LEFT_OUT:
            (tmp_path / entry.name).symlink_to(entry)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    for name, value in (("PATH", path), ("DEMO_STEPS", "40"), ("HF_HUB_OFFLINE", "1"), ("CUDA_VISIBLE_DEVICES", "")):
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": tmp_path}}).execute()
    shown = json.dumps([cell.get("outputs", []) for cell in notebook.cells])
    assert shown.count("<iframe") == 2 and shown.count("image/png") == 2 and "configs/first_try.yaml" in shown
    run = tmp_path / "outputs" / "notebook" / "run"
    assert (run / "adapter_model.safetensors").is_file() and (run / "eval" / "report.html").is_file()
