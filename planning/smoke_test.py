"""A step in small: real batches through a model of the same class with few narrow layers and random weights."""

import copy
import itertools

import torch
from peft import get_peft_model
from torch.nn.functional import cross_entropy
from transformers import AutoModelForImageTextToText, PreTrainedConfig

from collator import IGNORED, VisionSFTCollator
from common.console import print_rank0
from models.attention import use_varlen
from models.families import TOWERS
from models.lora import build_lora_config
from planning.page import print_plan
from planning.shapes import read_config
from training.build import train_sampler
from training.data import load_data, open_processor
from training.settings import Settings, lora_settings

LAYERS = 2

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


TRIED = 3  # batches of a dry run


def dry_run(settings: Settings) -> None:
    """Print the plan, collate three batches and run one of them through a tiny model; write nothing."""
    processor = open_processor(settings)
    data = load_data(settings, processor)
    print_plan(*settings, data.splits, processor)
    args, packed = settings.training, settings.pack_tokens is not None
    collate = VisionSFTCollator(processor, max_length=args.max_length, packed=packed)
    batches = [
        collate([data.splits["train"][n] for n in indices])
        for indices in itertools.islice(train_sampler(data.lengths["train"], args, settings.pack_tokens), TRIED)
    ]
    config, _ = read_config(settings.model.model_name_or_path, settings.model.model_revision)
    lora = lora_settings(settings.data, settings.model)
    loss = rehearse(config, batches[0], lora, varlen=packed, device=args.device)
    print_rank0(
        f"\ndry run    {len(batches)} batches collated, one forward and backward in a tiny model: loss {loss:.3f}"
    )
