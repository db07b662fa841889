"""Attention in segments equals one call for each segment, forward and backward, in tower and language model."""

from itertools import pairwise

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForImageTextToText

from collator import VisionSFTCollator
from models.attention import run_by_length_opaque, use_varlen, varlen_attention


class Layer(torch.nn.Module):
    is_causal = True
    num_key_value_groups = 1


@pytest.mark.parametrize("lengths", [[5], [3, 3, 3], [1, 7, 2, 7, 1], [4, 0, 4]])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kernel", [None, run_by_length_opaque], ids=["eager", "as in a compiled graph"])
def test_segments_equal_one_call_each_forward_and_backward(lengths, causal, kernel):
    torch.manual_seed(0)
    total = sum(lengths)
    sides = [torch.randn(1, heads, total, 8, requires_grad=True) for heads in (4, 2, 2)]
    copies = [side.detach().clone().requires_grad_() for side in sides]
    offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    segments = {"text_cu_seqlens": offsets, "text_max_seqlen": max(lengths)}
    output, weights = varlen_attention(Layer(), *sides, None, scaling=0.3, is_causal=causal, **segments, kernel=kernel)
    parts = [
        scaled_dot_product_attention(
            *(side[:, :, a:b] for side in copies), is_causal=causal, scale=0.3, enable_gqa=True
        )
        for a, b in pairwise(offsets.tolist())
        if b > a
    ]
    expected = torch.cat(parts, dim=2).transpose(1, 2)
    assert weights is None and output.shape == (1, total, 4, 8)
    assert torch.allclose(output, expected, atol=1e-6)
    upstream = torch.randn_like(output)
    (output * upstream).sum().backward()
    (expected * upstream).sum().backward()
    assert all(torch.allclose(a.grad, b.grad, atol=1e-6) for a, b in zip(sides, copies, strict=True))


@pytest.mark.parametrize("causal", [True, False])
def test_the_operation_of_a_compiled_graph_is_registered_right(causal):
    sides = [torch.randn(1, heads, 6, 8, requires_grad=True) for heads in (4, 2, 2)]
    offsets = torch.tensor([0, 2, 6], dtype=torch.int32)
    torch.library.opcheck(torch.ops.skin.attend_by_length.default, (*sides, offsets, 0.3, causal))


def test_dropout_is_refused():
    sides = [torch.randn(1, 2, 4, 8)] * 3
    with pytest.raises(ValueError, match=r"attention_dropout: expected 0 with attn_implementation: varlen, found 0.1"):
        varlen_attention(Layer(), *sides, None, dropout=0.1, text_cu_seqlens=torch.tensor([0, 4]), text_max_seqlen=4)


def test_tower_padded_batch_and_generation_equal_those_of_sdpa(tiny_base, processor, demo_splits):
    plain = AutoModelForImageTextToText.from_pretrained(tiny_base).eval()
    ours = AutoModelForImageTextToText.from_pretrained(tiny_base).eval()
    use_varlen(ours)
    batch = VisionSFTCollator(processor)([demo_splits["train"][n] for n in range(4)])
    kept = batch["attention_mask"].bool()
    assert not kept.all()
    gradients = []
    for model in (plain, ours):
        output = model(**batch)
        output.loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
        model.eval()
    with torch.no_grad():
        tower = [
            m.model.visual(batch["pixel_values"], batch["image_grid_thw"]).last_hidden_state for m in (plain, ours)
        ]
        logits = [model(**batch).logits[kept] for model in (plain, ours)]
        prompts = {k: v for k, v in batch.items() if k != "labels"}
        words = [model.generate(**prompts, max_new_tokens=6, do_sample=False) for model in (plain, ours)]
    assert torch.allclose(*tower, atol=1e-6) and torch.allclose(*logits, atol=1e-5)
    assert torch.equal(*words)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))
