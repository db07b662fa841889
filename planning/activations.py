"""Memory of the activations of a training step, measured by running it on tensors without content."""

import math
import weakref
from dataclasses import dataclass, replace
from functools import partial

import torch
from peft import PeftModel
from transformers import PreTrainedConfig

from models.attention import run_kernel, varlen_attention
from models.compat import set_attention
from models.experts import experts_forward, use_frozen_experts
from models.families import family_of
from models.lora import detach_vision_inputs
from planning.compat import FakeTensorMode, TorchDispatchMode, storage_key, tree_leaves
from planning.linear_attention import TracedLinearAttention
from planning.shapes import add_lora, build_without_weights, with_layers

_BY_INDEX = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default, torch.ops.aten.index_put.default)
TRACED = "traced_flash"  # "flash": see `models.attention.REGISTERED`


@dataclass
class Activations:
    """Bytes of one forward and backward pass, without weights and their gradients.

    Attributes:
        tower: of the vision tower, when the language layers start.
        tower_peak: the peak before that.
        saved: between forward and backward, the tower's part included.
        peak: the peak of the step without the LM head.
    """

    tower: int
    tower_peak: int
    saved: int
    peak: int


def trace_model(config: PreTrainedConfig, lora: dict, *, dtype: torch.dtype, **step) -> Activations:
    """Trace a few language layers and extrapolate to all: later ones repeat them, and so does their memory.

    Args:
        config: of the model.
        lora: keywords of `build_lora_config`.
        dtype: that the layers compute in.
        step: the other arguments of `trace_step`.
    """
    layers, family = config.text_config.num_hidden_layers, family_of(config)
    period = family.layer_period
    few = period * (2 + math.ceil(family.special_layers / period))
    if layers <= few:
        return trace_step(add_lora(build_without_weights(config, dtype), lora), dtype=dtype, **step)
    short = [add_lora(build_without_weights(with_layers(config, n), dtype), lora) for n in (few - period, few)]
    less, more = (trace_step(model, dtype=dtype, **step) for model in short)
    rest = (layers - few) * (more.saved - less.saved) // period
    return replace(more, saved=more.saved + rest, peak=max(more.peak + rest, more.tower_peak))


def trace_step(
    model: PeftModel, *, tokens: int, image_tokens: int, checkpointing: bool, dtype: torch.dtype
) -> Activations:
    """Run the layers of tower and language model forward and backward and count the bytes of living tensors.

    Attention and dropout are the GPU's kernels, which save other tensors than the CPU's. LoRA is in `dtype`, as under
    autocast. NF4 layers count as linear ones: bitsandbytes saves no input either, its backward needs none.

    Args:
        model: on the meta device, with LoRA; it cannot be used afterwards.
        tokens: of the batch, images included.
        image_tokens: of the images.
        checkpointing: whether layers are recomputed in the backward pass.
        dtype: that the layers compute in.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        _prepare(model.to_empty(device="cpu"), dtype)
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()  # as SFTTrainer does
        detach_vision_inputs(model)
    base = model.get_base_model()
    batch = make_batch(base.config, tokens, image_tokens, mode)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    tower, live = [0, 0], LiveBytes([*model.parameters(), *model.buffers(), *gradients])

    def end_of_tower(*_) -> None:
        tower[:], live.peak = (live.bytes, live.peak), live.bytes

    base.get_submodule(family_of(base).vision.removesuffix(".")).register_forward_hook(end_of_tower)
    with live:
        hidden = base.model(**batch, use_cache=False).last_hidden_state
        saved = live.bytes
        hidden.backward(torch.empty_like(hidden))
    return Activations(*tower, saved=saved, peak=max(live.peak, tower[1]))


def _prepare(model: PeftModel, dtype: torch.dtype) -> None:
    """Use the GPU's kernels, and allocate gradients, as they are after the first of several batches."""
    set_attention(model.get_base_model(), TRACED, partial(varlen_attention, kernel=run_kernel))
    traced_experts = partial(experts_forward, product=TracedProduct.apply)
    use_frozen_experts(model.get_base_model(), name=TRACED, function=traced_experts)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
            parameter.grad = torch.zeros_like(parameter)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, torch.nn.Dropout) and child.p:
                parent.add_module(name, _Dropout(child.p))
            elif name == family_of(model).linear_attention:
                parent.add_module(name, TracedLinearAttention(child))


def make_batch(config, tokens: int, image_tokens: int, mode: FakeTensorMode) -> dict:
    """Return a pack of one image and its text. Integers have content, which the tower's windows depend on."""
    tower, ids = config.vision_config, torch.zeros(1, tokens, dtype=torch.long)
    merge = tower.spatial_merge_size
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "position_ids": torch.arange(tokens).expand(4, 1, -1),
        "text_cu_seqlens": torch.tensor([0, tokens], dtype=torch.int32),
        "text_max_seqlen": tokens,
    }
    if not image_tokens:
        return batch
    ids[0, :image_tokens] = config.image_token_id
    width = tower.in_channels * tower.temporal_patch_size * tower.patch_size**2
    with mode:
        batch["pixel_values"] = torch.empty(image_tokens * merge**2, width)
    return {**batch, "image_grid_thw": torch.tensor([[1, merge, merge * image_tokens]])}


class TracedProduct(torch.autograd.Function):
    """A grouped product that has only shapes, of any dtype; it saves what PyTorch's saves on a GPU."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        of_x, of_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if of_weight else None, weight if of_x else None)
        ctx.shapes = x.shape, weight.shape
        return x.new_empty(x.size(0), weight.size(-1))

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        needed = zip(ctx.shapes, ctx.needs_input_grad, strict=False)
        return *(gradient.new_empty(shape) if needs else None for shape, needs in needed), None


class _Dropout(torch.nn.Module):
    """Dropout by the GPU's kernel, which saves a byte for each value."""

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.native_dropout(x, self.p, True)[0]


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that operations create within the context, as long as they exist.

    Args:
        uncounted: tensors that exist already.
    """

    def __init__(self, uncounted: list[torch.Tensor]):
        super().__init__()
        self.bytes = self.peak = 0
        self.seen = {storage_key(x.untyped_storage()) for x in uncounted}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in _BY_INDEX:
            args = (args[0], _positions(args[1]), *args[2:])
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor):
                self._count(x.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage_key(storage), storage.nbytes()
        if key in self.seen:
            return
        self.seen.add(key)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.bytes -= size


def _positions(indices: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """Replace masks by the positions that they select: without content, their number would be unknown."""
    positions = []
    for index in indices:
        is_mask = index is not None and index.dtype == torch.bool
        positions += index.nonzero(as_tuple=True) if is_mask else [index]
    return positions
