"""Pictures of plans: memory bars against the limit, where a step's time goes, the pipeline, the Pareto front.

Every panel draws from the JSON of `report/planning` or `report/serving`; only the pipeline needs the timeline
that the planner played. matplotlib draws into memory: no display.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from whalepod.report.planning_tables import SMALL_SHARE, three, time_rows
from whalepod.report.schedule import COLOURS, GREY, IDLE, INK, MEANING, TITLES
from whalepod.report.serving_tables import PARTS
from whalepod.spec.errors import UserError
from whalepod.spec.schedule import actions_of
from whalepod.spec.timeline import Timeline

MEMORY_COLOURS = {
    "weights": "#2b6cb0",
    "gradients": "#4c9bd6",
    "optimizer": "#90c5ee",
    "cache": "#c05621",
    "activations": "#dd8a3a",
    "logits": "#f0b775",
    "exchange": "#2f855a",
    "communication": "#2f855a",
    "working": "#68b984",
    "gathered": "#a8d8b8",
    "workspace": "#805ad5",
    "fragmentation": "#b8a2e8",
    "framework": "#805ad5",
    "reserve": "#b8a2e8",
    "overhead": "#a0aec0",
}
TIME_COLOURS = {"computation": "#2b6cb0", "exposed": "#c05621", "rest": "#a0aec0"}
RED = "#c53030"
MAX_BARS = 64
DPI = 130
Panel = Callable[[Any], None]


def training_panels(doc: Mapping[str, Any], timeline: Timeline | None) -> list[tuple[str, Panel, float]]:
    """(title, what draws it, height in inches) of a training answer's first plan."""
    best = doc["plans"][0]
    pools = best["memory_by_rank_gib"]
    panels: list[tuple[str, Panel, float]] = [
        ("Memory", lambda axes: memory_panel(axes, doc, pools), memory_height(pools)),
        ("Where a step's time goes", lambda axes: time_panel(axes, best), 4.2),
    ]
    if len(doc["micro_batches"]["points"]) > 1:
        panels.append(
            ("Throughput and memory by micro-batch", lambda axes: micro_batch_panel(axes, doc), 3.4)
        )
    if timeline is not None:
        layout = best["layout"]
        steps = layout["global_batch"] // (
            layout["micro_batch"] * layout["dp_replicate"] * layout["dp_shard"]
        )
        played = 1 + max(a.micro_batch for span in timeline.spans[0] for a in actions_of(span.step))
        whole = (
            f"{steps} micro-batches" if played >= steps else f"the first {played} of {steps} micro-batches"
        )
        heading = f"{TITLES[layout['schedule']]}: {whole}"
        panels.append((heading, lambda axes: timeline_panel(axes, timeline), timeline_height(timeline)))
    return panels


def serving_panels(doc: Mapping[str, Any]) -> list[tuple[str, Panel, float]]:
    """(title, what draws it, height in inches) of a serving answer."""
    best = doc["plans"][0]
    pools = best["memory_by_rank_gib"]
    front = [("Speed for a user against throughput", lambda axes: front_panel(axes, doc), 4.0)]
    return [
        *(front if doc["pareto"] else []),
        ("Memory", lambda axes: memory_panel(axes, doc, pools), memory_height(pools)),
        ("Where a decode step's time goes", lambda axes: decode_panel(axes, best), 3.6),
    ]


def micro_batch_panel(axes: Any, doc: Mapping[str, Any]) -> None:
    """Two curves over the micro-batch, throughput to the left and memory to the right, and the limit."""
    points = doc["micro_batches"]["points"]
    sizes = [point["micro_batch"] for point in points]
    axes.plot(sizes, [p["tokens_per_s"] for p in points], "o-", color=MEMORY_COLOURS["weights"])
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.set_ylim(bottom=0)
    axes.set(xlabel=f"sequences in a micro-batch; {doc['micro_batches']['turns']}", ylabel="tokens/s")
    memory = axes.twinx()
    memory.plot(sizes, [p["memory_gib"] for p in points], "s--", color=MEMORY_COLOURS["activations"])
    memory.axhline(doc["usable_memory_gib"], color=RED, linewidth=1)
    memory.set_ylim(0, 1.6 * doc["usable_memory_gib"])
    memory.set_ylabel("GiB on the fullest GPU (dashed)")


