"""A trained adapter on its base model, which is loaded as in training."""

import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, load_peft_weights
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForImageTextToText, GenerationConfig, PreTrainedModel, ProcessorMixin

from common.files import ADAPTER_WEIGHTS, LOADING_SETTINGS, digest_of_file, read_json, suggest_file
from models.attention import IMPLEMENTATIONS
from models.experts import add_stand_ins
from models.families import FAMILIES, family_of
from models.loading import CONFIG_ERRORS, is_path, load_config, load_model, readable_out_of_memory
from models.quantization import STORED, check_same_stored, stored_quantization
from models.thinking import CHOICES

CONFIG_NAME = "adapter_config.json"
# What PEFT raises, besides ValueError, for values of a kind that an entry cannot have.
ADAPTER_CONFIG_ERRORS = (*CONFIG_ERRORS, re.error)
LARGEST = 1e4  # of LoRA's weights and scales: trained ones are below a hundred, damaged ones mostly far above
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # of an adapter's weights
MERGED_ADAPTER = "merged_adapter"  # entry in the configuration of a merged model: base's name, adapter's digest


def load_answering_model(
    adapter: str | None, *, base: str | None = None, quantization: str = "auto", dtype: str | None = None
) -> PreTrainedModel | PeftModel:
    """Load the base model, by default as in training, and the adapter on it.

    Args:
        adapter: folder or Hub id of an adapter; None for the base alone.
        base: folder or Hub id of a base model; the one that the adapter names when None.
        quantization: "nf4", "none", or "auto": as in training; without an adapter as the base comes.
        dtype: of the arithmetic; as in training when None, bfloat16 without an adapter.

    Raises:
        ValueError: the adapter or the base cannot be loaded, or do not fit each other.
    """
    if adapter and base:
        check_not_merged(adapter, base)
    settings = loading_settings(adapter, base=base, quantization=quantization, dtype=dtype)
    advice = "load the base in 4 bit (--quantization nf4), or take a smaller one"
    with readable_out_of_memory(advice):
        trained_on = settings.pop("stored_layers", None)
        model = load_model(base or base_of(adapter)[0], **settings)
        check_same_stored(model, trained_on)
        decode_greedily(model)
        return (attach_adapter(model, adapter) if adapter else model).eval()


def attach_adapter(model: PreTrainedModel | PeftModel, adapter: str, *, name: str = "default") -> PeftModel:
    """Add an adapter to a base model, or one more to a model that has some.

    Raises:
        ValueError: unreadable weights, or they do not fit the base. PEFT would pass over most of what does not fit,
            and the base's answers would be taken for the adapter's.
    """
    check_family(model, adapter)
    options = {"adapter_name": name, "ignore_mismatched_sizes": True}  # `check_fit` counts all that does not fit
    if getattr(read_adapter_config(adapter), "target_parameters", None):
        add_stand_ins(model)
    with _peft_errors(adapter):
        if isinstance(model, PeftModel):
            model.load_adapter(adapter, **options)
        else:
            model = PeftModel.from_pretrained(model, adapter, **options)
    check_fit(model, adapter, name=name)
    return model


