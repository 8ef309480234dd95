"""What happens to a job whose workers are killed, stopped or asked to end. With real processes."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
from jobs import Job  # pyright: ignore[reportMissingImports]

from whalepod.parallel.checkpoint_files import newest_whole
from whalepod.parallel.comm import Axis

ENDLESS = 100_000


@pytest.fixture
def started(
    run_values: dict[str, Any], tmp_path: Path
) -> Iterator[Callable[[list[list[str]], dict[str, Any]], Job]]:
    """Starts commands, of which {} is the run.yaml of an endless run over two workers."""
    jobs: list[Job] = []

    def start(commands: list[list[str]], settings: dict[str, Any]) -> Job:
        run_values["layout"] |= {"dp_replicate": 2}
        run_values["train"] |= {"steps": ENDLESS, "evaluate_every": 0, "checkpoint_every": 5} | settings
        file = tmp_path / "run.yaml"
        file.write_text(yaml.safe_dump(run_values))
        filled = [[str(file) if word == "{}" else word for word in command] for command in commands]
        jobs.append(Job(tmp_path / "run", filled))
        return jobs[-1]

    yield start
    for job in jobs:
        job.kill()


LOCAL = [sys.executable, "-m", "whalepod", "train", "{}"]


def goes_on_after_a_kill(job: Job) -> None:
    """A killed worker comes back with the others, and the steps that are done again have the same losses."""
    job.reach(12)
    before = job.rows()
    saved = job.saved()
    os.kill(job.workers()[-1], signal.SIGKILL)
    job.wait_until(lambda: len(job.rows()) < len(before))  # those after the checkpoint go ...
    job.reach(before[-1]["step"] + 3)  # ... and come again
    after = job.rows()
    assert [row["step"] for row in after] == list(range(1, len(after) + 1))
    assert saved < before[-1]["step"]
    for old, new in zip(before, after, strict=False):
        assert (old["loss"], old["gradient_norm"]) == (new["loss"], new["gradient_norm"]), old["step"]


def assert_saved_on_leaving(job: Job) -> None:
    step = job.rows()[-1]["step"]
    assert job.saved() == step
    assert newest_whole(job.folder / "checkpoints", Axis("alone")) is not None


@pytest.mark.slow
def test_a_killed_local_worker_comes_back_and_sigterm_saves(started: Any) -> None:
    job = started([LOCAL], {"max_restarts": 1})
    goes_on_after_a_kill(job)
    assert "the workers start again, 1 of 1 times" in job.told()
    job.processes[0].terminate()
    assert job.end() == [0]
    assert_saved_on_leaving(job)
    assert job.processes[0].stdout is not None
    assert "ended by SIGTERM with a checkpoint" in job.processes[0].stdout.read()


@pytest.mark.slow
def test_two_hosts_under_torchrun_come_back(started: Any) -> None:
    """Two agents with a worker each; they keep one store for all rounds."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    torchrun += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}", "--max-restarts", "2"]
    command = [*torchrun, "--local-addr", "localhost", "-m", "whalepod", "train", "{}"]
    job = started([command, command], {})
    goes_on_after_a_kill(job)
    for process in job.processes:
        process.terminate()
    job.end()
    assert_saved_on_leaving(job)


@pytest.mark.slow
def test_a_stopped_rank_is_named(started: Any) -> None:
    job = started([LOCAL], {"max_restarts": 0, "hang_after_s": 3.0})
    job.reach(3)
    stopped = job.workers()[-1]
    os.kill(stopped, signal.SIGSTOP)
    job.wait_until(lambda: "not arrived: rank" in job.told())
    os.kill(stopped, signal.SIGCONT)  # the launcher would kill it after half a minute
    assert job.end() == [1]
    report = job.told()
    first = next(line for line in report.splitlines() if "nothing has moved for" in line)
    assert f"pid {stopped})" in first.split("not arrived: ")[1]
    assert first.split("not arrived: ")[1].count("pid") == 1
    assert " of axis " in first
    assert "does not answer, was last seen in step" in report
    assert "Traceback" not in report


def test_sigint_saves_in_a_single_process(started: Any, run_values: dict[str, Any]) -> None:
    job = started([[*LOCAL, "layout.dp_replicate=1"]], {"checkpoint_every": 0})
    job.reach(3)
    job.processes[0].send_signal(signal.SIGINT)
    assert job.end() == [0]
    assert_saved_on_leaving(job)
