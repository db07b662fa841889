"""FSDP2 for a frozen base model: each process holds its part of the weights, and fetches a layer's while it runs.

Sharded are, one after the other, embedding (unless it stays on the host) and LM head, the language layers, and the
vision tower's blocks and rest. Complete in each process stay vectors (norms, biases), weights that embedding and LM
head share, and LoRA, which is added later and learns as with DDP.
"""

from itertools import pairwise

import torch
import torch.distributed as dist
from bitsandbytes import matmul_4bit
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from transformers import BitsAndBytesConfig, PreTrainedModel

from models.compilation import language_layers
from models.families import family_of
from models.host_embedding import HostEmbedding
from models.nf4_linear import OpaqueLinear4bit, pack_state, unpack_state

CARRIER = torch.float32  # the dtype under which bytes are sharded


class ShardedLinear4bit(OpaqueLinear4bit):
    """A 4-bit layer whose packed weights and scales are one parameter, which FSDP2 shards.

    FSDP2 of torch 2.11 takes parameters of float dtypes only, and each costs time in each step. On GPUs it copies
    16-bit floats by way of float32, which turns all NaNs into one, and would change each pair of bytes that looks like
    another (pytorch/pytorch#159333, bitsandbytes-foundation/bitsandbytes#1945); float32 is copied as it is.

    Attributes:
        weight: bytes of the packed weights and then of the scales, as `CARRIER`, one-dimensional; sharded, or complete
            while the layer runs.
        constants: what else describes the weights, small.
        quant_state: bitsandbytes' description, without the scales.
    """

    weight: nn.Parameter
    constants: list[torch.Tensor]

    @property
    def state_tensors(self) -> list[torch.Tensor]:
        """The tensors of the complete weight, see `pack_state`; the scales as `CARRIER`."""
        packed = self.in_features * self.out_features // (2 * CARRIER.itemsize)
        return [self.weight[:packed].unsqueeze(1), self.weight[packed:], *self.constants]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) if torch.compiler.is_compiling() else self._multiply(x)

    @torch.compiler.disable  # torch 2.11 would compile the functions called here, which return views of the weight
    def _multiply(self, x: torch.Tensor) -> torch.Tensor:
        dtype = self.compute_dtype or x.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        shape = self.out_features, self.in_features
        weight, state = unpack_state(self.state_tensors, shape, self.quant_state.dtype)
        return matmul_4bit(x.to(dtype), weight, quant_state=state, bias=bias).to(x.dtype)


def is_sharded(model: nn.Module) -> bool:
    """Return whether `shard_model` has sharded the model, with or without LoRA."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def shard_model(model: PreTrainedModel, device: torch.device, nf4: BitsAndBytesConfig | None) -> None:
    """Move a model from the CPU to the processes' devices, in place; a device holds one complete unit at a time.

    All processes call it together. A unit is a language layer, a block of the tower, the tower's rest, embedding or LM
    head.

    Args:
        model: on the CPU, without LoRA; best with weights that are mapped from their files, which all processes share.
        device: of this process.
        nf4: how to quantise the linear layers of the language model; None leaves them as they are.
    """
    model.requires_grad_(False)
    mesh, layers = init_device_mesh(device.type, (dist.get_world_size(),)), language_layers(model)
    for unit in sharded_units(model):
        if unit in layers and nf4 is not None:
            quantise_linears(unit, device, nf4)
        move_weights(unit, device)
        join_scales(unit)
        fully_shard(unit, mesh=mesh, reshard_after_forward=True, ignored_params=kept_whole(unit))
        annotate_for_peft(unit)
        if device.type == "cuda":
            torch.cuda.empty_cache()  # a unit's complete weights; what is reserved counts as used
    move_weights(model, device)
    # the common root lets layers share their streams, and the weights of one come while another computes
    fully_shard(model.base_model, mesh=mesh, ignored_params=set(model.parameters()))
    for layer, following in pairwise(layers):
        layer.set_modules_to_forward_prefetch([following])


def sharded_units(model: PreTrainedModel) -> list[nn.Module]:
    """Return the modules that are fetched as a whole, in the order of loading: the largest come first."""
    family = family_of(model)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if isinstance(embedding, HostEmbedding):
        ends = [head]
    else:
        ends = [] if embedding.weight is head.weight else [embedding, head]
    blocks = list(model.get_submodule(family.vision_blocks.removesuffix(".")))
    return [*ends, *language_layers(model), *blocks, model.get_submodule(family.vision.removesuffix("."))]


def kept_whole(unit: nn.Module) -> set[nn.Parameter]:
    """Return the parameters of a unit that are too small to be worth fetching: all vectors."""
    in_4_bit = {module.weight for module in unit.modules() if isinstance(module, ShardedLinear4bit)}
    return {p for p in unit.parameters() if p.ndim == 1} - in_4_bit


def quantise_linears(unit: nn.Module, device: torch.device, nf4: BitsAndBytesConfig) -> None:
    """Replace a unit's linear layers with 4-bit ones on the device, one by one."""
    for parent in list(unit.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, quantise(child, device, nf4))