@contextmanager
def _peft_errors(adapter: str) -> Iterator[None]:
    """Raise ValueError for what PEFT cannot load, and leave its warnings of other tensors to `check_fit`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            yield
    except SafetensorError as error:
        raise ValueError(_unreadable(adapter, error)) from error
    except ValueError as error:  # no layer has the name of a target
        raise ValueError(
            f"adapter {adapter} does not fit its base model: {str(error).partition('. Please')[0]}"
        ) from error
    except ADAPTER_CONFIG_ERRORS as error:
        raise ValueError(_does_not_work(adapter, error)) from error


def _unreadable(adapter: str, error: Exception) -> str:
    return f"--adapter: {adapter}: unreadable weights in {ADAPTER_WEIGHTS}: {error}"


def _does_not_work(adapter: str, error: Exception) -> str:
    return f"--adapter: the {CONFIG_NAME} of {adapter} does not work: {type(error).__name__}: {error}"


def check_family(model: PreTrainedModel | PeftModel, adapter: str) -> None:
    """Raise ValueError for a processor of another family beside the adapter: families share names and shapes."""
    path = find_file(adapter, "processor_config.json")
    processor = read_json(path).get("processor_class") if path else None
    names = [family.name for family in FAMILIES.values() if family.processor.__name__ == processor]
    if names and (name := family_of(model).name) not in names:
        raise ValueError(f"adapter {adapter} does not fit its base model: it is of {' or '.join(names)}, not {name}")


def check_fit(model: PeftModel, adapter: str, *, name: str = "default") -> None:
    """Raise ValueError unless the adapter's file has exactly the tensors of the model's adapter `name`, all finite."""
    with _peft_errors(adapter):
        weights = load_peft_weights(adapter, device="cpu")
    stored = {key: tuple(tensor.shape) for key, tensor in weights.items()}
    state = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    expected = {key: tuple(tensor.shape) for key, tensor in state.items()}
    unknown, missing = sorted(stored.keys() - expected.keys()), sorted(expected.keys() - stored.keys())
    other = sorted(key for key in stored.keys() & expected.keys() if stored[key] != expected[key])
    problems = []
    if unknown:
        problems.append(f"{len(unknown)} of its {len(stored)} tensors have no place there, the first is {unknown[0]}")
    if missing:
        problems.append(f"{len(missing)} of the {len(expected)} expected ones are missing, the first is {missing[0]}")
    if other:
        shapes = f"{other[0]} with {stored[other[0]]} in place of {expected[other[0]]}"
        problems.append(f"{len(other)} of its {len(stored)} tensors have another shape, the first is {shapes}")
    if problems:
        base = Path(model.get_base_model().config.name_or_path).name
        raise ValueError(f"adapter {adapter} does not fit the base model {base}: {'; '.join(problems)}")
    check_values(weights, adapter)


def check_values(weights: dict[str, torch.Tensor], adapter: str) -> None:
    """Raise ValueError for NaN, infinity, whole or absurd numbers in an adapter's tensors: answers are meaningless."""
    if other := [name for name, tensor in weights.items() if tensor.dtype not in DTYPES]:
        found = str(weights[other[0]].dtype).removeprefix("torch.")
        expected = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise ValueError(f"--adapter: {adapter}: {len(other)} tensors are {found}, expected {expected}")
    if invalid := [name for name, tensor in weights.items() if not tensor.isfinite().all()]:
        raise ValueError(
            f"--adapter: {adapter}: {len(invalid)} tensors hold NaN or infinity, the first is {invalid[0]}"
        )
    for name, tensor in weights.items():
        if (largest := tensor.abs().max().item()) > LARGEST:
            rule = f"expected at most {LARGEST:,.0f}; the file is damaged, or its training diverged"
            raise ValueError(f"--adapter: {adapter}: a weight of {name} is {largest:.1e} in size, {rule}")


def check_fits_base(adapter: str) -> None:
    """Raise ValueError unless the adapter fits the base that it names; of the base only the configuration is read.

    A base that is not found is reported on the screen: an adapter may be pushed from a machine that lacks it.
    """
    config, revision = read_adapter_config(adapter), read_run_facts(adapter).get("revision")
    try:
        base = load_config(config.base_model_name_or_path, revision=revision)
    except ValueError as error:
        print(f"not checked whether the adapter fits its base: {error}", file=sys.stderr)
        return
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(base)
        with _peft_errors(adapter):
            model = get_peft_model(model, config, low_cpu_mem_usage=True)
    check_fit(model, adapter)


def describe_merge(adapter: str, base: str) -> dict[str, str]:
    """Return the entry `MERGED_ADAPTER` of a model that holds this base and adapter."""
    return {"base": Path(base).name, "adapter": digest_of_file(find_file(adapter, ADAPTER_WEIGHTS))}


