"""CONTRIBUTING.md and SECURITY.md name files, functions and commands that exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "CONTRIBUTING.md").read_text()
QUOTED = set(re.findall(r"`([^`\n]+)`", PAGE))
FILES = {text for text in QUOTED if re.fullmatch(r"[\w/.-]*(/|\.(py|yaml|md|html|txt|lock))", text)} - {"compat.py"}
FUNCTIONS = {text for text in QUOTED if "::" in text}
COMMANDS = set(re.findall(r"`make ([a-z]+)`", PAGE))


def test_the_page_names_something():
    assert len(FILES) > 30 and len(FUNCTIONS) > 10 and len(COMMANDS) > 6


@pytest.mark.parametrize("file", sorted(FILES))
def test_a_named_file_exists(file):
    assert (ROOT / file).exists()


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_a_named_definition_exists(name):
    file, definition = name.split("::")
    assert re.search(rf"^(def |class )?{definition}\b", (ROOT / file).read_text(), re.MULTILINE)


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_a_named_make_target_exists(command):
    assert re.search(rf"^{command}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_every_package_is_in_the_picture():
    picture = PAGE.split("```")[1]
    packages = {path.parent.name + "/" for path in ROOT.glob("*/__init__.py")}
    assert packages | {path.name for path in ROOT.glob("*.py")} <= set(picture.split())


def test_the_tests_of_the_security_page_exist():
    named = set(re.findall(r"test_\w+\.py", (ROOT / "SECURITY.md").read_text()))
    assert named and named <= {path.name for path in (ROOT / "tests").rglob("test_*.py")}
