"""Settings: a YAML recipe with overrides on the command line, every key checked before anything loads."""

import dataclasses
import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, get_args, get_origin, get_type_hints

from common.cli import OneLineParser

from transformers.integrations import get_available_reporting_integrations
from trl import ModelConfig, SFTConfig, TrlParser

from common.yaml_files import read_yaml
from models.attention import VARLEN
from training.trackers import TRACKERS

DEFAULT_RECIPE = Path(__file__).parents[1] / "configs" / "skin.yaml"


@dataclass(frozen=True)
class DataArguments:
    """What to train on, and which parts of the model see it: the settings that TRL has no field for."""

    dataset_path: str | None = field(
        default=None, metadata={"help": "annotation file, folder made by `python -m data_prep convert`, or Hub id"}
    )
    image_dir: str | None = field(default=None, metadata={"help": "image folder of an annotation file"})
    fold: int | None = field(
        default=None, metadata={"help": "of a data set in folds: validate on it, train on the rest"}
    )
    min_pixels: int | None = field(default=None, metadata={"help": "smallest image area after resizing, px^2"})
    max_pixels: int | None = field(default=None, metadata={"help": "largest image area after resizing, px^2"})
    pack_tokens: int = field(
        default=8192, metadata={"help": "with packing: most tokens in a row, all its samples and images together"}
    )
    freeze_vision_encoder: bool = field(default=True, metadata={"help": "false adapts the vision tower as well"})
    train_merger: bool = field(default=False, metadata={"help": "adapt the projection from tower to language model"})


@dataclass
class TrainingSettings(SFTConfig):
    """TRL's settings, with three other defaults and three more settings."""

    gradient_checkpointing: str = field(
        default="auto", metadata={"help": "recompute activations: true, false, or auto: where memory is too small"}
    )
    dataloader_num_workers: int = field(default=2, metadata={"help": "processes that decode and resize images"})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "true would log 0 in place of NaN"})
    allow_config_change: bool = field(
        default=False, metadata={"help": "resume from a checkpoint although settings, data or versions have changed"}
    )
    compile_layers: bool = field(
        default=False, metadata={"help": "compile each layer's arithmetic on the GPU; needs a C compiler"}
    )
    dry_run: bool = field(
        default=False, metadata={"help": "print the plan, try a few batches on a tiny model, and end"}
    )

    def __post_init__(self):
        words = {"auto": "auto", "true": True, "false": False}
        found = str(self.gradient_checkpointing)
        if found.lower() not in words:
            raise ValueError(f"gradient_checkpointing: expected auto, true or false, found {found!r}")
        self.gradient_checkpointing = words[found.lower()]
        super().__post_init__()


class Settings(NamedTuple):
    """All settings of a run, as they were parsed; nothing changes them afterwards."""

    data: DataArguments
    training: TrainingSettings
    model: ModelConfig

    @property
    def output_dir(self) -> Path:
        return Path(self.training.output_dir)

    @property
    def pack_tokens(self) -> int | None:
        """Most tokens of a pack; None without packing."""
        return self.data.pack_tokens if self.training.packing else None

    @property
    def evaluates(self) -> bool:
        return self.training.eval_strategy != "no"

    def loading_options(self) -> dict:
        """Return the keywords of `load_model`: how the base is loaded in training, and later for its adapter."""
        return {
            "quantization": "nf4" if self.model.load_in_4bit else None,
            "double_quant": self.model.use_bnb_nested_quant,
            "dtype": self.model.dtype,
            "attn_implementation": self.model.attn_implementation,
            "revision": self.model.model_revision,
        }


# What people know from other scripts, and the recipe's line for it.
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

# The smallest value that means something; what is below would be ignored, or crash hours later.
AT_LEAST = {
    "min_pixels": 1,
    "max_pixels": 1,
    "max_length": 1,
    "pack_tokens": 1,
    "lora_r": 1,
    "lora_alpha": 1,
    "lora_dropout": 0,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "max_grad_norm": 0,
    "weight_decay": 0,
    "warmup_steps": 0,
    "save_total_limit": 1,
    "dataloader_num_workers": 0,
}
ABOVE_ZERO = ("learning_rate", "num_train_epochs", "logging_steps", "save_steps", "eval_steps")
EVALUATED = ("loss", "mean_token_accuracy", "entropy")  # what an evaluation reports, each with eval_ before it

