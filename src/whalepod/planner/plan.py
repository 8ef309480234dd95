"""The answer to "how should it be trained on these GPUs?": search, the best pipelines played, reasons."""

from __future__ import annotations

import re
from dataclasses import replace
from types import MappingProxyType

from whalepod.planner import advice
from whalepod.planner.advice import MAX_COUNT, WORTH
from whalepod.planner.answers import Rejected, TrainingAnswer, TrainingPlan
from whalepod.planner.candidates import Candidates
from whalepod.planner.search import Search, TrainingJob, search
from whalepod.planner.training import Step
from whalepod.spec.counts import train_flops
from whalepod.spec.errors import UserError
from whalepod.spec.layout import Layout
from whalepod.spec.stages import split_stages


def plan_training(job: TrainingJob, top: int = 5) -> TrainingAnswer:
    """The best layouts for a job; without any that fits, what would.

    With precision `auto` those that the GPU has are tried; the answer's job then has the best plan's. Raises
    UserError for what no layout can mend (a precision the GPU does not have).
    """
    gpu = job.cluster.gpu
    if job.precision == "auto":
        return _best_precision(job, top)
    advice.check_network(job.cluster)
    if not gpu.supports(job.precision):
        others = " or ".join(p for p in ("bf16", "fp32") if gpu.supports(p))
        raise UserError(f"{gpu.name} has no {job.precision.upper()} matrix products; use {others}")
    try:
        found = search(job)
    except UserError as error:
        return TrainingAnswer(job, (), (Rejected(None, str(error)),), (str(error), *advice.fewer(job)), 0, 0)
    limit = job.limit_gib
    fits = found.need_gib <= limit
    rows = found.best(limit)
    # The estimate ranks, the played pipeline decides.
    played = sorted(
        ((found.times.time_step(row), row) for row in rows[: top + 5]), key=lambda x: x[0].seconds
    )
    plans = tuple(_plan(found, row, step) for step, row in played[:top])
    words = _advice(found, plans)
    return TrainingAnswer(
        job,
        plans,
        (*advice.too_large(found, rows), *advice.indivisible(job)),
        words,
        len(fits),
        int(fits.sum()),
    )


def _best_precision(job: TrainingJob, top: int) -> TrainingAnswer:
    """The answers of all precisions as one."""
    names = job.precisions
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
            plan for name in job.precisions if (plan := best_plan(replace(job, precision=name))) is not None
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


def time_run(job: TrainingJob, layout: Layout) -> TrainingPlan:
    """The same as `whalepod train` runs it: stages that nobody cut are cut by FLOPs, not by times."""
    if layout.pp > 1 and layout.stage_layers is None:
        split = split_stages(job.spec, layout.num_stages, job.sequence_length)
        layout = replace(layout, stage_layers=tuple(end - start for start, end in split.layers))
    return time_layout(job, layout)


def _plan(found: Search, row: int, step: Step) -> TrainingPlan:
    job, c = found.job, found.candidates
    gpu, n = job.cluster.gpu, job.cluster.num_gpus
    tokens = job.global_batch * job.sequence_length / step.seconds
    flops = train_flops(job.spec, job.sequence_length, mtp=job.mtp).total
    peak = gpu.peak_flops("bf16")
    layout = c.layout(row, devices_per_node=job.cluster.aligned)
    helps = advice.helps(found, row)
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
        warnings=tuple(advice.traps(job, layout, step)),
        usd_per_gpu_hour=price,
    )


def _advice(found: Search, plans: tuple[TrainingPlan, ...]) -> tuple[str, ...]:
    job = found.job
    if plans:
        best = plans[0]
        lines = [f"{h.change}: {h.gain:+.0%}" for h in best.helps[:3]]
        helps = [f"limited by {best.limited_by}; what would help: {', '.join(lines)}"] if lines else []
        return (*helps, *_twice_the_gpus(job, best))
    return advice.nothing_fits(found)


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
