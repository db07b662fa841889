"""Write docs/configuration.md, the list of all settings, from the dataclasses that read a recipe.

python -m docs.reference
"""

import dataclasses
import re
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Union, get_args, get_origin, get_type_hints

from common.cli import run

from trl import ModelConfig, SFTConfig

from common.yaml_files import read_yaml
from training.config import DEFAULT_RECIPE, RENAMED
from training.config_checks import WITHOUT_EFFECT
from training.settings import DataArguments, TrainingSettings
from training.short_help import OWN_WORDS, SETTINGS

PAGE = Path(__file__).parent / "configuration.md"
MOST = 160  # characters of a description
INTRODUCTION = """# All settings

Written by `python -m docs.reference` from the dataclasses that read a recipe; a test compares it. Each key is a line
in a recipe and an option on the command line. When to turn which is in [training](training.md#settings), the twelve
that matter most in [the README](../README.md#the-twelve-settings-that-matter).

Descriptions of TRL's and transformers' settings are the first sentences of their own, in the versions of
`requirements.txt`. Some defaults depend on others or on the machine: `train_sft.py --help-all` prints all of it.
"""
PARTS = {
    "The settings that matter": "By `extends: skin.yaml` a recipe starts from the values in that file.",
    "Of this project": "No field of TRL or transformers.",
    "Of the model and LoRA": "Fields of TRL's `ModelConfig`.",
    "Of training": "Fields of TRL's `SFTConfig`, most of them from transformers' `TrainingArguments`.",
}


def main() -> None:
    PAGE.write_text(write_page(), encoding="utf-8")
    print(f"{PAGE}")


def write_page() -> str:
    """Return the page as Markdown."""
    recipe, common = read_yaml(DEFAULT_RECIPE, "recipe"), [name for names in SETTINGS.values() for name in names]
    inherited = {field.name for field in dataclasses.fields(SFTConfig)}
    own = [*dataclasses.fields(DataArguments), *dataclasses.fields(TrainingSettings)]
    tables = [
        [field for field in all_fields() if field.name in common],
        [field for field in own if field.name not in inherited],
        list(dataclasses.fields(ModelConfig)),
        [field for field in dataclasses.fields(TrainingSettings) if field.name in inherited],
    ]
    parts, seen = [INTRODUCTION], set()
    for (title, sentence), fields in zip(PARTS.items(), tables, strict=True):
        rows = [row(field, recipe) for field in fields if field.name not in seen | WITHOUT_EFFECT.keys()]
        seen |= {field.name for field in fields}
        parts.append(f"## {title}\n\n{sentence}\n\n" + table(("key", "type", "default", "in skin.yaml", ""), rows))
    parts.append("## Refused\n\nThese would have no effect here, so that setting one is an error.\n\n" + refused())
    parts.append("## Of other scripts\n\nNames that an error translates.\n\n" + renamed())
    return "\n".join(parts)


def all_fields() -> list[dataclasses.Field]:
    """Return the fields of all dataclasses, those of this project first."""
    return [field for kind in (DataArguments, TrainingSettings, ModelConfig) for field in dataclasses.fields(kind)]


def row(field: dataclasses.Field, recipe: dict) -> tuple[str, ...]:
    """Return the cells of a setting: key, type, default, the value in the recipe, what it is."""
    given = f"`{show(recipe[field.name])}`" if field.name in recipe else ""
    return f"`{field.name}`", type_name(field.name), show_default(field), given, describe(field)


def type_name(name: str) -> str:
    """Return the type of a setting in words; that of a text with choices is the choices."""
    for kind in (DataArguments, TrainingSettings, ModelConfig):
        fields = {field.name: field for field in dataclasses.fields(kind)}
        if name in fields and (choices := fields[name].metadata.get("choices")):
            return " or ".join(f"`{choice}`" for choice in choices)
        if name in fields:
            return in_words(get_type_hints(kind)[name])
    raise KeyError(name)


def in_words(hint: object) -> str:
    """Return the name of a type, as "text or number" for a union."""
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(dict.fromkeys(in_words(part) for part in get_args(hint) if part is not NoneType))
    kind = get_origin(hint) or hint
    if isinstance(kind, type) and issubclass(kind, Enum):
        return "text"
    return {bool: "switch", int: "whole number", float: "number", str: "text", list: "list", dict: "mapping"}.get(
        kind, "text"
    )


def show_default(field: dataclasses.Field) -> str:
    if field.default is not dataclasses.MISSING:
        return "" if field.default is None else f"`{show(field.default)}`"
    if field.default_factory is not dataclasses.MISSING and (value := field.default_factory()):
        return f"`{show(value)}`"
    return ""


def show(value: object) -> str:
    """Return a value as a recipe has it."""
    value = getattr(value, "value", value)
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) and value < 0.001 else str(value)


def describe(field: dataclasses.Field) -> str:
    """Return the first sentence about a setting, without what would end a table's cell."""
    text = OWN_WORDS.get(field.name) or " ".join(str(field.metadata.get("help", "")).split())
    sentence = re.split(r"(?<=[a-z)\]`'\"])\.(?: |$)", text, maxsplit=1)[0]
    if len(sentence) > MOST:
        sentence = sentence[:MOST].rsplit(" ", 1)[0] + " ..."
    outside = re.split(r"(`[^`]*`)", sentence.replace("|", "\\|"))
    outside[::2] = [re.sub(r"([<*[])", r"\\\1", part) for part in outside[::2]]
    return "".join(outside)


def refused() -> str:
    return table(
        ("key", "because, or instead"), [(f"`{key}`", reason) for key, reason in sorted(WITHOUT_EFFECT.items())]
    )


def renamed() -> str:
    return table(("name", "here"), [(f"`{key}`", f"`{use}`") for key, use in sorted(RENAMED.items())])


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "".join("| " + " | ".join(cells) + " |\n" for cells in lines)


if __name__ == "__main__":
    run(main)
