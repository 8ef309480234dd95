"""Prediction beside measurement: what a run writes and prints, and `scale --measure`."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from whalepod import cli
from whalepod.report import measured_scale
from whalepod.report.prediction import compared, prediction_table
from whalepod.spec.errors import UserError
from whalepod.spec.run import make_run
from whalepod.train import loop
from whalepod.train.metrics import read_metrics
from whalepod.train.start import train

MEASURE = ["scale", "v3-mini", "--gpu", "cpu", "--for", "train", "--measure"]


def test_a_run_tells_what_was_expected_of_it(run_values) -> None:
    config = make_run(run_values)
    result = train(config, quiet=True)
    found = result.predicted
    assert found is not None
    assert json.loads((Path(config.out) / "prediction.json").read_text()) == asdict(found)
    assert json.loads((Path(config.out) / "result.json").read_text())["predicted"] == asdict(found)
    assert found.step_s is not None
    assert found.tokens_per_s == pytest.approx(4 * 32 / found.step_s)
    assert found.state_gib == pytest.approx(result.state_gib[0], rel=0.02)
    assert result.state_gib[0] < result.counted_gib[0] < result.memory_gib[0]
    rows = {row.what: row for row in compared(result)}
    assert rows["memory, GiB"].measured == result.counted_gib[0]
    assert rows["step, s"].share == pytest.approx(found.step_s / result.step_s)
    assert prediction_table(result) is not None


def test_counting_a_step_changes_nothing(run_values, tmp_path, monkeypatch) -> None:
    train(make_run(run_values | {"out": str(tmp_path / "counted")}), quiet=True)
    monkeypatch.setattr(loop, "COUNTED_STEP", 99)
    result = train(make_run(run_values | {"out": str(tmp_path / "plain")}), quiet=True)
    assert result.counted_gib == []
    a, b = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("counted", "plain"))
    assert [(r["loss"], r["gradient_norm"]) for r in a] == [(r["loss"], r["gradient_norm"]) for r in b]


def test_too_short_a_run_to_count(run_values) -> None:
    result = train(make_run(run_values), until=3, quiet=True)
    assert result.counted_gib == []
    assert [row.what for row in compared(result)] == ["step, s", "tokens/s"]
    assert compared(replace(result, predicted=None)) == []
    assert prediction_table(replace(result, predicted=None)) is None


def test_scale_measures_the_counts_of_this_machine(monkeypatch, tmp_path) -> None:
    seen = []

    def measured(config, quiet):
        seen.append((config.make_layout(), config.data.sequence_length))
        return SimpleNamespace(tokens_per_s=1000.0 * config.make_layout().num_devices ** 0.9)

    monkeypatch.setattr(measured_scale, "train", measured)
    picture = tmp_path / "scale.png"
    arguments = [*MEASURE, "--counts", "1,2", "--picture", str(picture), "--json"]
    monkeypatch.setattr(measured_scale, "counts_here", lambda gpu, wanted: wanted)
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
    doc = json.loads(result.stdout)
    assert [layout.num_devices for layout, _ in seen] == [1, 2]
    assert {layout.global_batch for layout, _ in seen} == {32}
    assert [p["measured_tokens_per_s"] for p in doc["points"]] == pytest.approx([1000, 1000 * 2**0.9])
    assert doc["points"][1]["measured_speedup"] == pytest.approx(2**0.9)
    assert "2 bring x1.87" in doc["advice"][-1]
    assert picture.stat().st_size > 10_000
    shown = CliRunner().invoke(cli.app, [*MEASURE, "--counts", "1,2"])
    assert "measured" in shown.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["scale", "v3-mini", "--gpu", "h100", "--for", "train", "--measure"],
            "this machine's device is cpu",
        ),
        (["scale", "v3-mini", "--gpu", "cpu", "--for", "serve", "--measure"], "--measure runs training"),
        ([*MEASURE, "--software", "deepseek"], "leave --software out"),
        (["scale", "deepseek-v3.2", *MEASURE[2:]], "cannot be trained|not trained yet"),
        ([*MEASURE, "--counts", "512"], "this machine has"),
        ([*MEASURE, "--counts", "1", "--global-batch", "65536"], "smaller --global-batch"),
    ],
)
def test_what_cannot_be_measured_is_one_line(arguments: list[str], words: str) -> None:
    result = CliRunner().invoke(cli.app, arguments)
    assert isinstance(result.exception, UserError), result.output
    with pytest.raises(UserError, match=words):
        raise result.exception
    assert "\n" not in str(result.exception)
