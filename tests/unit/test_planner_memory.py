"""Memory of training: by hand for tiny models, against measured peaks, and in proportion."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import numpy as np
import pytest
import torch

from whalepod.models import loss
from whalepod.models.moe import group_by_expert
from whalepod.models.transformer import Transformer, init_weights
from whalepod.planner.activations import OWN, OWN_CPU, PARTS
from whalepod.planner.candidates import RECOMPUTED, Candidates
from whalepod.planner.cut import cut
from whalepod.planner.in_flight import held
from whalepod.planner.memory import CATEGORIES, NO_OVERHEAD, Memory, training_memory
from whalepod.planner.state import BF16_STATE, DEEPSEEK_STATE, FP8_WEIGHT_BYTES, OWN_STATE
from whalepod.spec.counts import GIB, expert_params, params
from whalepod.spec.errors import UserError
from whalepod.spec.layout import Layout
from whalepod.spec.model import GQA, MLA, ModelSpec, MoE, Rope
from whalepod.spec.presets import load_model_spec
from whalepod.spec.schedule import RULES, schedule_actions, stages_of_rank
from whalepod.spec.timeline import peak_in_flight

V3 = load_model_spec("deepseek-v3")


def llama(layers: int, hidden: int, heads: int, groups: int, width: int, vocabulary: int) -> ModelSpec:
    return ModelSpec(
        *("llama", "LlamaForCausalLM", layers, hidden, heads, width, vocabulary, 131072),
        GQA(groups, hidden // heads),
        Rope(),
    )


DENSE = llama(layers=2, hidden=8, heads=2, groups=1, width=16, vocabulary=32)
EXPERTS = ModelSpec(
    *("tiny", "DeepseekV3ForCausalLM", 3, 16, 4, 32, 64, 512),
    MLA(q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=2, v_head_dim=4),
    Rope(),
    MoE(8, 2, 1, 8, first_k_dense_replace=1, scoring_func="sigmoid", topk_method="noaux_tc"),
    num_nextn_predict_layers=1,
)


def memory(spec: ModelSpec, *layouts: Layout, length: int = 16, **options: Any) -> Memory:
    options = {"overhead": NO_OVERHEAD} | options
    return training_memory(spec, Candidates.of(layouts), length, **options)


def layout(**axes: Any) -> Layout:
    """16 micro-batches a step, ZeRO-1 unless said."""
    batch = 16 * axes.get("dp_shard", 1) * axes.get("dp_replicate", 1) * axes.get("micro_batch", 1)
    return Layout(**({"zero": 1, "global_batch": batch} | axes))


def state(found: Memory, row: int = 0, rank: int = 0) -> tuple[float, float, float]:
    """Bytes of weights, gradients and optimizer."""
    weights, gradients, optimizer = (
        float(found.categories[name][row, rank]) for name in ("weights", "gradients", "optimizer")
    )
    return weights, gradients, optimizer


# ------------------------------------------------------------------------------------------ by hand


def test_state_of_a_dense_model() -> None:
    block = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16 + 2 * 8  # q, k and v, o, MLP, norms
    total = 2 * block + 2 * 32 * 8 + 8
    assert params(DENSE).total == total
    rows = memory(
        DENSE,
        layout(),
        layout(dp_shard=4),
        layout(dp_shard=4, zero=2),
        layout(dp_shard=4, zero=3),
        layout(dp_replicate=4),
        layout(dp_shard=2, cp=2, zero=3),
        layout(precision="fp32"),
    )
    assert state(rows, 0) == (2 * total, 4 * total, 12 * total)
    assert state(rows, 1) == (2 * total, 4 * total, 3 * total)
    assert state(rows, 2) == (2 * total, 1 * total, 3 * total)
    assert state(rows, 3) == (0.5 * total, 1 * total, 3 * total)
    assert state(rows, 4) == state(rows, 0)
    assert state(rows, 5) == state(rows, 3)
    assert state(rows, 6) == (4 * total, 4 * total, 8 * total)  # the weights are the masters
    # Whole at a time: two blocks' weights and the ends; one block's gradient in BF16 and FP32.
    ends = 2 * 32 * 8 + 8
    gathered = rows.categories["gathered"][:, 0]
    assert gathered.tolist() == [0, 0, 6 * block, 2 * (2 * block + ends) + 6 * block, 0, *gathered[3:4], 0]


def test_tensor_parallelism_cuts_matrices_only() -> None:
    matrices = 2 * (8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16) + 2 * 32 * 8
    norms = 5 * 8
    spec = dataclasses.replace(DENSE, attention=GQA(2, 4))
    more = 2 * 2 * 8 * 4  # keys and values of a second head
    rows = memory(spec, layout(tp=2))
    assert state(rows)[0] == 2 * ((matrices + more) / 2 + norms)


def test_experts_are_shared_out() -> None:
    routed = 3 * 8 * 3 * 16 * 8  # two layers and the MTP block, of 8 experts each
    assert routed == 3 * 8 * expert_params(EXPERTS)
    plain = params(EXPERTS, mtp=True).total - routed
    rows = memory(
        EXPERTS,
        layout(),
        layout(dp_shard=4, ep=4),
        layout(dp_shard=4, ep=2, zero=2),
        layout(dp_shard=2, ep=4, tp=2, zero=3),
        layout(dp_shard=2, tp=2, zero=3),
    )
    assert state(rows, 0) == (2 * (plain + routed), 4 * (plain + routed), 12 * (plain + routed))
    assert state(rows, 1) == (2 * plain + routed / 2, 4 * plain + routed, 3 * plain + 3 * routed)
    assert state(rows, 2) == (2 * plain + routed, plain + routed, 3 * plain + 3 * routed)
    # Over four devices in every case; tp repeats the rest of `plain` that it does not cut.
    assert state(rows, 3)[2] - state(rows, 4)[2] == pytest.approx(0)
    without = memory(EXPERTS, layout(), mtp=False)
    assert state(without)[0] == 2 * params(EXPERTS).total


def test_pipeline_ranks_hold_their_own_and_mtp_needs_the_embedding() -> None:
    rows = memory(EXPERTS, layout(pp=2, stage_layers=(2, 1)))
    table = 64 * 16
    whole = params(EXPERTS, mtp=True).total
    assert state(rows, 0, 0)[0] + state(rows, 0, 1)[0] == 2 * (whole + table)
    tied = dataclasses.replace(DENSE, tie_word_embeddings=True)
    one, two = memory(tied, layout()), memory(tied, layout(pp=2))
    assert state(one)[0] == 2 * params(tied).total
    assert state(two, 0, 0)[0] + state(two, 0, 1)[0] == 2 * (params(tied).total + 32 * 8)
    assert rows.categories["weights"].shape == (1, 2)


def test_activations_of_a_dense_block() -> None:
    t = 16
    norms = 2 * (2 * 8 + 4) + 2 * 2 * 8  # inputs with their FP32 scale, outputs
    attention = 2 * (8 + 2 * 4) + 2 * 8 + 4 * 2  # q, k and v, output, log-sum-exp of two heads
    mlp = 2 * 3 * 16  # gate, up, their product
    ends = (2 * 8 + 4) + 2 * 8 + 8  # final norm, head's input, token ids
    found = memory(DENSE, layout(micro_batch=3)).activations
    expected = {"norms": 2 * norms, "attention": 2 * attention, "dense_mlp": 2 * mlp, "ends": ends}
    assert {k: v[0, 0] for k, v in found.items() if v[0, 0]} == {k: 3 * t * v for k, v in expected.items()}
    full = memory(DENSE, layout(recompute="full"))
    assert full.categories["activations"][0, 0] == t * (2 * (2 * 8 + 4) + ends)
    fp32 = memory(DENSE, layout(precision="fp32")).activations
    assert fp32["dense_mlp"][0, 0] == 2 * found["dense_mlp"][0, 0] / 3


def test_activations_of_a_block_with_experts() -> None:
    spec, t, rows = EXPERTS.with_(num_nextn_predict_layers=0), 16, 2 * 16
    found = memory(spec, layout(), layout(precision="fp8"))
    shared = t * 3 * 2 * 8
    routed = rows * (2 * 16 + 3 * 2 * 8 + 12)  # token, SwiGLU's inputs and output, weight and index
    assert found.activations["experts"][0, 0] == 2 * (shared + routed)
    assert found.activations["router"][0, 0] == 2 * t * (12 * 8 + 12 * 2)
    latents = 2 * (8 + 8 + 2) + 2 * (8 + 8)  # before and after their norms
    up_projected = 2 * 4 * (6 + 6 + 4)
    assert found.activations["attention"][0, 0] == 3 * t * (latents + up_projected + 2 * 16 + 4 * 4)
    # FP8 keeps a product's input in one byte and a scale per 128, SwiGLU's inputs in BF16.
    li = 1 + 4 / 128
    eight = t * 8 * (4 + li) + rows * (16 * li + 8 * (4 + li) + 12)
    assert found.activations["experts"][1, 0] == pytest.approx(2 * eight)
    assert found.categories["weights"][1, 0] < found.categories["weights"][0, 0] * FP8_WEIGHT_BYTES / 2


def test_every_axis_splits_activations() -> None:
    rows = memory(
        *(EXPERTS, layout(), layout(cp=4), layout(dp_shard=4, ep=4), layout(tp=4), layout(tp=4, ep=4)),
    ).activations
    whole, cp, ep, tp, both = rows["experts"][:, 0]
    assert cp == whole / 4
    assert ep == whole  # as many rows come as leave
    assert whole / 4 < tp < whole  # every rank has all rows, and a quarter of the width
    assert both == whole / 4
    assert rows["norms"][:, 0].tolist() == [rows["norms"][0, 0] / n for n in (1, 4, 1, 4, 4)]
    busy = memory(EXPERTS, layout(dp_shard=4, ep=4), imbalance=2.0).activations["experts"][0, 0]
    assert whole < busy < 2 * whole


def test_what_recomputation_drops() -> None:
    spec = EXPERTS.with_(num_nextn_predict_layers=0)
    one = layout()
    parts = [frozenset[str]()] + [frozenset((part,)) for part in RECOMPUTED]
    found = training_memory(spec, Candidates.of([one] * len(parts), parts), 16, overhead=NO_OVERHEAD)
    kept = dict(zip(("none", *RECOMPUTED), found.categories["activations"][:, 0], strict=True))
    t, rows, blocks = 16, 32, 3
    dropped = {part: kept["none"] - value for part, value in kept.items()}
    assert dropped["norms"] == t * blocks * (2 * 2 * 16 + 2 * (8 + 8))
    assert dropped["mla_up_proj"] == t * blocks * (2 * (8 + 8) + 2 * 4 * 16)
    assert dropped["moe_act"] == 2 * 2 * 8 * (t + rows)
    assert dropped["mlp"] == t * (2 * 3 * 32 + 2 * 16)
    assert kept["all"] == t * (blocks * (2 * 16 + 4) + (2 * 16 + 4) + 2 * 16 + 8)


def test_at_the_peak_is_the_loss_or_a_block() -> None:
    spec = DENSE.with_(vocab_size=1024)
    found = memory(spec, layout(), layout(micro_batch=64, recompute="full")).categories
    # BF16 logits turned into their gradient, and the gradients of the head's weight and input.
    assert found["logits"][0, 0] == 2 * 16 * 1024 + 2 * 1024 * 8 + 2 * 16 * 8
    assert found["working"][0, 0] == 0
    small = memory(DENSE.with_(vocab_size=8), layout(recompute="full"))
    assert small.categories["logits"][0, 0] == 0
    block = 2 * 3 * 16 + 2 * (8 + 2 * 4) + 2 * 8 + 4 * 2 + (2 * 8 + 4) + 2 * 2 * 8
    assert small.categories["working"][0, 0] == 16 * (block + 2 * 8 + 2 * 2 * 16)
    busy = memory(EXPERTS.with_(vocab_size=8), layout(dp_shard=4, ep=4)).categories
    assert busy["exchange"][0, 0] == 3 * 2 * 16 * 2 * 16
    # A schedule with all forward passes first keeps the logits of every micro-batch.
    late = memory(spec, layout(pp=2, schedule="gpipe")).categories["logits"]
    assert late[0].tolist() == [0, found["logits"][0, 0] + 15 * 2 * 16 * 1024]
    assert memory(spec, layout(pp=2)).categories["logits"][0, 1] == found["logits"][0, 0]


def test_own_runtime_holds_what_the_demo_says() -> None:
    """18 bytes a parameter replicated, 16 over the shards."""
    options: dict[str, Any] = {"state": OWN_STATE, "framework": OWN}
    total = params(EXPERTS, mtp=True).total
    rows = memory(
        EXPERTS,
        layout(dp_replicate=2, zero=3),
        layout(dp_shard=2, zero=3),
        layout(dp_shard=2, ep=2, zero=3),
        layout(dp_shard=2, zero=1),
        **options,
    )
    assert sum(state(rows, 0)) == 18 * total
    assert sum(state(rows, 1)) == 8 * total
    assert sum(state(rows, 2)) == 8 * total
    assert sum(state(rows, 3)) == (2 + 4 + 6) * total
    # Its loss never has all logits, but the gradient of the head's weight waits for the backward pass,
    # and while it is summed one slice's is there too, beside the slice's logits in both precisions.
    wide = memory(EXPERTS.with_(vocab_size=4096), layout(), **options).categories["logits"][0, 0]
    slices = (4 + 2) * 16 * 4096
    assert wide == 2 * (2 * 4096 * 16 + 2 * 16 * 16) + (4 + 2) * 4096 * 16 + slices


def test_the_planner_knows_how_long_a_slice_of_the_loss_is() -> None:
    assert OWN.loss_slice == loss.SLICE_ELEMENTS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_are_what_autograd_keeps(dtype: torch.dtype) -> None:
    """The real model on a CPU: every storage that its backward pass keeps, counted once."""
    attention = MLA(q_lora_rank=128, kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32)
    moe = MoE(8, 2, 1, 128, first_k_dense_replace=1, scoring_func="sigmoid", topk_method="noaux_tc")
    spec = ModelSpec(
        *("tiny", "DeepseekV3ForCausalLM", 2, 256, 8, 512, 512, 4096, attention, Rope(interleaved=True), moe)
    )
    model = Transformer(spec)
    init_weights(model, 0)
    model = model.to(dtype)
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if (place := tensor.untyped_storage().data_ptr()) not in own:
            kept[place] = tensor
        return tensor

    length = 256
    tokens = torch.randint(0, 512, (1, length + 1))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(tokens[:, :-1], tokens[:, 1:].unsqueeze(-1))
    counted = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())

    one = layout(precision="fp32" if dtype == torch.float32 else "bf16")
    padded = len(group_by_expert(torch.zeros(2 * length, dtype=torch.int64), 8).pick_N) / (2 * length)
    found = memory(spec, one, length=length, state=OWN_STATE, framework=OWN_CPU, imbalance=padded)
    # The loss keeps the gradients of the head's input and weight.
    loss = dtype.itemsize * (length * 256 + 512 * 256)
    assert found.categories["activations"][0, 0] + loss == pytest.approx(counted, rel=0.01)


# ------------------------------------------------------------------------------------- in proportion


@pytest.mark.parametrize("schedule", RULES)
def test_in_flight_is_what_the_schedule_holds(schedule: str) -> None:
    rule, chance = RULES[schedule], np.random.default_rng(0)
    checked = 0
    for pp in range(1, 9):
        for stages in [rule.num_stages] if rule.num_stages else range(1, 5):
            for micro_batches in (1, 2, 3, pp, 2 * pp, 2 * pp + 1, 3 * pp, 4 * pp, 5 * pp + 2):
                if not rule.accepts(pp, micro_batches) or (pp == 1 and stages > 1):
                    continue
                moments = held(schedule, pp, stages, micro_batches)
                if pp == 1:
                    assert moments.tolist() == [[[1]]]
                    continue
                orders = schedule_actions(schedule, pp, stages, micro_batches)
                for rank, order in enumerate(orders):
                    own = stages_of_rank(schedule, rank, pp, stages)
                    for sizes in (np.ones(stages), chance.random(stages)):
                        by_stage = dict(zip(own, sizes.tolist(), strict=True))
                        expected = peak_in_flight(order, by_stage.__getitem__)
                        assert (moments[rank] @ sizes).max() == pytest.approx(expected), (pp, stages, rank)
                        checked += 1
    assert checked > 200


def test_in_flight_closed_forms() -> None:
    assert held("1f1b", 4, 1, 16)[:, 0, 0].tolist() == [4, 3, 2, 1]
    assert held("1f1b", 4, 1, 4)[:, 0, 0].tolist() == [4, 3, 2, 1]
    assert held("gpipe", 4, 1, 16)[:, 0, 0].tolist() == [16] * 4
    assert held("dualpipev", 4, 2, 16).sum(-1).max(-1).tolist() == [9, 9, 9, 9]  # 2 pp + 1 half-stages
    assert held("zbv", 4, 2, 16).sum(-1).max(-1).tolist() == [8, 8, 8, 8]


def test_cut_counts_every_layer_once() -> None:
    for schedule, pp, stages in (("1f1b", 16, 1), ("interleaved", 8, 4), ("zbv", 16, 2), ("1f1b", 1, 1)):
        found = cut(V3, pp, stages, schedule, 4096)
        assert found.dense.shape == (pp, stages)
        assert (found.dense.sum(), found.moe.sum()) == (3, 58)
        assert (found.embedding.sum(), found.head.sum()) == (1, 1)
    v = cut(V3, 4, 2, "dualpipev", 4096)
    assert v.embedding[0].tolist() == [1, 0]
    assert v.head[0].tolist() == [0, 1]
    assert cut(V3, 2, 1, "1f1b", 4096, (40, 21)).moe[:, 0].tolist() == [37, 21]
    with pytest.raises(UserError, match="61 layers"):
        cut(V3, 64, 1, "1f1b", 4096)


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_more_of_an_axis_is_never_more_state(zero: int) -> None:
    def total(**axes: Any) -> float:
        return sum(state(memory(V3, layout(**({"zero": zero} | axes)), length=4096)))

    by_ep = [total(dp_shard=32, ep=ep) for ep in (1, 2, 4, 8, 16, 32)]
    by_tp = [total(dp_shard=8, tp=tp, ep=8) for tp in (1, 2, 4)]
    by_width = [total(dp_shard=8, tp=tp) for tp in (1, 2, 4)]
    by_zero = [total(dp_shard=32, ep=4, zero=stage) for stage in range(1, zero + 1)]
    for found in (by_ep, by_tp, by_width, by_zero):
        assert found == sorted(found, reverse=True)


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "zbv", "dualpipev", "gpipe"])
def test_recomputing_more_never_needs_more(schedule: str, precision: str) -> None:
    rows = [
        layout(pp=8, dp_shard=8, ep=8, schedule=schedule, precision=precision, recompute=recompute)
        for recompute in ("full", "selective", "none")
    ]
    peaks = memory(V3, *rows, length=4096).total.max(1)
    assert peaks.tolist() == sorted(peaks)


def test_totals_and_rows_stand_alone() -> None:
    layouts = [
        layout(dp_shard=64, ep=64, zero=3, recompute="full"),
        layout(pp=16, dp_shard=8, ep=8),
        layout(pp=8, dp_shard=8, ep=8, schedule="dualpipev", recompute="selective", precision="fp8"),
        layout(pp=4, dp_shard=4, tp=2, cp=2, ep=16, zero=2, schedule="interleaved", stages_per_rank=3),
        layout(pp=4, dp_shard=4, schedule="gpipe", micro_batch=2),
        layout(dp_replicate=2, dp_shard=4, ep=4, precision="fp32"),
    ]
    together = training_memory(V3, Candidates.of(layouts), 4096)
    assert tuple(together.categories) == CATEGORIES
    assert tuple(together.activations) == PARTS
    assert np.allclose(sum(together.categories.values()), together.total)
    assert np.allclose(sum(together.activations.values()), together.categories["activations"])
    assert all((values >= 0).all() for values in together.categories.values())
    for row, one in enumerate(layouts):
        alone = training_memory(V3, Candidates.of([one]), 4096)
        assert np.array_equal(alone.total[0], together.total[row, : one.pp])
        assert (together.total[row, one.pp :] == 0).all()
        assert alone.peak_gib[0] == together.peak_gib[row]
        rank = int(together.peak_rank[row])
        assert rank == int(alone.peak_rank[0])
        assert sum(together.by_category(row).values()) == pytest.approx(together.total[row, rank] / GIB)


def test_thousands_in_a_moment() -> None:
    some = [
        layout(pp=pp, dp_shard=64, ep=ep, recompute=recompute, schedule=schedule)
        for pp in (4, 8, 16)
        for ep in (8, 64)
        for recompute in ("none", "selective", "full")
        for schedule in ("1f1b", "interleaved", "zbv")
    ]
    candidates = Candidates.of(some).take(np.arange(5000) % len(some))
    training_memory(V3, candidates, 4096)  # cuts and schedules are remembered
    start = time.perf_counter()
    assert training_memory(V3, candidates, 4096).peak_gib.shape == (5000,)
    assert time.perf_counter() - start < 0.5  # 0.04 s alone; the machine may be busy


# ------------------------------------------------------------------------------------------ measured

FOUR_LAYERS: dict[str, Any] = {
    "num_hidden_layers": 4,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 0,
}
# Peaks that torch's allocator reported, GiB by pipeline rank: SimuMax 1.2 (MooreThreads/SimuMax,
# docs/b200/b200_release_v1.2_summary.json), Megatron-LM with Transformer Engine on 8 B200, BF16, ZeRO-1.
MEASURED: dict[str, tuple[ModelSpec, dict[str, Any], int, tuple[float, ...]]] = {
    "v3 ep8": (V3.with_(**FOUR_LAYERS), {"dp_shard": 8, "ep": 8}, 4096, (104.298,)),
    "v3 ep4 pp2": (V3.with_(**FOUR_LAYERS), {"dp_shard": 4, "ep": 4, "pp": 2}, 4096, (71.239, 114.0)),
    "v2 ep8": (
        *(load_model_spec("deepseek-v2").with_(**FOUR_LAYERS), {"dp_shard": 8, "ep": 8}, 4096),
        (45.631,),
    ),
    "v2 ep4 pp2": (
        *(load_model_spec("deepseek-v2").with_(**FOUR_LAYERS), {"dp_shard": 4, "ep": 4, "pp": 2}, 4096),
        (31.585, 44.702),
    ),
    **{
        f"llama {name}": (spec, axes, length, peaks)
        for spec, rows in (
            (
                llama(12, 8192, 64, 8, 28672, 128256),
                (
                    ("70b pp2", {"pp": 2, "dp_shard": 4}, 4096, (66.552, 62.968)),
                    ("70b tp2", {"tp": 2, "dp_shard": 4}, 4096, (60.680,)),
                    ("70b tp4", {"tp": 4, "dp_shard": 2}, 4096, (39.072,)),
                    ("70b tp8", {"tp": 8}, 4096, (28.286,)),
                    ("70b tp2 cp4 32k", {"tp": 2, "cp": 4}, 32768, (68.428,)),
                    ("70b cp8 32k", {"cp": 8}, 32768, (104.506,)),
                    ("70b tp2 cp4 128k", {"tp": 2, "cp": 4}, 131072, (112.668,)),
                    ("70b cp8 128k", {"cp": 8}, 131072, (147.987,)),
                ),
            ),
            (
                llama(4, 16384, 128, 16, 53248, 128256),
                (
                    ("405b pp2", {"pp": 2, "dp_shard": 4}, 4096, (86.610, 87.083)),
                    ("405b tp2", {"tp": 2, "dp_shard": 4}, 4096, (81.591,)),
                    ("405b tp4", {"tp": 4, "dp_shard": 2}, 4096, (52.889,)),
                    ("405b tp8", {"tp": 8}, 4096, (38.574,)),
                    ("405b tp2 cp4 32k", {"tp": 2, "cp": 4}, 32768, (87.025,)),
                    ("405b cp8 32k", {"cp": 8}, 32768, (139.216,)),
                    ("405b tp2 cp4 128k", {"tp": 2, "cp": 4}, 131072, (118.127,)),
                ),
            ),
        )
        for name, axes, length, peaks in rows
    },
}


@pytest.mark.parametrize("name", MEASURED)
def test_measured_peaks(name: str) -> None:
    """DeepSeek's within 2 %, dense models' within 0.5 %."""
    spec, axes, length, peaks = MEASURED[name]
    halves = (spec.num_hidden_layers // 2,) * 2 if "pp" in axes else None
    one = Candidates.of([layout(stage_layers=halves, **axes)])
    found = training_memory(spec, one, length).allocated[0] / GIB
    assert found.tolist() == pytest.approx(peaks, rel=0.02 if spec.moe else 0.005)


def test_fully_sharded_v3_on_64() -> None:
    """NeMo Automodel, 64 GB200, EP 64, local batch 2, full recomputation, BF16 state: 107.44 GB reported."""
    one = Candidates.of([layout(dp_shard=64, ep=64, zero=3, recompute="full", micro_batch=2)])
    found = training_memory(V3, one, 4096, state=BF16_STATE, mtp=False).allocated[0, 0]
    assert found / 1e9 == pytest.approx(107.44, rel=0.02)


def test_v3_fits_its_cluster() -> None:
    """2,048 H800 of 80 GB (79 GiB usable), PP 16, EP 64, ZeRO-1, FP8 (DeepSeek-V3, section 3.2)."""
    axes = {"pp": 16, "dp_shard": 128, "ep": 64, "precision": "fp8", "schedule": "dualpipev"}
    rows = Candidates.of([layout(**axes, recompute=r) for r in ("selective", "none")])
    selective, none = training_memory(V3, rows, 4096, state=DEEPSEEK_STATE).peak_gib
    assert selective < 79 < none
