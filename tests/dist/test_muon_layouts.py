"""Muon under layouts: cut matrices are made orthogonal as wholes, so weights move as on one device."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import parity
from harness import run_ranks

from whalepod.parallel.mesh import Mesh, make_mesh, open_world
from whalepod.parallel.parallelize import seeded
from whalepod.spec.run import RunConfig, make_run
from whalepod.train.step import TrainStep

LAYOUTS: dict[int, list[dict[str, Any]]] = {
    2: [
        {"dp_replicate": 2},
        {"dp_shard": 2},
        {"dp_shard": 2, "zero": 1},
        {"tp": 2},
        {"dp_shard": 2, "ep": 2},
        {"tp": 2, "ep": 2},
        {"pp": 2},
        {"cp": 2},
    ],
    4: [
        {"dp_shard": 2, "tp": 2},
        {"dp_replicate": 2, "tp": 2},
        {"dp_shard": 4, "ep": 2},
        {"pp": 2, "dp_shard": 2, "schedule": "zbv"},
    ],
}


def weights(config: RunConfig, mesh: Mesh) -> dict[str, Any]:
    spec = parity.models()["V3-like"]
    work = TrainStep(config, spec, mesh, seeded(spec, parity.SEED))
    generator = torch.Generator().manual_seed(1)
    shape = parity.BATCH, parity.LENGTH + 1 + spec.num_nextn_predict_layers
    rows = torch.randint(0, spec.vocab_size, shape, generator=generator)
    mine = rows.chunk(mesh["dp"].size)[mesh["dp"].rank]
    for _ in range(2):
        work.step(mine, 1e-3)
    return work.state.weights()


def config_of(**axes: Any) -> RunConfig:
    layout = {"micro_batch": 1, "global_batch": parity.BATCH, "precision": "fp32"} | axes
    values = {"layout": layout, "optimizer": {"name": "muon"}, "data": {"sequence_length": parity.LENGTH}}
    return make_run(values)


def run_rank(num_ranks: int) -> list[float]:
    """Of each layout, the largest difference of a weight over how far the farthest moved."""
    device = torch.device("cpu")
    alone = weights(config_of(), make_mesh(config_of().make_layout(), device))
    spec = parity.models()["V3-like"]
    start = seeded(spec, parity.SEED)
    far = max(float((p.tensor - start(n, p.box)).abs().max()) for n, p in alone.items())
    found, groups = [], {}
    with open_world(device):
        for axes in LAYOUTS[num_ranks]:
            config = config_of(**axes)
            ours = weights(config, make_mesh(config.make_layout(), device, groups))
            errors = [
                float((p.tensor - alone[n].tensor[p.box.slices]).abs().max())
                for n, p in ours.items()
                if p.tensor.numel()
            ]
            found.append(max(errors) / far)
    return found


@pytest.mark.parametrize("num_ranks", LAYOUTS)
def test_weights_move_as_on_one_device(num_ranks: int) -> None:
    for rank in run_ranks(run_rank, num_ranks, num_ranks, timeout_s=400):
        for axes, error in zip(LAYOUTS[num_ranks], rank, strict=True):
            assert error < 2e-3, (parity.label(axes), error)
