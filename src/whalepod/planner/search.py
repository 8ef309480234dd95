"""Every valid layout of a training job, timed and weighed at once; the best of them played exactly.

All layouts become columns (planner/candidates); memory and an estimate of the step are formulas over them.
Those that fit are ranked by the estimate, and the pipelines of the best are played as event graphs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product

import numpy as np

from whalepod.planner.candidates import POLICIES, RECOMPUTED, Candidates, objects
from whalepod.planner.memory import Memory, training_memory
from whalepod.planner.software import Software
from whalepod.planner.training import TrainingTimes
from whalepod.spec.errors import UserError
from whalepod.spec.hardware import Cluster
from whalepod.spec.layout import FP8_BLOCK, Layout
from whalepod.spec.model import GQA, ModelSpec
from whalepod.spec.schedule import RULES

USABLE = 0.96
"""Of a device's memory: the rest is the driver's, and a step that is not like the others."""
FINALISTS = 24
MICRO_BATCHES = (1, 2, 4, 8)
SCHEDULES: Sequence[tuple[str, int]] = (
    *(("1f1b", 1), ("interleaved", 2), ("interleaved", 4), ("interleaved", 8)),
    *(("interleaved_zero_bubble", 2), ("zbv", 2), ("dualpipev", 2)),
)


@dataclass(frozen=True)
class TrainingJob:
    """What is to be trained, on what, by which software. pins: fields of Layout that are given.

    global_batch: sequences a step. imbalance: tokens of the busiest rank's experts over the mean.
    """

    spec: ModelSpec
    cluster: Cluster
    software: Software
    global_batch: int
    sequence_length: int = 4096
    precision: str = "bf16"
    imbalance: float = 1.0
    mtp: bool = True
    pins: Mapping[str, object] = field(default_factory=dict)

    @property
    def limit_gib(self) -> float:
        """Memory that a plan may use on each device."""
        return self.cluster.gpu.memory_gib * USABLE

    @property
    def precisions(self) -> list[str]:
        """Those that `auto` stands for."""
        return [name for name in ("fp8", "bf16") if self.cluster.gpu.supports(name)]

    def times(self, candidates: Candidates) -> TrainingTimes:
        return TrainingTimes(
            *(self.spec, candidates, self.cluster, self.software),
            *(self.sequence_length, self.imbalance, self.mtp),
        ).balanced()

    def memory(self, candidates: Candidates) -> Memory:
        soft = self.software.on(self.cluster)
        return training_memory(
            *(self.spec, candidates, self.sequence_length),
            state=soft.state,
            framework=soft.framework,
            overhead=soft.overhead,
            mtp=self.mtp,
            imbalance=self.imbalance,
        )


def default_batch(spec: ModelSpec, num_gpus: int = 1, sequence_length: int = 4096) -> int:
    """Sequences a step of the reports: 15,360 of 4,096 tokens for V3, and as many tokens in longer ones
    (sections 4.2 and 4.3), 4,608 for V2-Lite (appendix B).

    Where the number of GPUs has other factors than two, the nearest batch that they divide."""
    batch = 15360 if spec.hidden_size >= 4096 else 4608
    batch = max(1, batch * 4096 // sequence_length)
    odd = num_gpus // (num_gpus & -num_gpus)
    if batch % odd == 0:
        return batch
    unit = odd
    while 4 * unit <= batch:
        unit *= 2
    return max(1, round(batch / unit)) * unit


@dataclass(frozen=True)
class Search:
    """All layouts of a job, with their memory and estimated step."""

    job: TrainingJob
    times: TrainingTimes
    memory: Memory

    @property
    def candidates(self) -> Candidates:
        return self.times.candidates

    @cached_property
    def need_gib(self) -> np.ndarray:
        """[rows]: what the fullest rank needs."""
        return self.memory.peak_gib

    def best(self, limit_gib: float, count: int = FINALISTS) -> list[int]:
        """Rows that fit in so much memory, fastest first by the estimate; one for each pp x cp x tp."""
        order = np.argsort(self.times.estimate, kind="stable")
        fits = self.need_gib[order] <= limit_gib
        c, found, meshes = self.candidates, [], set()
        for row in order[fits]:
            mesh = tuple(int(x[row]) for x in (c.pp, c.cp, c.tp))
            if mesh not in meshes:
                meshes.add(mesh)
                found.append(int(row))
                if len(found) == count:
                    break
        return found


def search(job: TrainingJob) -> Search:
    """Times and weighs every valid layout. Raises UserError where there is none."""
    candidates = enumerate_layouts(job)
    times = job.times(candidates)
    # A pipeline that has fewer layers than stages has no cut.
    return Search(job, times, job.memory(times.candidates))


def enumerate_layouts(job: TrainingJob) -> Candidates:
    """Columns of every layout of the job's devices that the model, the batch and the schedules allow."""
    rows = list(_meshes(job))
    if not rows:
        raise UserError(_why_none(job))
    mesh = np.array(rows, dtype=np.int64)
    pp, replicate, shard, cp, tp, ep, zero, micro, pipeline, policy = mesh.T
    schedules, stages = zip(*SCHEDULES, strict=True)
    policies = list(POLICIES)
    wire = "fp8" if job.precision == "fp8" and job.software.name == "deepseek" else "bf16"
    count = len(rows)
    return Candidates(
        pp=pp,
        stages=np.array(stages)[pipeline],
        dp_replicate=replicate,
        dp_shard=shard,
        cp=cp,
        tp=tp,
        ep=ep,
        zero=zero,
        micro_batch=micro,
        global_batch=np.full(count, job.global_batch),
        schedule=np.array(schedules, dtype=object)[pipeline],
        precision=np.full(count, job.precision, dtype=object),
        wire=np.where(ep > 1, wire, "bf16").astype(object),
        stage_layers=objects([None] * count),
        recompute={
            part: np.array([part in POLICIES[name] for name in policies])[policy] for part in RECOMPUTED
        },
    )


