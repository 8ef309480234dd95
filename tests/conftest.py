"""Shared by all tests: a small V3-like run on a text of its own, with nothing left outside tmp_path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from whalepod.spec.run import RunConfig, make_run

SMALL_MODEL = {
    "preset": "v3-mini",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "intermediate_size": 64,
    "moe_intermediate_size": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "vocab_size": 512,
}


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _own_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WHALEPOD_CACHE", str(cache))
    monkeypatch.setenv("WHALEPOD_HOME", str(cache / "home"))  # no profile of this machine's user


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 120 KB of Python-like text in files."""
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(24):
        lines = [
            f"def function_{i}_{j}(value, other={j}):\n    return value * {i} + other\n" for j in range(80)
        ]
        (folder / f"module_{i}.py").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="session")
def small_model() -> dict[str, Any]:
    return dict(SMALL_MODEL)


@pytest.fixture
def run_values(tmp_path: Path, corpus: Path) -> dict[str, Any]:
    """Values of a run.yaml that trains in a second; tests change what they are about."""
    return {
        "model": dict(SMALL_MODEL),
        "layout": {"micro_batch": 2, "global_batch": 4, "precision": "fp32"},
        "data": {"source": str(corpus), "sequence_length": 32, "validation_fraction": 0.1},
        "optimizer": {"learning_rate": 1e-2},
        "schedule": {"warmup_steps": 2},
        "loss": {"bias_update_speed": 0.01},
        "train": {"steps": 6, "evaluate_every": 3, "evaluate_sequences": 8, "checkpoint_every": 2},
        "device": "cpu",
        "threads_per_worker": 1,
        "out": str(tmp_path / "run"),
    }


@pytest.fixture
def run_config(run_values: dict[str, Any]) -> RunConfig:
    return make_run(run_values)
