"""What one worker has no memory for, four train and generate, under the same limit for each of them.

The bench (`bench/pooled_memory.py`) at a smaller size, with the layouts that fit into a test.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
import pooled_memory  # pyright: ignore[reportMissingImports]

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="limits and reads /proc")]

LIMIT = int(0.5 * pooled_memory.GIB)
SPEC = pooled_memory.model(layers=8, experts=16, hidden=512, width=256)
JOB = pooled_memory.Job(SPEC, steps=2, limit_bytes=LIMIT)


def test_one_worker_runs_out_of_memory() -> None:
    needed = pooled_memory.num_parameters(SPEC) * pooled_memory.STATE_BYTES_PER_PARAM
    assert LIMIT < needed < 2 * LIMIT
    assert "can't allocate memory" in pooled_memory.run_arm(JOB, {}, 1)["error"]


@pytest.mark.parametrize("axes", [{"tp": 2, "dp_shard": 2}, {"pp": 4}], ids=["tp x fsdp", "pp"])
def test_four_workers_train_and_generate(axes: dict[str, Any]) -> None:
    row = pooled_memory.run_arm(JOB, axes, 4)
    assert row["losses"][1] < row["losses"][0]
    assert len(row["ids"]) == pooled_memory.NEW_TOKENS
    assert row["peak_gib"] < LIMIT / pooled_memory.GIB
