"""Arithmetic of training, FLOP: one count for the log, the plan and the benchmarks.

Counted are matrix products and attention, two operations for each multiplication. A frozen weight has none of its own
in the backward pass. Left out are norms, activations, the LM head (it sees the answers alone), the state of linear
attention, and padding.
"""

import statistics
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from peft import PeftModel
from torch import nn

from models.compilation import has_plain_layers, language_layers
from models.experts import WEIGHTS, count_active, expert_layers, nf4_name
from models.families import family_of
from models.recomputation import is_wide

CEILING_SIDE, CEILING_SECONDS = 8192, 0.2  # of the product whose speed stands for the GPU's


class BatchShape(NamedTuple):
    """What the arithmetic of a batch depends on; shapes of several batches add up.

    Attributes:
        tokens: of all samples.
        squares: sum of the samples' squared lengths, tokens^2: attention.
        patches: of all images.
        patch_squares: sum of the images' squared patches.
        spared: tokens for which the last language layer has no MLP, see `spare_last_layer`.
    """

    tokens: float
    squares: float
    patches: float
    patch_squares: float
    spared: float = 0


class Work(NamedTuple):
    """Weights that a token or patch passes, and widths of attention, in all layers together.

    Attributes:
        language: frozen weights of the language layers, of experts those that a token is sent to.
        trained: LoRA weights of the language layers.
        last_mlp: frozen weights of the last language layer's MLP where `spare_last_layer` works, else 0.
        tower: weights of the vision tower that a patch passes.
        merger: weights that an image token passes on its way to the language model.
        tower_trains: whether the tower has a backward pass.
        attention: width of a language layer's attention times the layers that have it.
        tower_attention: width of the tower's attention times the blocks where an image's patches see each other.
        window: patches in a window of the other blocks.
        window_attention: width times blocks of these.
        merge: patches in an image token.
    """

    language: int
    trained: int
    last_mlp: int
    tower: int
    merger: int
    tower_trains: bool
    attention: int
    tower_attention: int
    window: int
    window_attention: int
    merge: int


def work_of(model: nn.Module) -> Work:
    """Return what a model with LoRA, in any precision or on the meta device, computes for a token."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    family, text, vision = family_of(base), base.config.text_config, base.config.vision_config
    modules = [(name, x) for name, x in base.named_modules() if isinstance(x, nn.Linear | nn.Conv3d)]
    tower = [(name, module_weights(x)) for name, x in modules if name.startswith(family.vision)]
    lora = [x for name, x in base.named_parameters() if x.requires_grad and name.startswith(family.language_layers)]
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    width, depth = getattr(vision, "embed_dim", None) or vision.hidden_size, vision.depth
    full = len(getattr(vision, "fullatt_block_indexes", range(depth)))
    return Work(
        language=language_weights(base),
        trained=sum(x.numel() for x in lora),
        last_mlp=_last_mlp(base),
        tower=sum(count for name, count in tower if not name.startswith(family.mergers)),
        merger=sum(count for name, count in tower if name.startswith(family.mergers)),
        tower_trains=any(x.requires_grad for name, x in base.named_parameters() if name.startswith(family.vision)),
        attention=head * text.num_attention_heads * (len(kinds) - kinds.count("linear_attention")),
        tower_attention=width * full,
        window=(getattr(vision, "window_size", 0) // vision.patch_size) ** 2,
        window_attention=width * (depth - full),
        merge=vision.spatial_merge_size**2,
    )


def useful_flop(work: Work, shape: BatchShape) -> float:
    """Return the FLOP of a training step without what is computed twice: forward, and backward of activations and of
    the weights that train. Attention's backward pass has twice the products of its forward pass."""
    language = 2 * 2 * _language(work, shape) + 3 * 2 * work.trained * shape.tokens
    passes = 2 if work.tower_trains else 1
    attention = 3 * _attention(work, shape) + (3 if work.tower_trains else 1) * _tower_attention(work, shape)
    return language + attention + passes * _tower(work, shape)


