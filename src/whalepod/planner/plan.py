"""The answer to "how should it be trained on these GPUs?": plans with reasons, rejections, advice.

What limits a plan and what would help are not read off a table of shares: the plan is timed again with one
input changed, and the gain is what that input is worth.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np

from whalepod.planner.candidates import Candidates
from whalepod.planner.search import USABLE, Search, TrainingJob, default_batch, search
from whalepod.planner.training import Step
from whalepod.spec.counts import train_flops
from whalepod.spec.errors import UserError
from whalepod.spec.hardware import Cluster, Gpu, gpu_names, load_gpu
from whalepod.spec.layout import Layout

TRILLION = 1e12
MAX_COUNT = 16384
WORTH = 0.02  # of gain: less is not worth a line
CROWDED = 0.15  # of the step: communication that shows this much deserves a warning


@dataclass(frozen=True)
class Help:
    """One input changed, and the speed of the best plan then; `gain` 0.1 is ten per cent."""

    change: str
    gain: float


@dataclass(frozen=True)
class TrainingPlan:
    """A layout with what it brings. memory_by_rank: GiB by category for every pipeline rank.

    tflops_per_gpu: model TFLOP/s (recomputation is no model work). helps: sorted, the best first.
    """

    layout: Layout
    step: Step
    tokens_per_s: float
    num_gpus: int
    tflops_per_gpu: float
    mfu: float
    memory_gib: float
    memory_by_rank: tuple[Mapping[str, float], ...]
    limited_by: str
    helps: tuple[Help, ...]
    warnings: tuple[str, ...]
    usd_per_gpu_hour: float | None

    @property
    def tokens_per_s_per_gpu(self) -> float:
        return self.tokens_per_s / self.num_gpus

    @property
    def memory_by_category(self) -> Mapping[str, float]:
        """GiB of the fullest rank."""
        return max(self.memory_by_rank, key=lambda parts: sum(parts.values()))

    @property
    def usd_per_hour(self) -> float | None:
        return None if self.usd_per_gpu_hour is None else self.usd_per_gpu_hour * self.num_gpus

    @property
    def days_per_trillion_tokens(self) -> float:
        return TRILLION / self.tokens_per_s / 86400

    @property
    def gpu_hours_per_trillion_tokens(self) -> float:
        return self.days_per_trillion_tokens * 24 * self.num_gpus

    @property
    def usd_per_trillion_tokens(self) -> float | None:
        price = self.usd_per_gpu_hour
        return None if price is None else self.gpu_hours_per_trillion_tokens * price


@dataclass(frozen=True)
class Rejected:
    """What was not taken, and why; `layout` None where it cannot even be written down."""

    layout: Layout | None
    reason: str


@dataclass(frozen=True)
class TrainingAnswer:
    """plans: best first, one for each mesh. considered, fitting: layouts timed, and those that fit."""

    job: TrainingJob
    plans: tuple[TrainingPlan, ...]
    rejected: tuple[Rejected, ...]
    advice: tuple[str, ...]
    considered: int
    fitting: int


def plan_training(job: TrainingJob, top: int = 5) -> TrainingAnswer:
    """The best layouts for a job; without any that fits, what would.

    With precision `auto` those that the GPU has are tried; the answer's job then has the best plan's. Raises
    UserError for what no layout can mend (a precision the GPU does not have).
    """
    gpu = job.cluster.gpu
    if job.precision == "auto":
        return _best_precision(job, top)
    check_network(job.cluster)
    if not gpu.supports(job.precision):
        others = " or ".join(p for p in ("bf16", "fp32") if gpu.supports(p))
        raise UserError(f"{gpu.name} has no {job.precision.upper()} matrix products; use {others}")
    try:
        found = search(job)
    except UserError as error:
        return TrainingAnswer(job, (), (Rejected(None, str(error)),), (str(error), *_fewer(job)), 0, 0)
    limit = job.limit_gib
    fits = found.need_gib <= limit
    rows = found.best(limit)
    # The estimate ranks, the played pipeline decides.
    played = sorted(
        ((found.times.time_step(row), row) for row in rows[: top + 5]), key=lambda x: x[0].seconds
    )
    plans = tuple(_plan(found, row, step) for step, row in played[:top])
    advice = _advice(found, plans)
    return TrainingAnswer(
        job, plans, (*_too_large(found, rows), *_indivisible(job)), advice, len(fits), int(fits.sum())
    )


def precisions(job: TrainingJob) -> list[str]:
    """Those that `auto` stands for."""
    return [name for name in ("fp8", "bf16") if job.cluster.gpu.supports(name)]


def _best_precision(job: TrainingJob, top: int) -> TrainingAnswer:
    """The answers of all precisions as one."""
    names = precisions(job)
    answers = [plan_training(replace(job, precision=name), top) for name in names]
    plans = sorted((plan for answer in answers for plan in answer.plans), key=lambda plan: plan.step.seconds)
    first = plans[0].layout.precision if plans else names[0]
    best = next(answer for answer in answers if answer.job.precision == first)
    others = [
        Rejected(
            answer.plans[0].layout,
            f"{answer.job.precision.upper()} takes {answer.plans[0].step.seconds:.3g} s a step at best, "
            f"{answer.plans[0].step.seconds / plans[0].step.seconds:.2f} times as long as {first.upper()}",
        )
        for answer in answers
        if answer is not best and answer.plans
    ]
    return replace(
        best,
        plans=tuple(plans[:top]),
        rejected=(*others, *best.rejected),
        considered=sum(answer.considered for answer in answers),
        fitting=sum(answer.fitting for answer in answers),
    )


def best_plan(job: TrainingJob) -> TrainingPlan | None:
    """The first plan of `plan_training`, without looking for what would help."""
    if job.precision == "auto":
        plans = [
            plan for name in precisions(job) if (plan := best_plan(replace(job, precision=name))) is not None
        ]
        return min(plans, key=lambda plan: plan.step.seconds, default=None)
    try:
        found = search(job)
    except UserError:
        return None
    rows = found.best(job.limit_gib, 4)
    if not rows:
        return None
    step, row = min(((found.times.time_step(row), row) for row in rows), key=lambda x: x[0].seconds)
    return _plan(found, row, step)


def time_layout(job: TrainingJob, layout: Layout) -> TrainingPlan:
    """A plan of one given layout, whether it fits or not."""
    times = job.times(Candidates.of([layout]))
    found = Search(job, times, job.memory(times.candidates))
    return _plan(found, 0, times.time_step(0))


def _plan(found: Search, row: int, step: Step) -> TrainingPlan:
    job, c = found.job, found.candidates
    gpu, n = job.cluster.gpu, job.cluster.num_gpus
    tokens = job.global_batch * job.sequence_length / step.seconds
    flops = train_flops(job.spec, job.sequence_length, mtp=job.mtp).total
    peak = gpu.peak_flops("bf16")
    layout = c.layout(row, devices_per_node=job.cluster.aligned)
    helps = _helps(found, row)
    ranks = range(int(c.pp[row]))
    price = gpu.price.usd_per_hour if gpu.price else None
    return TrainingPlan(
        layout=layout,
        step=step,
        tokens_per_s=tokens,
        num_gpus=n,
        tflops_per_gpu=tokens * flops / n / 1e12,
        mfu=tokens * flops / n / peak if peak else float("nan"),
        memory_gib=float(found.need_gib[row]),
        memory_by_rank=tuple(MappingProxyType(found.memory.by_category(row, rank)) for rank in ranks),
        limited_by=re.split(" x2|:", helps[0].change)[0] if helps else "compute",
        helps=tuple(h for h in helps if h.gain >= WORTH),
        warnings=tuple(_warnings(job, layout, step)),
        usd_per_gpu_hour=price,
    )


def _helps(found: Search, row: int) -> list[Help]:
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


def _warnings(job: TrainingJob, layout: Layout, step: Step):
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


def _too_large(found: Search, fitting: list[int]) -> list[Rejected]:
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


def _indivisible(job: TrainingJob) -> list[Rejected]:
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


def _advice(found: Search, plans: tuple[TrainingPlan, ...]) -> tuple[str, ...]:
    job = found.job
    if plans:
        best = plans[0]
        lines = [f"{h.change}: {h.gain:+.0%}" for h in best.helps[:3]]
        helps = [f"limited by {best.limited_by}; what would help: {', '.join(lines)}"] if lines else []
        return (*helps, *_twice_the_gpus(job, best))
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
    return (*lines, *_fewer(job))


def _fewer(job: TrainingJob) -> list[str]:
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


def _twice_the_gpus(job: TrainingJob, best: TrainingPlan) -> list[str]:
    """What twice the GPUs bring to a plan of the same kind."""
    n, layout = 2 * job.cluster.num_gpus, best.layout
    if n > min(MAX_COUNT, job.cluster.most):
        return []
    same = {name: getattr(layout, name) for name in ("pp", "tp", "cp", "micro_batch", "recompute")}
    twice = best_plan(replace(job, cluster=job.cluster.of(n), pins={**job.pins, **same}))
    if twice is None:
        return []
    gain = twice.tokens_per_s / best.tokens_per_s
    return [f"{n:,} GPUs instead of {n // 2:,}: {gain:.2f} times the tokens/s, {gain / 2:.0%} efficiency"]


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
        return any(_fits_on(replace(job, precision=name), n) for name in precisions(job))
    lean = {**job.pins, "recompute": "full", "micro_batch": 1}
    length = job.sequence_length
    batch = job.global_batch if job.global_batch % n == 0 else default_batch(job.spec, n, length)
    try:
        found = search(replace(job, cluster=job.cluster.of(n), global_batch=batch, pins=lean))
    except UserError:
        return False
    return bool((found.need_gib <= job.limit_gib).any())
