"""Plans as JSON, tables, pictures, pages and runs; the scaling curve; the planner beside measurements."""

from __future__ import annotations

import io
import json
import re
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from whalepod.report import accuracy, answer, planning_pictures, scaling, scaling_pictures
from whalepod.report.calculator import web_calculator
from whalepod.report.planning import layout_words
from whalepod.report.planning_page import plan_page
from whalepod.report.planning_tables import dollars, three
from whalepod.report.question import Question, parse_counts
from whalepod.spec.errors import UserError
from whalepod.spec.hardware import parse_gpus
from whalepod.spec.layout import Layout
from whalepod.spec.model import to_config
from whalepod.spec.presets import load_model_spec
from whalepod.spec.run import load_run

PLAN_KEYS = {
    *("layout", "tokens_per_s", "tokens_per_s_per_gpu", "tflops_per_gpu", "mfu", "step_s", "memory_gib"),
    *("memory_by_category_gib", "memory_by_rank_gib", "time_parts_s", "limited_by", "helps", "warnings"),
    *("usd_per_hour", "usd_per_trillion_tokens", "days_per_trillion_tokens"),
}
SERVE_KEYS = {
    *("layout", "tokens_per_s", "tokens_per_s_per_gpu", "ttft_ms", "tpot_ms", "memory_gib", "limited_by"),
    *("memory_by_category_gib", "usd_per_hour", "usd_per_million_output_tokens", "helps", "warnings"),
}
TOP_KEYS = {
    *("model", "gpu", "num_gpus", "goal", "precision", "software", "sequence_length", "global_batch"),
    *("plans", "rejected", "advice", "web_calculator"),
}
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def trained() -> answer.Answer:
    return answer.plan(Question("deepseek-v2-lite", "train", pp=2), "8xH100", 3)


@pytest.fixture(scope="module")
def served() -> answer.Answer:
    return answer.plan(Question("deepseek-v2-lite", "serve"), "8xH100", 3)


@pytest.fixture(scope="module")
def nothing() -> answer.Answer:
    return answer.plan(Question("deepseek-v3", "train"), "2xRTX4090")


def shown(view: Any, width: int) -> list[str]:
    console = Console(width=width, record=True, file=io.StringIO(), markup=False)
    console.print(view)
    return console.export_text().splitlines()


def test_training_json(trained: answer.Answer) -> None:
    doc = json.loads(json.dumps(trained.doc, allow_nan=False))
    assert set(doc) >= TOP_KEYS
    assert (doc["model"], doc["gpu"], doc["num_gpus"], doc["goal"]) == (
        "deepseek-v2-lite",
        "H100",
        8,
        "train",
    )
    assert len(doc["plans"]) == 3
    for plan in doc["plans"]:
        assert set(plan) >= PLAN_KEYS
        assert set(plan["layout"]) == {f.name for f in fields(Layout)}
        assert plan["tokens_per_s"] == pytest.approx(8 * plan["tokens_per_s_per_gpu"])
        assert plan["memory_gib"] == pytest.approx(sum(plan["memory_by_category_gib"].values()))
        assert plan["memory_gib"] <= doc["usable_memory_gib"] < doc["gpu_memory_gib"]
        assert len(plan["memory_by_rank_gib"]) == plan["layout"]["pp"] == 2
        parts = plan["time_parts_s"]
        spent = sum(parts["computation"].values()) + sum(parts["exposed"].values())
        spent += sum(parts[name] for name in ("bubble", "interference", "optimizer", "other"))
        assert spent == pytest.approx(plan["step_s"], rel=1e-3)
        tokens = doc["global_batch"] * doc["sequence_length"]
        assert plan["tokens_per_s"] == pytest.approx(tokens / plan["step_s"])
        assert plan["days_per_trillion_tokens"] == pytest.approx(1e12 / plan["tokens_per_s"] / 86400)
        price = doc["price"]["usd_per_gpu_hour"]
        assert plan["usd_per_hour"] == pytest.approx(8 * price)
        cost = plan["gpu_hours_per_trillion_tokens"] * price
        assert plan["usd_per_trillion_tokens"] == pytest.approx(cost)
        assert {"change", "gain"} == set(plan["helps"][0])
    assert all(set(r) >= {"layout", "reason"} for r in doc["rejected"])
    speeds = [plan["tokens_per_s"] for plan in doc["plans"]]
    assert speeds == sorted(speeds, reverse=True)


