"""The scaling curve: throughput against GPUs with the ideal line, and the efficiency below it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from whalepod.report.family import short_number
from whalepod.report.planning_page import embedded, template
from whalepod.report.planning_pictures import Panel, png
from whalepod.report.schedule import GREY, IDLE, INK

BLUE, ORANGE = "#2b6cb0", "#c05621"


def scale_panels(doc: Mapping[str, Any]) -> list[tuple[str, Panel, float]]:
    """(title, what draws it, height in inches); empty where nothing fits."""
    points = [p for p in doc["points"] if p["fits"]]
    if not points:
        return []
    unit = "tokens/s" if doc["goal"] == "train" else "output tokens/s"
    return [
        (f"{unit} by GPUs", lambda axes: throughput_panel(axes, points, unit), 4.2),
        ("Efficiency against the smallest count that fits", lambda axes: efficiency_panel(axes, points), 2.4),
    ]


def throughput_panel(axes: Any, points: list[dict[str, Any]], unit: str) -> None:
    """Log-log, with what each doubling brings."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    counts = [p["num_gpus"] for p in points]
    speeds = [p["tokens_per_s"] for p in points]
    axes.plot(counts, [speeds[0] * n / counts[0] for n in counts], "--", color=GREY, lw=1, label="ideal")
    axes.plot(counts, speeds, "-o", color=BLUE, ms=4, lw=1.6, label="planned")
    measured = [(p["num_gpus"], p["measured_tokens_per_s"]) for p in points if p.get("measured_tokens_per_s")]
    if measured:
        axes.plot(*zip(*measured, strict=True), "s", color=ORANGE, ms=5, label="measured")
    for point in points:
        gain = point["speedup_per_doubling"]
        if gain is not None:
            at = (point["num_gpus"], point["tokens_per_s"])
            axes.annotate(f"x{gain:.2f}", at, (3, -12), textcoords="offset points", fontsize=7.5, color=INK)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))
    axes.set_ylabel(unit, fontsize=8, color=GREY)
    _counts(axes, counts)
    axes.legend(fontsize=8, frameon=False, loc="upper left")


def efficiency_panel(axes: Any, points: list[dict[str, Any]]) -> None:
    counts = [p["num_gpus"] for p in points]
    axes.axhline(100, color=GREY, lw=1, ls="--")
    axes.plot(counts, [100 * p["efficiency"] for p in points], "-o", color=ORANGE, ms=4, lw=1.6)
    axes.set_xscale("log", base=2)
    axes.set_ylim(0, max(110.0, *(105 * p["efficiency"] for p in points)))
    axes.set_ylabel("per cent", fontsize=8, color=GREY)
    axes.set_xlabel("GPUs", fontsize=8, color=GREY)
    _counts(axes, counts)


def _counts(axes: Any, counts: list[int]) -> None:
    axes.set_xticks(counts, [f"{n:,}" for n in counts])
    axes.minorticks_off()
    axes.grid(color=IDLE)
    axes.set_axisbelow(True)


def scale_png(doc: Mapping[str, Any]) -> bytes:
    goal = "training" if doc["goal"] == "train" else "serving"
    return png(scale_panels(doc), f"{doc['model']} on {doc['gpu']}, {goal} in {doc['precision'].upper()}")


def scale_page(doc: Mapping[str, Any]) -> str:
    """One HTML file, nothing fetched."""
    pictures = [(title, embedded(png([("", draw, height)]))) for title, draw, height in scale_panels(doc)]
    return template("scale.html").render(doc=doc, pictures=pictures)
