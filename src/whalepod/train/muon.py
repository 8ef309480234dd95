"""Muon for matrices, AdamW for the rest: embedding, head, norms and biases (DeepSeek-V4; arXiv 2502.16982).

A matrix moves by its momentum made orthogonal: all singular values 1, so that rare directions count as much
as frequent ones. A Newton-Schulz iteration does it with products alone. Scaled to a root mean square of 0.18,
the update is as large as AdamW's, and both share the learning rate.

A matrix is a whole thing: where tensor parallelism or FSDP has cut it, its momentum is put together again on
every rank, made orthogonal there, and each rank takes its part. So every layout makes the step of one device.
That costs one sum of the matrix over the ranks of a pipeline stage, and the same products on all of them.
Stacks of experts are as many matrices, whole on their rank under expert parallelism.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from whalepod.parallel.comm import Axis
from whalepod.parallel.state import Piece, TrainingState
from whalepod.spec.run import OptimizerConfig
from whalepod.train.adamw import adamw_update

BY_ADAMW = ("embed_tokens.weight", "lm_head.weight")
COEFFICIENTS = ((3.4445, -4.7750, 2.0315),) * 8 + ((2.0, -1.5, 0.5),) * 2
"""Of x -> a x + b x^3 + c x^5 on singular values: eight steps that lift small ones fast, two that settle."""
UPDATE_RMS = 0.18


def orthogonal(
    x: Tensor, coefficients: tuple[tuple[float, float, float], ...] = COEFFICIENTS, eps: float = 1e-7
) -> Tensor:
    """Matrices [..., m, n] with the singular vectors of `x` and singular values near 1."""
    wide = x.shape[-2] <= x.shape[-1]
    y = x if wide else x.mT
    y = y / y.norm(dim=(-2, -1), keepdim=True).clamp_min(eps)
    for a, b, c in coefficients:
        square = y @ y.mT
        y = a * y + (b * square + c * square @ square) @ y
    return y if wide else y.mT


class Muon(torch.optim.Optimizer):
    """The optimiser of a training state. `by_name` holds its moments, in what `moments` says they are."""

    def __init__(self, state: TrainingState, stage: Axis, config: OptimizerConfig) -> None:
        groups = [
            {"params": state.decayed, "weight_decay": config.weight_decay},
            {"params": state.plain, "weight_decay": 0.0},
        ]
        super().__init__(groups, {"lr": config.learning_rate})
        self._training, self._stage, self._config = state, stage, config
        self._pieces = state.weights()
        self.by_name: dict[str, dict[str, Tensor]] = {}
        low = torch.bfloat16 if config.moments == "bf16" else torch.float32
        for name, piece in self._pieces.items():
            kept = ("momentum",) if self.is_matrix(name) else ("exp_avg", "exp_avg_sq")
            values = {key: torch.zeros_like(piece.tensor, dtype=low) for key in kept}
            self.by_name[name] = values
            # Where the rest of the program looks for an optimiser's memory.
            self.state[nn.Parameter(piece.tensor)] = values | {"step": torch.zeros(())}

    def is_matrix(self, name: str) -> bool:
        return len(self._pieces[name].box.whole) >= 2 and not name.endswith(BY_ADAMW)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        rate, c = self.param_groups[0]["lr"], self._config
        steps = [values["step"] for values in self.state.values()]
        torch._foreach_add_(steps, 1)
        for name, gradient, holders in self._training.gradients():
            piece, values = self._pieces[name], self.by_name[name]
            decay = c.weight_decay if len(piece.box.whole) >= 2 else 0.0
            if self.is_matrix(name):
                momentum = values["momentum"].float().mul_(c.momentum).add_(gradient)
                values["momentum"].copy_(momentum)
                update = self._orthogonal(gradient + c.momentum * momentum, piece, holders)
                piece.tensor.mul_(1 - rate * decay).add_(update, alpha=-rate)
            else:
                adamw_update(
                    *(piece.tensor, gradient, values["exp_avg"], values["exp_avg_sq"], float(steps[0])),
                    *(rate, decay, (c.beta1, c.beta2), c.eps),
                )

    def _orthogonal(self, part: Tensor, piece: Piece, holders: int) -> Tensor:
        box = piece.box
        rows, columns = box.whole[-2:]
        whole, own = part, (slice(None),) * part.dim()
        # The same answer on every rank, also on one that happens to hold all of a small matrix.
        cut = holders < self._stage.size if part.dim() == 2 else box.shape[-2:] != box.whole[-2:]
        if cut:
            whole, own = torch.zeros(box.whole, device=part.device), box.slices
            whole[own] = part / holders  # ranks that hold the same part add up to it
            self._stage.all_reduce(whole)
        if not whole.numel():
            return part
        # BF16 is enough for the iteration, and what tensor cores are for.
        fast = whole.bfloat16() if whole.device.type == "cuda" else whole
        return orthogonal(fast)[own].float() * (UPDATE_RMS * max(rows, columns) ** 0.5)
