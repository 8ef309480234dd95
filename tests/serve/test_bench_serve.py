"""`whalepod bench-serve`: what it counts and says, of a server of its own and of one by its URL. No times."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from server_fixtures import Running, running

from whalepod.cli import main
from whalepod.planner.serve_layout import deployment
from whalepod.report.bench_serve import bench_view, predicted
from whalepod.serve.client import complete, open_client, server_url
from whalepod.serve.measure import Load, Prompts, parse_load
from whalepod.serve.start import EngineConfig, serving_layout
from whalepod.spec.errors import UserError
from whalepod.spec.hardware import load_gpu


def bench(capsys: pytest.CaptureFixture[str], target: object, *options: str) -> dict[str, Any]:
    assert main(["bench-serve", str(target), "--json", *options]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    assert main(["bench-serve", *map(str, argv)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    return lines[0]


@pytest.fixture
def chatterer(deepseek: Any) -> Iterator[Running]:
    """A server that says as much as it is asked to."""
    with running(*deepseek) as found:
        found.service.reply = lambda request: "def f(x):\n" * request.max_new_tokens
        yield found


@pytest.mark.slow
def test_a_folder_is_served_and_measured(learnt: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--concurrency", "1,4", "--prompt-tokens", "20", "--new-tokens", "8", "--cache-gib", "0.01"]
    doc = bench(capsys, learnt / "hf", *options)
    assert doc["model"] == "hf"
    assert doc["layout"] == {"tp": 1, "pp": 1, "dp": 1, "ep": 1}
    assert [point["concurrency"] for point in doc["points"]] == [1, 4]
    for point, requests in zip(doc["points"], (8, 16), strict=True):
        assert point["completed"] == point["requests"] == requests
        assert point["errors"] == {}
        assert point["short_answers"] == 0
        assert point["prompt_tokens_mean"] == 20
        for name in ("ttft_ms", "tpot_ms", "latency_ms"):
            assert 0 < point[f"{name}_p50"] <= point[f"{name}_p99"]
        assert point["ttft_ms_p50"] <= point["latency_ms_p50"]
        assert point["output_tokens_per_s"] == pytest.approx(8 * requests / point["duration_s"])
        assert point["prompt_tokens_per_s"] == pytest.approx(20 * requests / point["duration_s"])
        assert point["mean_in_flight"] <= point["concurrency"] * 1.01
        assert point["predicted"] is None
    assert "CPU" in doc["not_predicted"]


@pytest.mark.slow
def test_layouts_and_arrivals(learnt: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--rate", "20", "--requests", "9", "--prompt-tokens", "12", "--new-tokens", "4", "--tp", "2"]
    doc = bench(capsys, learnt / "run", *options, "--cache-gib", "0.01", "--shared-prefix", "5")
    (point,) = doc["points"]
    assert doc["layout"]["tp"] == 2
    assert (point["concurrency"], point["rate_per_s"], point["completed"]) == (None, 20.0, 9)


def test_a_server_by_its_url(chatterer: Running, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--concurrency", "3", "--requests", "10", "--prompt-tokens", "64", "--new-tokens", "6"]
    doc = bench(capsys, f"{chatterer.url}/v1/", *options)
    (point,) = doc["points"]
    assert doc["model"] == "whale"
    assert point["completed"] == 10
    # Words are counted by the server's own tokenizer, in the request that is left out.
    assert point["prompt_tokens_mean"] == pytest.approx(64, rel=0.25)
    asked = chatterer.service.asked
    assert len(asked) == 11
    assert len({request.prompt for request in asked}) == 11
    assert all(r.ignore_eos and r.sampling.temperature == 0 and r.max_new_tokens == 6 for r in asked)
    assert main(["bench-serve", chatterer.url, *options]) == 0
    shown = capsys.readouterr().out
    assert "3 in flight" in shown
    assert "not predicted" in shown
    # The same seed asks the same again: the fake has half of every prompt in its cache.
    assert "--seed" in shown


def test_errors_are_counted_by_status(chatterer: Running, capsys: pytest.CaptureFixture[str]) -> None:
    chatterer.service.limit, chatterer.service.delay = 2, 0.02
    options = ["--concurrency", "8", "--requests", "24", "--prompt-tokens", "16", "--new-tokens", "4"]
    (point,) = bench(capsys, chatterer.url, *options)["points"]
    assert set(point["errors"]) == {"429"}
    assert point["completed"] + point["errors"]["429"] == 24
    assert "full" in point["error_messages"]["429"]


def test_short_answers_are_told(server: Running, capsys: pytest.CaptureFixture[str]) -> None:
    doc = bench(capsys, server.url, "--concurrency", "1", "--requests", "2", "--new-tokens", "400")
    assert doc["points"][0]["short_answers"] == 2


def test_a_stream_that_breaks_is_no_answer(chatterer: Running) -> None:
    async def ask(**body: Any) -> Any:
        async with open_client(chatterer.url) as client:
            return await complete(client, {"model": "whale", "max_tokens": 4, **body})

    chatterer.service.reason = "abort"
    answer = asyncio.run(ask(prompt="def"))
    assert answer.outcome == "ok"
    assert 0 < answer.ttft_s <= answer.latency_s
    assert answer.new_tokens == 4
    assert asyncio.run(ask(prompt=[])).outcome == "400"
    chatterer.service.error = RuntimeError("it breaks")
    assert asyncio.run(ask(prompt="def")).outcome == "500"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["ftp://host"], "like http://"),
        (["http://host:notaport"], "like http://"),
        (["http://"], "like http://"),
        (["nowhere"], "no folder 'nowhere'"),
        (["localhost:8000"], "server's URL"),
        (["http://h", "--concurrency", "0"], "from 1 to"),
        (["http://h", "--concurrency", "8;9"], "like 8 or 1,8,32"),
        (["http://h", "--concurrency", "8", "--rate", "2"], "exclude each other"),
        (["http://h", "--rate", "nan"], "--rate must be"),
        (["http://h", "--requests", "0"], "--requests must be"),
        (["http://h", "--prompt-tokens", "8", "--shared-prefix", "9"], "--shared-prefix must be from 0 to 8"),
        (["http://h", "--tp", "2"], "for a folder"),
        ([".", "--model", "whale"], "a folder has one model"),
    ],
)
def test_what_cannot_be_meant(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in refused(capsys, *options)


def test_what_a_server_does_not_take(chatterer: Running, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        unused = f"http://127.0.0.1:{probe.getsockname()[1]}"
        assert f"no server at {unused}" in refused(capsys, unused)
    assert "did you mean 'whale'" in refused(capsys, chatterer.url, "--model", "wale")
    assert "/v1/models" in refused(capsys, f"{chatterer.url}/other")
    assert "must be at most" in refused(capsys, chatterer.url, "--prompt-tokens", "100000")


def test_a_key_is_sent(deepseek: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with running(*deepseek, api_keys=("secret",)) as found:
        assert "401" in refused(capsys, found.url)
        options = ["--concurrency", "1", "--requests", "1", "--prompt-tokens", "8", "--new-tokens", "2"]
        assert bench(capsys, found.url, "--api-key", "secret", *options)["points"][0]["completed"] == 1


def test_prompts_differ_behind_what_they_share() -> None:
    load = Load(prompt_tokens=12, shared_prefix=5)
    for vocabulary in (range(10, 400), None):
        prompts = Prompts(load, vocabulary)
        drawn = [prompts.next() for _ in range(20)]
        pieces = [each.split() if isinstance(each, str) else each for each in drawn]
        assert len({tuple(each) for each in pieces}) == 20
        assert len({tuple(each[:5]) for each in pieces}) == 1
        assert all(len(each) == 12 for each in pieces)
        again = Prompts(load, vocabulary)
        assert [again.next() for _ in range(20)] == drawn


def test_loads() -> None:
    assert [*parse_load(None, None).points] == [(1, 8), (8, 32), (32, 128)]
    assert [*parse_load("2, 64", None, requests=5).points] == [(2, 5), (64, 5)]
    assert [*parse_load(None, 2.0).points] == [(None, 60)]
    assert server_url("http://host:80/v1/") == "http://host:80"


def test_the_planner_is_asked_for_the_same_load() -> None:
    load, gpu = Load(prompt_tokens=256, new_tokens=64), load_gpu("h100")
    config = EngineConfig("deepseek-v2-lite", serving_layout(dp=2), dtype="bf16")
    few, many = (predicted(config, load, concurrency, 4 * concurrency, gpu) for concurrency in (2, 64))
    assert few.tpot_s is not None
    assert many.tpot_s is not None
    assert 0 < few.tpot_s < many.tpot_s
    assert few.output_tokens_per_s < many.output_tokens_per_s
    with pytest.raises(UserError, match="FP32"):
        predicted(EngineConfig("v3-mini", dtype="fp32"), load, 2, 8, gpu)
    with pytest.raises(UserError, match="calibrate"):
        predicted(config, load, 2, 8, load_gpu("cpu"))


def test_layouts_are_those_of_the_engine() -> None:
    assert str(deployment(serving_layout(tp=2, pp=2))) == "TP2 DPattn1 moeTP2 EP1 PP2"
    assert str(deployment(serving_layout(tp=2, dp=2))) == "2x(TP2 DPattn1 moeTP2 EP1)"
    assert str(deployment(serving_layout(dp=4, ep=4))) == "TP1 DPattn4 moeTP1 EP4"
    with pytest.raises(UserError, match="some of them"):
        deployment(serving_layout(dp=4, ep=2))


def test_the_table_shows_predictions_and_ratios() -> None:
    from rich.console import Console

    figures = dict.fromkeys(
        ("prompt_tokens_per_s", "requests_per_s", "ttft_ms_p99", "tpot_ms_p99", "prompt_tokens_mean"), 5.0
    )
    measured = {"output_tokens_per_s": 90.0, "ttft_ms_p50": 30.0, "tpot_ms_p50": None}
    point = {
        **{"concurrency": 4, "rate_per_s": None, "completed": 7, "errors": {"429": 2}, "short_answers": 0},
        **{"error_messages": {"429": "full"}, "cached_tokens_mean": 0.0, **figures, **measured},
        "predicted": {"output_tokens_per_s": 100.0, "ttft_ms": 20.0, "tpot_ms": 8.0},
        "ratio": {"output_tokens_per_s": 0.9, "ttft_ms": 1.5, "tpot_ms": None},
    }
    doc = {
        **{"model": "m", "target": "t", "prompt_tokens": 5, "new_tokens": 5, "shared_prefix_tokens": 0},
        **{"points": [point], "not_predicted": None, "notes": []},
    }
    console = Console(width=120)
    with console.capture() as captured:
        console.print(bench_view(doc))
    shown = captured.get()
    for piece in ("4 in flight", "2 x 429", "predicted", "100", "0.90", "1.50", "429: full"):
        assert piece in shown
