"""Bytes by formula against the program's own step: the dry run of one rank, counted exactly."""

from __future__ import annotations

import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "dist"))
import parity

from whalepod.dryrun.role import measure
from whalepod.planner.traffic import step_traffic
from whalepod.spec.layout import Layout
from whalepod.spec.run import RunConfig, make_run

TOLERANCE = 0.02
LENGTH = 32768  # tokens enough for drawn routing to come near its mean


def config(layout: Layout, optimizer: str) -> RunConfig:
    values = {f.name: getattr(layout, f.name) for f in fields(layout)}
    values["stage_layers"] = layout.stage_layers and list(layout.stage_layers)
    optimized = {"optimizer": {"name": optimizer}}
    return make_run({"layout": values, "data": {"sequence_length": LENGTH}, **optimized})


def check(model: str, axes: dict[str, Any], rank: int, optimizer: str = "adamw") -> None:
    spec = parity.models()[model]
    layout = Layout(**{"micro_batch": 1, "global_batch": 4 * axes.get("dp_shard", 1), **axes})
    spec = spec.with_(num_hidden_layers=8) if layout.stages_per_rank == 4 else spec
    layout.check_model(spec, LENGTH)
    counted = measure(config(layout, optimizer), spec, rank, on_gpu=False).counts.bytes
    found = step_traffic(spec, layout, LENGTH, rank, muon=optimizer == "muon")
    everything, case = sum(counted.values()), (model, axes, rank)
    assert {(axis, op) for axis in found for op in found[axis]} == {k for k, v in counted.items() if v}, case
    for axis, ops in found.items():
        expected = sum(size for (name, _), size in counted.items() if name == axis)
        assert sum(ops.values()) == pytest.approx(expected, rel=TOLERANCE), (axis, *case)
        for op, size in ops.items():
            if counted[axis, op] > 0.01 * everything:
                assert size == pytest.approx(counted[axis, op], rel=TOLERANCE), (axis, op, *case)


SOME = [
    {"dp_shard": 2, "tp": 2, "ep": 4, "recompute": "full", "exchange": "two_hop", "devices_per_node": 2},
    {"pp": 2, "cp": 2, "dp_shard": 2, "zero": 2},
    # Recomputed twice where the backward pass is split, and layers behind FSDP2 that are dropped and fetched.
    {"pp": 2, "tp": 2, "schedule": "zbv", "recompute": "full"},
    {"pp": 2, "dp_shard": 2, "schedule": "interleaved", "stages_per_rank": 4},
    {"dp_replicate": 2, "dp_shard": 5, "precision": "fp32"},  # which divides neither vocabulary nor experts
]


@pytest.mark.parametrize("axes", SOME, ids=parity.label)
def test_a_bit_of_everything(axes: dict[str, Any]) -> None:
    check("V3-like", axes, 1)


@pytest.mark.parametrize("axes", [{"tp": 2}, {"dp_shard": 2, "ep": 2}, SOME[-1]], ids=parity.label)
def test_what_muon_sums(axes: dict[str, Any]) -> None:
    check("V3-like", axes, 1, "muon")


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", parity.LAYOUTS)
def test_the_parity_layouts(num_ranks: int) -> None:
    for index, axes in enumerate(parity.LAYOUTS[num_ranks][::3]):
        check("V3-like", axes, index % num_ranks)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["V2-like", "dense"])
def test_other_models(model: str) -> None:
    for axes in parity.cases(4, model)[1::6]:
        check(model, axes | {"precision": "fp32", "micro_batch": 2, "global_batch": 16}, 3)
