"""FP8 on a real GPU: the kernels beside their twins, and a training step beside its emulation on the CPU."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import fp8_checks

from whalepod.precision import libraries, products
from whalepod.precision.fp8_training import fp8_linear
from whalepod.precision.tiles import COLUMN, ROW, SQUARE, quantize
from whalepod.spec.run import FP8Config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9),
        reason="needs a GPU that knows FP8",
    ),
]


@pytest.mark.parametrize("name", ["rounding", "broken", "turning", "products_", "groups", "sums"])
def test_kernels_equal_their_twins(name: str) -> None:
    getattr(fp8_checks, name)("cuda")


def test_a_layer_equals_its_emulation() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 256, generator=generator).bfloat16()
    w = torch.randn(384, 256, generator=generator).bfloat16()
    gradient = torch.randn(300, 384, generator=generator).bfloat16()
    found = []
    for device in ("cpu", "cuda"):
        xs, ws = (t.to(device).requires_grad_() for t in (x, w))
        y = fp8_linear(xs, ws, FP8Config())
        y.backward(gradient.to(device))
        assert xs.grad is not None
        assert ws.grad is not None
        found.append([t.detach().cpu().float() for t in (y, xs.grad, ws.grad)])
    for a, b in zip(*found, strict=True):
        assert float((a - b).abs().max()) <= 2.0**-7 * float(a.abs().max())


@pytest.fixture(params=["DeepGEMM", "torch"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("these kernels are for compute capability 9")
    if request.param == "DeepGEMM":
        pytest.importorskip("deep_gemm")
    monkeypatch.setattr(libraries, "choose", lambda: request.param)
    return request.param


def near(found: torch.Tensor | None, expected: torch.Tensor) -> None:
    """Sums go in another order, and Hopper's tensor cores keep 14 bits within one of 128 products."""
    assert found is not None
    error = (found.cpu().float() - expected.float()).norm() / expected.float().norm()
    assert float(error) < 4e-3


def test_products_of_a_library_equal_their_twins(library: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x, w, grad = (
        torch.randn(*shape, generator=generator).bfloat16() for shape in ((512, 384), (640, 384), (512, 640))
    )
    w8 = quantize(w, SQUARE, "ue8m0")
    for a, b in (
        (quantize(x, ROW, "ue8m0"), w8),
        (quantize(grad, ROW, "ue8m0"), w8.mT),
        (quantize(grad, COLUMN, "ue8m0").mT, quantize(x, COLUMN, "ue8m0").mT),
    ):
        found = libraries.mm(*(t.cuda() for t in (*a, *b)), torch.bfloat16)
        near(found, products.multiply(a, b, "ue8m0", torch.bfloat16))


def test_grouped_products_of_a_library_equal_their_twins(library: str) -> None:
    if library == "torch":
        pytest.skip("torch's grouped product knows no blocks on compute capability 9")
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(*shape, generator=generator).bfloat16() for shape in ((700, 256), (4, 384, 256)))
    ends = torch.tensor([30, 30, 300, 650], dtype=torch.int32)
    a, b = quantize(x, ROW, "ue8m0"), quantize(w, SQUARE, "ue8m0")
    found = libraries.grouped_mm(*(t.cuda() for t in (*a, *b, ends)), torch.bfloat16)
    near(found, products.multiply_groups(a, b, ends, "ue8m0", torch.bfloat16))
