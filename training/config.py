"""Settings from a YAML recipe with overrides on the command line; every key is checked before anything loads."""

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import get_args, get_origin, get_type_hints

from common.cli import OneLineParser

from trl import ModelConfig, TrlParser

from common.yaml_files import read_yaml
from training.config_checks import check_settings
from training.settings import DataArguments, Settings, TrainingSettings

DEFAULT_RECIPE = Path(__file__).parents[1] / "configs" / "skin.yaml"

# Settings of other scripts, and the recipe's line for each.
RENAMED = {
    "batch_size": "per_device_train_batch_size: N",
    "use_4bit": "load_in_4bit: true",
    "no_4bit": "load_in_4bit: false",
    "use_amp": "bf16: true",
    "no_amp": "bf16: false, dtype: float32",
    "device": "use_cpu: true",
    "model_name": "model_name_or_path: NAME",
    "data_path": "dataset_path: PATH",
    "dataset_name": "dataset_path: PATH",
    "image_folder": "image_dir: PATH",
    "epochs": "num_train_epochs: N",
    "lr": "learning_rate: X",
    "lora_rank": "lora_r: N",
}


class RecipeParser(OneLineParser, TrlParser):
    """TRL's parser, with errors of one line."""


def parse_config(argv: list[str], *, prog: str = "train_sft.py") -> Settings:
    """Read `--config FILE` (default: configs/skin.yaml) and the options after it, which win; `prog` signs errors.

    Raises:
        ValueError: a key or value is wrong; the message names the key and the rule.
        FileNotFoundError: no such file.
        SystemExit: code 2 after one line about a wrong option.
    """
    parser = RecipeParser((DataArguments, TrainingSettings, ModelConfig), prog=prog)
    parser.add_argument("--config", type=Path, default=DEFAULT_RECIPE, help="YAML recipe; the options override it")
    argv = [word for word in argv if word != "--debug"]  # cli.run reads it
    recipe = parser.parse_known_args(argv)[0].config
    hints = {name: hint for kind in parser.dataclass_types for name, hint in get_type_hints(kind).items()}
    defaults = _read_recipe(recipe, hints)
    parser.set_defaults_with_config(**{key: _as_text(value) for key, value in defaults.items()})
    *parsed, _, unknown = parser.parse_args_into_dataclasses(
        argv, look_for_args_file=False, return_remaining_strings=True
    )
    if unknown:
        parser.error(_unknown(unknown[0].split("=")[0], hints, "unexpected argument"))
    settings = Settings(*parsed)
    check_settings(*settings)
    return settings


def _read_recipe(recipe: Path, hints: dict, *, extended: bool = False) -> dict:
    """Return a recipe's checked settings, with those of the recipe in the same folder that it `extends`."""
    settings = read_yaml(recipe, "--config")
    before = {}
    if "extends" in settings:
        name = settings.pop("extends")
        if extended:
            raise ValueError(f"{recipe}: extends: a recipe that is extended may not extend another")
        before = _read_recipe(recipe.parent / str(name), hints, extended=True)
    _check_recipe(recipe, settings, hints)
    return {**before, **settings}


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
    """Turn numbers and booleans into text, which argparse checks by the field's type as it does options."""
    return str(value) if isinstance(value, bool | int | float) else value


def _unknown(word: str, known: Iterable[str], what: str) -> str:
    """Return a message about a key or option that does not exist, with what to write instead."""
    key, is_option = word.lstrip("-").replace("-", "_"), word.startswith("-")
    what = "unknown option" if is_option else what
    if key in RENAMED:
        lines = RENAMED[key].split(", ")
        return f"{what} {word!r}; use " + " ".join(f"--{x.replace(':', '')}" if is_option else x for x in lines)
    near = difflib.get_close_matches(key, known, n=1)
    return f"{what} {word!r}" + (f"; did you mean {near[0]!r}?" if near else "")
