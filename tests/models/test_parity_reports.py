"""The model in float32 against the equations of the published reports, plainly in float64.

Nothing here calls whalepod's mathematics: attention is computed position by position and head by
head, rotation by complex numbers, experts one token at a time. Equation numbers are those of
DeepSeek-V2 (arXiv 2405.04434) and DeepSeek-V3 (arXiv 2412.19437); YaRN is arXiv 2309.00071.
"""

from __future__ import annotations

import cmath
import itertools
import math

import pytest
import torch
from oracle import CONFIGS, MLA_CONFIGS, YARN, logit_error, random_tokens, randomise, relative, spec_of
from torch import Tensor

from whalepod.models.attention import MLAttention
from whalepod.models.moe import MoELayer, Router, sequence_balance_loss
from whalepod.models.rope import inverse_frequencies, tables
from whalepod.models.transformer import Transformer
from whalepod.spec.model import MLA, ModelSpec, MoE, Rope

TOLERANCE = 3e-5
Weights = dict[str, Tensor]


def yarn_steps(rope: Rope, width: int) -> list[float]:
    """Angle per position of every pair: section 3.2 of YaRN, with DeepSeek's whole-pair bounds."""
    steps = []
    for pair in range(width // 2):
        step = rope.theta ** (-2 * pair / width)
        if rope.kind == "yarn":
            trained = rope.original_max_position_embeddings
            assert trained is not None

            def pair_with(turns: float, trained: int = trained) -> float:
                # theta^(2 d / width) = trained / (2 pi turns), solved for d.
                return width * math.log(trained / (2 * math.pi * turns)) / (2 * math.log(rope.theta))

            first = max(math.floor(pair_with(rope.beta_fast)), 0)
            last = min(math.ceil(pair_with(rope.beta_slow)), width - 1)
            stretched = min(max((pair - first) / (last - first), 0.0), 1.0)
            step = stretched * step / rope.factor + (1 - stretched) * step
        steps.append(step)
    return steps


def rotated(vector: Tensor, position: int, steps: list[float]) -> Tensor:
    """Neighbouring elements as complex numbers, each turned by its own angle."""
    out = []
    for pair, step in enumerate(steps):
        turned = complex(vector[2 * pair], vector[2 * pair + 1]) * cmath.exp(1j * position * step)
        out += [turned.real, turned.imag]
    return torch.tensor(out, dtype=torch.float64)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def attention(h: Tensor, w: Weights, spec: ModelSpec) -> Tensor:
    """V2, equations 37 to 47: one sequence [S, D]."""
    a, eps, rope = spec.attention, spec.rms_norm_eps, spec.rope
    assert isinstance(a, MLA)
    heads, length = spec.num_attention_heads, h.shape[0]
    steps = yarn_steps(rope, a.qk_rope_head_dim)
    # V2, section 3.1.4: sqrt(t) = 0.1 m ln s + 1; t scales the logits of a stretched model.
    temperature = 1.0
    if rope.kind == "yarn" and rope.mscale_all_dim:
        temperature = (0.1 * rope.mscale_all_dim * math.log(rope.factor) + 1) ** 2
    if a.q_lora_rank is None:
        q = h @ w["q_proj.weight"].T
    else:
        c_q = rms_norm(h @ w["q_a_proj.weight"].T, w["q_a_layernorm.weight"], eps)  # 37
        q = c_q @ w["q_b_proj.weight"].T  # 38 and the argument of 39, stacked
    q = q.view(length, heads, a.qk_head_dim)
    down = h @ w["kv_a_proj_with_mqa.weight"].T
    c_kv = rms_norm(down[:, : a.kv_lora_rank], w["kv_a_layernorm.weight"], eps)  # 41
    up = (c_kv @ w["kv_b_proj.weight"].T).view(length, heads, -1)  # 42 and 45
    k_rope = [rotated(down[t, a.kv_lora_rank :], t, steps) for t in range(length)]  # 43
    u = torch.empty(length, heads, a.v_head_dim, dtype=torch.float64)
    for head in range(heads):
        keys = [
            torch.cat((up[t, head, : a.qk_nope_head_dim], k_rope[t]))
            for t in range(length)  # 44
        ]
        values = up[:, head, a.qk_nope_head_dim :]
        for t in range(length):
            query = torch.cat(
                (q[t, head, : a.qk_nope_head_dim], rotated(q[t, head, a.qk_nope_head_dim :], t, steps))  # 40
            )
            scores = torch.stack([query @ keys[j] for j in range(t + 1)])
            share = (scores * temperature / math.sqrt(a.qk_head_dim)).softmax(0)  # 46
            u[t, head] = share @ values[: t + 1]
    return u.flatten(1) @ w["o_proj.weight"].T  # 47


def chosen_experts(scores: list[float], bias: list[float], m: MoE) -> list[int]:
    """V3, equations 13 to 16, and node-limited routing (V2, section 2.2.2; V3, section 2.1.2)."""
    biased = [s + b for s, b in zip(scores, bias, strict=True)]
    size = m.n_routed_experts // m.n_group
    best_of = 2 if m.topk_method == "noaux_tc" else 1

    def group_score(group: int) -> float:
        return sum(sorted(biased[group * size : (group + 1) * size], reverse=True)[:best_of])

    groups = sorted(range(m.n_group), key=group_score, reverse=True)
    kept = groups[: m.topk_group] if m.topk_method != "greedy" else groups
    within = [e for e in range(m.n_routed_experts) if e // size in kept]
    return sorted(within, key=lambda e: biased[e], reverse=True)[: m.num_experts_per_tok]


def affinities(u: Tensor, weight: Tensor, m: MoE) -> list[float]:
    """Equation 15 of V3 (sigmoid) or 22 of V2 (softmax)."""
    logits = (weight @ u).tolist()
    if m.scoring_func == "sigmoid":
        return [1 / (1 + math.exp(-x)) for x in logits]
    total = sum(math.exp(x) for x in logits)
    return [math.exp(x) / total for x in logits]


def routed(u: Tensor, w: Weights, m: MoE) -> dict[int, float]:
    """Experts of one token and their gates."""
    scores = affinities(u, w["gate.weight"], m)
    bias = w.get("gate.e_score_correction_bias")
    ids = chosen_experts(scores, bias.tolist() if bias is not None else [0.0] * len(scores), m)
    total = sum(scores[e] for e in ids) if m.norm_topk_prob else 1.0  # 13
    return {e: m.routed_scaling_factor * scores[e] / total for e in ids}


def swiglu(u: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    g = gate @ u
    return down @ (g / (1 + torch.exp(-g)) * (up @ u))


def feed_forward(u: Tensor, w: Weights, spec: ModelSpec) -> Tensor:
    """One token [D]: dense, or V3's equation 12 without the residual."""
    if "gate_proj.weight" in w:
        return swiglu(u, w["gate_proj.weight"], w["up_proj.weight"], w["down_proj.weight"])
    assert spec.moe is not None
    shared = [w[f"shared_experts.{n}_proj.weight"] for n in ("gate", "up", "down")]
    out = swiglu(u, *shared)
    for expert, gate in routed(u, w, spec.moe).items():
        gate_up = w["experts.gate_up"][expert]
        out = out + gate * swiglu(u, gate_up[0], gate_up[1], w["experts.down"][expert])
    return out


def below(w: Weights, prefix: str) -> Weights:
    return {name.removeprefix(prefix): value for name, value in w.items() if name.startswith(prefix)}


def whole_model(tokens: Tensor, w: Weights, spec: ModelSpec) -> Tensor:
    """Logits [S, V] of one sequence."""
    h, eps = w["embed_tokens.weight"][tokens], spec.rms_norm_eps
    for i in range(spec.num_hidden_layers):
        layer = below(w, f"layers.{i}.")
        h = h + attention(rms_norm(h, layer["input_layernorm.weight"], eps), below(layer, "self_attn."), spec)
        u = rms_norm(h, layer["post_attention_layernorm.weight"], eps)
        mlp = below(layer, "mlp.")
        h = h + torch.stack([feed_forward(token, mlp, spec) for token in u])
    return rms_norm(h, w["norm.weight"], eps) @ w["lm_head.weight"].T


def doubled(module: torch.nn.Module) -> Weights:
    return {name: tensor.detach().double() for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("name", MLA_CONFIGS)
def test_whole_model(name: str) -> None:
    spec = spec_of(MLA_CONFIGS[name])
    model = Transformer(spec)
    randomise(model, seed=3)
    model.eval()
    tokens = random_tokens(1, 10)
    with torch.no_grad():
        assert logit_error(model(tokens)[0], whole_model(tokens[0], doubled(model), spec)) < TOLERANCE


@pytest.mark.parametrize("form", ["expanded", "absorbed"])
@pytest.mark.parametrize("name", ["v3", "v3-no-q-lora", "v2-lite"])
def test_attention(name: str, form: str) -> None:
    spec = spec_of(MLA_CONFIGS[name])
    module = MLAttention(spec, 0)
    randomise(module, seed=4)
    h = torch.randn(12, spec.hidden_size, generator=torch.Generator().manual_seed(5))
    cos_sin = tables(spec.rope, spec.attention.qk_rope_head_dim, torch.arange(12))
    with torch.no_grad():
        ours = module(h[None], cos_sin, lambda part, q, kv: getattr(part, form)(q, kv, None))[0]
    assert relative(ours, attention(h.double(), doubled(module), spec)) < TOLERANCE


@pytest.mark.parametrize("name", ["v3", "v3-one-group", "v2-lite", "v2-groups"])
def test_routing_and_experts(name: str) -> None:
    spec = spec_of(MLA_CONFIGS[name])
    assert spec.moe is not None
    layer = MoELayer(spec)
    randomise(layer, seed=6)
    layer.eval()
    u = torch.randn(40, spec.hidden_size, generator=torch.Generator().manual_seed(7))
    weights = doubled(layer)
    with torch.no_grad():
        ids, gates = layer.gate(u[None])
        ours = layer(u[None])[0]
    for t in range(40):
        expected = routed(u[t].double(), weights, spec.moe)
        picked = dict(zip(ids[t].tolist(), gates[t].tolist(), strict=True))
        assert picked == pytest.approx(expected, rel=1e-5)
    expected = torch.stack([feed_forward(token, weights, spec) for token in u.double()])
    assert relative(ours, expected) < TOLERANCE


def balance_loss(scores: list[list[float]], k: int) -> float:
    """V3, equations 17 to 20 for one sequence, alpha = 1.

    Equation 18 counts the K highest affinities themselves: no bias, no groups.
    """
    length, num_experts = len(scores), len(scores[0])
    loss = 0.0
    for i in range(num_experts):
        among_top = sum(i in sorted(range(num_experts), key=lambda e: -s[e])[:k] for s in scores)
        f = num_experts / (k * length) * among_top  # 18
        p = sum(s[i] / sum(s) for s in scores) / length  # 19 and 20
        loss += f * p  # 17
    return loss


def test_sequence_balance_loss() -> None:
    generator = torch.Generator().manual_seed(8)
    scores = torch.rand(3, 11, 8, generator=generator)
    ids = scores.topk(2, dim=-1).indices
    expected = sum(balance_loss(sequence, 2) for sequence in scores.tolist())
    assert float(sequence_balance_loss(scores, ids.flatten(0, 1))) == pytest.approx(expected, rel=1e-5)


def test_balance_loss_of_the_router_counts_affinities_not_biased_picks() -> None:
    """The gradient that V3's router adds is that of equations 17 to 20, bias and groups left out."""
    spec = spec_of(MLA_CONFIGS["v3"])
    assert spec.moe is not None
    router = Router(spec)
    randomise(router, seed=9)
    x = torch.randn(2, 13, spec.hidden_size, generator=torch.Generator().manual_seed(10))
    router.train()
    router.balance_weight = 0.7
    _, weights = router(x)
    (weights * 0).sum().backward()  # nothing but the balance loss is left
    assert router.weight.grad is not None

    probe = router.weight.detach().double().requires_grad_()
    scores = torch.sigmoid(x.double() @ probe.T)
    k, num_experts = spec.moe.num_experts_per_tok, spec.moe.n_routed_experts
    among_top = torch.zeros_like(scores).scatter_(-1, scores.topk(k).indices, 1.0)
    f = num_experts / (k * x.shape[1]) * among_top.sum(1)
    p = (scores / scores.sum(-1, keepdim=True)).mean(1)
    (0.7 * (f * p).sum()).backward()
    assert probe.grad is not None
    assert relative(router.weight.grad.double(), probe.grad) < 1e-5


@pytest.mark.parametrize("name", ["v3", "v2-lite", "v3-rope-default"])
def test_rotary_steps(name: str) -> None:
    rope = spec_of(CONFIGS[name]).rope
    for width in (16, 64):
        steps, factor = inverse_frequencies(rope, width)
        assert factor == 1.0  # DeepSeek's mscale and mscale_all_dim cancel on cos and sin
        assert steps.tolist() == pytest.approx(yarn_steps(rope, width), rel=1e-5)


def test_yarn_bounds_of_the_released_models() -> None:
    """Width 64, 4096 trained positions, factor 40: pairs up to 10 are kept, from 23 on stretched."""
    rope = Rope(
        kind="yarn", factor=40.0, original_max_position_embeddings=4096, mscale=1.0, mscale_all_dim=1.0
    )
    assert YARN["factor"] == rope.factor
    stretched, _ = inverse_frequencies(rope, 64)
    plain, _ = inverse_frequencies(Rope(), 64)
    ratio = (plain / stretched).tolist()
    assert ratio[:11] == pytest.approx([1.0] * 11)
    assert ratio[23:] == pytest.approx([40.0] * 9, rel=1e-5)
    assert all(low < high for low, high in itertools.pairwise(ratio[10:24]))
