"""How much of a long job's time brings it on: failures, checkpoints against them, and what is done again.

A job of n accelerators fails every M = gpu_hours_per_failure / n hours (one failure ends all). Between
failures it stops for d seconds every interval t to write its state; after one it starts again (R seconds)
from the last whole checkpoint. With failures at random (a Poisson process) the time for t of useful work is

    M e^(R/M) (e^((t + d)/M) - 1)                        (J. T. Daly, FGCS 22, 2006, pages 303-312)

and the best interval, for d < 2M, is

    t = sqrt(2 d M) (1 + sqrt(d/2M)/3 + (d/2M)/9) - d    (there; the root alone: J. W. Young, CACM 17, 1974)

An asynchronous checkpoint stops the job for a share of the time that it is written in, and counts once it is
whole: until then a failure loses the interval before too, so that rest is added to R, and no interval is
shorter than a write.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass, replace
from math import exp, sqrt
from pathlib import Path
from typing import Any

from whalepod.planner.state import StateTypes
from whalepod.spec.counts import params
from whalepod.spec.hardware import Cluster, Operation, usual_operation
from whalepod.spec.model import ModelSpec

DATA = Path(__file__).parent / "data" / "validation" / "goodput.csv"
KEYS = (
    *("goodput", "checkpoint_every_s", "checkpoint_every_steps", "checkpoint_bytes", "checkpoint_write_s"),
    *("checkpoint_blocking_s", "restart_s", "hours_between_failures"),
)
ADAM_BYTES = 12
"""Of a parameter in a checkpoint: master and moments in FP32."""


@dataclass(frozen=True)
class Goodput:
    """share: of the time that is new work. checkpoint_every_s: the best interval; write_s: until a checkpoint
    is whole, blocking_s: for which the job stops; restart_s: from a failure until it works again."""

    share: float
    checkpoint_every_s: float
    hours_between_failures: float
    checkpoint_bytes: float
    write_s: float
    blocking_s: float
    restart_s: float

    def steps(self, step_s: float) -> int:
        """The interval in steps of so many seconds."""
        return max(1, round(self.checkpoint_every_s / step_s))


def state_bytes(spec: ModelSpec, types: StateTypes = StateTypes()) -> float:  # noqa: B008
    """Of a checkpoint: every parameter once, with its moments."""
    per_parameter = (types.master or types.weight) + types.moment1 + types.moment2
    return params(spec, mtp=True).total * per_parameter


def expected(size: float, num_gpus: int, gpus_per_node: int, operation: Operation) -> Goodput:
    """What a job gets whose checkpoints have `size` bytes."""
    nodes = -(-num_gpus // gpus_per_node)
    rate = min(nodes * operation.node_storage_gb_s, operation.storage_gb_s) * 1e9
    write, mtbf = size / rate, operation.gpu_hours_per_failure * 3600 / num_gpus
    blocking = write * operation.blocking_share
    restart = operation.restart_s + size / rate  # which is read again
    every = max(best_interval(blocking, mtbf), write)
    share = goodput(every, blocking, restart + write - blocking, mtbf)
    return Goodput(share, every, mtbf / 3600, size, write, blocking, restart)


def best_interval(blocking_s: float, mtbf_s: float) -> float:
    """Seconds of work between checkpoints that lose least (Daly's higher order)."""
    if blocking_s >= 2 * mtbf_s:
        return mtbf_s
    half = blocking_s / (2 * mtbf_s)
    return sqrt(2 * blocking_s * mtbf_s) * (1 + sqrt(half) / 3 + half / 9) - blocking_s


def goodput(every_s: float, blocking_s: float, restart_s: float, mtbf_s: float) -> float:
    """New work over time. Far beyond what can work at all it is 0."""
    lost, tried = restart_s / mtbf_s, (every_s + blocking_s) / mtbf_s
    if lost + tried > 500:
        return 0.0
    return every_s / (mtbf_s * exp(lost) * (exp(tried) - 1))


def of_cluster(spec: ModelSpec, types: StateTypes, cluster: Cluster, operation: Operation) -> Goodput:
    """What a model's training gets on a cluster."""
    return expected(state_bytes(spec, types), cluster.num_gpus, cluster.gpus_per_node, operation)


def goodput_json(found: Goodput, step_s: float) -> dict[str, Any]:
    """The keys of a plan."""
    values = (found.share, found.checkpoint_every_s, found.steps(step_s), found.checkpoint_bytes)
    times = (found.write_s, found.blocking_s, found.restart_s, found.hours_between_failures)
    return dict(zip(KEYS, (*values, *times), strict=True))


def published_rows(path: Path = DATA) -> list[dict[str, Any]]:
    """Published shares of effective training time beside ours, with `error` = predicted / published - 1.

    A row's own failures are taken where they are known; restarts are the usual ones, also where people
    restarted by hand.
    """
    rows = []
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            gpus, operation = int(row["gpus"]), usual_operation()
            if row["failures"]:
                hours = gpus * float(row["days"]) * 24 / float(row["failures"])
                operation = replace(operation, gpu_hours_per_failure=hours)
            size = float(row["params_b"]) * 1e9 * ADAM_BYTES
            predicted, published = expected(size, gpus, 8, operation).share, float(row["published"])
            rows.append(
                {**row, "published": published, "predicted": predicted, "error": predicted / published - 1}
            )
    return rows
