"""A plan for the terminal: the plans side by side, then the best one's memory, time, cost, traps and advice.

Drawn from the JSON of `report/planning` and nothing else. Names of models and files are text, never markup.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import floor, log10
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from whalepod.report.calculator import calculator_line

NARROW = 100
"""Columns below which a table leaves some of its own out."""
BAR = 20
WIDE = 120
"""Columns from which memory and time stand side by side."""
SMALL_GIB = 0.05
SMALL_SHARE = 0.002
PART_LABELS = {
    "memory": "norms, residuals (memory-bound)",
    "projections": "projections of attention",
    "attention": "attention core",
    "shared": "shared experts",
    "dense": "dense MLPs",
    "permute": "sorting tokens by expert",
    "gradients": "adding up gradients",
    "quantize": "quantising",
    "launching": "waiting for launches",
}
TIME_LABELS = {
    "bubble": "pipeline bubble",
    "interference": "slowed by hidden exchange",
    "optimizer": "optimizer",
    "other": "once a step (batch, norms)",
}


def training_view(doc: Mapping[str, Any], width: int = NARROW, calculator: bool = False) -> Group:
    """Everything of a training answer at `width` columns."""
    views: list[RenderableType] = [headline(doc), Text()]
    if doc["plans"]:
        best = doc["plans"][0]
        views += [plans_table(doc, width), Text(), Text("The first of them", style="bold"), facts(doc, best)]
        views += [Text(), *beside(memory_table(doc, best, width), times_table(best, width), width), Text()]
        views += [micro_batches_table(doc), Text()]
        views += notes("warning", best["warnings"], "yellow")
    else:
        views.append(Text("No layout fits.", style="bold red"))
    views += notes("note", doc["notes"], "dim")
    views += notes("advice", doc["advice"], "green")
    views += notes("rejected", map(rejected_line, doc["rejected"]), "dim")
    if calculator:
        views += notes("calculator", [calculator_text(doc)], "dim")
    return Group(*views)


def beside(left: RenderableType, right: RenderableType, width: int) -> list[RenderableType]:
    """Two views next to each other where there is room, else one after the other."""
    if width < WIDE:
        return [left, Text(), right]
    table = Table.grid(padding=(0, 4, 0, 0))
    table.add_row(left, right)
    return [table]


def headline(doc: Mapping[str, Any]) -> Text:
    text = Text(doc["model"], style="bold")
    text.append(
        f" on {doc['num_gpus']:,} x {doc['gpu']}, training in {doc['precision'].upper()} with "
        f"{doc['software']}: {doc['global_batch']:,} sequences of {doc['sequence_length']:,} tokens a step; "
        f"{doc['layouts_considered']:,} layouts, {doc['layouts_fitting']:,} fit",
        style="not bold",
    )
    return text


def plans_table(doc: Mapping[str, Any], width: int = NARROW) -> Table:
    """Two lines for each plan, the best first."""
    table = plain_table()
    table.add_column("", justify="right")
    table.add_column("layout")
    figures = {
        "tokens/s": ("tokens_per_s", "{:,.0f}".format, 0),
        "per GPU": ("tokens_per_s_per_gpu", "{:,.0f}".format, 0),
        "TFLOP/s": ("tflops_per_gpu", three, NARROW),
        "MFU": ("mfu", "{:.1%}".format, 0),
        "step s": ("step_s", three, 0),
        "GiB": ("memory_gib", "{:.1f}".format, 0),
    }
    shown = {title: figure for title, figure in figures.items() if width >= figure[2]}
    for title in shown:
        table.add_column(title, justify="right", no_wrap=True)
    if width >= WIDE:
        table.add_column("limited by", no_wrap=True)
    for number, plan in enumerate(doc["plans"], start=1):
        axes, work = plan["layout_in_words"].split("; ")
        layout = Text(axes)
        layout.append(f"\n{work.replace('micro-batch', 'mb').replace('recompute ', '')}", style="dim")
        cells = [Text(form(plan[key])) for key, form, _ in shown.values()]
        cells += [Text(plan["limited_by"])] if width >= WIDE else []
        table.add_row(str(number), layout, *cells)
    table.caption = (
        f"GiB: on the fullest GPU, of {doc['usable_memory_gib']:.1f} usable. MFU: of the dense BF16 peak. "
        "mb: sequences in a micro-batch. selective, full: what is recomputed."
    )
    table.caption_justify = "left"
    return table


def micro_batches_table(doc: Mapping[str, Any]) -> Table:
    """Throughput and memory of the first plan's layout against its micro-batch."""
    curve, chosen = doc["micro_batches"], doc["plans"][0]["layout"]["micro_batch"]
    table = plain_table()
    table.title, table.title_justify = Text("micro-batch"), "left"
    for title in ("", "sequences", "tokens/s", "GiB", ""):
        table.add_column(title, justify="right", no_wrap=True)
    most = max(point["tokens_per_s"] for point in curve["points"])
    for point in curve["points"]:
        bar = "█" * round(BAR * point["tokens_per_s"] / most)
        fits = "" if point["fits"] else "  does not fit"
        table.add_row(
            ">" if point["micro_batch"] == chosen else "",
            str(point["micro_batch"]),
            f"{point['tokens_per_s']:,.0f}",
            f"{point['memory_gib']:.1f}",
            Text(f"{bar}{fits}", style="" if point["fits"] else "dim", justify="left"),
        )
    table.caption, table.caption_justify = curve["turns"], "left"
    return table


