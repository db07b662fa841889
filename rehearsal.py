"""A step in small: real batches through a model of the same class with few narrow layers and random weights."""

import copy

import torch
from peft import get_peft_model
from torch.nn.functional import cross_entropy
from transformers import AutoModelForImageTextToText, PreTrainedConfig

from attention import use_varlen
from collator import IGNORED
from modeling import build_lora_config

LAYERS = 2
# What the vision towers of the family call their sizes.
TOWERS = {
    "qwen2_vl": lambda text, head: {"embed_dim": head, "hidden_size": text},
    "qwen2_5_vl": lambda text, head: {
        "hidden_size": head, "intermediate_size": head, "out_hidden_size": text, "fullatt_block_indexes": [1],
    },
    "qwen3_vl": lambda text, head: {
        "hidden_size": head, "intermediate_size": head, "out_hidden_size": text, "deepstack_visual_indexes": [0],
    },
}  # fmt: skip
VISION_HEAD = 64  # numbers; divisible by 4, as rows and columns take a half each


def twin_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the configuration with one head and two layers in each half; words and patches stay as they are.

    Raises:
        ValueError: a model of another family.
    """
    if config.model_type not in TOWERS:
        raise ValueError(f"model_type: expected one of {', '.join(TOWERS)}, found {config.model_type!r}")
    settings = copy.deepcopy(config.to_dict())
    text = settings["text_config"]
    head = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
    text |= {"hidden_size": head, "intermediate_size": head, "num_attention_heads": 1, "num_key_value_heads": 1}
    text |= {"num_hidden_layers": LAYERS, "layer_types": ["full_attention"] * LAYERS}
    settings["vision_config"] |= {"depth": LAYERS, "num_heads": 1, **TOWERS[config.model_type](head, VISION_HEAD)}
    return type(config)(**settings)


def rehearse(config: PreTrainedConfig, batch: dict, lora: dict, *, varlen: bool, device: torch.device) -> float:
    """Run a batch forward and backward through the model's twin and return the loss.

    Args:
        config: of the real model.
        batch: what the collator returns.
        lora: keywords of `build_lora_config`.
        varlen: whether the model attends by `attention.use_varlen`, as packs need.
        device: where to.

    Raises:
        ValueError: the loss is not finite, or a LoRA weight got no gradient.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(twin_config(config), dtype=torch.float32)
    if varlen:
        use_varlen(model)
    model = get_peft_model(model, build_lora_config(model, **lora)).to(device).train()
    loss = _loss(model, {name: x.to(device) if torch.is_tensor(x) else x for name, x in batch.items()})
    loss.backward()
    if not torch.isfinite(loss):
        raise ValueError(f"the loss of a batch is {loss.item()}")
    if left_out := [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]:
        raise ValueError(f"{len(left_out)} LoRA weights got no gradient, the first is {left_out[0]}")
    return loss.item()


def _loss(model: torch.nn.Module, inputs: dict) -> torch.Tensor:
    """Return the mean loss of the answers' tokens; the LM head sees no others, which would be gigabytes of logits."""
    following = inputs.pop("labels")[:, 1:]
    kept = (following != IGNORED).any(dim=0).nonzero().flatten()
    logits = model(**inputs, use_cache=False, logits_to_keep=kept).logits
    return cross_entropy(logits.flatten(0, 1), following[:, kept].flatten(), ignore_index=IGNORED)
