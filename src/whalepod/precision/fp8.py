"""FP8 weights with a scale per block, as DeepSeek-V3 stores them (V3, section 3.3; README_WEIGHTS).

E4M3 has 4 bits of exponent and 3 of mantissa: values up to 448, about one significant digit. One scale for
a whole matrix would let its largest element push small ones below the smallest FP8 number, so every block
of 128 x 128 elements has a scale of its own:

    weight            float8_e4m3fn  [out, in]
    weight_scale_inv  float32        [ceil(out / 128), ceil(in / 128)]
    value           = weight * weight_scale_inv of its block

"inv" says that it is multiplied with, not divided by. Blocks at the right and lower edge may be cut short.
V3.1's scales are powers of two (`ue8m0`: an exponent of 8 bits and no mantissa), stored as float32 still.

Training quantises activations and gradients too, in tiles (`tiles.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from math import ceil
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from whalepod.spec.errors import UserError

Block = tuple[int, int]
ScaleFormat = Literal["float32", "ue8m0"]

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
"""Largest E4M3 value; there is no infinity."""

_SMALLEST_SCALE = 2.0**-126  # float32's smallest normal number: below it scales would lose their digits
_LARGEST = 3e38  # rounding up by 1/16 must stay finite in float32
_CHUNK = 2**24  # elements that are held in float32 at a time: stacks of experts are many times larger


def scale_shape(shape: tuple[int, ...], block: Block = (128, 128)) -> tuple[int, ...]:
    """Shape of the scales of a weight [..., out, in]: [..., ceil(out / block[0]), ceil(in / block[1])]."""
    return (*shape[:-2], ceil(shape[-2] / block[0]), ceil(shape[-1] / block[1]))


def quantize_blocks(
    w: Tensor, block: Block = (128, 128), scale_fmt: ScaleFormat = "float32"
) -> tuple[Tensor, Tensor]:
    """E4M3 values of `w` [..., out, in], and their scales in float32, of `scale_shape`.

    A block's scale is its largest magnitude / 448, rounded up to a power of two for `ue8m0`; that of a block
    of zeros is 1. Elements round to the nearest E4M3 number, so the error is at most 1/16 of the element,
    or 2^-10 of the scale where that is more.

    Raises UserError for NaN, infinity and magnitudes above 3e38: one such element would void its block.
    """
    values = torch.empty(w.shape, dtype=FP8, device=w.device)
    scale_inv = torch.empty(scale_shape(w.shape, block), dtype=torch.float32, device=w.device)
    for w_part, values_part, scale_part in _chunks(w, values, scale_inv):
        blocks = as_blocks(w_part.float(), block)
        largest = largest_magnitude(blocks)
        if not bool((largest <= _LARGEST).all()):  # NaN compares false
            raise UserError("a weight with NaN, infinity or a magnitude above 3e38 has no FP8 form")
        scale = block_scale(largest, scale_fmt)
        values_part.copy_(from_blocks(_scaled(blocks, scale[..., :, None, :, None]), w_part.shape))
        scale_part.copy_(scale)
    return values, scale_inv


def largest_magnitude(blocks: Tensor) -> Tensor:
    """Of each of `as_blocks`: [..., block rows, block columns], NaN where there is one.

    Floats without a sign are in the order of their bits, NaN last, and a CPU finds the largest integer
    several times as fast.
    """
    bits = blocks.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[blocks.element_size()])
    return (bits & torch.iinfo(bits.dtype).max).amax((-3, -1)).view(blocks.dtype)


def block_scale(largest: Tensor, scale_fmt: ScaleFormat) -> Tensor:
    """The scales of groups of numbers with these largest magnitudes; NaN and infinity stay what they are."""
    scale = (largest / FP8_MAX).clamp_min(_SMALLEST_SCALE)
    if scale_fmt == "ue8m0":
        mantissa, exponent = torch.frexp(scale)  # mantissa in [0.5, 1): 0.5 is a power of two already
        power = torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).int())
        scale = torch.where(scale.isfinite(), power, scale)
    return scale.masked_fill(largest == 0, 1.0)


def _scaled(x: Tensor, scale: Tensor) -> Tensor:
    # The cast to E4M3 does not saturate: what rounding lifts above 448 would become NaN.
    return (x / scale).clamp(-FP8_MAX, FP8_MAX)


def dequantize_blocks(
    values: Tensor, scale_inv: Tensor, dtype: torch.dtype, block: Block = (128, 128)
) -> Tensor:
    """`values` [..., out, in] times their blocks' scales; the product is made in float32, then rounded."""
    assert scale_inv.shape == scale_shape(values.shape, block), "scales of another shape or block size"
    w = torch.empty(values.shape, dtype=dtype, device=values.device)
    for w_part, values_part, scale_part in _chunks(w, values, scale_inv):
        blocks = as_blocks(widened(values_part, torch.float32), block) * scale_part[..., :, None, :, None]
        w_part.copy_(from_blocks(blocks, values_part.shape))
    return w


def widened(values: Tensor, dtype: torch.dtype) -> Tensor:
    """E4M3, or an integer, as a wider type, exactly."""
    if values.device.type != "cpu" or is_fake(values) or values.dtype != FP8:
        return values.to(dtype)
    # torch's cast goes through scalar code on CPUs; there are 256 numbers to know.
    return _every_value(dtype).index_select(0, values.view(torch.uint8).flatten().int()).view(values.shape)


@cache
def _every_value(dtype: torch.dtype) -> Tensor:
    return torch.arange(256, dtype=torch.uint8).view(FP8).to(dtype)


def _chunks(*stacks: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same few matrices of each [..., rows, columns], as views, until all have come."""
    flat = [s.flatten(0, -3) if s.dim() > 2 else s.unsqueeze(0) for s in stacks]
    step = max(1, _CHUNK // max(1, flat[0][:1].numel()))
    for start in range(0, len(flat[0]), step):
        yield tuple(s[start : start + step] for s in flat)


def as_blocks(x: Tensor, block: Block) -> Tensor:
    """[..., out, in] -> [..., block rows, rows in one, block columns, columns in one]; zeros fill edges."""
    # A larger one has no more to hold; there may be no rows at all.
    block = (max(1, min(block[0], x.shape[-2])), max(1, min(block[1], x.shape[-1])))
    missing = (-x.shape[-1] % block[1], -x.shape[-2] % block[0])
    if any(missing):
        x = F.pad(x, (0, missing[0], 0, missing[1]))
    rows, columns = (n // b for n, b in zip(x.shape[-2:], block, strict=True))
    return x.unflatten(-1, (columns, block[1])).unflatten(-3, (rows, block[0]))


def from_blocks(x: Tensor, shape: torch.Size) -> Tensor:
    """What `as_blocks` took apart, as a view where nothing was added."""
    return x.flatten(-2).flatten(-3, -2)[..., : shape[-2], : shape[-1]]
