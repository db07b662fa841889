"""A Triton kernel that takes NF4 weights out of 4 bit, with their scales out of 8 bit on the way.

bitsandbytes has a kernel for each of the two and one call of an operation around both, which small packs wait for.
"""

import torch
import triton
import triton.language as tl

BLOCK, SCALES_BLOCK = 64, 256  # weights that share a scale, and scales that share one
BLOCKS = 64  # of one program


@triton.jit
def _dequantise(
    packed, absmax, code, offset, absmax_of_absmax, code_of_absmax, weight, count,
    NESTED: tl.constexpr, PAIRS: tl.constexpr, SCALES: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    exists = block * 2 * PAIRS < count
    scale = tl.load(absmax + block, mask=exists, other=0)
    if NESTED:
        outer = tl.load(absmax_of_absmax + block // SCALES, mask=exists, other=0)
        scale = tl.load(code_of_absmax + scale.to(tl.int32)) * outer + tl.load(offset)
    pair = block[:, None] * PAIRS + tl.arange(0, PAIRS)[None, :]
    both = tl.load(packed + pair, mask=2 * pair < count, other=0).to(tl.int32)
    first = tl.load(code + (both >> 4)) * scale[:, None]
    second = tl.load(code + (both & 15)) * scale[:, None]
    single = block[:, None] * (2 * PAIRS) + tl.arange(0, 2 * PAIRS)[None, :]
    tl.store(weight + single, tl.interleave(first, second).to(weight.dtype.element_ty), mask=single < count)


def dequantise(state: list[torch.Tensor], shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """Return a weight, bit by bit as bitsandbytes does.

    Args:
        state: see `models.nf4_linear.pack_state`, with scales as what they are; the packed weights of any dtype.
        shape: of the weight; it has an even number of elements.
        dtype: of the weight.
    """
    packed, absmax, code, *nested = state
    weight = packed.new_empty(shape, dtype=dtype)
    programs = triton.cdiv(weight.numel(), BLOCK * BLOCKS)
    sizes = {"PAIRS": BLOCK // 2, "SCALES": SCALES_BLOCK, "BLOCKS": BLOCKS}
    # a fused multiply-add would round once where bitsandbytes rounds twice
    _dequantise[(programs,)](
        packed.view(torch.uint8), absmax, code, *(nested or [code] * 3), weight, weight.numel(), NESTED=bool(nested), **sizes,
        enable_fp_fusion=False,
    )  # fmt: skip
    return weight
