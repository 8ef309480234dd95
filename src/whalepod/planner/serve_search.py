"""The best serving layouts of a cluster, and the front of throughput against each user's speed.

Workers are timed once per shape; concurrencies are one numpy array, so that some thousands of candidates
(layouts times concurrencies) take a fraction of a second.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from whalepod.planner.serve_layout import ServeLayout, Worker, check_links, check_precision
from whalepod.planner.serve_memory import serve_memory
from whalepod.planner.serve_software import Engine, load_software
from whalepod.planner.serve_step import DEFAULT_TRAFFIC, Traffic
from whalepod.planner.serve_worker import WorkerModel, Workload, need_memory
from whalepod.planner.serving import ServeEstimate, build, steady
from whalepod.spec.errors import UserError
from whalepod.spec.hardware import Cluster
from whalepod.spec.model import ModelSpec

_CONCURRENCY = np.unique(np.round(2.0 ** (np.arange(0, 209) / 8.0)))
"""1 to 67 million in steps of an eighth of a doubling; a layout takes as many as it has room for."""
_MOST_WAIT = 10.0
"""Times that the first token may take, of what it takes a request alone: beyond, requests only queue."""
_NEARLY = 0.95
"""Of a layout's most tokens per second: what lies beyond is bought with everyone's latency."""
_MOST_WORKER_GPUS = 320
"""The widest unit DeepSeek describes (V3, section 3.4.2)."""
_PREFILL_CHOICES = 3
_SPLITS = (1.0, 0.7, 1.3)
"""Decode workers tried, of the number at which neither pool waits."""


@dataclass(frozen=True)
class Rejected:
    layout: str
    reason: str


@dataclass(frozen=True)
class ServeSearch:
    """`plans`: one per layout, each at its best concurrency within the limits, the best first. `rejected`:
    layouts that do not divide, do not fit or miss a limit. `advice`: if nothing is left, what would help.
    candidates: layouts times concurrencies that were timed."""

    plans: list[ServeEstimate]
    rejected: list[Rejected]
    advice: list[str]
    candidates: int = 0


@dataclass(frozen=True)
class Candidate:
    """A layout at all concurrencies of the grid: arrays by name as `steady` returns them."""

    layout: ServeLayout
    decode: WorkerModel
    prefill: WorkerModel | None
    concurrency: np.ndarray
    numbers: Mapping[str, np.ndarray] = field(hash=False)

    @property
    def output_tokens_per_s(self) -> np.ndarray:
        return self.numbers["requests_per_s"] * self.decode.work.osl

    @property
    def sensible(self) -> np.ndarray:
        """Whether every request has cache, and no long queue before it."""
        if self.prefill is None:
            room = self.numbers["admitted"] >= 0.999 * self.concurrency
        else:
            room = self.numbers["batch"] <= 0.999 * self.decode.most_requests
        ttft = self.numbers["ttft_s"]
        return room & (ttft <= _MOST_WAIT * ttft[0])

    def at(self, index: int) -> ServeEstimate:
        return build(self.layout, self.decode, self.prefill, self.numbers, index)


def search_serving(
    spec: ModelSpec,
    cluster: Cluster,
    isl: int,
    osl: int,
    precision: str,
    engine: str | Engine,
    *,
    ttft_limit_s: float | None = None,
    tpot_limit_s: float | None = None,
    modes: tuple[str, ...] = ("aggregated", "disaggregated"),
    drafts: int = 0,
    acceptance: float = 0.8,
    traffic: Traffic = DEFAULT_TRAFFIC,
) -> ServeSearch:
    """Layouts by output tokens per second of the whole cluster within the limits, the best first.

    A layout's concurrency is the least that brings 95 % of its most tokens per second, of those within the
    limits at which no request waits for cache, nor ten times as long as it would take alone.

    Raises UserError for a precision that the GPU lacks, or an unknown engine.
    """
    software = _software(engine, cluster, precision)
    work = Workload(isl, osl, drafts=drafts, acceptance=acceptance)
    work.check(spec)
    rejected: list[Rejected] = []
    plans: list[ServeEstimate] = []
    count = 0
    for candidate in candidates(spec, cluster, work, precision, software, modes, traffic, rejected):
        count += len(candidate.concurrency)
        numbers = candidate.numbers
        allowed = candidate.sensible
        if ttft_limit_s is not None:
            allowed &= numbers["ttft_s"] <= ttft_limit_s
        if tpot_limit_s is not None:
            allowed &= numbers["tpot_s"] <= tpot_limit_s
        if not allowed.any():
            rejected.append(Rejected(str(candidate.layout), _missed(numbers, ttft_limit_s, tpot_limit_s)))
            continue
        output = np.where(allowed, candidate.output_tokens_per_s, -1.0)
        plans.append(candidate.at(int(np.argmax(output >= _NEARLY * output.max()))))
    plans.sort(key=lambda e: -e.output_tokens_per_s)
    advice = [] if plans else _advice(spec, cluster, work, precision, software, rejected)
    return ServeSearch(plans, rejected, advice, count)


def pareto(
    spec: ModelSpec,
    cluster: Cluster,
    isl: int,
    osl: int,
    precision: str,
    engine: str | Engine,
    *,
    modes: tuple[str, ...] = ("aggregated", "disaggregated"),
    drafts: int = 0,
    acceptance: float = 0.8,
    traffic: Traffic = DEFAULT_TRAFFIC,
) -> list[ServeEstimate]:
    """The estimates that no other beats in both output tokens/s per GPU and tokens/s per user, the fastest
    for a user first."""
    software = _software(engine, cluster, precision)
    work = Workload(isl, osl, drafts=drafts, acceptance=acceptance)
    work.check(spec)
    points: list[tuple[float, float, Candidate, int]] = []
    for candidate in candidates(spec, cluster, work, precision, software, modes, traffic, []):
        per_gpu = candidate.output_tokens_per_s / candidate.layout.num_gpus
        per_user = 1.0 / candidate.numbers["tpot_s"]
        points += [
            (float(per_user[i]), float(per_gpu[i]), candidate, int(i))
            for i in np.flatnonzero(candidate.sensible)
        ]
    points.sort(key=lambda p: (-p[0], -p[1]))
    front, best = [], 0.0
    for _, per_gpu, candidate, index in points:
        if per_gpu > best * 1.001:
            best = per_gpu
            front.append(candidate.at(index))
    return front


def candidates(
    spec: ModelSpec,
    cluster: Cluster,
    work: Workload,
    precision: str,
    software: Engine,
    modes: tuple[str, ...],
    traffic: Traffic,
    rejected: list[Rejected],
) -> Iterator[Candidate]:
    """All layouts that fit, timed at all concurrencies; the others go to `rejected`."""
    models: list[WorkerModel] = []
    for worker in workers(spec, cluster.num_gpus, cluster.gpus_per_node):
        model = WorkerModel(spec, cluster, worker, software, precision, work, traffic)
        try:
            worker.check(spec, precision)
            need_memory(model)
            check_links(cluster, worker.num_gpus)
        except UserError as error:
            rejected.append(Rejected(str(worker), str(error)))
            continue
        models.append(model)
    if "aggregated" in modes:
        for model in models:
            yield _timed(ServeLayout(model.worker, _replicas(cluster, model.worker)), model, None)
    if "disaggregated" in modes:
        for layout, decode, prefill in _pairs(models, cluster.num_gpus):
            try:
                layout.check_links(cluster)
            except UserError as error:
                rejected.append(Rejected(str(layout), str(error)))
                continue
            yield _timed(layout, decode, prefill)


def _replicas(cluster: Cluster, worker: Worker) -> int:
    """Workers on the cluster; without a network each within a domain."""
    if cluster.nic_gb_s is not None:
        return cluster.num_gpus // worker.num_gpus
    domains, rest = divmod(cluster.num_gpus, cluster.most)
    return domains * (cluster.most // worker.num_gpus) + rest // worker.num_gpus


def workers(spec: ModelSpec, num_gpus: int, per_node: int) -> Iterator[Worker]:
    """Shapes of one worker: attention TP within a node, data-parallel attention across; experts by width or
    whole; pipeline stages of nodes."""
    sizes = {2**i for i in range(13)} | {
        i for i in range(per_node, num_gpus + 1, per_node) if num_gpus % i == 0
    }
    for stage in sorted(s for s in sizes if s <= min(num_gpus, _MOST_WORKER_GPUS)):
        for tp in (t for t in (1, 2, 4, 8, 16) if stage % t == 0):
            dp = stage // tp
            if dp > 1 and tp > per_node:
                continue
            if spec.moe is None and dp > 1:
                continue
            # Experts whole on every GPU, split by width, or half and half.
            experts = {(1, stage), (stage, 1)} if spec.moe is not None else {(stage, 1)}
            if spec.moe is not None and tp not in (1, stage):
                experts.add((tp, dp))
            for moe_tp, ep in sorted(experts):
                yield Worker(tp=tp, dp=dp, ep=ep, moe_tp=moe_tp)
                for pp in (2, 4):
                    if dp == 1 and stage * pp <= num_gpus and stage >= min(per_node, 8):
                        yield Worker(tp=tp, dp=dp, ep=ep, moe_tp=moe_tp, pp=pp)


def _pairs(
    models: list[WorkerModel], num_gpus: int
) -> Iterator[tuple[ServeLayout, WorkerModel, WorkerModel]]:
    """Prefill pools of the quickest workers beside each decode worker, split so that neither waits."""
    rate = {m: 1.0 / (m.prompt_busy_s * m.worker.num_gpus) for m in models if m.worker.pp == 1}
    quick = sorted(rate, key=lambda m: -rate[m])[:_PREFILL_CHOICES]
    for decode in models:
        size = decode.worker.num_gpus
        batch = max(1.0, min(decode.most_requests, 64.0 * decode.worker.dp))
        per_gpu = batch / (decode.work.osl * float(decode.decode_s(batch))) / size
        for prefill in quick:
            other = prefill.worker.num_gpus
            if size + other > num_gpus:
                continue
            wanted = num_gpus * rate[prefill] / (rate[prefill] + per_gpu) / size
            tried: set[int] = set()
            for factor in _SPLITS:
                number = int(np.clip(round(wanted * factor), 1, (num_gpus - other) // size))
                if number in tried:
                    continue
                tried.add(number)
                pool = (num_gpus - number * size) // other
                yield ServeLayout(decode.worker, number, prefill.worker, pool), decode, prefill


def _timed(layout: ServeLayout, decode: WorkerModel, prefill: WorkerModel | None) -> Candidate:
    top = 1.5 * decode.most_requests * layout.num_decode
    grid = _CONCURRENCY[: max(1, int(np.searchsorted(_CONCURRENCY, top, side="right")))]
    return Candidate(layout, decode, prefill, grid, steady(layout, decode, prefill, grid))


def _software(engine: str | Engine, cluster: Cluster, precision: str) -> Engine:
    check_precision(cluster.gpu.name, cluster.gpu.tflops, precision)
    return engine if isinstance(engine, Engine) else load_software(engine, cluster.gpu, precision)


def _missed(numbers: Mapping[str, np.ndarray], ttft: float | None, tpot: float | None) -> str:
    parts = []
    if ttft is not None:
        parts.append(f"TTFT at best {1e3 * numbers['ttft_s'].min():.0f} ms (limit {1e3 * ttft:.0f})")
    if tpot is not None:
        parts.append(f"TPOT at best {1e3 * numbers['tpot_s'].min():.1f} ms (limit {1e3 * tpot:.1f})")
    return "; ".join(parts) or "no concurrency at which every request has cache"


def _advice(
    spec: ModelSpec,
    cluster: Cluster,
    work: Workload,
    precision: str,
    software: Engine,
    rejected: list[Rejected],
) -> list[str]:
    """The smallest changes after which something would fit."""
    lines = []
    if any("limit" in r.reason for r in rejected):
        lines.append("layouts fit, but none meets the limits: relax TTFT or TPOT, or shorten the prompts")
    for narrower in ("fp8", "fp4"):
        if narrower in cluster.gpu.tflops and precision not in (narrower, "fp4"):
            lines.append(f"try {narrower.upper()} weights: {cluster.gpu.name} computes in it")
            break
    unknown = sorted({r.reason for r in rejected if " is not known: give " in r.reason})
    if unknown:  # only what fits is rejected for its links
        return lines + unknown
    number = max(1, cluster.num_gpus)
    while number <= 4096:
        number *= 2
        shapes = workers(spec, number, cluster.gpus_per_node)
        for worker in sorted((w for w in shapes if w.num_gpus == number), key=lambda w: w.pp):
            try:
                worker.check(spec, precision)
            except UserError:
                continue
            memory = serve_memory(
                *(spec, worker, cluster.gpu.memory_gib, precision, software.cache, software.chunk_tokens),
                framework=software.framework_bytes,
            )
            if memory.kv_capacity_tokens > work.context:
                lines.append(f"{number} x {cluster.gpu.name} would hold it, as {worker}")
                try:
                    check_links(cluster, worker.num_gpus)
                except UserError as error:
                    lines[-1] += f"; but {error}"
                return lines
    return lines