def test_serving_json(served: answer.Answer) -> None:
    doc = json.loads(json.dumps(served.doc, allow_nan=False))
    assert set(doc) >= TOP_KEYS | {"pareto", "isl", "osl"}
    for plan in doc["plans"]:
        assert set(plan) >= SERVE_KEYS
        assert plan["memory_gib"] == pytest.approx(sum(plan["memory_by_category_gib"].values()))
        assert plan["ttft_ms"] > 0 < plan["tpot_ms"]
        paid = plan["usd_per_million_output_tokens"] * plan["tokens_per_s"] * 3600 / 1e6
        assert paid == pytest.approx(plan["usd_per_hour"])
    front = doc["pareto"]
    assert [p["tokens_per_s_per_user"] for p in front] == sorted(
        (p["tokens_per_s_per_user"] for p in front), reverse=True
    )
    assert [p["tokens_per_s_per_gpu"] for p in front] == sorted(p["tokens_per_s_per_gpu"] for p in front)


def test_nothing_fits_is_an_answer(nothing: answer.Answer) -> None:
    doc = nothing.doc
    assert doc["plans"] == []
    assert any("smallest change" in line for line in doc["advice"])
    assert doc["web_calculator"]["planner_gib"] is None
    assert "No layout fits" in "\n".join(shown(nothing.view(100), 100))
    assert "No layout fits" in plan_page(doc, [])


def test_impossible_sizes_are_an_answer() -> None:
    found = answer.plan(Question("deepseek-v2-lite", "train", tp=48), "16xH100")
    assert found.doc["plans"] == []
    assert "tp 48 must divide num_attention_heads 16; nearest: 16" in found.doc["advice"][0]
    assert "without tp 48 the best would be" in found.doc["advice"][1]
    found = answer.plan(Question("deepseek-v3", "serve", tp=32), "64xH100")
    assert found.doc["plans"] == []
    assert "TP 32 cuts intermediate_size 18432" in found.doc["advice"][-1]


def test_pins_hold() -> None:
    found = answer.plan(Question("deepseek-v2-lite", "serve", tp=4), "8xH100", 9)
    assert found.doc["plans"]
    for plan in found.doc["plans"]:
        pools = [plan["layout"][pool] for pool in ("worker", "prefill", "decode") if pool in plan["layout"]]
        assert all(pool["tp"] == 4 for pool in pools)
    assert any("latent cache" in line for line in found.doc["plans"][0]["warnings"])


def test_concurrency_and_limits() -> None:
    found = answer.plan(Question("deepseek-v2-lite", "serve", concurrency=16, mode="aggregated"), "8xH100")
    assert found.doc["plans"][0]["concurrency"] == pytest.approx(16, rel=0.01)
    quick = answer.plan(Question("deepseek-v2-lite", "serve", tpot_ms=15), "8xH100")
    assert all(plan["tpot_ms"] <= 15 for plan in quick.doc["plans"])
    never = answer.plan(Question("deepseek-v2-lite", "serve", concurrency=4096, tpot_ms=5), "8xH100")
    assert never.doc["plans"] == []
    assert never.doc["advice"]


@pytest.mark.parametrize("width", [80, 100, 160])
def test_tables_fit(width: int, trained: answer.Answer, served: answer.Answer) -> None:
    for found in (trained, served):
        lines = shown(found.view(width, calculator=True), width)
        assert all(len(line.rstrip()) <= width for line in lines)
        text = "\n".join(lines)
        assert "…" not in text
        for word in ("tokens/s", "GiB", "advice:", "calculator:", "$"):
            assert word in text
    text = "\n".join(shown(trained.view(width), width))
    for word in (
        "pp 2",
        "1f1b" if "1f1b" in text else "interleaved",
        "activations",
        "days",
        "time of a step",
    ):
        assert word in text


def test_words() -> None:
    axes, work = layout_words(
        Layout(pp=16, dp_shard=128, ep=64, schedule="dualpipev", zero=1, global_batch=128)
    )
    assert (axes, work) == ("pp 16 x dp 128, ep 64", "dualpipev, micro-batch 1, ZeRO 1, no recompute")
    assert layout_words(Layout())[0] == "1 device"
    assert [dollars(x) for x in (0.412, 6738, 71.2e6, 3.1e9)] == ["$0.41", "$6,738", "$71.2M", "$3.1B"]
    assert [three(x) for x in (8100, 34.56, 0.003456, 0)] == ["8,100", "34.6", "0.00346", "0"]


def test_calculator() -> None:
    """The figures that the calculators on the web give, and how far they are from a plan."""
    v3, cluster = load_model_spec("deepseek-v3"), parse_gpus("64xH100")
    found = web_calculator(v3, cluster, "bf16", "serve", None)
    assert found["rule_gb"] == pytest.approx(1543, abs=1)
    assert web_calculator(v3, cluster, "fp4", "serve", None)["rule_gb"] == pytest.approx(386, abs=1)
    assert web_calculator(v3, cluster, "bf16", "train", 10 * found["rule_gib"])["planner_over_rule"] == 10
    assert found["left_out"]


