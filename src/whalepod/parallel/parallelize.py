"""The only door: a model and a Layout in, a model spread over this job's devices out.

Applied in one fixed order: cut the parameters by the table, put the moves of tensor parallelism
around the modules, give the experts their exchange, recompute, fill, and last FSDP2 or flat masters,
which own the memory from then on. A model on the meta device is filled block by block, so no rank
ever holds more than its share and one block.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from whalepod.models.attention import Attend
from whalepod.models.moe import MoELayer, Router
from whalepod.models.transformer import Losses, Transformer, initial_value, target_windows
from whalepod.parallel.context import context_attend, positions
from whalepod.parallel.data import TrainingState, make_state
from whalepod.parallel.mesh import Mesh
from whalepod.parallel.recompute import apply_recompute
from whalepod.parallel.sharding import Held, shard_parameters
from whalepod.parallel.tensor import TensorDispatcher, split_tensors
from whalepod.spec.model import ModelSpec

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class Batch(NamedTuple):
    """What this rank computes of some sequences: its positions of each, under context parallelism."""

    tokens_BS: Tensor
    targets_BSK: Tensor
    positions_S: Tensor


class Parallel:
    """A spread model: its parts (the whole model, or this rank's pipeline stages) and training state."""

    def __init__(
        self, parts: list[nn.Module], held: dict[str, Held], state: TrainingState, spec: ModelSpec, mesh: Mesh
    ) -> None:
        self.parts, self.held, self.state, self.spec, self.mesh = parts, held, state, spec, mesh
        self.attend: Attend = context_attend(mesh["cp"])
        self.copies: frozenset[str] = frozenset()

    def train(self, mode: bool = True) -> None:
        for part in self.parts:
            part.train(mode)

    @property
    def routers(self) -> list[Router]:
        return [m for part in self.parts for m in part.modules() if isinstance(m, Router)]

    def batch(self, rows: Tensor) -> Batch:
        """This rank's share of sequences: `rows` [B, S + 1 + MTP depths], the same on all ranks that share
        their parts."""
        depths = self.spec.num_nextn_predict_layers
        length = rows.shape[1] - 1 - depths
        where = positions(length, self.mesh["cp"], rows.device)
        targets = target_windows(rows[:, 1:], depths)
        if self.mesh["cp"].size == 1:
            return Batch(rows[:, :length], targets, where)
        return Batch(rows[:, where], targets[:, where], where)

    def backward(self, rows: Tensor, tokens: int, mtp_weight: float) -> Tensor:
        """Forward and backward passes of a step's sequences [B, S + 1 + MTP depths].

        tokens: of the global batch, over which losses are means. Leaves gradients summed over all ranks
        in the state, and returns this rank's parts [2] of the mean next-token and mean MTP loss.
        """
        sums = torch.zeros(2, dtype=torch.float64, device=rows.device)
        self.state.start_step()
        micro_batches = rows.split(self.mesh.layout.micro_batch)
        for index, micro in enumerate(micro_batches):
            main, mtp = mean_losses(self._losses(micro), tokens)
            self.state.before_backward(index == len(micro_batches) - 1)
            (main + mtp_weight * mtp).backward()
            sums += torch.stack((main.detach(), mtp.detach()))
        self.state.finish_gradients()
        return sums

    def loss(self, rows: Tensor) -> Tensor:
        """This rank's part of the summed next-token loss of some sequences, without gradient."""
        with torch.no_grad():
            return self._losses(rows).main

    def total(self, parts: Tensor) -> Tensor:
        """Sums what ranks returned as their parts of a loss. The ranks of `tp` all hold the same part."""
        return self.mesh.world.all_reduce(parts / self.mesh["tp"].size)

    def _losses(self, rows: Tensor) -> Losses:
        batch = self.batch(rows)
        return self.parts[0](*batch, self.attend)


def parallelize(model: Transformer, mesh: Mesh, seed: int | None = None) -> Parallel:
    """Spreads `model` by the mesh's layout. It must not be used on its own afterwards.

    The layout must fit the model (`Layout.check_model`). With `seed`, a model on the meta device is
    materialised with its initial values; without, its parameters are taken as they are.
    """
    layout = mesh.layout
    parts: list[nn.Module] = [model]
    held: dict[str, Held] = {}
    for part in parts:
        held |= shard_parameters(part, mesh)
        split_tensors(part, mesh["tp"])
        _spread_experts(part, mesh)
        apply_recompute(part, layout.recompute, mesh.traffic)
        if seed is not None:
            fill(part, held, model.spec, seed, mesh.device)
    state = make_state(parts, held, layout, mesh, DTYPES[layout.precision])
    return Parallel(parts, held, state, model.spec, mesh)


def _spread_experts(part: nn.Module, mesh: Mesh) -> None:
    for module in part.modules():
        if not isinstance(module, MoELayer):
            continue
        if mesh["tp"].size > 1:
            module.dispatcher = TensorDispatcher(mesh["tp"])
        if mesh["sequence"].size > 1:
            module.gate.sum_counts = mesh["sequence"].sum


@torch.no_grad()
def fill(part: nn.Module, held: dict[str, Held], spec: ModelSpec, seed: int, device: torch.device) -> None:
    """Gives a part on the meta device memory and initial values; what was shared stays shared."""
    made: dict[int, nn.Parameter] = {}
    old = list(part.parameters())
    for path, module in part.named_modules():
        for key, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            if id(parameter) not in made:
                name = f"{path}.{key}".lstrip(".")
                box = held[name].box
                value = initial_value(name, torch.Size(box.whole), spec, seed)[box.slices]
                made[id(parameter)] = nn.Parameter(
                    value.to(device, copy=True, memory_format=torch.contiguous_format)
                )
            module._parameters[key] = made[id(parameter)]
        for key, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[key] = torch.zeros(buffer.shape, dtype=buffer.dtype, device=device)
    del old


def mean_losses(losses: Losses, tokens: int) -> tuple[Tensor, Tensor]:
    """A rank's parts of the mean next-token loss and of the mean MTP loss over depths."""
    main = losses.main / tokens
    if not losses.mtp:
        return main, torch.zeros_like(main)
    return main, torch.stack(losses.mtp).mean() / tokens
