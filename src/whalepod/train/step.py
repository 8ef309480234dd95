"""One optimiser step of a job, whatever feeds it: the trainer with text, the dry run with empty tensors."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from whalepod.models.transformer import Transformer
from whalepod.parallel.mesh import Mesh
from whalepod.parallel.parallelize import Initial, Parallel, parallelize
from whalepod.parallel.state import TrainingState
from whalepod.spec.model import ModelSpec
from whalepod.spec.run import RunConfig
from whalepod.train.balance import Load, balance_step, set_balance_weight


class TrainStep:
    """The spread model of a job and its optimiser.

    initial: gives every parameter its first value (`parallelize`).
    """

    def __init__(self, config: RunConfig, spec: ModelSpec, mesh: Mesh, initial: Initial) -> None:
        self.config, self.mesh = config, mesh
        self.layout = mesh.layout
        with torch.device("meta"):
            model = Transformer(spec)
        self.parallel: Parallel = parallelize(model, mesh, config.data.sequence_length, initial, config.fp8)
        self.parallel.train()
        self.state: TrainingState = self.parallel.state
        self.optimizer = _adamw(self.state, config)
        set_balance_weight(self.parallel.routers, config.loss.sequence_balance, self.layout.global_batch)

    @property
    def tokens(self) -> int:
        """Of one step, over all devices."""
        return self.layout.global_batch * self.config.data.sequence_length

    def step(self, rows: Tensor, learning_rate: float) -> tuple[Tensor, float]:
        """Forward and backward passes of this rank's sequences [B, S + 1 + MTP depths], clipping, update.

        Returns the global sums [2] of main and MTP loss per token, and the gradient's norm. Where that is
        not finite the weights stay as they were.
        """
        parts = self.parallel.backward(rows, self.tokens, self.config.loss.mtp_weight)
        norm = float(self.parallel.clip(self.config.optimizer.clip_norm))
        losses = self.parallel.total(parts)
        # A NaN or infinity anywhere makes the norm so.
        if math.isfinite(norm):
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate
            self.optimizer.step()
            self.state.write_back()
        return losses, norm

    def balance(self, norm: float) -> Load | None:
        """Moves the selection biases after a step with this norm; the loads of a skipped one say nothing."""
        speed = self.config.loss.bias_update_speed if math.isfinite(norm) else 0.0
        return balance_step(self.parallel.routers, speed, self.mesh)


def _adamw(state: TrainingState, config: RunConfig) -> torch.optim.Optimizer:
    o = config.optimizer
    groups = [
        {"params": state.decayed, "weight_decay": o.weight_decay},
        {"params": state.plain, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=o.learning_rate, betas=(o.beta1, o.beta2), eps=o.eps, fused=True)
