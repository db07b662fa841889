"""Selective recomputation: what is kept for the backward pass, and dropout whose mask can be computed again."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy

import models.attention
import models.compilation  # noqa: F401
from models.recomputation import KEPT, NARROW, NOTHING, WIDE, choose, hashed, is_wide, make_seeded, recompute_selected

MM, NF4 = torch.ops.aten.mm.default, torch.ops.skin.nf4_linear.default


@pytest.mark.parametrize(
    ("inner", "outer", "kept", "kept_if_wide"),
    [
        *[(3584, 3584, True, True), (3584, 512, True, True), (18944, 3584, True, True)],  # query, key, down
        *[(3584, 18944, False, True), (3584, 8, True, True), (8, 3584, False, False)],  # gate, LoRA's first and second
    ],
)
def test_products_are_kept_by_their_widths(inner, outer, kept, kept_if_wide):
    x, weight = SimpleNamespace(shape=(1, 7, inner)), SimpleNamespace(shape=(inner, outer))
    for op, args in ((NF4, (x, None, [], outer, torch.float32)), (MM, (x, weight))):
        found = [choose(None, op, *args, keep=keep) == CheckpointPolicy.MUST_SAVE for keep in KEPT]
        assert found == [False, kept, kept_if_wide]
    assert is_wide(inner, outer) == (kept != kept_if_wide)


def test_attention_and_seeds_are_kept_and_the_rest_is_computed_again():
    kept = (torch.ops.skin.attend_by_length.default, torch.ops.aten.randint.low)
    again = (torch.ops.aten.silu.default, torch.ops.aten.mul.Tensor, torch.ops.aten.rand.default)
    for ops, policy in ((kept, CheckpointPolicy.MUST_SAVE), (again, CheckpointPolicy.MUST_RECOMPUTE)):
        assert {choose(None, op, keep=keep) for op in ops for keep in (NARROW, WIDE)} == {policy}
    assert [choose(None, op, keep=NOTHING) for op in kept] == [
        CheckpointPolicy.MUST_RECOMPUTE,
        CheckpointPolicy.MUST_SAVE,
    ]


def test_dropout_drops_its_share_keeps_the_mean_and_its_gradient_has_the_same_mask():
    dropout = nn.Dropout(0.2)
    make_seeded(dropout, torch.device("cpu"))
    x = torch.ones(1, 400, 500, requires_grad=True)
    torch.manual_seed(0)
    found = dropout(x)
    found.sum().backward()
    assert set(found.unique().tolist()) == {0.0, 1.25} and torch.equal(x.grad, found)
    assert abs((found == 0).float().mean() - 0.2) < 4 * (0.2 * 0.8 / found.numel()) ** 0.5
    torch.manual_seed(0)
    assert torch.equal(dropout(x), found) and not torch.equal(dropout(x), found)
    assert dropout.eval()(x) is x


def test_masks_of_neighbours_and_of_two_seeds_are_independent():
    masks = [hashed(torch.tensor([seed], dtype=torch.int32), torch.Size((1, 600, 700)))[0] > 2**30 for seed in (1, 2)]
    pairs = [(masks[0], masks[1]), (masks[0][1:], masks[0][:-1]), (masks[0][:, 1:], masks[0][:, :-1])]
    for one, other in pairs:
        correlation = torch.corrcoef(torch.stack([one.flatten(), other.flatten()]).float())[0, 1]
        assert abs(correlation) < 4 / one.numel() ** 0.5


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 64, bias=False), nn.Linear(64, 16, bias=False)

    def forward(self, x):
        return x + self.down(torch.nn.functional.silu(self.up(x)))


def test_wide_products_are_stored_only_when_asked_and_gradients_are_the_same():
    torch.manual_seed(0)
    block, x = Block(), torch.randn(1, 32, 16)
    sizes, gradients = {}, {}
    for keep in (None, *KEPT):
        forward = Block.forward
        if keep is not None:
            forward = torch.compile(recompute_selected(forward, keep=keep), backend="aot_eager", fullgraph=True)
        saved, given = [], x.clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
            forward(block, given).sum().backward()
        sizes[keep] = sum(t.numel() for t in {t.data_ptr(): t for t in saved}.values() if t.dim() > 2 or 32 in t.shape)
        gradients[keep] = given.grad
    assert sizes[WIDE] - sizes[NARROW] == 32 * 64 and sizes[NARROW] == 32 * 16
    for keep in KEPT:
        torch.testing.assert_close(gradients[keep], gradients[None])


def test_the_traced_backward_pass_is_kept_between_runs():
    """PyTorch keeps it only for a rule with a `cache_hash`; one that keeps other products has another hash."""
    counters = torch._dynamo.utils.counters["aot_autograd"]
    torch.compiler.reset()
    counters.clear()
    for keep in (NARROW, WIDE):
        forward = torch.compile(recompute_selected(Block.forward, keep=keep), fullgraph=True)
        forward(Block(), torch.randn(1, 32, 16, requires_grad=True)).sum().backward()
    assert counters["autograd_cache_bypass"] == 0
    assert counters["autograd_cache_miss"] + counters["autograd_cache_hit"] == 2
