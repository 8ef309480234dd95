"""What a dry run finds wrong, by the module's name, and what would mend it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod

from whalepod.dryrun.role import Held, Measured
from whalepod.parallel.sharding import cut
from whalepod.planner.candidates import Candidates
from whalepod.planner.search import TrainingJob
from whalepod.spec.counts import GIB
from whalepod.spec.errors import UserError
from whalepod.spec.layout import Layout

LARGE = 1 << 20
"""Elements below which it costs nothing that every rank has a weight."""
WHOLE_BY_DESIGN = (
    *("q_a_proj.weight", "kv_a_proj_with_mqa.weight"),  # MLA's way down works on a part of the sequence
    *("mlp.gate.weight", "eh_proj.weight"),  # so do the router and what joins MTP's inputs
)


@dataclass(frozen=True)
class Finding:
    """kind: `memory`, `unsharded`, `replicated` or `network`. where: a module or axis."""

    kind: str
    rank: int | None
    where: str
    problem: str
    remedy: str


def findings(
    job: TrainingJob,
    layout: Layout,
    roles: Sequence[Measured],
    needs_gib: Sequence[float],
    warnings: Sequence[str],
) -> Iterator[Finding]:
    """Everything found, what breaks the job first."""
    worst = max(range(len(roles)), key=lambda i: needs_gib[i])
    if needs_gib[worst] > job.limit_gib:
        role = roles[worst]
        largest = max(role.categories, key=lambda name: role.categories[name])
        yield Finding(
            "memory",
            role.rank,
            role.peak_at,
            f"the step needs {needs_gib[worst]:.1f} GiB of {job.limit_gib:.1f} usable; most is {largest}, "
            f"{role.categories[largest] / GIB:.1f} GiB",
            _what_fits(job, layout, needs_gib[worst]),
        )
    seen: set[str] = set()
    for role in roles:
        for held in role.held:
            if held.name not in seen and (found := _unshared(role, held, layout)) is not None:
                seen.add(held.name)
                yield found
    yield from _slow(job, layout, roles)
    for warning in warnings:
        what, _, remedy = warning.partition(": use ")
        yield Finding("network", None, "plan", what, f"use {remedy}" if remedy else "see `whalepod plan`")


def _unshared(role: Measured, held: Held, layout: Layout) -> Finding | None:
    """A weight of which this rank has more than its share."""
    where = cut(held.name, layout)
    ways = getattr(layout, where[0]) if where else 1
    is_expert = ".experts." in held.name
    shards = layout.expert_shard if is_expert and layout.ep > 1 else layout.fsdp
    first = -(-held.shape[0] // ways) if where and where[1] == 0 else held.shape[0]
    # FSDP2 cuts the first dimension into equal parts, the last of them shorter, or another that divides.
    share = -(-first // shards) * prod(held.shape[1:]) // (ways if where and where[1] else 1)
    local_gib = held.local * 4 / GIB
    if held.local > share and held.local > LARGE:
        return Finding(
            "unsharded",
            role.rank,
            held.name,
            f"this rank holds {held.local:,} elements ({local_gib:.2f} GiB in float32), "
            f"its share is {share:,}",
            "shard its block (parallel/sharded.py), or give it a line in parallel/sharding.TABLE",
        )
    plain = layout.tp > 1 and where is None and not (is_expert and layout.ep > 1)
    if plain and len(held.shape) > 1 and prod(held.shape) > LARGE and not held.name.endswith(WHOLE_BY_DESIGN):
        return Finding(
            "replicated",
            role.rank,
            held.name,
            f"every one of the {layout.tp} tensor-parallel ranks holds the whole weight",
            "give it a line in parallel/sharding.TABLE",
        )
    return None


def _slow(job: TrainingJob, layout: Layout, roles: Sequence[Measured]) -> Iterator[Finding]:
    """Axes that talk much and lie across nodes, though they would fit into one."""
    domain = job.cluster.domain
    inside, stride = {}, 1
    for axis in ("tp", "cp"):
        size = getattr(layout, axis)
        inside[axis] = size * stride
        stride *= size
    for axis, span in inside.items():
        size = getattr(layout, axis)
        sent = max((n for role in roles for (a, _), n in role.counts.bytes.items() if a == axis), default=0)
        if size > 1 and span > domain >= size and sent:
            modules = roles[0].counts.by_module
            where = max((m for a, m in modules if a == axis), key=lambda m: modules[axis, m], default=axis)
            yield Finding(
                "network",
                roles[0].rank,
                where or axis,
                f"{axis} {size} sends {sent / GIB:.1f} GiB a step, and its groups leave the domain of "
                f"{domain} GPUs",
                f"make tp x cp at most {domain}",
            )


def _what_fits(job: TrainingJob, layout: Layout, need_gib: float) -> str:
    """The first change, by the planner's formulas, that takes away what is too much."""

    def planned(other: Layout) -> float:
        return float(job.memory(Candidates.of([other])).peak_gib[0])

    too_much = need_gib - job.limit_gib
    now = planned(layout)
    for change in _changes(layout):
        try:
            other = replace(layout, **change)
            other.check_model(job.spec, job.sequence_length)
            saved = now - planned(other)
        except UserError:
            continue
        if saved >= too_much:
            named = ", ".join(f"{k} {v}" for k, v in change.items())
            return f"{named} saves {saved:.1f} GiB"
    return (
        f"no single change is enough: ask `whalepod plan {job.spec.name} --gpus {job.cluster.num_gpus}x"
        + (f"{job.cluster.gpu.name} --for train --software whalepod`")
    )


def _changes(layout: Layout) -> Iterator[dict[str, object]]:
    if layout.recompute == "none":
        yield {"recompute": "selective"}
    if layout.recompute != "full":
        yield {"recompute": "full"}
    if layout.micro_batch > 1:
        yield {"micro_batch": layout.micro_batch // 2}
    if layout.zero < 3 and layout.fsdp > 1:
        yield {"zero": 3}
    if layout.dp_replicate > 1:
        yield {"dp_replicate": 1, "dp_shard": layout.dp_shard * layout.dp_replicate}
        yield {"dp_replicate": 1, "dp_shard": layout.dp_shard * layout.dp_replicate, "recompute": "full"}
    for axis in ("cp", "tp"):
        for source in ("dp_shard", "dp_replicate"):
            if (size := getattr(layout, source)) % 2 == 0:
                yield {axis: 2 * getattr(layout, axis), source: size // 2, "recompute": "full"}
