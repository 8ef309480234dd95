"""A dry run as a table, as JSON, as a picture of memory over the step, and as a trace for Chrome."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from whalepod.dryrun.role import Measured
from whalepod.dryrun.roles import DryRun
from whalepod.dryrun.tally import Counts
from whalepod.spec.counts import GIB
from whalepod.spec.errors import UserError
from whalepod.spec.hardware import Cluster
from whalepod.spec.layout import Layout
from whalepod.spec.model import ModelSpec
from whalepod.spec.schedule import actions_of

CATEGORIES = ("weights", "optimizer", "gradients", "gathered", "activations", "working")
COLORS = ("#4477aa", "#66ccee", "#228833", "#ccbb44", "#ee6677", "#aa3377")


def dryrun_json(run: DryRun) -> dict[str, Any]:
    """Stable keys, units in their names; `memory_gib` is with what libraries take besides tensors."""
    return {
        **job_json(run.spec, run.cluster, run.layout, run.same),
        "roles": [_role_json(run, role) for role in run.roles],
        "step_s": run.plan.step.seconds,
        "tokens_per_s": run.plan.tokens_per_s,
        "fits": run.fits,
        "usable_memory_gib": run.limit_gib,
        "findings": [vars(finding) for finding in run.findings],
        "notes": list(run.notes),
    }


def _role_json(run: DryRun, role: Measured) -> dict[str, Any]:
    gib = {name: held / GIB for name, held in role.categories.items()}
    return {
        "rank": role.rank,
        "stages": list(role.stages),
        "parameters": role.parameters,
        "memory_gib": run.memory_gib(role),
        "tensors_gib": role.peak / GIB,
        "memory_by_category_gib": {**gib, **run.extra_of(role)},
        "state_gib": {name: held / GIB for name, held in role.state.items()},
        "peak_at": role.peak_at,
        **counts_json(role.counts),
        "bytes_by_axis_and_module": [
            {"axis": axis, "module": module, "bytes": sent}
            for (axis, module), sent in sorted(role.counts.by_module.items())
        ],
        "memory_over_step": [
            {"at": at, **{k: v / GIB for k, v in held.items() if v}} for at, held in role.timeline
        ],
    }


def job_json(spec: ModelSpec, cluster: Cluster, layout: Layout, same: int) -> dict[str, Any]:
    return {
        "model": spec.name,
        "gpu": cluster.gpu.name,
        "num_gpus": cluster.num_gpus,
        "layout": asdict(layout),
        "ranks_per_role": same,
    }


def counts_json(counts: Counts) -> dict[str, Any]:
    return {
        "flops": sum(counts.flops.values()),
        "flops_by_kind": dict(counts.flops),
        "collectives": [
            {"axis": axis, "op": op, "count": counts.calls[axis, op], "bytes": sent}
            for (axis, op), sent in sorted(counts.bytes.items())
        ],
    }


def dryrun_view(run: DryRun) -> RenderableType:
    """Roles, what they send, and what was found."""
    gpu = run.cluster.gpu
    head = (
        f"{run.spec.name} on {run.cluster.num_gpus:,} x {gpu.name}: {len(run.roles)} role(s), each of "
        f"{run.same:,} ranks; {run.limit_gib:.1f} of {gpu.memory_gib:g} GiB usable"
    )
    roles = Table(box=None, pad_edge=False)
    for name in ("rank", "holds", "parameters", "memory GiB", *CATEGORIES, "other", "PFLOP", "peak at"):
        roles.add_column(name, justify="left" if name in ("holds", "peak at") else "right")
    for role in run.roles:
        roles.add_row(
            str(role.rank),
            "; ".join(role.stages),
            f"{role.parameters / 1e9:.3f} B",
            f"{run.memory_gib(role):.1f}",
            *(f"{role.categories.get(name, 0) / GIB:.1f}" for name in CATEGORIES),
            f"{sum(run.extra_of(role).values()):.1f}",
            f"{sum(role.counts.flops.values()) / 1e15:.2f}",
            role.peak_at,
        )
    sends = Table(
        box=None, pad_edge=False, title="collectives of one rank and step, the busiest role of each"
    )
    sends.title_justify = "left"
    for name in ("axis", "operation", "calls", "GiB", "rank"):
        sends.add_column(name, justify="left" if name in ("axis", "operation") else "right")
    for key in sorted({key for role in run.roles for key in role.counts.bytes}):
        role = max(run.roles, key=lambda r: r.counts.bytes[key])
        sends.add_row(
            *key, f"{role.counts.calls[key]:,}", f"{role.counts.bytes[key] / GIB:,.3f}", str(role.rank)
        )
    fits = "fits" if run.fits else "does not fit"
    lines = [
        f"{fits}; step {run.plan.step.seconds:.3g} s, {run.plan.tokens_per_s:,.0f} tokens/s by the planner's "
        "kernel and network models",
        *(f"note: {note}" for note in run.notes),
        *(f"{f.kind} at {f.where}: {f.problem}; remedy: {f.remedy}" for f in run.findings),
    ]
    return Group(head, "", roles, "", sends, "", *lines)


def draw_memory(run: DryRun, path: Path) -> Path:
    """Memory over the step of the fullest role, by category, and of all roles as lines."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    fullest = max(run.roles, key=lambda role: role.peak)
    figure, (top, below) = plt.subplots(2, 1, figsize=(10, 8), height_ratios=(2, 1), layout="constrained")
    points = fullest.timeline
    x = [100 * at for at, _ in points]
    stacks = [[held.get(name, 0) / GIB for _, held in points] for name in CATEGORIES]
    top.stackplot(x, stacks, labels=CATEGORIES, colors=COLORS, step="post")
    top.axhline(run.limit_gib, color="black", linestyle="--", linewidth=1)
    top.annotate("usable", (0, run.limit_gib), va="bottom", fontsize=8)
    top.set_title(
        f"{run.spec.name} on {run.cluster.num_gpus:,} x {run.cluster.gpu.name}, rank {fullest.rank} "
        f"({'; '.join(fullest.stages)})\npeak {fullest.peak / GIB:.1f} GiB of tensors: {fullest.peak_at}",
        fontsize=10,
    )
    top.set_ylabel("GiB of tensors")
    top.legend(loc="upper right", fontsize=8)
    for role in run.roles:
        points = role.timeline
        line = [sum(held.values()) / GIB for _, held in points]
        below.plot([100 * at for at, _ in points], line, linewidth=0.8, label=f"rank {role.rank}")
    below.set_xlabel("% of the step's operations")
    below.set_ylabel("GiB, each role")
    if len(run.roles) <= 8:
        below.legend(fontsize=7)
    return written(path, lambda: figure.savefig(path, dpi=130), lambda: plt.close(figure))


