"""Adapters under layouts: the step of one device, every gradient; what is frozen has none and no master."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import parity
from harness import run_ranks

from whalepod.models.lora import is_adapter
from whalepod.parallel.mesh import make_mesh, open_world
from whalepod.spec.layout import Layout
from whalepod.spec.run import LoRAConfig

LAYOUTS: dict[int, list[dict[str, Any]]] = {
    2: [
        {"dp_replicate": 2},
        {"dp_shard": 2},
        {"dp_shard": 2, "zero": 1},
        {"cp": 2},
        {"tp": 2},
        {"tp": 2, "recompute": "selective"},
        {"tp": 2, "recompute": "full"},
        {"dp_shard": 2, "ep": 2, "recompute": "selective"},
        {"tp": 2, "ep": 2},
        {"pp": 2},
        {"pp": 2, "schedule": "interleaved_zero_bubble"},
        {"pp": 2, "schedule": "zbv", "recompute": "selective"},
        {"pp": 2, "schedule": "dualpipev"},
    ],
    4: [
        {"dp_shard": 2, "tp": 2},
        {"dp_replicate": 2, "dp_shard": 2, "ep": 2},
        {"dp_shard": 2, "pp": 2, "schedule": "zbv"},
        {"dp_shard": 4, "recompute": "selective"},  # more than an adapter of 3 has rows
    ],
}
MLA = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
LORA = {
    "V3-like": LoRAConfig(r=3, alpha=6, modules=(*MLA, "gate_proj", "up_proj", "down_proj")),
    "dense": LoRAConfig(r=3, alpha=6),
}


def run_rank(model: str) -> list[parity.Row]:
    device, spec = torch.device("cpu"), parity.models()[model]
    layout = Layout(micro_batch=1, global_batch=parity.BATCH, precision="fp32")
    alone = parity.step(spec, make_mesh(layout, device), lora=LORA[model])
    assert all(is_adapter(name) for name in alone.gradients)
    assert len(alone.gradients) == spec.num_hidden_layers * (8 if model == "V3-like" else 7) * 2
    rows, groups = [], {}
    with open_world(device):
        for axes in cases(int(os.environ["WORLD_SIZE"]), model):
            mesh = make_mesh(replace(layout, **axes), device, groups)
            mesh.layout.check_model(spec, parity.LENGTH)
            rows.append(parity.compare(model, axes, parity.step(spec, mesh, lora=LORA[model]), alone))
    return rows


def cases(num_ranks: int, model: str) -> list[dict[str, Any]]:
    return [axes for axes in LAYOUTS[num_ranks] if model == "V3-like" or axes.get("ep", 1) == 1]


@pytest.mark.parametrize(("num_ranks", "model"), [(2, "V3-like"), (4, "V3-like"), (2, "dense")])
def test_adapters_train_as_on_one_device(num_ranks: int, model: str) -> None:
    ranks = run_ranks(run_rank, num_ranks, model, timeout_s=600)
    for rank in ranks:
        assert len(rank) == len(cases(num_ranks, model))
        for row in rank:
            assert row.passed, row
