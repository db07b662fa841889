"""What is installed: requirements.txt, its lock and pre-commit's copy of ruff belong together."""

import ast
import re
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from ruamel.yaml import YAML

ROOT = Path(__file__).parents[2]
LINES = [line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
REQUIREMENTS = {canonicalize_name(Requirement(line).name): Requirement(line) for line in LINES if line}
LOCKED = dict(re.findall(r"^([a-z0-9-]+)==([^ ]+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE))
OURS = (
    {path.stem for path in ROOT.glob("*.py")} | {path.name for path in ROOT.iterdir() if path.is_dir()} | {"helpers"}
)


@pytest.mark.parametrize("name", REQUIREMENTS)
def test_the_lock_holds_each_requirement_in_a_version_that_is_allowed(name):
    assert name in LOCKED, "run `make lock`"
    assert REQUIREMENTS[name].specifier.contains(LOCKED[name]), "run `make lock`"


def test_each_locked_file_has_a_hash():
    entries = re.split(r"\n(?=[a-z0-9])", (ROOT / "requirements.lock").read_text().partition("make lock\n")[2])
    assert len(entries) > 100 and all("--hash=sha256:" in entry for entry in entries)


def test_pre_commit_runs_the_ruff_that_is_required():
    hooks = YAML(typ="safe").load(ROOT / ".pre-commit-config.yaml")["repos"][0]["hooks"]
    assert {pin for hook in hooks for pin in hook["additional_dependencies"]} == {str(REQUIREMENTS["ruff"])}


def test_every_library_that_is_imported_is_required():
    others = ("outputs", "benchmarks/peers")  # the latter's scripts run in environments of other projects
    names = {path: path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py")}
    files = [path for path, name in names.items() if not name.startswith((".", *others))]
    trees = [ast.parse(path.read_text()) for path in files]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
    libraries = {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) - OURS
    distributions = packages_distributions()
    required = {canonicalize_name(found) for name in libraries for found in distributions.get(name, [name])}
    assert required - REQUIREMENTS.keys() == set()
