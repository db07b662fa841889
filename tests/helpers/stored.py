"""Tiny bases that come in 4 bit, as people save them and as the Hub has them."""

import json

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig


def save_stored(base, folder, skipped, **settings):
    """Write `base` to `folder` in NF4; `skipped` stay in 16 bit, `settings` are of `BitsAndBytesConfig`."""
    settings = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, **settings}
    nf4 = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=skipped, **settings)
    model = AutoModelForImageTextToText.from_pretrained(base, quantization_config=nf4, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    AutoProcessor.from_pretrained(base).save_pretrained(folder)
    return folder


def change_config(folder, **entries):
    """Change entries of a config.json; a mapping is merged into the one that is there."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for key, value in entries.items():
        config[key] = {**config.get(key, {}), **value} if isinstance(value, dict) else value
    path.write_text(json.dumps(config))