def quantise(linear: nn.Linear, device: torch.device, nf4: BitsAndBytesConfig) -> Linear4bit:
    """Return a linear layer in 4 bit, as transformers quantises it when it loads."""
    options = {
        "compress_statistics": nf4.bnb_4bit_use_double_quant,
        "quant_type": nf4.bnb_4bit_quant_type,
        "quant_storage": nf4.bnb_4bit_quant_storage,
    }
    sizes = linear.in_features, linear.out_features
    new = Linear4bit(*sizes, bias=False, compute_dtype=nf4.bnb_4bit_compute_dtype, device="meta", **options)
    new.weight = Params4bit(linear.weight.data, requires_grad=False, module=new, **options).to(device)
    new.bias = linear.bias
    return new.train(linear.training)


def move_weights(module: nn.Module, device: torch.device) -> None:
    """Move weights and buffers that are not sharded; tied ones stay tied."""
    for parameter in module.parameters():
        if not isinstance(parameter, DTensor) and parameter.device != device:
            if isinstance(parameter, Params4bit):
                parameter.quant_state.to(device)
            parameter.data = parameter.data.to(device)
    for part in module.modules():
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, buffer.to(device))


def join_scales(unit: nn.Module) -> None:
    """Turn the 4-bit layers of a unit into `ShardedLinear4bit`."""
    for linear in [module for module in unit.modules() if type(module) is Linear4bit]:
        state = linear.weight.quant_state
        packed, scales, *constants = pack_state(linear.weight.data, state)
        parts = [part.as_subclass(torch.Tensor).flatten().view(torch.uint8) for part in (packed, scales)]
        joined = torch.cat(parts)
        padded = nn.functional.pad(joined, (0, -joined.numel() % CARRIER.itemsize))
        linear.__class__, linear.constants, linear.state_dtype = ShardedLinear4bit, constants, state.dtype
        linear.weight = nn.Parameter(padded.view(CARRIER), requires_grad=False)
        linear.quant_state, state.absmax = state, None


def annotate_for_peft(unit: nn.Module) -> None:
    """PEFT reads the kind of quantisation off the weight, which the sharded one does not have."""
    for linear in [module for module in unit.modules() if isinstance(module, ShardedLinear4bit)]:
        linear.weight.compress_statistics = linear.quant_state.nested
        linear.weight.quant_type = linear.quant_state.quant_type


def hidden_weights(model: nn.Module) -> int:
    """Return how many more weights the sharded 4-bit layers have than their parameters have numbers."""
    linears = [module for module in model.modules() if isinstance(module, ShardedLinear4bit)]
    return sum(x.in_features * x.out_features - x.weight.numel() for x in linears)
