"""`auto`: what fits by the dry run is run, and the fastest taken; nothing that goes wrong is the end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from whalepod.cli import main
from whalepod.dryrun import auto
from whalepod.dryrun.auto import Tried, choose
from whalepod.spec.errors import UserError
from whalepod.spec.run import RunConfig, load_run, make_run


def job(run_values: dict[str, Any], memory_gib: float | None = None, **layout: Any) -> RunConfig:
    run_values["layout"] = {"micro_batch": "auto", "global_batch": 8, "precision": "fp32"} | layout
    run_values["train"]["memory_gib"] = memory_gib
    return make_run(run_values)


def test_an_open_layout_is_for_training_only(run_values: dict[str, Any]) -> None:
    config = job(run_values, recompute="auto")
    assert config.is_open
    with pytest.raises(UserError, match=r"layout\.micro_batch and layout\.recompute are `auto` for"):
        config.make_layout()
    closed = config.with_layout(micro_batch=2, recompute="full")
    assert closed.make_layout().recompute == "full"
    with pytest.raises(UserError, match=r"layout\.recompute: input should be 'none', .* 'auto', not 'auot'"):
        make_run({"layout": {"recompute": "auot"}})
    with pytest.raises(UserError, match=r"layout\.micro_batch: input should be a whole number or 'auto'"):
        make_run({"layout": {"micro_batch": "big"}})
    with pytest.raises(UserError, match=r"layout\.pp must be at least 1"):
        job(run_values, pp=0)


def test_which_micro_batches_there_are(run_values: dict[str, Any]) -> None:
    def sizes(**layout: Any) -> list[int]:
        return auto._micro_batches(job(run_values, **layout))

    assert sizes(global_batch=24) == [24, 8, 4, 2, 1]
    assert sizes(global_batch=24, dp_shard=2) == [12, 4, 2, 1]
    assert sizes(global_batch=8, pp=2) == [4, 2, 1]  # 1F1B wants two
    assert auto._micro_batches(make_run({"layout": {"recompute": "auto"}})) == [8]


def test_ranks_of_a_launcher_have_one_budget(
    run_values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is free changes from rank to rank; what there is does not."""
    memory = {"MemTotal": 16 * 2**30, "MemAvailable": 4 * 2**30}
    monkeypatch.setattr(auto, "main_memory", memory.__getitem__)
    free = auto._budget_gib(job(run_values, dp_shard=4))
    assert free == pytest.approx((0.9 * 4 / 4 - auto.PROCESS_GIB["cpu"]) / auto.SLACK)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    memory["MemAvailable"] = 0
    expected = (0.9 * 16 / 2 - auto.PROCESS_GIB["cpu"]) / auto.SLACK
    assert auto._budget_gib(job(run_values, dp_shard=4)) == pytest.approx(expected)


def test_the_fastest_of_what_ran_is_taken(
    run_values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    speeds = {8: 10.0, 4: 30.0, 2: 20.0, 1: 25.0}
    needs = {("none", 8): 5.0, ("selective", 8): 2.0, ("full", 8): 1.0}
    monkeypatch.setattr(auto, "_budget_gib", lambda config: 3.0)
    monkeypatch.setattr(auto, "_dry_run_gib", lambda config, spec, m, policy: needs.get((policy, m), 0.5))
    ran = []

    def trial(config: RunConfig, candidate: Tried, sequences: int, budget: float) -> Tried:
        ran.append((candidate.micro_batch, candidate.recompute, sequences))
        return auto.replace(candidate, outcome="fits", tokens_per_s=speeds[candidate.micro_batch])

    monkeypatch.setattr(auto, "trial", trial)
    choice = choose(job(run_values, recompute="auto"))
    assert ran == [(8, "selective", 8), (4, "none", 8), (2, "none", 8), (1, "none", 8)]
    assert (choice.config.layout.micro_batch, choice.config.layout.recompute) == (4, "none")
    assert [(t.micro_batch, t.recompute, t.outcome) for t in choice.tried][:2] == [
        (8, "none", "too large"),
        (8, "selective", "fits"),
    ]
    ran.clear()
    speeds |= {4: 9.0, 2: 8.0, 1: 7.0}
    assert choose(job(run_values)).config.layout.micro_batch == 4  # 8 with "none" is too large
    assert [m for m, _, _ in ran] == [4, 2, 1]
    monkeypatch.setenv("RANK", "0")
    assert choose(job(run_values, recompute="auto")).config.layout.micro_batch == 8


def test_nothing_that_fits_says_how_much_is_missing(run_values: dict[str, Any]) -> None:
    with pytest.raises(
        UserError, match=r"no micro-batch fits: the smallest, 1 with recompute \w+, needs 0.0"
    ):
        choose(job(run_values, memory_gib=0.7001, recompute="auto"))


@pytest.mark.slow
def test_the_dry_run_counts_what_is_allocated_and_the_run_goes_on_with_it(
    run_values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job(run_values, dp_shard=2)
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(run_values))
    assert main(["train", str(path), "train.steps=2", "--json"]) == 0
    out = capsys.readouterr()
    assert "auto, within" in out.err
    found = json.loads((tmp_path / "run" / "micro_batch.json").read_text())
    ran = [t for t in found["tried"] if t["outcome"] == "fits"]
    assert [t["micro_batch"] for t in found["tried"]] == [4, 2, 1]
    assert ran
    for each in ran:
        assert each["dry_run_gib"] == pytest.approx(each["measured_gib"], rel=0.03)
    best = max(ran, key=lambda t: t["tokens_per_s"])
    assert load_run(tmp_path / "run" / "run.yaml").layout.micro_batch == best["micro_batch"]
    assert main(["train", str(path), "train.steps=3"]) == 0  # goes on as it began
    assert "auto, within" not in capsys.readouterr().err


@pytest.mark.slow
def test_out_of_memory_is_stepped_back_from(
    run_values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The dry run is made to lie; the process that believes it really runs out."""
    truth = auto._dry_run_gib
    monkeypatch.setattr(auto, "_dry_run_gib", lambda *args: min(truth(*args), 0.01))
    config = job(run_values, memory_gib=0.8, global_batch=2**14, micro_batch=2**14)
    assert auto.trial(config, Tried(2**14, "none", 0.01), 2**14, 0.1).outcome == "out of memory"
    small = auto.trial(config, Tried(4, "none", 0.01), 4, 0.1)
    assert small.outcome == "fits"
    expected = truth(config.with_layout(global_batch=4), config.model_spec(), 4, "none")
    assert small.measured_gib == pytest.approx(expected, rel=0.05)
