"""How many micro-batches a pipeline rank holds at a time, by schedule.

Between its forward pass and the end of its backward pass (its weights' part, where a schedule splits it) a
micro-batch's activations stay in memory. What a rank holds of each of its stages changes from step to step,
and stages differ in size, so the answer is not one number but the few combinations that may be the largest:
those that no other moment exceeds in every stage. Their largest sum of sizes is
`spec.timeline.peak_in_flight` of the schedule's actions, as a test holds.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from whalepod.spec.schedule import RULES, actions_of, schedule_actions

_ROUNDS = 3
"""Rounds of an interleaved schedule after which the middle only repeats itself."""
_FILLED = 3
"""Micro-batches per pipeline rank after which the middle of a V schedule only repeats itself."""


def representative(schedule: str, pp: int, micro_batches: int) -> int:
    """The smallest number of micro-batches known to hold as much at a time as `micro_batches` do."""
    if pp == 1:
        return 1
    if schedule == "1f1b":
        return min(micro_batches, pp)
    if schedule.startswith("interleaved"):
        rounds = max(1, micro_batches // pp)
        return micro_batches // rounds * min(rounds, _ROUNDS)
    return micro_batches if schedule == "gpipe" else min(micro_batches, _FILLED * pp)


def held(schedule: str, pp: int, stages: int, micro_batches: int, waiting: bool = False) -> np.ndarray:
    """[pp, moments, stages] micro-batches held of each stage of each rank; rows beyond a rank's last
    moment repeat one. What the schedule does not accept is answered for the next number that it does.

    waiting: as many columns more tell how many of them are between the halves of their backward pass.
    """
    micro_batches = max(1, micro_batches)
    if pp == 1:
        return np.array([[[1, 0] if waiting else [1]]], dtype=np.int64)
    if not RULES[schedule].accepts(pp, micro_batches):
        micro_batches = next(
            m for m in range(micro_batches, micro_batches + 2 * pp) if RULES[schedule].accepts(pp, m)
        )
    return _held(schedule, pp, stages, representative(schedule, pp, micro_batches), waiting)


@lru_cache(maxsize=4096)
def _held(schedule: str, pp: int, stages: int, micro_batches: int, waiting: bool) -> np.ndarray:
    ranks = range(pp)
    if schedule == "gpipe":
        moments = [np.array([[micro_batches, 0]])] * pp
    elif schedule == "1f1b":
        moments = [np.array([[min(micro_batches, pp - rank), 0]]) for rank in ranks]
    elif schedule.startswith("interleaved"):
        moments = [_in_turns(schedule, rank, pp, stages, micro_batches) for rank in ranks]
    else:
        moments = [_played(order) for order in schedule_actions(schedule, pp, stages, micro_batches)]
    most = [_undominated(m if waiting else m[:, :stages]) for m in moments]
    length = max(map(len, most))
    out = np.stack([np.concatenate([m, np.repeat(m[-1:], length - len(m), axis=0)]) for m in most])
    out.flags.writeable = False
    return out


def _in_turns(schedule: str, rank: int, pp: int, stages: int, micro_batches: int) -> np.ndarray:
    """After each turn's forward, what is held and what waits: `warm` forwards came before, and a backward
    with every turn.

    A split backward pass lets go with its weights' part, which follows `rank` turns after the other.
    """
    rounds = max(1, micro_batches // pp)
    per_round = micro_batches // rounds
    split = schedule == "interleaved_zero_bubble"
    warm = (stages - 1) * per_round + (pp - 1 - rank) * (1 if split else 2)
    laps = np.repeat(np.arange(stages), per_round)
    one_hot = np.eye(stages, dtype=np.int64)
    nothing = np.zeros((1, stages), dtype=np.int64)
    forward = np.concatenate([nothing, np.cumsum(one_hot[np.tile(laps, rounds)], axis=0)])
    freed = np.concatenate([nothing, np.cumsum(one_hot[np.tile(laps[::-1], rounds)], axis=0)])
    turn = np.arange(stages * micro_batches)
    begun = np.minimum(warm + turn + 1, stages * micro_batches)
    ended = np.maximum(turn - rank, 0) if split else turn
    return np.concatenate([forward[begun] - freed[ended], freed[turn] - freed[ended]], axis=1)


def _played(order: list) -> np.ndarray:
    """Of a list of steps: what is held of each stage after each forward, and what waits."""
    stages = sorted({action.stage for step in order for action in actions_of(step)})
    now, waits = dict.fromkeys(stages, 0), dict.fromkeys(stages, 0)
    moments: set[tuple[int, ...]] = set()
    for step in order:
        # Together, forward is there before backward frees anything.
        for action in actions_of(step):
            now[action.stage] += action.kind == "F"
        moments.add((*now.values(), *waits.values()))
        for action in actions_of(step):
            now[action.stage] -= action.kind in "BW"
            waits[action.stage] += (action.kind == "I") - (action.kind == "W")
    return np.array(sorted(moments), dtype=np.int64)


def _undominated(moments: np.ndarray) -> np.ndarray:
    """The rows that no other row exceeds or equals in every column."""
    rows = np.unique(moments, axis=0)
    beaten = (rows[None, :, :] >= rows[:, None, :]).all(-1) & ~np.eye(len(rows), dtype=bool)
    return rows[~beaten.any(1)]
