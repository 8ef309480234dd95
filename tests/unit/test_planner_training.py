"""The planner's training side: kernels, network, played pipelines, search, advice, and what it is worth."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import whalepod.planner
from whalepod.planner import plan as planning
from whalepod.planner import training
from whalepod.planner.balance import balanced_layers
from whalepod.planner.candidates import Candidates
from whalepod.planner.kernels import Kernels
from whalepod.planner.layers import F, I, R, W
from whalepod.planner.network import Network, fast_gb_s
from whalepod.planner.routing import expected_nodes
from whalepod.planner.scale import scale_training
from whalepod.planner.search import TrainingJob, default_batch, enumerate_layouts, search
from whalepod.planner.software import GENERATIONS, LADDER, load_software, usual_software
from whalepod.planner.train_accuracy import COLUMNS, medians, parse_row, read_rows, training_rows
from whalepod.planner.training import TrainingTimes, play
from whalepod.spec.counts import attended_keys, attention_flops, layer_flops, params, train_flops
from whalepod.spec.errors import UserError
from whalepod.spec.hardware import Cluster, load_gpu, parse_gpus
from whalepod.spec.layout import Layout
from whalepod.spec.presets import load_model_spec
from whalepod.spec.schedule import schedule_actions
from whalepod.spec.timeline import StageTimes, simulate

V3 = load_model_spec("deepseek-v3")
LITE = load_model_spec("deepseek-v2-lite")
PUBLISHED = Path(whalepod.planner.__file__).parent / "data" / "validation" / "training.csv"


def job(gpus: str = "16xH100", spec=LITE, software: str = "megatron-26.02", **more) -> TrainingJob:
    given = {"precision": "bf16", "global_batch": 512} | more
    return TrainingJob(spec, parse_gpus(gpus), load_software(software), **given)


def times(layout: Layout, gpus: str = "2048xH800", spec=V3, software: str = "deepseek", **more):
    return TrainingTimes(spec, Candidates.of([layout]), parse_gpus(gpus), load_software(software), **more)


# ---------------------------------------------------------------------------------- kernels and network


def test_a_large_product_runs_at_its_share_of_the_peak_and_a_thin_one_at_the_memorys():
    gpu = load_gpu("H100")
    kernels = Kernels(gpu, load_software("megatron-26.02").of(gpu))
    bf16 = np.array(["bf16"], dtype=object)
    large = kernels.product(8192, 8192, 8192, bf16)[0]
    share = 2 * 8192**3 / large / gpu.peak_flops("bf16")
    assert 0.9 * kernels.shares.gemm["bf16"] < share < kernels.shares.gemm["bf16"]
    thin = kernels.product(1, 8192, 8192, bf16)[0]
    assert thin == pytest.approx(2 * 8192 * 8192 / kernels.bandwidth, rel=0.2)


def test_products_of_a_layer_count_the_models_flops():
    # On a GPU without memory traffic and launches, a layer's seconds are its FLOPs over the rate.
    layout = Layout(global_batch=1)
    found = times(layout, "1xH800", LITE)
    gpu = replace(found.cluster.gpu, memory_tb_s=1e9)
    perfect = replace(found, cluster=Cluster(gpu, 1, 1))
    shares = perfect.software.of(gpu)
    flat = replace(shares, half_k=0.0, half_rows=0.0, grouped=shares.gemm)
    perfect = replace(perfect, software=perfect.software.with_(shares={gpu.name: flat}))
    layer = perfect.layers["moe"]
    seconds = sum(layer.parts[p][[F, I, W], 0].sum() for p in ("projections", "router", "shared", "experts"))
    tokens, rate = 4096, gpu.peak_flops("bf16") * flat.gemm["bf16"]
    core = attention_flops(LITE, attended_keys(LITE, 4096)).attn_scores
    model = 3 * (layer_flops(LITE, 1, 4096).total - core) * tokens
    launches = 3 * 9 * 4e-6
    assert seconds - launches == pytest.approx(model / rate, rel=0.01)
    assert layer.parts["attention"][F, 0] - 4e-6 == pytest.approx(
        core * tokens / (gpu.peak_flops("bf16") * flat.attention[0]), rel=0.01
    )


def test_a_group_inside_the_domain_sends_nothing_over_the_network():
    fast = Network(parse_gpus("64xH100"))
    slow = Network(Cluster(replace(load_gpu("H100"), nic_gb_s=1.0), 64, 8))
    one = np.array([1e9])
    assert fast.all_gather(one, np.array([8]), np.array([8])) == slow.all_gather(
        one, np.array([8]), np.array([8])
    )
    crossing = [n.all_gather(one, np.array([64]), np.array([8]))[0] for n in (fast, slow)]
    assert crossing[1] > 10 * crossing[0]
    # Rails: a node's eight cards share what comes from elsewhere, 7/8 of it over 8 cards.
    assert crossing[1] == pytest.approx(1e9 * 7 / 8 / 8 / (1e9 * 0.88), rel=0.01)


def test_a_group_of_one_communicates_for_free():
    one = np.array([1])
    network = Network(parse_gpus("8xH100"))
    for op in (network.all_gather, network.reduce_scatter, network.all_reduce):
        assert op(np.array([1e9]), one, one)[0] == 0


def test_nodes_that_a_token_visits_by_drawing():
    moe = V3.moe
    rng = np.random.default_rng(1)
    scores = rng.random((3000, moe.n_group, moe.n_routed_experts // moe.n_group))
    # The router's rule: groups by their best two.
    order = np.argsort(np.sort(scores, -1)[..., -2:].sum(-1), -1)
    np.put_along_axis(scores, order[:, : -moe.topk_group, None], -1.0, 1)
    picks = np.argsort(scores.reshape(3000, -1), -1)[:, -moe.num_experts_per_tok :]
    for nodes in (2, 4, 8, 16):
        hits = [len(set(row)) for row in (picks * nodes // moe.n_routed_experts).tolist()]
        assert expected_nodes(moe, nodes) == pytest.approx(np.mean(hits), rel=0.01)


def test_groups_that_do_not_fit_into_racks_are_cut_where_a_rack_ends():
    racks = Network(parse_gpus("576xGB200"))  # eight racks of 72
    assert racks.inner(np.array([64]), 1) == 32
    assert racks.inner(np.array([36]), 1) == 36
    # 256 GPUs are four racks of which 64 are used each.
    assert Network(parse_gpus("256xGB200")).inner(np.array([64]), 1) == 64


def test_one_pair_of_a_mesh_of_links_is_slower_than_all_of_them():
    gpu = load_gpu("MI300X")
    assert fast_gb_s(gpu, 2) == 64
    assert fast_gb_s(gpu, 8) == gpu.scale_up.gb_s
    assert fast_gb_s(load_gpu("RTX4090"), 2) == load_gpu("RTX4090").pcie_gb_s / 2
    assert fast_gb_s(load_gpu("H800"), 8) == 160


@pytest.mark.parametrize("sizes", [(8, 1, 1), (4, 2, 1), (2, 4, 1), (1, 8, 1), (4, 2, 8), (2, 4, 4)])
def test_the_optimiser_steps_every_parameter_once_and_what_tp_repeats_again(sizes):
    dp, tp, ep = sizes
    found = times(Layout(dp_shard=dp, tp=tp, ep=ep, zero=1, global_batch=8), "8xH100", LITE).data_parallel
    whole = found.elements["plain"] / found.state.shards["plain"]
    stepped = 8 * (whole + found.elements["experts"] / found.state.shards["experts"])[0]
    repeated = params(LITE).total - params(LITE).routed_experts
    assert params(LITE).total <= stepped * (1 + 1e-9)
    assert stepped <= params(LITE).total + (tp - 1) * 0.2 * repeated


def test_experts_over_a_bit_more_than_a_node_cross_the_network():
    v2 = load_model_spec("deepseek-v2")

    def exchange(ep: int) -> float:
        found = times(Layout(dp_shard=80, ep=ep, zero=1, global_batch=80), "80xH100", v2, "megatron-26.02")
        return found.layers["moe"].moves["ep"][0, 0]

    assert exchange(8) < exchange(10) < exchange(16)


def test_recomputing_blocks_leaves_the_head_alone():
    found = times(Layout(recompute="full", global_batch=1), "1xH100", LITE)
    assert found.layers["head"].device[R, 0] == 0
    assert found.layers["moe"].device[R, 0] == pytest.approx(found.layers["moe"].device[F, 0])


def test_context_parallel_ranks_move_the_latent_or_the_keys_as_the_software_does():
    layout = Layout(cp=4, dp_shard=2, zero=1, global_batch=2)
    moved = {
        name: times(layout, "8xH100", V3, name, sequence_length=32768).layers["moe"]
        for name in ("whalepod", "megatron-26.02")
    }
    own, ring = moved["whalepod"], moved["megatron-26.02"]
    assert own.moves["cp"][0, 0] > 0
    # A ring's keys and values, 71 times as many bytes, travel behind the attention over them.
    assert ring.moves["cp"][0, 0] == 0
    # Both halves of a part expand all latents before them.
    assert own.parts["projections"][F, 0] > ring.parts["projections"][F, 0]


def test_our_runtime_hides_no_exchange_behind_another_micro_batch():
    layout = Layout(pp=4, dp_shard=64, ep=64, zero=1, schedule="1f1b", global_batch=64 * 32)
    shown = [
        times(layout, "256xH100", V3, name).balanced().time_step(0).exposed.get("ep", 0.0)
        for name in ("whalepod", "megatron-26.02")
    ]
    assert shown[0] > 3 * shown[1]


def test_a_profile_of_a_cpu_is_a_cpu(tmp_path):
    gpu = load_gpu("cpu")
    again = replace(gpu, name="mine")
    stack = load_software("whalepod")
    assert stack.of(again) == stack.of(gpu)
    assert usual_software(again) == "whalepod"


# ------------------------------------------------------------------------------------------- pipelines


@pytest.mark.parametrize(
    ("schedule", "stages"), [("1f1b", 1), ("interleaved", 2), ("zbv", 2), ("dualpipev", 2)]
)
def test_a_long_pipeline_goes_on_at_the_pace_of_its_rounds(schedule, stages):
    work = tuple(StageTimes(1 + 0.1 * (s % 3), 1.1, 0.8, None, 2.4) for s in range(4 * stages))
    m = 4 * 4 * 3
    whole = simulate(schedule_actions(schedule, 4, stages, m), work, 0.01).makespan
    assert play(schedule, 4, stages, m, work, 0.01)[0] == pytest.approx(whole, rel=0.02)


def test_one_rank_is_its_layers_one_after_the_other():
    found = times(Layout(global_batch=4), "1xH800", LITE)
    step = found.time_step(0)
    assert step.bubble == 0
    assert step.seconds == pytest.approx(found.estimate[0], rel=1e-6)


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "zbv", "dualpipev"])
def test_the_estimate_is_near_the_played_pipeline(schedule):
    layout = Layout(pp=8, dp_shard=64, ep=64, zero=1, schedule=schedule, global_batch=64 * 64, wire="fp8")
    found = times(layout, "512xH800").balanced()
    assert found.estimate[0] == pytest.approx(found.time_step(0).seconds, rel=0.05)


def test_layers_in_a_v_are_even_by_rank():
    # Sixty layers of 1 and a head of 3: the rank at both ends has three layers less.
    sizes = balanced_layers((1.0,) * 61, 3.0, "dualpipev", 16, 2)
    assert sum(sizes) == 61
    per_rank = [sizes[r] + sizes[31 - r] for r in range(16)]
    assert per_rank == [1, *[4] * 15]
    assert balanced_layers((1.0,) * 3, 1.0, "1f1b", 4, 1) is None


def test_parts_of_a_step_add_up():
    layout = Layout(pp=4, dp_shard=8, ep=8, zero=1, global_batch=256)
    step = times(layout, "32xH100", V3, "megatron-26.02").balanced().time_step(0)
    parts = sum(step.parts.values()) + sum(step.exposed.values()) + step.bubble + step.optimizer
    assert parts + step.interference + training.STEP_OVERHEAD_S == pytest.approx(step.seconds, rel=0.03)


# ---------------------------------------------------------------------------------------------- search


def test_every_layout_of_the_search_is_a_valid_layout():
    asked = job("16xH100", precision="bf16", software="whalepod")
    candidates = enumerate_layouts(asked)
    assert len(candidates) > 500
    for row in np.random.default_rng(1).choice(len(candidates), 200, replace=False):
        layout = candidates.layout(int(row))
        layout.check_devices(16)
        layout.check_model(LITE, 4096)


def test_the_search_is_the_same_row_by_row():
    found = search(job())
    for row in (0, len(found.candidates) // 2, len(found.candidates) - 1):
        alone = replace(found.times, candidates=found.candidates.take([row]))
        assert alone.estimate[0] == pytest.approx(found.times.estimate[row], rel=1e-9)


def test_plans_fit_are_ranked_and_say_what_limits_them():
    answer = planning.plan_training(job())
    assert len(answer.plans) == 5
    seconds = [plan.step.seconds for plan in answer.plans]
    assert seconds == sorted(seconds)
    for plan in answer.plans:
        assert plan.memory_gib <= answer.job.limit_gib
        assert plan.memory_gib == pytest.approx(sum(plan.memory_by_category.values()))
        assert plan.memory_allocated_gib < plan.memory_reserved_gib < plan.memory_gib
        assert plan.limited_by
        plan.layout.check_model(LITE, 4096)
    best = answer.plans[0]
    assert best.helps == tuple(sorted(best.helps, key=lambda h: -h.gain))


def test_what_would_help_is_what_happens_then():
    best = planning.plan_training(job()).plans[0]
    gain = {h.change: h.gain for h in best.helps}["compute x2"]
    gpu = load_gpu("H100")
    doubled = replace(gpu, tflops={p: 2 * t for p, t in gpu.tflops.items()})
    again = planning.time_layout(replace(job(), cluster=Cluster(doubled, 16, 8)), best.layout)
    assert best.step.seconds / again.step.seconds - 1 == pytest.approx(gain, abs=0.03)


def test_the_default_batch_is_the_reports_in_tokens_and_divides():
    assert default_batch(V3) == 15360
    assert [default_batch(V3, 1024, n) for n in (32768, 131072)] == [1920, 480]
    for gpus in (12, 56, 96, 997):
        batch = default_batch(V3, gpus)
        odd = gpus // (gpus & -gpus)
        assert batch % odd == 0
        assert batch == pytest.approx(15360, rel=0.1)


def test_pins_are_kept():
    answer = planning.plan_training(job(pins={"tp": 2, "pp": 2, "recompute": "full"}))
    assert answer.plans
    assert all((p.layout.tp, p.layout.pp, p.layout.recompute) == (2, 2, "full") for p in answer.plans)


def test_nothing_fits_is_an_answer():
    answer = planning.plan_training(job("2xRTX4090", V3, precision="fp8", global_batch=15360))
    assert answer.plans == ()
    text = " ".join(answer.advice)
    assert "nothing fits" in text
    assert "x RTX4090 instead of 2" in text


def test_an_impossible_width_is_an_answer():
    answer = planning.plan_training(job("96xH100", V3, precision="fp8", pins={"tp": 48}))
    assert answer.plans == ()
    assert "layout.tp 48 must divide num_attention_heads 128; nearest: 16" in answer.advice[0]


def test_fp8_of_a_gpu_without_it_is_refused():
    with pytest.raises(UserError, match="A100 has no FP8 matrix products; use bf16"):
        planning.plan_training(job("8xA100", precision="fp8"))


def test_traps_are_named():
    def warnings(layout: Layout, gpus: str) -> str:
        asked = job(gpus, V3, precision=layout.precision, global_batch=layout.global_batch)
        return " ".join(planning.time_layout(asked, layout).warnings)

    assert "leaves the NVLink 4 domain of 8" in warnings(
        Layout(tp=16, dp_shard=2, global_batch=64), "32xH100"
    )
    far = Layout(dp_shard=256, ep=256, zero=3, global_batch=1024)
    assert "exchange crosses the network" in warnings(far, "256xH100")
    few = Layout(pp=8, dp_shard=8, ep=8, zero=1, global_batch=64)
    assert "8 micro-batches for 8 pipeline stages" in warnings(few, "64xH100")
    assert "run over PCIe" in warnings(Layout(tp=2, dp_shard=4, global_batch=8), "8xL40S")


def test_scaling_says_what_each_doubling_brings():
    points = scale_training(job(), [2, 4, 8, 16, 32])
    assert [p.num_gpus for p in points] == [2, 4, 8, 16, 32]
    fits = [p for p in points if p.plan]
    assert points[0].plan is None
    assert fits[0].efficiency == 1.0
    speeds = [p.plan.tokens_per_s for p in fits]
    assert speeds == sorted(speeds)


# -------------------------------------------------------------------------------------- what it is worth


def test_published_training_runs():
    rows = training_rows(PUBLISHED)
    found = medians(rows)
    assert len(rows) == 46
    assert found["all"] < 0.08
    assert found["class A"] < 0.08
    assert max(abs(row["error"]) for row in rows if row["cls"] == "A") < 0.20


def test_the_ladder_climbs_in_its_order_and_by_its_whole_gain():
    rows = [row for row in training_rows(PUBLISHED) if row["note"].startswith("ladder")]
    predicted = [row["predicted"] for row in rows]
    assert len(rows) == len(LADDER) == 13
    assert predicted == sorted(predicted)
    published = rows[-1]["published"] / rows[0]["published"]
    assert predicted[-1] / predicted[0] == pytest.approx(published, rel=0.1)


def test_deepseeks_own_run():
    # 2,048 H800: 180K GPU hours per trillion tokens, 54.25 days for 14.8 T (arXiv 2412.19437; 2505.09343).
    layout = Layout(
        pp=16, dp_shard=128, ep=64, zero=1, schedule="dualpipev", recompute="selective",
        wire="fp8", precision="fp8", global_batch=15360,
    )  # fmt: skip
    plan = planning.time_layout(job("2048xH800", V3, "deepseek", precision="fp8", global_batch=15360), layout)
    assert plan.gpu_hours_per_trillion_tokens == pytest.approx(180_000, rel=0.05)
    assert plan.days_per_trillion_tokens * 14.8 == pytest.approx(54.25, rel=0.05)
    assert plan.step.seconds == pytest.approx(19.926, rel=0.05)
    assert plan.tflops_per_gpu == pytest.approx(400, rel=0.06)
    assert plan.memory_gib < 79.65


def test_rows_that_cannot_be_read_name_the_line(tmp_path):
    good = dict(read_rows(PUBLISHED, COLUMNS)[0])
    for column, value, message in (
        ("gpu", "H10", "unknown GPU"),
        ("pp", "x", "pp must be a whole number"),
        ("tp", "0", "tp must be from 1"),
        ("model", "nonsense", "unknown model"),
        ("tok_s_gpu", "fast", "tok_s_gpu must be a number"),
    ):
        file = tmp_path / "rows.csv"
        row = good | {column: value}
        file.write_text(",".join(row) + "\n" + ",".join(f'"{v}"' for v in row.values()) + "\n")
        with pytest.raises(UserError, match=f"line 2.*{message}|line 2: .*{message}"):
            training_rows(file)
    (tmp_path / "none.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="no column 'model'"):
        training_rows(tmp_path / "none.csv")


def test_a_row_is_told_only_its_columns():
    row = dict(read_rows(PUBLISHED, COLUMNS)[0])
    other = row | {"tok_s_gpu": "1", "step_s": "999", "tflops_gpu": "1"}
    assert parse_row(row).predict()[0] == parse_row(other).predict()[0]


@pytest.mark.parametrize(
    ("note", "generation"),
    [("rel 26.02", "26.02"), ("rel 26.04, new", "26.02"), ("rel 25.10", "25.09"), ("rel 24.01", "25.09")],
)
def test_a_release_without_constants_takes_the_last_before_it(note, generation):
    row = dict(read_rows(PUBLISHED, COLUMNS)[0]) | {"note": note}
    assert parse_row(row).software.name == f"megatron-{generation}"


def test_generations_are_named():
    assert "megatron-26.02" in GENERATIONS
    with pytest.raises(UserError, match=r"did you mean 'megatron-26\.02'"):
        load_software("megatron-26.2")


def test_flops_of_v3_are_the_published_ones():
    assert train_flops(V3, 4096).total / 1e9 == pytest.approx(249.7, rel=0.005)
