"""YAML 1.2 files of settings, read strictly."""

import math
from collections.abc import Iterable
from pathlib import Path

from ruamel.yaml import YAML, MappingNode, Node, SequenceNode
from ruamel.yaml.composer import Composer, ComposerError
from ruamel.yaml.constructor import ConstructorError, SafeConstructor

from common.files import suggest_file

MAX_DEPTH = 50


def yaml_to_args(path: Path) -> list[str]:
    """Return a YAML file's settings as the equivalent command-line arguments."""
    args = []
    for key, value in read_yaml(path, "--config").items():
        if key == "config":
            raise ValueError(f"{path}: config: a file of options may not name another")
        if isinstance(value, list) or value is True:
            args += [f"--{key}", *(str(item) for item in (value if isinstance(value, list) else ()))]
        elif value is not False and value is not None:
            args.append(f"--{key}={value}")  # a switch then names itself in the error about its value
    return args


def read_yaml(path: Path, option: str) -> dict:
    """Return the YAML mapping in `path`; `option` is the command-line option that named it.

    Raises:
        FileNotFoundError, ValueError: no such file, not YAML, not a mapping, or see `load_yaml`.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{option}: no file {path}{suggest_file(path)}")
    settings = load_yaml(path)
    if not isinstance(settings, dict) or any(isinstance(key, tuple) for key in settings):
        raise ValueError(f"{path}: expected lines of the form 'key: value'")
    return settings


def load_yaml(path: Path):
    """Return the content of a YAML file; dates stay text.

    Raises:
        ValueError: not YAML, a duplicate key, an alias, an unknown tag, NaN or infinity, or nested too deeply.
    """
    reader = YAML(typ="safe", pure=True)
    reader.Composer, reader.Constructor, reader.max_depth = _Composer, _Constructor, MAX_DEPTH
    try:
        return reader.load(path.read_text(encoding="utf-8"))
    except Exception as error:  # for odd tags and directives ruamel.yaml raises more than its own errors
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or error
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ValueError(f"{path}{where}: not YAML: {' '.join(str(problem).split())[:200]}") from error


def read_nodes(path: Path) -> Node:
    """Return a YAML file that `load_yaml` reads as nodes, which know their lines, for `line_of`."""
    return YAML(typ="safe", pure=True).compose(path.read_text(encoding="utf-8"))


def line_of(node: Node, keys: Iterable) -> int:
    """Return the line, from 1, of a setting in a YAML file: that of the last of its `keys` which is there.

    Args:
        node: the file, from `read_nodes`.
        keys: keys of mappings and positions in lists, from the outside in.
    """
    line = 1
    for key in keys:
        if isinstance(node, MappingNode):
            inner = [(name, value) for name, value in node.value if name.value == str(key)]
        else:
            inner = [(value, value) for value in node.value[key : key + 1]] if isinstance(node, SequenceNode) else []
        if not inner:
            break
        line, node = inner[0][0].start_mark.line + 1, inner[0][1]
    return line


class _Composer(Composer):
    def return_alias(self, node):  # a few lines of aliases to aliases can stand for gigabytes
        raise ComposerError(None, None, f"alias of &{node.anchor}: write the value out", node.start_mark)


class _Constructor(SafeConstructor):
    def construct_yaml_float(self, node):
        value = super().construct_yaml_float(node)
        if not math.isfinite(value):
            raise ConstructorError(None, None, f"{node.value} is not a finite number", node.start_mark)
        return value


_Constructor.add_constructor("tag:yaml.org,2002:float", _Constructor.construct_yaml_float)
_Constructor.add_constructor("tag:yaml.org,2002:timestamp", SafeConstructor.construct_yaml_str)
