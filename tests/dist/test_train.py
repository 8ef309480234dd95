"""The trainer over many workers: the losses of one worker, whatever the layout, and across checkpoints.

Starting processes is what takes time here, so a test has one launch, in which the layouts of its size
run one after the other as ranks of torchrun would. Local workers and torchrun itself have their own.
"""

from __future__ import annotations

import copy
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from harness import run_ranks

from whalepod.cli import main
from whalepod.parallel import checkpoint_files, trained
from whalepod.spec.errors import UserError
from whalepod.spec.run import make_run
from whalepod.train import loop
from whalepod.train.metrics import read_metrics
from whalepod.train.start import train

STEPS, SHORT = 10, 4
TOLERANCE = 1e-6
CLOSE = ("loss", "mtp_loss", "validation_loss")
EQUAL = ("step", "tokens", "learning_rate", "expert_load_worst", "expert_load_mean", "skipped_steps")
Values = dict[str, Any]


def quick_peak(*_: object) -> float:
    """Stands in for the measurement of a worker's peak, which takes longer than the steps here."""
    return 1e11


@pytest.fixture
def values(run_values: Values, monkeypatch: pytest.MonkeyPatch) -> Values:
    """Four layers, so that pipelines have something to share out; eight sequences a step."""
    monkeypatch.setattr(loop, "measure_peak_flops", quick_peak)
    values = copy.deepcopy(run_values)
    values["model"]["num_hidden_layers"] = 4
    values["layout"] |= {"micro_batch": 1, "global_batch": 8}
    values["train"] |= {"steps": STEPS, "evaluate_every": 2, "checkpoint_every": 0, "keep_checkpoints": 9}
    return values


def under(values: Values, out: Path, **layout: Any) -> Values:
    return values | {"layout": values["layout"] | layout, "out": str(out)}


def rows_of(folder: Path) -> list[Values]:
    return read_metrics(folder / "metrics.jsonl")


def alone(values: Values, tmp_path: Path, until: int) -> list[Values]:
    """What one worker, uninterrupted, comes to."""
    folder = tmp_path / "alone"
    train(make_run(under(values, folder)), until=until, quiet=True)
    rows = rows_of(folder)
    assert [row["step"] for row in rows] == list(range(1, until + 1))
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.01  # it is not standing still
    assert all(row["validation_loss"] for row in rows[1::2])
    return rows


def assert_same(rows: list[Values], expected: list[Values], what: str) -> None:
    assert len(rows) == len(expected), what
    for ours, theirs in zip(rows, expected, strict=True):
        for key in EQUAL:
            assert ours[key] == theirs[key], (what, ours["step"], key)
        for key in CLOSE:  # there is a held-out loss at the same steps
            wanted = None if theirs[key] is None else pytest.approx(theirs[key], rel=TOLERANCE)
            assert ours[key] == wanted, (what, ours["step"], key)
        assert ours["gradient_norm"] == pytest.approx(theirs["gradient_norm"], rel=1e-4), (what, ours["step"])


class Job(dict[str, Any]):
    """A run as a rank is told of it: values of its run.yaml, the step to stop at, a port to meet at."""


def job(values: Values, out: Path, until: int, **layout: Any) -> Job:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return Job(values=under(values, out, **layout), until=until, port=free.getsockname()[1])


def run_jobs(jobs: list[Job]) -> list[tuple[int, float]]:
    """On every rank of one launch: each job as its rank; a layout of one device on the first alone."""
    loop.measure_peak_flops = quick_peak
    results = []
    for each in jobs:
        os.environ["MASTER_PORT"] = str(each["port"])
        config = make_run(each["values"])
        if config.make_layout().num_devices > 1:
            result = train(config, until=each["until"], quiet=True)
            results.append((result.steps, result.loss))
        elif os.environ["RANK"] == "0":
            launched = {key: os.environ.pop(key) for key in ("RANK", "WORLD_SIZE")}
            train(config, until=each["until"], quiet=True)
            os.environ |= launched
    return results


