"""Jobs of every kind, and what the engines publish about themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from whalepod.launch.launch import TRAINERS
from whalepod.spec.run import RunConfig, make_run

PUBLISHED = Path(__file__).parents[1] / "data" / "launch"

LITE = {"model": "deepseek-v2-lite", "data": {"sequence_length": 4096}, "out": "runs/lite $(x) `y` }\"'"}
V3 = {"model": "deepseek-v3", "data": {"sequence_length": 4096}, "out": "runs/v3"}
TRAINING: dict[str, dict[str, Any]] = {
    "one node": {
        **LITE,
        "gpus": "8xH100",
        "layout": {"dp_shard": 8, "ep": 8, "zero": 1, "micro_batch": 1, "global_batch": 64},
    },
    "half a node": {
        **LITE,
        "gpus": "4xH200",
        "layout": {"dp_shard": 4, "ep": 4, "micro_batch": 1, "global_batch": 64},
    },
    "many nodes": {
        **V3,
        "gpus": "256xH100",
        "layout": {
            **{"pp": 8, "dp_shard": 32, "ep": 32, "zero": 1, "schedule": "interleaved", "stages_per_rank": 2},
            **{"recompute": "selective", "precision": "fp8", "micro_batch": 1, "global_batch": 1024},
        },
    },
    "racks": {
        **V3,
        "gpus": "64xGB200",
        "layout": {
            **{"dp_replicate": 2, "dp_shard": 32, "ep": 32, "tp": 1, "recompute": "full"},
            **{"micro_batch": 1, "global_batch": 512, "precision": "fp8"},
        },
    },
    "cores": {"model": "v3-mini", "gpus": "2xcpu", "gpus_per_node": 1, "layout": {"dp_shard": 2}},
}
AGGREGATED = {"isl": 2048, "osl": 512, "concurrency": 64, "precision": "fp8"}
SERVING: dict[str, dict[str, Any]] = {
    "one server": {**V3, "gpus": "8xH200", "serve": {"layout": "TP8 DPattn1 moeTP8 EP1", **AGGREGATED}},
    "two servers": {
        **V3,
        "gpus": "16xH200",
        "serve": {"layout": "2x(TP1 DPattn8 moeTP1 EP8)", **AGGREGATED, "drafts": 1},
    },
    "wide": {**V3, "gpus": "32xH100", "serve": {"layout": "TP1 DPattn32 moeTP1 EP32", **AGGREGATED}},
    "odd": {**V3, "gpus": "144xH200", "serve": {"layout": "TP1 DPattn144 moeTP1 EP144", **AGGREGATED}},
    "tensor over nodes": {
        **V3,
        "gpus": "16xH100",
        "serve": {"layout": "TP16 DPattn1 moeTP1 EP16", **AGGREGATED},
    },
    "pipeline": {**V3, "gpus": "16xH100", "serve": {"layout": "TP8 DPattn1 moeTP8 EP1 PP2", **AGGREGATED}},
    "dense": {
        "model": "deepseek-r1-distill-llama-70b",
        "gpus": "4xH100",
        "serve": {"layout": "2x(TP2 DPattn1 moeTP1 EP2)", **AGGREGATED, "precision": "bf16"},
    },
    "FP4": {
        **V3,
        "gpus": "8xB200",
        "serve": {"layout": "TP8 DPattn1 moeTP1 EP8", **AGGREGATED, "precision": "fp4", "engine": "vllm"},
    },
    "divided": {
        **V3,
        "gpus": "64xH200",
        "serve": {"layout": "P 4x(TP1 DPattn8 moeTP1 EP8) + D 1x(TP1 DPattn32 moeTP1 EP32)", **AGGREGATED},
    },
    "mixed": {**V3, "gpus": "8xH200", "serve": {"layout": "TP2 DPattn4 moeTP2 EP4", **AGGREGATED}},
}
SERVING["dense"]["serve"]["layout"] = "2x(TP2 DPattn1 moeTP2 EP1)"
NOT_VLLM = ("divided", "mixed")


def job(name: str) -> RunConfig:
    return make_run(TRAINING.get(name) or SERVING[name])


def pairs() -> list[tuple[str, str]]:
    """Every job with every engine that takes it."""
    found = [(name, engine) for name in TRAINING for engine in TRAINERS]
    found += [(name, engine) for name in SERVING for engine in ("vllm", "sglang", "slurm", "lws")]
    return [
        (name, engine)
        for name, engine in found
        if not (engine == "vllm" and name in NOT_VLLM) and not (engine == "megatron" and name == "cores")
    ]


def published(name: str) -> dict[str, Any]:
    return json.loads((PUBLISHED / f"{name}.json").read_text())
