"""The serving planner: layouts, memory and speculation by hand, laws that hold anywhere, published runs."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from whalepod.planner import serve_accuracy
from whalepod.planner.routing import expected_nodes
from whalepod.planner.serve_kernels import Kernels
from whalepod.planner.serve_layout import ServeLayout, Worker, parse_layout
from whalepod.planner.serve_measured import MeasuredKernels, around
from whalepod.planner.serve_memory import cache_bytes_per_token, serve_memory, weight_bytes_per_gpu
from whalepod.planner.serve_pass import pass_parts
from whalepod.planner.serve_search import pareto, search_serving
from whalepod.planner.serve_software import Engine, generation_of, load_software
from whalepod.planner.serve_step import Step, Traffic
from whalepod.planner.serve_worker import WorkerModel, Workload, tokens_per_step
from whalepod.planner.serving import ServeEstimate, estimate
from whalepod.serve.predict import predict
from whalepod.serve.start import EngineConfig, serving_layout
from whalepod.spec.errors import UserError
from whalepod.spec.hardware import Cluster, Gpu, load_gpu, parse_gpus
from whalepod.spec.measured import Attended, Collective, Decoded, EngineStep, Measured, Product, Served, Thin
from whalepod.spec.presets import load_model_spec

SAMPLE = Path(__file__).parent.parent / "data" / "serving_sample.csv"
V3 = load_model_spec("deepseek-v3")
GIB = 2**30


def software(gpu: str = "H200", precision: str = "fp8", engine: str = "sglang") -> Engine:
    return load_software(engine, load_gpu(gpu), precision)


def worker_model(layout: Worker, gpu: str = "8xH200", precision: str = "fp8", isl: int = 1024) -> WorkerModel:
    cluster = parse_gpus(gpu)
    return WorkerModel(
        V3, cluster, layout, load_software("sglang", cluster.gpu, precision), precision, Workload(isl, 1024)
    )


def run(
    layout: str, concurrency: float, gpus: str = "8xH200", isl: int = 1024, **work: float
) -> ServeEstimate:
    cluster = parse_gpus(gpus)
    osl = int(work.pop("osl", 1024))
    return estimate(
        V3,
        cluster,
        parse_layout(layout),
        Workload(isl, osl, **work),  # type: ignore[arg-type]
        concurrency,
        "fp8",
        load_software("sglang", cluster.gpu, "fp8"),
    )


TP8 = "TP8 DPattn1 moeTP1 EP8"
DISAGGREGATED = "P 2x(TP1 DPattn8 moeTP1 EP8) + D 1x(TP8 DPattn1 moeTP1 EP8)"


# ------------------------------------------------------------------------------------------------ layouts


def test_layouts_are_read_and_written():
    one = parse_layout(TP8)
    assert one == ServeLayout(Worker(tp=8, ep=8))
    assert (one.mode, one.num_gpus, str(one)) == ("aggregated", 8, TP8)
    two = parse_layout(DISAGGREGATED)
    assert two == ServeLayout(Worker(tp=8, ep=8), 1, Worker(dp=8, ep=8), 2)
    assert (two.mode, two.num_gpus, str(two)) == ("disaggregated", 24, DISAGGREGATED)
    assert parse_layout(str(ServeLayout(Worker(tp=8, moe_tp=8, pp=2), 3))).num_gpus == 48
    assert two.as_dict()["prefill"] == {"workers": 2, "tp": 1, "dp": 8, "moe_tp": 1, "ep": 8, "pp": 1}


@pytest.mark.parametrize(
    "text",
    ["", "TP8", "P 1x(TP8 DPattn1 moeTP1 EP8)", TP8 + " + " + TP8, "TP0 DPattn1 moeTP1 EP1", "x" * 10**5],
)
def test_bad_layouts_get_one_line(text: str):
    with pytest.raises(UserError, match="layout") as error:
        parse_layout(text)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


def test_attention_and_experts_share_the_gpus():
    with pytest.raises(UserError, match="8 x 1 and the experts' moeTP x EP = 1 x 4"):
        parse_layout("TP8 DPattn1 moeTP1 EP4")


@pytest.mark.parametrize(
    ("worker", "model", "message"),
    [
        (Worker(tp=32, moe_tp=32), "deepseek-v3", "18432 into 576, no multiple of the FP8 block of 128"),
        (Worker(tp=3, ep=3), "deepseek-v3", "TP 3 must divide 128 attention heads"),
        (Worker(dp=12, ep=12), "deepseek-v3", "EP 12 must divide 256 routed experts"),
        (Worker(dp=8, ep=8), "deepseek-llm-7b", "is a dense model; use EP 1"),
        (Worker(pp=64), "deepseek-v3", "PP 64 exceeds the model's 61 layers"),
    ],
)
def test_refusals_say_what_to_change(worker: Worker, model: str, message: str):
    with pytest.raises(UserError, match=message):
        worker.check(load_model_spec(model), "fp8")


def test_redundant_experts():
    Worker(dp=144, ep=144).check(V3, "fp8")
    assert Worker(dp=144, ep=144).redundant(V3) == 32  # DeepSeek's own: 288 = 2 x 144
    assert Worker(dp=72, ep=72).redundant(V3) == 32
    assert Worker(dp=64, ep=64).redundant(V3) == 0


@pytest.mark.parametrize(("gpu", "precision"), [("A100", "fp8"), ("H100", "fp4"), ("H100", "int3")])
def test_precisions_that_a_gpu_lacks(gpu: str, precision: str):
    with pytest.raises(UserError, match=r"arithmetic|precision must be"):
        search_serving(V3, parse_gpus(f"16x{gpu}"), 1024, 1024, precision, "sglang")


# ------------------------------------------------------------------------------------------------- memory


def test_cache_is_replicated_over_tp_and_split_over_pp_and_dp():
    latent = 61 * 576 * 2
    assert cache_bytes_per_token(V3, Worker(tp=8, moe_tp=8), "bf16") == latent
    assert cache_bytes_per_token(V3, Worker(), "bf16") == latent
    assert cache_bytes_per_token(V3, Worker(tp=8, moe_tp=8, pp=2), "bf16") == 31 * 576 * 2
    assert cache_bytes_per_token(V3, Worker(tp=8, moe_tp=8), "fp8") == latent / 2
    one, two, rows = (
        serve_memory(V3, w, 141, "fp8", "bf16", 8192)
        for w in (Worker(tp=8, moe_tp=8), Worker(tp=8, moe_tp=8, pp=2), Worker(dp=8, ep=8))
    )
    assert one.kv_capacity_tokens == int((one.total - one.fixed) / latent)
    # Half the layers' weights and half the cache of a token on each of twice the GPUs.
    assert two.kv_capacity_tokens > 3 * one.kv_capacity_tokens
    # Each of eight ranks holds its own requests.
    assert rows.kv_capacity_tokens == 8 * int((rows.total - rows.fixed) / latent)


def test_weights_by_hand():
    # 671B parameters in FP8 over eight: experts and the rest split eight ways, 84 GB; what every rank holds
    # whole (down-projections, router, norms) and BF16 tables add a little.
    weights = weight_bytes_per_gpu(V3, Worker(tp=8, moe_tp=8), "fp8")
    assert 671e9 / 8 < weights < 1.04 * 671e9 / 8
    # With DP attention each rank holds whole what TP split: attention, BF16 tables, shared and dense MLPs.
    data_parallel = weight_bytes_per_gpu(V3, Worker(dp=8, ep=8), "fp8")
    assert data_parallel - weights == pytest.approx(
        7 / 8 * (11.4e9 + 2 * 2 * 129280 * 7168 + 2.55e9 + 1.2e9), rel=0.06
    )
    # NVFP4: 4.5 bits for the experts' 654B, attention in BF16; the published checkpoints have 394 to 424 GB.
    assert 8 * weight_bytes_per_gpu(V3, Worker(tp=8, moe_tp=8), "fp4") == pytest.approx(400e9, rel=0.05)
    assert weight_bytes_per_gpu(V3, Worker(), "bf16") == pytest.approx(2 * 671.03e9, rel=0.001)


def test_what_does_not_fit_says_how_much_is_missing():
    with pytest.raises(
        UserError, match=r"weights and buffers need 8\d\.\d GiB per GPU, \d\.\d GiB more than H100"
    ):
        run(TP8, 4, "8xH100")
    found = search_serving(V3, parse_gpus("8xH100"), 1024, 1024, "fp8", "sglang")
    assert not found.plans
    assert all("GiB more" in r.reason for r in found.rejected)
    assert any(line.startswith("16 x H100 would hold it") for line in found.advice)


# ---------------------------------------------------------------------------------------------------- laws


def test_more_requests_bring_no_less_until_the_cache_is_full():
    for layout in (TP8, "TP1 DPattn8 moeTP1 EP8"):
        model = worker_model(parse_layout(layout).decode)
        batch = np.unique(np.round(np.geomspace(1, model.most_requests, 60)))
        rate = batch / np.asarray(model.decode_s(batch))
        assert np.all(np.diff(rate) > 0)
    full = run(TP8, 4096, isl=16384)
    assert full.admitted < 4096
    assert (
        full.batch * full.memory.cache_bytes_per_token * (16384 + 512)
        <= full.memory.total - full.memory.fixed
    )
    more = run(TP8, 8192, isl=16384)
    assert more.batch == full.batch
    assert more.ttft_s > full.ttft_s


def test_longer_contexts_are_slower():
    steps = [float(worker_model(Worker(tp=8, ep=8), isl=isl).decode_s(32.0)) for isl in (512, 4096, 32768)]
    assert steps == sorted(steps)
    prompts = [worker_model(Worker(tp=8, ep=8), isl=isl).prompt_alone_s for isl in (512, 4096, 32768)]
    assert prompts == sorted(prompts)


@pytest.mark.parametrize("change", ["memory_tb_s", "nic_gb_s", "tflops", "scale_up"])
def test_a_better_gpu_is_not_slower(change: str):
    gpu = load_gpu("H200")
    assert gpu.scale_up is not None
    better = {
        "memory_tb_s": 2 * gpu.memory_tb_s,
        "nic_gb_s": 400.0,
        "tflops": {k: 2 * v for k, v in gpu.tflops.items()},
        "scale_up": replace(gpu.scale_up, gb_s=900.0),
    }[change]
    layout = ServeLayout(Worker(dp=16, ep=16), 1, Worker(tp=8, ep=8), 2)
    cluster = parse_gpus("32xH200")
    work = Workload(4096, 1024)
    times = []
    for card in (gpu, replace(gpu, **{change: better})):
        result = estimate(V3, replace(cluster, gpu=card), layout, work, 256, "fp8", software())
        # Not the TPOT of the whole: quicker prompts make larger decode batches.
        prompt = sum(result.prefill_parts.values())
        times.append((1 / result.requests_per_s, prompt, sum(decode_parts(card, cluster).values())))
    assert all(better <= now for now, better in zip(*times, strict=True))


def decode_parts(gpu: Gpu, cluster: Cluster) -> dict[str, float]:
    layout = Worker(dp=16, ep=16)
    work = Workload(4096, 1024)
    return WorkerModel(V3, replace(cluster, gpu=gpu), layout, software(), "fp8", work).decode_parts(256)


def test_little_s_law_holds():
    for layout, concurrency in ((TP8, 32), (DISAGGREGATED, 64), (DISAGGREGATED, 3000)):
        r = run(layout, concurrency, "24xH200", osl=512, shortest=0.8, requests_per_slot=10)
        assert concurrency == pytest.approx(r.requests_per_s * (r.ttft_s + 511 * r.tpot_s), rel=1e-6)
        assert r.output_tokens_per_s == pytest.approx(512 * r.requests_per_s)
        assert r.total_tokens_per_s_per_gpu == pytest.approx(3 * r.output_tokens_per_s_per_gpu)


def test_prefill_workers_limit_a_disaggregated_deployment():
    few = run("P 1x(TP1 DPattn8 moeTP1 EP8) + D 4x(TP1 DPattn8 moeTP1 EP8)", 2048, "64xH200", isl=8192)
    more = run("P 3x(TP1 DPattn8 moeTP1 EP8) + D 4x(TP1 DPattn8 moeTP1 EP8)", 2048, "64xH200", isl=8192)
    assert few.limited_by == "prefill"
    # What the prefill pool delivers is what the decode workers complete.
    assert few.requests_per_s * 1024 * few.tpot_s == pytest.approx(4 * few.batch, rel=0.05)
    assert more.requests_per_s == pytest.approx(3 * few.requests_per_s, rel=0.1)
    assert more.ttft_s < few.ttft_s / 2


def test_one_output_token_is_bound_by_prefill():
    work = Workload(1000, 1)
    model = worker_model(Worker(dp=8, ep=8))
    prompt = replace(model, work=work).prompt_busy_s
    few, many = (
        run("TP1 DPattn8 moeTP1 EP8", 1, isl=1000, osl=1),
        run("TP1 DPattn8 moeTP1 EP8", 512, isl=1000, osl=1),
    )
    # No TPOT; in its place a step of decoding.
    assert many.tpot_s == pytest.approx(sum(many.decode_parts.values()), rel=0.05)
    assert many.tpot_s < 0.1
    assert few.ttft_s == pytest.approx(replace(model, work=work).prompt_alone_s + 0.028, rel=0.05)
    assert many.requests_per_s == pytest.approx(1 / prompt, rel=1e-6)
    assert many.ttft_s == pytest.approx(512 * prompt, rel=1e-6)
    assert many.limited_by == "prefill"
    best = search_serving(V3, parse_gpus("8xH200"), 1000, 1, "fp8", "sglang").plans[0]
    assert 20 < best.requests_per_s < 1 / prompt
    assert best.ttft_s < 1
    assert best.limited_by == "prefill"
    # Between one and many tokens no more requests come out than prompts go in.
    for osl in (2, 4, 16):
        assert run("TP1 DPattn8 moeTP1 EP8", 512, isl=1000, osl=osl).requests_per_s <= 1.001 / prompt
    apart = run(DISAGGREGATED, 64, "24xH200", isl=1000, osl=1)
    assert apart.tpot_s < 0.1
    assert apart.limited_by == "prefill"


def test_speculation():
    assert tokens_per_step(0, 0.9) == 1
    assert tokens_per_step(1, 0.85) == pytest.approx(1.85)
    assert tokens_per_step(3, 0.5) == pytest.approx(1.875)
    plain, drafted = run(TP8, 4), run(TP8, 4, drafts=1, acceptance=0.85)
    assert plain.tpot_s / 1.85 < drafted.tpot_s < plain.tpot_s / 1.3
    # Of tokens that are never accepted only the cost is left.
    assert run(TP8, 4, drafts=1, acceptance=0.0).tpot_s > plain.tpot_s
    assert "drafts" in drafted.decode_parts


def test_imbalance_costs_and_balance_pays():
    cluster = parse_gpus("32xH200")
    layout, work = ServeLayout(Worker(dp=32, ep=32)), Workload(1024, 1024)
    even, hot = (
        estimate(V3, cluster, layout, work, 4096, "fp8", software(), Traffic(imbalance=i)).tpot_s
        for i in (1.0, 2.0)
    )
    assert even < hot
    assert Traffic().hottest(1, 256) == 1.0
    assert Traffic().hottest(64, 4) > Traffic().hottest(8, 32) > 1.0
    # Twenty-two thousand tokens leave no expert cold; one visits top_k of them.
    assert Traffic().hit_share(22_000, 8 / 256) == pytest.approx(1.0, abs=0.01)
    assert Traffic().hit_share(1, 8 / 256) == pytest.approx(8 / 256, rel=0.02)


def test_two_batch_overlap_hides_the_exchange():
    cluster = parse_gpus("32xH800")
    base = load_software("deepseek", cluster.gpu, "fp8")
    model = WorkerModel(V3, cluster, Worker(dp=32, ep=32), base, "fp8", Workload(4096, 1))
    apart = replace(model, software=replace(base, overlap=False))
    assert model.prompt_busy_s < apart.prompt_busy_s


def test_tokens_cross_to_the_nodes_that_the_router_allows():
    moe = V3.moe
    assert moe is not None
    gpu = load_gpu("H800")
    for nodes, visited in ((4, 3.11), (8, 3.93), (16, 5.69)):
        assert expected_nodes(moe, nodes) == pytest.approx(visited, abs=0.03)
        kernels = Kernels(gpu, software("H800").kernels, 8)
        times = [kernels.exchange(n, 7168, moe, 8 * nodes, 1.0, dedupe=True) for n in (10_000, 20_000)]
        # Bytes over the network: all but the own node's share of the copies.
        sent = 10_000 * 7168 * expected_nodes(moe, nodes) * (1 - 1 / nodes)
        assert times[1] - times[0] == pytest.approx(sent / (0.85 * 50e9), rel=1e-6)


@pytest.mark.parametrize(
    ("model", "gpus", "precision"),
    [
        ("deepseek-v3", "64xH100", "fp8"),
        ("deepseek-v3", "72xGB200", "fp4"),
        ("deepseek-v2-lite", "8xRTX4090", "fp8"),
        ("deepseek-r1-distill-qwen-7b", "8xL40S", "bf16"),
    ],
)
@pytest.mark.parametrize("mode", ["aggregated", "disaggregated"])
def test_plans_do_not_queue(model: str, gpus: str, precision: str, mode: str):
    spec, cluster = load_model_spec(model), parse_gpus(gpus)
    found = search_serving(spec, cluster, 4096, 1024, precision, "sglang", modes=(mode,))
    assert found.plans
    for plan in found.plans:
        assert plan.ttft_s < 20 * sum(plan.prefill_parts.values()), plan.layout
        # Whoever does not decode is in prefill: few of them.
        assert plan.requests_per_s * plan.ttft_s < 0.25 * plan.concurrency, plan.layout
    front = pareto(spec, cluster, 4096, 1024, precision, "sglang", modes=(mode,))
    assert all(p.ttft_s < 20 * sum(p.prefill_parts.values()) for p in front)


# -------------------------------------------------------------------------------------------------- links

UNKNOWN = "the network between nodes of RTX4090 is not known: give GB/s per GPU with --nic-gb-s"


def test_without_a_known_network_workers_stay_within_a_node():
    lite, cluster = load_model_spec("deepseek-v2-lite"), parse_gpus("16xRTX4090")
    assert cluster.nic_gb_s is None
    found = search_serving(lite, cluster, 1024, 256, "fp8", "sglang")
    assert found.plans
    assert all(p.layout.mode == "aggregated" and p.layout.decode.num_gpus <= 8 for p in found.plans)
    assert max(p.layout.num_gpus for p in found.plans) == 16
    assert {r.reason for r in found.rejected if "network" in r.reason} == {UNKNOWN}
    # Within a node prefill and decode workers may be apart.
    modes = ("disaggregated",)
    assert search_serving(lite, parse_gpus("8xRTX4090"), 1024, 256, "fp8", "sglang", modes=modes).plans
    # Workers of four in nodes of six: one in each.
    odd = search_serving(lite, parse_gpus("12xRTX4090", 6), 1024, 256, "fp8", "sglang", modes=("aggregated",))
    assert {p.layout.num_decode for p in odd.plans if p.layout.decode.num_gpus == 4} == {2}
    known = replace(cluster, gpu=replace(cluster.gpu, nic_gb_s=12.5))
    more = search_serving(lite, known, 1024, 256, "fp8", "sglang")
    assert any(p.layout.decode.num_gpus == 16 for p in more.plans)


def test_networks_and_links_that_nobody_knows_are_asked_for():
    work, across = Workload(1024, 256), "TP1 DPattn16 moeTP1 EP16"
    lite, cluster = load_model_spec("deepseek-v2-lite"), parse_gpus("16xRTX4090")
    engine = software("RTX4090")
    for text in (across, "P 1x(TP1 DPattn8 moeTP1 EP8) + D 1x(TP1 DPattn8 moeTP1 EP8)"):
        with pytest.raises(UserError, match=UNKNOWN):
            estimate(lite, cluster, parse_layout(text), work, 8, "fp8", engine)
    # Stages within a node need none.
    near = parse_layout("TP2 DPattn1 moeTP2 EP1 PP2")
    assert estimate(lite, cluster, near, work, 8, "fp8", engine).tpot_s < 0.1
    assert search_serving(V3, parse_gpus("64xRTX4090"), 1024, 256, "fp8", "sglang").advice == [UNKNOWN]
    small = search_serving(V3, parse_gpus("2xRTX4090"), 1024, 256, "fp8", "sglang").advice
    assert small[-1].startswith("64 x RTX4090 would hold it")
    assert small[-1].endswith(UNKNOWN)
    apart = replace(cluster.gpu, pcie_gb_s=None)
    found = search_serving(lite, replace(cluster, gpu=apart), 1024, 256, "fp8", "sglang")
    assert {p.layout.decode.num_gpus for p in found.plans} == {1}
    assert any("give the profile its pcie_gb_s" in r.reason for r in found.rejected)


# ------------------------------------------------------------------------------------------------- software


def test_generations_go_by_date():
    assert generation_of("sglang", "2025-11-10") == "2025"
    assert generation_of("sglang", "2026-03-25") == generation_of("sglang", "") == "2026"
    assert generation_of("trtllm", "not a date") == "2026"
    with pytest.raises(UserError, match="did you mean 'sglang'"):
        load_software("sglan", load_gpu("H100"), "fp8")
    with pytest.raises(UserError, match="unknown generation"):
        load_software("sglang", load_gpu("H100"), "fp8", "1999")


def test_gpus_without_curves_take_their_kin_s_and_say_so():
    assert load_software("sglang", load_gpu("H200"), "fp8").notes == ()
    assert "Hopper" in load_software("sglang", load_gpu("MI300X"), "fp8").notes[0]
    for gpu in ("A100", "H20", "L40S", "RTX4090", "MI300X"):
        found = search_serving(
            load_model_spec("deepseek-v2-lite"), parse_gpus(f"4x{gpu}"), 512, 128, "bf16", "vllm"
        )
        assert found.plans, gpu
        assert all(np.isfinite([e.ttft_s, e.tpot_s]).all() for e in found.plans)


def test_kin_reach_what_their_own_products_do():
    # FP8 was not measured on MI300X: as far below its peak as BF16.
    reach = software("MI300X").reach
    assert reach["fp8"] == reach["bf16"] == pytest.approx(0.514 / 0.803)
    experts = [
        worker_model(Worker(tp=8, ep=8), f"8x{gpu}", isl=4096).prompt_parts["experts"]
        for gpu in ("MI300X", "H200")
    ]
    assert experts[0] > experts[1]
    # Named Blackwell, but another chip than B200.
    hopper = software("H200").kernels
    for gpu in ("RTX5090", "RTX-PRO-6000", "L40S"):
        card = software(gpu)
        assert card.kernels == hopper
        assert card.reach["fp8"] == pytest.approx(0.7 / 0.803)
        assert "Hopper" in card.notes[0]
    assert software("B300").kernels == software("B200").kernels != hopper
    assert software("RTX5090", "fp4").reach["fp4"] < 1


@pytest.mark.parametrize("bad", [{"isl": 0, "osl": 1}, {"isl": 1, "osl": 1, "drafts": -1}])
def test_workloads_are_checked(bad: dict[str, int]):
    with pytest.raises(UserError):
        Workload(**bad)


# --------------------------------------------------------------------------------------------------- search


def test_search_ranks_what_fits_and_keeps_the_limits():
    found = search_serving(
        V3, parse_gpus("64xH100"), 4096, 1024, "fp8", "sglang", ttft_limit_s=2.0, tpot_limit_s=0.05
    )
    assert found.candidates > 2000
    output = [plan.output_tokens_per_s for plan in found.plans]
    assert output == sorted(output, reverse=True)
    assert all(p.ttft_s <= 2.0 and p.tpot_s <= 0.05 for p in found.plans)
    assert {p.layout.mode for p in found.plans} == {"aggregated", "disaggregated"}
    assert all(p.layout.num_gpus <= 64 for p in found.plans)
    assert all(sum(p.memory.by_category().values()) <= p.memory.total for p in found.plans)
    assert any("GiB more than" in r.reason for r in found.rejected)


def test_plans_are_plain_values():
    plan = run(DISAGGREGATED, 64, "24xH200").as_dict()
    assert json.loads(json.dumps(plan)) == plan
    assert plan["memory_gib"] == pytest.approx(sum(plan["memory_by_category_gib"].values()))
    assert {"ttft_ms", "tpot_ms", "tokens_per_s", "tokens_per_s_per_gpu", "limited_by"} <= plan.keys()


def test_prompts_longer_than_the_model_are_refused():
    with pytest.raises(UserError, match="exceed the 163840 positions"):
        run(TP8, 1, isl=163840)


def test_impossible_limits_are_explained():
    found = search_serving(V3, parse_gpus("16xH200"), 4096, 1024, "fp8", "sglang", tpot_limit_s=0.001)
    assert not found.plans
    assert any("TPOT at best" in r.reason for r in found.rejected)
    assert any("limits" in line for line in found.advice)


def test_the_front_trades_speed_for_throughput():
    front = pareto(V3, parse_gpus("16xH200"), 1024, 1024, "fp8", "sglang", modes=("aggregated",))
    per_user = [e.tokens_per_s_per_user for e in front]
    per_gpu = [e.output_tokens_per_s_per_gpu for e in front]
    assert len(front) > 5
    assert per_user == sorted(per_user, reverse=True)
    assert per_gpu == sorted(per_gpu)


def test_import_needs_no_torch():
    code = "import sys, whalepod.planner.serve_search as s; print(bool(s), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True False\n"


# ------------------------------------------------------------------------------------------------- accuracy


def test_published_runs_are_predicted():
    rows = serve_accuracy.serving_rows(SAMPLE)
    assert len(rows) == 13
    overall = serve_accuracy.serving_medians(rows)[0]
    assert overall["rows"] == 13
    assert overall["median_error_tpot_ms"] < 0.10
    assert overall["median_error_output_tok_s_per_gpu"] < 0.10
    assert overall["median_error_ttft_ms"] < 0.40
    assert all(r["error"] == pytest.approx(r["predicted"] / r["published"] - 1) for r in rows)


def test_published_points_of_large_deployments():
    points = serve_accuracy.published_points()
    assert sum(p["comparable"] for p in points) == 6
    for point in points:
        if point["comparable"]:
            assert abs(point["error"]) < 0.15, point["name"]
    # A batch that was computed from the figure itself proves nothing.
    assert [p["name"].split(" on ")[0] for p in points if p["error"] is None] == [
        "DeepSeek production decode EP144"
    ]


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("gpu", "b2000", "line 3 .*column 'gpu': unknown GPU"),
        ("layout", "", "column 'layout': layout '' must look like"),
        ("isl", "12a", "column 'isl': must be a whole number above 0, not '12a'"),
        ("concurrency", "0", "column 'concurrency'"),
        ("moe_quant", "nvfp4", "this GPU has no FP4"),
    ],
)
def test_bad_cells_are_named(tmp_path: Path, column: str, value: str, message: str):
    lines = [line for line in SAMPLE.read_text().splitlines() if "cfg81" in line or line.startswith("id")]
    names, cells = lines[0].split(","), lines[1].split(",")
    cells[names.index(column)] = value
    bad = tmp_path / "bad.csv"
    bad.write_text("\n".join([lines[0], lines[1], ",".join(cells)]))
    with pytest.raises(UserError, match=message) as error:
        serve_accuracy.serving_rows(bad)
    assert "\n" not in str(error.value)


def test_unknown_engines_and_blank_cells_are_predicted_with_a_note(tmp_path: Path):
    table = tmp_path / "runs.csv"
    table.write_text(f"gpu,engine,isl,osl,concurrency,layout\nh200,someserve,1024,1024,8,{TP8}\n")
    (row,) = serve_accuracy.serving_rows(table)
    assert row["predicted_tpot_ms"] > 1
    assert row["error_tpot_ms"] is None
    assert row["error"] is None
    assert any("someserve" in note for note in row["notes"])
    assert any("precision" in note for note in row["notes"])


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"a,b\n1,2\n", b""])
def test_tables_that_are_none(tmp_path: Path, content: bytes):
    table = tmp_path / "runs.csv"
    table.write_bytes(content)
    with pytest.raises(UserError):
        serve_accuracy.serving_rows(table)
    with pytest.raises(UserError, match="cannot read"):
        serve_accuracy.serving_rows(tmp_path / "absent.csv")


# ------------------------------------------------------------------------------------- this engine, on CPUs


def calibrated(factor: float = 1.0) -> Gpu:
    """A CPU whose products run at 100 GFLOP/s a row's worth of k / (k + 64), whose steps follow a formula."""

    def rate(rows: int, inner: int) -> float:
        return 1e9 * min(rows, 16) * inner / (inner + 64) / factor

    def step(dense: int, expert: int, experts: int, requests: int, tp: int = 1, ep: int = 1) -> EngineStep:
        hit = 4 * experts * (1 - 0.75**requests) * expert
        seconds = 1e-3 + 2e-4 * (dense + expert) + 3e-4 * expert + 1e-5 * hit + 5e-5 * (requests - 1)
        seconds += 1e-4 * (dense + expert) * (tp > 1) + (2e-4 + 5e-4 * expert) * (ep > 1)
        return EngineStep(dense, expert, experts, requests, tp, ep, factor * seconds)

    sizes = [
        (2, 0, 1, 1),
        (8, 0, 1, 1),
        (2, 6, 1, 1),
        (2, 6, 8, 1),
        (2, 0, 1, 16),
        (8, 0, 1, 16),
        (2, 6, 8, 16),
    ]
    shared = [(2, 0, 1, 1), (8, 0, 1, 1), (2, 6, 4, 1)]
    served = Served(
        "bf16",
        tuple(Thin(m, k, 512, rate(m, k)) for m in (1, 4, 16, 512) for k in (256, 1024)),
        tuple(Decoded(n, h, w, 1e10 / factor) for n in (1, 8) for h, w in ((4, 80), (4, 576), (16, 576))),
        (
            *(step(*size) for size in sizes),
            *(step(*size, tp=2) for size in shared),
            *(step(*size, ep=2) for size in shared[::2]),
        ),
    )
    measured = Measured(
        date="2026-01-01", machine="a machine", torch="2.13.0", peak_tflops={"bf16": 0.1}, peak_gb_s=10.0,
        stream_gb_s=8.0 / factor, gather_gb_s=5.0, optimizer_gb_s=5.0, dispatch_us=2.0,
        products=(Product("bf16", 256, 256, 256, 5e10),),
        attention=tuple(Attended("bf16", t, 192, 1e10 / factor, 1e10) for t in (128, 512)),
        collectives=tuple(
            Collective(op, 2, size, factor * (2e-5 + size / 1e9))
            for op in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send")
            for size in (2**12, 2**20)
        ),
        served=served,
    )  # fmt: skip
    base = load_gpu("cpu")
    return replace(base, tflops={"bf16": 0.1, "fp32": 0.05}, memory_tb_s=0.01, measured=measured)


