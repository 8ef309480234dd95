"""`whalepod scale --measure`: the counts that this machine has, run for real beside what was planned."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from whalepod.parallel.here import here
from whalepod.parallel.mesh import local_device
from whalepod.report.question import Question
from whalepod.spec.errors import UserError
from whalepod.spec.hardware import Gpu
from whalepod.spec.presets import load_preset
from whalepod.spec.run import make_run
from whalepod.train.start import train

Progress = Callable[[str, int, int], None]
GLOBAL_BATCH, SEQUENCE_LENGTH = 32, 256
STEPS = 8
MAX_STEP_S = 120.0


def for_this_machine(question: Question, gpu: str) -> Question:
    """The question with what `--measure` needs: our own software, and a small job where no size was said.

    Raises UserError where the run could not be had here.
    """
    mine = here(local_device("auto"))
    wanted = question.cluster_of(gpu, 1).gpu
    if question.goal != "train":
        raise UserError("--measure runs training steps; for serving there is none yet")
    if mine is None or mine.name != wanted.name:
        name = "of a kind that no profile describes" if mine is None else mine.name
        raise UserError(f"--measure: this machine's device is {name}, not {wanted.name}")
    if question.software not in (None, "whalepod"):
        raise UserError("--measure runs whalepod itself; leave --software out")
    if load_preset(question.model).status == "counts":
        raise UserError(f"--measure: {question.model} can be planned for but not trained yet")
    return replace(
        question,
        software="whalepod",
        precision=question.precision or "bf16",
        global_batch=question.global_batch or GLOBAL_BATCH,
        sequence_length=question.sequence_length or SEQUENCE_LENGTH,
    )


def counts_here(gpu: Gpu, wanted: Sequence[int] | None = None) -> list[int]:
    """`wanted`, else 1, 2, 4, ... and all of this machine's devices. Raises UserError for more."""
    most = torch.cuda.device_count() if gpu.architecture != "cpu" else gpu.gpus_per_node
    if wanted and max(wanted) > most:
        raise UserError(f"--measure: this machine has {most} devices, --counts asks for {max(wanted)}")
    return list(wanted or sorted({*(2**i for i in range(most.bit_length())), most}))


def measure(question: Question, doc: dict[str, Any], progress: Progress | None = None) -> None:
    """Runs every point of the answer that fits; adds `measured_tokens_per_s` and `measured_speedup` to all
    points, and how well they agree to the advice."""
    fitting = [point for point in doc["points"] if point["fits"]]
    for point in doc["points"]:
        point |= {"measured_tokens_per_s": None, "measured_speedup": None}
    for done, point in enumerate(fitting):
        count = point["num_gpus"]
        if point["step_s"] > MAX_STEP_S:
            raise UserError(
                f"--measure: a step on {count} would take {point['step_s']:,.0f} s; give a smaller "
                "--global-batch or --sequence-length"
            )
        if progress is not None:
            progress("measuring", done, len(fitting))
        point["measured_tokens_per_s"] = _run(question, doc, point)
    if progress is not None:
        progress("measuring", len(fitting), len(fitting))
    for point in fitting:
        point["measured_speedup"] = point["measured_tokens_per_s"] / fitting[0]["measured_tokens_per_s"]
    if fitting:
        doc["advice"].append(agreement(fitting))


def _run(question: Question, doc: dict[str, Any], point: dict[str, Any]) -> float:
    """Tokens per second of a few steps."""
    with tempfile.TemporaryDirectory() as folder:
        config = make_run(
            {
                "model": question.run_model,
                "layout": point["layout"],
                "data": {"sequence_length": doc["sequence_length"]},
                "train": {"steps": STEPS, "evaluate_every": 0, "checkpoint_every": 0},
                "threads_per_worker": None if torch.cuda.is_available() else 1,
                "out": str(Path(folder) / "run"),
            }
        )
        return train(config, quiet=True).tokens_per_s


def agreement(points: list[dict[str, Any]]) -> str:
    """One line: predicted speed over measured at each count, and both speed-ups at the last."""
    parts = [f"x{p['tokens_per_s'] / p['measured_tokens_per_s']:.2f} on {p['num_gpus']}" for p in points]
    line = f"measured here: the predicted tokens/s are {', '.join(parts)} what was measured"
    if len(points) > 1:
        last = points[-1]
        line += (
            f"; {last['num_gpus']} bring x{last['measured_speedup']:.2f}, predicted x{last['speedup']:.2f}"
        )
    return line