def test_pictures(trained: answer.Answer, served: answer.Answer) -> None:
    timeline = trained.planned.plans[0].step.timeline  # type: ignore[union-attr]
    panels = planning_pictures.training_panels(trained.doc, timeline)
    assert [title.split(":")[0] for title, _, _ in panels][:2] == ["Memory", "Where a step's time goes"]
    assert len(panels) == 4
    for found in (panels, planning_pictures.serving_panels(served.doc)):
        picture = planning_pictures.png(found, "a $model$ with_marks^")
        assert picture.startswith(PNG)
        assert len(picture) > 20_000


def test_page_is_self_contained_and_escaped(tmp_path: Path) -> None:
    folder = tmp_path / "<script>alert(1)<" / "script>"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(to_config(load_model_spec("v3-mini"))))
    other = tmp_path / "<b>[red]$x$"
    other.mkdir()
    (other / "config.json").write_text(json.dumps(to_config(load_model_spec("v3-mini"))))
    for goal in ("train", "serve"):
        for path in (folder, other):
            page = tmp_path / "page.html"
            found = answer.plan(Question(str(path), goal), "8xH100", 2, html=page)
            text = page.read_text(encoding="utf-8")
            assert "<script" not in text
            assert "script>" not in text
            assert "<b>" not in text
            assert not re.search(r"https?://", text)
            assert not re.findall(r"(?:src|href)=\"(?!data:image/png;base64,)", text)
            assert text.count("data:image/png;base64,") >= 2
            assert found.doc["model"] in "".join(shown(found.view(200), 200))


def test_emitted_run_is_a_run(trained: answer.Answer, tmp_path: Path) -> None:
    for question, gpus in (
        (Question("deepseek-v2-lite", "train"), "8xH100"),
        (Question("v2-lite", "train", pp=4, schedule="interleaved", sequence_length=2048), "16xH100"),
        (Question("v3-mini", "train", mtp=False, software="whalepod", global_batch=16), "2xcpu"),
    ):
        file = tmp_path / "run.yaml"
        found = answer.plan(question, gpus, 1, emit=file)
        config = load_run(file)
        layout, planned = config.make_layout(), found.doc["plans"][0]["layout"]
        assert {f.name: getattr(layout, f.name) for f in fields(Layout)} == planned | {
            "stage_layers": planned["stage_layers"] and tuple(planned["stage_layers"])
        }
        spec = config.model_spec()
        assert config.data.sequence_length == found.doc["sequence_length"]
        layout.check_model(spec, config.data.sequence_length)
        layout.check_devices(found.doc["num_gpus"])
        assert spec.num_nextn_predict_layers == question.spec.num_nextn_predict_layers
        assert bool(found.doc["notes"]) == (question.software != "whalepod")


def test_no_plan_no_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    question = Question("deepseek-v3", "train")
    with pytest.raises(UserError, match="there is no plan to emit: nothing fits"):
        answer.plan(question, "2xRTX4090", emit=file)
    with pytest.raises(UserError, match="there is no plan to draw: nothing fits"):
        answer.plan(question, "2xRTX4090", picture=tmp_path / "a.png")
    with pytest.raises(UserError, match=r"deepseek-v3\.2 can be planned for but not trained yet"):
        answer.plan(Question("deepseek-v3.2", "train"), "512xH800", emit=file)
    with pytest.raises(UserError, match="there is no plan to emit"):
        answer.plan(Question("deepseek-v3", "serve"), "2xRTX4090", emit=file)
    assert list(tmp_path.iterdir()) == []


def test_counts() -> None:
    assert parse_counts("64, 8,8..32,16") == [8, 16, 32, 64]
    for text in ("", "8,", "8..", "x", "8..4", "0", "1.5", "99999999", "-8", "8;16"):
        with pytest.raises(UserError, match="--counts"):
            parse_counts(text)


@pytest.fixture(scope="module")
def curve() -> dict[str, Any]:
    return answer.scale(Question("deepseek-v2-lite", "train"), "H100", "1..32")


