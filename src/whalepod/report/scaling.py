"""`whalepod scale`: what each doubling of the GPUs brings, as JSON, as a table, as a picture. No torch.

The job stays the same at every count (strong scaling): training keeps its global batch, serving its requests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from math import log2
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from whalepod.planner import goodput
from whalepod.planner.advice import MAX_COUNT
from whalepod.planner.scale import default_counts, scale_training
from whalepod.planner.serve_plan import plan_serving
from whalepod.report.planning import layout_json, layout_words, price_json
from whalepod.report.planning_tables import (
    NARROW,
    WIDE,
    dollars,
    duration,
    notes,
    plain_table,
    price_words,
    three,
)
from whalepod.report.question import Question
from whalepod.report.serving_tables import layout_words as serving_words
from whalepod.spec.errors import UserError

Progress = Callable[[str, int, int], None]
GOOD = 0.9
"""Efficiency that the closing lines ask for."""
NEARLY_ALL = 1.98  # of 2: a doubling that nobody need ask about
TRAIN_ONLY = ("days_per_trillion_tokens", "usd_per_trillion_tokens", "step_s", "mfu", *goodput.KEYS)
SERVE_ONLY = ("usd_per_million_output_tokens", "ttft_ms", "tpot_ms", "concurrency")


def scale(
    question: Question, gpu: str, counts: Sequence[int] | None = None, progress: Progress | None = None
) -> dict[str, Any]:
    """The best plan at every count, in JSON's terms; counts None: doublings, from below the first that fits.

    `efficiency`: tokens per second and GPU over those of the smallest count that fits.
    `speedup_per_doubling`: what doubling the GPUs brought since the count before; 2 is all of it.
    """
    cluster = question.cluster_of(gpu, counts[0] if counts else 8)
    head = {
        "model": question.spec.name,
        "gpu": cluster.gpu.name,
        "goal": question.goal,
        "precision": question.precision_on(cluster.gpu),
        "price": price_json(cluster),
    }
    if head["precision"] != "auto" and not cluster.gpu.supports(head["precision"]):
        raise UserError(f"{cluster.gpu.name} has no {head['precision'].upper()} matrix products; use bf16")
    points = (_train if question.goal == "train" else _serve)(question, gpu, counts, head, progress)
    _compare(points)
    fitting = [p for p in points if p["fits"]]
    return {
        **head,
        "smallest_count_that_fits": fitting[0]["num_gpus"] if fitting else None,
        "points": points,
        "advice": summary(points, question.goal),
    }


def _train(
    question: Question,
    gpu: str,
    counts: Sequence[int] | None,
    head: dict[str, Any],
    progress: Progress | None,
) -> list[dict[str, Any]]:
    job = question.training_job(question.cluster_of(gpu, counts[0] if counts else 8))
    head |= {
        "software": job.software.name,
        "sequence_length": job.sequence_length,
        "global_batch": job.global_batch,
        "gpu_memory_gib": job.cluster.gpu.memory_gib,
        "usable_memory_gib": job.limit_gib,
    }
    points = []
    for point in scale_training(job, counts or default_counts(job), progress):
        plan = point.plan
        if plan is None:
            points.append(_absent(point.num_gpus, TRAIN_ONLY))
            continue
        cluster = job.cluster.of(point.num_gpus)
        lasting = goodput.of_cluster(job.spec, job.software.state, cluster, question.operation)
        points.append(
            {
                "num_gpus": point.num_gpus,
                "fits": True,
                "layout": layout_json(plan.layout),
                "layout_in_words": "; ".join(layout_words(plan.layout)),
                "tokens_per_s": plan.tokens_per_s,
                "tokens_per_s_per_gpu": plan.tokens_per_s_per_gpu,
                "memory_gib": plan.memory_gib,
                "limited_by": plan.limited_by,
                "warnings": list(plan.warnings),
                "days_per_trillion_tokens": plan.days_per_trillion_tokens,
                "usd_per_trillion_tokens": plan.usd_per_trillion_tokens,
                "step_s": plan.step.seconds,
                "mfu": plan.mfu,
                **goodput.goodput_json(lasting, plan.step.seconds),
            }
        )
    return points


def _serve(
    question: Question,
    gpu: str,
    counts: Sequence[int] | None,
    head: dict[str, Any],
    progress: Progress | None,
) -> list[dict[str, Any]]:
    job = question.serving_job(question.cluster_of(gpu, counts[0] if counts else 8))
    memory = job.cluster.gpu.memory_gib
    head |= {"software": job.engine, "isl": job.isl, "osl": job.osl, "concurrency": job.concurrency}
    head |= {"gpu_memory_gib": memory, "usable_memory_gib": memory}
    wanted = list(counts or (2**i for i in range(MAX_COUNT.bit_length())))
    points = []
    for done, count in enumerate(wanted):
        if progress is not None:
            progress("planning", done, len(wanted))
        job = question.serving_job(question.cluster_of(gpu, count))
        found = plan_serving(job, 1, front=False)
        if not found.plans:
            points.append(_absent(count, SERVE_ONLY))
            continue
        plan = found.plans[0]
        price = job.cluster.gpu.price
        points.append(
            {
                "num_gpus": count,
                "fits": True,
                "layout": plan.layout.as_dict(),
                "layout_in_words": str(plan.layout),
                "tokens_per_s": plan.output_tokens_per_s,
                "tokens_per_s_per_gpu": plan.output_tokens_per_s / count,
                "memory_gib": (plan.memory.fixed + plan.memory.cache) / 2**30,
                "limited_by": plan.limited_by,
                "warnings": [],
                "usd_per_million_output_tokens": price
                and price.usd_per_hour * count / 3600 / plan.output_tokens_per_s * 1e6,
                "ttft_ms": plan.ttft_s * 1e3,
                "tpot_ms": plan.tpot_s * 1e3,
                "concurrency": plan.concurrency,
            }
        )
    if progress is not None:
        progress("planning", len(wanted), len(wanted))
    first = next((i for i, p in enumerate(points) if p["fits"]), len(points))
    # Of the counts that nobody named, one that does not fit is enough.
    return points if counts else points[max(0, first - 1) :]


def _absent(count: int, keys: Sequence[str]) -> dict[str, Any]:
    """The point of a count on which nothing fits."""
    names = ("layout", "layout_in_words", "tokens_per_s", "tokens_per_s_per_gpu", "memory_gib", "limited_by")
    return {"num_gpus": count, "fits": False, **dict.fromkeys(names), "warnings": [], **dict.fromkeys(keys)}


def _compare(points: Sequence[dict[str, Any]]) -> None:
    """Adds efficiency and gains to the points."""
    fitting = [p for p in points if p["fits"]]
    for point in points:
        point |= {"efficiency": None, "speedup": None, "speedup_per_doubling": None}
    for point in fitting:
        point["efficiency"] = point["tokens_per_s_per_gpu"] / fitting[0]["tokens_per_s_per_gpu"]
        point["speedup"] = point["tokens_per_s"] / fitting[0]["tokens_per_s"]
    for before, point in pairwise(fitting):
        doublings = log2(point["num_gpus"] / before["num_gpus"])
        point["speedup_per_doubling"] = (point["tokens_per_s"] / before["tokens_per_s"]) ** (1 / doublings)


def summary(points: Sequence[Mapping[str, Any]], goal: str) -> list[str]:
    """What the curve says, in lines."""
    fitting = [p for p in points if p["fits"]]
    if not fitting:
        return [f"it fits on none of these counts, up to {max(p['num_gpus'] for p in points):,} GPUs"]
    lines = [f"it fits from {fitting[0]['num_gpus']:,} GPUs"]
    good = [p for p in fitting if p["efficiency"] >= GOOD]
    if len(fitting) > 1:
        lines[0] += f"; efficiency is {GOOD:.0%} and more up to {good[-1]['num_gpus']:,}"
        worst = min(fitting[1:], key=lambda p: p["speedup_per_doubling"])
        if worst["speedup_per_doubling"] < NEARLY_ALL:
            lines.append(
                f"the doubling that brings least ends at {worst['num_gpus']:,} GPUs: "
                f"x{worst['speedup_per_doubling']:.2f}, limited by {worst['limited_by']}"
            )
    most = max(p["tokens_per_s_per_gpu"] for p in fitting)
    best = next(p for p in fitting if p["tokens_per_s_per_gpu"] >= 0.995 * most)
    if goal == "train":
        last = fitting[-1]
        lines.append(
            f"goodput on {last['num_gpus']:,} GPUs {last['goodput']:.1%}: a failure every "
            f"{duration(last['hours_between_failures'] * 3600)}, a checkpoint every "
            f"{duration(last['checkpoint_every_s'])}"
        )
    token = "trained token" if goal == "train" else "output token"
    lines.append(f"cheapest per {token}: {best['num_gpus']:,} GPUs")
    return lines


def scale_view(doc: Mapping[str, Any], width: int = NARROW) -> Group:
    """Everything of the answer at `width` columns."""
    head = Text(doc["model"], style="bold")
    work = "training" if doc["goal"] == "train" else "serving"
    job = (
        f"{doc['global_batch']:,} sequences of {doc['sequence_length']:,} tokens a step"
        if doc["goal"] == "train"
        else f"prompts of {doc['isl']:,} and answers of {doc['osl']:,} tokens"
    )
    head.append(
        f" on {doc['gpu']}, {work} in {doc['precision'].upper()} with {doc['software']}: {job}",
        style="not bold",
    )
    views: list[RenderableType] = [head, Text(), scale_table(doc, width), Text()]
    views += notes("advice", doc["advice"], "green")
    if doc["price"] is None:
        views += notes("note", [f"no price of {doc['gpu']} is known; give one with --price"], "dim")
    else:
        views += notes("note", [price_words(doc["price"])], "dim")
    return Group(*views)


def scale_table(doc: Mapping[str, Any], width: int = NARROW) -> Table:
    """A row for each count; what does not fit says so."""
    train = doc["goal"] == "train"
    cost = "usd_per_trillion_tokens" if train else "usd_per_million_output_tokens"
    figures: dict[str, tuple[str, Callable[[Any], str], int]] = {
        "GPUs": ("num_gpus", "{:,}".format, 0),
        "tokens/s": ("tokens_per_s", "{:,.0f}".format, 0),
        "per\nGPU": ("tokens_per_s_per_gpu", "{:,.0f}".format, NARROW),
        "doubling\nbrings": ("speedup_per_doubling", "x{:.2f}".format, 0),
        "effi-\nciency": ("efficiency", "{:.0%}".format, 0),
        "GiB": ("memory_gib", "{:.1f}".format, 0),
        **(
            {"days per\nT tokens": ("days_per_trillion_tokens", three, 0)}
            if train
            else {
                "TTFT\nms": ("ttft_ms", "{:,.0f}".format, NARROW),
                "TPOT\nms": ("tpot_ms", "{:,.1f}".format, 0),
            }
        ),
        f"USD per\n{'T' if train else 'M'} tokens": (cost, dollars, 0),
    }
    if any(point.get("measured_tokens_per_s") for point in doc["points"]):
        figures = {
            **dict(list(figures.items())[:2]),
            "measured": ("measured_tokens_per_s", "{:,.0f}".format, 0),
            "speed-up\nmeasured": ("measured_speedup", "x{:.2f}".format, 0),
            **dict(list(figures.items())[2:]),
        }
    if train:
        figures["good-\nput"] = ("goodput", "{:.1%}".format, NARROW)
    shown = {title: figure for title, figure in figures.items() if width >= figure[2]}
    table = plain_table()
    for title in shown:
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("limited by", no_wrap=width >= NARROW)
    if width >= WIDE:
        table.add_column("layout")
    for point in doc["points"]:
        cells = [Text("-" if point[key] is None else form(point[key])) for key, form, _ in shown.values()]
        cells.append(
            Text(
                point["limited_by"] if point["fits"] else "does not fit", style="" if point["fits"] else "red"
            )
        )
        if width >= WIDE and point["fits"]:
            words = point["layout_in_words"].split("; ")[0] if train else serving_words(point["layout"])
            cells.append(Text(words))
        table.add_row(*cells)
    table.caption = (
        "efficiency: tokens/s per GPU over those of the smallest count that fits. GiB: on the fullest GPU, "
        f"of {doc['usable_memory_gib']:.1f}."
        + train
        * " goodput: of a long job's time, what failures, checkpoints and restarts leave."
    )
    table.caption_justify = "left"
    return table
