"""The settings of a run: TRL's, and the few that TRL has no field for."""

import copy
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import NamedTuple

import torch
from transformers.utils import is_torch_bf16_gpu_available
from trl import ModelConfig, SFTConfig

from models.thinking import CHOICES
from training.packing import possible_packs

AUTO = "auto"  # in the place of a value that the run decides, see training/choices.py
FLOAT16 = "set fp16: true, bf16: false, dtype: float16"
NO_GPU = (
    "no GPU is visible (nvidia-smi lists them, CUDA_VISIBLE_DEVICES may hide them): train on a machine with one, plan "
    "the run without it by plan_run.py, or set use_cpu: true for a tiny model, as `make demo` does"
)


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
    pack_tokens: str = field(
        default=AUTO,
        metadata={"help": "with packing: most tokens in a row, images included; auto takes what fits"},
    )
    too_long: str = field(
        default="error",
        metadata={"help": "samples over max_length: error, or drop to leave them out", "choices": ["error", "drop"]},
    )
    thinking: str = field(
        default="off",
        metadata={"help": "models that think: on also learns the answers' <think>...</think>", "choices": CHOICES},
    )
    freeze_vision_encoder: bool = field(default=True, metadata={"help": "false adapts the vision tower as well"})
    train_merger: bool = field(default=False, metadata={"help": "adapt the projection from tower to language model"})
    lora_target_experts: bool = field(
        default=False, metadata={"help": "of mixture-of-experts models: adapt each expert as well"}
    )

    def __post_init__(self):
        if (found := str(self.pack_tokens)) != AUTO:
            if not found.removeprefix("-").isdecimal():
                raise ValueError(f"pack_tokens: expected a whole number or auto, found {found!r}")
            object.__setattr__(self, "pack_tokens", int(found))


@dataclass
class TrainingSettings(SFTConfig):
    """TRL's settings, with three other defaults and a few more settings."""

    gradient_checkpointing: str = field(
        default=AUTO,
        metadata={"help": "recompute activations: true, false, selective (if compiled), or auto"},
    )
    dataloader_num_workers: int = field(default=2, metadata={"help": "processes that decode and resize images"})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "true would log 0 in place of NaN"})
    allow_config_change: bool = field(
        default=False, metadata={"help": "resume from a checkpoint although settings, data or versions have changed"}
    )
    compile_layers: str = field(
        default=AUTO,
        metadata={"help": "compile each layer's arithmetic on the GPU: true, false, or auto for runs that repay it"},
    )
    shard_base: bool = field(
        default=False, metadata={"help": "several GPUs: each holds a part of the base model, by FSDP2"}
    )
    offload_embedding: bool = field(
        default=False, metadata={"help": "keep the input embedding in the host's memory, and look its rows up there"}
    )
    max_skipped_steps: int = field(
        default=20, metadata={"help": "float16: end the run after so many steps in a row that overflow"}
    )
    dry_run: bool = field(
        default=False, metadata={"help": "print the plan, try a few batches on a tiny model, and end"}
    )

    def __post_init__(self):
        self.gradient_checkpointing = _read_choice("gradient_checkpointing", self, (AUTO, "selective"))
        self.compile_layers = _read_choice("compile_layers", self, (AUTO,))
        if self.use_cpu and self.bf16 is None:
            self.bf16 = False  # TRL would turn it on; a CPU computes in float32
        if not self.use_cpu:
            self._check_gpu()
        if self.eval_steps == 0:  # transformers would take `logging_steps` instead
            raise ValueError("eval_steps: expected a number above 0, found 0")
        super().__post_init__()

    @property
    def place_model_on_device(self) -> bool | None:
        """False keeps the trainer from moving a sharded model, which is where it belongs."""
        return False if self.shard_base else super().place_model_on_device

    def past_the_end(self, steps: int) -> list[str]:
        """Return a line for each setting that has no effect, or not its own, in a run of so many steps."""
        lines = []
        if (warmup := self.get_warmup_steps(steps)) >= steps:
            lines.append(f"warmup_steps: {warmup} cover all {steps} steps of the run; the rate never reaches its peak")
        if self.logging_strategy == "steps" and self.logging_steps > steps:
            lines.append(f"logging_steps: {self.logging_steps:g} is past the run's {steps} steps; no loss is logged")
        if self.eval_strategy == "steps" and self.eval_delay > steps:
            lines.append(f"eval_delay: {self.eval_delay:g} is past the run's {steps} steps; there is no validation")
        return lines

    def _check_gpu(self) -> None:
        """Raise ValueError, with what to do, where mixed precision finds no GPU, or one without bfloat16."""
        wants_bf16 = self.bf16 or (self.bf16 is None and not self.fp16)
        if (wants_bf16 or self.fp16) and not torch.accelerator.is_available():
            raise ValueError(NO_GPU)
        if wants_bf16 and not is_torch_bf16_gpu_available():
            raise ValueError(f"bf16: this GPU has no bfloat16; {FLOAT16} (configs/skin_16gb.yaml does)")


