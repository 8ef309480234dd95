"""Collectives among local workers, over the backend that training uses here, by size and number of ranks; and
the engine's steps among all of them."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.distributed.elastic.multiprocessing.errors import record

from whalepod.calibrate.kernels import Sizes, short
from whalepod.calibrate.serving import shared_steps
from whalepod.parallel.comm import Axis
from whalepod.parallel.mesh import Groups, local_device, make_mesh, open_world
from whalepod.spec.layout import Layout
from whalepod.spec.measured import Collective, EngineStep
from whalepod.train.metrics import synchronize
from whalepod.train.start import compile_once, start_workers, take_cores


def time_collectives(
    place: torch.device, workers: int, sizes: Sizes, report: Callable[[str, int, int], None]
) -> tuple[tuple[Collective, ...], tuple[EngineStep, ...]]:
    """All operations on tensors of `sizes` bytes, among 2, 4, ... and all of the workers; on CPUs decode
    steps, too, that all of them share."""
    if workers < 2 or not sizes.collectives:
        return (), ()
    on_cpu = place.type == "cpu"
    if on_cpu:
        compile_once(report)
    report("collectives", 0, 1)
    rows, steps = start_workers(workers, 1 if on_cpu else None, _worker, place.type, sizes)[0]
    report("collectives", 1, 1)
    return tuple(Collective(*row) for row in rows), tuple(EngineStep(*step) for step in steps)


@record
def _worker(
    kind: str, sizes: Sizes, threads: int | None
) -> tuple[list[tuple[Any, ...]], list[tuple[Any, ...]]]:
    take_cores(threads)
    place = local_device(kind)
    world = int(os.environ["WORLD_SIZE"])
    rows: list[tuple[Any, ...]] = []
    steps: list[tuple[Any, ...]] = []
    groups: Groups = {}
    with open_world(place):
        for ranks in (n for n in range(2, world + 1) if world % n == 0 and (n & (n - 1) == 0 or n == world)):
            # The other groups of as many ranks work at the same time, as they do in training.
            layout = Layout(dp_replicate=world // ranks, dp_shard=ranks, global_batch=world)
            mesh = make_mesh(layout, place, groups)
            for size in sizes.collectives:
                rows += [
                    (op, ranks, size, s) for op, s in _collectives(mesh["fsdp"], mesh.world, size, place)
                ]
        if place.type == "cpu" and world & (world - 1) == 0:
            steps += shared_steps(sizes.budget_s, world, groups)
    return rows, steps


def _collectives(axis: Axis, world: Axis, size: int, place: torch.device) -> Iterator[tuple[str, float]]:
    """(operation, seconds of the slowest rank) on tensors of `size` bytes in BF16, sums in FP32."""
    n = axis.size
    wide, narrow = max(size // 4 // n, 1) * n, max(size // 2 // n, 1) * n
    sums, row = torch.zeros(wide, device=place), torch.zeros(narrow, dtype=torch.bfloat16, device=place)
    out, part, split = torch.zeros_like(row), torch.zeros(wide // n, device=place), [narrow // n] * n
    calls: dict[str, Callable[[], Any]] = {
        "all_reduce": lambda: axis.all_reduce(sums),
        "all_gather": lambda: axis.gather_into(out, row[: narrow // n]),
        "reduce_scatter": lambda: axis.reduce_scatter_into(part, sums),
        "all_to_all": lambda: axis.wait(axis.start_all_to_all(row, split, split)),
        "send": lambda: axis.shift_into(out, row),
    }
    repeats, rounds = (20, 7) if size <= 2**16 else (3, 7) if size <= 2**20 else (1, 5)
    for op, call in calls.items():
        samples = []
        call()
        for _ in range(rounds):
            world.barrier()
            start = time.perf_counter()
            for _ in range(repeats):
                call()
            synchronize(place)
            samples.append((time.perf_counter() - start) / repeats)
        every = world.all_gather_floats([statistics.median(samples)])
        yield op, short(max(row[0] for row in every))
