"""The engine over several ranks: under mixed load, whatever the layout, the tokens of a model alone."""

from __future__ import annotations

import os
import random
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import parity
from harness import run_ranks

from whalepod.models.transformer import Transformer, init_weights
from whalepod.parallel.inference import spread, whole
from whalepod.parallel.mesh import make_mesh, open_world
from whalepod.parallel.parallelize import seeded
from whalepod.serve.core import CoreConfig, Job
from whalepod.serve.fleet import Fleet
from whalepod.serve.request import Request, Sampling
from whalepod.spec.errors import UserError
from whalepod.spec.layout import Layout
from whalepod.spec.model import ModelSpec

SEED = 3
LAYOUTS: dict[int, list[dict[str, Any]]] = {
    2: [
        {"tp": 2},
        {"tp": 2, "ep": 2},
        {"pp": 2},
        {"dp_shard": 2, "ep": 2},
        {"dp_shard": 2, "ep": 2, "exchange": "flat"},
        {"dp_replicate": 2},
    ],
    4: [
        {"dp_shard": 2, "tp": 2, "ep": 4},
        {"dp_shard": 4, "ep": 4, "exchange": "two_hop", "devices_per_node": 2},
        {"pp": 2, "tp": 2},
        {"pp": 2, "dp_shard": 2, "ep": 2},
    ],
}
CONFIG = CoreConfig(num_pages=40, page_size=4, max_running=5, max_step_tokens=19, speculate=True)


def spec_of(model: str) -> ModelSpec:
    # A wide initial range, or tied logits would decide; few tokens, so that drafts are right now and then.
    return replace(parity.models()[model], initializer_range=0.15, vocab_size=16)


def arrivals() -> list[tuple[int, Request]]:
    draw = random.Random(SEED)
    common = [draw.randrange(16) for _ in range(24)]
    out = []
    for index in range(10):
        own = [draw.randrange(16) for _ in range(draw.randint(1, 30))]
        sampling = Sampling(1.0, top_p=0.9, seed=index) if index % 3 == 2 else Sampling()
        prompt = tuple(common[: draw.choice([0, 24])] + own)
        out.append(
            (draw.randint(0, 12), Request(prompt, draw.randint(1, 16), sampling, logprobs=index % 2 or None))
        )
    return sorted(out, key=lambda each: each[0])


def serve(fleet: Fleet) -> list[tuple[list[int], str | None]]:
    """On the first rank: what everyone got. One is given up on the way."""
    left, jobs, step = arrivals(), [], 0
    while left or not fleet.is_idle:
        while left and left[0][0] <= step:
            jobs.append(fleet.add(left.pop(0)[1]))
        fleet.step()
        fleet.check_integrity()
        if step == 14:
            given_up = fleet.add(Request((1, 2, 3), 50))
        if step == 17:
            fleet.end(given_up, "abort")
        step += 1
    fleet.step()  # with nothing to do
    assert fleet.stats().pages_in_use == 0
    fleet.stop()
    return [(written(job), job.reason) for job in jobs]


def written(job: Job) -> list[int]:
    return job.sequence.tokens[job.sequence.num_prompt :]


def run_rank(model: str) -> list[Any]:
    device, found, groups = torch.device("cpu"), [], {}
    with open_world(device):
        for axes in cases(int(os.environ["WORLD_SIZE"]), model):
            layout = Layout(
                **axes, global_batch=axes.get("dp_shard", 1) * axes.get("dp_replicate", 1), precision="fp32"
            )
            mesh = make_mesh(layout, device, groups)
            spec = spec_of(model)
            fleet = Fleet(spread(spec, mesh, torch.float32, seeded(spec, SEED)), CONFIG)
            if mesh.is_first:
                found.append(serve(fleet))
            else:
                fleet.follow()
            fleet.check_integrity()
            assert all(core.is_idle for core in fleet.cores)
    return found


def cases(num_ranks: int, model: str) -> list[dict[str, Any]]:
    return [axes for axes in LAYOUTS[num_ranks] if model == "V3-like" or axes.get("ep", 1) == 1]


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    out = {}
    for name in ("V3-like", "dense"):
        model = Transformer(spec_of(name))
        init_weights(model, SEED)
        inference = whole(model.eval().requires_grad_(False), make_mesh(Layout(), torch.device("cpu")))
        out[name] = []
        for _, request in arrivals():
            fleet = Fleet(inference, CoreConfig(num_pages=20))
            job = fleet.add(request)
            while not fleet.is_idle:
                fleet.step()
            out[name].append((written(job), job.reason))
    return out


@pytest.mark.slow
@pytest.mark.parametrize(("num_ranks", "model"), [(2, "V3-like"), (4, "V3-like"), (2, "dense")])
def test_every_layout_writes_what_one_device_writes(
    alone: dict[str, Any], num_ranks: int, model: str
) -> None:
    first, *others = run_ranks(run_rank, num_ranks, model, timeout_s=400)
    assert all(found == [] for found in others)
    for axes, found in zip(cases(num_ranks, model), first, strict=True):
        assert found == alone[model], axes


def test_what_cannot_be_served_is_said() -> None:
    mesh = make_mesh(Layout(), torch.device("cpu"))
    spec = spec_of("V3-like")
    with pytest.raises(UserError, match=r"layout\.cp 2: serving cuts no sequences"):
        spread(spec, replace(mesh, layout=Layout(cp=2)), torch.float32, seeded(spec, 0))


def counted(axes: dict[str, Any], batch: int, context: int, prefill: int) -> dict[str, Any]:
    """Bytes and calls of collectives in a real decode and a real prefill step of the first rank."""
    from whalepod.dryrun.serving import one_pass, runs_of
    from whalepod.serve.paged import PagedCache

    spec = spec_of("V3-like")
    replicas = axes.get("dp_shard", 1) * axes.get("dp_replicate", 1)
    with open_world(torch.device("cpu")):
        mesh = make_mesh(Layout(**axes, global_batch=replicas), torch.device("cpu"))
        inference = spread(spec, mesh, torch.bfloat16, seeded(spec, SEED))
        pages = batch * -(-(context + 1) // 64) + -(-prefill // 64)
        cache = PagedCache(inference, pages, 64, mtp=False)
        found = {}
        for kind, runs in runs_of(batch, context, prefill).items():
            mesh.traffic.bytes.clear()
            mesh.traffic.calls.clear()
            with torch.inference_mode():
                one_pass(inference, cache, runs)
            found[kind] = (dict(mesh.traffic.calls), dict(mesh.traffic.bytes))
        weights = sum(p.numel() for part in inference.stages.values() for p in part.parameters())
    return found | {"parameters": weights}


@pytest.mark.slow
@pytest.mark.parametrize("axes", [{"tp": 2}, {"pp": 2}], ids=parity.label)
def test_the_dry_run_counts_what_a_real_step_sends(axes: dict[str, Any]) -> None:
    from whalepod.dryrun.serving import Load, measure_serving

    real = run_ranks(counted, 2, axes, 3, 100, 70, timeout_s=200)
    for rank in range(2):
        dry = measure_serving(spec_of("V3-like"), Layout(**axes), Load(3, 100, 70), rank, on_gpu=False)
        assert dry.parameters == real[rank]["parameters"]
        assert dry.weights >= 2 * dry.parameters
        for step in dry.steps:
            calls, sent = real[rank][step.kind]
            assert {k: v for k, v in step.counts.calls.items() if v} == calls
            assert {k: v for k, v in step.counts.bytes.items() if v} == sent
