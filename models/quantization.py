"""Bases that come quantised: what their config.json says, which layers it means, and what was loaded.

Decided by the configuration alone, before any weight is read: 4-bit bases of bitsandbytes are used as they are, all
others are refused.
"""

import re

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from transformers import PreTrainedConfig, PreTrainedModel

from models.compat import anchored_match, default_16_bit_modules, is_stored_quantized
from models.families import family_of

BLOCK, SCALES_A_BLOCK = 64, 256  # NF4 weights that share a scale; scales that share one in double quantisation
CODES = 16 * 4, 256 * 4  # bytes of the lookup tables: NF4's 16 values, and the 256 values of quantised scales
DEFAULTS = {  # of bitsandbytes' settings, where a config.json leaves them out
    "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False, "bnb_4bit_quant_storage": "uint8",
}  # fmt: skip
STORED = "stored"  # the value of `quantization` for a base that comes in 4 bit
# Why each other method is not trained. transformers 5.24 has code to train on some, with packages that are not
# installed here, or with kernels that are downloaded when they are first used.
REFUSED = {
    "gptq": "GPTQ: training on it takes optimum and gptqmodel, which this project does not use",
    "awq": "AWQ: training on it takes gptqmodel, which this project does not use",
    "fp8": "FP8: training on it takes kernels that are downloaded at run time, which this project does not do",
    "fbgemm_fp8": "FP8 (FBGEMM), on which transformers cannot train",
    "compressed-tensors": "compressed-tensors: training on it takes a package that this project does not use",
    "bitsandbytes": "8 bit (bitsandbytes); the bases trained here are in 4 or 16 bit",
}


def stored_quantization(config: PreTrainedConfig) -> dict | None:
    """Return the `quantization_config` of a base that comes quantised, complete; None for one in 16 bit."""
    text = getattr(config, "text_config", None)
    found = getattr(config, "quantization_config", None) or getattr(text, "quantization_config", None)
    if found is None:
        return None
    return {**DEFAULTS, **(found if isinstance(found, dict) else found.to_dict())}


def check_stored(name: str, config: PreTrainedConfig) -> None:
    """Raise ValueError for a base that comes quantised in a way that is not trained here."""
    stored = stored_quantization(config)
    if stored is None or _is_4_bit(stored):
        return
    method = stored.get("quant_method") or "bitsandbytes"
    reason = REFUSED.get(method, f"{method}, which this project does not train")
    raise ValueError(f"{name!r}: it comes in {reason}; take its 16-bit base, or one in 4 bit of bitsandbytes")


def _is_4_bit(stored: dict) -> bool:
    return stored.get("quant_method", "bitsandbytes") == "bitsandbytes" and bool(stored.get("load_in_4bit"))


def resolve_quantization(name: str, config: PreTrainedConfig, quantization: str | None) -> str | None:
    """Return how a base is loaded: "stored" if it comes in 4 bit, else "nf4" or None, as requested.

    Raises:
        ValueError: a base in 4 bit is requested in 16 bit, or one in 16 bit as the 4 bit that it does not have.
    """
    if quantization not in ("nf4", STORED, None):
        raise ValueError(f"quantization: expected 'nf4', '{STORED}' or None, found {quantization!r}")
    if stored_quantization(config) is None:
        if quantization == STORED:
            raise ValueError(f"{name!r} does not come in 4 bit, as the base of the training did")
        return quantization
    if quantization is None:
        raise ValueError(f"{name!r} comes in 4 bit and cannot be loaded in 16 bit; name its 16-bit base")
    return STORED


def stored_readings(model: PreTrainedModel) -> list[set[str]]:
    """Return the linear layers that config.json puts into 4 bit, in each way that transformers has read its list.

    `llm_int8_skip_modules` names what stays in 16 bit. Since version 5 a name starts at the top of the model; before,
    it could be any part of a path, and language layers had shorter paths. The reading of the version that saved the
    base comes first.

    Args:
        model: with all its linear layers, in any precision; may be on the meta device.
    """
    skipped = stored_quantization(model.config).get("llm_int8_skip_modules")
    layers = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    if skipped is None:
        skipped = default_16_bit_modules(model)
    anchored = {name for name in layers if not anchored_match(name, skipped)}
    paths = {name: f".{name}. .{family_of(model).former_path(name)}." for name in layers}
    anywhere = {name for name in layers if not any(f".{part}." in paths[name] for part in skipped)}
    version = str(getattr(model.config, "transformers_version", None) or "5")
    return [anywhere, anchored] if int(version.split(".")[0]) < 5 else [anchored, anywhere]


