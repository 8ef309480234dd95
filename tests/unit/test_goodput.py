"""Goodput: the formulas against brute force, limits that must hold, published runs, and where it is shown."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from whalepod import cli
from whalepod.planner.goodput import (
    best_interval,
    expected,
    goodput,
    published_rows,
    state_bytes,
)
from whalepod.planner.state import BF16_STATE, DEEPSEEK_STATE
from whalepod.report.accuracy import accuracy_json, accuracy_markdown
from whalepod.spec.hardware import usual_operation
from whalepod.spec.presets import load_model_spec

HOUR = 3600.0


@pytest.mark.parametrize(
    ("blocking", "restart", "mtbf"), [(30, 600, 3 * HOUR), (200, 900, 2 * HOUR), (5, 60, 24 * HOUR)]
)
def test_the_formula_is_what_a_played_job_gets(blocking: float, restart: float, mtbf: float) -> None:
    """Failures drawn at random, also while the job starts again; twenty thousand intervals."""
    every, dice, clock = best_interval(blocking, mtbf), random.Random(0), 0.0
    intervals = 20_000
    for _ in range(intervals):
        left = every + blocking
        while (failure := dice.expovariate(1 / mtbf)) < left:
            clock += failure
            left = every + blocking + restart  # once more, from the start of the interval
        clock += left
    # Daly's model starts every try by a restart's time: of these the first of an interval has none.
    assert goodput(every, blocking, restart, mtbf) == pytest.approx(intervals * every / clock, rel=0.01)


@pytest.mark.parametrize("mtbf", [0.2 * HOUR, 3 * HOUR, 100 * HOUR])
@pytest.mark.parametrize("blocking", [0.5, 20.0, 300.0])
def test_the_interval_is_the_best(blocking: float, mtbf: float) -> None:
    best = best_interval(blocking, mtbf)
    share = goodput(best, blocking, 600, mtbf)
    for factor in (0.5, 0.8, 1.25, 2.0):
        assert goodput(best * factor, blocking, 600, mtbf) < share
    finest = max(goodput(best * (0.9 + i / 1000), blocking, 600, mtbf) for i in range(200))
    assert share > 0.9999 * finest


def test_young_where_writing_is_short_and_no_sense_where_it_is_longer_than_work() -> None:
    assert best_interval(1, 1e6) == pytest.approx((2 * 1e6) ** 0.5, rel=1e-3)
    assert best_interval(100, 10) == 10
    assert goodput(10, 100, 1e9, 10) == 0.0


def test_more_accelerators_less_goodput_and_shorter_intervals() -> None:
    size = state_bytes(load_model_spec("deepseek-v3"))
    found = [expected(size, n, 8, usual_operation()) for n in (256, 2048, 16384)]
    assert [f.share for f in found] == sorted((f.share for f in found), reverse=True)
    assert [f.checkpoint_every_s for f in found] == sorted(
        (f.checkpoint_every_s for f in found), reverse=True
    )
    assert all(f.checkpoint_every_s >= f.write_s for f in found)
    assert found[2].hours_between_failures == pytest.approx(54 * 24 / 419, rel=1e-3)
    never = replace(usual_operation(), gpu_hours_per_failure=1e9, blocking_share=1e-6)
    assert expected(size, 256, 8, never).share > 0.9999


def test_a_checkpoint_of_v3_and_its_time_from_the_storage() -> None:
    spec = load_model_spec("deepseek-v3")  # 671.0 B and 11.6 B of multi-token prediction
    assert state_bytes(spec) == pytest.approx(12 * 682.6e9, rel=1e-3)
    assert state_bytes(spec, DEEPSEEK_STATE) == pytest.approx(8 * 682.6e9, rel=1e-3)
    assert state_bytes(spec, BF16_STATE) == pytest.approx(6 * 682.6e9, rel=1e-3)
    found = expected(8e12, 2048, 8, replace(usual_operation(), storage_gb_s=100.0))
    assert found.write_s == pytest.approx(80)
    assert expected(8e12, 8, 8, usual_operation()).write_s == pytest.approx(8000)  # one node's own limit


def test_published_runs() -> None:
    rows = {row["run"]: row for row in published_rows()}
    assert rows["Llama 3 405B"]["predicted"] > 0.9  # "more than 90 %"
    automatic = [row for row in rows.values() if row["restarts"] == "automatic"]
    assert len(automatic) == 3
    assert all(abs(row["error"]) < 0.06 for row in automatic)
    doc = accuracy_json()
    assert len(doc["goodput"]) == len(rows)
    assert "Llama 3 405B" in accuracy_markdown(doc)


def test_plan_and_scale_show_it() -> None:
    ask = ["--for", "train", "--json"]
    runner = CliRunner()
    plain = json.loads(runner.invoke(cli.app, ["plan", "deepseek-v3", "--gpus", "2048xH800", *ask]).output)
    best = plain["plans"][0]
    assert 0.97 < best["goodput"] < 1
    assert best["checkpoint_every_steps"] == round(best["checkpoint_every_s"] / best["step_s"])
    more = ["--storage-gb-s", "20", "--restart-s", "3600", "--gpu-hours-per-failure", "20000"]
    worse = json.loads(
        runner.invoke(cli.app, ["plan", "deepseek-v3", "--gpus", "2048xH800", *ask, *more]).output
    )["plans"][0]
    assert worse["goodput"] < best["goodput"] - 0.03
    assert worse["checkpoint_write_s"] == pytest.approx(worse["checkpoint_bytes"] / 20e9)
    counts = ["--gpu", "H100", "--counts", "8,64,512"]
    table = runner.invoke(cli.app, ["scale", "deepseek-v2-lite", *counts, "--for", "train"]).output
    assert "goodput on 512 GPUs" in table
    points = json.loads(runner.invoke(cli.app, ["scale", "deepseek-v2-lite", *counts, *ask]).output)["points"]
    shares = [point["goodput"] for point in points]
    assert shares == sorted(shares, reverse=True)


def test_what_has_no_effect_on_serving_says_so() -> None:
    ask = ["plan", "deepseek-v3", "--gpus", "16xH200", "--for", "serve", "--restart-s", "60"]
    assert cli.main(ask) == 2