# Fields of TRL's dataclasses that this pipeline does not read. Setting one would do nothing, so it is an error.
WITHOUT_EFFECT = {
    "load_in_8bit": "the base model is in NF4 (load_in_4bit) or not quantised",
    "lora_target_parameters": "use lora_target_modules",
    "lora_modules_to_save": "only LoRA weights are trained",
    "lora_task_type": "the adapter is for a causal language model",
    "model_init_kwargs": "use dtype, attn_implementation and model_revision",
    "trust_remote_code": "no code is run from a model's repository",
    "chat_template_path": "the processor's own chat template is used",
    "dataset_kwargs": "data_prep makes the data set",
    "dataset_num_proc": "data_prep makes the data set",
    "dataset_text_field": "the data set's schema is fixed",
    "eos_token": "the processor's own tokens are used",
    "pad_token": "the processor's own tokens are used",
    "shuffle_dataset": "training shuffles by itself in every epoch",
    "packing_strategy": "packs are made by best fit in shuffled windows",
    "eval_packing": "validation samples are packed when training samples are",
    "padding_free": "use packing: packs hold no padding",
    "logging_nan_inf_filter": "a run stops at the first gradients that are not finite",
    "fsdp": "accelerate's configuration decides: configs/accelerate/fsdp2.yaml",
    "fsdp_config": "accelerate's configuration decides: configs/accelerate/fsdp2.yaml",
    "deepspeed": "accelerate's configuration decides: configs/accelerate/zero2.yaml",
    "torch_compile": "use compile_layers",
    "torch_compile_backend": "use compile_layers",
    "torch_compile_mode": "use compile_layers",
    "pad_to_multiple_of": "batches are padded to their longest sample",
    "completion_only_loss": "the loss is always on the answers, and on nothing else",
    "assistant_only_loss": "the loss is always on the answers, and on nothing else",
    "save_only_model": "a run could not go on from such a checkpoint",
    "do_train": "training is what this command does",
    "do_predict": "predict.py answers the test split",
    "hub_strategy": "the adapter is pushed at every save and at the end",
    "hub_always_push": "the adapter is pushed at every save and at the end",
    "trackio_space_id": "set TRACKIO_SPACE_ID, which trackio reads; the Space is private",
    "trackio_bucket_id": "set TRACKIO_BUCKET_ID, which trackio reads",
    "trackio_static_space_id": "a run's dashboard stays as it is; `trackio sync` copies it",
    "hub_token": "a token in a recipe ends up in files; log in with `hf auth login` or set HF_TOKEN",
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
    _check_settings(*settings)
    return settings


def _read_recipe(recipe: Path, hints: dict, *, extended: bool = False) -> dict:
    """Return a recipe's checked settings, those of the recipe that it `extends`, in the same folder, among them."""
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
    """Raise ValueError for a key that does not exist, or a list, mapping or nothing where one value belongs."""
    for key, value in settings.items():
        if key not in hints:
            raise ValueError(f"{recipe}: {_unknown(str(key), hints, 'unknown key')}")
        kinds = {get_origin(kind) or kind for kind in (hints[key], *get_args(hints[key]))}
        if isinstance(value, list) and (list not in kinds or not all(isinstance(item, str) for item in value)):
            raise ValueError(f"{recipe}: {key}: did not expect the list {value}")
        if (value is None and type(None) not in kinds) or (isinstance(value, dict) and dict not in kinds):
            raise ValueError(f"{recipe}: {key}: expected one value, found {value}")


def _as_text(value):
    """Hand numbers and truth values to argparse as text, which checks them by the field's type as it does options."""
    return str(value) if isinstance(value, bool | int | float) else value


def _unknown(word: str, known: Iterable[str], what: str) -> str:
    """Say what to write instead of a key or an option that does not exist."""
    key, is_option = word.lstrip("-").replace("-", "_"), word.startswith("-")
    what = "unknown option" if is_option else what
    if key in RENAMED:
        lines = RENAMED[key].split(", ")
        return f"{what} {word!r}; use " + " ".join(f"--{x.replace(':', '')}" if is_option else x for x in lines)
    near = difflib.get_close_matches(key, known, n=1)
    return f"{what} {word!r}" + (f"; did you mean {near[0]!r}?" if near else "")


def _check_settings(data: DataArguments, training: TrainingSettings, model: ModelConfig) -> None:
    """Raise ValueError for a setting that is missing, makes no sense, or would have no effect."""
    if data.dataset_path is None:
        raise ValueError("dataset_path: name the annotation file, the prepared folder or the Hub data set")
    if model.model_name_or_path is None:
        raise ValueError("model_name_or_path: name the base model")
    if not model.use_peft:
        raise ValueError("use_peft: must be true; LoRA adapters are what is trained here")
    if model.load_in_4bit and model.bnb_4bit_quant_type != "nf4":
        raise ValueError(f"bnb_4bit_quant_type: expected 'nf4', found {model.bnb_4bit_quant_type!r}")
    _check_storage(model)
    if training.fp16 and training.device.type == "cpu":
        raise ValueError("fp16: needs a GPU; a CPU trains with bf16: true, or with both off")
    for settings in (data, training, model):
        for setting in dataclasses.fields(settings):
            _check_setting(setting, getattr(settings, setting.name))
    if training.max_steps == 0:
        raise ValueError("max_steps: expected a number above 0, or -1 to count epochs, found 0")
    metric = training.metric_for_best_model
    if metric is not None and metric.removeprefix("eval_") not in EVALUATED:
        raise ValueError(f"metric_for_best_model: expected one of {', '.join(EVALUATED)}, found {metric!r}")
    _check_packing(data, training, model)
    _check_trackers(training.report_to)


def _check_trackers(names: list[str]) -> None:
    for name in names:
        if name not in (*TRACKERS, "kubeflow"):  # which a cluster turns on by itself, and is told of progress alone
            raise ValueError(f"report_to: expected {', '.join(TRACKERS)} or none, found {name!r}")
        if name not in get_available_reporting_integrations():
            raise ValueError(f"report_to: {name} is not installed; `pip install {name}`, or write none")


def _check_storage(model: ModelConfig) -> None:
    """4-bit weights are kept in bytes, or in the dtype of the others, which FSDP2 needs to spread them."""
    storage, dtype = model.bnb_4bit_quant_storage, "bfloat16" if model.dtype == "auto" else model.dtype
    if storage is not None and not model.load_in_4bit:
        raise ValueError("bnb_4bit_quant_storage: would have no effect without load_in_4bit: true")
    if storage not in (None, "uint8", dtype):
        raise ValueError(f"bnb_4bit_quant_storage: expected uint8 or the dtype {dtype}, found {storage!r}")


def _check_packing(data: DataArguments, training: TrainingSettings, model: ModelConfig) -> None:
    if not training.packing:
        if data.pack_tokens != DataArguments.pack_tokens:
            raise ValueError("pack_tokens: would have no effect without packing: true")
        return
    if model.attn_implementation != VARLEN:
        raise ValueError(f"packing: needs attn_implementation: {VARLEN}, which keeps the samples of a pack apart")
    if training.max_length is None or training.max_length > data.pack_tokens:
        found = f"found {training.max_length} and {data.pack_tokens}"
        raise ValueError(f"max_length: expected at most pack_tokens, {found}; no sample is cut in two")
    if training.per_device_train_batch_size != 1:
        rule = "set it to 1; pack_tokens says how much a row holds"
        raise ValueError(f"per_device_train_batch_size: would have no effect with packing: true; {rule}")
    for name, default in (("train_sampling_strategy", "random"), ("dataloader_drop_last", False)):
        if getattr(training, name) != default:
            raise ValueError(f"{name}: would have no effect with packing: true")


def _check_setting(setting: dataclasses.Field, found) -> None:
    name = setting.name
    default = None if name == "pad_to_multiple_of" else setting.default  # "auto", which means None but on Trainium
    if name in WITHOUT_EFFECT and found != default:
        raise ValueError(f"{name}: would have no effect; {WITHOUT_EFFECT[name]}")
    if (choices := setting.metadata.get("choices")) and found is not None and found not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(str, choices))}, found {found!r}")
    if isinstance(found, float) and not math.isfinite(found):
        raise ValueError(f"{name}: expected a number, found {found}")
    if name in AT_LEAST and found is not None and found < AT_LEAST[name]:
        raise ValueError(f"{name}: expected at least {AT_LEAST[name]}, found {found}")
    if name in ABOVE_ZERO and found is not None and found <= 0:
        raise ValueError(f"{name}: expected a number above 0, found {found}")
    if name == "lora_dropout" and found >= 1:
        raise ValueError(f"lora_dropout: expected a share below 1, found {found}")


def lora_settings(data: DataArguments, model: ModelConfig) -> dict:
    """Return the keywords of `models.lora.build_lora_config`."""
    targets = model.lora_target_modules
    return {
        "r": model.lora_r,
        "lora_alpha": model.lora_alpha,
        "lora_dropout": model.lora_dropout,
        "use_rslora": model.use_rslora,
        "use_dora": model.use_dora,
        "target_modules": [targets] if isinstance(targets, str) else targets,  # ModelConfig unpacks a list of one
        "train_vision": not data.freeze_vision_encoder,
        "train_merger": data.train_merger,
    }
