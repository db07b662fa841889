"""What a training step holds in memory, found by running it on tensors that have shapes and no content."""

import weakref
from dataclasses import dataclass, replace

import torch
from peft import PeftModel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.masking_utils import sdpa_mask

from models.attention import on_gpu
from models.families import VISION
from models.lora import end_gradients_at_tower
from planning.shapes import add_lora, build_without_weights, with_layers

_BY_INDEX = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default, torch.ops.aten.index_put.default)
TRACED = "traced_flash"  # transformers hands the tower's windows over at once to what has "flash" in its name


@dataclass
class Activations:
    """Bytes beside weights and their gradients in one forward and backward pass.

    Attributes:
        tower: held by the vision tower when the language layers start.
        tower_peak: held at the fullest moment before that.
        saved: held between forward and backward, the tower's part included.
        peak: held at the fullest moment of all, the LM head left out.
    """

    tower: int
    tower_peak: int
    saved: int
    peak: int


def trace_model(config: PreTrainedConfig, lora: dict, *, dtype: torch.dtype, **step) -> Activations:
    """Trace a model by a few of its language layers: all are alike, and each holds what the one before it holds.

    Args:
        config: the model's.
        lora: keywords of `build_lora_config`.
        dtype: that the layers compute in.
        step: the other arguments of `trace_step`.
    """
    layers = config.text_config.num_hidden_layers
    few = 2 + len(config.vision_config.to_dict().get("deepstack_visual_indexes", ()))  # which go into the first layers
    if layers <= few:
        return trace_step(add_lora(build_without_weights(config, dtype), lora), dtype=dtype, **step)
    cut = [add_lora(build_without_weights(with_layers(config, n), dtype), lora) for n in (few - 1, few)]
    less, more = (trace_step(model, dtype=dtype, **step) for model in cut)
    rest = (layers - few) * (more.saved - less.saved)
    return replace(more, saved=more.saved + rest, peak=max(more.peak + rest, more.tower_peak))


def trace_step(
    model: PeftModel, *, tokens: int, image_tokens: int, checkpointing: bool, dtype: torch.dtype
) -> Activations:
    """Run the layers of tower and language model forward and backward and count the bytes that are alive.

    Attention and dropout are the GPU's, which keep other things than the CPU's. LoRA is in `dtype`, as autocast has
    it. NF4 layers count as others do: bitsandbytes saves nothing either, its backward needs no input.

    Args:
        model: on the meta device, with LoRA; it is spent afterwards.
        tokens: in the batch, images included.
        image_tokens: how many of them are image.
        checkpointing: whether layers are recomputed in the backward pass.
        dtype: that the layers compute in.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        _prepare(model.to_empty(device="cpu"), dtype)
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()  # as SFTTrainer does
        end_gradients_at_tower(model)
    base = model.get_base_model()
    batch = make_batch(base.config, tokens, image_tokens, mode)
    held = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters() if p.grad is not None)]
    tower, live = [0, 0], LiveBytes(held)

    def end_of_tower(*_) -> None:
        tower[:], live.peak = (live.bytes, live.peak), live.bytes

    base.get_submodule(VISION.removesuffix(".")).register_forward_hook(end_of_tower)
    with live:
        hidden = base.model(**batch, use_cache=False).last_hidden_state
        saved = live.bytes
        hidden.backward(torch.empty_like(hidden))
    return Activations(*tower, saved=saved, peak=max(live.peak, tower[1]))


def _prepare(model: PeftModel, dtype: torch.dtype) -> None:
    """Put in what the GPU would run. Gradients are there from the start, as after the first of several batches."""
    AttentionInterface.register(TRACED, _attend)
    AttentionMaskInterface.register(TRACED, sdpa_mask)
    model.get_base_model().config._attn_implementation = TRACED
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
            parameter.grad = torch.zeros_like(parameter)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, torch.nn.Dropout) and child.p:
                parent.add_module(name, _Dropout(child.p))


def make_batch(config, tokens: int, image_tokens: int, mode: FakeTensorMode) -> dict:
    """Return a pack of one image and its text. Integers are real, as the tower's windows depend on them."""
    tower, ids = config.vision_config, torch.zeros(1, tokens, dtype=torch.long)
    merge = tower.spatial_merge_size
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "position_ids": torch.arange(tokens).expand(4, 1, -1),
        "pack_offsets": torch.tensor([0, tokens], dtype=torch.int32),
        "pack_longest": tokens,
    }
    if not image_tokens:
        return batch
    ids[0, :image_tokens] = config.image_token_id
    width = tower.in_channels * tower.temporal_patch_size * tower.patch_size**2
    with mode:
        batch["pixel_values"] = torch.empty(image_tokens * merge**2, width)
    return {**batch, "image_grid_thw": torch.tensor([[1, merge, merge * image_tokens]])}


def _attend(
    module, query, key, value, attention_mask, scaling=None, is_causal=None, cu_seq_lens_q=None, max_length_q=None,
    pack_offsets=None, pack_longest=None, **kwargs,
):  # fmt: skip
    """Attend by the GPU's kernel, in the form that transformers calls attention functions."""
    offsets, longest = (cu_seq_lens_q, max_length_q) if cu_seq_lens_q is not None else (pack_offsets, pack_longest)
    causal = module.is_causal if is_causal is None else is_causal
    return on_gpu(query, key, value, offsets, longest, scaling, causal), None


class _Dropout(torch.nn.Module):
    """Dropout by the GPU's kernel, which keeps a byte for each value."""

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.native_dropout(x, self.p, True)[0]


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that operations make while it is on, for as long as they are alive.

    Args:
        held: tensors that were there before and do not count.
    """

    def __init__(self, held: list[torch.Tensor]):
        super().__init__()
        self.bytes = self.peak = 0
        self.seen = {x.untyped_storage()._cdata for x in held}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in _BY_INDEX:
            args = (args[0], _positions(args[1]), *args[2:])
        made = func(*args, **(kwargs or {}))
        for x in tree_leaves(made):
            if isinstance(x, torch.Tensor):
                self._count(x.untyped_storage())
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
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
    """Return masks as the positions that they mark: without content nobody could say how many there are."""
    found = []
    for index in indices:
        found += index.nonzero(as_tuple=True) if index is not None and index.dtype == torch.bool else [index]
    return found