def check_not_merged(adapter: str, base: str) -> None:
    """Raise ValueError if an adapter is already merged into `base`, and this one was not trained on the result."""
    trained_on = read_adapter_config(adapter).base_model_name_or_path
    found, merge = getattr(load_config(base), MERGED_ADAPTER, None), describe_merge(adapter, trained_on)
    if found and base != trained_on and any(found.get(key) == value for key, value in merge.items()):
        problem = f"--base: {base} has an adapter merged into it already, and {adapter} was trained without that one"
        raise ValueError(f"{problem}: use the merged model alone, or the base {merge['base']}")


def decode_greedily(model: PreTrainedModel) -> None:
    """Replace the published generation settings: they would also penalise repeated tokens."""
    published = model.generation_config
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=published.eos_token_id, pad_token_id=published.pad_token_id
    )


def end_answers(model: PreTrainedModel | PeftModel, processor: ProcessorMixin) -> None:
    """Let answers end with the token that ends them in training, which a base that is no chat model does not name."""
    end, named = family_of(model).end_token, model.generation_config.eos_token_id
    ids = {processor.tokenizer.convert_tokens_to_ids(end), *([named] if isinstance(named, int) else named or [])}
    model.generation_config.eos_token_id = sorted(ids)


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
        attach_adapter(model, adapter, name=f"adapter-{number}")
    return model, names


def _base_settings(adapter: str, *, base: str | None, quantization: str, dtype: str | None) -> dict:
    settings = loading_settings(adapter, base=base, quantization=quantization, dtype=dtype)
    return {"base": base or read_adapter_config(adapter).base_model_name_or_path, **settings}


def loading_settings(adapter: str | None, *, base: str | None, quantization: str, dtype: str | None) -> dict:
    """Return the keywords of `load_model`: those that the adapter's run recorded, changed by the options.

    `stored_layers` is with them for a base that came in 4 bit: see `quantization.describe_stored`.
    """
    settings = read_run_facts(adapter) if adapter else {}
    settings.pop("thinking", None)  # in the processor's chat template
    if not settings and quantization == "auto":
        name = base or (base_of(adapter)[0] if adapter else None)
        if name and stored_quantization(load_config(name)):
            settings["quantization"] = STORED
        elif adapter:
            _print_once(f"{adapter} does not say how its base was loaded; using 16 bit (--quantization)")
    settings = {"quantization": None, "dtype": "bfloat16", **settings}
    if quantization != "auto":
        settings["quantization"] = None if quantization == "none" else quantization
    if dtype:
        settings["dtype"] = dtype
    if base:
        settings["revision"] = None
        settings.pop("stored_layers", None)
    return settings


def read_adapter_config(adapter: str) -> PeftConfig:
    """Return an adapter's configuration.

    Raises:
        ValueError: there is no adapter, its configuration is damaged, or its weights are not in safetensors, a format
            that can hold no code.
    """
    check_config_file(adapter)
    try:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            config = PeftConfig.from_pretrained(adapter)
    except ADAPTER_CONFIG_ERRORS as error:
        raise ValueError(_does_not_work(adapter, error)) from error
    except (OSError, ValueError) as error:
        if Path(adapter, CONFIG_NAME).is_file():
            raise ValueError(_does_not_work(adapter, error)) from error
        complete = Path(adapter, "config.json").is_file()
        hint = "; it is a complete model: --model of eval_sft.py, --base of predict.py" if complete else ""
        where = f"the folder has no {CONFIG_NAME}" if Path(adapter).is_dir() else "neither a folder nor on the Hub"
        raise ValueError(f"--adapter: no adapter in {adapter!r}, {where}{hint}") from error
    for warning in found:  # of entries that this PEFT does not know
        _print_once(f"warning: the {CONFIG_NAME} of {adapter}: {str(warning.message).partition('. ')[0]}")
    if path := find_file(adapter, ADAPTER_WEIGHTS):
        _check_complete(adapter, path)
        return config
    if os.path.lexists(weights := Path(adapter, ADAPTER_WEIGHTS)):
        raise ValueError(f"--adapter: {weights} is no file{suggest_file(weights)}")
    raise ValueError(f"--adapter: {adapter} has no {ADAPTER_WEIGHTS}; weights of another format are not loaded")