def test_scale_train(curve: dict[str, Any]) -> None:
    points = json.loads(json.dumps(curve, allow_nan=False))["points"]
    assert [p["num_gpus"] for p in points] == [1, 2, 4, 8, 16, 32]
    fitting = [p for p in points if p["fits"]]
    assert fitting[0]["efficiency"] == 1
    assert fitting[0]["speedup_per_doubling"] is None
    assert fitting[0]["num_gpus"] == curve["smallest_count_that_fits"]
    assert not points[0]["fits"]
    assert points[0]["tokens_per_s"] is points[0]["layout"] is None
    for before, point in pairwise(fitting):
        assert point["speedup_per_doubling"] == pytest.approx(point["tokens_per_s"] / before["tokens_per_s"])
        assert point["days_per_trillion_tokens"] < before["days_per_trillion_tokens"]
        assert point["usd_per_trillion_tokens"] > 0


def test_scale_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, int, int]] = []
    doc = scaling.scale(
        Question("deepseek-v2-lite", "serve", price=2.0), "L40S", [1, 2, 4], lambda *x: told.append(x)
    )
    assert [p["num_gpus"] for p in doc["points"]] == [1, 2, 4]
    assert all(p["usd_per_million_output_tokens"] > 0 for p in doc["points"] if p["fits"])
    assert told[-1] == ("planning", 3, 3)
    monkeypatch.setattr(scaling, "MAX_COUNT", 32)
    default = scaling.scale(Question("deepseek-v3", "serve"), "B200", None)
    fits = [p["fits"] for p in default["points"][:2]]
    assert fits == [False, True]
    assert default["points"][-1]["num_gpus"] == 32


@pytest.mark.parametrize("width", [80, 100, 160])
def test_scale_view(width: int, curve: dict[str, Any]) -> None:
    lines = shown(scaling.scale_view(curve, width), width)
    assert all(len(line.rstrip()) <= width for line in lines)
    text = "\n".join(lines)
    assert "…" not in text
    assert "does not fit" in " ".join(text.split())
    assert "it fits from" in text


def test_scale_pictures(curve: dict[str, Any]) -> None:
    assert scaling_pictures.scale_png(curve).startswith(PNG)
    page = scaling_pictures.scale_page(curve)
    assert page.count("data:image/png;base64,") == 2
    assert "does not fit" in page


@pytest.fixture(scope="module")
def compared() -> dict[str, Any]:
    return accuracy.accuracy_json()


def test_accuracy(compared: dict[str, Any]) -> None:
    doc = json.loads(json.dumps(compared, allow_nan=False))
    assert set(doc) >= {"training", "serving", "medians"}
    assert len(doc["training"]) >= 40
    assert len(doc["serving"]) >= 190
    for row in (*doc["training"], *doc["serving"]):
        assert row["error"] == pytest.approx(row["predicted"] / row["published"] - 1)
    for row in doc["serving"]:
        assert row["tpot"]["published"] == pytest.approx(float(row["tpot_ms"]))
    assert 0 < doc["medians"]["training"]["all"] < 0.3
    assert 0 < doc["medians"]["serving"]["tpot"] < 0.3


@pytest.mark.parametrize("width", [80, 100, 160])
def test_accuracy_view(width: int, compared: dict[str, Any]) -> None:
    lines = shown(accuracy.accuracy_view(compared, width), width)
    assert all(len(line.rstrip()) <= width for line in lines)
    assert "…" not in "\n".join(lines)
    assert sum("B200" in line for line in lines) > 100
    assert any(line.startswith("median error: all") for line in lines)
    assert any(line.startswith("worst row") for line in lines)


def test_accuracy_markdown(compared: dict[str, Any]) -> None:
    text = accuracy.accuracy_markdown(compared)
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert len(tables) > len(compared["training"]) + len(compared["serving"])
    assert "| 2048 H800 |" in text


def test_accuracy_of_few_rows(tmp_path: Path) -> None:
    """Only a heading, or rows without some figures, are no reason to fail."""
    lines = (accuracy.FILES / "training.csv").read_text().splitlines()
    training = tmp_path / "t.csv"
    training.write_text(lines[0] + "\n")
    serving = tmp_path / "s.csv"
    head, row = (accuracy.FILES / "serving.csv").read_text().splitlines()[:2]
    cells = dict(zip(head.split(","), row.split(","), strict=True)) | {
        "ttft_ms": "",
        "est_output_tok_s_per_gpu": "",
    }
    serving.write_text(f"{','.join(cells)}\n{','.join(cells.values())}\n")
    doc = accuracy.accuracy_json(training, serving)
    assert doc["training"] == []
    assert doc["serving"][0]["ttft"]["error"] is None
    assert doc["medians"]["serving"]["tpot"] is not None
    assert shown(accuracy.accuracy_view(doc, 100), 100)
    assert accuracy.accuracy_markdown(doc)
