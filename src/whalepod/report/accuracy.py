"""`whalepod accuracy`: the planner beside published measurements, row by row, the bad rows left in. No torch.

`accuracy_json` gives the rows that the tables and the markdown draw. An error is predicted / published - 1.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from whalepod.planner import goodput, serve_accuracy, train_accuracy
from whalepod.report.planning_tables import NARROW, WIDE, plain_table

FILES = Path(train_accuracy.__file__).parent / "data" / "validation"
POOR = 0.2
"""An error beyond which a row is marked."""
METRICS = {"output_tok_s_per_gpu": "throughput", "tpot_ms": "tpot", "ttft_ms": "ttft"}
Cell = Callable[[Mapping[str, Any]], str]


def accuracy_json(training: Path | None = None, serving: Path | None = None) -> dict[str, Any]:
    """Every row with its input columns, `published`, `predicted` and `error`; a serving row says so of its
    throughput, and in `throughput`, `tpot` and `ttft` of each.

    training, serving: CSV files in the columns of planner/data/validation; None is the one there.
    """
    trained = train_accuracy.training_rows(training or FILES / "training.csv")
    served = [_serving_row(row) for row in serve_accuracy.serving_rows(serving or FILES / "serving.csv")]
    lasting = [] if training or serving else goodput.published_rows()
    return {
        "training": trained,
        "serving": served,
        "points": [] if serving else serve_accuracy.published_points(),
        "goodput": lasting,
        "medians": {
            "training": train_accuracy.medians(trained),
            "serving": {name: _median(served, name) for name in METRICS.values()},
            "serving_groups": serving_groups(served),
        },
    }


def _serving_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row with a mapping for each metric beside the planner's own names."""
    more = {
        name: {
            "published": _published(row, key),
            "predicted": row[f"predicted_{key}"],
            "error": row[f"error_{key}"],
        }
        for key, name in METRICS.items()
    }
    return {**row, **more}


def _published(row: Mapping[str, Any], key: str) -> float | None:
    """What the error says was published; None where nothing was."""
    error = row[f"error_{key}"]
    return None if error is None else row[f"predicted_{key}"] / (1 + error)


def _median(rows: Sequence[Mapping[str, Any]], name: str) -> float | None:
    errors = [abs(row[name]["error"]) for row in rows if row[name]["error"] is not None]
    return median(errors) if errors else None


