"""What the Triton kernels of FP8 must do, on any device: `python tests/fp8_checks.py NAME DEVICE`.

Expected values come from the emulation on the CPU, which tests/unit/test_fp8_training.py holds to the
definition.
"""

from __future__ import annotations

import os
import sys
from math import inf, nan
from typing import Any

import torch
from torch import Tensor

from whalepod.precision import kernels, products
from whalepod.precision.fp8 import FP8
from whalepod.precision.tiles import COLUMN, ROW, SQUARE, Quantized, quantize

# Triton's interpreter cuts FP32 off to BF16 where a GPU rounds it.
DTYPES = (torch.float32,) if os.environ.get("TRITON_INTERPRET") == "1" else (torch.float32, torch.bfloat16)
GENERATOR = torch.Generator().manual_seed(0)
FORMATS = ((True, "ue8m0"), (False, "float32"))


def same(found: Tensor, expected: Tensor, what: Any) -> None:
    found = found.cpu().float()
    expected = expected.float()
    assert found.shape == expected.shape, what
    assert torch.equal(found.nan_to_num(nan=-7.0), expected.nan_to_num(nan=-7.0)), what


def mixed(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Numbers of every size, zeros, and a tile of zeros."""
    x = torch.randn(shape, generator=GENERATOR) * torch.rand(shape, generator=GENERATOR).mul(30).exp2()
    x[torch.rand(shape, generator=GENERATOR) < 0.2] = 0.0
    x[0] = 0.0
    return x.to(dtype)


def rounding(device: str) -> None:
    for shape in ((70, 200), (128, 128), (5, 3), (300, 129), (3, 40, 130)):
        for dtype in (torch.bfloat16, torch.float32):
            for power in (-100, 0, 80):
                x = mixed(shape, dtype) * 2.0**power
                for powers, fmt in FORMATS:
                    for block in (ROW, COLUMN, SQUARE):
                        expected = quantize(x, block, fmt)
                        values, scale = kernels.quantize(x.to(device), *block, powers)
                        same(scale, expected.scale, (shape, dtype, power, fmt, block))
                        same(values, expected.values, (shape, dtype, power, fmt, block))
    x = torch.randn(200, 150, generator=GENERATOR).bfloat16()
    values, scale = kernels.quantize(x.to(device).T, *ROW, True)  # not contiguous
    expected = quantize(x.T, ROW, "ue8m0")
    same(values, expected.values, "transposed")
    same(scale, expected.scale, "transposed")


def broken(device: str) -> None:
    """NaN and infinity leave no number in their tile that could pass for one, and nothing else changes."""
    for bad in (nan, inf, -inf):
        x = torch.randn(130, 260, generator=GENERATOR)
        x[1, 5] = bad
        for powers, fmt in FORMATS:
            for block in (ROW, COLUMN, SQUARE):
                values, scale = (t.cpu() for t in kernels.quantize(x.to(device), *block, powers))
                expected = quantize(x, block, fmt)
                assert not (values.float() * _spread(scale, block, x))[1, 5].isfinite()
                fine = expected.scale.isfinite()
                assert torch.equal(scale.isfinite(), fine)
                assert torch.equal(scale[fine], expected.scale[fine])


def _spread(scale: Tensor, block: tuple[int, int], x: Tensor) -> Tensor:
    wide = scale.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return wide[: x.shape[0], : x.shape[1]]


def turning(device: str) -> None:
    for shape in ((70, 200), (256, 128), (300, 65)):
        for powers, fmt in FORMATS:
            rows = quantize(mixed(shape, torch.bfloat16), ROW, fmt)
            values, scale = kernels.turn(rows.values.to(device), rows.scale.to(device), powers)
            expected = products.turned(rows, fmt)
            same(scale, expected.scale, (shape, fmt))
            same(values, expected.values, (shape, fmt))


def whole(shape: tuple[int, ...]) -> Tensor:
    """Whole numbers, whose sums are exact in any order."""
    return torch.randint(-8, 9, shape, generator=GENERATOR).float().to(FP8)


def scales(shape: tuple[int, ...]) -> Tensor:
    return torch.randint(-3, 4, shape, generator=GENERATOR).float().exp2()


def on(device: str, *parts: Quantized) -> list[Tensor]:
    return [tensor.to(device) for part in parts for tensor in part]


def products_(device: str) -> None:
    for m, k, n in ((70, 200, 136), (64, 128, 128), (3, 5, 7), (130, 384, 40)):
        inner = -(-k // 128)
        a = Quantized(whole((m, k)), scales((m, inner)))
        blocks = Quantized(whole((n, k)), scales((-(-n // 128), inner)))
        tiles = Quantized(whole((n, k)), scales((n, inner)))
        turned = Quantized(whole((k, m)), scales((inner, m))).mT
        for x, y in ((a, blocks), (a, tiles), (turned, tiles)):
            for dtype in DTYPES:
                expected = products.multiply(x, y, "ue8m0", dtype)
                same(kernels.mm(*on(device, x, y), True, dtype), expected, (m, k, n, dtype))
        square = Quantized(whole((k, n)), scales((inner, -(-n // 128)))).mT  # an input gradient's weight
        expected = products.multiply(a, square, "ue8m0", torch.float32)
        same(kernels.mm(*on(device, a, square), True, torch.float32), expected, (m, k, n))


def groups(device: str) -> None:
    ends = torch.tensor([30, 30, 170, 190], dtype=torch.int32)
    a = Quantized(whole((200, 160)), scales((200, 2)))
    b = Quantized(whole((4, 136, 160)), scales((4, 2, 2)))
    back = Quantized(whole((4, 160, 136)), scales((4, 2, 2))).mT
    for weights in (b, back):
        for dtype in DTYPES:
            expected = products.multiply_groups(a, weights, ends, "ue8m0", dtype)
            found = kernels.grouped_mm(*on(device, a, weights), ends.to(device), True, dtype)
            same(found, expected, "groups")


def sums(device: str) -> None:
    ends = torch.tensor([30, 30, 170, 290], dtype=torch.int32)
    a = Quantized(whole((300, 72)), scales((3, 72)))
    b = Quantized(whole((300, 136)), scales((3, 136)))
    for dtype in DTYPES:
        expected = products.sum_groups(a, b, ends, "ue8m0", dtype)
        found = kernels.grouped_sum(*on(device, a, b), ends.to(device), True, dtype)
        same(found, expected, "sums")


def compile(_device: str) -> None:
    """Every kernel becomes machine code for an H100, products on its tensor cores; no GPU is needed."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    def build(kernel: Any, types: dict[str, str], constants: dict[str, Any]) -> str:
        signature = {
            name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names
        }
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
        return triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]

    floats = {"scale": "*fp32", "x_scale": "*fp32", "a_scale": "*fp32", "b_scale": "*fp32"}
    for rows, columns in (ROW, COLUMN, SQUARE):
        constants = {
            "ROW_TILE": rows, "COLUMN_TILE": columns, "HEIGHT": 128 if rows > 1 else 32,
            "WIDTH": 128 if columns > 1 else 64, "POWERS": True,
        }  # fmt: skip
        build(kernels._quantize, floats | {"x": "*bf16", "values": "*fp8e4nv"}, constants)
    types = floats | {"x": "*fp8e4nv", "values": "*fp8e4nv"}
    build(kernels._turn, types, {"SIZE": 128, "WIDTH": 64, "POWERS": True})
    types = floats | {"a": "*fp8e4nv", "b": "*fp8e4nv", "out": "*bf16", "ends": "*i32"}
    size = {"HEIGHT": kernels.ROWS, "WIDTH": kernels.COLUMNS, "SIZE": 128}
    for grouped in (False, True):
        ptx = build(kernels._product, types, size | {"A_TILE": 1, "B_TILE": 128, "GROUPED": grouped})
        assert "wgmma" in ptx or "mma.sync" in ptx
        assert "e4m3" in ptx
    assert "mma" in build(kernels._sum, types, size)


if __name__ == "__main__":
    {
        "rounding": rounding, "broken": broken, "turning": turning, "products": products_, "groups": groups,
        "sums": sums, "compile": compile,
    }[sys.argv[1]](sys.argv[2])  # fmt: skip
