"""The optimiser of a run.

AdamW is torch's. With moments in BF16 (DeepSeek-V3, section 3.3.2) it is the same arithmetic in FP32 on a
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


def make_optimizer(state: TrainingState, config: OptimizerConfig) -> torch.optim.Optimizer:
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
        (beta1, beta2), rate, step = group["betas"], group["lr"], float(state["step"])
        correction = (1 - beta2**step) ** 0.5
        tensors = (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"])
        parts = (t.view(-1).split(CHUNK) for t in tensors)
        for weight, gradient, low1, low2 in zip(*parts, strict=True):
            first = low1.float().lerp_(gradient, 1 - beta1)
            second = low2.float().mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            low1.copy_(first)
            low2.copy_(second)
            weight.mul_(1 - rate * group["weight_decay"])
            second.sqrt_().div_(correction).add_(group["eps"])
            weight.addcdiv_(first, second, value=-rate / (1 - beta1**step))
