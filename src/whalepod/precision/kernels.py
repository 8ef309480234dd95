"""The operations of `products.py` as Triton kernels, for CUDA.

Each stands beside its twin in plain torch; `tests/gpu` compares them on a GPU, `tests/unit` in Triton's
interpreter on a CPU, and compiles them for sm_90 without one. A product walks along its inner dimension in
steps of 128, the length of a tile, and adds each partial sum times its two scales in FP32 (DeepSeek-V3,
section 3.3.2).
"""

# pyright: reportCallIssue=false, reportOperatorIssue=false, reportIndexIssue=false
# Types of Triton's language are not Python's.

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from whalepod.precision.fp8 import FP8, scale_shape
from whalepod.precision.tiles import COLUMN, TILE

ROWS, COLUMNS = 64, 128  # of a product's result in one program
SMALLEST_SCALE = tl.constexpr(2.0**-126)


@triton.jit
def _scale_of(largest, POWERS: tl.constexpr):
    """`fp8.block_scale`: 1 for zeros, else largest / 448, rounded up to a power of two if asked."""
    scale = tl.maximum(tl.div_rn(largest, 448.0), SMALLEST_SCALE, propagate_nan=tl.PropagateNan.ALL)
    if POWERS:
        bits = scale.to(tl.int32, bitcast=True)
        up = ((bits + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
        scale = tl.where(scale < float("inf"), up, scale)  # not of NaN
    return tl.where(largest == 0.0, 1.0, scale)


@triton.jit
def _rounded(x):
    """`x` as the nearest E4M3 number, ties to even. Hardware rounds so too, Triton's interpreter does not."""
    bits = x.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
    small = (x + 24576.0) - 24576.0  # 1.5 x 2^14, whose last bit is 2^-9, the smallest number
    return tl.where(tl.abs(x) < 0.015625, small, normal).to(tl.float8e4nv)


@triton.jit
def _quantize(
    x, values, scale, m, n, x_m, x_n, s_m, s_n,
    ROW_TILE: tl.constexpr, COLUMN_TILE: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    POWERS: tl.constexpr,
):  # fmt: skip
    """A patch of HEIGHT x WIDTH: one tile along a dimension that has tiles of 128, many along another."""
    rows = tl.program_id(0) * HEIGHT + tl.arange(0, HEIGHT)
    columns = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = (rows[:, None] < m) & (columns[None, :] < n)
    patch = tl.load(x + rows[:, None] * x_m + columns[None, :] * x_n, mask=inside, other=0.0).to(tl.float32)
    size = tl.abs(patch)
    if COLUMN_TILE > 1:
        size = tl.max(size, 1, keep_dims=True)
    if ROW_TILE > 1:
        size = tl.max(size, 0, keep_dims=True)
    # tl.max passes a NaN by, unlike torch: a sum does not.
    broken = patch - patch
    if COLUMN_TILE > 1:
        broken = tl.sum(broken, 1, keep_dims=True)
    if ROW_TILE > 1:
        broken = tl.sum(broken, 0, keep_dims=True)
    tile = _scale_of(tl.where(broken == 0.0, size, size + broken), POWERS)
    shown = tl.div_rn(patch, tile + tl.zeros_like(patch))
    tl.store(values + rows[:, None] * n + columns[None, :], _rounded(shown), mask=inside)
    if COLUMN_TILE > 1 and ROW_TILE > 1:
        tl.store(scale + tl.program_id(0) * s_m + tl.program_id(1) * s_n, tl.max(tl.max(tile, 1), 0))
    elif COLUMN_TILE > 1:
        tl.store(scale + rows * s_m + tl.program_id(1) * s_n, tl.max(tile, 1), mask=rows < m)
    else:
        tl.store(scale + tl.program_id(0) * s_m + columns * s_n, tl.max(tile, 0), mask=columns < n)


@triton.jit
def _turn(
    x, x_scale, values, scale, m, n, xs_m, xs_n, s_m, s_n,
    SIZE: tl.constexpr, WIDTH: tl.constexpr, POWERS: tl.constexpr,
):  # fmt: skip
    """Tiles of 1 x 128 as tiles of 128 x 1, through FP32."""
    rows = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    columns = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = (rows[:, None] < m) & (columns[None, :] < n)
    patch = tl.load(x + rows[:, None] * n + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    old = tl.load(x_scale + rows[:, None] * xs_m + columns[None, :] // SIZE * xs_n, mask=inside, other=1.0)
    patch *= old
    broken = tl.sum(patch - patch, 0)
    largest = tl.max(tl.abs(patch), 0)
    tile = _scale_of(tl.where(broken == 0.0, largest, largest + broken), POWERS)
    shown = tl.div_rn(patch, tile[None, :] + tl.zeros_like(patch))
    tl.store(values + rows[:, None] * n + columns[None, :], _rounded(shown), mask=inside)
    tl.store(scale + tl.program_id(0) * s_m + columns * s_n, tile, mask=columns < n)


@triton.jit
def _product(
    a, a_scale, b, b_scale, out, ends, m, n, k, num_groups,
    a_m, a_k, as_m, as_k, b_e, b_n, b_k, bs_e, bs_n, bs_k,
    A_TILE: tl.constexpr, B_TILE: tl.constexpr, GROUPED: tl.constexpr,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """out[m, n] = a[m, k] b[n, k]^T; GROUPED: a row meets the b of its group, rows behind all become zero."""
    rows = tl.program_id(0) * HEIGHT + tl.arange(0, HEIGHT)
    columns = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros((HEIGHT, WIDTH), dtype=tl.float32)
    start = 0
    for group in range(0, num_groups):
        if GROUPED:  # noqa: SIM108
            end = tl.load(ends + group)
        else:
            end = m
        if (start < (tl.program_id(0) + 1) * HEIGHT) & (end > tl.program_id(0) * HEIGHT):
            mine = (rows >= start) & (rows < end)
            for step in range(0, tl.cdiv(k, SIZE)):
                inner = step * SIZE + tl.arange(0, SIZE)
                left = tl.load(
                    a + rows[:, None].to(tl.int64) * a_m + inner[None, :] * a_k,
                    mask=mine[:, None] & (inner[None, :] < k), other=0.0,
                )  # fmt: skip
                right = tl.load(
                    b + group * b_e + columns[None, :] * b_n + inner[:, None] * b_k,
                    mask=(columns[None, :] < n) & (inner[:, None] < k), other=0.0,
                )  # fmt: skip
                by_row = tl.load(a_scale + rows // A_TILE * as_m + step * as_k, mask=mine, other=0.0)
                by_column = tl.load(
                    b_scale + group * bs_e + columns // B_TILE * bs_n + step * bs_k,
                    mask=columns < n, other=0.0,
                )  # fmt: skip
                total += tl.dot(left, right) * by_row[:, None] * by_column[None, :]
        start = end
    inside = (rows[:, None] < m) & (columns[None, :] < n)
    place = out + rows[:, None].to(tl.int64) * n + columns[None, :]
    tl.store(place, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _sum(
    a, a_scale, b, b_scale, out, ends, m, n,
    as_t, as_m, bs_t, bs_n,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """out[e, m, n] = sum over the rows r of group e of a[r, m] b[r, n]; scales by 128 rows."""
    group = tl.program_id(2)
    start = tl.load(ends + group - 1, mask=group > 0, other=0)
    end = tl.load(ends + group)
    left_columns = tl.program_id(0) * HEIGHT + tl.arange(0, HEIGHT)
    right_columns = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros((HEIGHT, WIDTH), dtype=tl.float32)
    for tile in range(start // SIZE, tl.cdiv(end, SIZE)):
        rows = tile * SIZE + tl.arange(0, SIZE)
        mine = (rows >= start) & (rows < end)
        left = tl.load(
            a + left_columns[:, None] + rows[None, :].to(tl.int64) * m,
            mask=(left_columns[:, None] < m) & mine[None, :], other=0.0,
        )  # fmt: skip
        right = tl.load(
            b + right_columns[None, :] + rows[:, None].to(tl.int64) * n,
            mask=(right_columns[None, :] < n) & mine[:, None], other=0.0,
        )  # fmt: skip
        by_left = tl.load(a_scale + tile * as_t + left_columns * as_m, mask=left_columns < m, other=0.0)
        by_right = tl.load(b_scale + tile * bs_t + right_columns * bs_n, mask=right_columns < n, other=0.0)
        total += tl.dot(left, right) * by_left[:, None] * by_right[None, :]
    inside = (left_columns[:, None] < m) & (right_columns[None, :] < n)
    place = out + group.to(tl.int64) * m * n + left_columns[:, None] * n + right_columns[None, :]
    tl.store(place, total.to(out.dtype.element_ty), mask=inside)


# ---------------------------------------------------------------- the operations, with their twins' arguments


def quantize(x: Tensor, rows: int, columns: int, powers: bool) -> tuple[Tensor, Tensor]:
    flat = x.reshape(-1, *x.shape[-2:])
    values = torch.empty(flat.shape, dtype=FP8, device=x.device)
    scale = torch.empty(scale_shape(tuple(flat.shape), (rows, columns)), device=x.device)
    height, width = (TILE if rows > 1 else 32), (TILE if columns > 1 else 64)
    for each, v, s in zip(flat, values, scale, strict=True):
        m, n = each.shape
        if each.numel():
            _quantize[triton.cdiv(m, height), triton.cdiv(n, width)](
                each, v, s, m, n, *each.stride(), *s.stride(), rows, columns, height, width, powers
            )
    return values.view(x.shape), scale.view(*x.shape[:-2], *scale.shape[-2:])


def turn(values: Tensor, scale: Tensor, powers: bool) -> tuple[Tensor, Tensor]:
    m, n = values.shape
    out = torch.empty_like(values)
    turned = torch.empty(scale_shape((m, n), COLUMN), device=values.device)
    if values.numel():
        _turn[triton.cdiv(m, TILE), triton.cdiv(n, 64)](
            values, scale, out, turned, m, n, *scale.stride(), *turned.stride(), TILE, 64, powers
        )
    return out, turned


def mm(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, powers: bool, dtype: torch.dtype) -> Tensor:
    return _multiply(a, a_scale, b.unsqueeze(0), b_scale.unsqueeze(0), None, dtype)


def grouped_mm(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, ends: Tensor, powers: bool, dtype: torch.dtype
) -> Tensor:
    return _multiply(a, a_scale, b, b_scale, ends, dtype)


def _multiply(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, ends: Tensor | None, dtype: torch.dtype
) -> Tensor:
    (m, k), n = a.shape, b.shape[1]
    out = torch.empty(m, n, dtype=dtype, device=a.device)
    tiles = [1 if x.shape[-2] == s.shape[-2] else TILE for x, s in ((a, a_scale), (b, b_scale))]
    grid = triton.cdiv(m, ROWS), triton.cdiv(n, COLUMNS)
    strides: Any = *a.stride(), *a_scale.stride(), *b.stride(), *b_scale.stride()
    if out.numel():
        _product[grid](
            *(a, a_scale, b, b_scale, out, a if ends is None else ends, m, n, k, len(b), *strides),
            *(*tiles, ends is not None, ROWS, COLUMNS, TILE),
        )
    return out


def grouped_sum(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, ends: Tensor, powers: bool, dtype: torch.dtype
) -> Tensor:
    m, n = a.shape[1], b.shape[1]
    out = torch.empty(len(ends), m, n, dtype=dtype, device=a.device)
    grid = triton.cdiv(m, ROWS), triton.cdiv(n, COLUMNS), len(ends)
    if out.numel():
        _sum[grid](
            *(a, a_scale, b, b_scale, out, ends, m, n, *a_scale.stride(), *b_scale.stride()),
            *(ROWS, COLUMNS, TILE),
        )
    return out
