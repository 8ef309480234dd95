"""The formulas' FLOPs held against the dry run's, models at true size: equal but for what is done besides."""

from __future__ import annotations

from typing import Any

import pytest

from whalepod.dryrun.role import measure
from whalepod.spec.counts import train_flops
from whalepod.spec.model import MLA
from whalepod.spec.run import make_run

LENGTH = 4096
ROW_PADDING = 0.04
"""Grouped products compute rows that fill an expert's share to their kernel's step."""


@pytest.mark.parametrize(
    ("model", "axes"),
    [
        ("deepseek-v2-lite", {"dp_shard": 8, "ep": 8}),
        ("deepseek-v2-lite", {"dp_shard": 8, "ep": 16, "tp": 2}),
        ("deepseek-v2", {"dp_shard": 32, "ep": 32}),
        ("deepseek-v3", {"dp_shard": 64, "ep": 64}),
    ],
    ids=str,
)
def test_flops_of_a_step(model: str, axes: dict[str, Any]) -> None:
    layout = {**axes, "precision": "bf16", "micro_batch": 1, "global_batch": axes["dp_shard"]}
    job = make_run({"model": model, "layout": layout, "data": {"sequence_length": LENGTH}})
    spec = job.model_spec()
    counted = measure(job, spec, 0).counts.flops
    shares = job.make_layout().tp  # of a sequence's work, ranks that share it
    found = {kind: shares * flops / LENGTH for kind, flops in counted.items()}
    expected = train_flops(spec, LENGTH, causal=True, mtp=True)
    a = spec.attention
    assert isinstance(a, MLA)
    # Behind plain queries, which gather the input, every tensor-parallel rank makes all latents.
    latents = 6 * spec.num_hidden_layers * spec.hidden_size * a.latent_dim
    again = (shares - 1) * latents if a.q_lora_rank is None else 0
    assert found["attention"] == pytest.approx(expected.attn_proj + again, rel=1e-9)
    assert found["dense"] == pytest.approx(expected.dense_mlp, rel=1e-9)
    assert found["router"] == pytest.approx(expected.router, rel=1e-9)
    assert found["shared experts"] == pytest.approx(expected.shared_experts, rel=1e-9)
    assert found["head"] == pytest.approx(expected.head, rel=1e-9)
    assert found.get("mtp", 0) == pytest.approx(expected.mtp_proj, rel=1e-9)
    # Values are as wide as keys to the kernel, and its backward pass makes the scores again.
    more = 2 * a.qk_head_dim / (a.qk_head_dim + a.v_head_dim) * 3.5 / 3
    assert found["attention core"] == pytest.approx(more * expected.attn_scores, rel=1e-3)
    assert 1 <= found["experts"] / expected.routed_experts <= 1 + ROW_PADDING
