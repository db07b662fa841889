"""torch.compile of complete layers: one compiled function for all layers of a kind, each called as before."""

import torch
from accelerate import PartialState
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from transformers.modeling_layers import GradientCheckpointingLayer

from models.attention import uses_varlen
from models.compat import set_up_compiler
from models.families import family_of
from models.nf4_linear import fuse_lora, is_plain_nf4, make_opaque
from models.recomputation import NOTHING, WIDE, is_wide, make_seeded, recompute_selected

# What compiling costs, whatever the model, and what it saves. On an H100, in packs of 8,192 tokens, a 7B model makes
# 6,319 tokens/s as it is; compiled, a step takes two fifths less time (benchmarks/README.md). It has 6.5 billion
# weights in linear language layers. Slower GPUs earn the same seconds with fewer tokens: this is the cautious side.
COMPILING, SAVED, UNCOMPILED = 60, 0.4, 6319 * 6.5e9  # s; share of a step's time; tokens x weights a second


def compile_layers(model: torch.nn.Module, *, whole: bool = True, keep: str | None = None) -> None:
    """Let torch.compile fuse the arithmetic within each layer of tower and language model, in place.

    The code of one layer serves all others, and packs of every length. The first steps take up to a minute longer.
    Gradient checkpointing stays outside of the compiled function, and is switched on and off as before.

    Args:
        model: with LoRA.
        whole: compile complete layers, which is fastest; else their parts, which suits layers that are recomputed from
            outside: complete ones took minutes to compile then. Of models that `takes_whole_layers` refuses, parts are
            compiled in any case.
        keep: let complete layers recompute the rest by themselves, see `recompute_selected` and `keep_wide_products`.

    Raises:
        ValueError: there is no working compiler.
    """
    check_compiler()
    set_up_compiler()
    layers = [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]
    whole = whole and takes_whole_layers(model)
    modules = [module for layer in layers for module in layer.modules()]
    for module in modules:
        if type(module) is Linear4bit and (whole or is_plain_nf4(module.weight.quant_state)):
            make_opaque(module)
    for module in modules:
        fuse_lora(module)
    if not whole:
        _compile_parts(layers, family_of(model).linear_attention)
        return
    model.enable_input_require_grads()  # else the first language layer would be compiled for itself
    device = next(model.parameters()).device
    kinds = {kind: compiled_class(kind, keep=keep) for kind in map(type, layers)}
    for module in modules:
        if type(module) is torch.nn.Dropout and keep is not None:
            make_seeded(module, device)
    for layer in layers:
        layer.__class__ = kinds[type(layer)]


def tokens_to_repay(weights: int) -> int:
    """Return how many tokens a GPU must train on before compiling has saved the time that it costs.

    Args:
        weights: of the language model that a token passes, see `models.flops.language_weights`.
    """
    return round(COMPILING * UNCOMPILED / SAVED / weights)


def takes_whole_layers(model: torch.nn.Module) -> bool:
    """Return whether the compiler sees through complete layers: those of attention and MLP, with `use_varlen`.

    With other attention the tower loops over its windows, whose lengths are data.
    """
    return has_plain_layers(model) and uses_varlen(model)


def has_plain_layers(model: torch.nn.Module) -> bool:
    """Return whether the language layers are attention and MLP, without linear attention or experts."""
    family = family_of(model)
    return not (family.linear_attention or family.experts)


def _compile_parts(layers: list[torch.nn.Module], linear_attention: str) -> None:
    for layer in layers:
        for name, part in layer.named_children():
            if not has_experts(part):
                # The rest of linear attention has kernels of its own, which the compiler cannot see into.
                (part.norm if name == linear_attention else part).compile(dynamic=True)


def keep_wide_products(model: torch.nn.Module, count: int) -> None:
    """Let the first `count` language layers of a selectively compiled model, and no others, keep their wide products.

    Layers that do so already are not compiled again.
    """
    layers = language_layers(model)
    for layer in layers[count:]:
        layer.__class__ = getattr(type(layer), "narrow", type(layer))
    kinds = {type(layer) for layer in layers[:count] if not hasattr(type(layer), "narrow")}
    wide = {kind: compiled_class(kind.__base__, keep=WIDE) for kind in kinds}
    for kind, new in wide.items():
        new.narrow = kind
    for layer in layers[:count]:
        layer.__class__ = wide.get(type(layer), type(layer))


def recompute_everything(model: torch.nn.Module) -> None:
    """Let the layers of a selectively compiled model keep their inputs alone."""
    layers = [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]
    kinds = {kind: compiled_class(kind.__base__, keep=NOTHING) for kind in map(type, layers)}
    for layer in layers:
        layer.__class__ = kinds[type(layer)]


def language_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    path = family_of(model).language_layers.removesuffix(".")
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return list(base.get_submodule(path))


def wide_bytes(model: torch.nn.Module, tokens: int, itemsize: int) -> int:
    """Return the bytes of the wide products of one language layer, for a batch of this many tokens."""
    linears = [module for module in language_layers(model)[0].modules() if isinstance(module, torch.nn.Linear)]
    return tokens * itemsize * sum(x.out_features for x in linears if is_wide(x.in_features, x.out_features))


def has_experts(module: torch.nn.Module) -> bool:
    """Return whether a module or a part of it has experts, whose products depend on where the tokens go."""
    return any(hasattr(part, "num_experts") for part in module.modules())


def check_compiler() -> None:
    """Raise ValueError unless a function can be compiled for this process's device."""
    try:
        torch.compile(torch.sin)(torch.ones(1, device=PartialState().device))
    except RuntimeError as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"compile_layers: this machine cannot; install gcc, or set it to false ({reason})") from error


def compiled_class(
    kind: type[GradientCheckpointingLayer], *, keep: str | None = None
) -> type[GradientCheckpointingLayer]:
    """Return a subclass whose forward pass is compiled; unless `keep` is None, with recomputation inside.

    transformers wraps the `forward` of each subclass to recompute it in the backward pass, so that checkpointing is
    around the compiled function. Set on an instance, a function would escape the wrapper, and nothing be recomputed.
    """
    plain = getattr(kind.forward, "__wrapped__", kind.forward)
    chosen = plain if keep is None else recompute_selected(plain, keep=keep)
    forward = torch.compile(chosen, dynamic=True, fullgraph=True)
    return type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})
