"""A trained adapter on its base model, which is loaded as in training."""

import json
import sys
from contextlib import suppress
from pathlib import Path

from huggingface_hub import hf_hub_download
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError
from transformers import GenerationConfig, PreTrainedModel

from common.files import ADAPTER_WEIGHTS, LOADING_SETTINGS
from models.loading import load_model


def load_answering_model(
    adapter: str | None, *, base: str | None = None, quantization: str = "auto", dtype: str | None = None
) -> PreTrainedModel | PeftModel:
    """Load the base model, by default as in training, and the adapter on it.

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
    decode_greedily(model)
    try:
        return (PeftModel.from_pretrained(model, adapter) if adapter else model).eval()
    except SafetensorError as error:
        raise ValueError(f"--adapter: {adapter}: unreadable weights: {error}") from error


def decode_greedily(model: PreTrainedModel) -> None:
    """Replace the published generation settings: they would also penalise repeated tokens."""
    published = model.generation_config
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=published.eos_token_id, pad_token_id=published.pad_token_id
    )


def load_adapters(adapters: list[str], **options) -> tuple[PreTrainedModel | PeftModel, dict[str, str]]:
    """Load several adapters on one base, and return the model and each adapter's path by its name in the model.

    Args:
        adapters: folders or Hub ids; none for the base alone.
        options: see `load_answering_model`.

    Raises:
        ValueError: the adapters do not all have the same base, loaded in the same way.
    """
    model = load_answering_model(adapters[0] if adapters else None, **options)
    names = {"default": adapters[0]} if adapters else {}
    expected = _base_settings(adapters[0], **options) if adapters else None
    for number, adapter in enumerate(adapters[1:], start=1):
        if (settings := _base_settings(adapter, **options)) != expected:
            raise ValueError(f"--adapter: {adapter} has the base {settings}, and {adapters[0]} {expected}")
        names[f"adapter-{number}"] = adapter
        try:
            model.load_adapter(adapter, adapter_name=f"adapter-{number}")
        except SafetensorError as error:
            raise ValueError(f"--adapter: {adapter}: unreadable weights: {error}") from error
    return model, names


def _base_settings(adapter: str, *, base: str | None, quantization: str, dtype: str | None) -> dict:
    settings = loading_settings(adapter, base=base, quantization=quantization, dtype=dtype)
    return {"base": base or read_adapter_config(adapter).base_model_name_or_path, **settings}


def loading_settings(adapter: str | None, *, base: str | None, quantization: str, dtype: str | None) -> dict:
    """Return the keywords of `load_model`: those that the adapter's run recorded, changed by the options."""
    settings = read_run_facts(adapter) if adapter else {}
    if adapter and not settings and quantization == "auto":
        print(f"{adapter} does not say how its base was loaded; using 16 bit (--quantization)", file=sys.stderr)
    settings = {"quantization": None, "dtype": "bfloat16", **settings}
    if quantization != "auto":
        settings["quantization"] = None if quantization == "none" else quantization
    if dtype:
        settings["dtype"] = dtype
    if base:
        settings["revision"] = None
    return settings


def read_adapter_config(adapter: str) -> PeftConfig:
    """Return an adapter's configuration.

    Raises:
        ValueError: there is no adapter, or its weights are not in safetensors, a format that can hold no code.
    """
    try:
        config = PeftConfig.from_pretrained(adapter)
    except (OSError, ValueError) as error:
        raise ValueError(f"--adapter: no adapter in {adapter!r}, neither a folder nor on the Hub") from error
    if find_file(adapter, ADAPTER_WEIGHTS):
        return config
    raise ValueError(f"--adapter: {adapter} has no {ADAPTER_WEIGHTS}; weights of another format are not loaded")


def read_run_facts(adapter: str) -> dict:
    """Return the keywords of `load_model` that `train_sft.py` recorded; none for adapters from elsewhere."""
    path = find_file(adapter, LOADING_SETTINGS, f"../{LOADING_SETTINGS}")  # a checkpoint's are in the run's folder
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path else {}
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error


def find_file(adapter: str, *names: str) -> Path | None:
    """Return the first of these files that an adapter's folder has, or the first name from a Hub repository."""
    if Path(adapter).is_dir():
        return next((path for name in names if (path := Path(adapter) / name).is_file()), None)
    with suppress(OSError, ValueError):  # no such file, or no network: the caller reports what that means
        return Path(hf_hub_download(adapter, names[0]))
    return None