def serving_groups(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Median absolute errors by GPU, engine, mode and precision."""
    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        key = tuple(str(row.get(name) or "-") for name in ("gpu", "engine", "mode", "precision"))
        groups.setdefault(key, []).append(row)
    return [
        {
            "group": " ".join(key),
            "rows": len(members),
            **{name: _median(members, name) for name in METRICS.values()},
        }
        for key, members in sorted(groups.items())
    ]


# ---------------------------------------------------------------------------------------------- tables


def training_layout(row: Mapping[str, Any]) -> str:
    """`pp4x4 tp1 ep64`: sizes above 1, virtual stages after the x."""
    stages = f"x{row['vp']}" if row["vp"] not in ("", "1") else ""
    sizes = [f"pp{row['pp']}{stages}"] if row["pp"] != "1" else []
    sizes += [f"{axis}{row[axis]}" for axis in ("dp", "cp", "tp", "ep") if row[axis] not in ("", "1")]
    return " ".join(sizes) or "1 GPU"


def short_model(name: str) -> str:
    return name.removeprefix("DeepSeek-").split(" (")[0]


def short_gpu(name: str) -> str:
    return name.upper().removesuffix("_SXM")


TRAINING: dict[str, tuple[Cell, int]] = {
    "model": (lambda r: short_model(r["model"]), 0),
    "GPUs": (lambda r: f"{r['gpus']} {r['gpu']}", 0),
    "prec": (lambda r: r["prec"].split(" ")[0], NARROW),
    "layout": (training_layout, 0),
    "batch": (lambda r: f"{r['gbs']} x {r['seq']}", WIDE),
    "software": (lambda r: r["software"], NARROW),
    "cls": (lambda r: r["cls"], WIDE),
    "note": (lambda r: r["note"].split(";")[0].split(" (")[0][:24], 150),
}
GOODPUT = {"run": "run", "GPUs": "gpus", "restarts": "restarts", "note": "note"}
SERVING: dict[str, tuple[Cell, int]] = {
    "GPU": (lambda r: short_gpu(r["gpu"]), 0),
    "engine": (lambda r: r["engine"], 0),
    "prec": (lambda r: r.get("precision", ""), NARROW),
    "in": (lambda r: r["isl"], WIDE),
    "out": (lambda r: r["osl"], WIDE),
    "flight": (lambda r: r["concurrency"], 0),
    "layout": (lambda r: re.sub(r" (DPattn|moeTP|EP)1\b", "", r["layout"]), 0),
}


def accuracy_view(doc: Mapping[str, Any], width: int = NARROW) -> Group:
    """Every row at `width` columns, the medians below each table."""
    views: list[RenderableType] = []
    if doc["training"]:
        views += [
            Text("Training, tokens/s per GPU", style="bold"),
            training_table(doc["training"], width),
            Text(),
        ]
        views += [_medians_line(doc["medians"]["training"]), _worst_line(doc["training"], "error"), Text()]
    if doc["serving"]:
        views += [Text("Serving, output tokens/s per GPU, TPOT and TTFT", style="bold")]
        views += [serving_table(doc["serving"], width), Text(), groups_table(doc), Text()]
    if doc["points"]:
        views += [
            Text("Large deployments, tokens/s per GPU", style="bold"),
            points_table(doc["points"]),
            Text(),
        ]
    if doc["goodput"]:
        views += [Text("Goodput, share of a job's time", style="bold"), goodput_table(doc["goodput"], width)]
    return Group(*views)


def training_table(rows: Sequence[Mapping[str, Any]], width: int) -> Table:
    table = plain_table()
    shown = {title: cell for title, (cell, least) in TRAINING.items() if width >= least}
    for title in shown:
        table.add_column(title, no_wrap=title != "layout")
    for title in ("published", "predicted", "error"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        cells = [Text(cell(row)) for cell in shown.values()]
        table.add_row(*cells, *map(Text, _two(row)), error_text(row["error"]))
    return table


def serving_table(rows: Sequence[Mapping[str, Any]], width: int) -> Table:
    table = plain_table()
    table.padding = (0, 0, 0, 1) if width < NARROW else table.padding
    shown = {title: cell for title, (cell, least) in SERVING.items() if width >= least}
    for title in shown:
        table.add_column(title, no_wrap=title != "layout")
    for title in METRICS.values():
        if width >= WIDE:
            table.add_column(f"{title}\npublished", justify="right", no_wrap=True)
            table.add_column("pre-\ndicted", justify="right", no_wrap=True)
        table.add_column(f"{title}\nerror", justify="right", no_wrap=True)
    for row in rows:
        cells = [Text(str(cell(row))) for cell in shown.values()]
        for name in METRICS.values():
            cells += [*map(Text, _two(row[name]))] if width >= WIDE else []
            cells.append(error_text(row[name]["error"]))
        table.add_row(*cells)
    return table


def groups_table(doc: Mapping[str, Any]) -> Table:
    """Median absolute errors of serving: all rows, then by group."""
    table = plain_table()
    table.add_column("median error")
    for title in ("rows", *METRICS.values()):
        table.add_column(title, justify="right", no_wrap=True)
    whole = {"group": "all", "rows": len(doc["serving"]), **doc["medians"]["serving"]}
    for group in (whole, *doc["medians"]["serving_groups"]):
        cells = [percent(group[name]) for name in METRICS.values()]
        table.add_row(Text(group["group"]), str(group["rows"]), *cells)
    return table


def points_table(points: Sequence[Mapping[str, Any]]) -> Table:
    table = plain_table()
    table.add_column("published figure")
    for title in ("published", "predicted", "error"):
        table.add_column(title, justify="right", no_wrap=True)
    for point in points:
        note = f" ({point['note']})" if point["note"] else ""
        table.add_row(Text(point["name"] + note), *map(Text, _two(point)), error_text(point["error"]))
    return table


def goodput_table(rows: Sequence[Mapping[str, Any]], width: int) -> Table:
    table = plain_table()
    shown = [title for title in GOODPUT if title != "note" or width >= NARROW]
    for title in shown:
        table.add_column(title)
    for title in ("published", "predicted", "error"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        cells = [Text(row[GOODPUT[title]]) for title in shown]
        shares = [percent(row[name]) for name in ("published", "predicted")]
        table.add_row(*cells, *shares, error_text(row["error"]))
    return table


def _two(row: Mapping[str, Any]) -> list[str]:
    return ["-" if row[name] is None else number(row[name]) for name in ("published", "predicted")]


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def percent(value: float | None, sign: str = "") -> str:
    return "-" if value is None else f"{value:{sign}.1%}"


def error_text(error: float | None) -> Text:
    """Marked where it is large."""
    return Text(percent(error, "+"), style="red" if error is not None and abs(error) > POOR else "")


def _medians_line(medians: Mapping[str, float]) -> Text:
    return Text("median error: " + ", ".join(f"{name} {value:.1%}" for name, value in medians.items()))


def _worst_line(rows: Sequence[Mapping[str, Any]], key: str) -> Text:
    worst = max(rows, key=lambda row: abs(row[key]))
    where = f"{worst['gpus']} {worst['gpu']}, {worst['software']}, {training_layout(worst)}"
    return Text(f"worst row: {worst[key]:+.1%} ({where})")


# -------------------------------------------------------------------------------------------- markdown


def accuracy_markdown(doc: Mapping[str, Any]) -> str:
    """The tables for the docs, every row of them."""
    lines = ["# The planner beside published measurements", ""]
    lines += ["Made by `whalepod accuracy --markdown`. An error is predicted / published - 1.", ""]
    if doc["training"]:
        medians = doc["medians"]["training"]
        lines += ["## Training, tokens/s per GPU", ""]
        lines += _markdown(
            ("group", "median error"), [(name, percent(value)) for name, value in medians.items()]
        )
        titles = ("model", "GPUs", "prec", "layout", "batch", "software", "cls", "note")
        rows = [
            (*(TRAINING[t][0](row) for t in titles), *_two(row), _bold(row["error"]))
            for row in doc["training"]
        ]
        lines += _markdown((*titles, "published", "predicted", "error"), rows)
    if doc["serving"]:
        lines += ["## Serving", "", "Output tokens/s per GPU; TPOT and TTFT in milliseconds.", ""]
        whole = {"group": "all", "rows": len(doc["serving"]), **doc["medians"]["serving"]}
        groups = [
            (g["group"], str(g["rows"]), *(percent(g[name]) for name in METRICS.values()))
            for g in (whole, *doc["medians"]["serving_groups"])
        ]
        lines += _markdown(("median error", "rows", *METRICS.values()), groups)
        titles = (*SERVING, *(f"{name} {x}" for name in METRICS.values() for x in ("", "predicted", "error")))
        rows = [
            (
                *(str(cell(row)) for cell, _ in SERVING.values()),
                *(x for name in METRICS.values() for x in (*_two(row[name]), _bold(row[name]["error"]))),
            )
            for row in doc["serving"]
        ]
        lines += _markdown(tuple(title.strip() for title in titles), rows)
    if doc["points"]:
        lines += ["## Large deployments, tokens/s per GPU", ""]
        rows = [(p["name"], p["source"], *_two(p), _bold(p["error"]), p["note"]) for p in doc["points"]]
        lines += _markdown(("figure", "source", "published", "predicted", "error", "note"), rows)
    if doc["goodput"]:
        lines += ["## Goodput, share of a job's time", ""]
        rows = [
            [r[key] for key in (*GOODPUT.values(), "src")]
            + [percent(r["published"]), percent(r["predicted"]), _bold(r["error"])]
            for r in doc["goodput"]
        ]
        lines += _markdown((*GOODPUT, "source", "published", "predicted", "error"), rows)
    return "\n".join(lines).rstrip() + "\n"


def _bold(error: float | None) -> str:
    text = percent(error, "+")
    return f"**{text}**" if error is not None and abs(error) > POOR else text


def _markdown(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table of GitHub's markdown, and a blank line."""

    def line(cells: Sequence[str]) -> str:
        clean = (" ".join(cell.split()).replace("|", "\\|").replace("<", "&lt;") for cell in cells)
        return f"| {' | '.join(clean)} |"

    return [line(titles), f"|{' --- |' * len(titles)}", *map(line, rows), ""]
