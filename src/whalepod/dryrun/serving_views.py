"""A dry run of serving as a table, as JSON, as a picture, and as a trace for Chrome."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from whalepod.dryrun.serving import ServingDryRun, ServingRole, Step
from whalepod.dryrun.views import counts_json, job_json, written
from whalepod.spec.counts import GIB

KINDS = ("decode", "prefill")
CATEGORIES = ("weights", "cache", "working")
COLORS = ("#4477aa", "#228833", "#aa3377")
_ONCE = ("head", "host", "pipeline")


def serving_json(run: ServingDryRun) -> dict[str, Any]:
    """Stable keys, units in their names; `memory_gib` is with what libraries take besides tensors."""
    load = run.load
    return {
        **job_json(run.spec, run.cluster, run.layout, run.same),
        "load": {"batch": load.batch, "context_tokens": load.context, "prefill_tokens": load.prefill},
        "roles": [_role(run, role) for role in run.roles],
        "step_s": {kind: run.seconds(kind) for kind in KINDS},
        "step_parts_s": run.times,
        "sequences_that_fit": min(run.room(role) for role in run.roles),
        "fits": run.fits,
        "usable_memory_gib": run.limit_gib,
        "findings": [vars(finding) for finding in run.findings],
        "notes": list(run.notes),
    }


def _held(run: ServingDryRun, step: Step) -> dict[str, float]:
    """GiB by category at the step's fullest moment, with what libraries take."""
    return {name: held / GIB for name, held in step.categories.items()} | {"overhead": run.extra_gib}


def _role(run: ServingDryRun, role: ServingRole) -> dict[str, Any]:
    return {
        "rank": role.rank,
        "stages": list(role.stages),
        "parameters": role.parameters,
        "memory_gib": run.memory_gib(role),
        "weights_gib": role.weights / GIB,
        "cache_gib": role.cache / GIB,
        "memory_by_category_gib": _held(run, max(role.steps, key=lambda step: step.peak)),
        "steps": [_step(step) for step in role.steps],
    }


def _step(step: Step) -> dict[str, Any]:
    return {
        "kind": step.kind,
        "tensors_gib": step.peak / GIB,
        "memory_by_category_gib": {name: held / GIB for name, held in step.categories.items()},
        "peak_at": step.peak_at,
        "memory_over_step": [
            {"at": at, **{k: v / GIB for k, v in held.items() if v}} for at, held in step.timeline
        ],
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
        "step",
        "GiB",
        *CATEGORIES,
        "other",
        "TFLOP",
        "peak at",
    ):
        roles.add_column(name, justify="left" if name in ("holds", "step", "peak at") else "right")
    for role in run.roles:
        who = [str(role.rank), "; ".join(role.stages), f"{role.parameters / 1e9:.3f} B"]
        for step in role.steps:
            most = step.peak / GIB + run.extra_gib
            flops = sum(step.counts.flops.values()) / 1e12
            held = [f"{step.categories.get(name, 0) / GIB:.1f}" for name in CATEGORIES]
            roles.add_row(
                *who, step.kind, f"{most:.1f}", *held, f"{run.extra_gib:.1f}", f"{flops:.3g}", step.peak_at
            )
            who = [""] * len(who)
    sends = Table(box=None, pad_edge=False, title="collectives of a rank and step, of the busiest role")
    sends.title_justify = "left"
    for name in ("step", "axis", "operation", "calls", "MiB"):
        sends.add_column(name, justify="left" if name in ("step", "axis", "operation") else "right")
    for index, kind in enumerate(KINDS):
        for key in sorted({key for role in run.roles for key in role.steps[index].counts.bytes}):
            counts = max((role.steps[index].counts for role in run.roles), key=lambda c: c.bytes[key])
            sends.add_row(kind, *key, f"{counts.calls[key]:,}", f"{counts.bytes[key] / 2**20:,.2f}")
    room = min(run.room(role) for role in run.roles)
    lines = [
        f"{'fits' if run.fits else 'does not fit'}: a replica has room for {room:,} such sequences",
        *_times(run),
        *(f"note: {note}" for note in run.notes),
        *(f"{f.kind} at {f.where}: {f.problem}; remedy: {f.remedy}" for f in run.findings),
    ]
    return Group(head, "", roles, "", sends, "", *lines)


