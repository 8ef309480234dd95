"""A serving plan for the terminal, drawn from the JSON of `report/serving`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from whalepod.report.planning_tables import (
    NARROW,
    SMALL_GIB,
    SMALL_SHARE,
    WIDE,
    bar,
    beside,
    calculator_text,
    dollars,
    facts_grid,
    notes,
    plain_table,
    price_words,
    rejected_line,
    three,
)

PARTS = {
    "attention": "attention",
    "experts": "routed experts",
    "shared_experts": "shared experts",
    "dense_mlp": "dense MLPs",
    "router": "router",
    "head": "head",
    "exchange": "tokens to experts and back",
    "all_reduce": "all-reduces of tensor parallelism",
    "drafts": "drafts of multi-token prediction",
    "host": "host",
    "other": "norms and other small kernels",
}
LIMITS = {"kv_cache": "KV cache"}
FRONT_ROWS = 8


def serving_view(doc: Mapping[str, Any], width: int = NARROW, calculator: bool = False) -> Group:
    """Everything of a serving answer at `width` columns."""
    views: list[RenderableType] = [headline(doc), Text()]
    if doc["plans"]:
        best = doc["plans"][0]
        views += [plans_table(doc, width), Text(), Text("The first of them", style="bold"), facts(doc, best)]
        views += [Text(), *beside(memory_table(doc, best), step_table(best), width), Text()]
        if doc["pareto"]:
            views += [front_table(doc), Text()]
        views += notes("warning", best["warnings"], "yellow")
        views += notes("note", best["notes"], "dim")
        advice = [f"limited by {limit_words(best)}", *doc["advice"]]
        views += notes("advice", [advice[0] + helps_words(best), *advice[1:]], "green")
    else:
        views.append(Text("No layout fits.", style="bold red"))
        views += notes("advice", doc["advice"], "green")
    views += notes("rejected", map(rejected_line, doc["rejected"]), "dim")
    if calculator:
        views += notes("calculator", [calculator_text(doc)], "dim")
    return Group(*views)


def headline(doc: Mapping[str, Any]) -> Text:
    text = Text(doc["model"], style="bold")
    asked = f"{doc['concurrency']:,.0f} in flight" if doc["concurrency"] else "as many in flight as pays"
    limits = [
        f"{n.upper()} up to {doc[f'{n}_limit_ms']:g} ms" for n in ("ttft", "tpot") if doc[f"{n}_limit_ms"]
    ]
    text.append(
        f" on {doc['num_gpus']:,} x {doc['gpu']}, serving in {doc['precision'].upper()} with "
        f"{doc['software']}: prompts of {doc['isl']:,} and answers of {doc['osl']:,} tokens, "
        f"{', '.join([asked, *limits])}; {doc['layouts_considered']:,} combinations timed",
        style="not bold",
    )
    return text


def plans_table(doc: Mapping[str, Any], width: int = NARROW) -> Table:
    """A row for each deployment, the best first."""
    table = plain_table()
    table.add_column("", justify="right")
    table.add_column("layout")
    figures = {
        "tokens/s": ("tokens_per_s", "{:,.0f}", 0),
        "per GPU": ("tokens_per_s_per_gpu", "{:,.0f}", 0),
        "per user": ("tokens_per_s_per_user", "{:,.1f}", NARROW),
        "TTFT ms": ("ttft_ms", "{:,.0f}", 0),
        "TPOT ms": ("tpot_ms", "{:,.1f}", 0),
        "in flight": ("concurrency", "{:,.0f}", NARROW),
        "GiB": ("memory_gib", "{:.1f}", WIDE),
    }
    shown = {title: figure for title, figure in figures.items() if width >= figure[2]}
    for title in shown:
        table.add_column(title, justify="right", no_wrap=True)
    if width >= WIDE:
        table.add_column("limited by", no_wrap=True)
    for number, plan in enumerate(doc["plans"], start=1):
        cells = [Text(form.format(plan[key])) for key, form, _ in shown.values()]
        cells += [Text(limit_words(plan))] if width >= WIDE else []
        table.add_row(str(number), Text(layout_words(plan["layout"])), *cells)
    table.caption = (
        "tokens/s: of output. tp, dp: of attention (dp ranks hold different requests); ep, moe tp: of "
        "experts. TTFT: to the first token, TPOT: per output token."
    )
    table.caption_justify = "left"
    return table


def layout_words(layout: Mapping[str, Any]) -> str:
    """`4 workers of dp 16, ep 16`; for two pools a line each."""
    lines = []
    for pool in ("worker", "prefill", "decode"):
        if pool in layout:
            w = layout[pool]
            sizes = [
                f"{name} {w[key]}" for name, key in (("pp", "pp"), ("tp", "tp"), ("dp", "dp")) if w[key] > 1
            ]
            experts = [f"{n} {w[k]}" for n, k in (("ep", "ep"), ("moe tp", "moe_tp")) if w[k] > 1]
            spread = ", ".join(filter(None, (" x ".join(sizes) or "1 GPU", " x ".join(experts))))
            number = f"{w['workers']} x ({spread})" if w["workers"] > 1 else spread
            lines.append(number if pool == "worker" else f"{pool} {number}")
    return "\n".join(lines)


def facts(doc: Mapping[str, Any], plan: Mapping[str, Any]) -> RenderableType:
    """What the deployment holds and costs."""
    price = doc["price"]
    users = plan["kv_capacity_tokens"]
    rows = [
        ("layout", f"{layout_words(plan['layout']).replace(chr(10), ' + ')}  [{plan['layout_in_words']}]"),
        ("KV cache", f"{users:,} tokens in all, {plan['concurrency']:,.0f} requests in flight"),
        ("requests", f"{three(plan['requests_per_s'])} per second"),
    ]
    if price is None:
        rows.append(("cost", f"no price of {doc['gpu']} is known; give one with --price"))
    else:
        rows.append(
            (
                "cost",
                f"{dollars(plan['usd_per_hour'])} per hour, "
                f"{dollars(plan['usd_per_million_output_tokens'])} per million output "
                f"tokens, at {price_words(price)}",
            )
        )
    return facts_grid(rows)


def memory_table(doc: Mapping[str, Any], plan: Mapping[str, Any]) -> Table:
    """What a GPU holds by category; of the prefill workers too where there are some."""
    pools = plan["memory_by_rank_gib"]
    table = plain_table()
    table.add_column("memory, GiB")
    table.add_column("decode GPU" if len(pools) > 1 else "each GPU", justify="right", no_wrap=True)
    table.add_column(f"of {doc['gpu_memory_gib']:g}", no_wrap=True)
    if len(pools) > 1:
        table.add_column("prefill GPU", justify="right", no_wrap=True)
    for name, gib in pools[0].items():
        row = [pool[name] for pool in pools]
        if max(row) >= SMALL_GIB:
            more = [f"{x:.2f}" for x in row[1:]]
            table.add_row(name, f"{gib:.2f}", bar(gib / doc["gpu_memory_gib"]), *more)
    table.add_section()
    sums = [sum(pool.values()) for pool in pools]
    table.add_row(
        "all", f"{sums[0]:.2f}", bar(sums[0] / doc["gpu_memory_gib"]), *(f"{x:.2f}" for x in sums[1:])
    )
    return table


def step_table(plan: Mapping[str, Any]) -> Table:
    """Where a decode step's and a prompt's time goes."""
    decode, prefill = plan["decode_parts_ms"], plan["prefill_parts_ms"]
    sums = sum(decode.values()), sum(prefill.values())
    table = plain_table()
    table.add_column("time")
    table.add_column("decode\nstep ms", justify="right", no_wrap=True)
    table.add_column("share", no_wrap=True)
    table.add_column("prompt\nms", justify="right", no_wrap=True)
    for name, ms in sorted(decode.items(), key=lambda x: -x[1]):
        prompt = prefill.get(name, 0.0)
        if max(ms / sums[0], prompt / sums[1]) >= SMALL_SHARE:
            table.add_row(PARTS.get(name, name), three(ms), bar(ms / sums[0]), three(prompt))
    table.add_section()
    table.add_row("all", three(sums[0]), "", three(sums[1]))
    return table


def front_table(doc: Mapping[str, Any]) -> Table:
    """The Pareto front, thinned to a few rows."""
    points = doc["pareto"]
    step = max(1, -(-len(points) // FRONT_ROWS))
    chosen = points[::step]
    if points[-1] not in chosen:
        chosen = [*chosen, points[-1]]
    table = plain_table()
    for title in ("tokens/s per user", "per GPU", "TTFT ms", "TPOT ms", "in flight"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("layout")
    for p in chosen:
        table.add_row(
            f"{p['tokens_per_s_per_user']:,.1f}",
            f"{p['tokens_per_s_per_gpu']:,.0f}",
            f"{p['ttft_ms']:,.0f}",
            f"{p['tpot_ms']:,.1f}",
            f"{p['concurrency']:,.0f}",
            Text(p["layout_in_words"]),
        )
    table.caption = (
        f"{len(chosen)} of the {len(points)} points that nothing beats in both speed and throughput."
    )
    table.caption_justify = "left"
    return table


def limit_words(plan: Mapping[str, Any]) -> str:
    return LIMITS.get(str(plan["limited_by"]), str(plan["limited_by"]))


def helps_words(plan: Mapping[str, Any]) -> str:
    helps = ", ".join(f"{h['change']}: {h['gain']:+.0%}" for h in plan["helps"][:3])
    return f"; what would help: {helps}" if helps else ""
