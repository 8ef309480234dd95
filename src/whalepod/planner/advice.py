"""What limits a plan, what would help, what traps it walks into, and what would fit where nothing does.

What limits a plan and what would help are not read off a table of shares: the plan is timed again with one
input changed, and the gain is what that input is worth.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from whalepod.planner.answers import Help, Rejected
from whalepod.planner.search import USABLE, Search, TrainingJob, default_batch, search
from whalepod.planner.training import Step
from whalepod.spec.errors import UserError
from whalepod.spec.hardware import Cluster, Gpu, gpu_names, load_gpu
from whalepod.spec.layout import Layout

MAX_COUNT = 16384
WORTH = 0.02  # of gain: less is not worth a line
CROWDED = 0.15  # of the step: communication that shows this much deserves a warning


def helps(found: Search, row: int) -> list[Help]:
    """The layout timed again with one input doubled, and the best layout of twice the memory."""
    job, times = found.job, found.times
    one = replace(times, candidates=times.candidates.take([row]))
    now = float(one.estimate[0])
    gpu, soft = job.cluster.gpu, job.software

    def gain(**changes: object) -> float:
        return now / float(replace(one, **changes).estimate[0]) - 1  # type: ignore[arg-type]

    def on(changed: Gpu) -> Cluster:
        return replace(job.cluster, gpu=changed)

    link = gpu.scale_up
    helps = [
        Help("compute x2", gain(cluster=on(replace(gpu, tflops={p: 2 * t for p, t in gpu.tflops.items()})))),
        Help("memory bandwidth x2", gain(cluster=on(replace(gpu, memory_tb_s=2 * gpu.memory_tb_s)))),
        Help("host launches x2 faster", gain(software=soft.with_(host_us=soft.host_us / 2))),
    ]
    if link is not None:
        faster = replace(link, gb_s=2 * link.gb_s)
        usable = gpu.usable_scale_up_gb_s and 2 * gpu.usable_scale_up_gb_s
        changed = replace(gpu, scale_up=faster, usable_scale_up_gb_s=usable)
        helps.append(Help(f"{link.name} x2", gain(cluster=on(changed))))
    elif gpu.pcie_gb_s:
        helps.append(Help("PCIe x2", gain(cluster=on(replace(gpu, pcie_gb_s=2 * gpu.pcie_gb_s)))))
    if gpu.nic_gb_s and job.cluster.num_gpus > job.cluster.domain:
        helps.append(Help("network x2", gain(cluster=on(replace(gpu, nic_gb_s=2 * gpu.nic_gb_s)))))
    if job.imbalance > 1:
        helps.append(Help("experts balanced", gain(imbalance=1.0)))
    c = one.candidates
    if int(c.pp[0]) > 1:
        full = int(c.global_batch[0]) * 4
        longer = replace(one, candidates=replace(c, global_batch=np.array([full])))
        helps.append(Help("bubble: a global batch x4", 4 * now / float(longer.estimate[0]) - 1))
    more = found.best(2 * found.job.limit_gib, 1)
    if more:
        helps.append(Help("memory x2", now / float(times.estimate[more[0]]) - 1))
    return sorted(helps, key=lambda h: -h.gain)


def traps(job: TrainingJob, layout: Layout, step: Step) -> Iterator[str]:
    """The traps that users of other tools fell into."""
    domain, soft = job.cluster.domain, job.software
    link = job.cluster.gpu.scale_up.name if job.cluster.gpu.scale_up else "PCIe"
    if layout.tp > domain:
        yield (
            f"tensor parallelism over {layout.tp} GPUs leaves the {link} domain of {domain}: "
            f"use tp {domain} or less"
        )
    shown = step.exposed
    if layout.ep > domain and shown.get("ep", 0.0) > CROWDED * step.seconds:
        share = shown["ep"] / step.seconds
        hint = "; software that overlaps it would hide most" if soft.overlap is False else ""
        yield f"experts' exchange crosses the network: {share:.0%} of the step waits for it{hint}"
    gpu = job.cluster.gpu
    if gpu.scale_up is None and gpu.architecture != "cpu" and max(layout.tp, layout.ep) > 1:
        yield f"{gpu.name} has no fast link: tensor and expert parallelism run over PCIe"
    if layout.pp > 1 and layout.accumulation_steps < 2 * layout.pp:
        yield (
            f"{layout.accumulation_steps} micro-batches for {layout.pp} pipeline stages: "
            f"{step.bubble / step.seconds:.0%} of the step is bubble"
        )


def too_large(found: Search, fitting: list[int]) -> list[Rejected]:
    """Layouts that would be faster than the best plan, but do not fit."""
    limit, times, c = found.job.limit_gib, found.times, found.candidates
    bar = times.estimate[fitting[0]] if fitting else np.inf
    out: list[Rejected] = []
    for row in found.best(2 * limit, 3):
        if found.need_gib[row] <= limit or times.estimate[row] > bar:
            continue
        parts = found.memory.by_category(row)
        largest = sorted(parts.items(), key=lambda x: -x[1])[:2]
        named = ", ".join(f"{name} {gib:.1f}" for name, gib in largest)
        faster = "" if np.isinf(bar) else f"{bar / times.estimate[row] - 1:.0%} faster, but "
        out.append(
            Rejected(
                c.layout(row, devices_per_node=found.job.cluster.aligned),
                f"{faster}needs {found.need_gib[row]:.1f} GiB of {limit:.1f} usable ({named})",
            )
        )
    return out


def indivisible(job: TrainingJob) -> list[Rejected]:
    """Widths of tensor parallelism that people try and the model refuses."""
    out: list[Rejected] = []
    for tp in (2, 4, 8, 16, 32):
        if job.cluster.num_gpus % tp == 0:
            try:
                layout = Layout(tp=tp, precision=job.precision)  # type: ignore[arg-type]
                layout.check_model(job.spec, job.sequence_length)
            except UserError as error:
                out.append(Rejected(None, str(error)))
    return out[:2]


def fewer(job: TrainingJob) -> list[str]:
    """A rounder number of GPUs that the job fits on, where the given one is odd."""
    n = job.cluster.num_gpus
    for unit in (64, 32, 16, 8):
        fewer = n // unit * unit
        if 0 < fewer < n and _fits_on(job, fewer):
            return [f"{fewer:,} of the {n:,} GPUs would do: they divide evenly"]
    return []


def check_network(cluster: Cluster) -> None:
    """Raises UserError where nobody knows how fast nodes speak to each other."""
    if cluster.num_gpus > cluster.most:
        raise UserError(
            f"the network between nodes of {cluster.gpu.name} is not known: give GB/s per GPU with --nic-gb-s"
        )


def smallest_count(job: TrainingJob, at_least: int | None = None) -> int | None:
    """The least power of two of GPUs that hold the job, more than it has (or `at_least`), to MAX_COUNT."""
    n = 1
    while n < (at_least or job.cluster.num_gpus + 1):
        n *= 2
    while n <= MAX_COUNT:
        if _fits_on(job, n):
            return n
        n *= 2
    return None


def _fits_on(job: TrainingJob, n: int) -> bool:
    """Whether the leanest layout fits on `n` of the job's GPUs."""
    if job.precision == "auto":
        return any(_fits_on(replace(job, precision=name), n) for name in job.precisions)
    lean = {**job.pins, "recompute": "full", "micro_batch": 1}
    length = job.sequence_length
    batch = job.global_batch if job.global_batch % n == 0 else default_batch(job.spec, n, length)
    try:
        found = search(replace(job, cluster=job.cluster.of(n), global_batch=batch, pins=lean))
    except UserError:
        return False
    return bool((found.need_gib <= job.limit_gib).any())


