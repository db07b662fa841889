"""The layers that import-linter cannot see, and the sizes that keep the code readable."""

import ast
import statistics
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("webapp", "planning", "training", "evaluation", "publishing", "models", "data_prep", "common")
COMMANDS = {"train_sft", "eval_sft", "predict", "app", "merge_adapter", "plan_run", "push_adapter"}
ROOT_MODULES = {path.stem: path for path in ROOT.glob("*.py")}


def imported(path):
    """The first parts of the names of all modules that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.split(".")[0]


def function_lengths():
    files = [*ROOT_MODULES.values(), *(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))]
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield node.end_lineno - node.lineno + 1, f"{path.relative_to(ROOT)}: {node.name}"


def test_the_root_holds_the_commands_and_the_collator_alone():
    assert ROOT_MODULES.keys() == COMMANDS | {"collator"}


def test_no_command_imports_another_or_the_demo_or_the_benchmarks():
    for command in COMMANDS:
        assert not set(imported(ROOT_MODULES[command])) & (COMMANDS | {"demo", "benchmarks", "tests", "helpers"})


def test_the_collator_imports_from_lower_layers_alone():
    ours = set(imported(ROOT / "collator.py")) & {*PACKAGES, *COMMANDS, "demo", "benchmarks"}
    assert ours <= {"models", "data_prep", "common"}


def test_functions_are_short():
    lengths = sorted(function_lengths(), reverse=True)
    assert [entry for entry in lengths if entry[0] > 50] == []
    assert statistics.median(length for length, _ in lengths) <= 10


def test_the_training_command_reads_like_a_table_of_contents():
    assert len((ROOT / "train_sft.py").read_text().splitlines()) <= 170
