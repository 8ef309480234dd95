"""Mixture of experts: routing, dispatch and the grouped products against plain definitions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import randomise, relative, spec_of, v2, v3
from torch import Tensor

from whalepod.models.moe import (
    GroupedExperts,
    GroupPlan,
    LocalDispatcher,
    MoELayer,
    Router,
    Rows,
    _Collect,
    _Spread,
    group_alignment,
    sequence_balance_loss,
)
from whalepod.spec.model import ModelSpec, MoE, from_config

D, WIDTH = 16, 24
# The same examples in every run: a near tie between experts, which rounding may settle either way,
# is rare enough to miss but not impossible.
quick = settings(max_examples=100, deadline=None, derandomize=True)


class Picks(NamedTuple):
    """Tokens, their experts and weights, of a random layer."""

    x_TD: Tensor
    ids_TK: Tensor
    weights_TK: Tensor
    num_experts: int


def spec_with(num_experts: int) -> ModelSpec:
    config = v3(
        hidden_size=D, n_routed_experts=num_experts, num_experts_per_tok=1, n_group=1, topk_group=1
    ).to_dict()
    return from_config(config | {"moe_intermediate_size": WIDTH}, "experts")


def make_picks(seed: int, tokens: int, num_experts: int, k: int, reachable: int) -> Picks:
    """Every token picks k of the first `reachable` experts."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(tokens, reachable, generator=generator).topk(k).indices
    weights = torch.rand(tokens, k, generator=generator) + 0.1
    return Picks(torch.randn(tokens, D, generator=generator), ids, weights, num_experts)


@st.composite
def picks(draw: st.DrawFn) -> Picks:
    """From one token to enough for padding rows; few or many experts, some of them never picked."""
    num_experts = draw(st.integers(1, 9))
    reachable = draw(st.integers(1, num_experts))
    k = draw(st.integers(1, reachable))
    tokens = draw(st.one_of(st.integers(1, 12), st.integers(13, 200)))
    return make_picks(draw(st.integers(0, 2**31)), tokens, num_experts, k, reachable)


def groups(rows: Rows) -> Iterator[tuple[int, slice]]:
    start = 0
    for expert, end in enumerate(rows.ends_E.tolist()):
        yield expert, slice(start, end)
        start = end


def test_the_cases_include_padding_rows() -> None:
    case = make_picks(0, 160, 4, 2, 4)
    assert group_alignment(case.ids_TK.numel(), 4) > 1
    rows, plan = LocalDispatcher().dispatch(*case)
    assert rows.ends_E[-1] > plan.row_TK.numel()


@given(picks())
@quick
def test_dispatch(case: Picks) -> None:
    x, ids, weights, num_experts = case
    rows, plan = LocalDispatcher().dispatch(*case)
    # Every pick has one row of its own, within its expert's group, holding its token and weight.
    assert plan.row_TK.unique().numel() == ids.numel()
    bounds = dict(groups(rows))
    for token, (experts, positions) in enumerate(zip(ids.tolist(), plan.row_TK.tolist(), strict=True)):
        for pick, (expert, row) in enumerate(zip(experts, positions, strict=True)):
            assert bounds[expert].start <= row < bounds[expert].stop
            assert torch.equal(rows.x_ND[row], x[token])
            assert rows.weights_N[row] == weights[token, pick]
            assert plan.token_N[row] == token
    # Groups follow each other, each as long as its picks need and no longer.
    alignment = group_alignment(ids.numel(), num_experts)
    counts = torch.bincount(ids.flatten(), minlength=num_experts)
    assert rows.ends_E.dtype == torch.int32
    assert rows.ends_E.numel() == num_experts
    for expert, group in groups(rows):
        assert group.stop % alignment == 0
        assert 0 <= group.stop - group.start - counts[expert] < alignment
    assert rows.ends_E[-1] <= len(rows.x_ND)
    # Shapes depend on shapes alone.
    assert len(rows.x_ND) == len(rows.weights_N) == ids.numel() + num_experts * (alignment - 1)
    # All other rows weigh nothing and hold a finite copy of some token.
    padding = torch.ones(len(rows.x_ND), dtype=torch.bool)
    padding[plan.row_TK.flatten()] = False
    assert not rows.weights_N[padding].any()
    assert rows.x_ND.isfinite().all()


@given(picks())
@quick
def test_combine_undoes_dispatch(case: Picks) -> None:
    """Experts that only weigh their rows: every token gets the sum of its weights times itself."""
    dispatcher = LocalDispatcher()
    rows, plan = dispatcher.dispatch(*case)
    out = dispatcher.combine(rows.x_ND * rows.weights_N[:, None], plan)
    torch.testing.assert_close(out, case.x_TD * case.weights_TK.sum(1, keepdim=True))


