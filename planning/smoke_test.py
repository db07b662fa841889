"""A dry run: real batches through a model of the same class with few narrow layers and random weights."""

import copy
import itertools

import torch
from peft import get_peft_model
from torch.nn.functional import cross_entropy
from transformers import AutoModelForImageTextToText, PreTrainedConfig

from collator import IGNORED, VisionSFTCollator
from common.console import print_rank0
from models.attention import use_varlen
from models.families import family_of
from models.linear_attention import check_kernels
from models.lora import build_lora_config
from planning.page import print_plan
from planning.shapes import read_config
from training.build import train_sampler
from training.config_checks import check_device
from training.data import load_data, open_processor
from training.settings import AUTO, Settings

LAYERS = 2
VISION_WIDTH = 64  # of the tower's only head; divisible by 4, as rows and columns get a half each
BATCHES = 3  # of a dry run


def tiny_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the configuration with one head and two layers in each half; vocabulary and patches are unchanged."""
    family, settings = family_of(config), copy.deepcopy(config.to_dict())
    text = settings["text_config"]
    head = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
    width = 64 if text.get("head_dim") else head
    text |= {"hidden_size": width, "intermediate_size": width, "num_attention_heads": 1, "num_key_value_heads": 1}
    kinds = text.get("layer_types") or ["full_attention"]
    text |= {"num_hidden_layers": LAYERS, "layer_types": [kinds[0], kinds[-1]]}  # in hybrid models one of each kind
    if family.experts:
        text |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": width}
    vision = {"depth": LAYERS, "num_heads": 1, family.output_key: width, **family.tiny_vision(VISION_WIDTH)}
    settings["vision_config"] |= vision
    return type(config)(**settings)


def run_tiny_model(config: PreTrainedConfig, batch: dict, lora: dict, *, varlen: bool, device: torch.device) -> float:
    """Run a batch forward and backward through a tiny model of the same class and return the loss.

    Args:
        config: of the real model.
        batch: from the collator.
        lora: keywords of `build_lora_config`.
        varlen: whether the model attends by `attention.use_varlen`, as packs need.
        device: where the tiny model runs.

    Raises:
        ValueError: the loss is not finite, or a LoRA weight has no gradient.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(tiny_config(config), dtype=torch.float32)
    if varlen:
        use_varlen(model)
    model = get_peft_model(model, build_lora_config(model, **lora)).to(device).train()
    loss = _loss(model, {name: x.to(device) if torch.is_tensor(x) else x for name, x in batch.items()})
    loss.backward()
    if not torch.isfinite(loss):
        raise ValueError(f"the loss of a batch is {loss.item()}")
    if without := [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]:
        raise ValueError(f"{len(without)} LoRA weights have no gradient, the first is {without[0]}")
    return loss.item()


def _loss(model: torch.nn.Module, inputs: dict) -> torch.Tensor:
    """Return the mean loss of the answers' tokens; logits of all others would take gigabytes."""
    following = inputs.pop("labels")[:, 1:]
    kept = (following != IGNORED).any(dim=0).nonzero().flatten()
    logits = model(**inputs, use_cache=False, logits_to_keep=kept).logits
    return cross_entropy(logits.flatten(0, 1), following[:, kept].flatten(), ignore_index=IGNORED)


def dry_run(settings: Settings) -> None:
    """Print the plan, collate three batches, and run one of them through a tiny model; write nothing."""
    check_device(settings.training)
    config, _ = read_config(settings.model.model_name_or_path, settings.model.model_revision)
    check_kernels(family_of(config), packed=settings.training.packing)
    processor = open_processor(settings)
    data = load_data(settings, processor)
    print_plan(settings, data.splits, processor)
    if settings.pack_tokens == AUTO:
        settings = settings.with_packs(settings.pack_limit)
    args, packed = settings.training, settings.pack_tokens is not None
    collate = VisionSFTCollator(processor, max_length=args.max_length, packed=packed)
    order = itertools.islice(train_sampler(data.lengths["train"], args, settings.pack_tokens), BATCHES)
    batches = [collate([data.splits["train"][n] for n in indices]) for indices in order]
    lora = settings.lora_options()
    loss = run_tiny_model(config, batches[0], lora, varlen=packed, device=args.device)
    print_rank0(
        f"\ndry run    {len(batches)} batches collated, one forward and backward in a tiny model: loss {loss:.3f}"
    )
