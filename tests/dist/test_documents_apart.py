"""The mask between packed documents under layouts: the step of one device, in float32."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
import parity
from harness import run_ranks

from whalepod.parallel.mesh import make_mesh, open_world
from whalepod.spec.layout import Layout

LAYOUTS: list[dict[str, Any]] = [
    {"dp_shard": 2},
    {"tp": 2},
    {"cp": 2},
    {"dp_shard": 2, "ep": 2, "recompute": "selective"},
    {"pp": 2},
    {"pp": 2, "schedule": "zbv", "recompute": "full"},
]
SEPARATOR = 7


def run_rank() -> list[tuple[parity.Row, float]]:
    device, spec = torch.device("cpu"), parity.models()["V3-like"]
    spec = spec.with_(vocab_size=16)  # separators in every sequence
    layout = Layout(micro_batch=1, global_batch=parity.BATCH, precision="fp32")
    alone = parity.step(spec, make_mesh(layout, device), SEPARATOR)
    open_loss = parity.step(spec, make_mesh(layout, device)).losses[0]
    rows, groups = [], {}
    with open_world(device):
        for axes in LAYOUTS:
            ours = parity.step(spec, make_mesh(replace(layout, **axes), device, groups), SEPARATOR)
            rows.append((parity.compare("V3-like", axes, ours, alone), float(alone.losses[0] - open_loss)))
    return rows


def test_every_layout_masks_alike() -> None:
    for rank in run_ranks(run_rank, 2, timeout_s=300):
        assert len(rank) == len(LAYOUTS)
        for row, changed in rank:
            assert row.passed, row
            assert abs(changed) > 1e-6  # the mask does something
