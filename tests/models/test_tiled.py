"""Attention in strips against torch's kernel, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from whalepod.models import tiled as strips
from whalepod.models.attention import Core, fused
from whalepod.models.tiled import tiled


def packed(batch: int, length: int) -> Tensor:
    """A causal mask [B, 1, S, S] within documents, whose beginnings are drawn."""
    document = (torch.rand(batch, length) < 0.03).cumsum(1)
    same = document.unsqueeze(1) == document.unsqueeze(2)
    return (same & torch.ones(length, length, dtype=torch.bool).tril()).unsqueeze(1)


def gradients(
    core: Core, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool
) -> list[Tensor]:
    inputs = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    out = core(*inputs, mask, is_causal, 0.2)
    (out * torch.linspace(-1, 1, out.shape[-1])).sum().backward()
    return [out.detach(), *(x.grad for x in inputs if x.grad is not None)]


@pytest.mark.parametrize("scratch", [1 << 20, 1 << 12])
@pytest.mark.parametrize("heads", [4, 2])
@pytest.mark.parametrize("kind", ["causal", "documents", "later queries", "everything"])
def test_equal_to_fused(kind: str, heads: int, scratch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strips, "SCRATCH", scratch)
    torch.manual_seed(0)
    length, queries = 150, 90 if kind == "later queries" else 150
    q = torch.randn(2, queries, 4, 24).transpose(1, 2)
    k, v = (torch.randn(2, length, heads, width).transpose(1, 2) for width in (24, 16))
    mask = packed(2, length) if kind == "documents" else None
    if kind == "later queries":
        mask = torch.ones(queries, length, dtype=torch.bool).tril(length - queries)
    for a, b in zip(
        gradients(tiled, q, k, v, mask, kind == "causal"),
        gradients(fused, q, k, v, mask, kind == "causal"),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_bf16_is_nearer_to_the_truth() -> None:
    """Scores and sums are FP32, results are rounded once."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, 200, width).bfloat16() for width in (24, 24, 16))
    truth = gradients(fused, q.double(), k.double(), v.double(), None, True)

    def errors(core: Core) -> list[float]:
        found = gradients(core, q, k, v, None, True)
        return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, truth, strict=True)]

    assert max(errors(tiled)) < 4e-3
    assert all(a < 1.1 * b for a, b in zip(errors(tiled), errors(fused), strict=True))
