"""Loading the processor and the base model, and checking that layers have the requested precision."""

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.cli import announce

import torch
from accelerate import PartialState
from accelerate.utils.memory import should_reduce_batch_size
from bitsandbytes.functional import QuantState
from bitsandbytes.nn import Linear4bit
from huggingface_hub.errors import StrictDataclassError
from jinja2 import TemplateError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    BaseImageProcessor,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.utils import logging

from models.attention import VARLEN, check_attention, use_varlen
from models.compat import attention_names, keep_trainable_on_cpu
from models.experts import WEIGHTS, expert_layers, nf4_name, use_frozen_experts, with_experts
from models.families import FAMILIES, NAMES, Family, families_of, family_of
from models.host_embedding import move_embedding_to_host
from models.quantization import (
    STORED,
    check_stored,
    resolve_quantization,
    stored_quantization,
    stored_readings,
    use_stored_precision,
)
from models.sharding import ShardedLinear4bit, shard_model
from models.thinking import set_thinking
from models.tower import multiply_patches, speed_up_frozen_tower

# What transformers raises, besides ValueError, for values of a kind that an entry of a configuration cannot have.
CONFIG_ERRORS = (ArithmeticError, AttributeError, LookupError, TypeError, StrictDataclassError)
PROCESSOR_CONFIGS = ("processor_config.json", "preprocessor_config.json")  # the second is of older versions


def load_processor(
    model_name_or_path: str,
    *,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    thinking: str | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
) -> ProcessorMixin:
    """Load the processor and set the pixel limits and prompts that collating, saving and inference will all use.

    Args:
        model_name_or_path: Hub id or local folder of a model or an adapter.
        min_pixels: smallest image area after resizing, px^2; the model's default when None.
        max_pixels: largest image area after resizing, px^2; the model's default when None.
        thinking: "on" or "off", for models that can think; None for what an adapter was trained with, else "off".
        revision: Hub branch, tag or commit.
        local_files_only: download nothing.

    Raises:
        ValueError: no processor there or one of an unknown family, the limits are too small or contradictory, or see
            `set_thinking`.
    """
    try:
        processor = AutoProcessor.from_pretrained(
            model_name_or_path, revision=revision, local_files_only=local_files_only, trust_remote_code=False
        )
    except CONFIG_ERRORS as error:
        raise ValueError(_does_not_work("processor", model_name_or_path, error)) from error
    except (OSError, ValueError) as error:
        raise ValueError(_not_found("processor", model_name_or_path, error)) from error
    if not families_of(processor):
        raise ValueError(_unknown_family(model_name_or_path, f"its processor is a {type(processor).__name__}"))
    _check_processor(model_name_or_path, processor)
    _set_limits(processor.image_processor, min_pixels=min_pixels, max_pixels=max_pixels)
    set_thinking(processor, thinking)
    processor.tokenizer.padding_side = "right"
    return processor


def is_path(name: str) -> bool:
    """Whether a model's name can only be a folder's: a Hub id is "name" or "owner/name"."""
    return re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name) is None


def _not_found(what: str, name: str, error: Exception) -> str:
    first_line = str(error).strip().split("\n")[0].partition(". If you were trying to load it from")[0]
    if Path(name).is_dir():
        if what == "processor" and not any(Path(name, file).is_file() for file in PROCESSOR_CONFIGS):
            return f"no processor in {name!r}: the folder has no {PROCESSOR_CONFIGS[0]}"
        return f"no {what} in {name!r} that can be loaded: {first_line}"
    if is_path(name):
        return f"no {what} in {name!r}: no such folder"
    return f"no {what} in {name!r}, neither a folder nor on the Hub: {first_line}"