def _read_choice(name: str, settings: TrainingSettings, words: tuple[str, ...]) -> bool | str:
    """Return the value of a switch that also takes these words."""
    found = str(getattr(settings, name))
    choices = {**{word: word for word in words}, "true": True, "false": False}
    if found.lower() not in choices:
        raise ValueError(f"{name}: expected {', '.join(words)}, true or false, found {found!r}")
    return choices[found.lower()]


class Settings(NamedTuple):
    """All settings of a run, as they were parsed; nothing changes them afterwards."""

    data: DataArguments
    training: TrainingSettings
    model: ModelConfig

    @property
    def output_dir(self) -> Path:
        return Path(self.training.output_dir)

    @property
    def pack_tokens(self) -> int | str | None:
        """Most tokens of a pack; None without packing, `AUTO` before the run has decided it."""
        return self.data.pack_tokens if self.training.packing else None

    @property
    def pack_limit(self) -> int | None:
        """Most tokens that a pack may have, also where that is not decided; None without packing."""
        if self.pack_tokens == AUTO:
            return max(possible_packs(self.training.gradient_accumulation_steps))
        return self.pack_tokens

    @property
    def order_seed(self) -> int:
        """Seed of the order of samples."""
        return self.training.seed if self.training.data_seed is None else self.training.data_seed

    @property
    def evaluates(self) -> bool:
        return self.training.eval_strategy != "no"

    def decided(self, **values) -> "Settings":
        """Return settings in which these values, by their names in a recipe, stand in the place of `auto`."""
        training, names = copy.copy(self.training), {field.name for field in fields(self.data)}
        for name, value in values.items():  # dataclasses.replace would set up the devices again
            if name not in names:
                setattr(training, name, value)
        data = replace(self.data, **{name: value for name, value in values.items() if name in names})
        return self._replace(data=data, training=training)

    def with_packs(self, tokens: int) -> "Settings":
        """Return settings with packs of this size, one of `possible_packs`, in the place of `auto`."""
        packs = possible_packs(self.training.gradient_accumulation_steps)
        return self.decided(pack_tokens=tokens, gradient_accumulation_steps=packs[tokens])

    def loading_options(self) -> dict:
        """Return the keywords of `load_model`: how the base is loaded in training, and later for its adapter."""
        return {
            "quantization": "nf4" if self.model.load_in_4bit else None,
            "double_quant": self.model.use_bnb_nested_quant,
            "dtype": self.model.dtype,
            "attn_implementation": self.model.attn_implementation,
            "revision": self.model.model_revision,
        }

    def lora_options(self) -> dict:
        """Return the keywords of `models.lora.build_lora_config`."""
        model, targets = self.model, self.model.lora_target_modules
        names = ("lora_alpha", "lora_dropout", "use_rslora", "use_dora")
        return {
            "r": model.lora_r,
            **{name: getattr(model, name) for name in names},
            "target_modules": [targets] if isinstance(targets, str) else targets,  # ModelConfig unpacks a list of one
            "train_vision": not self.data.freeze_vision_encoder,
            "train_merger": self.data.train_merger,
            "target_experts": self.data.lora_target_experts,
        }
