"""A trained adapter on its base, loaded as in training, and its answers."""

import json
import sys
from contextlib import suppress
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError
from transformers import GenerationConfig, PreTrainedModel, ProcessorMixin

from collator import collate_prompts
from hub import RUN_FACTS
from modeling import load_model


def load_answering_model(
    adapter: str | None, *, base: str | None = None, quantization: str = "auto", dtype: str | None = None
) -> PreTrainedModel | PeftModel:
    """Load the base model, as it was in training unless told otherwise, and the adapter on it.

    Args:
        adapter: folder or Hub id of an adapter; None for the base alone.
        base: folder or Hub id of a base model; the one that the adapter names when None.
        quantization: "nf4", "none", or "auto": as in training, none without an adapter.
        dtype: of the arithmetic; as in training when None, bfloat16 without an adapter.

    Raises:
        ValueError: the adapter or the base cannot be loaded.
    """
    settings = loading_settings(adapter, base=base, quantization=quantization, dtype=dtype)
    model = load_model(base or read_adapter_config(adapter).base_model_name_or_path, **settings)
    # Greedy means the likeliest token; generate() would mix in the family's defaults, which penalise repeated ones.
    own = model.generation_config
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=own.eos_token_id, pad_token_id=own.pad_token_id
    )
    try:
        return (PeftModel.from_pretrained(model, adapter) if adapter else model).eval()
    except SafetensorError as error:
        raise ValueError(f"--adapter: {adapter}: unreadable weights: {error}") from error


def loading_settings(adapter: str | None, *, base: str | None, quantization: str, dtype: str | None) -> dict:
    """Return the keywords of `load_model`: what the adapter's run noted, changed by the options."""
    settings = read_run_facts(adapter) if adapter else {}
    if adapter and not settings and quantization == "auto":
        print(f"{adapter} does not say how its base was loaded; taking 16 bit (--quantization)", file=sys.stderr)
    settings = {"quantization": None, "dtype": "bfloat16", **settings}
    if quantization != "auto":
        settings["quantization"] = None if quantization == "none" else quantization
    if dtype:
        settings["dtype"] = dtype
    if base:
        settings["revision"] = None
    return settings


def read_adapter_config(adapter: str) -> PeftConfig:
    try:
        return PeftConfig.from_pretrained(adapter)
    except (OSError, ValueError) as error:
        raise ValueError(f"--adapter: no adapter in {adapter!r}, neither a folder nor on the Hub") from error


def read_run_facts(adapter: str) -> dict:
    """Return the keywords of `load_model` that `train_sft.py` noted; none for adapters from elsewhere."""
    folder = Path(adapter)
    found = [path for path in (folder / RUN_FACTS, folder.parent / RUN_FACTS) if path.is_file()]
    if not folder.is_dir():
        with suppress(OSError, ValueError):  # not there, or no network: the caller says what that means
            found = [Path(hf_hub_download(adapter, RUN_FACTS))]
    try:
        return json.loads(found[0].read_text(encoding="utf-8")) if found else {}
    except ValueError as error:
        raise ValueError(f"{found[0]}: not JSON: {error}") from error


@torch.inference_mode()
def answer(model, processor: ProcessorMixin, examples: list[dict], max_new_tokens: int) -> list[str]:
    """Return the model's answer to each example, decoded greedily."""
    inputs = {name: tensor.to(model.device) for name, tensor in collate_prompts(processor, examples).items()}
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    output = model.generate(**inputs, max_new_tokens=max_new_tokens)
    new_tokens = output[:, inputs["input_ids"].size(1) :]
    return [text.strip() for text in processor.batch_decode(new_tokens, skip_special_tokens=True)]
