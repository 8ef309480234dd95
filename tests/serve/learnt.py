"""A small model that learnt its corpus, and what to ask it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from whalepod.parallel.export import export
from whalepod.spec.run import make_run
from whalepod.train.start import train

PROMPTS = ("def function_1_1(", "class ", "return value", "def function_3_7(value, other=7):\n    return")


def learn(folder: Path, corpus: Path, model: dict[str, Any]) -> Path:
    """`run`, a run's folder, and `hf`, its model as Hugging Face has them, below `folder`."""
    values: dict[str, Any] = {
        "model": model,
        "layout": {"micro_batch": 2, "global_batch": 4, "precision": "fp32"},
        "data": {"source": str(corpus), "sequence_length": 32},
        "optimizer": {"learning_rate": 1e-2},
        "train": {"steps": 30, "evaluate_every": 0, "checkpoint_every": 0},
        "device": "cpu",
        "out": str(folder / "run"),
    }
    train(make_run(values), quiet=True)
    export(folder / "run", folder / "hf", "fp32")
    return folder
