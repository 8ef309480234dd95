"""The answer to "how should it be served on these GPUs?": deployments with reasons, rejections, advice.

What would help is not read off a table of shares: the best deployment is timed again with one input changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from whalepod.planner.advice import WORTH
from whalepod.planner.answers import Help
from whalepod.planner.serve_layout import ServeLayout, Worker, is_latent
from whalepod.planner.serve_search import candidates, pareto, search_serving
from whalepod.planner.serve_software import load_software
from whalepod.planner.serve_step import Traffic
from whalepod.planner.serve_worker import Workload
from whalepod.planner.serving import ServeEstimate, build, estimate, steady
from whalepod.spec.errors import UserError
from whalepod.spec.hardware import Cluster, Gpu, override_gpu
from whalepod.spec.model import ModelSpec

MAX_REJECTED = 4
MAX_CHARS = 300


@dataclass(frozen=True)
class ServingJob:
    """What the planner is asked to serve on a cluster. concurrency None: each layout's best.

    drafts: tokens that multi-token prediction speculates per step. pins: sizes that every worker must have.
    usual: the limits are the usual ones, and fall where nothing keeps them.
    """

    spec: ModelSpec
    cluster: Cluster
    precision: str
    engine: str
    isl: int
    osl: int
    concurrency: float | None
    ttft_limit_s: float | None
    tpot_limit_s: float | None
    modes: tuple[str, ...]
    drafts: int
    traffic: Traffic
    pins: Mapping[str, int] = field(default_factory=dict)
    usual: bool = False


@dataclass(frozen=True)
class ServingAnswer:
    """plans: the best first. front: what no other deployment beats in both speed for a user and throughput.
    rejected: (layout in words, reason)."""

    job: ServingJob
    plans: tuple[ServeEstimate, ...]
    front: tuple[ServeEstimate, ...]
    rejected: tuple[tuple[str, str], ...]
    advice: tuple[str, ...]
    considered: int
    helps: tuple[Help, ...] = ()


def plan_serving(job: ServingJob, top: int = 5, front: bool = True) -> ServingAnswer:
    """The best deployments of a job; without any that fits, what would. front False: no more than that.

    Raises UserError for what no layout can mend (a precision the GPU does not have).
    """
    limits = {"ttft_limit_s": job.ttft_limit_s, "tpot_limit_s": job.tpot_limit_s}
    asked = (job.spec, job.cluster, job.isl, job.osl, job.precision, job.engine)
    more: dict[str, Any] = {"modes": job.modes, "drafts": job.drafts, "traffic": job.traffic}
    found = search_serving(*asked, **limits, **more)
    if job.usual and not found.plans:
        unlimited = plan_serving(replace(job, ttft_limit_s=None, tpot_limit_s=None, usual=False), top, front)
        if unlimited.plans:
            return unlimited
    plans, advice = found.plans, list(found.advice)
    if job.concurrency is not None and plans:
        plans = _at_concurrency(job)
        if not plans:
            advice.append(
                f"nothing keeps the limits at {job.concurrency:,.0f} requests in flight: ask for fewer"
            )
    if job.pins:
        fit, plans = bool(plans), [plan for plan in plans if pinned(job, plan.layout)]
        advice += [] if plans else _why_not(job, fit)
    rejected = {r.reason.removeprefix(f"{r.layout}: ")[:MAX_CHARS]: r.layout for r in found.rejected}
    # The smallest layouts come first; what is worth reading is what the larger ones lack, once each.
    nearest = tuple((layout, reason) for reason, layout in reversed(rejected.items()))[:MAX_REJECTED]
    shown = front and bool(plans)
    return ServingAnswer(
        job,
        tuple(plans[:top]),
        tuple(pareto(*asked, **more)) if shown and not job.pins else (),
        nearest,
        tuple(advice),
        found.candidates,
        _helps(job, plans[0], found.plans[0]) if shown else (),
    )


def pinned(job: ServingJob, layout: ServeLayout) -> bool:
    """Whether every worker of a layout has the sizes that were given."""
    workers = [layout.decode] + ([layout.prefill] if layout.prefill else [])
    return all(getattr(w, axis) == size for w in workers for axis, size in job.pins.items())


def _why_not(job: ServingJob, fit: bool) -> list[str]:
    """Why no layout has the given sizes; fit: others do fit."""
    asked = ", ".join(f"{axis} {size}" for axis, size in job.pins.items())
    tp, pp, ep = (job.pins.get(axis, 1) for axis in ("tp", "pp", "ep"))
    whole = ep > 1 and tp % ep == 0
    try:
        worker = Worker(tp=tp, pp=pp, ep=ep if whole else 1, moe_tp=tp // ep if whole else tp)
        worker.check(job.spec, job.precision)
    except UserError as error:
        return [f"no layout with {asked}: {error}"]
    return [f"layouts fit, but none with {asked}: leave it out to see them"] if fit else []


def _helps(job: ServingJob, plan: ServeEstimate, best: ServeEstimate) -> tuple[Help, ...]:
    """The deployment timed again with one input doubled, and the best deployment of twice the memory."""
    gpu = job.cluster.gpu
    software = load_software(job.engine, gpu, job.precision)
    work = Workload(job.isl, job.osl, drafts=job.drafts)

    def speed(changed: Gpu) -> float:
        cluster = replace(job.cluster, gpu=changed)
        found = estimate(
            job.spec, cluster, plan.layout, work, plan.concurrency, job.precision, software, job.traffic
        )
        return found.output_tokens_per_s

    now = speed(gpu)
    changes = {
        "compute x2": replace(gpu, tflops={p: 2 * t for p, t in gpu.tflops.items()}),
        "memory bandwidth x2": override_gpu(gpu, memory_tb_s=2 * gpu.memory_tb_s),
    }
    if gpu.scale_up is not None:
        changes[f"{gpu.scale_up.name} x2"] = override_gpu(gpu, scale_up_gb_s=2 * gpu.scale_up.gb_s)
    if gpu.nic_gb_s is not None and job.cluster.num_gpus > job.cluster.domain:
        changes["network x2"] = override_gpu(gpu, nic_gb_s=2 * gpu.nic_gb_s)
    helps = [Help(change, speed(changed) / now - 1) for change, changed in changes.items()]
    if job.concurrency is None and not job.pins:
        larger = replace(job.cluster, gpu=override_gpu(gpu, memory_gib=2 * gpu.memory_gib))
        more = search_serving(
            *(job.spec, larger, job.isl, job.osl, job.precision, job.engine),
            ttft_limit_s=job.ttft_limit_s, tpot_limit_s=job.tpot_limit_s,
            modes=job.modes, drafts=job.drafts, traffic=job.traffic,
        ).plans  # fmt: skip
        if more:
            gain = more[0].output_tokens_per_s / best.output_tokens_per_s - 1
            helps.append(Help("memory x2, for more requests in flight", gain))
    return tuple(sorted((h for h in helps if h.gain >= WORTH), key=lambda h: -h.gain))


def _at_concurrency(job: ServingJob) -> list[ServeEstimate]:
    """Every deployment at the job's own concurrency, within its limits, the best first."""
    software = load_software(job.engine, job.cluster.gpu, job.precision)
    work = Workload(job.isl, job.osl, drafts=job.drafts)
    wanted = np.array([float(job.concurrency or 1)])
    out = []
    for each in candidates(job.spec, job.cluster, work, job.precision, software, job.modes, job.traffic, []):
        plan = build(
            each.layout, each.decode, each.prefill, steady(each.layout, each.decode, each.prefill, wanted), 0
        )
        late = job.ttft_limit_s is not None and plan.ttft_s > job.ttft_limit_s
        if not late and (job.tpot_limit_s is None or plan.tpot_s <= job.tpot_limit_s):
            out.append(plan)
    return sorted(out, key=lambda e: -e.output_tokens_per_s)


def serving_traps(plan: ServeEstimate, job: ServingJob) -> list[str]:
    """What users of other tools ran into with layouts of this kind."""
    worker, node = plan.layout.decode, job.cluster.domain
    lines: list[str] = []
    if worker.tp > 1 and is_latent(job.spec):
        lines.append(
            f"the latent cache is the same on all {worker.tp} tensor-parallel ranks: TP {worker.tp} holds no "
            "more tokens than TP 1 beside the weights; attention by data parallelism does"
        )
    if worker.tp > node:
        lines.append(f"tensor parallelism over {worker.tp} GPUs leaves the fast domain of {node}")
    plain = job.cluster.gpu.scale_up is None and job.cluster.gpu.architecture != "cpu"
    if plain and worker.stage_gpus > 1:
        lines.append(f"{job.cluster.gpu.name} has no fast link: every layer's exchange runs over PCIe")
    idle = job.cluster.num_gpus - plan.layout.num_gpus
    if idle:
        lines.append(f"{idle} of {job.cluster.num_gpus} GPUs are left over by this layout")
    return lines