def _meshes(job: TrainingJob) -> Iterator[tuple[int, ...]]:
    spec, n, pins = job.spec, job.cluster.num_gpus, job.pins
    layers, policies = spec.num_hidden_layers, list(POLICIES)

    def choice(name: str, values: Sequence[int]) -> Sequence[int]:
        return [int(pins[name])] if pins.get(name) is not None else values  # type: ignore[call-overload]

    widths = choice("tp", [t for t in (1, 2, 4, 8) if t <= job.cluster.domain])
    contexts = choice("cp", [c for c in (1, 2, 4, 8, 16, 32) if job.sequence_length >= 8192 * c or c == 1])
    for tp, cp in product(widths, contexts):
        if not _splits(spec, tp, job.precision) or job.sequence_length % (cp * max(tp, 2 if cp > 1 else 1)):
            continue
        for pp in choice("pp", [p for p in _divisors(n) if p <= min(layers, 64)]):
            if n % (tp * cp * pp) or pp > layers:
                continue
            dp = n // (tp * cp * pp)
            for shard in choice("dp_shard", sorted({dp, *(d for d in (64,) if dp % d == 0 and dp > d)})):
                if dp % shard or pins.get("dp_replicate") not in (None, dp // shard):
                    continue
                for micro in choice("micro_batch", MICRO_BATCHES):
                    if job.global_batch % (micro * dp):
                        continue
                    m = job.global_batch // (micro * dp)
                    inner = shard * cp * tp
                    for ep in choice("ep", _expert_sizes(spec, inner, tp)):
                        if ep == 1 and not _cuts_experts(spec, tp, job.precision):
                            continue
                        if inner % ep or (ep > 1 and (spec.moe is None or spec.moe.n_routed_experts % ep)):
                            continue
                        for pipeline in _pipelines(job, pp, m):
                            zeros = choice("zero", job.software.zero if shard * cp > 1 else (1,))
                            for zero in zeros if shard < dp or shard * cp > 1 else (1,):
                                if shard < dp and zero == 1:
                                    continue
                                for policy, name in enumerate(policies):
                                    if pins.get("recompute") in (None, name):
                                        yield (
                                            pp,
                                            dp // shard,
                                            shard,
                                            cp,
                                            tp,
                                            ep,
                                            zero,
                                            micro,
                                            pipeline,
                                            policy,
                                        )


def _pipelines(job: TrainingJob, pp: int, micro_batches: int) -> Iterator[int]:
    if pp == 1:
        yield 0
        return
    pinned = job.pins.get("schedule")
    for index, (name, stages) in enumerate(SCHEDULES):
        if pinned not in (None, name) or pp * stages > job.spec.num_hidden_layers:
            continue
        # Without overlap DualPipeV is a zero-bubble schedule that holds more.
        poor = name == "dualpipev" and job.software.overlap is False
        if pinned is None and (poor or name not in job.software.schedules):
            continue
        if RULES[name].accepts(pp, micro_batches):
            yield index


def _expert_sizes(spec: ModelSpec, inner: int, tp: int) -> list[int]:
    if spec.moe is None:
        return [1]
    experts = spec.moe.n_routed_experts
    return [e for e in _divisors(experts) if inner % e == 0 and (e == 1 or e >= tp)]


def _splits(spec: ModelSpec, tp: int, precision: str) -> bool:
    """Whether `tp` cuts heads, vocabulary and widths evenly, in FP8 into whole blocks."""
    a, block = spec.attention, FP8_BLOCK if precision == "fp8" and tp > 1 else 1
    sizes = [(spec.num_attention_heads, 1), (spec.vocab_size, 1)]
    if isinstance(a, GQA):
        sizes += [(a.num_key_value_heads, 1), (a.num_key_value_heads * a.head_dim, block)]
    else:
        sizes += [(spec.num_attention_heads * w, block) for w in (a.qk_head_dim, a.v_head_dim)]
    if spec.num_moe_layers < spec.num_hidden_layers:
        sizes.append((spec.intermediate_size, block))
    if spec.moe is not None and spec.moe.n_shared_experts:
        sizes.append((spec.moe.n_shared_experts * spec.moe.moe_intermediate_size, block))
    return all(size % (tp * multiple) == 0 for size, multiple in sizes)


def _cuts_experts(spec: ModelSpec, tp: int, precision: str) -> bool:
    """Whether `tp` may cut every expert's width: grouped products want 16 bytes, FP8 whole blocks."""
    multiple = FP8_BLOCK if precision == "fp8" and tp > 1 else 4 if precision == "fp32" else 8
    return spec.moe is None or spec.moe.moe_intermediate_size % (tp * multiple) == 0


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0] if n <= 4096 else _large_divisors(n)


def _large_divisors(n: int) -> list[int]:
    small = [d for d in range(1, int(n**0.5) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


def _why_none(job: TrainingJob) -> str:
    """One line for a job without a single valid layout."""
    n = job.cluster.num_gpus
    pins = {name: value for name, value in job.pins.items() if value is not None}
    given = Layout(**{k: v for k, v in pins.items() if k in ("tp",)}, precision=job.precision)  # type: ignore[arg-type]
    try:
        given.check_model(job.spec, job.sequence_length)
    except UserError as error:
        return str(error)
    asked = ", ".join(f"{name} {value}" for name, value in pins.items())
    with_pins = f" with {asked}" if asked else ""
    return (
        f"no layout of {job.spec.name} over {n} {job.cluster.gpu.name}{with_pins} and a global batch of "
        f"{job.global_batch} is possible: sizes must divide the devices and the batch"
    )
