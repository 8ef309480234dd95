"""The one place that calls collectives: it counts their calls and bytes by axis and operation."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass
class Traffic:
    """Calls and payload bytes of this rank since the start, by (axis, operation)."""

    calls: Counter[tuple[str, str]] = field(default_factory=Counter)
    bytes: Counter[tuple[str, str]] = field(default_factory=Counter)

    def add(self, axis: str, op: str, tensor: Tensor) -> None:
        self.calls[axis, op] += 1
        self.bytes[axis, op] += tensor.numel() * tensor.element_size()


@dataclass(frozen=True)
class Axis:
    """One mesh axis (or several flattened): its name, its process group, this rank's place."""

    name: str
    size: int = 1
    rank: int = 0
    group: dist.ProcessGroup | None = None
    traffic: Traffic = field(default_factory=Traffic)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sums in place over the axis and returns the tensor."""
        if self.size > 1:
            self.traffic.add(self.name, "all_reduce", tensor)
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def start_all_reduce(self, tensor: Tensor) -> dist.Work | None:
        """Starts an in-place sum; `wait()` on the result ends it."""
        if self.size == 1:
            return None
        self.traffic.add(self.name, "all_reduce", tensor)
        return dist.all_reduce(tensor, group=self.group, async_op=True)

    def all_gather_floats(self, values: list[float]) -> list[list[float]]:
        """Every rank's few figures, by rank: for logs."""
        mine = torch.tensor(values, dtype=torch.float64)
        if self.size == 1:
            return [mine.tolist()]
        rows = torch.zeros(self.size, len(values), dtype=torch.float64)
        rows[self.rank] = mine
        device = "cuda" if dist.get_backend(self.group) == "nccl" else "cpu"
        return self.all_reduce(rows.to(device)).tolist()

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier(group=self.group)


def from_first_rank(message: str | None) -> str | None:
    """What rank 0 of the whole job passes, on every rank."""
    box = [message]
    dist.broadcast_object_list(box, src=0)
    return box[0]
