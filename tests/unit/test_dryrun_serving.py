"""The dry run of serving by itself: what each rank holds, and bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from whalepod.cli import main
from whalepod.spec.counts import kv_elements_per_token, params
from whalepod.spec.presets import load_model_spec

SPEC = load_model_spec("v3-mini").with_(num_nextn_predict_layers=0)


def asked(
    capsys: pytest.CaptureFixture[str], folder: Path, layout: str, gpus: str, *options: str
) -> tuple[int, str, str]:
    job = folder / "job.yaml"
    job.write_text(
        f"model: {{preset: v3-mini, num_nextn_predict_layers: 0}}\nlayout: {{micro_batch: 1, {layout}}}\n"
    )
    capsys.readouterr()
    code = main(["dryrun", str(job), "--gpus", gpus, "--for", "serve", *options])
    found = capsys.readouterr()
    return code, found.out, found.err


def test_what_one_device_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load = ("--batch", "5", "--context", "1000", "--prefill", "100", "--json")
    code, out, _ = asked(capsys, tmp_path, "global_batch: 1", "1xH100", *load)
    assert code == 0
    found: dict[str, Any] = json.loads(out)
    (role,) = found["roles"]
    bias = params(SPEC).selection_bias  # a buffer
    assert role["parameters"] == params(SPEC).total - bias
    assert role["weights_gib"] * 2**30 == pytest.approx(2 * role["parameters"] + 4 * 2 * bias, abs=1000)
    pages = 5 * 16 + 2  # of 64 tokens
    assert role["cache_gib"] * 2**30 == 2 * kv_elements_per_token(SPEC) * 64 * pages
    decode, prefill = role["steps"]
    assert (decode["kind"], prefill["kind"]) == ("decode", "prefill")
    assert not decode["collectives"]
    assert not prefill["collectives"]
    assert prefill["flops"] > 5 * decode["flops"]
    assert found["fits"]
    assert not found["findings"]
    assert found["sequences_that_fit"] > 100
    for step in role["steps"]:
        parts = found["step_parts_s"][step["kind"]]
        assert found["step_s"][step["kind"]] == pytest.approx(sum(parts.values()))
        assert min(parts.values()) >= 0
        tallest = max(sum(v for k, v in point.items() if k != "at") for point in step["memory_over_step"])
        assert tallest == pytest.approx(step["tensors_gib"], rel=0.01)
    assert role["memory_gib"] == pytest.approx(sum(role["memory_by_category_gib"].values()))


def test_ranks_share_what_the_layout_splits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    held = {}
    for layout, gpus in (
        ("global_batch: 1", "1xH100"),
        ("dp_shard: 2, ep: 2, global_batch: 2", "2xH100"),
        ("pp: 2, global_batch: 4", "2xH100"),
        ("tp: 2, global_batch: 1", "2xH100"),
    ):
        code, out, _ = asked(capsys, tmp_path, layout, gpus, "--batch", "4", "--context", "500", "--json")
        assert code == 0
        held[layout[:2]] = json.loads(out)["roles"]
    (one,), (ep,), (tp,), pp = (held[key] for key in ("gl", "dp", "tp", "pp"))
    routed = params(SPEC).routed_experts
    assert one["parameters"] - ep["parameters"] == routed // 2
    assert sum(role["parameters"] for role in pp) == one["parameters"]
    assert sum(role["cache_gib"] for role in pp) == pytest.approx(one["cache_gib"])
    assert tp["cache_gib"] == one["cache_gib"]  # MLA's latent is every rank's
    assert one["parameters"] / 2 < tp["parameters"] < 0.6 * one["parameters"]


def test_what_does_not_fit_or_goes_over_a_slow_link_is_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    load = ("--batch", "60000", "--context", "2000", "--prefill", "64", "--roles", "first", "--json")
    _, out, _ = asked(capsys, tmp_path, "global_batch: 1", "1xH100", *load)
    found = json.loads(out)
    assert not found["fits"]
    (finding,) = found["findings"]
    assert finding["kind"] == "memory"
    assert "cache" in finding["problem"]
    assert f"at most {found['sequences_that_fit']:,}" in finding["remedy"]
    slow = ("--gpus-per-node", "2", "--batch", "2", "--context", "64", "--prefill", "64")
    _, out, _ = asked(capsys, tmp_path, "tp: 4, global_batch: 1", "4xH100", *slow, "--json")
    (finding,) = json.loads(out)["findings"]
    assert (finding["kind"], finding["where"]) == ("network", "tp")
    assert "domain of 2" in finding["problem"]
    assert "at most 2" in finding["remedy"]


def test_trace_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace, picture = tmp_path / "trace.json", tmp_path / "memory.png"
    options = ("--batch", "2", "--context", "64", "--prefill", "64", "--trace", str(trace))
    code, out, _ = asked(
        capsys, tmp_path, "pp: 2, global_batch: 4", "2xH100", *options, "--picture", str(picture), "--json"
    )
    assert code == 0
    step_s = json.loads(out)["step_s"]
    events = json.loads(trace.read_text())["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    assert {span["args"]["layer"] for span in spans if "layer" in span["args"]} == set(range(6))
    assert {span["pid"] for span in spans} == {0, 1}
    end = max(span["ts"] + span["dur"] for span in spans)
    assert end == pytest.approx(1e6 * (step_s["decode"] + step_s["prefill"]))
    assert {event["pid"] for event in events if event["ph"] == "C"} == {0, 1}
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_table_and_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = asked(capsys, tmp_path, "global_batch: 1", "1xH100", "--batch", "2")
    assert code == 0
    assert "a replica has room for" in out
    assert "decode step" in out
    for layout, gpus, options, message in [
        ("global_batch: 1", "2xH100", (), "--gpus 1xH100"),
        ("cp: 2, global_batch: 1", "2xH100", (), "layout.cp 2: serving"),
        ("tp: 3, global_batch: 1", "3xH100", (), "layout.tp 3"),
        ("global_batch: 1", "1xH100", ("--batch", "0"), "--batch"),
        ("global_batch: 1", "1xH100", ("--context", "9999999"), "--context"),
        ("global_batch: 1", "1xH100", ("--context", "999999"), "positions"),
        ("global_batch: 1", "1xH100", ("--rank", "0"), "--rank is for training"),
        ("global_batch: 1", "1xH100", ("--for", "dinner"), "--for"),
    ]:
        code, _, err = asked(capsys, tmp_path, layout, gpus, *options)
        assert (code, message in err) == (2, True), (options, err)
        assert len(err.strip().splitlines()) == 1
