"""Packed weights give what weights in their usual order give."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from whalepod.models.moe import GroupedExperts, Rows
from whalepod.models.transformer import Transformer, init_weights
from whalepod.parallel.inference import whole
from whalepod.parallel.mesh import make_mesh
from whalepod.serve.core import CoreConfig
from whalepod.serve.fleet import Fleet
from whalepod.serve.packed import PackedExperts, PackedLinear, pack, packs_here
from whalepod.serve.request import Request
from whalepod.spec.layout import Layout
from whalepod.spec.presets import load_model_spec

pytestmark = pytest.mark.skipif(not packs_here(), reason="this CPU has no BF16 products of its own")


def model_of() -> Transformer:
    spec = load_model_spec("v3-mini").with_(
        num_hidden_layers=3, hidden_size=128, intermediate_size=256, vocab_size=64, initializer_range=0.1,
        moe_intermediate_size=64, n_routed_experts=8, num_experts_per_tok=2,
    )  # fmt: skip
    model = Transformer(spec)
    init_weights(model, 0)
    return model.to(torch.bfloat16).eval().requires_grad_(False)


def near(a: torch.Tensor, b: torch.Tensor) -> bool:
    return float((a.float() - b.float()).norm() / b.float().norm()) < 2**-7


@pytest.mark.parametrize("rows", [1, 2, 7, 33, 300])
@pytest.mark.parametrize("bias", [False, True])
def test_linear(rows: int, bias: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(96, 160, bias=bias).to(torch.bfloat16).requires_grad_(False)
    x = torch.randn(2, rows, 96, dtype=torch.bfloat16)
    expected = F.linear(x.float(), layer.weight.float(), None if layer.bias is None else layer.bias.float())
    pack(layer)
    assert isinstance(layer, PackedLinear)
    assert layer.weight.is_meta
    assert layer.weight.shape == (160, 96)
    assert near(layer(x), expected)
    assert layer(x[:, :0]).shape == (2, 0, 160)


def test_experts_with_idle_ones_and_rows_behind_the_last() -> None:
    torch.manual_seed(0)
    experts = next(m for m in model_of().modules() if isinstance(m, GroupedExperts))
    counts = torch.tensor([3, 0, 1, 0, 0, 9, 2, 0])
    ends = counts.cumsum(0).to(torch.int32)
    x = torch.randn(18, 128, dtype=torch.bfloat16)
    weights = torch.rand(18)
    rows = Rows(x, weights, ends)
    expected = experts(rows)[:15]
    pack(experts)
    assert isinstance(experts, PackedExperts)
    assert near(experts(rows)[:15], expected)
    assert torch.equal(experts(rows)[15:], torch.zeros(3, 128, dtype=torch.bfloat16))


def test_the_engine_writes_the_same() -> None:
    prompts = [tuple((7 * i + 3 * j) % 64 for j in range(5 + 20 * i)) for i in range(4)]
    written = []
    for packs in (False, True):
        model = model_of()
        if packs:
            pack(model)
        fleet = Fleet(whole(model, make_mesh(Layout(), torch.device("cpu"))), CoreConfig(40, speculate=True))
        jobs = [fleet.add(Request(prompt, 12, logprobs=0)) for prompt in prompts]
        picked: list[list[float]] = [[] for _ in jobs]
        while not fleet.is_idle:
            for job in fleet.step():
                picked[jobs.index(job)] += [each.logprob or 0.0 for each in job.picked]
        written.append(
            ([job.sequence.tokens[len(p) : len(p) + 1] for job, p in zip(jobs, prompts, strict=True)], picked)
        )
    assert written[0][0] == written[1][0]
    for a, b in zip(written[0][1], written[1][1], strict=True):
        assert abs(a[0] - b[0]) < 0.1  # later tokens may differ: BF16 has close ties


def test_what_is_not_bf16_stays() -> None:
    layer = nn.Linear(8, 8)
    pack(layer)
    assert type(layer) is nn.Linear
