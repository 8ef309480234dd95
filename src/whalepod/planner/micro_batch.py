"""Throughput and memory of one layout against its micro-batch, and where the curve turns.

A larger micro-batch makes larger matrices and fewer launches; it keeps more for the backward pass, and a
pipeline has fewer of them to fill itself with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from whalepod.planner.candidates import Candidates
from whalepod.planner.search import Search, TrainingJob
from whalepod.spec.layout import Layout

WORTH = 0.02  # of throughput: below that, more memory for it is not


@dataclass(frozen=True)
class MicroBatchPoint:
    """memory_gib: on the fullest device."""

    micro_batch: int
    tokens_per_s: float
    memory_gib: float
    fits: bool


@dataclass(frozen=True)
class MicroBatchCurve:
    """points: by micro-batch. turns: in words, where more no longer helps, and why."""

    points: tuple[MicroBatchPoint, ...]
    turns: str


def micro_batch_curve(job: TrainingJob, layout: Layout) -> MicroBatchCurve:
    """Of all `Layout.micro_batches`."""
    layouts = [replace(layout, micro_batch=m) for m in layout.micro_batches]
    times = job.times(Candidates.of(layouts))
    need = Search(job, times, job.memory(times.candidates)).need_gib
    points = []
    for row, each in enumerate(layouts):
        seconds = times.time_step(row).seconds
        tokens = layout.global_batch * job.sequence_length / seconds
        fits = bool(need[row] <= job.limit_gib)
        points.append(MicroBatchPoint(each.micro_batch, tokens, float(need[row]), fits))
    return MicroBatchCurve(tuple(points), _turns(points, job.limit_gib))


def _turns(points: Sequence[MicroBatchPoint], limit_gib: float) -> str:
    for here, there in pairwise(points):
        if not there.fits and here.fits:
            return (
                f"turns at {here.micro_batch}: {there.micro_batch} needs {there.memory_gib:.1f} GiB of "
                f"{limit_gib:.1f}"
            )
        gain = there.tokens_per_s / here.tokens_per_s - 1
        if gain < WORTH and here.fits:
            return f"turns at {here.micro_batch}: {there.micro_batch} changes throughput by {gain:+.1%}"
    last = points[-1]
    if not last.fits:
        return "none of them fits"
    return f"does not turn up to {last.micro_batch}, all of a device's sequences"
