"""A rank of a job that does not exist: torch's fake process group and fake tensors, in this one process.

Everything that runs is the program's own; tensors have shapes and no values, and collectives answer at once.
What needs true numbers (ranks of a mesh, offsets of shards) is computed outside the pretence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp._fully_shard import _fsdp_param
from torch.utils._python_dispatch import _disable_current_modes as truly

from whalepod.parallel import sharding
from whalepod.parallel.ledger import Ledger
from whalepod.parallel.mesh import Mesh, make_mesh, open_fake_world
from whalepod.spec.layout import Layout

DEVICE = torch.device("cpu")
"""Of the fake tensors. A build of torch without CUDA has no autograd for fake CUDA tensors."""


class _Mesh(Mesh):
    def device_mesh(self, name: str) -> DeviceMesh:
        with truly():
            return super().device_mesh(name)


@contextmanager
def pretend(layout: Layout, rank: int) -> Iterator[Mesh]:
    """This process as rank `rank` of a layout; fake tensors inside. Raises UserError within a real job."""
    with open_fake_world(rank, layout.num_devices), ExitStack() as stack:
        made = make_mesh(layout, DEVICE)
        place = "compute_local_shape_and_global_offset"
        stack.enter_context(replaced(sharding, place, _truly(getattr(sharding, place))))
        stack.enter_context(replaced(_fsdp_param, "_chunk_with_empty", _Chunks))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield _Mesh(made.device, made.layout, made.axes, made.traffic)


def answers(ledger: Ledger) -> None:
    """Mends what fakes do unlike the real ones, and gives a number, 1, to the few places of a step that read
    one from a tensor (a norm, a load)."""
    ledger.handlers[torch.ops.aten._local_scalar_dense.default] = lambda tensor: (
        1 if tensor.dtype in (torch.int32, torch.int64) else 1.0
    )
    ledger.handlers[torch.ops.aten._grouped_mm.default] = _grouped_mm
    # torch's fake of it makes a second tensor.
    ledger.handlers[torch.ops._c10d_functional.wait_tensor.default] = lambda tensor: tensor


_real_grouped_mm = torch.ops.aten._grouped_mm.default


def _grouped_mm(a: Tensor, b: Tensor, offs: Tensor | None = None, *more: Any, **named: Any) -> Tensor:
    if a.dtype == torch.bfloat16:
        return _real_grouped_mm(a, b, offs, *more, **named)
    # torch's own fake of it takes BF16 only.
    if b.dim() == 3:
        return a.new_empty(a.shape[0], b.shape[2])
    assert offs is not None
    return a.new_empty(offs.shape[0], a.shape[0], b.shape[1])


class _Chunks:
    """`torch.chunk` along a dimension, each piece made when it is asked for: FSDP2 cuts every parameter into
    as many as there are ranks, to keep one."""

    def __init__(self, tensor: Tensor, num_chunks: int, dim: int) -> None:
        self._tensor, self._count, self._dim = tensor, num_chunks, dim

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Tensor:
        length = self._tensor.shape[self._dim]
        size = -(-length // self._count)
        start = min(index * size, length)
        if start == length and index:
            return self._tensor.new_empty(0)
        return self._tensor.narrow(self._dim, start, min(size, length - start))


def _truly(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        with truly():
            return function(*args)

    return call


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
