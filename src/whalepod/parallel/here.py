"""The device that this process runs on, as the planner takes it."""

from __future__ import annotations

from dataclasses import replace

import torch

from whalepod.spec.errors import UserError
from whalepod.spec.hardware import Gpu, load_gpu, spelled_gpu
from whalepod.spec.measured import profile_name


def here(device: torch.device) -> Gpu | None:
    """This device's profile: the one that was measured, else the database's."""
    if device.type == "cpu":
        return load_gpu("cpu")
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    try:
        return load_gpu(profile_name(name))
    except UserError:
        return spelled_gpu(name)


def with_threads(gpu: Gpu, threads: int) -> Gpu:
    """Of workers that have so many cores each: arithmetic and memory so many times as fast."""
    return replace(
        gpu,  # what was measured counts in shares of these
        tflops={name: value * threads for name, value in gpu.tflops.items()},
        memory_tb_s=gpu.memory_tb_s * threads,
    )
