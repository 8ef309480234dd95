from __future__ import annotations

import pytest
import torch

from whalepod.train import adamw
from whalepod.train.adamw import AdamWLowMoments


def steps(optimizer: torch.optim.Optimizer, weights: list[torch.nn.Parameter], count: int) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        for w in weights:
            w.grad = torch.randn(w.shape, generator=generator) * 0.1 + w.detach() * 0.01
        optimizer.step()


def made(kind: type[torch.optim.Optimizer]) -> tuple[torch.optim.Optimizer, list[torch.nn.Parameter]]:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(size, generator=generator)) for size in ((40, 30), (7,))]
    groups = [{"params": weights[:1], "weight_decay": 0.1}, {"params": weights[1:], "weight_decay": 0.0}]
    return kind(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8), weights  # type: ignore[call-arg]


def test_moments_in_bf16_change_what_is_stored_only(monkeypatch: pytest.MonkeyPatch) -> None:
    exact, expected = made(torch.optim.AdamW)
    low, weights = made(AdamWLowMoments)
    steps(exact, expected, 1)
    steps(low, weights, 1)
    for w, e in zip(weights, expected, strict=True):  # the first step reads no stored moment
        assert torch.allclose(w, e, rtol=1e-6, atol=1e-7)
    steps(exact, expected, 30)
    steps(low, weights, 30)
    for w, e in zip(weights, expected, strict=True):
        assert (
            float((w.detach() - e.detach()).abs().max()) < 0.02 * 31 * 1e-2
        )  # of the way that 31 steps can go
        assert all(low.state[w][name].dtype == torch.bfloat16 for name in ("exp_avg", "exp_avg_sq"))
    whole = [w.detach().clone() for w in weights]
    low, weights = made(AdamWLowMoments)
    monkeypatch.setattr(adamw, "CHUNK", 13)
    steps(low, weights, 1)
    steps(low, weights, 30)
    assert all(torch.equal(a, b) for a, b in zip(whole, weights, strict=True))