@given(st.integers(1, 10**9), st.integers(1, 512))
@quick
def test_group_alignment_bounds(num_picks: int, num_experts: int) -> None:
    alignment = group_alignment(num_picks, num_experts)
    assert alignment in (1, 2, 4, 8, 16, 32, 64)
    mean = num_picks / num_experts
    assert alignment == 1 or alignment <= mean / 8
    assert alignment == 64 or mean < 16 * alignment  # no smaller than it needs to be
    assert num_experts * (alignment - 1) <= num_picks / 8


def loop_over_experts(case: Picks, gate_up: Tensor, down: Tensor) -> Tensor:
    """The definition: each token, each of its experts."""
    out = []
    for x, experts, weights in zip(case.x_TD, case.ids_TK.tolist(), case.weights_TK, strict=True):
        total = torch.zeros_like(x)
        for expert, weight in zip(experts, weights, strict=True):
            gate, up = gate_up[expert]
            total = total + weight.to(x.dtype) * (down[expert] @ (F.silu(gate @ x) * (up @ x)))
        out.append(total)
    return torch.stack(out)


def check_experts(case: Picks, dtype: torch.dtype, tolerance: float) -> None:
    """Output and every gradient, against the loop in float32."""
    layer = GroupedExperts(spec_with(case.num_experts))
    randomise(layer, seed=1)
    grad = torch.randn(case.x_TD.shape, generator=torch.Generator().manual_seed(2))
    layer = layer.to(dtype)
    x = case.x_TD.to(dtype, copy=True).requires_grad_()
    weights = case.weights_TK.clone().requires_grad_()
    dispatcher = LocalDispatcher()
    rows, plan = dispatcher.dispatch(x, case.ids_TK, weights, case.num_experts)
    out = dispatcher.combine(layer(rows), plan)
    assert out.dtype == dtype
    out.backward(grad.to(dtype))

    leaves = [t.detach().float().requires_grad_() for t in (x, weights, layer.gate_up, layer.down)]
    plain = Picks(leaves[0], case.ids_TK, leaves[1], case.num_experts)
    expected = loop_over_experts(plain, leaves[2], leaves[3])
    expected.backward(grad.to(dtype).float())
    assert relative(out.float(), expected) < tolerance
    named = {"x": x, "weights": weights, "gate_up": layer.gate_up, "down": layer.down}
    for (name, ours), leaf in zip(named.items(), leaves, strict=True):
        assert ours.grad is not None
        assert leaf.grad is not None
        assert ours.grad.isfinite().all(), name
        assert relative(ours.grad.float(), leaf.grad) < tolerance, name
    idle = torch.bincount(case.ids_TK.flatten(), minlength=case.num_experts) == 0
    assert layer.gate_up.grad is not None
    assert not layer.gate_up.grad[idle].any()


@given(picks())
@quick
def test_grouped_experts_equal_a_loop(case: Picks) -> None:
    check_experts(case, torch.float32, 1e-5)


CORNERS = {
    "one-token": make_picks(1, 1, 8, 3, 8),
    "empty-experts": make_picks(2, 20, 8, 2, 3),
    "all-on-one": make_picks(3, 150, 8, 1, 1),
    "one-expert": make_picks(4, 40, 1, 1, 1),
    "padded": make_picks(5, 200, 4, 2, 4),
}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)], ids=str)
@pytest.mark.parametrize("corner", CORNERS)
def test_grouped_experts_in_corner_cases(corner: str, dtype: torch.dtype, tolerance: float) -> None:
    check_experts(CORNERS[corner], dtype, tolerance)


@given(picks())
@quick
def test_spread_and_collect_are_each_others_transpose(case: Picks) -> None:
    """Against autograd's own index_select, where rows of weight 0 get no gradient."""
    _, plan = LocalDispatcher().dispatch(*case)
    assert isinstance(plan, GroupPlan)
    generator = torch.Generator().manual_seed(3)
    real = torch.zeros(len(plan.token_N), 1).index_fill_(0, plan.row_TK.flatten(), 1.0)
    x = case.x_TD.double().requires_grad_()
    y = torch.randn(len(plan.token_N), D, dtype=torch.float64, generator=generator, requires_grad=True)
    grad_rows = torch.randn(y.shape, dtype=torch.float64, generator=generator) * real
    grad_tokens = torch.randn(x.shape, dtype=torch.float64, generator=generator)

    spread = _Spread.apply(x, *plan)
    plain_spread = x.index_select(0, plan.token_N)
    assert torch.equal(spread, plain_spread)
    ours, expected = (torch.autograd.grad(out, x, grad_rows)[0] for out in (spread, plain_spread))
    torch.testing.assert_close(ours, expected)

    collected = _Collect.apply(y, *plan)
    plain_collected = y.index_select(0, plan.row_TK.flatten()).view(*plan.row_TK.shape, D).sum(1)
    torch.testing.assert_close(collected, plain_collected)
    ours, expected = (torch.autograd.grad(out, y, grad_tokens)[0] for out in (collected, plain_collected))
    torch.testing.assert_close(ours * real, expected)