def plain_table() -> Table:
    return Table(box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False, show_edge=False)


def facts(doc: Mapping[str, Any], plan: Mapping[str, Any]) -> RenderableType:
    """What the plan costs and what limits it."""
    price = doc["price"]
    hours = plan["gpu_hours_per_trillion_tokens"]
    rows = [
        ("layout", plan["layout_in_words"]),
        ("a trillion tokens", f"{three(plan['days_per_trillion_tokens'])} days, {hours:,.0f} GPU hours"),
    ]
    rows.append(("goodput", goodput_words(plan)))
    if price is None:
        rows.append(("cost", f"no price of {doc['gpu']} is known; give one with --price"))
    else:
        rows.append(
            (
                "cost",
                f"{dollars(plan['usd_per_hour'])} per hour, {dollars(plan['usd_per_trillion_tokens'])} per "
                f"trillion tokens, at {price_words(price)}",
            )
        )
    return facts_grid(rows)


def goodput_words(plan: Mapping[str, Any]) -> str:
    """`97.3% of a long job's time: ...`."""
    return (
        f"{plan['goodput']:.1%} of a long job's time, with a failure every "
        f"{duration(plan['hours_between_failures'] * 3600)}: a checkpoint of "
        f"{plan['checkpoint_bytes'] / 1e12:.3g} TB every {duration(plan['checkpoint_every_s'])} "
        f"({plan['checkpoint_every_steps']:,} steps), {duration(plan['checkpoint_write_s'])} to write, "
        f"stopping {duration(plan['checkpoint_blocking_s'])}; {duration(plan['restart_s'])} to start again"
    )


def duration(seconds: float) -> str:
    """`8.2 min`, in the unit that fits."""
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{three(seconds / size)} {unit}"
    return f"{three(seconds)} s"


