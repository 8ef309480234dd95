"""A whole job's dry run: the ranks that differ, each in a process, beside the planner's times and limits."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import torch

from whalepod.dryrun.findings import Finding, findings
from whalepod.dryrun.role import Measured, measure
from whalepod.parallel import processes
from whalepod.planner.answers import TrainingPlan
from whalepod.planner.plan import time_run
from whalepod.planner.search import TrainingJob
from whalepod.planner.software import own_software
from whalepod.spec.counts import GIB
from whalepod.spec.errors import UserError
from whalepod.spec.hardware import Cluster
from whalepod.spec.layout import Layout
from whalepod.spec.model import ModelSpec
from whalepod.spec.run import RunConfig

T = TypeVar("T")
MAX_RANKS = 16384
ROLES = ("all", "ends", "first")
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class DryRun:
    """What a job's step would do on a cluster. roles: by pipeline rank; each stands for `same` ranks.

    extra_gib: what the libraries take besides tensors, by category (the planner's constants, not counted).
    plan: the planner's figures for the same layout, times among them. notes: what was run in another way.
    """

    config: RunConfig
    spec: ModelSpec
    cluster: Cluster
    layout: Layout
    roles: tuple[Measured, ...]
    same: int
    extra_gib: dict[str, float]
    plan: TrainingPlan
    limit_gib: float
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]

    def memory_gib(self, role: Measured) -> float:
        """What a GPU of this role needs: counted tensors, and what libraries take besides."""
        return role.peak / GIB + sum(self.extra_of(role).values())

    def extra_of(self, role: Measured) -> dict[str, float]:
        held = role.peak / GIB + self.extra_gib["workspace"]
        return {**self.extra_gib, "fragmentation": self.extra_gib["fragmentation"] * held}

    @property
    def fits(self) -> bool:
        return all(self.memory_gib(role) <= self.limit_gib for role in self.roles)


def dry_run(
    config: RunConfig,
    cluster: Cluster,
    *,
    rank: int | None = None,
    roles: str = "all",
    imbalance: float = 1.0,
    progress: Progress | None = None,
) -> DryRun:
    """The job's training step on `cluster`, on fake devices: on `rank` alone, or on one rank of each role.

    roles: `all` pipeline ranks, the first and last (`ends`), or the `first`. Raises UserError for a layout
    that the model, the cluster or the program cannot have.
    """
    spec, layout = config.model_spec(), config.make_layout()
    _check(config, spec, layout, cluster, rank)
    notes = []
    if layout.exchange == "auto" and layout.ep > 1:
        notes.append("exchange auto is counted as two_hop: DeepEP sends the same rows where it is installed")
    if config.lora.r:
        notes.append("seconds are those of training all weights: the planner knows of no frozen ones")
    ranks = [rank] if rank is not None else one_of_each(layout, roles)
    on_gpu = cluster.gpu.architecture != "cpu"
    one = partial(measure, config, spec, on_gpu=on_gpu, imbalance=imbalance)
    measured = measure_all(one, ranks, progress)
    own = own_software(config.optimizer)
    software = own.on(cluster)
    job = TrainingJob(
        *(spec, cluster, own, layout.global_batch, config.data.sequence_length),
        *(layout.precision, imbalance),
    )
    plan = time_run(job, layout)
    parts = plan.memory_by_category
    extra = {name: parts[name] for name in ("workspace", "overhead")}
    extra["fragmentation"] = software.overhead.fragmentation
    run = DryRun(
        *(config, spec, cluster, layout, measured, layout.num_devices // layout.pp, extra, plan),
        *(job.limit_gib, (), tuple(notes)),
    )
    needs = [run.memory_gib(role) for role in measured]
    return replace(run, findings=tuple(findings(job, layout, measured, needs, plan.warnings)))


def check_cluster(layout: Layout, cluster: Cluster) -> None:
    """Raises UserError for a layout of another size than the cluster, or beyond what is run dry."""
    if layout.num_devices != cluster.num_gpus:
        sizes = " x ".join(
            f"{a} {getattr(layout, a)}" for a in ("pp", "dp_replicate", "dp_shard", "cp", "tp")
        )
        raise UserError(
            f"the layout is for {layout.num_devices} devices ({sizes}), but --gpus says {cluster.num_gpus}; "
            f"change the layout, or use --gpus {layout.num_devices}x{cluster.gpu.name}"
        )
    if layout.num_devices > MAX_RANKS:
        raise UserError(f"a dry run is of at most {MAX_RANKS} ranks, not {layout.num_devices}")


def _check(config: RunConfig, spec: ModelSpec, layout: Layout, cluster: Cluster, rank: int | None) -> None:
    check_cluster(layout, cluster)
    if rank is not None and not 0 <= rank < layout.num_devices:
        raise UserError(f"--rank must be from 0 to {layout.num_devices - 1}, not {rank}")
    length = config.data.sequence_length
    if length > spec.max_position_embeddings:
        raise UserError(
            f"data.sequence_length {length} exceeds the model's {spec.max_position_embeddings} positions"
        )
    layout.check_model(spec, length)


def one_of_each(layout: Layout, roles: str) -> list[int]:
    """One rank of each role: ranks of one pipeline place do the same as each other."""
    each = layout.num_devices // layout.pp
    places = {"all": range(layout.pp), "ends": sorted({0, layout.pp - 1}), "first": [0]}[roles]
    return [place * each for place in places]


def measure_all(one: Callable[[int], T], ranks: Sequence[int], progress: Progress | None) -> tuple[T, ...]:
    """What `one` finds of each rank, several at once in processes of their own."""

    def say(done: int) -> None:
        if progress is not None:
            progress("ranks", done, len(ranks))

    say(0)
    if len(ranks) == 1:
        found = (one(ranks[0]),)
        say(1)
        return found
    workers = min(len(os.sched_getaffinity(0)), len(ranks))
    with ProcessPoolExecutor(workers, mp_context=processes.context(), initializer=_one_thread) as pool:
        # The last rank has the head in slices and takes longest: it goes first.
        jobs = {pool.submit(one, rank): rank for rank in reversed(ranks)}
        done: dict[int, T] = {}
        for job in as_completed(jobs):
            done[jobs[job]] = job.result()
            say(len(done))
    return tuple(done[rank] for rank in ranks)


def _one_thread() -> None:
    torch.set_num_threads(1)