@st.composite
def routings(draw: st.DrawFn) -> tuple[Router, Tensor]:
    """A router of any method over any grouping, and tokens [B, S, D]."""
    method = draw(st.sampled_from(["greedy", "group_limited_greedy", "noaux_tc"]))
    n_group = draw(st.sampled_from([1, 2, 4]))
    per_group = draw(st.integers(2, 5))
    topk_group = draw(st.integers(1, n_group))
    config: dict[str, Any] = {
        "n_routed_experts": n_group * per_group,
        "n_group": n_group,
        "topk_group": topk_group,
        "num_experts_per_tok": draw(st.integers(1, topk_group * per_group)),
        "topk_method": method,
        "scoring_func": draw(st.sampled_from(["softmax", "sigmoid"])),
        "norm_topk_prob": draw(st.booleans()),
        "routed_scaling_factor": draw(st.sampled_from([1.0, 2.5, 16.0])),
    }
    router = Router(from_config(v2().to_dict() | config | {"hidden_size": D}, "router"))
    seed = draw(st.integers(0, 2**31))
    randomise(router, seed)
    batch, length = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    return router, torch.randn(batch, length, D, generator=torch.Generator().manual_seed(seed + 1))


def scores_of(router: Router, x_BSD: Tensor) -> Tensor:
    logits = x_BSD.flatten(0, 1) @ router.weight.T
    return logits.softmax(-1) if router.config.scoring_func == "softmax" else logits.sigmoid()


