"""The dry run by itself: routing, reuse against the plain way, what it finds, bad input."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import whalepod.dryrun.findings as module
from whalepod.cli import main
from whalepod.dryrun.replay import repeats
from whalepod.dryrun.role import enough, measure
from whalepod.dryrun.roles import dry_run
from whalepod.dryrun.routing import draw_picks
from whalepod.parallel import sharding
from whalepod.parallel.stage import Stage
from whalepod.planner.in_flight import held
from whalepod.planner.search import TrainingJob
from whalepod.planner.software import load_software
from whalepod.spec.errors import UserError
from whalepod.spec.hardware import parse_gpus
from whalepod.spec.layout import Layout
from whalepod.spec.model import MoE
from whalepod.spec.presets import load_model_spec
from whalepod.spec.run import LoRAConfig, RunConfig, make_run

SMALL: dict[str, Any] = {
    **{"num_hidden_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128},
    **{
        "vocab_size": 256,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
    },
    **{"q_lora_rank": 32, "moe_intermediate_size": 32, "n_routed_experts": 16, "num_experts_per_tok": 4},
    **{"n_group": 4, "topk_group": 2, "first_k_dense_replace": 1},
}


def config(length: int = 32, **axes: Any) -> RunConfig:
    layout = Layout(**axes)
    values = {f.name: getattr(layout, f.name) for f in fields(layout)}
    model = {"preset": "v3-mini", **SMALL}
    return make_run({"model": model, "layout": values, "data": {"sequence_length": length}})


def v3_experts() -> MoE:
    moe = load_model_spec("deepseek-v3").moe
    assert moe is not None
    return moe


def test_balanced_routing_gives_every_expert_its_share() -> None:
    moe = v3_experts()
    ids = draw_picks(moe, 4096, ep=64).numpy()
    counts = np.bincount(ids.ravel(), minlength=256)
    assert ids.shape == (4096, 8)
    assert 127 <= counts.min() <= counts.max() <= 129
    assert all(len(set(row)) == 8 for row in ids[:200])
    groups = [len(set(row // 32)) for row in ids]
    assert max(groups) <= moe.topk_group  # V3's tokens reach four groups at most
    assert np.mean(groups) > 3.5


def test_imbalance_is_that_of_the_first_rank() -> None:
    counts = np.bincount(draw_picks(v3_experts(), 4096, ep=64, imbalance=1.5).numpy().ravel(), minlength=256)
    mean = counts.sum() / 64
    assert counts[:4].sum() / mean == pytest.approx(1.5, rel=0.01)
    assert counts[4:].reshape(-1, 4).sum(1).max() < 1.1 * mean


@pytest.mark.parametrize("axes", [{}, {"dp_shard": 4}, {"dp_shard": 2, "ep": 2, "recompute": "full"}])
def test_adapters_leave_two_bytes_of_a_frozen_weight(axes: dict[str, Any]) -> None:
    whole = config(precision="bf16", micro_batch=1, global_batch=4, **axes)
    tuned = whole.model_copy(update={"lora": LoRAConfig(r=8, modules=("o_proj",))})
    spec = whole.model_spec()
    a, b = (measure(each, spec, 0, on_gpu=True, imbalance=1.0) for each in (whole, tuned))
    blocks = spec.num_hidden_layers
    adapters = blocks * 8 * (spec.num_attention_heads * SMALL["v_head_dim"] + spec.hidden_size)
    shards = axes.get("dp_shard", 1)
    assert b.parameters == a.parameters + adapters // shards
    assert 0 <= b.state["optimizer"] - 12 * adapters // shards <= 64  # masters and moments; Adam's counts
    copies = 2 * adapters if shards == 1 else 0  # FSDP2 makes the BF16 ones as it gathers
    assert 0 <= b.state["weights"] - 2 * a.parameters - copies <= 1024  # buffers
    assert b.peak < a.peak


REUSED: list[dict[str, Any]] = [
    {"micro_batch": 1, "global_batch": 7},
    {"dp_shard": 4, "global_batch": 24},
    {"dp_shard": 4, "zero": 1, "global_batch": 24},
    {"dp_shard": 2, "zero": 2, "ep": 2, "global_batch": 12},
    {"dp_replicate": 2, "global_batch": 12},
    {"tp": 2, "global_batch": 6, "recompute": "full"},
    {"dp_shard": 8, "tp": 2, "ep": 16, "devices_per_node": 4, "global_batch": 48, "recompute": "selective"},
    {"pp": 2, "global_batch": 12},
    {"pp": 4, "dp_shard": 2, "ep": 2, "zero": 1, "global_batch": 40},
    {"pp": 2, "dp_shard": 2, "global_batch": 24, "recompute": "selective"},
    {"pp": 2, "schedule": "interleaved", "global_batch": 16},
    {"pp": 2, "schedule": "interleaved_zero_bubble", "global_batch": 16},
    {"pp": 2, "schedule": "zbv", "dp_shard": 2, "zero": 1, "global_batch": 24},
    {"pp": 2, "schedule": "dualpipev", "tp": 2, "global_batch": 14},
    {"pp": 2, "schedule": "interleaved", "dp_shard": 2, "zero": 1, "global_batch": 32, "recompute": "full"},
    {"pp": 4, "dp_replicate": 2, "global_batch": 24, "recompute": "selective"},
    {"pp": 2, "schedule": "zbv", "dp_shard": 2, "ep": 2, "zero": 1, "global_batch": 32},
]


def test_passes_that_are_played_back_do_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of twelve micro-batches go through the layers."""
    ran = []
    forward = Stage.forward
    monkeypatch.setattr(Stage, "forward", lambda *a, **k: (ran.append(1), forward(*a, **k))[1])
    job = config(pp=2, global_batch=12)
    measure(job, job.model_spec(), 0)
    assert len(ran) == 2


