"""Loading processor and base model: which weights, in which precision, and the checks that it is really so."""

from pathlib import Path

import torch
from accelerate import PartialState
from bitsandbytes.nn import Linear4bit
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    BaseImageProcessor,
    BitsAndBytesConfig,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from models.attention import VARLEN, use_varlen
from models.families import FAMILY, KEPT_IN_16_BIT, LANGUAGE_LAYERS, PROCESSORS


def load_processor(
    model_name_or_path: str,
    *,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
) -> ProcessorMixin:
    """Load the processor and set the pixel limits that collating, saving and inference will all use.

    Args:
        model_name_or_path: Hub id or local folder of a model or an adapter.
        min_pixels: smallest image area after resizing, px^2; the model's own when None.
        max_pixels: largest image area after resizing, px^2; the model's own when None.
        revision: Hub branch, tag or commit.
        local_files_only: do not ask the Hub for what is not here yet.

    Raises:
        ValueError: no processor there or another family's, or the limits contradict each other or are too small.
    """
    try:
        processor = AutoProcessor.from_pretrained(
            model_name_or_path, revision=revision, local_files_only=local_files_only
        )
    except (OSError, ValueError) as error:
        raise ValueError(_not_found("processor", model_name_or_path, error)) from error
    if not isinstance(processor, PROCESSORS):
        raise ValueError(_of_another_family(model_name_or_path, f"its processor is a {type(processor).__name__}"))
    _check_limits(processor.image_processor, min_pixels=min_pixels, max_pixels=max_pixels)
    size = processor.image_processor.size
    shortest, longest = min_pixels or size["shortest_edge"], max_pixels or size["longest_edge"]
    if shortest > longest:
        raise ValueError(f"min_pixels {shortest} is above max_pixels {longest}")
    processor.image_processor.size = {"shortest_edge": shortest, "longest_edge": longest}
    processor.tokenizer.padding_side = "right"
    return processor


def _not_found(what: str, name: str, error: Exception) -> str:
    first_line = str(error).strip().splitlines()[0]
    return f"no {what} in {name!r}, neither a folder nor on the Hub: {first_line}"


def _of_another_family(name: str, found: str) -> str:
    return f"{name!r}: expected a model of {', '.join(FAMILY.values())}; {found}"


def _check_limits(sizing: BaseImageProcessor, **limits: int | None) -> None:
    """Raise ValueError for a limit under the area of one token, which would be ignored, or leave no token."""
    least = (sizing.patch_size * sizing.merge_size) ** 2
    for name, limit in limits.items():
        if limit is not None and limit < least:
            raise ValueError(f"{name}: expected at least {least}, the area of one token, found {limit}")


def check_family(model_name_or_path: str, *, revision: str | None = None) -> None:
    """Read the model's configuration, and no weights, and see that its class is one that this code knows.

    Args:
        model_name_or_path: Hub id or local folder.
        revision: Hub branch, tag or commit.

    Raises:
        ValueError: no model there, an adapter, or a model of another family.
    """
    if (Path(model_name_or_path) / "adapter_config.json").is_file():
        raise ValueError(f"{model_name_or_path!r} is an adapter; name its base model")
    try:
        config = AutoConfig.from_pretrained(model_name_or_path, revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(_not_found("model", model_name_or_path, error)) from error
    if type(config) not in FAMILY:
        raise ValueError(_of_another_family(model_name_or_path, f"its model_type is {config.model_type}"))


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
) -> PreTrainedModel:
    """Load the base model on this process's device.

    Args:
        model_name_or_path: Hub id or local folder.
        quantization: "nf4" stores the language model's linear layers in 4 bit; None keeps them in `dtype`.
        dtype: of everything else, and of the arithmetic. A CPU always computes in float32.
        double_quant: quantise NF4's own scales too, which saves 0.4 bit a weight.
        attn_implementation: "varlen" (see `attention.use_varlen`), or as in `from_pretrained`.
        revision: Hub branch, tag or commit.
        keep_dtype: take `dtype` on a CPU too: for weights that will be saved.
        quant_storage: dtype that NF4's bits are kept in, "uint8" or `dtype`: FSDP2 shards what is of a float dtype.

    Raises:
        ValueError: no model there or another family's, an unknown quantization, or layers came out in another
            precision than asked.
    """
    if quantization not in ("nf4", None):
        raise ValueError(f"quantization: expected 'nf4' or None, found {quantization!r}")
    check_family(model_name_or_path, revision=revision)
    device = PartialState().device
    dtype = dtype if keep_dtype else resolve_dtype(dtype, device)
    storage = torch.uint8 if quant_storage == "uint8" else dtype
    config = quantization_config(dtype, double_quant=double_quant, storage=storage) if quantization else None
    try:
        model = AutoModelForImageTextToText.from_pretrained(
            model_name_or_path, revision=revision, dtype=dtype, quantization_config=config,
            attn_implementation=None if attn_implementation == VARLEN else attn_implementation,
            device_map={"": device}, use_safetensors=True,
        )  # fmt: skip
    except (OSError, ValueError) as error:
        raise ValueError(_not_found("model", model_name_or_path, error)) from error
    except ImportError as error:
        raise ValueError(f"attn_implementation: {' '.join(str(error).split())}") from error
    check_quantized(model, quantized=quantization is not None)
    if attn_implementation == VARLEN:
        use_varlen(model)
    if device.type == "cpu":
        _keep_trainable_on_cpu(model)
    return model


def resolve_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype to compute in: float32 on a CPU, else as asked ("auto": bfloat16, as the family is stored).

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


def quantization_config(
    dtype: torch.dtype, *, double_quant: bool = True, storage: torch.dtype = torch.uint8
) -> BitsAndBytesConfig:
    """Return NF4 for the language model's linear layers; vision tower, merger and LM head stay in `dtype`."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=storage,
        llm_int8_skip_modules=KEPT_IN_16_BIT,
    )


def linear_names(model: torch.nn.Module, prefix: str | tuple[str, ...] = "") -> list[str]:
    """Return the paths of the model's linear layers that start with `prefix` (or one of several), in their order."""
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    return [name for name in linear if name.startswith(prefix)]


def check_quantized(model: PreTrainedModel, *, quantized: bool) -> None:
    """Raise ValueError unless exactly the language model's linear layers are in 4 bit (or none, as asked)."""
    linear = linear_names(model)
    found = {name for name in linear if isinstance(model.get_submodule(name), Linear4bit)}
    expected = set(linear_names(model, LANGUAGE_LAYERS)) if quantized else set()
    if quantized and not expected:
        raise ValueError(f"{type(model).__name__} has no linear layers under {LANGUAGE_LAYERS}*")
    if wrong := sorted(found ^ expected):
        raise ValueError(f"{len(wrong)} layers are not in the precision asked for, the first is {wrong[0]}")


def _keep_trainable_on_cpu(model: PreTrainedModel) -> None:
    """Without this, evaluating between training steps repacks the weights in place and the next backward crashes."""
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def compile_layers(model: torch.nn.Module) -> None:
    """Let torch.compile fuse the arithmetic within the parts of each layer of tower and language model, in place.

    One layer's code serves all others, and packs of every length. The first steps take minutes longer. The
    layers themselves are left alone: they recompute their parts, which torch 2.11 cannot compile as one.

    Raises:
        ValueError: there is no working compiler.
    """
    try:
        torch.compile(torch.sin)(torch.ones(1, device=PartialState().device))
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"compile_layers: this machine cannot; install gcc, or set it to false ({reason})") from error
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            for part in layer.children():
                part.compile(dynamic=True)
