"""Whether a training step fits the GPU's memory without recomputing activations."""

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from transformers import PreTrainedConfig

from models.attention import with_unread_mask
from models.lora import detach_vision_inputs
from training.packing import pack_lengths
from training.settings import Settings

SPARE = 0.1  # share of the memory that stays free: batches differ, and memory fragments
FLOAT32 = 4  # bytes of the copy that training keeps of each trained weight
# In the RuntimeErrors that torch raises where it has no OutOfMemoryError: the computer's own memory, CUDA's libraries.
NO_MEMORY = ("DefaultCPUAllocator", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
CANDIDATES = 4096  # longest samples, among which the fullest pack is searched


def largest_batch(lengths: Sequence[int], *, batch_size: int, pack_tokens: int | None) -> list[int]:
    """Return the positions of the samples that make the largest batch (or about the fullest pack), in tokens."""
    longest = sorted(range(len(lengths)), key=lambda n: -lengths[n])
    if pack_tokens is None:
        return longest[:batch_size]
    tokens = [lengths[n] for n in longest[:CANDIDATES]]
    fullest = max(pack_lengths(tokens, pack_tokens), key=lambda pack: sum(tokens[n] for n in pack))
    return [longest[n] for n in fullest]


def fits(model: torch.nn.Module, batch: dict, *, dtype: torch.dtype | None, optim: str) -> tuple[bool, str]:
    """Try a forward and a backward pass, see `recomputing`.

    Args:
        model: on one GPU, with LoRA; its weights and gradients stay as they are.
        batch: what the collator returns.
        dtype: of autocast; None without it.
        optim: the optimizer that will train it, by its name in a recipe.

    Returns:
        Whether it leaves enough memory for a training step, and a phrase that says how much it used.
    """
    used, free = try_step(model, batch, dtype=dtype, optim=optim)
    of_free = f"of {free / 1e9:.1f} GB free"
    if used is None:
        return False, f"the largest batch needs more than all {of_free}"
    return used < (1 - SPARE) * free, f"the largest batch needs {used / 1e9:.1f} {of_free}"


@contextmanager
def recomputing(model: torch.nn.Module, recompute: bool | str) -> Iterator[None]:
    """Store as much in the passes within the context as the trainer will with this recomputation."""
    hook = detach_vision_inputs(model)
    if recompute is True:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    try:
        yield
    finally:
        hook.remove()
        if recompute is True:
            model.gradient_checkpointing_disable()
            model.disable_input_require_grads()


def try_step(model: torch.nn.Module, batch: dict, *, dtype: torch.dtype | None, optim: str) -> tuple[int | None, int]:
    """Return the bytes that a training step of this batch takes, None for too many, and those that are free before.

    The arguments are those of `fits`.
    """
    device = next(model.parameters()).device
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    clear_gradients(model)
    before, (free, _) = torch.cuda.memory_reserved(device), torch.cuda.mem_get_info(device)
    torch.cuda.reset_peak_memory_stats(device)
    try:
        forward_and_backward(model, batch, dtype)
        used = torch.cuda.max_memory_reserved(device) - before + trained * (FLOAT32 + optimizer_bytes(optim))
    except torch.cuda.OutOfMemoryError:
        used = None
    finally:
        clear_gradients(model)
    return used, free


def forward_and_backward(model: torch.nn.Module, batch: dict, dtype: torch.dtype | None) -> None:
    """Run all layers forward and backward. The LM head sees one token: TRL's loss never holds many logits."""
    device, was_training = next(model.parameters()).device, model.training
    inputs = {name: x.to(device) if torch.is_tensor(x) else x for name, x in batch.items() if name != "labels"}
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        model.train()
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            logits = model(**with_unread_mask(model, inputs), use_cache=False, logits_to_keep=1).logits
        logits.float().sum().backward()
    model.train(was_training)


def optimizer_bytes(optim: str) -> float:
    """Return the bytes that an optimizer keeps for a weight: Adam's two averages, unless its name says otherwise."""
    if "adafactor" in optim:
        return 0  # a row and a column for each matrix
    averages = 0 if optim in ("sgd", "adagrad") else 1 if "lion" in optim else 2
    return averages * (1 + 4 / 256 if "8bit" in optim else 4)  # 8-bit averages have a scale for each block of 256


def clear_gradients(model: torch.nn.Module) -> None:
    model.zero_grad(set_to_none=True)
    gc.collect()
    torch.cuda.empty_cache()


@contextmanager
def out_of_memory_advice(
    settings: Settings, config: PreTrainedConfig, *, recompute: bool = False, loading: bool = False
) -> Iterator[None]:
    """Turn running out of memory into a ValueError that names the settings to lower.

    Args:
        settings: of the run.
        config: of the base model.
        recompute: whether activations are recomputed.
        loading: whether the model is being loaded, and not trained.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).strip().split("\n")
        options = "; ".join(_lower_memory(settings, config, recompute=recompute, loading=loading))
        when = "loading the model" if loading else "training"
        raise ValueError(f"out of memory while {when} ({reason[0].strip()}): {options}") from error


def is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(text in str(error) for text in NO_MEMORY)


def _lower_memory(settings: Settings, config: PreTrainedConfig, *, recompute: bool, loading: bool) -> list[str]:
    """Return what can be changed, what costs least first."""
    options, rows = [], settings.training.per_device_train_batch_size
    if not loading:
        if not (settings.training.offload_embedding or config.tie_word_embeddings):
            options.append("set offload_embedding: true")
        if not recompute:
            options.append("set gradient_checkpointing: true")
        if settings.pack_tokens is not None:
            options.append(f"lower pack_tokens (now {settings.pack_tokens}), not below the longest sample")
        elif rows > 1:
            rule = "and raise gradient_accumulation_steps as much"
            options.append(f"lower per_device_train_batch_size (now {rows}) {rule}")
        if settings.evaluates and settings.training.per_device_eval_batch_size > 1:
            options.append(f"lower per_device_eval_batch_size (now {settings.training.per_device_eval_batch_size})")
        options.append(f"lower max_pixels (now {settings.data.max_pixels or 'the default of the model'})")
    if not settings.model.load_in_4bit:
        options.append("set load_in_4bit: true")
    return [*options, "take a smaller model; plan_run.py says what fits"]
