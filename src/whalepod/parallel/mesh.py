"""The one place that starts processes' groups: from a Layout to this process's axes.

Which ranks belong together is the Layout's to say (`Layout.group`); here a process group is made
for every set of ranks that this process is in, once, however many names it goes by.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from whalepod.parallel import shm
from whalepod.parallel.comm import Axis, Traffic
from whalepod.parallel.rounds import round_store
from whalepod.spec.errors import UserError
from whalepod.spec.layout import GROUPS, Layout

_FLIGHT_RECORDER = {"TORCH_FR_BUFFER_SIZE": "2000", "TORCH_NCCL_DUMP_ON_TIMEOUT": "1"}
"""NCCL's own record of collectives, written to /tmp/nccl_trace_rank_* when one times out."""


@dataclass(frozen=True)
class Mesh:
    """This process's place: its device, its layout, and an Axis for every name in `GROUPS`."""

    device: torch.device
    layout: Layout
    axes: dict[str, Axis]
    traffic: Traffic = field(default_factory=Traffic)

    def __getitem__(self, name: str) -> Axis:
        return self.axes[name]

    @property
    def world(self) -> Axis:
        return self.axes["world"]

    @property
    def is_first(self) -> bool:
        return self.world.rank == 0

    def device_mesh(self, name: str) -> DeviceMesh:
        """One of the axes as torch's own one-dimensional mesh, as FSDP2 takes it."""
        ranks = self.layout.group(name, self.world.rank)
        group: Any = self.axes[name].group
        if group is None:  # a mesh needs one even alone
            group = dist.new_group(ranks, use_local_synchronization=True)
        return DeviceMesh.from_group(group, self.device.type, mesh=ranks, mesh_dim_names=(name,))


def world_size() -> int:
    """Processes that a launcher has started, 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_device(kind: str) -> torch.device:
    """`auto`, `cpu` or `cuda` as the device of this process."""
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    return (
        torch.device(kind, int(os.environ.get("LOCAL_RANK", "0"))) if kind == "cuda" else torch.device(kind)
    )


@contextmanager
def open_mesh(layout: Layout, device: torch.device) -> Iterator[Mesh]:
    """Starts the process group and ends it on the way out: NCCL on CUDA, elsewhere shared memory between
    the workers of a host and gloo between hosts.

    A layout of one device runs without any group. Raises UserError when the launcher started
    another number of processes than the layout needs.
    """
    layout.check_devices(world_size())
    if layout.num_devices == 1:
        yield make_mesh(layout, device)
        return
    with open_world(device):
        yield make_mesh(layout, device)


@contextmanager
def open_world(device: torch.device) -> Iterator[None]:
    """The group of all processes that a launcher has started, ended on the way out."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
        for name, value in _FLIGHT_RECORDER.items():
            os.environ.setdefault(name, value)
    store, rank, size = next(dist.rendezvous("env://"))
    dist.init_process_group(
        "nccl" if device.type == "cuda" else shm.register(),
        store=round_store(store, rank, size),
        rank=rank,
        world_size=size,
    )
    try:
        yield
    finally:
        dist.destroy_process_group()
        # FSDP2's modules hold groups in reference cycles; gloo's threads must end before the process.
        gc.collect()


@contextmanager
def open_fake_world(rank: int, size: int) -> Iterator[None]:
    """A world of `size` ranks in which this process is one and the others do not exist: collectives answer at
    once, with nothing. Raises UserError within a real one."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise UserError("a dry run is one process of its own: start it without torchrun")
    dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()
        gc.collect()


Groups = dict[tuple[int, ...], Any]


def make_mesh(layout: Layout, device: torch.device, groups: Groups | None = None) -> Mesh:
    """This process's place in a layout of all processes; within `open_world` unless it is alone.

    Several meshes, one after the other, can share process groups through `groups`.
    """
    traffic = Traffic()
    if layout.num_devices == 1:
        return Mesh(device, layout, {name: Axis(name, traffic=traffic) for name in GROUPS}, traffic)
    return Mesh(device, layout, _axes(layout, traffic, {} if groups is None else groups), traffic)


def _axes(layout: Layout, traffic: Traffic, made: Groups) -> dict[str, Axis]:
    rank = dist.get_rank()
    everyone = tuple(range(dist.get_world_size()))
    made[everyone] = dist.group.WORLD
    axes = {}
    for name in GROUPS:
        ranks = tuple(layout.group(name, rank))
        # Only its members make a group: thousands of ranks need not hear of every pair. But torch names
        # it after the number of groups that each has made before, which must therefore be the same on
        # all: ranks between the ends of a pipeline make one of themselves.
        if ranks not in made and (len(ranks) > 1 or (name == "ends" and layout.pp > 2)):
            made[ranks] = dist.new_group(list(ranks), use_local_synchronization=True)
        group = made[ranks] if len(ranks) > 1 else None
        axes[name] = Axis(name, len(ranks), ranks.index(rank), group, traffic)
    return axes