def defined_choice(scores: list[float], bias: list[float], m: MoE) -> set[int]:
    """Experts ranked by score plus bias, within the groups whose best (one or two) rank highest."""
    choice = [s + b for s, b in zip(scores, bias, strict=True)]
    size = len(choice) // m.n_group
    allowed = set(range(len(choice)))
    if m.topk_method != "greedy":
        count = 2 if m.topk_method == "noaux_tc" else 1
        of_group = [sum(sorted(choice[g * size : (g + 1) * size])[-count:]) for g in range(m.n_group)]
        kept = sorted(range(m.n_group), key=lambda g: -of_group[g])[: m.topk_group]
        allowed = {e for e in allowed if e // size in kept}
    return set(sorted(allowed, key=lambda e: -choice[e])[: m.num_experts_per_tok])


@given(routings())
@quick
def test_routing_equals_its_definition(case: tuple[Router, Tensor]) -> None:
    router, x = case
    m = router.config
    ids, weights = router.eval()(x)
    assert weights.dtype == torch.float32
    scores = scores_of(router, x)
    bias = router.e_score_correction_bias
    assert (bias is not None) == (m.topk_method == "noaux_tc")
    offsets = [0.0] * m.n_routed_experts if bias is None else bias.tolist()
    for t, row in enumerate(scores.tolist()):
        picked = ids[t].tolist()
        assert len(set(picked)) == m.num_experts_per_tok
        assert set(picked) == defined_choice(row, offsets, m)
        total = sum(row[e] for e in picked) if m.norm_topk_prob else 1.0
        expected = [m.routed_scaling_factor * row[e] / total for e in picked]
        assert weights[t].tolist() == pytest.approx(expected, rel=1e-4)


@given(routings())
@quick
def test_tokens_reach_no_more_groups_than_allowed(case: tuple[Router, Tensor]) -> None:
    router, x = case
    m = router.config
    ids, _ = router(x)
    reached = [len({e * m.n_group // m.n_routed_experts for e in row}) for row in ids.tolist()]
    if m.topk_method != "greedy":
        assert max(reached) <= m.topk_group


def v3_router(**changes: Any) -> tuple[Router, Tensor]:
    router = Router(spec_of(v3(**changes)))
    randomise(router, seed=30)
    x = torch.randn(2, 15, router.weight.shape[1], generator=torch.Generator().manual_seed(31))
    return router, x


def test_selection_bias_changes_the_choice_and_not_the_weights() -> None:
    router, x = v3_router(n_group=1, topk_group=1, norm_topk_prob=False)
    bias = router.e_score_correction_bias
    assert bias is not None
    bias.zero_()
    plain, _ = router(x)
    bias[5] = 10.0
    pulled, weights = router(x)
    assert (plain == 5).any(1).float().mean() < 1  # not everyone picked it before
    assert (pulled == 5).any(1).all()
    scores = scores_of(router, x)
    torch.testing.assert_close(weights, scores.gather(1, pulled) * router.config.routed_scaling_factor)
    bias[5] = -10.0
    assert not (router(x)[0] == 5).any()


def test_equal_bias_changes_nothing() -> None:
    router, x = v3_router()
    bias = router.e_score_correction_bias
    assert bias is not None
    before = router(x)
    bias += 0.25
    after = router(x)
    assert torch.equal(before[0].sort().values, after[0].sort().values)


def test_bias_is_a_buffer_without_gradient() -> None:
    router, _ = v3_router()
    assert [name for name, _ in router.named_parameters()] == ["weight"]
    assert set(router.state_dict()) == {"weight", "e_score_correction_bias"}  # load is not saved


@given(routings(), st.integers(1, 3))
@quick
def test_load_counts_picks_in_training_only(case: tuple[Router, Tensor], passes: int) -> None:
    router, x = case
    router.eval()(x)
    assert not router.load.any()
    router.train()
    expected = torch.zeros(router.config.n_routed_experts)
    for _ in range(passes):
        ids, _ = router(x)
        expected += torch.bincount(ids.flatten(), minlength=len(expected))
    assert torch.equal(router.load, expected)
    assert router.load.sum() == passes * ids.numel()


@pytest.mark.parametrize("config", [v3(), v2()], ids=["v3", "v2"])
def test_balance_loss_joins_the_gradient(config: Any) -> None:
    """As if it had been added to the loss, and the forward pass does not notice it."""
    router = Router(spec_of(config))
    randomise(router, seed=32)
    router.train()
    generator = torch.Generator().manual_seed(33)
    x = torch.randn(3, 10, router.weight.shape[1], generator=generator, requires_grad=True)
    pull = torch.randn(30, router.config.num_experts_per_tok, generator=generator)

    def gradients(loss: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, (x, router.weight))

    ids, weights = router(x)
    without = gradients((weights * pull).sum())
    scores = scores_of(router, x).unflatten(0, (3, 10))
    counted = scores.flatten(0, 1).topk(ids.shape[1]).indices if router.config.selection_bias else ids
    added = gradients(2.0 * sequence_balance_loss(scores, counted))

    router.balance_weight = 2.0
    ids_again, weights_again = router(x)
    assert torch.equal(ids, ids_again)
    assert torch.equal(weights, weights_again)
    ours = gradients((weights_again * pull).sum())
    for grad, plain, more in zip(ours, without, added, strict=True):
        assert more.norm() > 1e-3 * plain.norm()
        assert relative(grad, plain + more) < 1e-5
        assert relative(grad - plain, more) < 1e-3
    router.eval()
    for quiet, plain in zip(gradients((router(x)[1] * pull).sum()), without, strict=True):
        torch.testing.assert_close(quiet, plain)


def test_balanced_routing_has_the_least_balance_loss() -> None:
    """Even loads and affinities give 1 per sequence; everything on K experts gives E / K."""
    even = torch.full((2, 8, 8), 0.5)
    ids = torch.arange(2 * 8 * 2).view(-1, 2) % 8
    assert float(sequence_balance_loss(even, ids)) == pytest.approx(2.0)
    collapsed = torch.zeros(2, 8, 8)
    collapsed[..., :2] = 0.5
    same = torch.tensor([[0, 1]]).repeat(16, 1)
    assert float(sequence_balance_loss(collapsed, same)) == pytest.approx(2 * 8 / 2)


@pytest.mark.parametrize("shared", [0, 1, 2])
def test_layer_is_routed_plus_shared_experts(shared: int) -> None:
    spec = from_config(v3().to_dict() | {"n_shared_experts": shared}, "layer")
    layer = MoELayer(spec)
    randomise(layer, seed=34)
    x = torch.randn(2, 9, spec.hidden_size, generator=torch.Generator().manual_seed(35))
    with torch.no_grad():
        ids, weights = layer.gate(x)
        case = Picks(x.flatten(0, 1), ids, weights, ids.shape[1])
        expected = loop_over_experts(case, layer.experts.gate_up, layer.experts.down).view_as(x)
        if shared:
            assert layer.shared_experts is not None
            assert layer.shared_experts.up_proj.weight.shape[0] == shared * 24
            expected = expected + layer.shared_experts(x)
        else:
            assert layer.shared_experts is None
        assert relative(layer(x), expected) < 1e-5


def test_unaligned_expert_widths_are_refused_in_one_line() -> None:
    from whalepod.models.transformer import Transformer
    from whalepod.spec.errors import UserError
    from whalepod.spec.presets import load_model_spec

    model = Transformer(load_model_spec("v3-mini").with_(moe_intermediate_size=44, num_hidden_layers=2))
    with pytest.raises(UserError, match=r"bfloat16 need sizes in multiples of 8 .*, not 44"):
        model.bfloat16()(torch.zeros(1, 4, dtype=torch.int64))
