"""The whole checkup in one call: alone it starts local workers, under a launcher it joins.

found = doctor(load_run("run.yaml"))
found.status, found.checks
"""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.elastic.multiprocessing.errors import record

from whalepod.doctor import between
from whalepod.doctor.probe import Report, examine, nearest_folder
from whalepod.doctor.verdict import Check, Needs, Status, judge, pairs, worst
from whalepod.parallel.mesh import local_device, open_mesh, world_size
from whalepod.planner.goodput import state_bytes
from whalepod.planner.software import own_software
from whalepod.spec.errors import UserError
from whalepod.spec.layout import Layout
from whalepod.spec.run import RunConfig
from whalepod.train.predict import predict
from whalepod.train.start import compile_once, start_workers, take_cores, worker_threads

MAX_WORKERS = 8
MAX_LOCAL = 64
TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Checkup:
    """status: the worst of the checks'. reports: one of each rank; empty where they never came together."""

    status: Status
    checks: tuple[Check, ...]
    reports: tuple[Report, ...]
    layout: Layout

    def as_json(self) -> dict[str, Any]:
        """Stable keys with units; `links`: of pairs of ranks, `ranks`: everything that each found."""
        return {
            "status": self.status,
            "num_ranks": self.layout.num_devices,
            "num_hosts": len({report.host_id for report in self.reports}),
            "checks": [asdict(check) for check in self.checks],
            "links": [asdict(pair) for pair in pairs(self.reports)],
            "ranks": [asdict(report) for report in self.reports],
        }


def doctor(config: RunConfig | None = None, *, timeout_s: float = TIMEOUT_S) -> Checkup:
    """Checks the machines that a job would run on; the same answer on every rank of a launcher.

    config: the job, whose layout, memory and folder are then checked for; None checks what is there. A rank
    that waits for longer than timeout_s in one step says so on stderr and exits 1. Raises UserError for bad
    input.
    """
    config = _closed(config)
    under_launcher = "RANK" in os.environ
    kind = "auto" if config is None else config.device
    layout = _layout(config, kind, under_launcher)
    folder = Path("." if config is None else config.out)
    needs = Needs() if config is None else _needs(config, layout, local_device(kind))
    if under_launcher:
        layout.check_devices(world_size())
    if under_launcher or layout.num_devices == 1:
        reports = checkup_of_rank(layout, kind, folder, timeout_s)
    else:
        compile_once(None)
        threads = _threads(config, layout, kind)
        try:
            reports = start_workers(layout.num_devices, threads, _worker, layout, kind, folder, timeout_s)[0]
        except RuntimeError as error:
            lost = Check("workers", "failed", str(error).splitlines()[0], "see what the worker says above")
            return Checkup("failed", (lost,), (), layout)
    checks = judge(reports, layout, needs)
    return Checkup(worst(checks), checks, tuple(reports), layout)


def checkup_of_rank(layout: Layout, kind: str, folder: Path, timeout_s: float) -> list[Report]:
    """Every rank's report, on every rank."""
    device, watch = local_device(kind), _Watch(timeout_s)
    with watch.step("joining the other ranks"):
        opened = open_mesh(layout, device)
        mesh = opened.__enter__()
    try:
        world, on_disk = mesh.world, nearest_folder(folder)
        with watch.step("examining itself"):
            world.barrier()
            mine = examine(device, world.rank, on_disk)
        with watch.step("clocks"):
            clock, error = between.clock_offset(world)
        with watch.step("the run's folder"):
            seen = between.sees_first(world, on_disk)
        with watch.step("links"):
            links = tuple(between.time_links(world, device))
        with watch.step("collectives"):
            axes, wrong = between.check_axes(mesh)
        disk = mine.disk and replace(mine.disk, sees_first=seen)
        found = replace(
            mine, disk=disk, clock_s=clock, clock_error_s=error, links=links, axes=axes, wrong=wrong
        )
        with watch.step("telling each other"):
            return [Report.from_json(data) for data in world.share(found.to_json())]
    finally:
        opened.__exit__(None, None, None)


@record
def _worker(layout: Layout, kind: str, folder: Path, timeout_s: float, threads: int | None) -> list[Report]:
    take_cores(threads)
    return checkup_of_rank(layout, kind, folder, timeout_s)


class _Watch:
    """Ends this process when a step lasts too long: nothing else ends a wait for a rank that never comes."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        timer = threading.Timer(self._timeout_s, self._give_up, (name,))
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _give_up(self, name: str) -> None:
        rank = os.environ.get("RANK", "0")
        print(
            f"whalepod: rank {rank} on {socket.gethostname()} has waited {self._timeout_s:.0f} s at: {name}. "
            "A rank that is silent here is missing, or cannot be reached",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)


def _closed(config: RunConfig | None) -> RunConfig | None:
    """With what `train` would try set to what takes least memory."""
    if config is None or not config.is_open:
        return config
    least = {"micro_batch": 1, "recompute": "full"}
    return config.with_layout(**{k: v for k, v in least.items() if getattr(config.layout, k) == "auto"})


def _layout(config: RunConfig | None, kind: str, under_launcher: bool) -> Layout:
    if config is not None:
        layout = config.make_layout()
        if not under_launcher and local_device(kind).type == "cpu" and layout.num_devices > MAX_LOCAL:
            raise UserError(
                f"the layout has {layout.num_devices} ranks: start `whalepod doctor` under torchrun on their "
                f"hosts (alone it starts at most {MAX_LOCAL} on CPUs)"
            )
        return layout
    on_cuda = local_device(kind).type == "cuda"
    here = torch.cuda.device_count() if on_cuda else len(os.sched_getaffinity(0))
    number = world_size() if under_launcher else min(MAX_WORKERS, here)
    return Layout(dp_replicate=number, global_batch=number)


def _threads(config: RunConfig | None, layout: Layout, kind: str) -> int | None:
    if config is not None:
        return worker_threads(config)
    return None if local_device(kind).type == "cuda" else 1


def _needs(config: RunConfig, layout: Layout, device: torch.device) -> Needs:
    """What the job takes of each rank and of the disk."""
    spec = config.model_spec()
    layout.check_model(spec, config.data.sequence_length)
    length, optimizer = config.data.sequence_length, config.optimizer
    planned = None if config.lora.r else predict(spec, layout, length, device, optimizer=optimizer)
    size = 0.0 if config.lora.r else state_bytes(spec, own_software(optimizer).state)
    return Needs(
        memory_gib=None if planned is None else planned.memory_gib,
        checkpoint_gib=size / 2**30,
        checkpoints=config.train.keep_checkpoints + 1,  # the next is written before the oldest goes
        fp8=layout.precision == "fp8",
    )
