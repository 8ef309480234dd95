"""The one place that calls collectives: it counts their calls and bytes by axis and operation.

An `Axis` is a group of ranks with a name. Its plain methods work in place or into given buffers.
`gather` and `reduce_scatter` can be differentiated: each one's backward pass is the other, so that
gradients come out right when every rank adds its own share of the one global loss (and no share is
added twice). torch's own differentiable collectives do the same, but what their backward passes send
would go uncounted.

They and `start_all_to_all` are functional collectives (tensors in, new tensors out), so selective
recomputation keeps their results instead of communicating again: `SAVED_BY_RECOMPUTE`.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather, ReduceScatter

Move = Callable[[Tensor], Tensor]
_ops = torch.ops._c10d_functional


@torch.library.custom_op("whalepod::keep", mutates_args=())
def keep(tensor: Tensor) -> Tensor:
    """A copy that recomputation keeps."""
    return tensor.clone()


keep.register_fake(torch.empty_like)

SAVED_BY_RECOMPUTE = (
    _ops.all_gather_into_tensor.default,
    _ops.reduce_scatter_tensor.default,
    _ops.all_to_all_single.default,
    _ops.all_reduce.default,
    _ops.wait_tensor.default,
    torch.ops.whalepod.keep.default,
)


@dataclass
class Traffic:
    """Calls and payload bytes of this rank since the start, by (axis, operation).

    Payload: the tensor of an all-reduce or broadcast, the result of an all-gather, the input of a
    reduce-scatter or all-to-all, what a send sends. `paused` while results are replayed, not sent; `passing`
    while what arrives is only passed on, so that recomputation need not keep it.

    waiting: the (axis, operation) that this rank is held up by right now, for the others to come.
    waited_s: seconds it has been held up so, in all; of what a GPU waits for its host knows nothing.
    """

    calls: Counter[tuple[str, str]] = field(default_factory=Counter)
    bytes: Counter[tuple[str, str]] = field(default_factory=Counter)
    paused: bool = False
    passing: bool = False
    waiting: tuple[str, str] | None = None
    waited_s: float = 0.0

    @contextmanager
    def held_up(self, axis: str, op: str) -> Iterator[None]:
        """While a collective, or the wait for one, does not return."""
        self.waiting, start = (axis, op), time.perf_counter()
        try:
            yield
        finally:
            self.waiting = None
            self.waited_s += time.perf_counter() - start

    @contextmanager
    def only_passed_on(self, so: bool) -> Iterator[None]:
        """What arrives while this lasts is read by nothing but the next collective, if `so`."""
        self.passing = so
        try:
            yield
        finally:
            self.passing = False

    def add(self, axis: str, op: str, tensor: Tensor) -> None:
        if not self.paused:
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
            with self.traffic.held_up(self.name, "all_reduce"):
                dist.all_reduce(tensor, group=self.group)
        return tensor

    def start_all_reduce(self, tensor: Tensor) -> dist.Work | None:
        """Starts an in-place sum; `wait()` on the result ends it."""
        if self.size == 1:
            return None
        self.traffic.add(self.name, "all_reduce", tensor)
        return self._started("all_reduce", dist.all_reduce(tensor, group=self.group, async_op=True))

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over the axis as a new tensor; not differentiable."""
        if self.size == 1:
            return tensor
        self.traffic.add(self.name, "all_reduce", tensor)
        return self.wait(_ops.all_reduce(tensor, "sum", self._group_name), "all_reduce")

    def broadcast(self, tensor: Tensor, source: int) -> Tensor:
        """Fills the tensor in place with that of the axis's rank `source`, and returns it."""
        if self.size > 1:
            self.traffic.add(self.name, "broadcast", tensor)
            with self.traffic.held_up(self.name, "broadcast"):
                dist.broadcast(tensor, group=self.group, group_src=source)
        return tensor

    def gather(self, tensor: Tensor, dim: int = 0) -> Tensor:
        """Every rank's tensor (equal shapes), joined along `dim` in rank order. Differentiable."""
        if self.size == 1:
            return tensor
        return _Moved.apply(tensor, partial(self._gathered, dim=dim), partial(self._reduced, dim=dim))

    def reduce_scatter(self, tensor: Tensor, dim: int = 0) -> Tensor:
        """This rank's part along `dim` of the sum over the axis. Differentiable.

        `dim` must be a multiple of the axis's size.
        """
        if self.size == 1:
            return tensor
        return _Moved.apply(tensor, partial(self._reduced, dim=dim), partial(self._gathered, dim=dim))

    def start_all_to_all(self, rows: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        """Starts to send `send[i]` consecutive rows to rank i; `wait` on the result for `receive[i]` rows of
        each rank i, in rank order. Not differentiable."""
        if self.size == 1:
            return rows
        assert len(rows) == sum(send)
        self.traffic.add(self.name, "all_to_all", rows)
        return _ops.all_to_all_single(rows.contiguous(), list(receive), list(send), self._group_name)

    def gather_into(self, out: Tensor, tensor: Tensor, async_op: bool = False) -> dist.Work | None:
        """Fills flat `out` with every rank's flat `tensor`."""
        self.traffic.add(self.name, "all_gather", out)
        with self.traffic.held_up(self.name, "all_gather"):
            work = dist.all_gather_single(out, tensor, group=self.group, async_op=async_op)
        return self._started("all_gather", work)

    def reduce_scatter_into(self, out: Tensor, tensor: Tensor, async_op: bool = False) -> dist.Work | None:
        """Fills flat `out` with this rank's part of the sum of flat `tensor`."""
        self.traffic.add(self.name, "reduce_scatter", tensor)
        with self.traffic.held_up(self.name, "reduce_scatter"):
            work = dist.reduce_scatter_single(out, tensor, group=self.group, async_op=async_op)
        return self._started("reduce_scatter", work)

    def shift_into(self, out: Tensor, tensor: Tensor) -> None:
        """Sends `tensor` to the next rank and fills `out` with that of the one before."""
        there, back = ((self.rank + step) % self.size for step in (1, -1))
        self._send_receive(out, tensor, there, back)

    def swap_into(self, out: Tensor, tensor: Tensor, peer: int) -> None:
        """Sends `tensor` to the axis's rank `peer` and fills `out` with that rank's, which does the same."""
        self._send_receive(out, tensor, peer, peer)

    def _send_receive(self, out: Tensor, tensor: Tensor, there: int, back: int) -> None:
        self.traffic.add(self.name, "send", tensor)
        ops = [
            dist.P2POp(dist.isend, tensor, group=self.group, group_peer=there),
            dist.P2POp(dist.irecv, out, group=self.group, group_peer=back),
        ]
        with self.traffic.held_up(self.name, "send"):
            for work in dist.batch_isend_irecv(ops):
                work.wait()

    def all_gather_floats(self, values: list[float]) -> list[list[float]]:
        """Every rank's few figures, by rank: for logs."""
        mine = torch.tensor(values, dtype=torch.float64)
        if self.size == 1:
            return [mine.tolist()]
        rows = torch.zeros(self.size, len(values), dtype=torch.float64)
        rows[self.rank] = mine
        device = "cuda" if dist.get_backend(self.group) == "nccl" else "cpu"
        return self.all_reduce(rows.to(device)).tolist()

    def share(self, data: bytes) -> list[bytes]:
        """Every rank's bytes, by rank: for the little that ranks must tell each other between steps."""
        if self.size == 1:
            return [data]
        sizes = [int(row[0]) for row in self.all_gather_floats([len(data)])]
        longest = max(sizes)
        if longest == 0:
            return [b""] * self.size
        device = "cuda" if dist.get_backend(self.group) == "nccl" else "cpu"
        mine = torch.zeros(longest, dtype=torch.uint8)
        mine[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else mine[:0]
        out = torch.empty(self.size * longest, dtype=torch.uint8, device=device)
        self.gather_into(out, mine.to(device))
        rows = out.cpu().view(self.size, longest).numpy()
        return [row[:size].tobytes() for row, size in zip(rows, sizes, strict=True)]

    def barrier(self) -> None:
        if self.size > 1:
            with self.traffic.held_up(self.name, "barrier"):
                dist.barrier(group=self.group)

    def wait(self, tensor: Tensor, op: str = "all_to_all") -> Tensor:
        """The result of a collective that was started on this axis, ready to be read."""
        with self.traffic.held_up(self.name, op):
            return _ops.wait_tensor(tensor)

    def _started(self, op: str, work: dist.Work | None) -> dist.Work | None:
        return None if work is None else _Work(work, self, op)

    @property
    def _group_name(self) -> str:
        assert self.group is not None
        return self.group.group_name

    def _gathered(self, tensor: Tensor, dim: int) -> Tensor:
        out = _ops.all_gather_into_tensor(tensor.contiguous(), self.size, self._group_name)
        self.traffic.add(self.name, "all_gather", out)
        out = self.wait(out, "all_gather")
        return out if dim == 0 else torch.cat(out.chunk(self.size), dim=dim)

    def _reduced(self, tensor: Tensor, dim: int) -> Tensor:
        assert tensor.shape[dim] % self.size == 0, (tuple(tensor.shape), dim, self.size)
        if dim != 0:
            tensor = torch.cat(tensor.chunk(self.size, dim=dim))
        self.traffic.add(self.name, "reduce_scatter", tensor)
        out = _ops.reduce_scatter_tensor(tensor.contiguous(), "sum", self.size, self._group_name)
        return self.wait(out, "reduce_scatter")


class _Work(dist.Work):
    """A collective under way; whoever waits for it is seen to."""

    def __init__(self, work: dist.Work, axis: Axis, op: str) -> None:
        super().__init__()
        self._work, self._axis, self._op = work, axis, op

    def wait(self, *timeout: Any) -> bool:
        with self._axis.traffic.held_up(self._axis.name, self._op):
            return self._work.wait(*timeout)


class _Moved(torch.autograd.Function):
    """A move of data `there`, whose transpose is `back`."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, there: Move, back: Move) -> Tensor:
        ctx.back = back
        return there(tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.back(grad), None, None


class CountedGather(AllGather):
    """FSDP2's gathering of weights, over an Axis."""

    def __init__(self, axis: Axis) -> None:
        self._axis = axis

    def allocate(self, size: Sequence[Any], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work | None:
        return self._axis.gather_into(output_tensor, input_tensor, async_op)


class CountedSum(ReduceScatter):
    """FSDP2's scattering of gradients, over an Axis, and always as a sum.

    FSDP2 would average over its own group; the losses here are parts of one global mean, and experts
    and the rest are spread over groups of different sizes, so only sums come out right.
    """

    def __init__(self, axis: Axis) -> None:
        self._axis = axis

    def allocate(self, size: Sequence[Any], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> dist.Work | None:
        return self._axis.reduce_scatter_into(output_tensor, input_tensor, async_op)


def from_first_rank(message: str | None) -> str | None:
    """What rank 0 of the whole job passes, on every rank."""
    box = [message]
    dist.broadcast_object_list(box, src=0)
    return box[0]
