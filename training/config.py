"""Settings from a YAML recipe with overrides on the command line; every key is checked before anything loads."""

import difflib
import re
from collections.abc import Iterable
from itertools import zip_longest
from pathlib import Path
from typing import get_args, get_origin, get_type_hints

from common.cli import OneLineParser, expand_home

from trl import ModelConfig, TrlParser

from common.yaml_files import read_yaml
from training.config_checks import check_settings
from training.inheritance import switched_off
from training.settings import DataArguments, Settings, TrainingSettings
from training.short_help import format_short_help

DEFAULT_RECIPE = Path(__file__).parents[1] / "configs" / "skin.yaml"

# Settings of other scripts, and the recipe's line for each.
RENAMED = {
    "batch_size": "per_device_train_batch_size: N",
    "use_4bit": "load_in_4bit: true",
    "no_4bit": "load_in_4bit: false",
    "use_amp": "bf16: true",
    "no_amp": "bf16: false, dtype: float32",
    "device": "use_cpu: true",  # for a CPU; see DEVICE
    "model_name": "model_name_or_path: NAME",
    "data_path": "dataset_path: PATH",
    "dataset_name": "dataset_path: PATH",
    "image_folder": "image_dir: PATH",
    "epochs": "num_train_epochs: N",
    "lr": "learning_rate: X",
    "lora_rank": "lora_r: N",
}
DEVICE = " for a CPU; CUDA_VISIBLE_DEVICES=N accelerate launch ... takes one GPU"


class RecipeParser(OneLineParser, TrlParser):
    """TRL's parser, with errors of one line that say where the value stands.

    Attributes:
        places: file of each setting that is not on the command line.
    """

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.places = {}

    def error(self, message: str):
        option = re.match(r"argument --(\w+)", message)
        place = self.places.get(option[1]) if option else None
        super().error(f"{place}: {option[1]}: {message.partition(': ')[2]}" if place else message)


def parse_config(argv: list[str], *, prog: str = "train_sft.py") -> Settings:
    """Read `--config FILE` (default: configs/skin.yaml) and the options after it, which win; `prog` signs errors.

    Raises:
        ValueError: a key or value is wrong; the message names the key and the rule.
        FileNotFoundError: no such file.
        SystemExit: code 0 after `--help`, 2 after one line about a wrong option.
    """
    parser = RecipeParser((DataArguments, TrainingSettings, ModelConfig), prog=prog, add_help=False)
    parser.add_argument("--config", type=Path, default=DEFAULT_RECIPE, help="YAML recipe; the options override it")
    hints = {name: hint for kind in parser.dataclass_types for name, hint in get_type_hints(kind).items()}
    argv = normalize(argv, {name for name, hint in hints.items() if _is_switch(name, hint)})
    _print_help(parser, argv)
    recipe = parser.parse_known_args(argv)[0].config
    files = _read_recipe(recipe, hints)
    layers = [settings for _, settings in files]
    parser.set_defaults_with_config(**{key: _as_text(value) for layer in layers for key, value in layer.items()})
    given = {word.removeprefix("--").partition("=")[0]: None for word in argv if word.startswith("--")}
    parser.places = {key: file for file, layer in files for key in layer if key not in given}
    layers.append(given)
    values, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.error(_unknown(unknown[0].split("=")[0], hints, "unexpected argument"))
    written = {key: place for place, layer in enumerate(layers, start=1) for key in layer}
    parser.set_defaults_with_config(**switched_off(vars(values), written))
    *parsed, _ = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    settings = Settings(*parsed)
    check_settings(*settings)
    return settings


def _print_help(parser: RecipeParser, argv: list[str]) -> None:
    """Print the settings that matter, or all, and end, where that is asked for."""
    if "--help_all" in argv:
        parser.print_help()
        parser.exit()
    if "--help" in argv or "-h" in argv:
        print(format_short_help(parser.prog, parser.dataclass_types, DEFAULT_RECIPE), end="")
        parser.exit()


def normalize(argv: list[str], switches: set[str]) -> list[str]:
    """Return a command line with one form of each option: underscores, and a value for each switch.

    `--bf16` becomes `--bf16 true`, and `--no-bf16` becomes `--bf16 false`. `--debug` without a value is left out:
    `cli.run` reads it.
    """
    words = []
    for word, following in zip_longest(argv, argv[1:], fillvalue="--"):
        if word == "--debug" and following.startswith("--"):
            continue
        if not word.startswith("--"):
            words.append(word)
            continue
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        if not equals and name.startswith("no_") and name[3:] in switches:
            words += [f"--{name[3:]}", "false"]
        elif not equals and name in switches and following.startswith("--"):
            words += [f"--{name}", "true"]
        else:
            words.append(f"--{name}{equals}{value}")
    return words


def _is_switch(name: str, hint) -> bool:
    return name in ("gradient_checkpointing", "compile_layers") or hint in (bool, bool | None)


def _read_recipe(recipe: Path, hints: dict, seen: tuple[Path, ...] = ()) -> list[tuple[Path, dict]]:
    """Return the recipes that a recipe `extends`, the first one first, and itself, with their checked settings."""
    if recipe.resolve() in seen:
        raise ValueError(f"{recipe}: extends: the recipes extend each other")
    settings, before = read_yaml(recipe, "--config"), []
    if "extends" in settings:
        parent = recipe.parent / str(settings.pop("extends"))
        before = _read_recipe(parent, hints, (*seen, recipe.resolve()))
    _check_recipe(recipe, settings, hints)
    return [*before, (recipe, settings)]


def _check_recipe(recipe: Path, settings: dict, hints: dict) -> None:
    """Raise ValueError for a key that does not exist, or a list, a mapping or nothing in place of one value."""
    for key, value in settings.items():
        if key not in hints:
            raise ValueError(f"{recipe}: {_unknown(str(key), hints, 'unknown key')}")
        kinds = {get_origin(kind) or kind for kind in (hints[key], *get_args(hints[key]))}
        if isinstance(value, list) and (list not in kinds or not all(isinstance(item, str) for item in value)):
            raise ValueError(f"{recipe}: {key}: did not expect the list {value}")
        if (value is None and type(None) not in kinds) or (isinstance(value, dict) and dict not in kinds):
            raise ValueError(f"{recipe}: {key}: expected one value, found {value}")


def _as_text(value):
    """Turn numbers and booleans into text, which argparse checks by the field's type; expand `~`, as in options."""
    if isinstance(value, str):
        return expand_home(value)
    return str(value) if isinstance(value, bool | int | float) else value


def _unknown(word: str, known: Iterable[str], what: str) -> str:
    """Return a message about a key or option that does not exist, with what to write instead."""
    key, is_option = word.lstrip("-").replace("-", "_"), word.startswith("-")
    what = "unknown option" if is_option else what
    if key in RENAMED:
        lines = RENAMED[key].split(", ")
        use = " ".join(f"--{x.replace(':', '')}" if is_option else x for x in lines)
        return f"{what} {word!r}; use {use}" + (DEVICE if key == "device" else "")
    near = difflib.get_close_matches(key, known, n=1)
    return f"{what} {word!r}" + (f"; did you mean {near[0]!r}?" if near else "")