def memory_panel(axes: Any, doc: Mapping[str, Any], pools: Sequence[Mapping[str, float]]) -> None:
    """A bar for each pipeline rank (or pool of workers), by category, and the line that it must stay below.

    One or two bars lie, more of them stand.
    """
    ranks = range(0, len(pools), -(-len(pools) // MAX_BARS))
    lying = len(ranks) <= 2
    limit = doc["usable_memory_gib"]
    start = [0.0] * len(ranks)
    for name in pools[0]:
        sizes = [pools[rank][name] for rank in ranks]
        if max(sizes) < 0.005 * limit:
            continue
        look = {"color": MEMORY_COLOURS.get(name, GREY), "label": name}
        if lying:
            axes.barh(range(len(ranks)), sizes, 0.6, left=start, **look)
        else:
            axes.bar(range(len(ranks)), sizes, 0.8, bottom=start, **look)
        start = [b + h for b, h in zip(start, sizes, strict=True)]
    names = [str(rank) for rank in ranks]
    if lying:
        two = ("rank 0", "rank 1") if doc["goal"] == "train" else ("decode GPU", "prefill GPU")
        names = list(two) if len(ranks) > 1 else ["each GPU"]
    end = max(limit * 1.12, max(start) * 1.05)
    text = f"{limit:.1f} GiB usable" if limit < doc["gpu_memory_gib"] else f"{limit:g} GiB"
    if lying:
        axes.axvline(limit, color=RED, lw=1.2)
        axes.annotate(
            text, (limit, 0), (3, 4), ("data", "axes fraction"), "offset points", fontsize=8, color=RED
        )
        axes.set_yticks(range(len(ranks)), names, fontsize=8)
        axes.set_xlim(0, end)
        axes.set_ylim(len(ranks) - 0.4, -0.6)
        axes.set_xlabel("GiB", fontsize=8, color=GREY)
    else:
        axes.axhline(limit, color=RED, lw=1.2)
        axes.annotate(
            text,
            (1, limit),
            (-2, 3),
            ("axes fraction", "data"),
            "offset points",
            ha="right",
            fontsize=8,
            color=RED,
        )
        axes.set_xticks(range(len(ranks)), names, fontsize=7.5)
        axes.set_ylim(0, end)
        axes.set_xlabel("pipeline rank", fontsize=8, color=GREY)
        axes.set_ylabel("GiB", fontsize=8, color=GREY)
    handles, labels = axes.get_legend_handles_labels()
    order = slice(None) if lying else slice(None, None, -1)
    axes.legend(
        handles[order],
        labels[order],
        fontsize=7.5,
        frameon=False,
        loc="upper left",
        bbox_to_anchor=(1.0, 1.05),
    )


def memory_height(pools: Sequence[Any]) -> float:
    return 3.4 if len(pools) > 2 else 2.2


def time_panel(axes: Any, plan: Mapping[str, Any]) -> None:
    """Horizontal bars: computation by part, exposed communication by axis, the rest."""
    rows = [row for row in time_rows(plan) if row[1] >= SMALL_SHARE * plan["step_s"]]
    _bars(axes, rows, plan["step_s"], "seconds")


def decode_panel(axes: Any, plan: Mapping[str, Any]) -> None:
    """Horizontal bars of one decode step."""
    parts = plan["decode_parts_ms"]
    whole = sum(parts.values())
    kinds = {"exchange": "exposed", "all_reduce": "exposed", "host": "rest"}
    rows = [
        (PARTS.get(str(name), str(name)), ms, kinds.get(name, "computation"))
        for name, ms in sorted(parts.items(), key=lambda x: -x[1])
        if ms >= SMALL_SHARE * whole
    ]
    _bars(axes, rows, whole, "milliseconds")


def _bars(axes: Any, rows: Sequence[tuple[str, float, str]], whole: float, unit: str) -> None:
    places = range(len(rows))
    drawn = axes.barh(
        places, [value for _, value, _ in rows], 0.72, color=[TIME_COLOURS[kind] for _, _, kind in rows]
    )
    axes.bar_label(drawn, [f" {three(v)}  {v / whole:.1%}" for _, v, _ in rows], fontsize=7.5, color=INK)
    axes.set_yticks(list(places), [label for label, _, _ in rows], fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.16)
    axes.set_xlabel(unit, fontsize=8, color=GREY)


def timeline_height(timeline: Timeline) -> float:
    return min(max(1.3 + 0.2 * len(timeline.spans), 2.0), 7.0)


def timeline_panel(axes: Any, timeline: Timeline) -> None:
    """Ranks as rows, time to the right; a collection for each kind of work, as there are thousands of boxes.

    An overlapped pair is a box cut in two, its forward above.
    """
    from matplotlib.patches import Patch

    boxes: dict[tuple[str, float, float], list[tuple[float, float]]] = {}
    for rank, row in enumerate(timeline.spans):
        for span in row:
            actions = actions_of(span.step)
            tall = 0.8 / len(actions)
            for place, action in enumerate(actions):
                bottom = rank - 0.4 + place * tall
                boxes.setdefault((action.kind, bottom, tall), []).append((span.start, span.end - span.start))
    for rank in range(len(timeline.spans)):
        axes.broken_barh([(0, timeline.makespan)], (rank - 0.4, 0.8), facecolors=IDLE)
    edge = 0.3 if sum(map(len, timeline.spans)) < 3000 else 0.0
    for (kind, bottom, tall), spans in boxes.items():
        axes.broken_barh(spans, (bottom, tall), facecolors=COLOURS[kind], edgecolors="white", lw=edge)
    axes.set_xlim(0, timeline.makespan)
    axes.set_ylim(len(timeline.spans) - 0.5, -0.5)
    every = -(-len(timeline.spans) // 32)
    axes.set_yticks(range(0, len(timeline.spans), every))
    axes.set_ylabel("pipeline rank", fontsize=8, color=GREY)
    axes.set_xlabel("seconds", fontsize=8, color=GREY, loc="right")
    kinds = {kind for kind, _, _ in boxes}
    handles = [Patch(color=COLOURS[kind], label=MEANING[kind]) for kind in COLOURS if kind in kinds]
    handles.append(Patch(color=IDLE, label="idle"))
    axes.legend(
        handles=handles,
        fontsize=7.5,
        frameon=False,
        loc="upper left",
        bbox_to_anchor=(1.0, 1.05),
        handlelength=1.1,
    )


def front_panel(axes: Any, doc: Mapping[str, Any]) -> None:
    """Output tokens/s per GPU against tokens/s per user: the Pareto front, and the plans."""
    points = doc["pareto"]
    axes.plot(
        [p["tokens_per_s_per_user"] for p in points], [p["tokens_per_s_per_gpu"] for p in points],
        "-o", color="#2b6cb0", ms=3.5, lw=1.4, label="nothing beats these in both",
    )  # fmt: skip
    across = max(p["tokens_per_s_per_user"] for p in (*points, *doc["plans"])) / 30
    up = max(p["tokens_per_s_per_gpu"] for p in (*points, *doc["plans"])) / 20
    near: dict[tuple[int, int], tuple[tuple[float, float], list[str]]] = {}
    for number, plan in enumerate(doc["plans"], start=1):
        at = (plan["tokens_per_s_per_user"], plan["tokens_per_s_per_gpu"])
        axes.plot(*at, "o", color="#c05621", ms=6, label="plans" if number == 1 else None)
        near.setdefault((round(at[0] / across), round(at[1] / up)), (at, []))[1].append(str(number))
    for at, numbers in near.values():  # plans that lie on each other share a label
        label = ", ".join(numbers)
        axes.annotate(label, at, (6, -3), textcoords="offset points", fontsize=8, color="#c05621")
    axes.set_xlabel("output tokens/s for a user", fontsize=8, color=GREY)
    axes.set_ylabel("output tokens/s per GPU", fontsize=8, color=GREY)
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.grid(color=IDLE)
    axes.set_axisbelow(True)
    axes.legend(fontsize=8, frameon=False)


def png(panels: Sequence[tuple[str, Panel, float]], heading: str = "", width: float = 9.5) -> bytes:
    """The panels one below the other, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    heights = [height for _, _, height in panels]
    # No markup in texts: a model's name may hold dollar signs.
    with matplotlib.rc_context({"text.parse_math": False}):
        figure, rows = plt.subplots(
            len(panels), 1, figsize=(width, sum(heights) + 0.5 * bool(heading)), layout="constrained",
            gridspec_kw={"height_ratios": heights}, squeeze=False,
        )  # fmt: skip
        try:
            if heading:
                figure.suptitle(heading, fontsize=11, fontweight="bold", color=INK, x=0.01, ha="left")
            for axes, (title, draw, _) in zip(rows[:, 0], panels, strict=True):
                axes.set_title(title, fontsize=10, loc="left", color=INK)
                axes.tick_params(labelsize=7.5, colors=GREY, length=2)
                for side in ("top", "right"):
                    axes.spines[side].set_visible(False)
                draw(axes)
            out = io.BytesIO()
            figure.savefig(out, dpi=DPI, format="png")
        finally:
            plt.close(figure)
    return out.getvalue()


def write_png(path: Path, data: bytes, flag: str = "--picture") -> Path:
    """Raises UserError with one line where the file cannot be written."""
    try:
        path.write_bytes(data)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{flag}: cannot write {str(path)!r}: {reason}") from None
    return path
