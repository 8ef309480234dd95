"""Replicated data parallelism: every rank holds the whole training state of its part of the model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from whalepod.parallel.comm import Axis
from whalepod.parallel.mesh import Mesh
from whalepod.parallel.sharding import Held
from whalepod.parallel.state import BUCKET_BYTES, Piece, moments_by_name
from whalepod.precision.master import MasterWeights


class Replicated:
    """Every rank holds everything; gradients are all-reduced in buckets while backward runs."""

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        held: dict[str, Held],
        mesh: Mesh,
        dtype: torch.dtype,
    ) -> None:
        self._held = held
        self._sums: list[_Sum] = []
        for axis in ("stage", "data", "expert_data"):
            own = {name: p for name, p in parameters.items() if held[name].reduce == axis}
            if own:
                self._sums.append(_Sum(MasterWeights(own, dtype), mesh[axis]))
        self.decayed = [s.master.decayed for s in self._sums if s.master.decayed.numel()]
        self.plain = [s.master.plain for s in self._sums if s.master.plain.numel()]

    def start_step(self) -> None:
        for each in self._sums:
            each.start_step()

    def before_backward(self, is_last: bool) -> None:
        for each in self._sums if is_last else ():
            each.send_as_they_come()

    def after_backward(self) -> None:
        for each in self._sums:
            each.master.collect()

    def finish_gradients(self) -> None:
        for each in self._sums:
            each.start_rest()
        for each in self._sums:
            each.wait()

    def gradients(self) -> Iterator[tuple[str, Tensor, int]]:
        for each in self._sums:
            views = each.master.named(
                cast(Tensor, each.master.decayed.grad), cast(Tensor, each.master.plain.grad)
            )
            for name, view in views.items():
                yield name, view, each.axis.size

    def write_back(self) -> None:
        for each in self._sums:
            each.master.write_back()

    def weights(self) -> dict[str, Piece]:
        return {
            name: Piece(view, self._held[name].box)
            for each in self._sums
            for name, view in each.master.named(
                each.master.decayed.detach(), each.master.plain.detach()
            ).items()
        }

    def moments(self, optimizer: torch.optim.Optimizer) -> dict[str, Piece]:
        if (named := moments_by_name(optimizer, self.weights())) is not None:
            return named
        pieces = {}
        for each in self._sums:
            m = each.master
            state = {p: optimizer.state[p] for p in (m.decayed, m.plain) if p.numel()}
            keys = [k for k, v in next(iter(state.values())).items() if v.dim()]
            for key in keys:
                flat = [state[p][key] if p in state else p.detach() for p in (m.decayed, m.plain)]
                for name, view in m.named(*flat).items():
                    pieces[f"{name}/{key}"] = Piece(view, self._held[name].box)
        return pieces


class _Sum:
    """Masters whose gradients are summed over one axis, and the buckets in which they travel."""

    def __init__(self, master: MasterWeights, axis: Axis) -> None:
        self.master, self.axis = master, axis
        self._bucket_size = BUCKET_BYTES // master.gradients.element_size()
        self._buckets = master.gradients.split(self._bucket_size)
        self._missing: list[int] = []
        self._works: list[dist.Work | None] = []  # of the buckets that have left

    def start_step(self) -> None:
        self.master.start_step()
        self.master.on_gradient = None
        self._missing = [bucket.numel() for bucket in self._buckets]
        self._works = []

    def send_as_they_come(self) -> None:
        """Lets buckets leave during the backward pass that begins now, the step's last."""
        self.master.on_gradient = self._arrived if self.axis.size > 1 else None

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
        self._works.append(self.axis.start_all_reduce(self._buckets[len(self._works)]))

    def start_rest(self) -> None:
        self.master.on_gradient = None
        self.master.clear_missing()
        # A parameter without a gradient holds its bucket back, and those behind it, until here.
        while self.axis.size > 1 and len(self._works) < len(self._buckets):
            self._start_next()

    def wait(self) -> None:
        for work in self._works:
            if work is not None:
                work.wait()
        self._works = []
