"""`whalepod bench-serve`: a server under load, beside what the planner expects of it.

A folder is served in this process, and predicted where the planner can; of a server that somebody else runs
only the figures are known. `bench_serve` gives the one dictionary that the table draws.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from whalepod.report.planning_tables import NARROW, notes, plain_table, three
from whalepod.serve.client import find_model, open_client
from whalepod.serve.http.open import ServerOptions, background_server
from whalepod.serve.measure import Load, Point, Progress, measure
from whalepod.serve.predict import Expected, predict
from whalepod.serve.start import EngineConfig
from whalepod.spec.errors import UserError
from whalepod.spec.hardware import Gpu
from whalepod.spec.layout import Layout
from whalepod.spec.model import shown
from whalepod.spec.presets import load_model_spec
from whalepod.text.tokenizer import load_tokenizer

COMPARED = {"output_tokens_per_s": "output_tokens_per_s", "ttft_ms": "ttft_ms_p50", "tpot_ms": "tpot_ms_p50"}
"""What is predicted, and the measured figure that it stands beside."""


def bench_url(
    url: str, load: Load, model: str | None, api_key: str | None, progress: Progress
) -> dict[str, Any]:
    """Measures a server that runs already; prompts are words, for its tokenizer is its own."""

    async def run() -> tuple[str, list[Point]]:
        async with open_client(url, api_key) as client:
            name = await find_model(client, model)
            return name, await measure(client, name, load, None, progress)

    name, points = asyncio.run(run())
    return _document(url, name, load, points, {}, "of a server by its URL nothing is known to predict from")


def bench_folder(
    config: EngineConfig, load: Load, progress: Progress, say: Callable[[str], Any]
) -> dict[str, Any] | None:
    """Serves a folder on a free port and measures that; prompts are token ids. None on ranks that follow."""
    if not Path(config.path).is_dir():
        raise UserError(
            f"no folder {shown(config.path)}: give a run's folder, a Hugging Face checkpoint folder or a "
            "server's URL (http://...)"
        )
    tokenizer = load_tokenizer(config.path)
    vocabulary = sorted(set(range(tokenizer.vocab_size)) - tokenizer.special_ids)

    async def run(url: str) -> tuple[str, list[Point]]:
        async with open_client(url, trust_env=False) as client:
            name = await find_model(client, None)
            return name, await measure(client, name, load, vocabulary, progress)

    with background_server(config, ServerOptions(port=0, drain_s=0.0), say) as url:
        if url is None:
            return None
        name, points = asyncio.run(run(url))
    estimates: dict[int, Expected] = {}
    why = None
    try:
        for point in points:
            if point.concurrency is None:
                raise UserError("the planner knows requests in flight, not their rate")
            estimates[point.concurrency] = predicted(config, load, point.concurrency, len(point.answers))
    except UserError as error:
        why = str(error)
    return _document(config.path, name, load, points, estimates, why) | {"layout": _sizes(config.layout)}


def predicted(
    config: EngineConfig, load: Load, concurrency: int, requests: int, gpu: Gpu | None = None
) -> Expected:
    """What the planner expects of the same engine, load and layout. Raises UserError where it cannot tell."""
    if load.shared_prefix:
        raise UserError("what a shared prefix saves is not predicted")
    each = (load.prompt_tokens, load.new_tokens)
    return predict(config, load_model_spec(config.path), [each] * requests, concurrency, gpu)


def _document(
    target: str,
    model: str,
    load: Load,
    points: list[Point],
    estimates: Mapping[int, Expected],
    why: str | None,
) -> dict[str, Any]:
    """`ratio`: measured over predicted, the median where it is a time; `not_predicted`: why not."""
    rows = []
    for point in points:
        row = point.as_dict() | {"predicted": None, "ratio": None}
        if point.concurrency is not None and point.concurrency in estimates:
            expected = estimates[point.concurrency].as_dict()
            row["predicted"] = {name: expected[name] for name in (*COMPARED, "limited_by")}
            row["ratio"] = {
                name: row[measured] / expected[name] if row[measured] and expected[name] else None
                for name, measured in COMPARED.items()
            }
        rows.append(row)
    asked = {
        name: value for name, value in asdict(load).items() if name not in ("concurrency", "rate", "requests")
    }
    asked["shared_prefix_tokens"] = asked.pop("shared_prefix")
    found = [note for each in estimates.values() for note in each.notes]
    return {
        "target": target,
        "model": model,
        **asked,
        "points": rows,
        "not_predicted": why,
        "notes": list(dict.fromkeys(found)),
    }


def _sizes(layout: Layout) -> dict[str, int]:
    return {"tp": layout.tp, "pp": layout.pp, "dp": layout.num_replicas, "ep": layout.ep}


def bench_view(doc: Mapping[str, Any], width: int = NARROW) -> Group:
    """The points at `width` columns, each with its prediction below, and what to know of them."""
    head = Text(doc["model"], style="bold")
    head.append(
        f" at {doc['target']}: {doc['prompt_tokens']:,} tokens of prompt, {doc['new_tokens']:,} of answer",
        style="not bold",
    )
    views: list[RenderableType] = [head, Text(), _table(doc, width), Text()]
    views += notes("note", [*doc["notes"], *_notes(doc)], "dim")
    if doc["not_predicted"]:
        views += notes("not predicted", [doc["not_predicted"]], "yellow")
    return Group(*views)


def _table(doc: Mapping[str, Any], width: int) -> RenderableType:
    figures = {
        "tokens/s": "output_tokens_per_s",
        "prompt tokens/s": "prompt_tokens_per_s",
        "requests/s": "requests_per_s",
        "TTFT ms": "ttft_ms_p50",
        "p99": "ttft_ms_p99",
        "TPOT ms": "tpot_ms_p50",
        "p99 ": "tpot_ms_p99",
    }
    if width < NARROW:
        figures = {
            title: key for title, key in figures.items() if title not in ("prompt tokens/s", "requests/s")
        }
    table = plain_table()
    table.add_column("load", no_wrap=True)
    table.add_column("answers", justify="right", no_wrap=True)
    for title in figures:
        table.add_column(title.strip(), justify="right", no_wrap=True)
    table.add_column("errors")
    for row in doc["points"]:
        load = f"{row['rate_per_s']:g}/s" if row["rate_per_s"] else f"{row['concurrency']} in flight"
        errors = ", ".join(f"{count} x {name}" for name, count in row["errors"].items())
        cells = ["" if row[key] is None else three(row[key]) for key in figures.values()]
        table.add_row(load, str(row["completed"]), *cells, errors)
        for name, form in (("predicted", three), ("ratio", "{:.2f}".format)):
            if row[name] is None:
                continue
            beside = {COMPARED[key]: row[name][key] for key in COMPARED}
            cells = [form(beside[key]) if beside.get(key) is not None else "" for key in figures.values()]
            table.add_row(f"  {name}", "", *cells, "", style="dim")
    table.caption = (
        "tokens/s: of output. TTFT: median to the first text, TPOT: median per later token; ratio: measured "
        "over predicted."
    )
    table.caption_justify = "left"
    return table


def _notes(doc: Mapping[str, Any]) -> list[str]:
    lines = []
    cached = max((row["cached_tokens_mean"] or 0.0 for row in doc["points"]), default=0.0)
    if cached > doc["shared_prefix_tokens"] + 1:
        lines.append(f"{cached:,.0f} tokens of a prompt were in the server's cache: take another --seed")
    means = [row["prompt_tokens_mean"] for row in doc["points"] if row["prompt_tokens_mean"]]
    if means and abs(means[-1] / doc["prompt_tokens"] - 1) > 0.02:
        lines.append(f"prompts had {means[-1]:,.0f} tokens by the server's count")
    if short := sum(row["short_answers"] for row in doc["points"]):
        lines.append(f"{short} answers ended early: the server does not know `ignore_eos`")
    for row in doc["points"]:
        lines += [f"{outcome}: {said}" for outcome, said in row["error_messages"].items() if said]
    return list(dict.fromkeys(lines))
