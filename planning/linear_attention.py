"""The memory of linear attention by flash-linear-attention's kernels, which run on a GPU only."""

import torch
from torch import nn
from torch.nn.functional import conv1d, silu, softplus

CHUNK = 64  # tokens that the kernels compute at once


class TracedLinearAttention(nn.Module):
    """A gated delta net that allocates what the kernels do, and computes nothing with sense.

    Args:
        layer: transformers' module, with or without LoRA.
    """

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        layer, (rows, length, _) = self.layer, hidden_states.shape
        mixed = layer.in_proj_qkv(hidden_states).transpose(1, 2)
        z = layer.in_proj_z(hidden_states)
        b, a = layer.in_proj_b(hidden_states), layer.in_proj_a(hidden_states)
        padding = layer.conv_kernel_size - 1
        mixed = silu(conv1d(mixed, layer.conv1d.weight, padding=padding, groups=layer.conv_dim)[:, :, :length])
        query, key, value = mixed.transpose(1, 2).split([layer.key_dim, layer.key_dim, layer.value_dim], dim=-1)
        query, key = (x.reshape(rows, length, -1, layer.head_k_dim) for x in (query, key))
        value = value.reshape(rows, length, -1, layer.head_v_dim)
        decay = -layer.A_log.float().exp() * softplus(a.float() + layer.dt_bias)
        output = _DeltaRule.apply(query, key, value, decay, b.sigmoid())
        output = layer.norm(output.reshape(-1, layer.head_v_dim), z.reshape(-1, layer.head_v_dim))
        return layer.out_proj(output.reshape(rows, length, -1))


class _DeltaRule(torch.autograd.Function):
    """The tensors of `ChunkGatedDeltaRuleFunction` in flash-linear-attention 0.6, ops/gated_delta_rule/chunk.py."""

    @staticmethod
    def forward(ctx, query, key, value, decay, beta):
        within = value.new_empty(*value.shape[:3], CHUNK)  # of a chunk's tokens on each other
        # query and key are normalised, decay is summed up: copies
        ctx.save_for_backward(
            query.clone(), key.clone(), value, torch.empty_like(decay), beta, within, *_norms(query, key)
        )
        workspace = _workspace(key, value)
        del workspace
        return torch.empty_like(value)

    @staticmethod
    def backward(ctx, gradient):
        query, key, value, decay, beta, *_ = ctx.saved_tensors
        workspace = [*_workspace(key, value), *_workspace(key, value)]  # recomputed, and their gradients
        gradients = tuple(torch.empty_like(x) for x in (query, key, value, decay, beta))
        del workspace
        return gradients


def _norms(query: torch.Tensor, key: torch.Tensor) -> list[torch.Tensor]:
    return [x.new_empty(x.shape[:3], dtype=torch.float32) for x in (query, key)]


def _workspace(key: torch.Tensor, value: torch.Tensor) -> list[torch.Tensor]:
    """Return the states before each chunk, and keys and values as each chunk changes them."""
    rows, length, heads, width = value.shape
    states = value.new_empty(rows, -(-length // CHUNK), heads, key.size(-1), width)
    return [states, value.new_empty(rows, length, heads, key.size(-1)), torch.empty_like(value)]
