"""YAML files, read by one strict reader."""

import math
import re
from collections import Counter
from pathlib import Path

import yaml


def yaml_to_args(path: Path) -> list[str]:
    """Return a YAML file's settings as the command line that says the same."""
    words = []
    for key, value in read_yaml(path, "--config").items():
        values = value if isinstance(value, list) else [value]
        if value is not False and value is not None:
            words += [f"--{key}", *(str(item) for item in values if item is not True)]
    return words


def read_yaml(path: Path, option: str) -> dict:
    """Return the YAML mapping in `path`.

    Raises:
        FileNotFoundError, ValueError: no such file, not YAML, not a mapping, or a key that stands twice.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{option}: no file {path}")
    settings = load_yaml(path)
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: expected lines of the form 'key: value'")
    return settings


def load_yaml(path: Path):
    """Return what a YAML file holds.

    Raises:
        ValueError: not YAML, or not plain: a key that stands twice, an alias, a Python object, NaN.
    """
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)
    except RecursionError as error:
        raise ValueError(f"{path}: not YAML: nested too deeply") from error
    # Besides its own errors, PyYAML lets through what Python raises for a tag that does not fit its value: `!!int x`.
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError) as error:
        raise ValueError(f"{path}: not YAML: {' '.join(str(error).split())}") from error


class _StrictLoader(yaml.SafeLoader):
    """Safe YAML that refuses a key written twice, and aliases, a few of which can stand for gigabytes.

    It reads `no`, `on`, dates and the like as the words that they are, and `2e-4` as a number.
    """

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"the alias *{self.peek_event().anchor}; write out what it stands for")
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        keys = Counter(repr(self.construct_object(key, deep=True)) for key, _ in node.value)
        if twice := next((key for key, count in keys.items() if count > 1), None):
            raise yaml.YAMLError(f"the key {twice} stands twice")
        return super().construct_mapping(node, deep)

    def construct_yaml_float(self, node):
        value = super().construct_yaml_float(node)
        if not math.isfinite(value):
            raise yaml.YAMLError(f"{node.value} is no number to work with")
        return value


_StrictLoader.add_constructor("tag:yaml.org,2002:float", _StrictLoader.construct_yaml_float)
_WORDS = ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:timestamp")
_StrictLoader.yaml_implicit_resolvers = {
    first: [rule for rule in rules if rule[0] not in _WORDS]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_StrictLoader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("^(true|True|false|False)$"), list("tTfF"))
_NUMBER = re.compile(r"^[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$")  # YAML 1.1 wants a point and a sign in it
_StrictLoader.add_implicit_resolver("tag:yaml.org,2002:float", _NUMBER, list("-+.0123456789"))