TWO: dict[str, Values] = {
    "dp_replicate": {"dp_replicate": 2},
    "dp_shard": {"dp_shard": 2, "zero": 2, "micro_batch": 2},
    "tp": {"tp": 2},
    "cp": {"cp": 2},
    "pp": {"pp": 2, "micro_batch": 2},
    "ep": {"dp_shard": 2, "ep": 2},
}
FOUR: dict[str, Values] = {
    "hybrid": {"dp_replicate": 2, "dp_shard": 2},
    "tp_pp": {"tp": 2, "pp": 2, "recompute": "selective"},
}


@pytest.mark.slow
def test_two_workers_train_as_one_does_and_resume_to_the_bit(values: Values, tmp_path: Path) -> None:
    expected = alone(values, tmp_path, SHORT)
    jobs = [job(values, tmp_path / name, SHORT, **layout) for name, layout in TWO.items()]
    resumed = ("ep", "pp")
    for name in resumed:
        jobs += [job(values, tmp_path / f"{name}-broken", until, **TWO[name]) for until in (2, SHORT)]
    results = run_ranks(run_jobs, 2, jobs)
    assert results[0] == results[1]  # every rank knows the same losses
    for name in TWO:
        assert_same(rows_of(tmp_path / name), expected, name)
    keys = (*EQUAL, *CLOSE, "gradient_norm")
    for name in resumed:
        whole, broken = (rows_of(tmp_path / folder) for folder in (name, f"{name}-broken"))
        assert [[row[k] for k in keys] for row in broken] == [[row[k] for k in keys] for row in whole], name
        a, b = (
            trained.read_model(tmp_path / folder, make_run(values).model_spec()).state_dict()
            for folder in (name, f"{name}-broken")
        )
        assert all(torch.equal(tensor, b[key]) for key, tensor in a.items()), name


@pytest.mark.slow
def test_four_workers_train_as_one_does(values: Values, tmp_path: Path) -> None:
    expected = alone(values, tmp_path, 2)
    run_ranks(run_jobs, 4, [job(values, tmp_path / name, 2, **layout) for name, layout in FOUR.items()])
    for name in FOUR:
        assert_same(rows_of(tmp_path / name), expected, name)


@pytest.mark.slow
def test_a_run_goes_on_under_any_other_layout(values: Values, tmp_path: Path) -> None:
    """One folder, a new layout every two steps: the losses of one worker that was never interrupted."""
    expected = alone(values, tmp_path, STEPS)
    chain: list[Values] = [
        {"dp_shard": 2},
        {"tp": 2},
        {"pp": 2, "schedule": "zbv"},
        {},
        {"dp_shard": 2, "ep": 2},
    ]
    folder = tmp_path / "chain"
    run_ranks(run_jobs, 2, [job(values, folder, 2 * (i + 1), **layout) for i, layout in enumerate(chain)])
    assert checkpoint_files.steps_saved(folder / "checkpoints") == [2, 4, 6, 8, 10]
    assert_same(rows_of(folder), expected, "chain")
    ours, theirs = (
        trained.read_model(tmp_path / n, make_run(values).model_spec()) for n in ("chain", "alone")
    )
    for name, tensor in theirs.state_dict().items():
        mine = ours.state_dict()[name]
        if name.endswith("e_score_correction_bias"):
            assert tensor.abs().max() > 0
            assert torch.equal(mine, tensor), name
        else:
            torch.testing.assert_close(mine, tensor, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.slow
def test_local_workers_and_what_goes_wrong_in_one(values: Values, tmp_path: Path) -> None:
    expected = alone(values, tmp_path, 2)
    folder = tmp_path / "local"
    config = make_run(under(values, folder, dp_shard=2))
    result = train(config, until=2, quiet=True)
    assert_same(rows_of(folder), expected, "local workers")
    assert (result.steps, len(result.memory_gib), len(result.state_gib)) == (2, 2, 2)
    assert result.loss == rows_of(folder)[-1]["loss"]
    assert json.loads((folder / "result.json").read_text())["loss"] == result.loss
    assert result.traffic_bytes_per_step["fsdp/reduce_scatter"] > 0
    assert max(result.state_gib) < 0.7 * sum(result.state_gib)  # shared out, not held twice
    # A torn checkpoint is found by the workers; the parent says so in one line.
    torn = next((checkpoint_files.path_of(folder / "checkpoints", 2)).glob("*.safetensors"))
    torn.write_bytes(torn.read_bytes()[:10])
    with pytest.raises(UserError) as caught:
        train(config, until=4, quiet=True)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"none of the 1 checkpoints in {folder / 'checkpoints'} is whole")
    assert len(str(caught.value)) < 400