def _times(run: ServingDryRun) -> Iterator[str]:
    """A line for each step, its largest parts first."""
    for kind, parts in run.times.items():
        whole = sum(parts.values())
        tokens = (run.load.batch if kind == "decode" else run.load.prefill) * run.layout.num_replicas
        largest = sorted(parts, key=lambda name: -parts[name])[:4]
        shares = ", ".join(f"{name} {parts[name] / whole:.0%}" for name in largest)
        yield (
            f"{kind} step {whole * 1e3:.3g} ms, {tokens / whole:,.0f} tokens/s by the planner's kernel and "
            f"network models: {shares}"
        )


def draw_serving(run: ServingDryRun, path: Path) -> Path:
    """Of the fullest role memory over each step, by category; below, where the steps' times go."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    fullest = max(run.roles, key=run.memory_gib)
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), height_ratios=(2, 1), layout="constrained")
    figure.suptitle(
        f"{run.spec.name} on {run.cluster.num_gpus:,} x {run.cluster.gpu.name}, rank {fullest.rank} "
        f"({'; '.join(fullest.stages)})",
        fontsize=10,
    )
    for column, step in enumerate(fullest.steps):
        top, below = axes[0][column], axes[1][column]
        x = [100 * at for at, _ in step.timeline]
        stacks = [[held.get(name, 0) / GIB for _, held in step.timeline] for name in CATEGORIES]
        top.stackplot(x, stacks, labels=CATEGORIES, colors=COLORS, step="post")
        top.axhline(run.limit_gib - run.extra_gib, color="black", linestyle="--", linewidth=1)
        top.set_title(f"{step.kind}: {step.peak / GIB:.1f} GiB of tensors at {step.peak_at}", fontsize=9)
        top.set_xlabel("% of the step's operations")
        top.set_ylabel("GiB of tensors")
        top.legend(loc="lower right", fontsize=8)
        parts = dict(sorted(run.times.get(step.kind, {}).items(), key=lambda pair: pair[1]))
        below.barh([*parts], [seconds * 1e3 for seconds in parts.values()], color="#4477aa")
        below.set_xlabel(f"ms of a {step.kind} step, planned")
        below.tick_params(labelsize=7)
    return written(path, lambda: figure.savefig(path, dpi=130), lambda: plt.close(figure))


def write_serving_trace(run: ServingDryRun, path: Path) -> Path:
    """A trace for chrome://tracing or Perfetto: both steps of each pipeline rank layer by layer by the
    planner's times, one after the other, and memory over each step's operations stretched to its length."""
    events: list[dict[str, Any]] = []
    each = run.layout.num_devices // run.layout.pp
    layers, start = run.spec.num_hidden_layers, 0.0
    owner = {layer: role.rank // each for role in run.roles for layer in role.layers}
    first_expert = layers - run.spec.num_moe_layers
    for index, (kind, parts) in enumerate(run.times.items()):
        at = start + parts.get("host", 0.0)
        for layer in range(layers):
            for name, seconds in parts.items():
                share = _share(name, layer >= first_expert, layers, first_expert)
                if share and seconds:
                    args = {"layer": layer, "step": kind}
                    events.append(_span(owner.get(layer, 0), f"{name} {layer}", at, seconds * share, args))
                    at += seconds * share
        for name in ("pipeline", "head"):
            if parts.get(name):
                events.append(_span(run.layout.pp - 1, name, at, parts[name], {"step": kind}))
                at += parts[name]
        for role in run.roles:
            for place, held in role.steps[index].timeline:
                ts = (start + place * sum(parts.values())) * 1e6
                args = {name: round(held.get(name, 0) / GIB, 4) for name in CATEGORIES}
                pid = role.rank // each
                events.append({"ph": "C", "pid": pid, "name": "memory GiB", "ts": ts, "args": args})
        start = at
    names = [{"ph": "M", "pid": r, "name": "process_name", "args": {"name": f"pipeline rank {r}"}}
             for r in range(run.layout.pp)]  # fmt: skip
    return written(path, lambda: path.write_text(json.dumps({"traceEvents": names + events})))


def _share(name: str, has_experts: bool, layers: int, first_expert: int) -> float:
    """Of a part's time that one layer has; 0 of what it does not do."""
    if name in _ONCE:
        return 0.0
    if name == "dense_mlp":
        return 0.0 if has_experts else 1 / first_expert
    if name in ("experts", "router", "shared_experts", "exchange"):
        return 1 / (layers - first_expert) if has_experts else 0.0
    return 1 / layers


def _span(stage: int, name: str, start: float, seconds: float, args: dict[str, Any]) -> dict[str, Any]:
    place = {"ph": "X", "pid": stage, "tid": 0, "name": name}
    return {**place, "ts": start * 1e6, "dur": seconds * 1e6, "args": args}
