"""Learning-rate shape of DeepSeek-V3 (section 4.2)."""

from __future__ import annotations

import math

from whalepod.spec.run import OptimizerConfig, ScheduleConfig


def learning_rate(step: int, steps: int, optimizer: OptimizerConfig, schedule: ScheduleConfig) -> float:
    """Rate of optimiser step `step` (0-based) of `steps`: warm-up, constant, cosine, constant."""
    peak = optimizer.learning_rate
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    start, end = schedule.constant_until * steps, schedule.decay_until * steps
    if step < start:
        return peak
    done = min(1.0, (step - start) / (end - start)) if end > start else 1.0
    floor = schedule.final_fraction
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done)))
