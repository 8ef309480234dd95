"""The dry run of serving: a decode step and a prefill step of the very engine, at true size, on fake devices.

What runs is the engine's own model (`parallel/inference.py`) over its own paged cache with the scheduler's
runs, up to the logits; only the picking of tokens, which reads numbers, is left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from whalepod.dryrun.findings import Finding
from whalepod.dryrun.norms import fuse_norms
from whalepod.dryrun.role import GRAIN_SHARE, stage_name, thinned
from whalepod.dryrun.roles import check_cluster, measure_all, one_of_each
from whalepod.dryrun.routing import draw_picks, settle
from whalepod.dryrun.tally import Counts, Tally
from whalepod.dryrun.world import answers, pretend
from whalepod.parallel.inference import Inference, check_serving, spread
from whalepod.parallel.ledger import Ledger
from whalepod.planner.serve_layout import check_links, deployment
from whalepod.planner.serve_measured import served
from whalepod.planner.serve_memory import CONTEXT_BYTES, RESERVE_SHARE
from whalepod.planner.serve_pass import pass_parts
from whalepod.planner.serve_software import OWN_ENGINE, load_software
from whalepod.planner.serve_step import Step as PlannedStep
from whalepod.planner.serve_step import Traffic
from whalepod.serve.core import PAGE_SIZE
from whalepod.serve.paged import PagedCache
from whalepod.serve.scheduler import Run
from whalepod.serve.scheduler import Sequence as Served
from whalepod.spec.counts import GIB
from whalepod.spec.errors import UserError
from whalepod.spec.hardware import Cluster
from whalepod.spec.layout import Layout
from whalepod.spec.model import ModelSpec

Progress = Callable[[str, int, int], None]
SLOW_SHARE = 0.25
"""Of a step that the experts' exchange over the network may take before it is worth a word: wide expert
parallelism crosses nodes by design."""


@dataclass(frozen=True)
class Load:
    """What a replica serves. batch: sequences that write, each with `context` tokens in the cache. prefill:
    tokens of a prompt that go through the model at once."""

    batch: int
    context: int
    prefill: int


@dataclass(frozen=True)
class Step:
    """One pass of a rank. peak: bytes of tensors at the fullest moment, by category; where that was.
    timeline: (share of the pass's operations, bytes by category)."""

    kind: str
    peak: int
    categories: dict[str, int]
    peak_at: str
    counts: Counts
    timeline: tuple[tuple[float, dict[str, int]], ...]


@dataclass(frozen=True)
class ServingRole:
    """A rank's steps, and what it holds: layers, parameters, bytes of weights, bytes of cache for the whole
    load."""

    rank: int
    stages: tuple[str, ...]
    layers: tuple[int, ...]
    parameters: int
    weights: int
    cache: int
    steps: tuple[Step, ...]


@dataclass(frozen=True)
class ServingDryRun:
    """A load on a cluster. extra_gib: what libraries take besides tensors (the planner's constant). times:
    seconds of each step by part, by the planner's kernel and network models; empty where it cannot tell."""

    spec: ModelSpec
    cluster: Cluster
    layout: Layout
    load: Load
    roles: tuple[ServingRole, ...]
    same: int
    extra_gib: float
    limit_gib: float
    times: dict[str, dict[str, float]]
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]

    def memory_gib(self, role: ServingRole) -> float:
        """What a GPU of this role needs in its fullest step."""
        return max(step.peak for step in role.steps) / GIB + self.extra_gib

    @property
    def fits(self) -> bool:
        return all(self.memory_gib(role) <= self.limit_gib for role in self.roles)

    def seconds(self, kind: str) -> float | None:
        """Of the `decode` or `prefill` step."""
        return sum(self.times[kind].values()) if kind in self.times else None

    def room(self, role: ServingRole) -> int:
        """Sequences of this context that a replica has room for on this role's GPUs, beside a step."""
        work = max(step.peak for step in role.steps) - role.weights - role.cache
        each = role.cache / self.load.batch
        free = (self.limit_gib - self.extra_gib) * GIB - role.weights - work
        return max(0, int(free / each)) if each else 0


