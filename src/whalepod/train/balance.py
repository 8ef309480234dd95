"""Expert balance without an auxiliary loss (V3, section 2.1.2): the selection bias.

After each step the bias of every expert that got more than its share of the global batch goes
down by gamma, the others' goes up. Ranks see the same loads, so their biases stay equal.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from whalepod.models.moe import Router
from whalepod.parallel.mesh import Mesh


@dataclass(frozen=True)
class Load:
    """Expert load of one step: the busiest expert over the mean, worst layer and mean of layers."""

    worst: float
    mean: float


def set_balance_weight(routers: list[Router], alpha: float, sequences: float) -> None:
    """Gives the sequence-wise balance loss weight alpha, as a mean over `sequences`."""
    for router in routers:
        router.balance_weight = alpha / sequences


@torch.no_grad()
def balance_step(routers: list[Router], speed: float, mesh: Mesh) -> Load | None:
    """Moves the selection biases by one step of `speed` (gamma) and clears the counted loads.

    `routers` are this rank's. Returns None for a model without experts.
    """
    over: list[float] = []
    if routers:
        loads = mesh["stage"].all_reduce(torch.stack([router.load for router in routers]))
        mean = loads.mean(dim=1, keepdim=True)
        over = (loads.amax(dim=1) / mean.squeeze(1).clamp_min(1)).tolist()
        for router, direction in zip(routers, (mean - loads).sign(), strict=True):
            if (bias := router.e_score_correction_bias) is not None:
                bias += speed * direction
            router.load.zero_()
    stages = mesh["pp"].all_gather_floats([max(over, default=0.0), sum(over), len(over)])
    layers = sum(count for _, _, count in stages)
    if not layers:
        return None
    return Load(worst=max(worst for worst, _, _ in stages), mean=sum(s for _, s, _ in stages) / layers)
