"""`whalepod plan`, `scale` and `accuracy` as commands: what they print, and what they refuse."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from whalepod import cli
from whalepod.spec.run import load_run

LITE = ["deepseek-v2-lite", "--gpus", "8xH100", "--for"]


def whalepod(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    assert cli.main([str(part) for part in argv]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def refused(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    assert cli.main([str(part) for part in argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1, captured.err
    assert captured.err.startswith("whalepod: ")
    return captured.err


def test_plan_train(capsys, tmp_path) -> None:
    out = whalepod(
        capsys, "plan", *LITE, "train", "--top", 2, "--calculator", "--emit", tmp_path / "run.yaml"
    )
    for word in ("deepseek-v2-lite on 8 x H100", "limited by", "memory, GiB", "calculator:", "run: "):
        assert word in out
    assert load_run(tmp_path / "run.yaml").make_layout().num_devices == 8


def test_plan_json(capsys, tmp_path) -> None:
    files = {name: tmp_path / f"plan.{end}" for name, end in (("--html", "html"), ("--picture", "png"))}
    options = [part for pair in files.items() for part in pair]
    for goal in ("train", "serve"):
        doc = json.loads(whalepod(capsys, "plan", *LITE, goal, "--json", *options))
        assert doc["goal"] == goal
        assert doc["plans"][0]["tokens_per_s"] > 0
        for path in files.values():
            assert path.stat().st_size > 10_000
            path.unlink()


def test_options_reach_the_planner(capsys) -> None:
    doc = json.loads(
        whalepod(
            capsys, "plan", *LITE, "train", "--json", "--price", 2, "--memory-gib", 200, "--global-batch", 64,
            "--sequence-length", 2048, "--imbalance", 1.5, "--software", "whalepod", "--precision", "bf16",
            "--micro-batch", 2, "--zero", 3, "--recompute", "full", "--tp", 1, "--pp", 1, "--ep", 4,
        )
    )  # fmt: skip
    layout = doc["plans"][0]["layout"]
    assert (layout["micro_batch"], layout["zero"], layout["recompute"], layout["ep"]) == (2, 3, "full", 4)
    assert (doc["global_batch"], doc["sequence_length"], doc["imbalance"]) == (64, 2048, 1.5)
    assert doc["gpu_memory_gib"] == 200
    assert doc["price"] == {"usd_per_gpu_hour": 2, "date": "given by user", "source": "given by user"}
    assert doc["plans"][0]["usd_per_hour"] == 16


def test_defaults(capsys) -> None:
    """FP8 where the weights were released so and the GPU has it; the stack that ran on the H800."""
    for gpus, precision, software in (
        ("256xH800", "fp8", "deepseek"),
        ("256xB200", "fp8", "megatron-26.02"),
        ("256xA100", "bf16", "megatron-26.02"),
    ):
        doc = json.loads(
            whalepod(capsys, "plan", "v3", "--gpus", gpus, "--for", "train", "--json", "--top", 1)
        )
        assert (doc["precision"], doc["software"]) == (precision, software)
        assert (doc["global_batch"], doc["sequence_length"]) == (15360, 4096)
    assert json.loads(whalepod(capsys, "plan", *LITE, "train", "--json", "--top", 1))["precision"] == "bf16"


@pytest.mark.parametrize("question", [("2xRTX4090", "train"), ("2xRTX4090", "serve")])
def test_nothing_fits(capsys, question) -> None:
    gpus, goal = question
    out = whalepod(capsys, "plan", "deepseek-v3", "--gpus", gpus, "--for", goal)
    assert "No layout fits." in out
    assert "advice:" in out
    doc = json.loads(whalepod(capsys, "plan", "deepseek-v3", "--gpus", gpus, "--for", goal, "--json"))
    assert doc["plans"] == []
    assert any("RTX4090" in line or "RTX 4090" in line for line in doc["advice"])


def test_scale(capsys, tmp_path) -> None:
    picture, page = tmp_path / "scale.png", tmp_path / "scale.html"
    arguments = ["scale", "v2-lite", "--gpu", "h100", "--counts", "4..16", "--for"]
    out = whalepod(capsys, *arguments, "train", "--picture", picture, "--html", page)
    assert "efficiency" in out
    assert picture.stat().st_size > 10_000
    assert page.stat().st_size > 10_000
    doc = json.loads(whalepod(capsys, *arguments, "serve", "--json", "--isl", 1024, "--osl", 128))
    assert [p["num_gpus"] for p in doc["points"]] == [4, 8, 16]
    assert (doc["isl"], doc["osl"], doc["goal"]) == (1024, 128, "serve")


def test_accuracy(capsys, tmp_path) -> None:
    from whalepod.report.accuracy import FILES

    rows = (FILES / "training.csv").read_text().splitlines()
    few = tmp_path / "few.csv"
    few.write_text("\n".join(rows[:3]) + "\n")
    table = tmp_path / "table.md"
    runs = (FILES / "serving.csv").read_text().splitlines()
    served = tmp_path / "served.csv"
    served.write_text("\n".join(runs[:3]) + "\n")
    doc = json.loads(whalepod(capsys, "accuracy", "--training", few, "--serving", served, "--json"))
    assert (len(doc["training"]), len(doc["serving"])) == (2, 2)
    assert doc["training"][0]["gpu"] == "GB300"
    out = whalepod(capsys, "accuracy", "--training", few, "--serving", served, "--markdown", table)
    assert "GB300" in out
    assert "| GB300 |" in table.read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--for", "trian"], "unknown --for 'trian' (did you mean 'train'?)"),
        (["--gpus", "8xH1000"], "unknown GPU 'H1000' (did you mean 'H100'?)"),
        (["--gpus", "H100"], "like 64xH100"),
        (["--gpus", "0xH100"], "from 1 to"),
        (["--gpus", "9999999999xH100"], "from 1 to"),
        (["--gpus", "8xA100", "--precision", "fp8"], "A100 has no FP8"),
        (["--precision", "fp4"], "--precision fp4 is not for --for train"),
        (["--precision", "int8"], "unknown --precision 'int8'"),
        (["--software", "megatron-26.03"], "did you mean 'megatron-26.02'?"),
        (["--schedule", "dualpipe"], "did you mean 'dualpipev'?"),
        (["--recompute", "ful"], "did you mean 'full'?"),
        (["--engine", "sglang"], "--engine has no effect with --for train"),
        (["--isl", "1"], "--isl has no effect with --for train"),
        (["--for", "serve", "--zero", "1"], "--zero has no effect with --for serve"),
        (["--for", "serve", "--engine", "sglan"], "did you mean 'sglang'?"),
        (["--for", "serve", "--mode", "both"], "unknown --mode 'both'"),
        (["--for", "serve", "--isl", "160000", "--osl", "9000"], "positions"),
        (["--for", "serve", "--precision", "fp32"], "--precision fp32 is not for --for serve"),
        (["--sequence-length", "200000"], "163840 positions"),
        (["--html", "/no/such/place/a.html"], "--html: there is no folder '/no/such/place'"),
        (["--picture", "a.pdf"], "must end in .png"),
        (["--emit", "a.json"], "must end in .yaml or .yml"),
        (["--emit", "/"], "--emit: '/' is a folder"),
        (["--scale-up-gb-s", "5", "--gpus", "8xL40S"], "L40S has no scale-up link"),
    ],
)
def test_refusals(capsys, options, message) -> None:
    defaults = [["--gpus", "8xH100"], ["--for", "train"]]
    given = [part for pair in defaults if pair[0] not in options for part in pair]
    assert message in refused(capsys, "plan", "deepseek-v3", *given, *options)


TRAIN = [
    *("--global-batch", "--sequence-length", "--imbalance", "--gpus-per-node", "--price", "--memory-gib"),
    *("--memory-tb-s", "--scale-up-gb-s", "--nic-gb-s", "--tp", "--pp", "--ep", "--cp", "--micro-batch"),
    *("--zero", "--top"),
]
SERVE = ["--isl", "--osl", "--concurrency", "--ttft-ms", "--tpot-ms"]


@pytest.mark.parametrize("option", TRAIN + SERVE)
def test_numbers_that_cannot_be(capsys, option) -> None:
    goal = "serve" if option in SERVE else "train"
    for value in ("-1", "nan", "inf", "1e99", "99999999999999999999", "x", ""):
        line = refused(capsys, "plan", *LITE, goal, option, value)
        assert option in line
    if option != "--price":
        assert option in refused(capsys, "plan", *LITE, goal, option, "0")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["scale", "v3", "--gpu", "H8000", "--for", "train"], "unknown GPU 'H8000' (did you mean 'H800'?)"),
        (["scale", "v3", "--gpu", "H800", "--for", "train", "--counts", "8,x"], "--counts must be like"),
        (
            ["scale", "v3", "--gpu", "H800", "--for", "train", "--counts", "0"],
            "--counts: a count must be from 1",
        ),
        (["scale", "v3", "--gpu", "H800", "--for", "train", "--counts", "8..1"], "runs backwards"),
        (["scale", "v3", "--gpu", "A100", "--for", "train", "--precision", "fp8"], "A100 has no FP8"),
        (["scale", "v4-pro", "--gpu", "H800", "--for", "train"], "published figures only"),
        (["scale", "v3", "--gpu", "H800"], "missing option '--for'"),
        (["plan", "v3", "--for", "train"], "missing option '--gpus'"),
        (["plan", "deepsek-v3", "--gpus", "8xH100", "--for", "train"], "did you mean 'deepseek-v3'?"),
        (["plan", "v2-lite", "--gpus", "8xH100", "--for", "train", "--mtp"], "has no multi-token prediction"),
        (["accuracy", "--training", "/no/such.csv"], "/no/such.csv"),
        (["accuracy", "--serving", "/"], "cannot read"),
        (["accuracy", "--markdown", "/no/such/a.md"], "--markdown: there is no folder"),
    ],
)
def test_other_refusals(capsys, argv, message) -> None:
    assert message in refused(capsys, *argv)


@pytest.mark.parametrize("name", ["training", "serving"])
def test_broken_tables_of_measurements(capsys, tmp_path, name) -> None:
    from whalepod.report.accuracy import FILES

    head, row = (FILES / f"{name}.csv").read_text().splitlines()[:2]
    columns, cells = head.split(","), row.split(",")
    file = tmp_path / "broken.csv"
    numbers = {
        "training": ("gpus", "seq", "gbs", "mbs", "tp", "pp", "vp", "ep", "cp", "dp", "tok_s_gpu", "gpu")
    }
    other = {"training": "serving", "serving": "training"}[name]
    empty = tmp_path / "empty.csv"
    empty.write_text((FILES / f"{other}.csv").read_text().splitlines()[0] + "\n")
    numbers["serving"] = ("isl", "osl", "concurrency", "layout", "gpu", "model")
    for column in numbers[name]:
        for value in ("x", "-3", "0"):
            changed = [value if c == column else cell for c, cell in zip(columns, cells, strict=True)]
            file.write_text(f"{head}\n{','.join(changed)}\n")
            assert str(file) in refused(capsys, "accuracy", f"--{name}", file, f"--{other}", empty), (
                column,
                value,
            )
    file.write_bytes(b"\xff\xfe\x00")
    assert str(file) in refused(capsys, "accuracy", f"--{name}", file)


def test_plan_needs_neither_torch_nor_matplotlib() -> None:
    program = (
        "import sys\n"
        "from whalepod.cli import main\n"
        "code = main(['plan', 'deepseek-v3', '--gpus', '2048xH800', '--for', 'train'])\n"
        "assert not {'torch', 'transformers', 'matplotlib', 'jinja2'} & set(sys.modules)\n"
        "sys.exit(code)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(cli.__file__).parents[2])}
    command = [sys.executable, "-c", program]
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL, timeout=60)