def nothing_fits(found: Search) -> tuple[str, ...]:
    """The smallest changes after which something would."""
    job = found.job
    leanest = int(found.need_gib.argmin())
    need, gpu, n = float(found.need_gib[leanest]), job.cluster.gpu, job.cluster.num_gpus
    parts = sorted(found.memory.by_category(leanest).items(), key=lambda x: -x[1])[:3]
    named = ", ".join(f"{name} {gib:,.1f}" for name, gib in parts)
    lines = [
        f"nothing fits: the leanest of {len(found.need_gib):,} layouts needs {need:,.1f} GiB on a GPU "
        f"({named}), and {job.limit_gib:.1f} of {gpu.memory_gib:g} GiB are usable"
    ]
    if (count := smallest_count(job)) is not None:
        network = "" if count <= job.cluster.most else ", whose network is not known: give it with --nic-gb-s"
        lines.append(f"smallest change: {count} x {gpu.name} instead of {n}{network}")
    enough = [
        other.name
        for other in map(load_gpu, gpu_names())
        if other.memory_gib * USABLE >= need and other.supports(job.precision) and other.name != "cpu"
    ]
    if enough:
        lines.append(f"or {n} GPUs with {need / USABLE:,.0f} GiB and more each: {', '.join(enough)}")
    return (*lines, *fewer(job))