def test_what_surrounds_arithmetic_is_recovered_from_steps_that_follow_the_formula():
    steps = calibrated().measured.served.steps  # pyright: ignore
    found = around(steps)
    assert found.step == pytest.approx(1e-3)
    assert found.layer == pytest.approx(2e-4)
    assert found.experts == pytest.approx(3e-4)
    assert found.expert == pytest.approx(1e-5)
    assert found.request == pytest.approx(5e-5)
    assert found.request_layer == pytest.approx(0, abs=1e-9)
    assert found.tp == pytest.approx((0, 1e-4, 0), abs=1e-9)
    assert found.ep == pytest.approx((2e-4, 0, 5e-4))


def test_products_take_what_was_measured_and_a_cpu_twice_as_fast_half():
    gpu = calibrated()
    own = load_software("whalepod", gpu, "bf16")
    kernels = MeasuredKernels(gpu, own.kernels, 2)
    assert kernels.gemm(1, 256, 512, "bf16") == pytest.approx(2 * 256 * 512 / (1e9 * 256 / 320))
    assert kernels.gemm(512, 1024, 512, "bf16") == pytest.approx(2 * 512 * 1024 * 512 / (16e9 * 1024 / 1088))
    threads = replace(gpu, tflops={"bf16": 0.2, "fp32": 0.1}, memory_tb_s=0.02)
    assert MeasuredKernels(threads, own.kernels, 2).gemm(8, 256, 512, "bf16") == pytest.approx(
        kernels.gemm(8, 256, 512, "bf16") / 2
    )
    spec = load_model_spec("v3-mini")
    slow, fast = (
        sum(
            pass_parts(
                Step(spec, Worker(), Cluster(each, 1, 1), load_software("whalepod", each, "bf16"), "bf16"),
                *(4, 128, [(0, 64)], 5, 68),
            ).values()
        )
        for each in (calibrated(2.0), gpu)
    )
    assert slow == pytest.approx(2 * fast, rel=0.02)