def use_stored_precision(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Finish a base that was loaded with all linear layers prepared for 4 bit, so that the file decides.

    Layers whose weight the file has in 16 bit become plain ones. All 16-bit weights get `dtype`: transformers leaves
    those of such a base as they were saved.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, Linear4bit) and not isinstance(module.weight, Params4bit):
            with torch.device("meta"):
                plain = torch.nn.Linear(module.in_features, module.out_features, bias=False)
            plain.weight, plain.bias = module.weight, module.bias
            model.set_submodule(name, plain)
    for weight in model.parameters():
        if not isinstance(weight, Params4bit):
            weight.data = weight.data.to(dtype)


def describe_stored(model: PreTrainedModel) -> dict | None:
    """Return what is in 4 bit of a base that came so, for `run.json`; None for any other model.

    Args:
        model: the base, also one that PEFT has adapted.

    Returns:
        type ("nf4"), double_quant, layers (how many), and language_layers_in_16_bit (their paths).
    """
    if not is_stored_quantized(model):
        return None
    return describe_layers(model)


def describe_layers(model: PreTrainedModel) -> dict:
    """Return the same of a model with its 4-bit layers, with or without weights."""
    stored, prefix = stored_quantization(model.config), family_of(model).language_layers
    linear = {
        name.removesuffix(".base_layer"): module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and ".lora_" not in name
    }
    in_4_bit = {name for name, module in linear.items() if isinstance(module, Linear4bit)}
    return {
        "type": stored["bnb_4bit_quant_type"],
        "double_quant": bool(stored["bnb_4bit_use_double_quant"]),
        "layers": len(in_4_bit),
        "language_layers_in_16_bit": [name for name in linear if name.startswith(prefix) and name not in in_4_bit],
    }


def format_stored(stored: dict) -> str:
    """Return `describe_stored` as a line for the screen."""
    nested, in_16_bit = ", double quantised" if stored["double_quant"] else "", stored["language_layers_in_16_bit"]
    rest = "all language layers among them"
    if in_16_bit:
        rest = f"of the language layers {len(in_16_bit)} are in 16 bit: {format_paths(in_16_bit)}"
    return f"{stored['layers']} layers, as the base comes ({stored['type']}{nested}); {rest}"


def check_same_stored(model: PreTrainedModel, trained_on: dict | None) -> None:
    """Raise ValueError unless a base that comes in 4 bit has the layers in 4 bit that a run recorded."""
    if trained_on is not None and (found := describe_stored(model)) != trained_on:
        keys = [key for key in trained_on if (found or {}).get(key) != trained_on[key]]
        before, now = (f"{keys[0]} {value[keys[0]]}" if value else "none" for value in (trained_on, found))
        raise ValueError(f"the base is not the one of the training: its layers in 4 bit had {before}, and have {now}")


def format_paths(paths: list[str]) -> str:
    """Return paths that differ only in the number of their block as one: "layers.{0,3}.mlp.up_proj"."""
    blocks = {}
    for path in paths:
        number = re.search(r"(?<=\.)\d+(?=\.)", path)
        before, found, after = (path[: number.start()], number[0], path[number.end() :]) if number else (path, "", "")
        blocks.setdefault((before, after), []).append(found)
    return ", ".join(
        f"{before}{numbers[0] if len(numbers) == 1 else '{' + ','.join(numbers) + '}'}{after}"
        for (before, after), numbers in blocks.items()
    )


def nf4_bytes(count: int, *, double_quant: bool) -> int:
    """Return the bytes of a layer of `count` weights in NF4, with the scales and tables that bitsandbytes stores."""
    blocks, (values, rounded) = -(-count // BLOCK), CODES
    if not double_quant:
        return -(-count // 2) + 4 * blocks + values
    return -(-count // 2) + blocks + 4 * -(-blocks // SCALES_A_BLOCK) + 4 + values + rounded
