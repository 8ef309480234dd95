"""What the planner answers about training: plans with their figures, rejections, advice; values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from whalepod.planner.search import TrainingJob
from whalepod.planner.training import Step
from whalepod.spec.layout import Layout

TRILLION = 1e12


@dataclass(frozen=True)
class Help:
    """One input changed, and the speed of the best plan then; `gain` 0.1 is ten per cent."""

    change: str
    gain: float


@dataclass(frozen=True)
class TrainingPlan:
    """A layout with what it brings. memory_by_rank: GiB by category for every pipeline rank.

    tflops_per_gpu: model TFLOP/s (recomputation is no model work). helps: sorted, the best first.
    """

    layout: Layout
    step: Step
    tokens_per_s: float
    num_gpus: int
    tflops_per_gpu: float
    mfu: float
    memory_gib: float
    memory_by_rank: tuple[Mapping[str, float], ...]
    limited_by: str
    helps: tuple[Help, ...]
    warnings: tuple[str, ...]
    usd_per_gpu_hour: float | None

    @property
    def tokens_per_s_per_gpu(self) -> float:
        return self.tokens_per_s / self.num_gpus

    @property
    def memory_by_category(self) -> Mapping[str, float]:
        """GiB of the fullest rank."""
        return max(self.memory_by_rank, key=lambda parts: sum(parts.values()))

    @property
    def memory_allocated_gib(self) -> float:
        """What the framework's allocator has given out at the peak, on the fullest rank."""
        parts = self.memory_by_category
        return self.memory_gib - parts["fragmentation"] - parts["overhead"]

    @property
    def memory_reserved_gib(self) -> float:
        """What the allocator holds then."""
        return self.memory_gib - self.memory_by_category["overhead"]

    @property
    def usd_per_hour(self) -> float | None:
        return None if self.usd_per_gpu_hour is None else self.usd_per_gpu_hour * self.num_gpus

    @property
    def days_per_trillion_tokens(self) -> float:
        return TRILLION / self.tokens_per_s / 86400

    @property
    def gpu_hours_per_trillion_tokens(self) -> float:
        return self.days_per_trillion_tokens * 24 * self.num_gpus

    @property
    def usd_per_trillion_tokens(self) -> float | None:
        price = self.usd_per_gpu_hour
        return None if price is None else self.gpu_hours_per_trillion_tokens * price


@dataclass(frozen=True)
class Rejected:
    """What was not taken, and why; `layout` None where it cannot even be written down."""

    layout: Layout | None
    reason: str


@dataclass(frozen=True)
class TrainingAnswer:
    """plans: best first, one for each mesh. considered, fitting: layouts timed, and those that fit."""

    job: TrainingJob
    plans: tuple[TrainingPlan, ...]
    rejected: tuple[Rejected, ...]
    advice: tuple[str, ...]
    considered: int
    fitting: int
