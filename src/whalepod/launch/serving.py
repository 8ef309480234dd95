"""A deployment as commands of vLLM or SGLang, one script a pool of workers, and as a LeaderWorkerSet."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

from whalepod.launch.job import Job
from whalepod.launch.names import SERVING
from whalepod.launch.render import render
from whalepod.launch.training import on_nodes, pods, sbatch
from whalepod.planner.serve_layout import Worker
from whalepod.planner.serve_software import Engine
from whalepod.planner.serving import ServeEstimate
from whalepod.spec.errors import UserError

IMAGES = {"vllm": "vllm/vllm-openai:v0.32.0", "sglang": "lmsysorg/sglang:v0.5.23"}
LISTEN, ROUTER, PORT = 30000, 8000, 29500
_DISPATCH = 128
"""Tokens of a rank that SGLang lets DeepEP's low-latency mode dispatch, unless told otherwise."""


@dataclass(frozen=True)
class Pool:
    """`count` servers that are alike, each of `nodes` nodes with `per_node` GPUs."""

    name: str
    worker: Worker
    count: int
    nodes: int
    per_node: int

    @property
    def script(self) -> str:
        return f"{self.name}.sh"


def pools(job: Job) -> list[Pool]:
    """`serve`, or `prefill` and `decode`."""
    layout = job.deployment
    named = [("serve" if layout.prefill is None else "decode", layout.decode, layout.num_decode)]
    if layout.prefill is not None:
        named.insert(0, ("prefill", layout.prefill, layout.num_prefill))
    return [
        Pool(name, worker, count, max(1, worker.num_gpus // job.per_node), min(worker.num_gpus, job.per_node))
        for name, worker, count in named
    ]


def check(engine: str, job: Job) -> None:
    """Raises UserError naming what an engine cannot do, and the nearest that it can."""
    layout, w = job.deployment, job.deployment.decode
    if job.serve.drafts and w.pp > 1:
        raise UserError(
            "engines do not speculate over pipeline stages: plan again with --pp 1 or without --mtp"
        )
    if engine == "sglang":
        return
    if layout.prefill is not None:
        raise UserError(
            "vLLM needs a proxy that it does not bring to divide prefill from decode: plan again with "
            "--mode aggregated, or use --on sglang"
        )
    if w.ep not in (1, w.stage_gpus):
        raise UserError(
            f"vLLM spreads experts over all TP x DP = {w.stage_gpus} GPUs of a stage or none, not over EP "
            f"{w.ep} x moeTP {w.moe_tp}: plan again with --ep {w.stage_gpus}, or use --on sglang"
        )


def scripts(job: Job, name: str, engine: Engine, found: ServeEstimate, comment: str) -> dict[str, str]:
    """A script for the nodes of each pool, and SGLang's router where there is more than one server."""
    check(name, job)
    all_pools = pools(job)
    alone = len(all_pools) == 1 and all_pools[0].count == all_pools[0].nodes == 1
    common = {"comment": comment, "listen": LISTEN, "host": "127.0.0.1" if alone else "0.0.0.0"}
    texts = {}
    for pool in all_pools:
        values = {**on_nodes(job), "name": f"{job.name}-{pool.name}", "nodes": pool.nodes, "port": PORT}
        values |= {"per_node": pool.per_node, "count": pool.count, "pool": pool.name, "engine": name}
        values |= {"model": job.model, "environment": environment(name, pool, job, engine, found)}
        lines = [shlex.join(parts) for parts in flags(name, pool, job, engine, found)]
        texts[pool.script] = render("serve.sh", flags=lines, **values, **common)
    if name == "sglang" and sum(pool.count for pool in all_pools) > 1:
        split = job.deployment.prefill is not None
        texts["router.sh"] = render("router.sh", pools=all_pools, disaggregated=split, **common)
    return texts


def slurm(job: Job, comment: str, folder: str, texts: dict[str, str], engine: str) -> dict[str, str]:
    """The scripts with a batch script for each pool: an array of as many jobs as it has workers."""
    files = dict(texts)
    for pool in pools(job):
        more = {"count": pool.count, "nodes": pool.nodes, "per_node": pool.per_node, "port": PORT}
        more |= {"name": f"{job.name}-{pool.name}", "whole": pool.per_node == job.cluster.gpus_per_node}
        file = f"{pool.name}.sbatch"
        files[file] = sbatch(job, comment, folder, pool.script, file, image=job.image or "", **more)
    return files


def lws(job: Job, comment: str, texts: dict[str, str], engine: str) -> dict[str, str]:
    """One file: the scripts, a LeaderWorkerSet for each pool, a router where one is needed, a service."""
    image = IMAGES[engine]
    sets = [
        {
            **{"name": pool.name, "script": pool.script, "count": pool.count, "nodes": pool.nodes},
            "job": pods(job, image, f"{job.name}-{pool.name}", pool.nodes, pool.per_node),
        }
        for pool in pools(job)
    ]
    urls = {  # of leaders, by the headless service that comes with each set
        f"{s['name'].upper()}_URLS": " ".join(
            f"http://{s['job'].name}-{i}.{s['job'].name}:{LISTEN}" for i in range(s["count"])
        )
        for s in sets
    }
    routed = "router.sh" in texts
    router = pods(job, image, job.name, 1, 1) if routed else None
    values: dict[str, Any] = {
        "pools": sets,
        "router": router and replace(router, resource=None),
        "urls": {**urls, "HOST": "0.0.0.0"},
        "door": job.name,
        "door_port": ROUTER if routed else LISTEN,
        "listen": LISTEN,
    }
    file = "lws.yaml"
    return {file: render(file, comment=comment, job=pods(job, image), texts=texts, file=file, **values)}


def flags(name: str, pool: Pool, job: Job, engine: Engine, found: ServeEstimate) -> Iterator[list[str]]:
    """The worker's place in the layout and what it was planned for, in the engine's words, an option each."""
    for key, value in settings(name, pool, job, engine, found).items():
        option = SERVING[key][name]
        yield [option] if value is True else [option, str(value)]
    drafts = job.serve.drafts
    if name == "sglang" and drafts:
        yield ["--speculative-algorithm", "EAGLE"]
        yield ["--speculative-eagle-topk", "1"]
        yield ["--speculative-num-draft-tokens", str(drafts + 1)]
    if name == "sglang" and exchanges(pool.worker, engine):
        mode = {"serve": "auto", "prefill": "normal", "decode": "low_latency"}[pool.name]
        yield ["--deepep-mode", mode]


def settings(name: str, pool: Pool, job: Job, engine: Engine, found: ServeEstimate) -> dict[str, Any]:
    """Values by the rows of `names.SERVING`; only what is not the engine's own default."""
    serve, w, vllm = job.serve, pool.worker, name == "vllm"
    sizes = {"tp": w.tp if vllm else w.stage_gpus, "pp": w.pp, "dp": w.dp, "ep": w.ep}
    values: dict[str, Any] = {key: size for key, size in sizes.items() if size > 1}
    if vllm and w.ep > 1:
        values["ep"] = True
    if extra := w.redundant(job.spec):
        values["balance"] = True
        values["redundant"] = json.dumps({"num_redundant_experts": extra}) if vllm else extra
    if exchanges(w, engine):
        values["exchange"] = "deepep_low_latency" if vllm else "deepep"
        if engine.overlap:
            values["overlap"] = True
    batch = ceil(found.batch if pool.name != "prefill" else max(w.dp, 1))
    ranks = 1 if vllm else w.dp
    if pool.name != "prefill":
        values["requests"] = ceil(batch / w.dp) * ranks
    values["chunk"] = engine.chunk_tokens * ranks
    if vllm:
        values["context"] = "auto"  # what fits the cache
    if engine.cache == "fp8":
        values["cache"] = "fp8" if vllm else "fp8_e4m3"
    if serve.precision == "fp8" and job.spec.quantization is None:
        values["quantization"] = "fp8"
    if serve.drafts:
        guess = {"method": "mtp", "num_speculative_tokens": serve.drafts}
        values["drafts"] = json.dumps(guess) if vllm else serve.drafts
    if pool.name != "serve":
        values["mode"] = pool.name
    return values


def exchanges(worker: Worker, engine: Engine) -> bool:
    """Whether tokens are sent to their experts alone, as the planner assumes."""
    return worker.dp > 1 and worker.moe_tp == 1 and worker.ep >= engine.exchange_ranks


def environment(name: str, pool: Pool, job: Job, engine: Engine, found: ServeEstimate) -> dict[str, int]:
    """What the engine reads from the environment alone."""
    if name != "sglang" or pool.name == "prefill" or not exchanges(pool.worker, engine):
        return {}
    tokens = ceil(found.batch / pool.worker.dp) * (job.serve.drafts + 1)
    return {"SGLANG_DEEPEP_NUM_MAX_DISPATCH_TOKENS_PER_RANK": max(_DISPATCH, -(-tokens // 64) * 64)}


def notes(job: Job) -> list[str]:
    """What the weights must be for the plan to hold."""
    serve, stored = job.serve, job.spec.quantization
    if serve.precision == "bf16" and stored is not None:
        return [
            f"{job.spec.name} is released in FP8: whalepod convert SRC DST --to bf16, and set MODEL to DST"
        ]
    if serve.precision == "fp4":
        return ["set MODEL to a checkpoint in NVFP4: the released weights are not"]
    return []
