"""The notebook is what its source says, and names files that exist."""

import ast
import json
import re
from pathlib import Path

from notebooks.build import NOTEBOOK, build

ROOT = Path(__file__).parents[2]
CELLS = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
CODE = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]


def test_the_notebook_is_up_to_date():
    assert NOTEBOOK.read_text(encoding="utf-8") == build(), "run `python -m notebooks.build`"


def test_the_notebook_holds_no_output_and_each_cell_of_code_is_python():
    assert all(cell.get("outputs", []) == [] for cell in CELLS)
    assert len({cell["id"] for cell in CELLS}) == len(CELLS) > 20
    assert [ast.parse(text) for text in CODE]


def test_the_scripts_and_recipes_of_the_notebook_exist():
    found = set(re.findall(r"[\w/]+\.(?:py|yaml)", "\n".join(CODE)))
    assert {"train_sft.py", "eval_sft.py", "configs/skin_16gb.yaml", "configs/skin.yaml"} <= found
    assert {name for name in found if not (ROOT / name).exists()} == set()
