"""FP8 on a real GPU: the kernels beside their twins, and a training step beside its emulation on the CPU."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import fp8_checks

from whalepod.precision.fp8_training import fp8_linear
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
