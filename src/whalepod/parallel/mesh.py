"""The one place that starts processes' groups: from a Layout to the axes of a device mesh."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from whalepod.parallel.comm import Axis, Traffic
from whalepod.spec.layout import Layout


@dataclass(frozen=True)
class Mesh:
    """This process's place: device, torch's mesh (None alone), and the data-parallel axis.

    `data` spans dp_replicate x dp_shard: every rank of it reads other sequences.
    """

    device: torch.device
    data: Axis
    device_mesh: DeviceMesh | None = None
    traffic: Traffic = field(default_factory=Traffic)

    @property
    def is_first(self) -> bool:
        return self.data.rank == 0


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
    """Starts the process group (NCCL on CUDA, gloo elsewhere) and ends it on the way out.

    A layout of one device runs without any group. Raises UserError when the launcher started
    another number of processes than the layout needs.
    """
    layout.check_devices(world_size())
    traffic = Traffic()
    if layout.num_devices == 1:
        yield Mesh(device, Axis("dp", traffic=traffic), traffic=traffic)
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        names = ("dp_replicate", "dp_shard")
        device_mesh = init_device_mesh(
            device.type, (layout.dp_replicate, layout.dp_shard), mesh_dim_names=names
        )
        data = Axis("dp", dist.get_world_size(), dist.get_rank(), dist.group.WORLD, traffic)
        yield Mesh(device, data, device_mesh, traffic)
    finally:
        dist.destroy_process_group()
        # FSDP2's modules hold groups in reference cycles; gloo's threads must end before the process.
        gc.collect()
