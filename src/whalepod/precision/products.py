"""Products of FP8 matrices with a scale per tile, as operations of torch (DeepSeek-V3, section 3.3).

    out[m, n] = sum over blocks k of 128 of
                a_scale[m, k] * b_scale[n, k] * sum over i in k of a[m, i] * b[n, i]

A product of two E4M3 numbers is exact in FP32, and sums are FP32. (Tensor cores of the H800 keep 14 bits
while they add up 128 products; like DeepSeek's kernels since, ours leave that to the hardware.)

Each is one operation to torch, so that a dry run sees what a GPU would do, not how a CPU emulates it:
emulation goes through wider copies that no GPU makes. On CUDA a library's kernels (`libraries.py`) or our own
in Triton (`kernels.py`) do the work.
On a CPU with scales that are powers of two, operands are exact in BF16 and one BF16 product is the whole;
other scales go block by block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from whalepod.precision import libraries
from whalepod.precision.fp8 import FP8, Block, ScaleFormat, scale_shape, widened
from whalepod.precision.tiles import COLUMN, TILE, Quantized, dequantize, dequantize_exactly
from whalepod.precision.tiles import quantize as plain_quantize

_library = torch.library.Library("whalepod", "DEF")
_library.define("fp8_quantize(Tensor x, int rows, int columns, bool powers) -> (Tensor, Tensor)")
_library.define("fp8_turn(Tensor values, Tensor scale, bool powers) -> (Tensor, Tensor)")
_library.define(
    "fp8_mm(Tensor a, Tensor a_scale, Tensor b, Tensor b_scale, bool powers, ScalarType dtype) -> Tensor"
)
_library.define(
    "fp8_grouped_mm(Tensor a, Tensor a_scale, Tensor b, Tensor b_scale, Tensor ends, bool powers, "
    "ScalarType dtype) -> Tensor"
)
_library.define(
    "fp8_grouped_sum(Tensor a, Tensor a_scale, Tensor b, Tensor b_scale, Tensor ends, bool powers, "
    "ScalarType dtype) -> Tensor"
)
OPERATIONS: Any = torch.ops.whalepod


# ------------------------------------------------------------------------------------------ what is called


def quantize(x: Tensor, block: Block, scale_fmt: ScaleFormat) -> Quantized:
    """`x` [..., M, N] in FP8 with a scale for each `block`."""
    return Quantized(*OPERATIONS.fp8_quantize(x, *block, scale_fmt == "ue8m0"))


def turned(x: Quantized, scale_fmt: ScaleFormat) -> Quantized:
    """The same matrix [M, N] with tiles of 128 x 1 in place of 1 x 128."""
    return Quantized(*OPERATIONS.fp8_turn(*x, scale_fmt == "ue8m0"))


def multiply(a: Quantized, b: Quantized, scale_fmt: ScaleFormat, dtype: torch.dtype) -> Tensor:
    """a [M, K] times b [N, K] transposed: [M, N]. Scales lie along K: tiles of either, or blocks."""
    return OPERATIONS.fp8_mm(*a, *b, scale_fmt == "ue8m0", dtype)


def multiply_groups(
    a: Quantized, b: Quantized, ends: Tensor, scale_fmt: ScaleFormat, dtype: torch.dtype
) -> Tensor:
    """Rows of a [N, K], those before `ends` [E] (int32) times their b [E, M, K] transposed: [N, M].

    Rows behind the last group become zero: they may share a tile of 128 x 1 with rows of the group.
    """
    return OPERATIONS.fp8_grouped_mm(*a, *b, ends, scale_fmt == "ue8m0", dtype)


def sum_groups(
    a: Quantized, b: Quantized, ends: Tensor, scale_fmt: ScaleFormat, dtype: torch.dtype
) -> Tensor:
    """Of the rows of each group, a [N, M] transposed times b [N, K]: [E, M, K]. Tiles are 128 x 1, counted
    from the first row of all."""
    return OPERATIONS.fp8_grouped_sum(*a, *b, ends, scale_fmt == "ue8m0", dtype)


# ---------------------------------------------------------------------------------------- emulated on a CPU


def _format(powers: bool) -> ScaleFormat:
    return "ue8m0" if powers else "float32"


def _quantize(x: Tensor, rows: int, columns: int, powers: bool) -> tuple[Tensor, Tensor]:
    return plain_quantize(x, (rows, columns), _format(powers))


def _turn(values: Tensor, scale: Tensor, powers: bool) -> tuple[Tensor, Tensor]:
    x = Quantized(values, scale)
    wide = dequantize_exactly(x) if powers else dequantize(x, torch.float32)
    return plain_quantize(wide, COLUMN, _format(powers))


def _mm(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, powers: bool, dtype: torch.dtype) -> Tensor:
    x, y = Quantized(a, a_scale), Quantized(b, b_scale)
    if powers and dtype == torch.bfloat16:
        return dequantize_exactly(x) @ dequantize_exactly(y).mT
    return _by_blocks(x, y).to(dtype)


def _by_blocks(x: Quantized, y: Quantized) -> Tensor:
    """The definition, in FP32: [M, N]."""
    a, b = widened(x.values.contiguous(), torch.float32), widened(y.values.contiguous(), torch.float32)
    rows, columns = (_each_row(q) for q in (x, y))
    out = torch.zeros(len(a), len(b))
    for k in range(rows.shape[1]):
        part = slice(k * TILE, (k + 1) * TILE)
        out += (a[:, part] @ b[:, part].T) * rows[:, k, None] * columns[:, k]
    return out


def _each_row(x: Quantized) -> Tensor:
    """The scales of every row [M, K / 128], those of blocks repeated."""
    rows = x.block[0]
    return x.scale if rows == 1 else x.scale.repeat_interleave(rows, 0)[: len(x.values)]


def _grouped_mm(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, ends: Tensor, powers: bool, dtype: torch.dtype
) -> Tensor:
    x, y = Quantized(a, a_scale), Quantized(b, b_scale)
    if powers and dtype == torch.bfloat16:
        out = F.grouped_mm(dequantize_exactly(x), dequantize_exactly(y).mT, offs=ends)
        out[int(ends[-1]) :] = 0
        return out
    out = torch.zeros(len(a), b.shape[1], dtype=dtype)
    scale, start = _each_row(x), 0
    for expert, end in enumerate(ends.tolist()):
        rows = Quantized(a[start:end], scale[start:end])
        if end > start:
            out[start:end] = _by_blocks(rows, Quantized(b[expert], b_scale[expert]))
        start = end
    return out


def _grouped_sum(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, ends: Tensor, powers: bool, dtype: torch.dtype
) -> Tensor:
    x, y = Quantized(a, a_scale), Quantized(b, b_scale)
    if powers and dtype == torch.bfloat16:
        return F.grouped_mm(dequantize_exactly(x).mT, dequantize_exactly(y), offs=ends)
    wide = [widened(q.values, torch.float32) for q in (x, y)]
    out = torch.zeros(len(ends), a.shape[1], b.shape[1])
    start = 0
    for expert, end in enumerate(ends.tolist()):
        for tile in range(start // TILE, -(-end // TILE)):
            rows = slice(max(start, tile * TILE), min(end, (tile + 1) * TILE))
            part = wide[0][rows].T @ wide[1][rows]
            out[expert] += part * a_scale[tile, :, None] * b_scale[tile]
        start = end
    return out.to(dtype)


# ------------------------------------------------------------------------------------ shapes, for a dry run


def _fake_quantize(x: Tensor, rows: int, columns: int, powers: bool) -> tuple[Tensor, Tensor]:
    scale = x.new_empty(scale_shape(tuple(x.shape), (rows, columns)), dtype=torch.float32)
    return x.new_empty(x.shape, dtype=FP8), scale


def _fake_turn(values: Tensor, scale: Tensor, powers: bool) -> tuple[Tensor, Tensor]:
    return _fake_quantize(values, *COLUMN, powers)


def _fake_mm(a: Tensor, _a: Tensor, b: Tensor, _b: Tensor, powers: bool, dtype: torch.dtype) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[0], dtype=dtype)


def _fake_grouped_mm(
    a: Tensor, _a: Tensor, b: Tensor, _b: Tensor, ends: Tensor, powers: bool, dtype: torch.dtype
) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1], dtype=dtype)


def _fake_grouped_sum(
    a: Tensor, _a: Tensor, b: Tensor, _b: Tensor, ends: Tensor, powers: bool, dtype: torch.dtype
) -> Tensor:
    return a.new_empty(ends.shape[0], a.shape[1], b.shape[1], dtype=dtype)


def _kernel(name: str) -> Callable[..., Any]:
    library = getattr(libraries, name, None)

    def call(*args: Any) -> Any:
        from whalepod.precision import kernels  # Triton comes with torch's CUDA builds only

        *operands, _, dtype = args  # a library need not know whether scales are powers of two
        found = None if library is None else library(*operands, dtype)
        return getattr(kernels, name)(*args) if found is None else found

    return call


for _name, _emulated, _fake in (
    ("quantize", _quantize, _fake_quantize),
    ("turn", _turn, _fake_turn),
    ("mm", _mm, _fake_mm),
    ("grouped_mm", _grouped_mm, _fake_grouped_mm),
    ("grouped_sum", _grouped_sum, _fake_grouped_sum),
):
    _library.impl(f"fp8_{_name}", _emulated, "CPU")
    _library.impl(f"fp8_{_name}", _kernel(_name), "CUDA")
    torch.library.register_fake(f"whalepod::fp8_{_name}", _fake, lib=_library)
