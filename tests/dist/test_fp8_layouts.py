"""FP8 under layouts: the step of one device, but for what is summed or rounded in another order.

Widths are multiples of 128 on every rank, so that tiles along them and blocks are the same everywhere.
Data, expert and pipeline parallelism leave a micro-batch whole: only sums of BF16 differ. Where `tp` and `cp`
cut the sequence a weight gradient's tiles hold other tokens, and a token that stands between two experts may
change: the yardstick is then what FP8 itself changes, the same step in BF16.
"""

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

from whalepod.parallel.mesh import make_mesh, open_world
from whalepod.spec.layout import Layout
from whalepod.spec.model import ModelSpec
from whalepod.spec.presets import load_model_spec

LAYOUTS: list[dict[str, Any]] = [
    {"dp_replicate": 2},
    {"dp_shard": 2},
    {"dp_shard": 2, "zero": 1, "recompute": "full"},
    {"cp": 2},
    {"tp": 2},
    {"tp": 2, "recompute": "selective"},
    {"dp_shard": 2, "ep": 2},
    {"dp_shard": 2, "ep": 2, "recompute": "selective", "wire": "fp8"},
    {"tp": 2, "ep": 2},
    {"pp": 2},
    {"pp": 2, "schedule": "interleaved_zero_bubble"},
    {"pp": 2, "schedule": "zbv", "recompute": "selective"},
    {"pp": 2, "schedule": "dualpipev"},
]

CUTS: list[dict[str, Any]] = [{"cp": 2}, {"tp": 2}, {"tp": 2, "recompute": "selective"}]
"""Without experts too: a token that stands between two of them hides how near the rest is."""


def spec() -> ModelSpec:
    return load_model_spec("v3-mini").with_(
        num_hidden_layers=4,
        hidden_size=128,
        num_attention_heads=4,
        q_lora_rank=128,
        kv_lora_rank=96,
        qk_nope_head_dim=32,
        qk_rope_head_dim=32,
        v_head_dim=64,
        intermediate_size=256,
        moe_intermediate_size=256,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        vocab_size=256,
    )


def run_rank() -> dict[str, Any]:
    device = torch.device("cpu")
    one = Layout(micro_batch=4, global_batch=parity.BATCH, precision="fp8")
    alone = parity.step(spec(), make_mesh(one, device))
    high = parity.step(spec(), make_mesh(replace(one, precision="bf16"), device))
    rows: dict[str, Any] = {"bf16": parity.compare("V3-like", {}, high, alone)}
    dense = replace(spec(), moe=None)
    dense_alone = parity.step(dense, make_mesh(one, device))
    dense_high = parity.step(dense, make_mesh(replace(one, precision="bf16"), device))
    rows["dense, bf16"] = parity.compare("dense", {}, dense_high, dense_alone)
    groups: Any = {}
    with open_world(device):
        for axes in LAYOUTS:
            size = 2 if axes.get("pp") or axes.get("dp_replicate") or axes.get("dp_shard") else 4
            layout = replace(one, **axes, micro_batch=1 if axes.get("pp") else size)
            layout.check_model(spec(), parity.LENGTH)
            ours = parity.step(spec(), make_mesh(layout, device, groups))
            rows[parity.label(axes)] = parity.compare("V3-like", axes, ours, alone)
        for axes in CUTS:
            layout = replace(one, **axes)
            ours = parity.step(dense, make_mesh(layout, device, groups))
            rows["dense, " + parity.label(axes)] = parity.compare("dense", axes, ours, dense_alone)
    assert os.environ["WORLD_SIZE"] == "2"
    return rows


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return run_ranks(run_rank, 2, timeout_s=600)


@pytest.mark.parametrize("axes", LAYOUTS, ids=parity.label)
def test_fp8_is_the_same_under_every_layout(rows: list[dict[str, Any]], axes: dict[str, Any]) -> None:
    cuts = axes.keys() & {"tp", "cp", "wire"}
    for each in rows:
        row, rounding = each[parity.label(axes)], each["bf16"]
        # Where a token has gone to another expert (`load`), no more than FP8 itself changes.
        assert row.loss < (max(3e-4, rounding.loss) if cuts and row.load else 3e-4 if cuts else 1e-6)
        assert row.gradient < (rounding.gradient if cuts else 1e-2)
        assert row.norm < (rounding.norm if cuts else 1e-4)


@pytest.mark.parametrize("axes", CUTS, ids=parity.label)
def test_without_experts_cuts_change_less_than_fp8_does(
    rows: list[dict[str, Any]], axes: dict[str, Any]
) -> None:
    for each in rows:
        row, rounding = each["dense, " + parity.label(axes)], each["dense, bf16"]
        assert row.loss < 3e-4
        assert row.gradient < rounding.gradient
        assert row.norm < 3e-3


if __name__ == "__main__":
    for rank in run_ranks(run_rank, 2, timeout_s=600):
        for name, row in rank.items():
            print(f"{name:50} {row.loss:.1e} {row.gradient:.1e} {row.norm:.1e} {row.worst}")
