"""LoRA: which layers it adapts, and the check that exactly these train."""

import re

import torch
from peft import LoraConfig
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from models.families import LANGUAGE_LAYERS, MERGERS, VISION_BLOCKS
from models.loading import linear_names

DEFAULT_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def build_lora_config(
    model: PreTrainedModel,
    *,
    r: int,
    lora_alpha: int,
    lora_dropout: float,
    target_modules: list[str] | tuple[str, ...] | None = None,
    train_vision: bool = False,
    train_merger: bool = False,
    use_rslora: bool = False,
    use_dora: bool = False,
) -> LoraConfig:
    """Return a LoRA configuration that reaches the language model's layers, and the tower or merger only if asked.

    Args:
        model: the base model; its layers have other names in each generation of the family.
        r: rank.
        lora_alpha: scale; the update is multiplied by lora_alpha / r.
        lora_dropout: dropout before the low-rank layers.
        target_modules: names of linear layers of the language model; `DEFAULT_TARGETS` when None.
        train_vision: also adapt the vision tower's blocks.
        train_merger: also adapt the projections from the tower to the language model.
        use_rslora: scale by lora_alpha / sqrt(r) instead.
        use_dora: train the magnitude of each output as well.
    """
    names = "|".join(target_modules or DEFAULT_TARGETS)
    patterns = [rf"model\.language_model\.layers\.\d+\.\w+\.({names})"]
    if train_vision:
        patterns += layer_patterns(linear_names(model, VISION_BLOCKS))
    if train_merger:
        patterns += layer_patterns(linear_names(model, MERGERS))
    return LoraConfig(
        r=r,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        target_modules="|".join(patterns),
        use_rslora=use_rslora,
        use_dora=use_dora,
        task_type="CAUSAL_LM",
    )


def layer_patterns(names: list[str]) -> list[str]:
    """Return one pattern for the layers that differ only in the number of their block."""
    number = r"(?<=\.)\d+(?=\.)"
    return sorted({r"\d+".join(map(re.escape, re.split(number, name))) for name in names})


def count_trainable(model: torch.nn.Module) -> dict[str, int]:
    """Return the number of trainable parameters of each part: language model, vision tower, merger, other."""
    parts = {"language model": (LANGUAGE_LAYERS,), "vision tower": (VISION_BLOCKS,), "merger": MERGERS}
    counts = dict.fromkeys([*parts, "other"], 0)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = next((part for part, paths in parts.items() if any(path in name for path in paths)), "other")
            counts[part] += parameter.numel()
    return counts


def check_targets(model: PreTrainedModel, target_modules: list[str] | None) -> None:
    """Raise ValueError for a name in `lora_target_modules` that no linear layer of the language model has."""
    known = {name.rsplit(".", 1)[1] for name in linear_names(model, LANGUAGE_LAYERS)}
    if unknown := set(target_modules or DEFAULT_TARGETS) - known:
        raise ValueError(f"lora_target_modules: {', '.join(sorted(unknown))} not among {', '.join(sorted(known))}")


def check_trainable(model: torch.nn.Module, *, train_vision: bool, train_merger: bool) -> None:
    """Raise ValueError unless exactly what was asked for trains: LoRA weights, in the parts that were named."""
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if stray := [name for name in trainable if "lora_" not in name]:
        raise ValueError(f"{len(stray)} trainable weights are not LoRA's, the first is {stray[0]}")
    asked = {"language model": True, "vision tower": train_vision, "merger": train_merger, "other": False}
    for part, count in count_trainable(model).items():
        if bool(count) != asked[part]:
            raise ValueError(f"{part}: {count} trainable weights, expected {'some' if asked[part] else 'none'}")


def end_gradients_at_tower(model: torch.nn.Module) -> RemovableHandle:
    """Let no gradient flow into what comes before the vision tower's first block, where nothing trains.

    Gradient checkpointing makes the inputs of tower and language model ask for gradients, and the frozen tower would
    then be run once more and taken through the backward pass for nothing. LoRA within the blocks trains as before.
    """
    blocks = next(module for name, module in model.named_modules() if name.endswith(VISION_BLOCKS.removesuffix(".")))
    return blocks[0].register_forward_pre_hook(lambda block, inputs: (inputs[0].detach(), *inputs[1:]))
