"""Data parallelism: the training state replicated, or sharded with FSDP2, behind one interface.

Both hold FP32 masters, compute in the layout's precision, and sum gradients in FP32. The loss that
a rank backpropagates is its part of the global batch's mean; gradients are therefore summed over
ranks. FSDP2 averages instead (a sum needs an operation that gloo lacks), which `loss_scale` undoes.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from whalepod.models.transformer import Transformer
from whalepod.parallel.comm import Axis
from whalepod.parallel.mesh import Mesh
from whalepod.precision.master import MasterWeights
from whalepod.spec.layout import Layout

BUCKET_BYTES = 32 * 2**20
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class TrainingState(Protocol):
    """A model's weights as a trainer needs them, wherever they live.

    decayed, plain: parameters for the optimiser with and without weight decay.
    loss_scale: factor on the loss before backward.
    """

    decayed: list[nn.Parameter]
    plain: list[nn.Parameter]
    loss_scale: float

    def start_step(self) -> None:
        """Before the first micro-batch: forgets the last step's gradients."""
        ...

    def before_backward(self, is_last: bool) -> None:
        """Before each backward pass; only the last of a step communicates."""
        ...

    def finish_gradients(self) -> None:
        """After the last backward pass: waits until every rank holds the global sums."""
        ...

    def write_back(self) -> None:
        """After an optimiser step or a load: the model computes with the new weights."""
        ...

    def weights(self) -> dict[str, Tensor]:
        """FP32 masters by parameter name (views or DTensors)."""
        ...

    def moments(self, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
        """The optimiser's tensors by `parameter name / state name`."""
        ...


class Replicated:
    """Every rank holds everything; gradients are all-reduced in buckets while backward runs."""

    def __init__(self, model: Transformer, axis: Axis, compute_dtype: torch.dtype) -> None:
        self.master = MasterWeights(model, compute_dtype)
        self.decayed, self.plain = [self.master.decayed], [self.master.plain]
        self.loss_scale = 1.0
        self._axis = axis
        elements = BUCKET_BYTES // self.master.gradients.element_size()
        self._buckets = self.master.gradients.split(elements)
        self._bucket_size = elements
        self._missing: list[int] = []
        self._works: list[dist.Work | None] = []  # of the buckets that have left

    def start_step(self) -> None:
        self.master.start_step()

    def before_backward(self, is_last: bool) -> None:
        self.master.on_gradient = self._arrived if is_last and self._axis.size > 1 else None
        self._missing = [bucket.numel() for bucket in self._buckets]
        self._works = []

    def _arrived(self, offset: int, size: int) -> None:
        # A parameter may straddle buckets; each bucket leaves when all its elements are final.
        end = offset + size
        while offset < end:
            index = offset // self._bucket_size
            step = min(end, (index + 1) * self._bucket_size) - offset
            self._missing[index] -= step
            offset += step
        # Buckets leave in one order on every rank, or ranks would sum different ones: a complete
        # bucket waits for those before it.
        while len(self._works) < len(self._buckets) and self._missing[len(self._works)] == 0:
            self._start_next()

    def _start_next(self) -> None:
        self._works.append(self._axis.start_all_reduce(self._buckets[len(self._works)]))

    def finish_gradients(self) -> None:
        self.master.on_gradient = None
        self.master.clear_missing()
        if self._axis.size == 1:
            return
        # A parameter without a gradient holds its bucket back, and those behind it, until here.
        while len(self._works) < len(self._buckets):
            self._start_next()
        for work in self._works:
            assert work is not None
            work.wait()

    def write_back(self) -> None:
        self.master.write_back()

    def weights(self) -> dict[str, Tensor]:
        return self.master.named(self.master.decayed.detach(), self.master.plain.detach())

    def moments(self, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
        state = [optimizer.state[p] for p in (self.master.decayed, self.master.plain)]
        keys = [key for key, value in state[0].items() if value.dim()]
        return {
            f"{name}/{key}": view
            for key in keys
            for name, view in self.master.named(state[0][key], state[1][key]).items()
        }


class Sharded:
    """FSDP2: weights, gradients and moments live in shards; each block gathers its own to compute."""

    def __init__(self, model: Transformer, mesh: Mesh, compute_dtype: torch.dtype) -> None:
        assert mesh.device_mesh is not None
        shards = mesh.device_mesh if mesh.device_mesh.size(0) > 1 else mesh.device_mesh["dp_shard"]
        # Inputs keep their type: rounding the rotary tables to BF16 would move every position.
        policy = MixedPrecisionPolicy(compute_dtype, torch.float32, cast_forward_inputs=False)
        for block in (*model.layers, *model.mtp):
            fully_shard(block, mesh=shards, mp_policy=policy)
        fully_shard(model, mesh=shards, mp_policy=policy)
        self._model: Any = model
        self._named = dict(model.named_parameters())
        self.decayed = [p for p in self._named.values() if p.dim() >= 2]
        self.plain = [p for p in self._named.values() if p.dim() < 2]
        self.loss_scale = float(mesh.data.size)

    def start_step(self) -> None:
        for parameter in self._named.values():
            parameter.grad = None

    def before_backward(self, is_last: bool) -> None:
        self._model.set_is_last_backward(is_last)
        self._model.set_requires_gradient_sync(is_last)

    def finish_gradients(self) -> None:
        """FSDP2 waits by itself."""

    def write_back(self) -> None:
        """FSDP2 gathers from the masters at the next forward pass."""

    def weights(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self._named.items()}

    def moments(self, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
        return {
            f"{name}/{key}": value
            for name, p in self._named.items()
            for key, value in optimizer.state[p].items()
            if value.dim()
        }


def spread(model: Transformer, layout: Layout, mesh: Mesh) -> TrainingState:
    """Puts an initialised model under a layout's data parallelism and precision."""
    dtype = _DTYPES[layout.precision]
    if layout.dp_shard > 1:
        return Sharded(model, mesh, dtype)
    return Replicated(model, mesh.data, dtype)


def clip_gradients(state: TrainingState, max_norm: float) -> Tensor:
    """Scales all gradients so that their global 2-norm is at most `max_norm`; returns the norm."""
    parameters = [*state.decayed, *state.plain]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm
