from __future__ import annotations

import pytest

from whalepod.spec.run import OptimizerConfig, ScheduleConfig
from whalepod.train.schedule import learning_rate

V3 = ScheduleConfig(warmup_steps=2000, constant_until=10 / 14.8, decay_until=14.3 / 14.8, final_fraction=0.1)


def rate(step: int, steps: int = 148_000, schedule: ScheduleConfig = V3) -> float:
    return learning_rate(step, steps, OptimizerConfig(learning_rate=2.2e-4), schedule)


def test_shape_of_the_v3_report() -> None:
    assert rate(0) == pytest.approx(2.2e-4 / 2000)
    assert rate(999) == pytest.approx(1.1e-4)
    assert rate(2000) == rate(99_999) == 2.2e-4
    assert rate(121_500) == pytest.approx((2.2e-4 + 2.2e-5) / 2, rel=1e-3)  # middle of the cosine
    assert rate(143_001) == rate(147_999) == pytest.approx(2.2e-5)


def test_never_rises_after_warmup() -> None:
    rates = [rate(s, 148, ScheduleConfig(warmup_steps=10)) for s in range(148)]
    assert rates[:10] == sorted(rates[:10])
    assert rates[9:] == sorted(rates[9:], reverse=True)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_tiny_runs_have_a_positive_rate(steps: int) -> None:
    for schedule in (ScheduleConfig(warmup_steps=0), ScheduleConfig(constant_until=0, decay_until=0)):
        assert all(rate(s, steps, schedule) > 0 for s in range(steps))
