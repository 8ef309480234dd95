"""AdamW.

It is torch's. With moments in BF16 (DeepSeek-V3, section 3.3.2) it is the same arithmetic in FP32 on a
part of a tensor at a time: what is stored is rounded, what is computed is not, and no FP32 copy of a whole
moment ever exists.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from whalepod.parallel.state import TrainingState
from whalepod.spec.run import OptimizerConfig

CHUNK = 1 << 22  # elements in FP32 at a time


def adamw(state: TrainingState, config: OptimizerConfig) -> torch.optim.Optimizer:
    groups = [
        {"params": state.decayed, "weight_decay": config.weight_decay},
        {"params": state.plain, "weight_decay": 0.0},
    ]
    options: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": (config.beta1, config.beta2),
        "eps": config.eps,
    }
    if config.moments == "bf16":
        return AdamWLowMoments(groups, **options)
    return torch.optim.AdamW(groups, **options, fused=True)


class AdamWLowMoments(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101) whose moments `exp_avg` and `exp_avg_sq` are BF16, of FP32 parameters."""

    def __init__(self, params: Any, lr: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        assert parameter.grad is not None
        if not state:
            state["step"] = torch.zeros(())
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(parameter, dtype=torch.bfloat16)
        state["step"] += 1
        adamw_update(
            *(parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"], float(state["step"])),
            *(group["lr"], group["weight_decay"], group["betas"], group["eps"]),
        )


def adamw_update(
    weight: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: float,
    rate: float,
    decay: float,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """One step of AdamW in place, the `step`th (1, 2, ...); moments of any precision."""
    beta1, beta2 = betas
    correction = (1 - beta2**step) ** 0.5
    parts = (t.reshape(-1) if t is gradient else t.view(-1) for t in (weight, gradient, exp_avg, exp_avg_sq))
    for w, g, low1, low2 in zip(*(p.split(CHUNK) for p in parts), strict=True):
        first = low1.float().lerp(g, 1 - beta1)
        second = low2.float().mul(beta2).addcmul_(g, g, value=1 - beta2)
        low1.copy_(first)
        low2.copy_(second)
        w.mul_(1 - rate * decay)
        second.sqrt_().div_(correction).add_(eps)
        w.addcdiv_(first, second, value=-rate / (1 - beta1**step))