@pytest.mark.slow
def test_torchrun_starts_the_same_command(values: Values, tmp_path: Path) -> None:
    expected = alone(values, tmp_path, 2)
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(under(values, tmp_path / "torchrun", tp=2)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "whalepod", "train", str(file), "layout.recompute=full", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout)  # of one rank only
    rows = rows_of(tmp_path / "torchrun")
    assert (result["steps"], result["loss"]) == (STEPS, rows[-1]["loss"])
    assert len(result["memory_gib"]) == 2
    assert_same(rows[:2], expected, "torchrun")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["layout.tp=3"], "layout.tp 3 must divide num_attention_heads 2; nearest: 2"),
        (
            ["layout.pp=8"],
            "4 layers for 8 pipeline stages (pp x stages per rank): 1 to 4 stages are possible",
        ),
        (["layout.ep=3"], "layout.ep 3 must divide dp_shard x cp x tp = 1 x 1 x 1 = 1"),
        (
            ["layout.dp_shard=3", "layout.ep=3", "layout.global_batch=6"],
            "layout.ep 3 must divide the 8 routed experts, as well as dp_shard x cp x tp = 3; nearest: 1",
        ),
        (["layout.cp=2", "data.sequence_length=31"], "it must be a multiple of 4; nearest: 28, 32"),
        (["layout.pp=2", "layout.global_batch=1"], "schedule 1f1b over pp 2 needs at least pp micro-batches"),
        (["layout.precision=fp8", "layout.tp=2"], "FP8 blocks: use layout.precision bf16, or tp 1"),
        (["layout.schedule=zb"], "layout.schedule: input should be 'gpipe', '1f1b'"),
    ],
)
def test_wrong_layouts_are_one_line(
    values: Values, tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], message: str
) -> None:
    assert message in refused(values, tmp_path, capsys, *overrides)
    assert not (tmp_path / "run").exists()


def test_workers_that_are_too_few(
    values: Values, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    text = refused(values, tmp_path, capsys, "layout.tp=2", "layout.pp=2")
    assert text == "whalepod: the layout needs pp x tp = 2 x 2 = 4 workers, but 3 were started"


def refused(values: Values, tmp_path: Path, capsys: pytest.CaptureFixture[str], *overrides: str) -> str:
    """The one line that `whalepod train` answers with."""
    file = tmp_path / "refused.yaml"
    file.write_text(yaml.safe_dump(values))
    assert main(["train", str(file), *overrides]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


@pytest.mark.parametrize(
    "axes", [{"dp_replicate": 2}, {"dp_shard": 2}, {"tp": 2}, {"dp_shard": 2, "ep": 2}], ids=str
)
def test_predicted_state_and_bytes_are_those_held_and_sent(
    values: Values, tmp_path: Path, axes: dict[str, int]
) -> None:
    values["train"]["evaluate_every"] = 0  # after it FSDP2 finds the root's weights gathered
    # The third step: so few tokens leave the balanced routing that is predicted soon after.
    result = train(make_run(under(values, tmp_path / "run", **axes)), until=3, quiet=True)
    assert result.predicted is not None
    assert result.predicted.state_gib == pytest.approx(max(result.state_gib), rel=0.05)
    assert result.predicted.bytes_by_axis.keys() == result.bytes_by_axis.keys()
    for axis, sent in result.bytes_by_axis.items():
        assert result.predicted.bytes_by_axis[axis] == pytest.approx(sent, rel=0.02), axis
