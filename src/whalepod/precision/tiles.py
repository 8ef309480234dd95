"""Activations and gradients in FP8, one scale per tile (DeepSeek-V3, section 3.3.2).

A tile is 1 x 128 or 128 x 1: 128 numbers along the dimension that a product sums over, so that one outlier
spoils few others; weights have blocks of 128 x 128. `Quantized` holds any of them. Tiles at the end of a row
or column may be cut short.

As in `fp8.py` a scale is the tile's largest magnitude / 448, rounded up to a power of two for `ue8m0`. Then
neither turning a matrix's tiles round nor sending it twice rounds anything twice, and scaled values are exact
in BF16. NaN and infinity are not refused: a broken activation has to show in the loss, as NaN.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from whalepod.precision.fp8 import (
    FP8,
    Block,
    ScaleFormat,
    as_blocks,
    block_scale,
    from_blocks,
    largest_magnitude,
    widened,
)

TILE = 128
ROW: Block = (1, TILE)
COLUMN: Block = (TILE, 1)
SQUARE: Block = (TILE, TILE)


class Quantized(NamedTuple):
    """E4M3 `values` [..., M, N] and float32 `scale` of each tile or block."""

    values: Tensor
    scale: Tensor

    @property
    def block(self) -> Block:
        """Rows and columns that share a scale: 1 or 128 each."""
        rows, columns = (
            1 if n == m else TILE for n, m in zip(self.values.shape[-2:], self.scale.shape[-2:], strict=True)
        )
        return rows, columns

    @property
    def mT(self) -> Quantized:
        return Quantized(self.values.mT, self.scale.mT)


def quantize(x: Tensor, block: Block, scale_fmt: ScaleFormat) -> Quantized:
    """`x` [..., M, N] in FP8 with a scale for each `block`."""
    blocks = as_blocks(x, block)
    scale = block_scale(largest_magnitude(blocks).float(), scale_fmt)
    wide = scale[..., :, None, :, None]
    # A power of two divides a BF16 number exactly. What rounding lifts above 448 stays below 464, from
    # where on the cast to E4M3 would make it NaN.
    fits = x.dtype == torch.bfloat16 and scale_fmt == "ue8m0"
    scaled = blocks * wide.reciprocal().to(x.dtype) if fits else blocks.float() / wide
    return Quantized(from_blocks(scaled.to(FP8), x.shape).contiguous(), scale)


def dequantize(x: Quantized, dtype: torch.dtype) -> Tensor:
    """Values times scales; the product is made in float32, then rounded to `dtype`."""
    blocks = as_blocks(widened(x.values, dtype), x.block)
    return from_blocks(blocks * x.scale[..., :, None, :, None], x.values.shape).contiguous().to(dtype)


def dequantize_exactly(x: Quantized) -> Tensor:
    """What `quantize` made with scales that are powers of two, in BF16, contiguous as `x` or its transpose
    is: no rounding, and a third of the time.

    E4M3 has the upper bits of a BF16 number but for 2^120, the difference of their exponents' biases; times
    that its subnormal numbers come out right too. NaN would not, but is only where the scale is infinite or
    NaN, and makes its whole tile NaN.
    """
    if not x.values.is_contiguous() and x.values.mT.is_contiguous():
        return dequantize_exactly(x.mT).mT
    bits = x.values.view(torch.int8).to(torch.int16)  # copies the sign to the left
    bits <<= 4
    bits &= -0x7810  # sign, 0000, exponent and mantissa, 0000
    blocks = as_blocks(bits.view(torch.bfloat16), x.block)
    broken = x.scale - x.scale  # NaN of infinity and NaN, else 0
    scale = (x.scale + broken).to(torch.bfloat16)[..., :, None, :, None]
    small = bool((scale < 2**7).all())  # then one pass does both: 2^127 is the largest power in BF16
    wide = blocks * (scale * 2.0**120) if small else (blocks * 2.0**120) * scale
    return from_blocks(wide, x.values.shape).contiguous()