def test_serving_is_planned_on_calibrated_cpus_and_on_no_others():
    spec, gpu = load_model_spec("v3-mini"), calibrated()
    found = search_serving(spec, Cluster(gpu, 2, 2), 128, 64, "bf16", "whalepod")
    shapes = {(plan.layout.decode.tp, plan.layout.decode.ep) for plan in found.plans}
    assert {(1, 1), (2, 1), (1, 2)} <= shapes
    best = found.plans[0]
    assert best.output_tokens_per_s > 0
    assert best.memory.framework < GIB
    for engine, cpu, precision, message in [
        ("whalepod", load_gpu("cpu"), "bf16", "whalepod calibrate"),
        ("sglang", gpu, "bf16", "--engine whalepod"),
        ("whalepod", gpu, "fp32", "calibrated so"),
    ]:
        with pytest.raises(UserError, match=message):
            load_software(engine, cpu, precision)


def test_a_prediction_plays_the_scheduler():
    spec, gpu = load_model_spec("v3-mini"), calibrated()
    config = EngineConfig("", device="cpu", dtype="bf16", threads_per_worker=1)
    one, eight = (predict(config, spec, [(64, 16)] * 8, flight, gpu) for flight in (1, 8))
    assert one.output_tokens_per_s == pytest.approx(8 * 16 / one.seconds)
    # Alone, a request takes its prompt and fifteen steps.
    assert one.tpot_s is not None
    assert one.seconds == pytest.approx(8 * (one.ttft_s + 15 * one.tpot_s))
    assert eight.output_tokens_per_s > one.output_tokens_per_s
    assert eight.ttft_s > one.ttft_s
    assert sum(eight.parts.values()) == pytest.approx(eight.seconds)
    two = predict(replace(config, layout=serving_layout(dp=2, ep=2)), spec, [(64, 16)] * 8, 8, gpu)
    assert two.tpot_s is not None
    assert two.parts["experts"] < eight.parts["experts"]
    for change, message in [
        ({"speculate": True}, "drafts"),
        ({"layout": serving_layout(dp=4)}, "share 2 cores"),
        ({"dtype": "fp32"}, "calibrated so"),
    ]:
        with pytest.raises(UserError, match=message):
            predict(replace(config, **change), spec, [(64, 16)], 1, gpu)
