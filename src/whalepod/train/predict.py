"""What the planner expects of a job on the very machine it runs on, to stand beside what is measured."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch

from whalepod.parallel.here import here, with_threads
from whalepod.planner.candidates import Candidates
from whalepod.planner.cut import cut
from whalepod.planner.plan import time_run
from whalepod.planner.search import TrainingJob
from whalepod.planner.software import own_software
from whalepod.planner.state import State, unit_counts
from whalepod.planner.traffic import step_traffic
from whalepod.spec.counts import GIB
from whalepod.spec.hardware import Cluster
from whalepod.spec.layout import Layout
from whalepod.spec.model import ModelSpec
from whalepod.spec.run import OptimizerConfig


@dataclass(frozen=True)
class Prediction:
    """Of one step. step_s, tokens_per_s: None where more workers than cores share a CPU, and in emulated FP8.

    hardware: the profile's title; calibrated: whether it was measured. memory_gib: allocated at the peak on
    the fullest rank; state_gib: weights, gradients, masters and moments at the end of a backward pass.
    bytes_by_axis: what the first rank hands to collectives, by axis.
    """

    hardware: str
    calibrated: bool
    step_s: float | None
    tokens_per_s: float | None
    memory_gib: float
    state_gib: float
    bytes_by_axis: Mapping[str, float]


def predict(
    spec: ModelSpec,
    layout: Layout,
    sequence_length: int,
    device: torch.device,
    threads: int = 1,
    optimizer: OptimizerConfig | None = None,
) -> Prediction | None:
    """The planner's figures for `layout` on devices like this one; None of one that no profile describes.

    threads: of each worker on a CPU, whose profile is of one thread. optimizer: None is the default one.
    """
    gpu = here(device)
    if gpu is None:
        return None
    busy = layout.num_devices * threads > gpu.gpus_per_node and device.type == "cpu"
    emulated = layout.precision == "fp8" and not gpu.supports("fp8")
    if emulated:  # by products in BF16, and by more that has no model
        gpu = replace(gpu, tflops={**gpu.tflops, "fp8": gpu.tflops["bf16"]})
    if device.type == "cpu":
        gpu = with_threads(gpu, threads)
    local = int(os.environ.get("LOCAL_WORLD_SIZE", layout.num_devices))
    cluster = Cluster(gpu, layout.num_devices, min(local, layout.num_devices))
    job = TrainingJob(
        *(spec, cluster, own_software(optimizer), layout.global_batch, sequence_length, layout.precision),
        mtp=spec.num_nextn_predict_layers > 0,
    )
    plan = time_run(job, layout)
    return Prediction(
        hardware=gpu.title,
        calibrated=gpu.measured is not None,
        step_s=None if busy or emulated else plan.step.seconds,
        tokens_per_s=None if busy or emulated else plan.tokens_per_s,
        memory_gib=plan.memory_allocated_gib,
        state_gib=_state_gib(spec, layout, job, sequence_length),
        bytes_by_axis={
            axis: sum(ops.values())
            for axis, ops in step_traffic(spec, layout, sequence_length, muon=job.software.state.muon).items()
        },
    )


def _state_gib(spec: ModelSpec, layout: Layout, job: TrainingJob, sequence_length: int) -> float:
    """Of the fullest pipeline rank when all gradients are there, which they need not be at the peak."""
    c = Candidates.of([layout])
    layers = cut(spec, layout.pp, int(c.stages[0]), layout.schedule, sequence_length, layout.stage_layers)
    held = State(spec, c, job.software.state).of(unit_counts(spec, layers), np.array([0]))
    return float((held["weights"] + held["gradients"] + held["optimizer"]).max()) / GIB
