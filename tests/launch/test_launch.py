"""`whalepod launch`: the way from a plan, what to expect, what is refused, and two nodes for real."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from launch_jobs import job

from whalepod.cli import main
from whalepod.launch.launch import launch
from whalepod.report import answer
from whalepod.report.question import Question
from whalepod.spec.errors import UserError
from whalepod.spec.run import dump_run, load_run


def test_from_a_plan_to_files_with_the_same_figures(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    question = Question("v3-mini", "train", software="whalepod", global_batch=64, sequence_length=512, pp=1)
    found = answer.plan(question, "16xH100", 1, emit=file).doc["plans"][0]
    done = launch(file, "torchrun", tmp_path / "job")
    assert done.expected.tokens_per_s == pytest.approx(found["tokens_per_s"])
    assert done.expected.memory_gib == pytest.approx(found["memory_gib"])
    assert done.expected.limited_by == found["limited_by"]


def test_from_a_plan_to_serve_to_files_with_the_same_figures(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    question = Question("deepseek-v3", "serve", mode="aggregated", tp=8, isl=1024, osl=256)
    found = answer.plan(question, "8xH200", 1, emit=file).doc["plans"][0]
    done = launch(file, "kubernetes", tmp_path / "job")
    assert done.engine == "lws"
    assert done.expected.tokens_per_s == pytest.approx(found["tokens_per_s"], rel=0.01)
    assert done.expected.tpot_ms == pytest.approx(found["tpot_ms"], rel=0.01)
    assert done.expected.limited_by == found["limited_by"]
    with pytest.raises(UserError, match="this job is a deployment"):
        load_run(file).make_layout()


def test_the_command_prints_files_and_expectation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.yaml").write_text(dump_run(job("one node")))
    asked = ["launch", str(tmp_path / "run.yaml"), "--on", "slurm", "--out", str(tmp_path / "job")]
    assert main([*asked, "--json"]) == 0
    doc = json.loads(capsys.readouterr().out)
    assert sorted(doc) == ["engine", "expectation", "files", "notes", "start"]
    assert all(Path(file).is_file() for file in doc["files"])
    assert doc["expectation"]["step_s"] > 0
    assert main(asked) == 0  # over its own files
    assert "sbatch job.sbatch" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("one node", ["--on", "slrum"], "unknown --on 'slrum' (did you mean 'slurm'?)"),
        ("one node", ["--on", "vllm"], "--on vllm is for --for serve, and this job trains: use torchrun"),
        ("one server", ["--on", "torchrun"], "is for --for train, and this job is a deployment"),
        (
            "one node",
            ["--on", "slurm", "--gpus", "16xH100"],
            "the layout is for 8 GPUs (dp_shard 8), and there",
        ),
        ("one node", ["--on", "slurm", "--gpus-per-node", "3"], "8 GPUs are no whole number of nodes of 3"),
        ("many nodes", ["--on", "slurm", "--gpus", "256xA100"], "A100 has no FP8 matrix products: use bf16"),
        ("one server", ["--on", "vllm", "--gpus", "4xH200"], "needs 8 GPUs, and there are 4"),
        ("cores", ["--on", "megatron"], "Megatron-Bridge has no recipe to pre-train v3-mini"),
        ("mixed", ["--on", "vllm"], "not over EP 4 x moeTP 2: plan again with --ep 8, or use --on sglang"),
        (
            "one server",
            ["--on", "lws", "serve.engine=trtllm"],
            "no files for the engine trtllm: plan again with",
        ),
        ("one server", ["--on", "slurm", "serve.engine=whalepod"], "start it with whalepod serve"),
        ("divided", ["--on", "vllm"], "plan again with --mode aggregated, or use --on sglang"),
        (
            "many nodes",
            ["--on", "megatron", "layout.schedule=dualpipev"],
            "no pipeline schedule dualpipev: the nearest is interleaved",
        ),
        ("one node", ["--on", "slurm", "layout.pp=3"], "needs"),
    ],
)
def test_one_line_for_what_cannot_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, words: list[str], message: str
) -> None:
    (tmp_path / "run.yaml").write_text(dump_run(job(name)))
    if message == "needs":
        message = "the layout is for 24 GPUs"
    assert main(["launch", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "job"), *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert not (tmp_path / "job").exists()


def test_no_gpus_and_no_room(tmp_path: Path) -> None:
    config = job("one node")
    with pytest.raises(UserError, match="give --gpus, like 64xH100"):
        launch(config.model_copy(update={"gpus": None}), "slurm", tmp_path / "job")
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(UserError, match=r"holds other files \(mine.txt"):
        launch(config, "slurm", tmp_path)
    with pytest.raises(UserError, match="cannot write into"):
        launch(config, "slurm", tmp_path / "mine.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_names_are_not_commands(tmp_path: Path) -> None:
    launch(job("one node"), "torchrun", tmp_path / "job")
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": "echo", "SHARED_DIR": "/all"}
    node = ["bash", str(tmp_path / "job" / "node.sh"), "--restart"]
    said = subprocess.run(node, env=environment, capture_output=True, text=True, check=True)
    out = job("one node").out
    assert "$(x)" in out
    assert said.stdout.rstrip().endswith(f"out=/all/{out} --restart")
    assert said.stderr == ""


@pytest.mark.slow
def test_two_nodes_of_one_machine_train(tmp_path: Path) -> None:
    example = Path(__file__).parents[2] / "examples" / "v3-mini.yaml"
    small = ("train.steps=2", "data.sequence_length=32", "layout.micro_batch=2", "layout.global_batch=8")
    two = ("layout.dp_shard=2", "data.max_mib=0.3", "device=cpu", "out=runs/two")
    out = tmp_path / "job"
    launch(example, "torchrun", out, gpus="2xcpu", gpus_per_node=1, overrides=(*small, *two))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {**os.environ, "PYTHON": sys.executable, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    nodes = [
        subprocess.Popen(
            ["bash", out / "node.sh"],
            env={**environment, "NODE_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    said = [node.communicate(timeout=300)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    steps = [json.loads(line) for line in (out / "runs" / "two" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps if "loss" in line][-1] == 2
