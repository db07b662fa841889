"""The products of experts on a GPU, in bfloat16 and NF4, beside a loop over the experts in float32."""

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from torch.nn.functional import silu
from torch.nn.utils.parametrize import register_parametrization

from models.experts import WEIGHTS, experts_forward, nf4_name, to_nf4
from models.families import FAMILIES
from models.loading import nf4_config

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

EXPERTS, HIDDEN, INNER, TOKENS, TOP = 128, 2048, 768, 2048, 8  # of Qwen3-VL-30B-A3B
SHAPES = {"gate_up_proj": (2 * INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}
USED, SCALING = 96, 2.0  # the other experts get no token


class Experts(torch.nn.Module):
    num_experts = EXPERTS

    def _apply_gate(self, x):
        gate, up = x.chunk(2, dim=-1)
        return silu(gate) * up


class Factors(torch.nn.Module):
    """What PEFT puts on a parameter for a forward pass."""

    def __init__(self, lhs, rhs):
        super().__init__()
        self.lhs, self.rhs, self.scaling = lhs, rhs, SCALING

    def forward(self, weight):
        return torch.baddbmm(weight, self.lhs, self.rhs, alpha=self.scaling)


def random(*shape):
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def loop(weights, leaves, chosen, shares):
    """The same sum, one expert after the other."""
    x, *sides = leaves
    output = torch.zeros_like(x)
    for expert in range(EXPERTS):
        rows, places = (chosen == expert).nonzero(as_tuple=True)
        hidden = x[rows]
        for n, name in enumerate(WEIGHTS):
            left, right = sides[2 * n][expert], sides[2 * n + 1][expert]
            hidden = hidden @ weights[name][expert].float().T + SCALING * (hidden @ right.T) @ left.T
            hidden = Experts._apply_gate(None, hidden) if n == 0 else hidden
        output = output.index_add(0, rows, hidden * shares[rows, places, None])
    return output


@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("rank", [8, 4])  # a row of four numbers is too short for the kernels, and padded
def test_products_and_gradients_are_those_of_a_loop(quantised, rank):
    torch.manual_seed(0)
    module, weights, leaves = Experts(), {}, [random(TOKENS, HIDDEN).requires_grad_()]
    settings = nf4_config(FAMILIES["qwen3_vl_moe"], torch.bfloat16)
    for name, (outer, inner) in SHAPES.items():
        weights[name] = stored = random(EXPERTS, outer, inner) * 0.02
        if quantised:
            in_nf4 = to_nf4(stored, settings)
            setattr(module, nf4_name(name), in_nf4)
            weights[name] = dequantize_4bit(in_nf4.data, in_nf4.quant_state)
            stored = torch.zeros((), device="cuda", dtype=torch.bfloat16).expand(stored.shape)
        module.register_parameter(name, torch.nn.Parameter(stored, requires_grad=False))
        sides = [
            (random(*shape) * 0.05).requires_grad_() for shape in ((EXPERTS, outer, rank), (EXPERTS, rank, inner))
        ]
        register_parametrization(module, name, Factors(*sides), unsafe=True)
        leaves += sides
    shares, chosen = torch.randn(TOKENS, USED, device="cuda").softmax(-1).topk(TOP)
    shares = shares.to(torch.bfloat16)
    output = experts_forward(module, leaves[0], chosen, shares)
    output.float().square().sum().backward()
    copies = [leaf.detach().float().requires_grad_() for leaf in leaves]
    expected = loop(weights, copies, chosen, shares.float())
    expected.square().sum().backward()
    pairs = [(output, expected), *((leaf.grad, copy.grad) for leaf, copy in zip(leaves, copies, strict=True))]
    for found, reference in pairs:
        assert (found.float() - reference).norm() < 0.02 * reference.norm()
    for leaf in leaves[1:]:
        assert leaf.grad[:USED].any() and not leaf.grad[USED:].any()
