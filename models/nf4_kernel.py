"""A Triton kernel that takes NF4 weights out of 4 bit, with their scales out of 8 bit on the way.

bitsandbytes has a kernel for each of the two and one call of an operation around both, which small packs wait for.
"""

import torch
import triton
import triton.language as tl

BLOCKS = 64  # of weights that share a scale, for one program


@triton.jit
def _dequantise(
    packed, absmax, code, offset, absmax_of_absmax, code_of_absmax, weight, count,
    nested: tl.constexpr, pairs: tl.constexpr, scales: tl.constexpr, blocks: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0) * blocks + tl.arange(0, blocks)
    exists = block * 2 * pairs < count
    scale = tl.load(absmax + block, mask=exists, other=0)
    if nested:
        outer = tl.load(absmax_of_absmax + block // scales, mask=exists, other=0)
        scale = tl.load(code_of_absmax + scale.to(tl.int32)) * outer + tl.load(offset)
    pair = block[:, None] * pairs + tl.arange(0, pairs)[None, :]
    both = tl.load(packed + pair, mask=2 * pair < count, other=0).to(tl.int32)
    first = tl.load(code + (both >> 4)) * scale[:, None]
    second = tl.load(code + (both & 15)) * scale[:, None]
    single = block[:, None] * (2 * pairs) + tl.arange(0, 2 * pairs)[None, :]
    tl.store(weight + single, tl.interleave(first, second).to(weight.dtype.element_ty), mask=single < count)


def dequantise(
    state: list[torch.Tensor], shape: tuple[int, int], dtype: torch.dtype, *, block: int, scales_block: int
) -> torch.Tensor:
    """Return a weight, bit by bit as bitsandbytes does.

    Args:
        state: see `models.nf4_linear.pack_state`, with scales as what they are; the packed weights of any dtype.
        shape: of the weight; it has an even number of elements.
        dtype: of the weight.
        block: weights that share a scale.
        scales_block: scales that share one.
    """
    packed, absmax, code, *nested = state
    weight = packed.new_empty(shape, dtype=dtype)
    programs = triton.cdiv(weight.numel(), block * BLOCKS)
    constants = {"nested": bool(nested), "pairs": block // 2, "scales": scales_block, "blocks": BLOCKS}
    # a fused multiply-add would round once where bitsandbytes rounds twice
    _dequantise[(programs,)](
        packed.view(torch.uint8), absmax, code, *(nested or [code] * 3), weight, weight.numel(), **constants,
        enable_fp_fusion=False,
    )  # fmt: skip
    return weight