def _does_not_work(what: str, name: str, error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"the configuration of the {what} in {name!r} does not work: {type(error).__name__}: {text:.300}"


def _check_processor(name: str, processor: ProcessorMixin) -> None:
    """Raise ValueError for what a processor lacks, and sizes and a chat template that would fail at each sample."""
    if not processor.chat_template:
        raise ValueError(f"processor of {name!r}: no chat template; chat_template.jinja holds it")
    if not processor.tokenizer.encode("What is shown?", add_special_tokens=False):
        raise ValueError(f"processor of {name!r}: the tokenizer knows no words; tokenizer.json holds them")
    if processor.tokenizer.pad_token is None:
        raise ValueError(f"processor of {name!r}: the tokenizer has no pad_token; tokenizer_config.json names it")
    for key in ("patch_size", "merge_size", "temporal_patch_size"):
        if type(size := getattr(processor.image_processor, key, None)) is not int or size < 1:
            raise ValueError(f"processor of {name!r}: {key}: expected a whole number above 0, found {size!r}")
    try:
        processor.apply_chat_template([{"role": "user", "content": "?"}])
    except (TemplateError, *CONFIG_ERRORS) as error:
        raise ValueError(f"processor of {name!r}: the chat template does not work: {error}") from error


def _unknown_family(name: str, reason: str) -> str:
    return f"{name!r}: expected a model of {NAMES}; {reason}"


def _set_limits(sizing: BaseImageProcessor, *, min_pixels: int | None, max_pixels: int | None) -> None:
    """Set the pixel limits. One under the area of a token would be ignored, or leave no token, and so raises."""
    least = (sizing.patch_size * sizing.merge_size) ** 2
    for name, limit in {"min_pixels": min_pixels, "max_pixels": max_pixels}.items():
        if limit is not None and limit < least:
            raise ValueError(f"{name}: expected at least {least}, the area of one token, found {limit}")
    shortest, longest = min_pixels or sizing.size["shortest_edge"], max_pixels or sizing.size["longest_edge"]
    if shortest > longest:
        raise ValueError(f"min_pixels {shortest} is above max_pixels {longest}")
    sizing.size = {"shortest_edge": shortest, "longest_edge": longest}


def load_config(
    model_name_or_path: str, *, revision: str | None = None, local_files_only: bool = False
) -> PreTrainedConfig:
    """Load the configuration of a base model; the arguments are those of `load_processor`.

    Raises:
        ValueError: no model there, an adapter, a model of an unknown family, or one that comes quantised in a way
            that is not trained here.
    """
    if (Path(model_name_or_path) / "adapter_config.json").is_file():
        raise ValueError(f"{model_name_or_path!r} is an adapter; name its base model")
    options = {"revision": revision, "local_files_only": local_files_only, "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(model_name_or_path, **options)
    except CONFIG_ERRORS as error:
        raise ValueError(_does_not_work("model", model_name_or_path, error)) from error
    except (OSError, ValueError) as error:
        raise ValueError(_not_found("model", model_name_or_path, error)) from error
    if config.model_type not in FAMILIES:
        raise ValueError(_unknown_family(model_name_or_path, f"its model_type is {config.model_type}"))
    for attention in attention_names(config):
        check_attention(attention, f"the config.json of {model_name_or_path}: ")
    check_stored(model_name_or_path, config)
    return config


def load_model(
    model_name_or_path: str,
    *,
    quantization: str | None,
    dtype: str | torch.dtype,
    double_quant: bool = True,
    attn_implementation: str | None = None,
    revision: str | None = None,
    keep_dtype: bool = False,
    quant_storage: str = "uint8",
    shard: bool = False,
    frozen_tower: bool = False,
    offload_embedding: bool = False,
) -> PreTrainedModel:
    """Load the base model on this process's device, or this process's part of it.

    Args:
        model_name_or_path: Hub id or local folder.
        quantization: "nf4" stores the language model's linear layers and experts in 4 bit; None keeps them in `dtype`;
            a base that comes in 4 bit is used as it is, with "nf4" or "stored".
        dtype: of all other weights, and of the arithmetic. A CPU always computes in float32.
        double_quant: quantise NF4's scales too, which saves 0.4 bit a weight; of no effect where they are stored.
        attn_implementation: "varlen" (see `attention.use_varlen`), or as in `from_pretrained`.
        revision: Hub branch, tag or commit.
        keep_dtype: use `dtype` on a CPU too: for weights that will be saved.
        quant_storage: dtype that holds NF4's bits, "uint8" or `dtype`.
        shard: spread the frozen weights over all processes, see `shard_model`.
        frozen_tower: the tower will not train; its modules are made faster before they are sharded.
        offload_embedding: keep the input embedding in the host's memory; the LM head must have weights of its own.

    Raises:
        ValueError: no model there or one of an unknown family, an unknown quantization, or a layer has another
            precision than requested, or than its config.json says.
    """
    name, device = model_name_or_path, PartialState().device
    config = load_config(name, revision=revision)
    _announce_loading(name)
    quantization = resolve_quantization(name, config, quantization)
    dtype = dtype if keep_dtype else resolve_dtype(dtype, device)
    nf4 = _nf4_of(config, dtype, double_quant=double_quant, storage=quant_storage) if quantization == "nf4" else None
    options = {"revision": revision, "dtype": dtype, "device_map": {"": "cpu" if shard else device}}
    options |= {} if nf4 is None or shard else {"quantization_config": nf4}
    options |= {} if attn_implementation == VARLEN else {"attn_implementation": attn_implementation}
    model = _load_stored(name, config, options) if quantization == STORED else _load_weights(name, options)
    if offload_embedding:
        move_embedding_to_host(model)
    _place(model, device, nf4, shard=shard, frozen_tower=frozen_tower)
    check_quantized(model, quantization)
    _choose_implementations(model, varlen=attn_implementation == VARLEN)
    return model


def _announce_loading(name: str) -> None:
    download = "" if Path(name).is_dir() else ", longer if it is downloaded"
    announce(f"loading {name}", f"seconds to minutes by its size{download}")


def _choose_implementations(model: PreTrainedModel, *, varlen: bool) -> None:
    """Let the model compute as training needs it."""
    use_frozen_experts(model)
    if varlen:
        use_varlen(model)
    if model.device.type == "cpu":
        keep_trainable_on_cpu(model)


def _place(
    model: PreTrainedModel, device: torch.device, nf4: BitsAndBytesConfig | None, *, shard: bool, frozen_tower: bool
) -> None:
    """Make the tower faster, and shard a model that is on the CPU; the arguments are those of `load_model`."""
    multiply_patches(model)
    if not shard:
        return
    if frozen_tower:
        model.requires_grad_(False)
        speed_up_frozen_tower(model)
    shard_model(model, device, nf4)
    if nf4 is not None:
        model.is_loaded_in_4bit = True  # as from_pretrained leaves it, for PEFT and TRL
    if hasattr(model, "hf_device_map"):
        model.hf_device_map = {"": device}


def _nf4_of(config: PreTrainedConfig, dtype: torch.dtype, *, double_quant: bool, storage: str) -> BitsAndBytesConfig:
    """Return NF4 for a model's language layers, experts among them; the arguments are those of `load_model`."""
    family, storage = family_of(config), torch.uint8 if storage == "uint8" else dtype
    settings = nf4_config(family, dtype, double_quant=double_quant, storage=storage)
    return with_experts(settings) if family.experts else settings


def _load_stored(name: str, config: PreTrainedConfig, options: dict) -> PreTrainedModel:
    """Load a base that comes in 4 bit, in the precision of its file, to compute in the dtype of `options`."""
    stored = stored_quantization(config)
    compute = str(options["dtype"]).removeprefix("torch.")
    # transformers would take 16-bit weights for 4-bit ones where it misreads the list, without a word
    every_layer = {**stored, "llm_int8_skip_modules": [], "bnb_4bit_compute_dtype": compute}
    prepared = copy.deepcopy(config)
    prepared.quantization_config = every_layer
    model = _load_weights(name, {**options, "config": prepared})
    model.config.quantization_config = {**stored, "bnb_4bit_compute_dtype": compute}
    use_stored_precision(model, options["dtype"])
    return model


def check_readable(folder: Path) -> None:
    """Raise ValueError for a file of weights that cannot be opened; safetensors says that there is none."""
    for path in sorted(folder.glob("*.safetensors")):
        try:
            if not path.is_file():
                raise OSError(0, "it is no file")
            path.open("rb").close()
        except OSError as error:
            raise ValueError(f"model {str(folder)!r}: {path.name} cannot be read: {error.strerror}") from error


def _load_weights(name: str, options: dict) -> PreTrainedModel:
    check_readable(Path(name))
    check_attention(options.get("attn_implementation"))
    options = {**options, "use_safetensors": True, "ignore_mismatched_sizes": True, "output_loading_info": True}
    try:
        with _without_load_report():
            model, found = AutoModelForImageTextToText.from_pretrained(name, **options)
    except CONFIG_ERRORS as error:
        raise ValueError(_does_not_work("model", name, error)) from error
    except SafetensorError as error:
        raise ValueError(f"model {name!r}: unreadable weights: {error}") from error
    except (OSError, ValueError) as error:
        raise ValueError(_not_found("model", name, error)) from error
    except ImportError as error:
        raise ValueError(f"attn_implementation: {' '.join(str(error).split())}") from error
    _check_loaded(name, model, found)
    return model


@contextmanager
def _without_load_report() -> Iterator[None]:
    """Leave out transformers' table of the weights that do not fit, which has a line for each."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _check_loaded(name: str, model: PreTrainedModel, found: dict) -> None:
    """Raise ValueError unless the weights are those of the configuration: transformers makes up what is missing, and
    passes over what has no place, and over the shape of what it quantises.
    """
    reshaped = {key if isinstance(key, str) else key[0] for key in found["mismatched_keys"]}
    for path, layer in model.named_modules():
        state = getattr(layer.weight, "quant_state", None) if isinstance(layer, Linear4bit) else None
        if state is not None and tuple(state.shape) != (layer.out_features, layer.in_features):
            reshaped.add(f"{path}.weight")
    kinds = {
        "are missing": found["missing_keys"],
        "have no place in it": found["unexpected_keys"],
        "have another shape": reshaped,
    }
    if problems := [f"{len(keys)} {kind}, the first is {min(keys)}" for kind, keys in kinds.items() if keys]:
        raise ValueError(f"model {name!r}: its weights do not fit its config.json: {'; '.join(problems)}")


@contextmanager
def readable_out_of_memory(advice: str) -> Iterator[None]:
    """Turn "out of memory", of a GPU or the CPU, into a ValueError with the `advice`."""
    try:
        yield
    except RuntimeError as error:
        if not should_reduce_batch_size(error):
            raise
        raise ValueError(f"out of memory: {advice}") from error


def resolve_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype to compute in: float32 on a CPU, else the requested one ("auto": bfloat16, as published).

    Raises:
        ValueError: the GPU has no bfloat16.
    """
    dtype = "bfloat16" if dtype == "auto" else dtype
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    if device.type == "cpu":
        return torch.float32
    if dtype == torch.bfloat16 and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ValueError("dtype: this GPU has no bfloat16; set dtype: float16, bf16: false, fp16: true")
    return dtype


def nf4_config(
    family: Family, dtype: torch.dtype, *, double_quant: bool = True, storage: torch.dtype = torch.uint8
) -> BitsAndBytesConfig:
    """Return NF4 for the language model's linear layers; vision tower, merger and LM head stay in `dtype`."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=storage,
        llm_int8_skip_modules=list(family.unquantized),
    )


def linear_names(model: torch.nn.Module, prefix: str | tuple[str, ...] = "") -> list[str]:
    """Return the paths of the model's linear layers that start with `prefix` (or one of several), in their order."""
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    return [name for name in linear if name.startswith(prefix)]


def check_quantized(model: PreTrainedModel, quantization: str | None) -> None:
    """Raise ValueError unless exactly the layers that should be in 4 bit are, experts among them.

    Args:
        model: with its quantised layers, or on the meta device.
        quantization: "nf4": the language model's linear layers and experts; "stored": those that config.json says,
            and no experts; None: none.
    """
    layers = {name: model.get_submodule(name) for name in linear_names(model)}
    in_4_bit = {name for name, layer in layers.items() if isinstance(layer, Linear4bit)}
    prefix, readings = family_of(model).language_layers, [set()]
    if quantization and not linear_names(model, prefix):
        raise ValueError(f"{type(model).__name__} has no linear layers under {prefix}*")
    if quantization:
        readings = stored_readings(model) if quantization == STORED else [set(linear_names(model, prefix))]
    for name in in_4_bit:
        if layers[name].weight.device.type != "meta" and _state_of(layers[name]) is None:
            raise ValueError(f"{name} has no weights in 4 bit in the files of the model")
    for path, layer in expert_layers(model).items():
        for name in WEIGHTS:
            if hasattr(layer, nf4_name(name)) != (quantization == "nf4"):
                raise ValueError(f"{path}.{name} does not have the requested precision")
    if in_4_bit in readings:
        return
    wrong = sorted(in_4_bit ^ readings[0])
    rule = "the precision that config.json says" if quantization == STORED else "the requested precision"
    raise ValueError(f"{len(wrong)} layers do not have {rule}, the first is {wrong[0]}")


def _state_of(layer: Linear4bit) -> QuantState | None:
    """Return bitsandbytes' description of a 4-bit weight; a sharded weight has none of its own."""
    return layer.quant_state if isinstance(layer, ShardedLinear4bit) else layer.weight.quant_state
