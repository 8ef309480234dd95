"""The native code gives what the modules give; steps by it write what the model alone writes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from whalepod.models.moe import GroupedExperts, Rows
from whalepod.models.transformer import Transformer, init_weights
from whalepod.parallel.inference import whole
from whalepod.parallel.mesh import make_mesh
from whalepod.serve import native
from whalepod.serve.core import CoreConfig
from whalepod.serve.fleet import Fleet
from whalepod.serve.paged import multiplies_bf16
from whalepod.serve.request import Request
from whalepod.spec.layout import Layout
from whalepod.spec.presets import load_model_spec

pytestmark = pytest.mark.skipif(native.library() is None, reason="nothing can be compiled here")
SMALL = {
    "num_hidden_layers": 3, "hidden_size": 104, "intermediate_size": 72, "vocab_size": 64,
    "initializer_range": 0.1,
}  # fmt: skip
EXPERTS = {"moe_intermediate_size": 40, "n_routed_experts": 8, "num_experts_per_tok": 3}
SPECS = {
    "v3": SMALL | EXPERTS | {"n_group": 4, "topk_group": 2, "topk_method": "noaux_tc"},
    "no groups": SMALL | EXPERTS | {"n_group": 1, "topk_group": 1, "norm_topk_prob": False},
    "softmax, one query matrix": SMALL | EXPERTS | {
        "num_attention_heads": 5, "kv_lora_rank": 40, "qk_rope_head_dim": 8, "qk_nope_head_dim": 20,
        "v_head_dim": 12, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 3,
        "routed_scaling_factor": 1.7, "n_shared_experts": 2,
    },
}  # fmt: skip


def model_of(name: str = "v3", dtype: torch.dtype = torch.float32) -> Transformer:
    preset = "deepseek-v2-lite" if "softmax" in name else "v3-mini"
    model = Transformer(load_model_spec(preset).with_(**SPECS[name]))
    init_weights(model, 0)
    for module in model.modules():
        if getattr(module, "e_score_correction_bias", None) is not None:
            module.e_score_correction_bias.normal_(0, 0.1)  # type: ignore[union-attr]
    return model.to(dtype).eval().requires_grad_(False)


def written(model: Transformer, speculate: bool = False, **config: int) -> list[list[int]]:
    prompts = [tuple((7 * i + 3 * j) % 64 for j in range(5 + 20 * i)) for i in range(5)]
    mesh = make_mesh(Layout(), torch.device("cpu"))
    fleet = Fleet(whole(model, mesh), CoreConfig(num_pages=60, speculate=speculate, **config))
    jobs = [fleet.add(Request(prompt, 24)) for prompt in prompts]
    while not fleet.is_idle:
        fleet.step()
    return [job.sequence.tokens[job.sequence.num_prompt :] for job in jobs]


def near(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> bool:
    return float((a.float() - b.float()).norm() / b.float().norm()) < (
        2**-7 if dtype == torch.bfloat16 else 1e-5
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2, 7, 33, 300])
def test_linear(rows: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for sizes, bias in [((96, 160), False), ((101, 67), True)]:
        layer = nn.Linear(*sizes, bias=bias).to(dtype).requires_grad_(False)
        x = torch.randn(2, rows, sizes[0]).to(dtype)
        expected = F.linear(
            x.float(), layer.weight.float(), None if layer.bias is None else layer.bias.float()
        )
        native.use(layer)
        assert isinstance(layer, native.NativeLinear)
        assert near(layer(x), expected, dtype)
        assert layer(x[:, :0]).shape == (2, 0, sizes[1])
        if not multiplies_bf16():
            assert torch.equal(layer(x[:, :1]), layer(x)[:, :1])  # whatever else is in the batch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_with_idle_ones_and_rows_behind_the_last(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    spec = load_model_spec("v3-mini").with_(**SPECS["v3"] | {"hidden_size": 128, "moe_intermediate_size": 64})
    experts = GroupedExperts(spec)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.1)
    experts.to(dtype).requires_grad_(False)
    ends = torch.tensor([3, 0, 1, 0, 0, 9, 2, 0]).cumsum(0).to(torch.int32)
    rows = Rows(torch.randn(18, 128).to(dtype), torch.rand(18), ends)
    expected = experts(rows)[:15]
    native.use(experts)
    assert isinstance(experts, native.NativeExperts)
    assert near(experts(rows)[:15], expected, dtype)
    assert torch.equal(experts(rows)[15:], torch.zeros(3, 128, dtype=dtype))
    # Fewer rows than experts, and none at all, are no reason to widen every weight.
    monkeypatch.delattr(GroupedExperts, "forward")
    few = Rows(rows.x_ND[:2], rows.weights_N[:2], ends.clamp(max=2))
    assert near(experts(few), expected[:2], dtype)
    none = Rows(rows.x_ND[:0], rows.weights_N[:0], torch.zeros_like(ends))
    assert experts(none).shape == (0, 128)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("speculate", [False, True])
def test_writes_the_same_in_fp32(name: str, speculate: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, steps = model_of(name), []
    model = copy.deepcopy(plain)
    native.use(model)
    decoder = native.Decoder.__call__
    monkeypatch.setattr(native.Decoder, "__call__", lambda *args: (steps.append(1), decoder(*args)))
    expected = written(plain)
    assert not steps
    for config in ({}, {"page_size": 4}, {"max_running": 1}, {"page_size": 8, "max_step_tokens": 7}):
        steps.clear()
        assert written(model, speculate, **config) == expected
        assert len(steps) > 8


def test_steps_in_bf16() -> None:
    """Hidden states of every step, by the modules and again natively over the same cache."""
    plain, errors = model_of(dtype=torch.bfloat16), []
    model = copy.deepcopy(plain)
    native.use(model)

    def both(x: torch.Tensor, *rest: Any) -> torch.Tensor:
        expected = Transformer._blocks(plain, x, *rest).float()
        found = model._blocks(x, *rest).float()
        errors.append(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).flatten())
        return found.to(torch.bfloat16)

    plain._blocks = both  # type: ignore[method-assign, assignment]
    written(plain)
    # Of most tokens: a router with a close tie may pick another expert.
    assert len(errors) > 20
    assert max(float(each.median()) for each in errors) < 2**-6
