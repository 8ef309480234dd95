"""Throughput and memory against the micro-batch, as `plan` shows them."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from whalepod.cli import main
from whalepod.planner.micro_batch import MicroBatchPoint, _turns, micro_batch_curve
from whalepod.planner.plan import time_layout
from whalepod.planner.search import TrainingJob
from whalepod.planner.software import load_software
from whalepod.spec.hardware import Cluster, load_gpu
from whalepod.spec.layout import Layout
from whalepod.spec.presets import load_model_spec

LITE, CLUSTER = load_model_spec("deepseek-v2-lite"), Cluster(load_gpu("H100"), 8, 8)
JOB = TrainingJob(LITE, CLUSTER, load_software("whalepod"), 96, 4096, "bf16")
LAYOUT = Layout(dp_shard=8, ep=8, micro_batch=2, global_batch=96)


def test_points_are_the_planners_own_figures() -> None:
    curve = micro_batch_curve(JOB, LAYOUT)
    assert [p.micro_batch for p in curve.points] == [1, 2, 4, 12]
    for point in curve.points:
        plan = time_layout(JOB, replace(LAYOUT, micro_batch=point.micro_batch))
        assert point.tokens_per_s == pytest.approx(plan.tokens_per_s)
        assert point.memory_gib == pytest.approx(plan.memory_gib)
        assert point.fits == (plan.memory_gib <= JOB.limit_gib)
    assert [p.memory_gib for p in curve.points] == sorted(p.memory_gib for p in curve.points)


def test_a_pipeline_keeps_what_its_schedule_needs() -> None:
    layout = Layout(pp=4, dp_shard=2, micro_batch=1, global_batch=96)
    assert [p.micro_batch for p in micro_batch_curve(JOB, layout).points] == [1, 2, 4, 8]


def test_where_it_turns() -> None:
    def turns(*points: tuple[float, bool]) -> str:
        made = [MicroBatchPoint(2**i, speed, 10.0 * 2**i, fits) for i, (speed, fits) in enumerate(points)]
        return _turns(made, 25.0)

    assert turns((100, True), (110, True), (120, False)) == "turns at 2: 4 needs 40.0 GiB of 25.0"
    assert turns((100, True), (101, True)) == "turns at 1: 2 changes throughput by +1.0%"
    assert turns((100, True), (90, True), (95, True)) == "turns at 1: 2 changes throughput by -10.0%"
    assert turns((100, True), (110, True)) == "does not turn up to 2, all of a device's sequences"
    assert turns((100, False), (110, False)) == "none of them fits"


def test_plan_shows_it(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", "deepseek-v2-lite", "--gpus", "8xH100", "--for", "train", "--global-batch", "96"]
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    points = found["micro_batches"]["points"]
    chosen = found["plans"][0]["layout"]["micro_batch"]
    best = next(p for p in points if p["micro_batch"] == chosen)
    assert best["tokens_per_s"] == pytest.approx(found["plans"][0]["tokens_per_s"], rel=1e-6)
    assert best["memory_gib"] == pytest.approx(found["plans"][0]["memory_gib"], rel=1e-6)
    assert main(command) == 0
    assert found["micro_batches"]["turns"] in capsys.readouterr().out
