"""`whalepod plan` and `whalepod scale` in one call each: a question in, a value out, files on the way.

found = plan(Question("deepseek-v3", "train"), "2048xH800")
found.doc["plans"][0]["tokens_per_s"]
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import RenderableType

from whalepod.planner.answers import TrainingAnswer
from whalepod.planner.plan import plan_training
from whalepod.planner.serve_plan import ServingAnswer, plan_serving
from whalepod.report import planning, scaling
from whalepod.report.planning_tables import training_view
from whalepod.report.question import Question, check_top, parse_counts
from whalepod.report.serving import serve_yaml, serving_json
from whalepod.report.serving_tables import serving_view
from whalepod.spec.errors import UserError


@dataclass(frozen=True)
class Answer:
    """doc: the answer in JSON's terms. planned: the planner's own."""

    doc: dict[str, Any]
    planned: TrainingAnswer | ServingAnswer

    def view(self, width: int, calculator: bool = False) -> RenderableType:
        """For a terminal of so many columns."""
        draw = training_view if isinstance(self.planned, TrainingAnswer) else serving_view
        return draw(self.doc, width, calculator)


def plan(
    question: Question,
    gpus: str,
    top: int = 5,
    *,
    emit: Path | None = None,
    html: Path | None = None,
    picture: Path | None = None,
) -> Answer:
    """Plans, and writes what is asked for: a run.yaml, a page, a picture.

    Raises UserError for bad input, and for files that cannot be.
    """
    check_top(top)
    planning.check_place(emit, "--emit", (".yaml", ".yml"))
    planning.check_place(html, "--html")
    planning.check_place(picture, "--picture", (".png",))
    cluster = question.cluster(gpus)
    if question.goal == "train":
        job = question.training_job(cluster)
        if question.precision is None and job.precision == "fp8":
            job = replace(job, precision="auto")  # BF16 may fit or run better; it is tried beside
        planned = plan_training(job, top)
        found = Answer(planning.training_json(planned, question.operation), planned)
        found.doc["advice"] += _without_pins(planned)
        if emit is not None:
            planning.write_text(emit, planning.run_yaml(question, planned, gpus), "--emit")
            found.doc["notes"] += planning.run_notes(planned)
    else:
        served = plan_serving(question.serving_job(cluster), top)
        found = Answer(serving_json(served), served)
        if emit is not None:
            planning.write_text(emit, serve_yaml(question, served, gpus), "--emit")
    _draw(found, html, picture)
    return found


def _without_pins(planned: TrainingAnswer) -> list[str]:
    """What there would be without the given sizes, where they leave nothing."""
    job = planned.job
    if planned.plans or not job.pins:
        return []
    free = plan_training(replace(job, pins={}), 1)
    asked = ", ".join(f"{name} {value}" for name, value in job.pins.items())
    if not free.plans:
        return [f"nor without {asked}: {line}" for line in free.advice]
    words = "; ".join(planning.layout_words(free.plans[0].layout))
    return [f"without {asked} the best would be {words}: {free.plans[0].tokens_per_s:,.0f} tokens/s"]


def _draw(found: Answer, html: Path | None, picture: Path | None) -> None:
    """Writes the page and the picture that are asked for."""
    if html is None and picture is None:
        return
    from whalepod.report import planning_page, planning_pictures

    doc, planned = found.doc, found.planned
    if not doc["plans"]:
        panels = []
    elif isinstance(planned, TrainingAnswer):
        panels = planning_pictures.training_panels(doc, planned.plans[0].step.timeline)
    else:
        panels = planning_pictures.serving_panels(doc)
    if picture is not None:
        if not panels:
            raise UserError(f"--picture: there is no plan to draw: {doc['advice'][0]}")
        heading = (
            f"{doc['model']} on {doc['num_gpus']:,} x {doc['gpu']}\n{doc['plans'][0]['layout_in_words']}"
        )
        planning_pictures.write_png(picture, planning_pictures.png(panels, heading))
    if html is not None:
        planning.write_text(html, planning_page.plan_page(doc, panels), "--html")


def scale(
    question: Question,
    gpu: str,
    counts: str | None = None,
    *,
    html: Path | None = None,
    picture: Path | None = None,
    measure: bool = False,
    progress: scaling.Progress | None = None,
) -> dict[str, Any]:
    """What each doubling of a GPU brings, in JSON's terms; writes a page and a picture where asked for.

    counts: `8,16,64` or `8..2048`; None takes doublings from below the smallest count that fits, or the
    machine's own with `measure`, which runs them.
    """
    planning.check_place(html, "--html")
    planning.check_place(picture, "--picture", (".png",))
    numbers = None if counts is None else parse_counts(counts)
    if measure:
        from whalepod.report import measured_scale  # needs torch

        question = measured_scale.for_this_machine(question, gpu)
        numbers = measured_scale.counts_here(question.cluster_of(gpu, 1).gpu, numbers)
    doc = scaling.scale(question, gpu, numbers, progress)
    if measure:
        measured_scale.measure(question, doc, progress)
    if html is None and picture is None:
        return doc
    from whalepod.report import planning_pictures, scaling_pictures

    if picture is not None:
        if doc["smallest_count_that_fits"] is None:
            raise UserError(f"--picture: there is no plan to draw: {doc['advice'][0]}")
        planning_pictures.write_png(picture, scaling_pictures.scale_png(doc))
    if html is not None:
        planning.write_text(html, scaling_pictures.scale_page(doc), "--html")
    return doc