@pytest.mark.parametrize("axes", REUSED, ids=str)
def test_reuse_is_exact(axes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of which not all passes run is counted as the whole is, on every pipeline rank."""
    job = config(**axes)
    layout, spec = job.make_layout(), job.model_spec()
    assert enough(layout) < layout.accumulation_steps
    for place in range(layout.pp):
        rank = place * (layout.num_devices // layout.pp)
        plain, reused = measure(job, spec, rank, plainly=True), measure(job, spec, rank)
        assert reused.counts == plain.counts
        assert (reused.state, reused.peak_at) == (plain.state, plain.peak_at)
        if repeats(layout):
            assert (reused.peak, reused.categories) == (plain.peak, plain.categories)
            with monkeypatch.context() as patch:  # as if there were too many to play them all
                patch.setattr("whalepod.dryrun.role.PLAYED", 0)
                reused = measure(job, spec, rank)
            assert reused.counts == plain.counts
        assert reused.operations < plain.operations
        # Ids of tokens and targets, and a few losses of each micro-batch, are there all the time.
        ids = (layout.accumulation_steps - enough(layout)) * layout.micro_batch * (32 + 2) * 8
        assert 0 <= plain.peak - reused.peak <= 4 * ids


@pytest.mark.parametrize(("pp", "micro_batches"), [(2, 6), (4, 40), (8, 120), (8, 20), (4, 15), (8, 8)])
def test_an_interleaved_step_is_cut_to_whole_rounds_of_its_own(pp: int, micro_batches: int) -> None:
    """With rounds of another length more would be in flight than ever is."""
    layout = Layout(pp=pp, schedule="interleaved", stages_per_rank=2, global_batch=micro_batches)
    held_in_all = held("interleaved", pp, 2, micro_batches)
    assert enough(layout) <= micro_batches
    assert (held("interleaved", pp, 2, enough(layout)) == held_in_all).all()


def test_rows_that_are_only_passed_on_are_not_kept() -> None:
    """Over two hops selective recomputation keeps what it does over one, and the ids on the first."""
    one, two = (
        config(dp_shard=16, ep=16, global_batch=32, recompute="selective", devices_per_node=n)
        for n in (16, 4)
    )
    kept = [measure(job, job.model_spec(), 0).categories["activations"] for job in (one, two)]
    assert kept[0] < kept[1] < 1.03 * kept[0]


def test_a_whole_job_of_many_ranks() -> None:
    job = config(pp=2, dp_shard=512, tp=4, ep=16, zero=1, global_batch=2048)
    run = dry_run(job, parse_gpus("4096xH800"), roles="first")
    (role,) = run.roles
    assert run.fits
    assert run.same == 2048
    assert role.stages[0].startswith("embedding")
    axes = {axis for axis, _ in role.counts.bytes}
    assert {"tp", "pp", "fsdp", "ep_node", "ep_rail", "world"} <= axes
    assert role.peak >= sum(role.state.values())
    assert sum(role.categories.values()) == role.peak


def without(end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sharding table that forgets one kind of weight."""
    table = tuple(row for row in sharding.TABLE if row[0] != end)
    assert len(table) < len(sharding.TABLE)
    monkeypatch.setattr(sharding, "TABLE", table)


def test_a_weight_left_whole_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing breaks without this line, and the loss would be wrong."""
    monkeypatch.setattr(module, "LARGE", 1000)
    job, cluster = config(tp=2, ep=2, global_batch=2), parse_gpus("2xH800")
    assert not dry_run(job, cluster).findings
    without("embed_tokens.weight", monkeypatch)
    (found,) = dry_run(job, cluster).findings
    assert (found.kind, found.where) == ("replicated", "embed_tokens.weight")
    assert "sharding.TABLE" in found.remedy


def test_a_layer_that_does_not_fit_together_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    without("self_attn.o_proj.weight", monkeypatch)
    with pytest.raises(UserError, match=r"breaks at layers\.0\.self_attn\.o_proj, forward: "):
        dry_run(config(tp=2, global_batch=2), parse_gpus("2xH800"))


def test_a_layer_left_unsharded_is_named() -> None:
    layout = Layout(dp_shard=4, global_batch=4)
    job = config(dp_shard=4, global_batch=4)
    sharded = measure(job, job.model_spec(), 0)
    name = "layers.2.mlp.experts.down"
    whole = [replace(h, local=prod(h.shape)) if h.name == name else h for h in sharded.held]
    asked = TrainingJob(job.model_spec(), parse_gpus("4xH800"), load_software("whalepod"), 4, 32)
    assert [*module.findings(asked, layout, [sharded], [1.0], [])] == []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "LARGE", 1000)
        assert [*module.findings(asked, layout, [sharded], [1.0], [])] == []
        (found,) = module.findings(asked, layout, [replace(sharded, held=tuple(whole))], [1.0], [])
    assert (found.kind, found.where) == ("unsharded", name)


def test_what_does_not_fit_is_said_with_a_remedy() -> None:
    values = {"micro_batch": 8, "global_batch": 8}
    job = make_run({"model": "v3-mini", "layout": values, "data": {"sequence_length": 1024}})
    cluster = parse_gpus("1xH800")
    small = replace(cluster, gpu=replace(cluster.gpu, memory_gib=1.5))
    run = dry_run(job, small)
    assert not run.fits
    (found,) = [f for f in run.findings if f.kind == "memory"]
    assert "GiB" in found.problem
    assert "saves" in found.remedy or "whalepod plan" in found.remedy


def write_run(folder: Path) -> Path:
    from whalepod.spec.run import dump_run

    path = folder / "run.yaml"
    path.write_text(dump_run(config(pp=2, dp_shard=2, ep=2, global_batch=16)))
    return path


def test_json_picture_and_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_run(tmp_path)
    picture, trace = tmp_path / "memory.png", tmp_path / "trace.json"
    args = ["dryrun", str(path), "--gpus", "4xH800", "--roles", "first", "--json"]
    assert main([*args, "--picture", str(picture), "--trace", str(trace)]) == 0
    doc = json.loads(capsys.readouterr().out)
    (role,) = doc["roles"]
    assert {"rank", "memory_gib", "memory_by_category_gib", "peak_at", "flops", "collectives"} <= set(role)
    assert set(role["collectives"][0]) == {"axis", "op", "count", "bytes"}
    assert role["memory_gib"] == pytest.approx(sum(role["memory_by_category_gib"].values()))
    assert doc["step_s"] > 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    events = json.loads(trace.read_text())["traceEvents"]
    assert {e["ph"] for e in events} == {"M", "X", "C"}
    assert main(["dryrun", str(path), "--gpus", "4xH800", "--roles", "first"]) == 0
    out = capsys.readouterr().out
    assert "reduce_scatter" in out
    assert "fits" in out


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--gpus", "8xH800"], "--gpus 4xH800"),
        (["--gpus", "4xH8000"], "H800"),
        (["--gpus", "4xH800", "--rank", "4"], "from 0 to 3"),
        (["--gpus", "4xH800", "--roles", "al"], "all"),
        (["--gpus", "4xH800", "--imbalance", "0.5"], "--imbalance"),
        (["layout.tp=3", "layout.dp_shard=2", "--gpus", "12xH800"], "layout"),
        (["data.sequence_length=100000000", "--gpus", "4xH800"], "positions"),
        (["layout.tpp=3", "--gpus", "4xH800"], "layout.tpp"),
        (["--gpus", "4xH800", "--picture", "/dev/null/x.png", "--roles", "first"], "cannot write"),
    ],
    ids=str,
)
def test_bad_input_is_one_line(
    args: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["dryrun", str(write_run(tmp_path)), *args]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
