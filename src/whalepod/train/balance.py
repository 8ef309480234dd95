"""Expert balance without an auxiliary loss (V3, section 2.1.2): the selection bias.

After each step the bias of every expert that got more than its share of the global batch goes
down by gamma, the others' goes up. Ranks see the same loads, so their biases stay equal.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from whalepod.models.moe import routers
from whalepod.parallel.comm import Axis


@dataclass(frozen=True)
class Load:
    """Expert load of one step: the busiest expert over the mean, worst layer and mean of layers."""

    worst: float
    mean: float


def set_balance_weight(model: nn.Module, alpha: float, sequences: float) -> None:
    """Gives the sequence-wise balance loss weight alpha, as a mean over `sequences`."""
    for router in routers(model):
        router.balance_weight = alpha / sequences


@torch.no_grad()
def balance_step(model: nn.Module, speed: float, data: Axis) -> Load | None:
    """Moves the selection biases by one step of `speed` (gamma) and clears the counted loads.

    Returns None for a model without experts.
    """
    found = routers(model)
    if not found:
        return None
    loads = data.all_reduce(torch.stack([router.load for router in found]))
    mean = loads.mean(dim=1, keepdim=True)
    over = (loads.amax(dim=1) / mean.squeeze(1).clamp_min(1)).tolist()
    for router, direction in zip(found, (mean - loads).sign(), strict=True):
        if (bias := router.e_score_correction_bias) is not None:
            bias += speed * direction
        router.load.zero_()
    return Load(worst=max(over), mean=sum(over) / len(over))
