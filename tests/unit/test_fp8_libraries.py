"""What libraries are asked for: stand-ins that check forms as theirs do, and compute by the twin."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import ScalingType

from whalepod.precision import libraries, products
from whalepod.precision.fp8 import FP8
from whalepod.precision.tiles import COLUMN, ROW, SQUARE, Quantized, quantize

GENERATOR = torch.Generator().manual_seed(0)
Pair = tuple[Tensor, Tensor]


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=GENERATOR).bfloat16()


class DeepGEMM(SimpleNamespace):
    """On compute capability 9: csrc/apis/gemm.hpp and layout.hpp."""

    calls = 0

    def get_mk_alignment_for_contiguous_layout(self) -> int:
        return 128

    def fp8_gemm_nt(
        self, a: Pair, b: Pair, d: Tensor, c: Tensor | None = None, recipe: tuple[int, int, int] | None = None
    ) -> None:
        self.calls += 1
        rows_of_b = 128 if recipe is None else recipe[1]
        self.operand(a, 1, d.shape[0])
        self.operand(b, rows_of_b, d.shape[1])
        assert d.is_contiguous()
        if recipe is None:
            assert d.dtype == torch.bfloat16
            assert c is None
        else:
            assert recipe == (1, 1, 128)
            assert d.dtype == torch.float32
            assert c is d
        product = products._by_blocks(Quantized(*a), Quantized(*b))
        d.copy_(product if c is None else c + product)

    def m_grouped_fp8_gemm_nt_contiguous(self, a: Pair, b: Pair, d: Tensor, groups: Tensor) -> None:
        self.calls += 1
        self.operand(a, 1, len(d))
        assert groups.dtype == torch.int32
        assert groups.shape == (len(d),)
        for expert, scale in zip(*b, strict=True):
            self.operand((expert, scale), 128, d.shape[1])
        assert d.dtype == torch.bfloat16
        d.fill_(torch.nan)  # what is not computed may hold anything
        for start in range(0, len(d), 128):
            block = slice(start, start + 128)
            group = int(groups[start])
            if group < 0:
                continue
            assert set(groups[block].tolist()) <= {group, -1}
            d[block] = products._by_blocks(
                Quantized(a[0][block], a[1][block]), Quantized(b[0][group], b[1][group])
            ).bfloat16()

    def operand(self, x: Pair, rows: int, size: int) -> None:
        values, scale = x
        assert values.dtype == FP8
        assert values.is_contiguous()
        assert values.shape[0] == size
        assert scale.dtype == torch.float32
        assert scale.shape == (-(-size // rows), -(-values.shape[1] // 128))


def scaled_mm(
    a: Tensor, b: Tensor, scale_a: Tensor, recipe_a: Any, scale_b: Tensor, recipe_b: Any, output_dtype: Any
) -> Tensor:
    """aten/src/ATen/native/cuda/ScaledBlas.cpp; shapes also by torch's own check of fake tensors."""
    (m, k), n = a.shape, b.shape[1]
    assert recipe_a == ScalingType.BlockWise1x128
    assert a.is_contiguous()
    assert b.T.is_contiguous()
    assert scale_a.shape == (m, k // 128)
    assert scale_a.T.is_contiguous()
    assert k % 16 == n % 16 == 0
    columns = -(-k // 128 // 4) * 4
    if recipe_b == ScalingType.BlockWise128x128:
        assert scale_b.shape == (columns, n // 128)
        own = scale_b.T[:, : k // 128]
    else:
        assert scale_b.shape == (n, k // 128)
        own = scale_b
    assert scale_b.T.is_contiguous()
    meta = [t.to("meta") for t in (a, b, scale_a, scale_b)]
    shape = torch._scaled_mm_v2(
        *(meta[0], meta[1], [meta[2]], [recipe_a.value], [], [meta[3]], [recipe_b.value], []),
        *(None, output_dtype, (), False),
    )
    assert shape.shape == (m, n)
    return products._by_blocks(Quantized(a, scale_a), Quantized(b.T, own)).to(output_dtype)


@pytest.fixture(params=["DeepGEMM", "torch"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> DeepGEMM:
    standing = DeepGEMM()
    monkeypatch.setattr(libraries, "choose", lambda: request.param)
    monkeypatch.setitem(sys.modules, "deep_gemm", standing)  # type: ignore[arg-type]
    monkeypatch.setattr(F, "scaled_mm", scaled_mm)
    return standing


def same(found: Tensor | None, expected: Tensor) -> None:
    assert found is not None
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


@pytest.mark.parametrize("fmt", ["ue8m0", "float32"])
def test_products_of_a_layer(library: DeepGEMM, fmt: Any) -> None:
    """Forward, input gradient, weight gradient: as `fp8_training` makes them."""
    x, w, grad = random(256, 384), random(640, 384), random(256, 640)
    w8 = quantize(w, SQUARE, fmt)
    for a, b, dtype in (
        (quantize(x, ROW, fmt), w8, torch.bfloat16),
        (quantize(grad, ROW, fmt), w8.mT, torch.bfloat16),
        (quantize(grad, COLUMN, fmt).mT, quantize(x, COLUMN, fmt).mT, torch.bfloat16),
        (quantize(grad, COLUMN, fmt).mT, quantize(x, COLUMN, fmt).mT, torch.float32),
    ):
        same(libraries.mm(*a, *b, dtype), products._by_blocks(a, b).to(dtype))


@pytest.mark.parametrize("sizes", [(30, 0, 140, 128), (0, 0, 0, 5), (128, 128, 128, 16)])
def test_products_of_experts(library: DeepGEMM, sizes: tuple[int, ...]) -> None:
    ends = torch.tensor(sizes).cumsum(0).int()
    x, w = random(400, 256), random(4, 384, 256)
    a, b = quantize(x, ROW, "ue8m0"), quantize(w, SQUARE, "ue8m0")
    found = libraries.grouped_mm(*a, *b, ends, torch.bfloat16)
    if not library.calls:
        assert libraries.choose() == "torch"
        assert found is None
        return
    expected = torch.zeros(400, 384, dtype=torch.bfloat16)
    for expert, (size, end) in enumerate(zip(sizes, ends.tolist(), strict=True)):
        rows = slice(end - size, end)
        if size:
            part = Quantized(a.values[rows], a.scale[rows])
            each = Quantized(b.values[expert], b.scale[expert])
            expected[rows] = products._by_blocks(part, each).bfloat16()
    same(found, expected)


def test_what_does_not_fit_is_left_to_triton(library: DeepGEMM) -> None:
    def asked(m: int, k: int, n: int, block: tuple[int, int] = ROW, dtype: Any = torch.bfloat16) -> Any:
        a, b = quantize(random(m, k), block, "ue8m0"), quantize(random(n, k), SQUARE, "ue8m0")
        return libraries.mm(*a, *b, dtype)

    assert asked(128, 128, 128) is not None
    assert asked(128, 200, 128) is None
    assert asked(128, 128, 100) is None
    assert asked(7, 128, 128) is None
    assert asked(256, 128, 128, SQUARE) is None
    assert asked(128, 128, 128, dtype=torch.float32) is None


def test_without_a_gpu_of_that_kind_it_is_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(capability: int, cuda: str, installed: bool) -> str:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (capability, 0))
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(libraries.importlib.util, "find_spec", lambda name: installed or None)
        libraries.choose.cache_clear()
        return libraries.choose()

    assert chosen(9, "12.8", True) == "DeepGEMM"
    assert chosen(9, "13.0", False) == "torch"
    assert chosen(9, "12.8", False) == "Triton"
    assert chosen(10, "13.0", True) == "Triton"
    libraries.choose.cache_clear()