def facts_grid(rows: Iterable[tuple[str, str]]) -> RenderableType:
    """Labels and what they say."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column()
    for label, value in rows:
        table.add_row(Text(label, style="dim"), Text(value))
    return Padding(table, (0, 0, 0, 1))


def price_words(price: Mapping[str, Any]) -> str:
    """`$3.29 per GPU hour (2026-08; RunPod, ...)`."""
    origin = "; ".join(dict.fromkeys((price["date"], price["source"])))
    return f"${price['usd_per_gpu_hour']:,.4g} per GPU hour ({origin})"


def three(value: float) -> str:
    """Three digits that say something, never an exponent: `3,456`, `34.6`, `0.00346`."""
    if abs(value) >= 100 or value == 0:
        return f"{value:,.0f}"
    return f"{value:.{min(max(2 - floor(log10(abs(value))), 0), 9)}f}"


def dollars(value: float) -> str:
    """`$71.2M`, `$6,738`, `$0.41`."""
    for size, unit in ((1e9, "B"), (1e6, "M")):
        if value >= size:
            return f"${value / size:,.3g}{unit}"
    return f"${value:,.0f}" if value >= 100 else f"${value:,.2f}"


def memory_table(doc: Mapping[str, Any], plan: Mapping[str, Any], width: int = NARROW) -> Group:
    """Memory by category on the fullest rank and the ends of the pipeline; every rank's sum below."""
    ranks = plan["memory_by_rank_gib"]
    sums = [sum(parts.values()) for parts in ranks]
    fullest = sums.index(max(sums))
    others = [r for r in (0, len(ranks) - 1) if r != fullest] if len(ranks) > 1 else []
    of_rank = f"rank {fullest}" if len(ranks) > 1 else "each GPU"
    table = plain_table()
    table.add_column("memory, GiB")
    table.add_column(of_rank, justify="right", no_wrap=True)
    table.add_column(f"of {doc['usable_memory_gib']:.1f} usable", no_wrap=True)
    for rank in dict.fromkeys(others):
        table.add_column(f"rank {rank}", justify="right", no_wrap=True)
    for name, gib in ranks[fullest].items():
        row = [gib, *(ranks[rank][name] for rank in dict.fromkeys(others))]
        if max(row) >= SMALL_GIB:
            share = gib / doc["usable_memory_gib"]
            table.add_row(name, f"{gib:.2f}", bar(share), *(f"{x:.2f}" for x in row[1:]))
    table.add_section()
    total = [sums[rank] for rank in dict.fromkeys(others)]
    whole = sums[fullest] / doc["usable_memory_gib"]
    table.add_row("all", f"{sums[fullest]:.2f}", bar(whole), *(f"{x:.2f}" for x in total))
    if len(ranks) <= 2:
        return Group(table)
    listed = "  ".join(f"{rank}: {gib:.1f}" for rank, gib in enumerate(sums))
    return Group(table, Padding(Text(f"by pipeline rank, GiB  {listed}", style="dim"), (0, 0, 1, 1)))


def times_table(plan: Mapping[str, Any], width: int = NARROW) -> Table:
    """Where a step's time goes."""
    table = plain_table()
    table.add_column("time of a step")
    table.add_column("s", justify="right", no_wrap=True)
    table.add_column("share", no_wrap=True)
    for label, seconds, _ in time_rows(plan):
        share = seconds / plan["step_s"]
        if share >= SMALL_SHARE:
            table.add_row(label, three(seconds), bar(share))
    table.add_section()
    table.add_row("all", three(plan["step_s"]), "")
    return table


def time_rows(plan: Mapping[str, Any]) -> list[tuple[str, float, str]]:
    """(label, seconds, kind) of everything that a step spends time on; they add up to it.

    kind: `computation`, `exposed` communication, or `rest`.
    """
    parts = plan["time_parts_s"]
    computed = sorted(parts["computation"].items(), key=lambda x: -x[1])
    return [
        *((PART_LABELS.get(str(name), str(name)), s, "computation") for name, s in computed),
        *((f"exposed communication, {axis}", s, "exposed") for axis, s in parts["exposed"].items()),
        *((label, parts[name], "rest") for name, label in TIME_LABELS.items()),
    ]


def bar(share: float, width: int = BAR) -> Text:
    """A share as a bar and in per cent; red beyond the whole."""
    filled = min(max(round(share * width), 0), width)
    text = Text("█" * filled, style="red" if share > 1 else "blue")
    text.append("·" * (width - filled), style="dim")
    text.append(f" {share:6.1%}", style="default")
    return text


def notes(label: str, lines: Iterable[str], style: str) -> list[RenderableType]:
    """Lines that begin with a label and hang below it."""
    out: list[RenderableType] = []
    for line in lines:
        table = Table.grid(padding=(0, 1, 0, 0))
        table.add_column(no_wrap=True)
        table.add_column()
        table.add_row(Text(f"{label}:", style=style), Text(line))
        out.append(table)
    return out


def rejected_line(rejected: Mapping[str, Any]) -> str:
    if rejected["layout_in_words"] is None:
        return rejected["reason"]
    return f"{rejected['layout_in_words']}: {rejected['reason']}"


def calculator_text(doc: Mapping[str, Any]) -> str:
    """The web's rule beside the plan, and what it leaves out."""
    found = doc["web_calculator"]
    return f"{calculator_line(found, doc['gpu'])} The rule leaves out: {'; '.join(found['left_out'])}."
