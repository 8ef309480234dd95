"""What each added GPU brings: the best plan at every count, and its efficiency against the smallest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from whalepod.planner.advice import MAX_COUNT, check_network, smallest_count
from whalepod.planner.answers import TrainingPlan
from whalepod.planner.plan import best_plan
from whalepod.planner.search import TrainingJob

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class ScalePoint:
    """One count. efficiency: tokens per second and GPU over those of the smallest count that fits."""

    num_gpus: int
    plan: TrainingPlan | None
    efficiency: float | None


def scale_training(
    job: TrainingJob, counts: Sequence[int], progress: Progress | None = None
) -> tuple[ScalePoint, ...]:
    """The best plan of `job` at each count of its GPU, the batch staying as it is (strong scaling)."""
    if counts:
        check_network(job.cluster.of(max(counts)))
    plans: list[tuple[int, TrainingPlan | None]] = []
    for done, count in enumerate(sorted(set(counts))):
        if progress:
            progress("planning", done, len(counts))
        plans.append((count, best_plan(replace(job, cluster=job.cluster.of(count)))))
    if progress:
        progress("planning", len(counts), len(counts))
    base = next((plan.tokens_per_s_per_gpu for _, plan in plans if plan is not None), None)
    return tuple(
        ScalePoint(count, plan, plan.tokens_per_s_per_gpu / base if plan and base else None)
        for count, plan in plans
    )


def default_counts(job: TrainingJob) -> list[int]:
    """Doublings from the smallest count that fits, one below it shown too, to MAX_COUNT."""
    most = min(MAX_COUNT, job.cluster.most)
    first = smallest_count(job, at_least=1)
    count, counts = max(1, min(first or most, most) // 2), []
    while count <= most:
        counts.append(count)
        count *= 2
    return counts
