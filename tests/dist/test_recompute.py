"""Recomputation in one process: what stays in memory after a forward pass, and that nothing else changes."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from whalepod.models.attention import MLAttention
from whalepod.models.moe import routers
from whalepod.models.transformer import Losses, Transformer, init_weights, target_windows
from whalepod.parallel.comm import Traffic
from whalepod.parallel.recompute import apply_recompute
from whalepod.spec.layout import Recompute
from whalepod.spec.model import MLA, ModelSpec
from whalepod.spec.presets import load_model_spec

# V3's proportions: up-projections are many times wider than what goes in.
SMALL: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 160, "vocab_size": 128}
LATENT = SMALL | {
    "num_attention_heads": 8,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
}
V3 = load_model_spec("v3-mini").with_(num_hidden_layers=3, q_lora_rank=24, **LATENT)
V2 = load_model_spec("deepseek-v2-lite").with_(num_hidden_layers=2, **LATENT)
DENSE = load_model_spec("deepseek-r1-distill-qwen-1.5b").with_(
    num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16, **SMALL
)
POLICIES: tuple[Recompute, ...] = ("none", "selective", "full")
BATCH, LENGTH = 2, 64


class Kept(TorchDispatchMode):
    """Remembers every storage that an operation made, without keeping any alive; not a model's own."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self._own = {StorageWeakRef(t.untyped_storage()).cdata for t in model.state_dict().values()}
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}
        self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.products += func in (torch.ops.aten.mm.default, torch.ops.aten._grouped_mm.default)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                reference = StorageWeakRef(storage)
                self._made[reference.cdata] = (reference, storage.nbytes())
        return out

    def sizes(self) -> list[int]:
        """Bytes of each storage that is still alive."""
        return [
            size
            for key, (reference, size) in self._made.items()
            if key not in self._own and not reference.expired()
        ]


class Step(NamedTuple):
    kept: list[int]
    products: int  # matrix products of the backward pass
    losses: list[float]
    grads: dict[str, Tensor]
    loads: list[Tensor]


def step(spec: ModelSpec, policy: Recompute) -> Step:
    model = Transformer(spec)
    init_weights(model, 5)
    for router in routers(model):
        router.balance_weight = 0.01
    model.train()
    apply_recompute(model, policy, Traffic())
    depths = spec.num_nextn_predict_layers
    rows = torch.randint(0, 128, (BATCH, LENGTH + 1 + depths), generator=torch.Generator().manual_seed(2))
    targets = target_windows(rows[:, 1:], depths)
    with Kept(model) as forward:
        losses = model(rows[:, :LENGTH], targets)
        assert isinstance(losses, Losses)
        kept = forward.sizes()
    loads = [router.load.clone() for router in routers(model)]
    with Kept(model) as backward:
        torch.stack([losses.main, *losses.mtp]).sum().backward()
    assert all(torch.equal(a, router.load) for a, router in zip(loads, routers(model), strict=True))
    assert all(router.counts_load for router in routers(model))
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert len(grads) == len(list(model.parameters()))
    return Step(
        kept, backward.products, [float(x.detach()) for x in (losses.main, *losses.mtp)], grads, loads
    )


@pytest.mark.parametrize("spec", [V3, V2, DENSE], ids=["V3", "V2", "dense"])
def test_less_is_kept_and_nothing_else_changes(spec: ModelSpec) -> None:
    steps = {policy: step(spec, policy) for policy in POLICIES}
    none, selective, full = steps.values()
    kept = [sum(each.kept) for each in steps.values()]
    assert kept[1] < 0.75 * kept[0], kept
    assert kept[2] < 0.5 * kept[1], kept
    for other in (selective, full):
        assert other.losses == none.losses
        for name, grad in none.grads.items():
            assert torch.equal(other.grads[name], grad), name
        for a, b in zip(other.loads, none.loads, strict=True):
            assert torch.equal(a, b)
    # Every token's picks, once, in every layer of experts.
    assert spec.moe is None or all(
        load.sum() == BATCH * LENGTH * spec.moe.num_experts_per_tok for load in none.loads
    )


@pytest.mark.parametrize("spec", [V3, V2], ids=["V3", "V2"])
def test_selective_keeps_no_expanded_keys_and_values(spec: ModelSpec) -> None:
    """What an up-projection makes is wider than what goes in, and is made again instead."""
    a = spec.attention
    assert isinstance(a, MLA)
    expanded = BATCH * LENGTH * spec.num_attention_heads * (a.qk_nope_head_dim + a.v_head_dim) * 4
    padded = BATCH * LENGTH * spec.num_attention_heads * a.qk_head_dim * 4  # values, as the kernel takes them
    blocks = spec.num_hidden_layers + spec.num_nextn_predict_layers
    none, selective = step(spec, "none").kept, step(spec, "selective").kept
    assert none.count(expanded) + none.count(padded) >= 2 * blocks
    assert selective.count(expanded) == 0
    assert selective.count(padded) < none.count(padded)


def test_selective_repeats_only_the_up_projections() -> None:
    blocks = V3.num_hidden_layers + V3.num_nextn_predict_layers
    none, selective, full = (step(V3, policy).products for policy in POLICIES)
    assert selective - none == 2 * blocks  # of queries, and of keys and values
    assert full - none > 4 * blocks


def test_a_policy_reaches_every_block_and_no_other() -> None:
    model = Transformer(V3)
    apply_recompute(model, "none", Traffic())
    assert "forward" not in vars(model.layers[0])
    apply_recompute(model, "full", Traffic())
    blocks = [*model.layers, *(m.block for m in model.mtp)]
    assert all("forward" in vars(block) for block in blocks)
    assert not any("forward" in vars(m) for m in model.modules() if isinstance(m, MLAttention))
