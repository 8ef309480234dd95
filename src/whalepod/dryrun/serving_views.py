"""A dry run of serving as a table and as JSON."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from whalepod.dryrun.serving import ServingDryRun, ServingRole, Step
from whalepod.dryrun.views import counts_json, job_json
from whalepod.spec.counts import GIB


def serving_json(run: ServingDryRun) -> dict[str, Any]:
    """Stable keys, units in their names; `memory_gib` is with what libraries take besides tensors."""
    load = run.load
    return {
        **job_json(run.spec, run.cluster, run.layout, run.same),
        "load": {"batch": load.batch, "context_tokens": load.context, "prefill_tokens": load.prefill},
        "roles": [_role(run, role) for role in run.roles],
        "sequences_that_fit": min(run.room(role) for role in run.roles),
        "fits": run.fits,
        "usable_memory_gib": run.limit_gib,
        "notes": list(run.notes),
    }


def _role(run: ServingDryRun, role: ServingRole) -> dict[str, Any]:
    return {
        "rank": role.rank,
        "stages": list(role.stages),
        "parameters": role.parameters,
        "memory_gib": run.memory_gib(role),
        "weights_gib": role.weights / GIB,
        "cache_gib": role.cache / GIB,
        "steps": [_step(step) for step in role.steps],
    }


def _step(step: Step) -> dict[str, Any]:
    return {
        "kind": step.kind,
        "tensors_gib": step.peak / GIB,
        "memory_by_category_gib": {name: held / GIB for name, held in step.categories.items()},
        "peak_at": step.peak_at,
        **counts_json(step.counts),
    }


def serving_view(run: ServingDryRun) -> RenderableType:
    """Roles and their steps, and what these send."""
    gpu, load = run.cluster.gpu, run.load
    head = (
        f"{run.spec.name} on {run.cluster.num_gpus:,} x {gpu.name}: {len(run.roles)} role(s), each of "
        f"{run.same:,} ranks; {run.limit_gib:.1f} of {gpu.memory_gib:g} GiB usable\n"
        f"each replica writes {load.batch:,} sequences with {load.context:,} tokens in the cache, "
        f"and reads in {load.prefill:,} at once"
    )
    roles = Table(box=None, pad_edge=False)
    for name in (
        "rank",
        "holds",
        "parameters",
        "weights GiB",
        "cache",
        "step",
        "at most",
        "TFLOP",
        "peak at",
    ):
        roles.add_column(name, justify="left" if name in ("holds", "step", "peak at") else "right")
    for role in run.roles:
        who = [str(role.rank), "; ".join(role.stages), f"{role.parameters / 1e9:.3f} B"]
        who += [f"{role.weights / GIB:.1f}", f"{role.cache / GIB:.1f}"]
        for step in role.steps:
            most = step.peak / GIB + run.extra_gib
            flops = sum(step.counts.flops.values()) / 1e12
            roles.add_row(*who, step.kind, f"{most:.1f}", f"{flops:.3g}", step.peak_at)
            who = [""] * len(who)
    sends = Table(box=None, pad_edge=False, title="collectives of a rank and step, of the busiest role")
    sends.title_justify = "left"
    for name in ("step", "axis", "operation", "calls", "MiB"):
        sends.add_column(name, justify="left" if name in ("step", "axis", "operation") else "right")
    for index, kind in enumerate(("decode", "prefill")):
        for key in sorted({key for role in run.roles for key in role.steps[index].counts.bytes}):
            counts = max((role.steps[index].counts for role in run.roles), key=lambda c: c.bytes[key])
            sends.add_row(kind, *key, f"{counts.calls[key]:,}", f"{counts.bytes[key] / 2**20:,.2f}")
    room = min(run.room(role) for role in run.roles)
    lines = [
        f"{'fits' if run.fits else 'does not fit'}: a replica has room for {room:,} such sequences",
        *(f"note: {note}" for note in run.notes),
    ]
    return Group(head, "", roles, "", sends, "", *lines)
