"""The notebook runs from top to bottom, with a real kernel, on the demo's model and a CPU."""

import os
import sys
from collections import Counter
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
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    kinds = Counter(kind for output in outputs for kind in output.get("data", {}))
    assert (kinds["image/png"], kinds["image/jpeg"]) == (2, 1)  # two runs' curves, the photo that is asked about
    assert sum("<iframe" in output.get("data", {}).get("text/html", "") for output in outputs) == 2
    assert "configs/first_try.yaml" in "".join(output.get("text", "") for output in outputs)
    run = tmp_path / "outputs" / "notebook" / "run"
    assert (run / "adapter_model.safetensors").is_file() and (run / "eval" / "report.html").is_file()