def recomputed_flop(work: Work, shape: BatchShape, share: float) -> float:
    """Return the FLOP that the backward pass repeats.

    Args:
        work: of the model.
        shape: of the batch.
        share: of the language layers' products that are computed again; 1 for the whole forward pass, attention and
            a tower that trains included.
    """
    again = share * 2 * _language(work, shape)
    if share < 1:
        return again
    tower = _tower(work, shape) + _tower_attention(work, shape) if work.tower_trains else 0
    return again + 2 * work.trained * shape.tokens + _attention(work, shape) + tower


def _language(work: Work, shape: BatchShape) -> float:
    """Return how often a frozen weight of the language layers is used."""
    return work.language * shape.tokens - work.last_mlp * shape.spared


def _attention(work: Work, shape: BatchShape) -> float:
    """Of the forward pass; a token sees half of its sample on average."""
    return 2 * work.attention * shape.squares


def _tower_attention(work: Work, shape: BatchShape) -> float:
    return 4 * (work.tower_attention * shape.patch_squares + work.window_attention * work.window * shape.patches)


def _tower(work: Work, shape: BatchShape) -> float:
    return 2 * (work.tower + work.merger / work.merge) * shape.patches


def shape_of_batch(batch: dict) -> BatchShape:
    """Return the shape of what the collator returns, on the CPU; padding does not count."""
    cu_seqlens, grid = batch.get("text_cu_seqlens"), batch.get("image_grid_thw")
    lengths = batch["attention_mask"].sum(1) if cu_seqlens is None else cu_seqlens.diff()
    shape = _shape(lengths.tolist(), [] if grid is None else grid.prod(1).tolist())
    return shape._replace(spared=shape.tokens - len(batch["answer_rows"])) if "answer_rows" in batch else shape


def shape_of_samples(total: Sequence[int], image: Sequence[int], merge: int) -> BatchShape:
    """Return the shape of samples with so many tokens, of them image tokens; each is taken to have one image."""
    return _shape(total, [merge * tokens for tokens in image])


def _shape(lengths: Sequence[int], patches: Sequence[int]) -> BatchShape:
    return BatchShape(sum(lengths), sum(x**2 for x in lengths), sum(patches), sum(x**2 for x in patches))


def _last_mlp(base: nn.Module) -> int:
    if not has_plain_layers(base):
        return 0
    return sum(module_weights(x) for x in language_layers(base)[-1].mlp.modules() if is_frozen_linear(x))


def language_weights(model: nn.Module) -> int:
    """Return how many frozen weights of the language layers' matrix products a token passes; with or without LoRA."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    prefix = family_of(base).language_layers
    linears = [x for name, x in base.named_modules() if name.startswith(prefix) and is_frozen_linear(x)]
    return sum(map(module_weights, linears)) + count_active(base.config, sum(expert_sizes(base)))


def is_frozen_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and not module.weight.requires_grad


def module_weights(module: nn.Linear | nn.Conv3d) -> int:
    """Return how many weights a layer has; those in 4 bit have another shape."""
    return module.in_features * module.out_features if isinstance(module, nn.Linear) else module.weight.numel()


def expert_sizes(model: nn.Module) -> list[int]:
    """Return the numbers of weights of all expert layers, in 16 bit or NF4."""
    names = [spelling for name in WEIGHTS for spelling in (name, nf4_name(name))]
    layers = expert_layers(model).values()
    found = [getattr(layer, name) for layer in layers for name in names if hasattr(layer, name)]
    return [getattr(getattr(weight, "quant_state", None), "shape", weight.shape).numel() for weight in found]


def wide_share(model: nn.Module) -> float:
    """Return the share of a language layer's frozen weights whose products are wide, see `models.recomputation`."""
    linears = [x for x in language_layers(model)[0].modules() if is_frozen_linear(x)]
    wide = [x for x in linears if is_wide(x.in_features, x.out_features)]
    return sum(map(module_weights, wide)) / sum(map(module_weights, linears))


def matmul_ceiling(device: torch.device, dtype: torch.dtype, side: int = CEILING_SIDE) -> float:
    """Return the FLOP/s of a large matrix product on a GPU, from 0.2 s of them."""
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    times, end = [], time.perf_counter() + CEILING_SECONDS
    while len(times) < 5 or time.perf_counter() < end:
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        a @ b
        torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return 2 * side**3 / statistics.median(times[2:])
