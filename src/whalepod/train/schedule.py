"""What changes along a run: learning rate, batch size, weight of the MTP loss, speed of the selection bias.

Everything goes by the share of the run's tokens that are done before a step, as the reports state it: a batch
that grows makes early steps count less.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from itertools import accumulate

from whalepod.spec.layout import Layout
from whalepod.spec.run import LossConfig, OptimizerConfig, RunConfig, ScheduleConfig
from whalepod.spec.schedule import RULES

V2_FACTOR, V2_DROPS = 0.316, (0.6, 0.9)  # DeepSeek-V2, section 3.1.2


def rate_factor(done: float, schedule: ScheduleConfig) -> float:
    """The learning rate over its peak, after the warm-up, with `done` of the tokens behind.

    v3: constant, cosine down to `final_fraction`, constant, and `last_fraction` at the very end (V3, section
    4.2). v2: two drops. cosine: down to `final_fraction` from the start.
    """
    if schedule.shape == "v2":
        return V2_FACTOR ** sum(done >= drop for drop in V2_DROPS)
    if schedule.shape == "cosine":
        start, end = 0.0, 1.0
    else:
        start, end = schedule.constant_until, schedule.decay_until
        if done >= schedule.last_from and schedule.last_from >= end:
            return schedule.last_fraction
    if done < start:
        return 1.0
    way = min(1.0, (done - start) / (end - start)) if end > start else 1.0
    floor = schedule.final_fraction
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * way))


def batch_sizes(steps: int, layout: Layout, schedule: ScheduleConfig) -> list[int]:
    """Sequences of each step, from `batch_start` up to the layout's `global_batch`: as many as its replicas
    and its pipeline's schedule can take.

    Grows in proportion to the tokens that are done, until `batch_until` of all (V3, section 4.2: from 3,072
    to 15,360 over the first 469B of 14.8T tokens).
    """
    start, full = schedule.batch_start, layout.global_batch
    if start is None or start >= full or schedule.batch_until == 0:
        return [full] * steps
    unit, accepts = layout.micro_batch * layout.num_replicas, RULES[layout.schedule].accepts
    allowed = [n for n in range(unit, full + 1, unit) if layout.pp == 1 or accepts(layout.pp, n // unit)]
    low = allowed[max(0, bisect_right(allowed, start) - 1)]

    def grown(total: float) -> list[int]:
        done, out = 0, []
        for _ in range(steps):
            way = min(1.0, done / (schedule.batch_until * total))
            wanted = low + (full - low) * way
            out.append(allowed[max(0, bisect_right(allowed, wanted) - 1)])
            done += out[-1]
        return out

    # The end of the ramp is a share of a sum that depends on it: a few rounds settle it.
    sizes = [full] * steps
    for _ in range(20):
        again = grown(sum(sizes))
        if again == sizes:
            break
        sizes = again
    return sizes


class Course:
    """A run's schedule, by step (0-based)."""

    def __init__(self, config: RunConfig) -> None:
        self._optimizer: OptimizerConfig = config.optimizer
        self._schedule: ScheduleConfig = config.schedule
        self._loss: LossConfig = config.loss
        self._frozen = config.lora.r > 0  # adapters are for a model whose biases are as they were
        self.batches = batch_sizes(config.train.steps, config.make_layout(), config.schedule)
        before = [0, *accumulate(self.batches)]
        self._done = [n / before[-1] for n in before[:-1]]

    def batch(self, step: int) -> int:
        """Sequences of the step, over all devices."""
        return self.batches[step]

    def learning_rate(self, step: int) -> float:
        peak, warmup = self._optimizer.learning_rate, self._schedule.warmup_steps
        if step < warmup:
            return peak * (step + 1) / warmup
        return peak * rate_factor(self._done[step], self._schedule)

    def mtp_weight(self, step: int) -> float:
        late = self._done[step] >= self._loss.mtp_late_from
        return self._loss.mtp_weight_late if late else self._loss.mtp_weight

    def bias_speed(self, step: int) -> float:
        moves = self._done[step] < self._loss.bias_until and not self._frozen
        return self._loss.bias_update_speed if moves else 0.0