def serving_dry_run(
    spec: ModelSpec,
    layout: Layout,
    cluster: Cluster,
    load: Load,
    *,
    roles: str = "all",
    imbalance: float = 1.0,
    progress: Progress | None = None,
) -> ServingDryRun:
    """Raises UserError for a layout that the model, the cluster or serving cannot have."""
    check_cluster(layout, cluster)
    check_serving(spec, layout)
    if load.context + 1 > spec.max_position_embeddings or load.prefill > spec.max_position_embeddings:
        raise UserError(f"{spec.name} has {spec.max_position_embeddings} positions")
    notes = ["weights and cache are BF16: the engine keeps nothing in FP8 yet"]
    if layout.exchange == "auto" and layout.ep > 1:
        notes.append("exchange auto is counted as two_hop: DeepEP sends the same rows where it is installed")
    # Serving knows no FSDP: each replica holds its attention whole.
    layout = replace(
        layout, micro_batch=1, global_batch=layout.num_replicas, recompute="none", precision="bf16"
    )
    on_gpu = cluster.gpu.architecture != "cpu"
    one = partial(measure_serving, spec, layout, load, on_gpu=on_gpu, imbalance=imbalance)
    measured = measure_all(one, one_of_each(layout, roles), progress)
    times: dict[str, dict[str, float]] = {}
    try:
        times, more = step_times(spec, layout, cluster, load, imbalance)
        notes += more
    except UserError as error:
        notes.append(f"no times: {error}")
    run = ServingDryRun(
        *(spec, cluster, layout, load, measured, layout.num_devices // layout.pp),
        *(CONTEXT_BYTES / GIB * on_gpu, cluster.gpu.memory_gib * (1 - RESERVE_SHARE)),
        *(times, (), tuple(notes)),
    )
    return replace(run, findings=tuple(serving_findings(run)))


def step_times(
    spec: ModelSpec, layout: Layout, cluster: Cluster, load: Load, imbalance: float = 1.0
) -> tuple[dict[str, dict[str, float]], tuple[str, ...]]:
    """Seconds by part of the decode and of the prefill step of the engine on that cluster, and what to know
    of the kernels. Raises UserError where the planner cannot tell."""
    worker, gpu = deployment(layout).decode, cluster.gpu
    check_links(cluster, worker.num_gpus)
    precision = served(gpu)[1].precision if gpu.architecture == "cpu" else "bf16"
    software = load_software(OWN_ENGINE, gpu, precision)
    step = PlannedStep(spec, worker, cluster, software, precision, Traffic(imbalance=imbalance))
    ranks = worker.dp
    return {
        "decode": pass_parts(step, load.batch, load.context + 1, (), load.batch, load.batch * ranks),
        "prefill": pass_parts(step, 0, 0, [(0, load.prefill)], 1, load.prefill * ranks),
    }, software.notes


def serving_findings(run: ServingDryRun) -> Iterator[Finding]:
    """What breaks the load first, then what slows it."""
    worst = max(run.roles, key=run.memory_gib)
    if not run.fits:
        step = max(worst.steps, key=lambda each: each.peak)
        largest = max(step.categories, key=lambda name: step.categories[name])
        room = min(run.room(role) for role in run.roles)
        remedy = (
            f"serve at most {room:,} such sequences at once"
            if room
            else "spread the weights over more GPUs: pp, tp, or ep for the experts"
        )
        yield Finding(
            "memory",
            worst.rank,
            step.peak_at,
            f"the {step.kind} step needs {run.memory_gib(worst):.1f} GiB of {run.limit_gib:.1f} usable; most "
            f"is {largest}, {step.categories[largest] / GIB:.1f} GiB",
            remedy,
        )
    domain, layout = run.cluster.domain, run.layout
    parts = {"tp": "all_reduce", "ep": "exchange"}
    for axis, span in (("tp", layout.tp), ("ep", layout.ep)):
        if span <= domain:
            continue
        share = max(
            (times.get(parts[axis], 0.0) / sum(times.values()) for times in run.times.values()), default=0.0
        )
        sent = max(
            (n for role in run.roles for step in role.steps for (a, _), n in step.counts.bytes.items()
             if a.startswith(axis)),
            default=0,
        )  # fmt: skip
        if axis == "tp" or share > SLOW_SHARE:
            yield Finding(
                "network",
                run.roles[0].rank,
                axis,
                f"{axis} {span} sends {sent / GIB:.3f} GiB a step, and its groups leave the fast domain of "
                f"{domain} GPUs: up to {share:.0%} of a step",
                f"make {axis} at most {domain}" + (", if the experts fit there" if axis == "ep" else ""),
            )


def measure_serving(
    spec: ModelSpec, layout: Layout, load: Load, rank: int, *, on_gpu: bool = True, imbalance: float = 1.0
) -> ServingRole:
    """Runs a decode and a prefill step as rank `rank` and counts."""
    with pretend(layout, rank) as mesh, torch.no_grad():
        inference = spread(spec, mesh, torch.bfloat16, lambda name, box: torch.empty(box.shape))
        parts = [*inference.stages.values()]
        if on_gpu:
            for part in parts:
                fuse_norms(part)
        if spec.moe is not None:
            settle(parts, partial(draw_picks, spec.moe, ep=layout.ep, imbalance=imbalance))
        work = runs_of(load.batch, load.context, load.prefill)
        pages = sum(len(run.sequence.holding.pages) for runs in work.values() for run in runs)
        cache = PagedCache(inference, pages, PAGE_SIZE, mtp=False)
        weights = [t for part in parts for t in (*part.parameters(), *part.buffers())]
        steps = []
        for kind, runs in work.items():
            ledger = Ledger([(name, m) for part in parts for name, m in part.named_modules()])
            answers(ledger)
            ledger.hold(weights, "weights")
            ledger.hold(cache.rows.values(), "cache")
            held = Counter(ledger.live)
            ledger.begin(grain=int(ledger.total * GRAIN_SHARE))
            tally = Tally(mesh.traffic, ledger, -1)
            before = tally.now()
            with ledger, tally:
                one_pass(inference, cache, runs)
            counts = tally.now().more(-1, before)
            kept = {k: v for k, v in ledger.peak.categories.items() if v}
            steps.append(Step(kind, ledger.peak.bytes, kept, ledger.peak.where, counts, thinned(ledger)))
        return ServingRole(
            rank=rank,
            stages=tuple(stage_name(part) for part in parts),
            layers=tuple(attention.layer for attention in inference.layers),
            parameters=sum(p.numel() for part in parts for p in part.parameters()),
            weights=held["weights"],
            cache=held["cache"],
            steps=tuple(steps),
        )


def runs_of(batch: int, context: int, prefill: int) -> dict[str, list[Run]]:
    """A step in which `batch` sequences write behind `context` tokens, and one that reads in `prefill`."""
    pages, prompt_pages = -(-(context + 1) // PAGE_SIZE), -(-prefill // PAGE_SIZE)
    places = [range(index * pages, (index + 1) * pages) for index in range(batch)]
    prompt = range(batch * pages, batch * pages + prompt_pages)
    return {
        "decode": [_run(context, 1, place) for place in places],
        "prefill": [_run(0, prefill, prompt)],
    }


def _run(start: int, count: int, pages: range) -> Run:
    served = Served([0] * (start + count), start + count, start + count + 1, computed=start)
    served.holding.pages = [*pages]
    return Run(served, start, count, (), True)


def one_pass(inference: Inference, cache: PagedCache, runs: Sequence[Run]) -> None:
    """A step up to the logits; tokens and positions do not matter to what it takes."""
    tokens = torch.zeros(sum(run.end - run.start for run in runs), dtype=torch.int64)
    positions = torch.zeros_like(tokens)
    hidden = inference.hidden(tokens, positions, cache.step(runs))
    last = torch.zeros(len(runs), dtype=torch.int64)
    inference.logits(hidden, last)
