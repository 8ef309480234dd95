"""Layers on pipeline stages by the planner's own times, so that no rank waits for a slower one.

`spec/stages` balances FLOPs, which is what a model alone can say. Times differ: in FP8 a layer runs faster
than the BF16 head, and where stages lie in a V it is the sum of a rank's two stages that has to be even.
"""

from __future__ import annotations

from functools import lru_cache

from whalepod.spec.schedule import RULES
from whalepod.spec.stages import best_sizes


@lru_cache(maxsize=4096)
def balanced_layers(
    costs: tuple[float, ...], last: float, schedule: str, pp: int, stages: int
) -> tuple[int, ...] | None:
    """Layers of each stage. costs: of each layer; last: of the head, its loss and MTP, on the last stage.

    None where the model has fewer layers than stages.
    """
    total = pp * stages
    if pp == 1 or total > len(costs):
        return None
    if RULES[schedule].placement == "loop" or stages != 2:
        return best_sizes(costs, last, total)
    return _in_v(costs, last, pp)


def _in_v(costs: tuple[float, ...], last: float, pp: int) -> tuple[int, ...] | None:
    """Rank r has stages r and 2 pp - 1 - r; rank 0 has both ends."""
    mean = sum(costs) / len(costs)
    everything = len(costs)
    best: tuple[float, tuple[int, ...]] | None = None
    for first in range(1, everything - 2 * (pp - 1) + 1):
        # The others share the rest as evenly as whole layers go, one on each stage at least.
        rest, more = divmod(everything - first, pp - 1)
        if rest < 2:
            continue
        slowest = max(first * mean + last, (rest + (more > 0)) * mean)
        if best is None or slowest < best[0]:
            # A low stage is computed first, so the larger half goes there.
            ranks = [rest + (r < more) for r in range(pp - 1)]
            down = [n - n // 2 for n in ranks]
            up = [n // 2 for n in ranks]
            best = slowest, (first, *down, *reversed(up), 0)
    return None if best is None else best[1]