def write_trace(run: DryRun, path: Path) -> Path:
    """A trace for chrome://tracing or Perfetto: each pipeline rank's timeline by the planner's times, and its
    memory over the step's operations, stretched to the same length."""
    step_us = run.plan.step.seconds * 1e6
    events: list[dict[str, Any]] = []
    timeline = run.plan.step.timeline
    for rank, spans in enumerate(timeline.spans if timeline is not None else ()):
        events.append(
            {"ph": "M", "pid": rank, "name": "process_name", "args": {"name": f"pipeline rank {rank}"}}
        )
        for span in spans:
            args = [
                {"stage": a.stage, "kind": a.kind, "micro_batch": a.micro_batch}
                for a in actions_of(span.step)
            ]
            events.append(
                {
                    "ph": "X",
                    "pid": rank,
                    "tid": 0,
                    "name": str(span.step),
                    "ts": span.start * 1e6,
                    "dur": (span.end - span.start) * 1e6,
                    "args": {"actions": args},
                }
            )
    each = run.layout.num_devices // run.layout.pp
    for role in run.roles:
        for at, held in role.timeline:
            args = {name: round(held.get(name, 0) / GIB, 4) for name in CATEGORIES}
            events.append(
                {"ph": "C", "pid": role.rank // each, "name": "memory GiB", "ts": at * step_us, "args": args}
            )
    return written(path, lambda: path.write_text(json.dumps({"traceEvents": events})))


def written(path: Path, write: Any, after: Any = lambda: None) -> Path:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write()
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from None
    finally:
        after()
    return path
