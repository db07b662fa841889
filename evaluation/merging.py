"""Merging a LoRA adapter into its base model."""

from peft import load_peft_weights
from transformers import PreTrainedModel, ProcessorMixin

from evaluation.merge_checks import Expected, hash_weights, logit_distance, sample_logits
from models.adapters import attach_adapter, base_of, check_values, read_adapter_config
from models.experts import WEIGHTS
from models.loading import load_config
from models.quantization import stored_quantization


def choose_base(adapter: str, base: str | None) -> tuple[str, str | None]:
    """Return the base model and its revision: those of the adapter's training, or `base` and None."""
    config = read_adapter_config(adapter)
    if config.peft_type != "LORA":
        raise ValueError(f"--adapter: {adapter}: expected a LoRA adapter, found {config.peft_type.value}")
    if base:
        return base, None
    return base_of(adapter)


def check_16_bit(base: str, revision: str | None) -> None:
    """Raise ValueError for a base that comes in 4 bit: an adapter cannot be added to such weights without a loss."""
    if stored_quantization(load_config(base, revision=revision)):
        rule = "a merge adds the adapter to 16-bit weights: name the 16-bit base by --base"
        raise ValueError(f"{base} comes in 4 bit, and {rule}")


def read_target_weights(adapter: str) -> set[str]:
    """Return the names of the base model's weights that the adapter changes.

    They are read from the file and not from PEFT's model, because PEFT ignores tensors that do not fit the
    configuration.

    Raises:
        ValueError: see `read_adapter_config` and `check_values`; or they were never trained.
    """
    experts = read_adapter_config(adapter).target_parameters or ()
    tensors = load_peft_weights(adapter, device="cpu")
    check_values(tensors, adapter)
    if not any(tensor.any() for name, tensor in tensors.items() if ".lora_B." in name):
        raise ValueError(f"--adapter: {adapter}: every lora_B is zero; this adapter was never trained")
    return {_target_weight(name, {path.rpartition(".")[0] for path in experts}) for name in tensors}


def _target_weight(tensor: str, experts: set[str]) -> str:
    """Return the base model's weight that a tensor of the adapter is added to, or that it replaces.

    Args:
        tensor: its name in the file.
        experts: ends of the paths of modules whose own parameters PEFT adapts, each by a layer around the last one.
    """
    module, lora, kind = tensor.removeprefix("base_model.model.").partition(".lora_")
    if not lora:
        return module
    path = module.replace(".base_layer", "")
    if any(path.endswith(f".{end}") for end in experts):
        return f"{path}.{WEIGHTS[-1 - module.count('.base_layer')]}"
    return f"{module}.bias" if kind == "B.bias" else f"{module}.weight"


def merge(model: PreTrainedModel, adapter: str, processor: ProcessorMixin) -> Expected:
    """Merge the adapter into `model` in place, and return what the merged model must match."""
    hashes = hash_weights(model)
    adapted = attach_adapter(model, adapter).eval()
    logits = sample_logits(adapted, processor)
    with adapted.disable_adapter():
        effect = logit_distance(logits, sample_logits(adapted, processor))
    adapted.merge_and_unload()
    return Expected(hashes, logits, effect)
