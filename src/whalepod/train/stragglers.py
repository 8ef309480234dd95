"""Names ranks that are slower than others with the same work, and so hold all up."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

SLOW = 1.3  # times the median
STEPS = 10
SILENCE_STEPS = 100


class Stragglers:
    """Looks at each step's seconds of own work of every rank: without what it waited for others.

    groups: ranks that have the same work (those of a pipeline stage). names: by rank.
    """

    def __init__(self, groups: Sequence[Sequence[int]], names: Sequence[str]) -> None:
        self._groups, self._names = groups, names
        self._slow = [0] * len(names)  # steps in a row
        self._told = [-SILENCE_STEPS] * len(names)

    def add(self, step: int, own_s: Sequence[float]) -> tuple[float, list[str]]:
        """The slowest rank's seconds over the median of its group, and a line for each that has been slow for
        `STEPS` steps (again after `SILENCE_STEPS`)."""
        worst, lines = 1.0, []
        for group in self._groups:
            median = statistics.median_low(own_s[rank] for rank in group)
            for rank in group:
                ratio = own_s[rank] / median if median > 0 else 1.0
                worst = max(worst, ratio)
                self._slow[rank] = self._slow[rank] + 1 if ratio > SLOW else 0
                if self._slow[rank] >= STEPS and step - self._told[rank] >= SILENCE_STEPS:
                    self._told[rank] = step
                    lines.append(
                        f"rank {rank} ({self._names[rank]}) is slow: for {self._slow[rank]} steps its own "
                        f"work took over {SLOW:g} times the median, {ratio:.1f} times in step {step}"
                    )
        return worst, lines