def _check_complete(adapter: str, path: Path) -> None:
    """Raise ValueError for a file of weights that is cut off; only its header is read, before the base is loaded."""
    try:
        with safe_open(path, "pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise ValueError(_unreadable(adapter, error)) from error


@cache
def _print_once(line: str) -> None:
    """Print a line about an adapter, whose configuration is read several times, to stderr."""
    print(line, file=sys.stderr, flush=True)


def base_of(adapter: str) -> tuple[str, str | None]:
    """Return the base model that an adapter was trained on, and its revision.

    Raises:
        ValueError: see `read_adapter_config`; or the base is a folder of the training that is not here.
    """
    name = read_adapter_config(adapter).base_model_name_or_path
    if is_path(name) and not Path(name).is_dir():
        where = "" if Path(name).is_absolute() else f" in {Path.cwd()}"
        raise ValueError(f"--adapter: {adapter} was trained on the base {name!r}, and there is no such folder{where}; "
                         "name it by --base")  # fmt: skip
    return name, read_run_facts(adapter).get("revision")


def check_config_file(adapter: str) -> None:
    """Raise ValueError for a configuration that is there and cannot be one of an adapter; PEFT calls it missing."""
    path = Path(adapter, CONFIG_NAME)
    if (config := read_json(path)) is None:
        return
    for key in ("peft_type", "base_model_name_or_path"):
        if not isinstance(config.get(key), str):
            raise ValueError(f"{path}: {key!r}: expected a text, found {config.get(key)!r:.60}")
    for key in ("use_rslora", "use_dora"):
        if not isinstance(found := config.get(key), bool | None):  # PEFT takes any text for true
            raise ValueError(f"{path}: {key!r}: expected true or false, found {found!r:.60}")
    _check_scales(path, config)


def _check_scales(path: Path, config: dict) -> None:
    """Raise ValueError for a scale that switches the adapter off, reverses it or makes its answers meaningless."""
    patterns = config.get("alpha_pattern")
    scales = {"lora_alpha": config.get("lora_alpha"), **(patterns if isinstance(patterns, dict) else {})}
    for key, found in scales.items():
        if isinstance(found, int | float) and not 0 < found <= LARGEST:
            rule = f"expected a number above 0 and at most {LARGEST:,.0f}"
            raise ValueError(f"{path}: {key!r}: {rule}, found {found!r:.60}")


def is_adapter(name: str) -> bool:
    """Whether a folder has an adapter's configuration."""
    return Path(name, CONFIG_NAME).is_file()


def read_run_facts(adapter: str) -> dict:
    """Return what `train_sft.py` recorded: the keywords of `load_model`, and `thinking`; nothing from elsewhere."""
    path = find_file(adapter, LOADING_SETTINGS, f"../{LOADING_SETTINGS}")  # a checkpoint's are in the run's folder
    facts = read_json(path) if path else {}
    rules = {
        "quantization": (None, "nf4", STORED),
        "dtype": ("bfloat16", "float16", "float32"),
        "double_quant": (True, False),
        "attn_implementation": (None, *IMPLEMENTATIONS),
        "revision": str | None,
        "thinking": CHOICES,
        "stored_layers": dict,
    }
    for name, value in facts.items():
        if name not in rules:
            raise ValueError(f"{path}: unknown entry {name!r:.60}")
        rule = rules[name]
        if not (value in rule if isinstance(rule, tuple) else isinstance(value, rule)):
            names = {dict: "an object", str | None: "a text"}
            raise ValueError(f"{path}: {name!r}: expected {names.get(rule, rule)}, found {value!r:.60}")
    return facts


def find_file(adapter: str, *names: str) -> Path | None:
    """Return the first of these files that an adapter's folder has, or the first name from a Hub repository."""
    if Path(adapter).is_dir():
        return next((path for name in names if (path := Path(adapter) / name).is_file()), None)
    with suppress(OSError, ValueError):  # no such file, or no network: the caller reports what that means
        return Path(hf_hub_download(adapter, names[0]))
    return None
