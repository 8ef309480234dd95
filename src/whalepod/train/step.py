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
from whalepod.train.adamw import adamw
from whalepod.train.balance import Load, balance_step, set_balance_weight
from whalepod.train.muon import Muon


class TrainStep:
    """The spread model of a job and its optimiser.

    initial: gives every parameter its first value (`parallelize`). separator: the token between documents,
    for `data.document_mask`.
    """

    def __init__(
        self, config: RunConfig, spec: ModelSpec, mesh: Mesh, initial: Initial, separator: int = 0
    ) -> None:
        self.config, self.mesh = config, mesh
        self.layout = mesh.layout
        with torch.device("meta"):
            model = Transformer(spec)
        self.parallel: Parallel = parallelize(
            model, mesh, config.data.sequence_length, initial, config.fp8, config.lora
        )
        self.parallel.train()
        if config.data.document_mask:
            self.parallel.mask_documents(separator)
        self.state: TrainingState = self.parallel.state
        self.optimizer: torch.optim.Optimizer = (
            Muon(self.state, mesh["stage"], config.optimizer)
            if config.optimizer.name == "muon"
            else adamw(self.state, config.optimizer)
        )

    def step(
        self, rows: Tensor, learning_rate: float, mtp_weight: float | None = None
    ) -> tuple[Tensor, float]:
        """Forward and backward passes of this rank's sequences [B, S + 1 + MTP depths], clipping, update.
        mtp_weight: None is that of the run's start.

        Returns the global sums [2] of main and MTP loss per token, and the gradient's norm. Where that is
        not finite the weights stay as they were.
        """
        loss = self.config.loss
        sequences = len(rows) * self.mesh["dp"].size
        set_balance_weight(self.parallel.routers, loss.sequence_balance, sequences)
        weight = loss.mtp_weight if mtp_weight is None else mtp_weight
        length = self.config.data.sequence_length
        tokens = sequences * length
        if self.config.data.chat:  # means are over what is to be learnt
            learnt = (rows[:, 1 : 1 + length] >= 0).sum()
            tokens = max(1, int(self.mesh["dp"].all_reduce(learnt)))
        parts = self.parallel.backward(rows, tokens, weight)
        norm = float(self.parallel.clip(self.config.optimizer.clip_norm))
        losses = self.parallel.total(parts)
        # A NaN or infinity anywhere makes the norm so.
        if math.isfinite(norm):
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate
            self.optimizer.step()
            self.state.write_back()
        return losses, norm

    def balance(self, norm: float, speed: float | None = None) -> Load | None:
        """Moves the selection biases after a step with this norm; the loads of a skipped one say nothing.
        speed: None is that of the run's start."""
        speed = self.config.loss.bias_update_speed if speed is None else speed
        return balance_step(self.parallel.routers, speed if math.isfinite(norm) else 0.0, self.mesh)
