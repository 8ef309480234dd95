"""The whole calibration: kernels on one device, then collectives among all.

A CPU is workers of one thread. They share its memory, so that one is measured while all are at work.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.synchronize import Semaphore

import torch

from whalepod.calibrate.collectives import time_collectives
from whalepod.calibrate.kernels import QUICK, Progress, Sizes, short, time_kernels
from whalepod.calibrate.profile import check_name, cores, described, machine_name, today
from whalepod.calibrate.serving import time_serving
from whalepod.parallel import processes
from whalepod.parallel.mesh import local_device
from whalepod.spec.hardware import Gpu
from whalepod.spec.measured import Measured

MAX_WORKERS = 8


def calibrate(
    *,
    name: str | None = None,
    quick: bool = False,
    sizes: Sizes | None = None,
    device: str = "auto",
    progress: Progress | None = None,
) -> Gpu:
    """This machine as the planner takes it. `name`: `cpu` without CUDA, else the device's with `-here`."""
    if name is not None:
        check_name(name)
    sizes = sizes or (QUICK if quick else Sizes())
    place = local_device(device)
    report = progress or (lambda stage, done, total: None)
    workers = min(MAX_WORKERS, torch.cuda.device_count() if place.type == "cuda" else cores())
    with _one_thread(place), _others_busy(place, workers, sizes):
        kernels = time_kernels(place, sizes, report)
        served = time_serving(sizes, report) if place.type == "cpu" else None
    stream_peak = kernels.pop("peak_gb_s")
    collectives, steps = time_collectives(place, workers, sizes, report)
    gpu = described(place, name, kernels["products"], stream_peak)
    measured = Measured(
        date=today(),
        machine=machine_name(place),
        torch=str(torch.__version__),
        peak_tflops=gpu.tflops,
        peak_gb_s=short(gpu.memory_tb_s * 1e3),
        collectives=collectives,
        quick=quick,
        served=served and replace(served, steps=(*served.steps, *steps)),
        **kernels,
    )
    return replace(gpu, measured=measured)


@contextmanager
def _one_thread(place: torch.device) -> Iterator[None]:
    before = torch.get_num_threads()
    if place.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _others_busy(place: torch.device, workers: int, sizes: Sizes) -> Iterator[None]:
    """The other cores do the same kernels meanwhile."""
    context = processes.context()
    ready = context.Semaphore(0)
    others = [
        context.Process(target=_keep_busy, args=(sizes, ready), daemon=True)
        for _ in range(workers - 1 if place.type == "cpu" else 0)
    ]
    for other in others:
        other.start()
    try:
        for _ in others:
            ready.acquire()
        yield
    finally:
        for other in others:
            other.terminate()
            other.join()


def _keep_busy(sizes: Sizes, ready: Semaphore) -> None:
    place = torch.device("cpu")
    with _one_thread(place):
        ready.release()
        while True:
            time_kernels(place, sizes, lambda stage, done, total: None)
            time_serving(sizes, lambda stage, done, total: None)
