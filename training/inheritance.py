"""Settings that a recipe inherits and that another setting, written nearer to the run, has switched off."""

from collections.abc import Mapping
from typing import NamedTuple

from training.settings import AUTO

ANY = object()


class Switch(NamedTuple):
    """A setting that leaves others without effect, or makes them wrong.

    Attributes:
        name: of the setting.
        value: with which it does so; ANY for each new one.
        off: the others, with the value that stands for "not set".
    """

    name: str
    value: object
    off: Mapping[str, object]


NO_BEST = {"load_best_model_at_end": False, "metric_for_best_model": None, "greater_is_better": None}
NO_HALF = {"bf16": False, "fp16": False, "tf32": None, "bf16_full_eval": False, "fp16_full_eval": False}
SWITCHES = (
    Switch("packing", False, {"pack_tokens": AUTO}),
    Switch(
        "packing", True,
        {"per_device_train_batch_size": 1, "train_sampling_strategy": "random", "dataloader_drop_last": False},
    ),
    Switch("load_in_4bit", False, {"bnb_4bit_quant_storage": None}),
    Switch("use_cpu", True, NO_HALF),
    Switch("bf16", True, {"fp16": False}),
    Switch("fp16", True, {"bf16": False}),
    Switch("eval_strategy", "no", NO_BEST),
    Switch("save_strategy", "no", NO_BEST),
    Switch("load_best_model_at_end", False, {"metric_for_best_model": None, "greater_is_better": None}),
    Switch("dataloader_num_workers", 0, {"dataloader_prefetch_factor": None, "dataloader_persistent_workers": False}),
    Switch("gradient_checkpointing", "false", {"gradient_checkpointing_kwargs": None}),
    Switch("lr_scheduler_type", ANY, {"lr_scheduler_kwargs": None}),
    Switch("optim", ANY, {"optim_args": None, "optim_target_modules": None}),
)  # fmt: skip


def switched_off(values: Mapping[str, object], written: Mapping[str, int]) -> dict[str, object]:
    """Return the inherited settings that a setting written nearer to the run has switched off, with their new values.

    A value that stands beside the switch, in the same file or on the command line, was meant: it is left for the
    checks, which refuse it.

    Args:
        values: of all settings.
        written: where a setting was written: the nearer to the command line, the higher the number.

    Raises:
        ValueError: a setting would have no effect because of an inherited one that is as likely to be meant.
    """
    off = {}
    for switch in SWITCHES:
        place = written.get(switch.name, 0)
        if switch.value is ANY or _same(values[switch.name], switch.value):
            off |= {name: value for name, value in switch.off.items() if 0 < written.get(name, 0) < place}
    if values["max_steps"] > 0 and written.get("num_train_epochs", 0) > written.get("max_steps", 0):
        raise ValueError(
            f"num_train_epochs: would have no effect, as the inherited max_steps: {values['max_steps']} ends the run; "
            "set max_steps: -1 as well"
        )
    return off


def _same(found: object, value: object) -> bool:
    return str(getattr(found, "value", found)).lower() == str(value).lower()
