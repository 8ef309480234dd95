"""A clock for pipeline schedules: plays the ranks' orders as an event graph, before anything runs.

Each rank works through its list (`schedule_actions`); a step starts when the rank is free and what it
reads has arrived. That is all a pipeline does, so the times of the stages alone give the makespan, the
bubble and, from the order, the activations held: no formula per schedule.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from whalepod.spec.schedule import Action, Kind, Step, actions_of


@dataclass(frozen=True)
class StageTimes:
    """How long one stage works on one micro-batch, in any one unit.

    backward None is input + weight; overlapped (an F and a B together) None is forward + backward.
    """

    forward: float
    input: float
    weight: float
    backward: float | None = None
    overlapped: float | None = None

    def of(self, kind: Kind) -> float:
        """The time of an action of this kind."""
        if kind == "B":
            return self.input + self.weight if self.backward is None else self.backward
        return {"F": self.forward, "I": self.input, "W": self.weight}[kind]


class Span(NamedTuple):
    """A step and when it ran."""

    step: Step
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """What each rank did when; `spans[rank]` in order."""

    spans: tuple[tuple[Span, ...], ...]

    @property
    def makespan(self) -> float:
        """From the first start to the last end."""
        return max((span.end for row in self.spans for span in row), default=0.0)

    @property
    def busy(self) -> tuple[float, ...]:
        """Time that each rank works."""
        return tuple(sum(span.end - span.start for span in row) for row in self.spans)

    @property
    def bubble(self) -> float:
        """The idle share of all ranks' time: (p - 1) / (m + p - 1) for 1F1B over equal stages."""
        makespan = self.makespan
        return 1 - sum(self.busy) / (makespan * len(self.spans)) if makespan else 0.0


def simulate(
    orders: Sequence[Sequence[Step]], times: StageTimes | Sequence[StageTimes], p2p: float = 0.0
) -> Timeline:
    """Plays the ranks' orders. `times` of each stage, or one for all; `p2p` from a rank to another.

    A step starts when its rank is free and what it reads is there: F of the stage before, I or B of the
    stage after, and its own F or I. Sending costs the sender nothing. Raises ValueError when the orders
    wait for each other for ever.
    """
    home = {a.stage: rank for rank, order in enumerate(orders) for step in order for a in actions_of(step)}
    last_stage = max(home, default=0)

    def time_of(stage: int) -> StageTimes:
        return times if isinstance(times, StageTimes) else times[stage]

    ended: dict[Action, float] = {}

    def arrival(action: Action) -> float | None:
        """When all that the action reads is on its rank; None if not known yet."""
        stage, kind, micro_batch = action
        latest = 0.0
        sources: list[tuple[int, str]] = []
        if kind == "F":
            sources = [(stage - 1, "F")] if stage else []
        elif kind == "W":
            sources = [(stage, "I")]
        else:
            sources = [(stage, "F")] + ([(stage + 1, "IB")] if stage < last_stage else [])
        for source, kinds in sources:
            found = (ended.get(Action(source, k, micro_batch)) for k in kinds)  # type: ignore[arg-type]
            end = next((e for e in found if e is not None), None)
            if end is None:
                return None
            latest = max(latest, end + p2p * (home[source] != home[stage]))
        return latest

    spans: list[list[Span]] = [[] for _ in orders]
    waiting = deque(range(len(orders)))
    stuck = 0
    while waiting and stuck < len(waiting):
        rank = waiting.popleft()
        order, row = orders[rank], spans[rank]
        before = len(row)
        while len(row) < len(order):
            step = order[len(row)]
            ready = [arrival(action) for action in actions_of(step)]
            if None in ready:
                break
            start = max([row[-1].end if row else 0.0, *(r for r in ready if r is not None)])
            end = start + _duration(step, time_of)
            row.append(Span(step, start, end))
            ended.update((action, end) for action in actions_of(step))
        stuck = 0 if len(row) > before else stuck + 1
        if len(row) < len(order):
            waiting.append(rank)
    if waiting:
        heads = ", ".join(f"rank {rank} for {orders[rank][len(spans[rank])]}" for rank in sorted(waiting))
        raise ValueError(f"the schedule never ends: {heads}")
    return Timeline(tuple(map(tuple, spans)))


def _duration(step: Step, time_of: Callable[[int], StageTimes]) -> float:
    if isinstance(step, Action):
        return time_of(step.stage).of(step.kind)
    forward, backward = time_of(step.forward.stage), time_of(step.backward.stage)
    together = [t.overlapped for t in (forward, backward) if t.overlapped is not None]
    return sum(together) / len(together) if together else forward.of("F") + backward.of("B")


def peak_in_flight(order: Sequence[Step], size: Callable[[int], float] = lambda stage: 1) -> float:
    """The most that a rank holds at a time between F and the end of B or W.

    `size(stage)`: what one micro-batch leaves behind on a stage; by default counts (stage, micro-batch).
    """
    held = peak = 0.0
    for step in order:
        # Together, forward is there before backward frees anything.
        for action in actions_of(step):
            held += size(action.stage) * (action.kind == "F")
        peak = max(peak, held)
        for action in actions_of(step):
            held -= size(action.stage) * (action.kind in "BW")
    return peak
