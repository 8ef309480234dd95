"""What changes along a run, by the figures of the reports."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whalepod.spec.run import RunConfig, make_run
from whalepod.train.schedule import Course

V3 = {
    "warmup_steps": 2000,
    "constant_until": 10 / 14.8,
    "decay_until": 14.3 / 14.8,
    "final_fraction": 0.1,
    "last_from": (14.3 + 0.333) / 14.8,
    "last_fraction": 7.3e-6 / 2.2e-4,
}


def course(steps: int = 148_000, peak: float = 2.2e-4, layout: Any = None, **schedule: Any) -> Course:
    values = {
        "optimizer": {"learning_rate": peak},
        "schedule": schedule,
        "layout": layout or {"micro_batch": 1, "global_batch": 8},
        "train": {"steps": steps},
    }
    return Course(make_run(values))


def test_learning_rate_of_the_v3_report() -> None:
    rate = course(**V3).learning_rate
    assert rate(0) == pytest.approx(2.2e-4 / 2000)
    assert rate(999) == pytest.approx(1.1e-4)
    assert rate(2000) == rate(99_999) == 2.2e-4
    assert rate(121_500) == pytest.approx((2.2e-4 + 2.2e-5) / 2, rel=1e-3)  # middle of the cosine
    assert rate(143_001) == rate(146_329) == pytest.approx(2.2e-5)
    assert rate(146_331) == rate(147_999) == pytest.approx(7.3e-6)


def test_the_defaults_are_the_reports_shares() -> None:
    given, defaults = course(**V3), course(warmup_steps=2000)
    for step in range(0, 148_000, 1000):
        assert defaults.learning_rate(step) == pytest.approx(given.learning_rate(step), rel=2e-2)


def test_learning_rate_of_the_v2_report() -> None:
    """V2, section 3.1.2: times 0.316 after about 60 % of the tokens, and again after 90 %."""
    rate = course(1000, 2.4e-4, shape="v2", warmup_steps=0).learning_rate
    assert rate(599) == 2.4e-4
    assert rate(600) == rate(899) == pytest.approx(2.4e-4 * 0.316)
    assert rate(900) == rate(999) == pytest.approx(2.4e-4 * 0.316**2)


def test_cosine_goes_to_its_floor() -> None:
    rate = course(1000, 1.0, shape="cosine", warmup_steps=0).learning_rate
    assert rate(0) == 1.0
    assert rate(500) == pytest.approx(0.55)
    assert rate(999) == pytest.approx(0.1, abs=1e-4)


def test_never_rises_after_warmup() -> None:
    for shape in ("v3", "v2", "cosine"):
        rates = [course(148, shape=shape, warmup_steps=10).learning_rate(s) for s in range(148)]
        assert rates[:10] == sorted(rates[:10])
        assert rates[10:] == sorted(rates[10:], reverse=True)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_tiny_runs_have_a_positive_rate(steps: int) -> None:
    for schedule in ({"warmup_steps": 0}, {"constant_until": 0, "decay_until": 0}, {"batch_start": 1}):
        made = course(steps, **schedule)
        assert all(made.learning_rate(s) > 0 for s in range(steps))


def test_batch_of_the_v3_report() -> None:
    """From 3,072 to 15,360 sequences over the first 469B of 14.8T tokens, at 4K."""
    layout = {"pp": 16, "dp_shard": 128, "ep": 64, "zero": 1, "global_batch": 15_360, "micro_batch": 1}
    batches = course(60_000, layout=layout, batch_start=3072, batch_until=469 / 14_800).batches
    assert batches[0] == 3072
    assert batches == sorted(batches)
    assert all(n % 128 == 0 for n in batches)
    total = sum(batches)
    before_full = sum(n for n in batches if n < 15_360)
    assert before_full / total == pytest.approx(469 / 14_800, rel=0.02)
    middle = next(i for i in range(len(batches)) if sum(batches[:i]) >= before_full / 2)
    assert batches[middle] == pytest.approx((3072 + 15_360) / 2, rel=0.02)  # linear in tokens


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 200), st.integers(1, 40), st.integers(1, 4), st.integers(1, 20), st.floats(0, 1))
def test_batches_are_what_the_layout_can_take(
    steps: int, start: int, micro: int, accumulated: int, until: float
) -> None:
    layout = {"pp": 2, "dp_shard": 2, "micro_batch": micro, "global_batch": 2 * micro * (accumulated + 1)}
    batches = course(steps, layout=layout, batch_start=start, batch_until=until).batches
    assert len(batches) == steps
    full = layout["global_batch"]
    for before, after in pairwise(batches):
        assert before <= after <= full
    assert all(n % (2 * micro) == 0 and n >= 4 * micro for n in batches)  # 1F1B wants two micro-batches


def test_a_schedule_goes_by_tokens_not_by_steps() -> None:
    ramped = course(1000, batch_start=1, batch_until=0.5, warmup_steps=0, shape="v2")
    tokens = [sum(ramped.batches[:i]) / sum(ramped.batches) for i in range(1000)]
    for step in range(1000):
        expected = 2.2e-4 * 0.316 ** ((tokens[step] >= 0.6) + (tokens[step] >= 0.9))
        assert ramped.learning_rate(step) == pytest.approx(expected)


def test_mtp_weight_and_bias_speed_of_the_v3_report() -> None:
    made: Course = Course(RunConfig.model_validate({"train": {"steps": 14_800}}))
    assert [made.mtp_weight(s) for s in (0, 9_990, 10_010, 14_799)] == [0.3, 0.3, 0.1, 0.1]
    assert [made.bias_speed(s) for s in (0, 14_290, 14_310)] == [1e-3, 1e-3, 0.0]
