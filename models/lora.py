"""LoRA: which layers it adapts, and the check that exactly these train."""

import re

import torch
from peft import LoraConfig, PeftModel
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from models.experts import WEIGHTS, stand_ins
from models.families import family_of
from models.host_embedding import host_weights
from models.loading import linear_names
from models.sharding import hidden_weights


def build_lora_config(
    model: PreTrainedModel,
    *,
    target_modules: list[str] | tuple[str, ...] | None = None,
    train_vision: bool = False,
    train_merger: bool = False,
    target_experts: bool = False,
    **settings,
) -> LoraConfig:
    """Return a LoRA configuration for the language model's layers, and for the tower or merger only if requested.

    Args:
        model: the base model.
        target_modules: names of linear layers of the language model; the family's `lora_targets` when None.
        train_vision: also adapt the vision tower's blocks.
        train_merger: also adapt the projections from the tower to the language model.
        target_experts: also adapt each expert. Routers are never adapted.
        settings: other fields of `LoraConfig`: r, lora_alpha, lora_dropout, use_rslora, use_dora.
    """
    family = family_of(model)
    names = "|".join(target_modules or family.lora_targets)
    patterns = [rf"{re.escape(family.language_layers)}\d+\.(?:\w+\.)+({names})"]
    if train_vision:
        patterns += layer_patterns(linear_names(model, family.vision_blocks))
    if train_merger:
        patterns += layer_patterns(linear_names(model, family.mergers))
    if target_experts:
        settings["target_parameters"] = [f"{family.experts}.{name}" for name in WEIGHTS]
    return LoraConfig(target_modules="|".join(patterns), task_type="CAUSAL_LM", **settings)


def layer_patterns(names: list[str]) -> list[str]:
    """Return one pattern for all layers whose paths differ only in the number of their block."""
    number = r"(?<=\.)\d+(?=\.)"
    return sorted({r"\d+".join(map(re.escape, re.split(number, name))) for name in names})


def count_trainable(model: torch.nn.Module) -> dict[str, int]:
    """Return the number of trainable parameters of each part: experts, rest of the language model, vision tower,
    merger, other."""
    family = family_of(model)
    parts = {
        **({"experts": (f".{family.experts}.",)} if family.experts else {}),
        "language model": (family.language_layers,),
        "vision tower": (family.vision_blocks,),
        "merger": family.mergers,
    }
    counts = dict.fromkeys([*parts, "other"], 0)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = next((part for part, paths in parts.items() if any(path in name for path in paths)), "other")
            counts[part] += parameter.numel()
    return counts


def check_targets(model: PreTrainedModel, target_modules: list[str] | None) -> None:
    """Raise ValueError for a name in `lora_target_modules` that no linear layer of the language model has."""
    family = family_of(model)
    known = {name.rsplit(".", 1)[1] for name in linear_names(model, family.language_layers)}
    if unknown := set(target_modules or family.lora_targets) - known:
        raise ValueError(f"lora_target_modules: {', '.join(sorted(unknown))} not among {', '.join(sorted(known))}")


def count_parameters(model: PeftModel) -> tuple[int, int]:
    """Return how many parameters train, and how many there are."""
    trainable, total = model.get_nb_trainable_parameters()
    zeros = sum(zeros.numel() for zeros in stand_ins(model).values())
    return trainable, total + hidden_weights(model) + host_weights(model) - zeros


def check_trainable(
    model: torch.nn.Module, *, train_vision: bool, train_merger: bool, target_experts: bool = False
) -> None:
    """Raise ValueError unless exactly the LoRA weights of the requested parts are trainable."""
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if stray := [name for name in trainable if "lora_" not in name]:
        raise ValueError(f"{len(stray)} trainable weights are not LoRA's, the first is {stray[0]}")
    requested = {"language model": True, "vision tower": train_vision, "merger": train_merger, "other": False}
    requested["experts"] = target_experts
    for part, count in count_trainable(model).items():
        if bool(count) != requested[part]:
            raise ValueError(f"{part}: {count} trainable weights, expected {'some' if requested[part] else 'none'}")


def detach_vision_inputs(model: torch.nn.Module) -> RemovableHandle:
    """Detach the input of the vision tower's first block, before which nothing trains.

    Gradient checkpointing makes the inputs of tower and language model require gradients. A frozen tower would then be
    recomputed and run backward for nothing. LoRA within the blocks still trains.
    """
    path = f"{family_of(model).vision_blocks}0"
    first = next(module for name, module in model.named_modules() if name.endswith(path))
    return first.register_forward_pre_hook(lambda block, inputs: (inputs[0].detach(), *inputs[1:]))
