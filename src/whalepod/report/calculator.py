"""The usual calculators on the web beside the planner: parameters x bytes x 1.15.

They know a model's size and a number format. The rule says nothing of gradients and optimiser, activations,
batch, context, the KV cache, MTP or how anything is spread, and so it is right about weights at most.
"""

from __future__ import annotations

from math import ceil
from typing import Any

from whalepod.spec.counts import GIB, total_params
from whalepod.spec.hardware import Cluster
from whalepod.spec.model import ModelSpec

FACTOR = 1.15
BYTES = {"fp32": 4.0, "bf16": 2.0, "fp8": 1.0, "fp4": 0.5}
RULE = "parameters x bytes x 1.15"
MISSING = {
    "train": (
        "gradients, masters and the optimiser's moments",
        "activations, which grow with the micro-batch and the sequence",
        "copies of weights on every data-parallel rank",
        "multi-token prediction's block",
        "communication buffers, the allocator's holes and CUDA's context on every GPU",
    ),
    "serve": (
        "the KV cache, which grows with context and concurrency",
        "copies: every worker has its own weights, every tensor-parallel rank the latent cache",
        "what stays BF16 in an FP8 or FP4 checkpoint",
        "activations, CUDA graphs and communication buffers on every GPU",
        "multi-token prediction's block",
    ),
}


def web_calculator(
    spec: ModelSpec, cluster: Cluster, precision: str, goal: str, planner_gib: float | None
) -> dict[str, Any]:
    """What the rule says for this model, beside what the planner's best plan holds on all GPUs together.

    planner_gib None: nothing fits. `gpus_by_rule`: as many hold the rule's figure.
    """
    size = total_params(spec) * BYTES[precision] * FACTOR
    gib = size / GIB
    return {
        "rule": RULE,
        "bytes_per_parameter": BYTES[precision],
        "parameters": total_params(spec),
        "rule_gb": size / 1e9,
        "rule_gib": gib,
        "gpus_by_rule": ceil(gib / cluster.gpu.memory_gib),
        "planner_gib": planner_gib,
        "planner_gpus": None if planner_gib is None else cluster.num_gpus,
        "planner_over_rule": None if planner_gib is None else planner_gib / gib,
        "left_out": list(MISSING[goal]),
    }


def calculator_line(found: dict[str, Any], gpu: str) -> str:
    """The comparison in words."""
    text = (
        f"{found['rule']}, as calculators on the web say: {found['parameters'] / 1e9:,.1f}B x "
        f"{found['bytes_per_parameter']:g} x 1.15 = {found['rule_gb']:,.0f} GB, "
        f"so {found['gpus_by_rule']} x {gpu}"
    )
    if found["planner_gib"] is None:
        return f"{text}; in truth it does not fit here. "
    return (
        f"{text}; this plan holds {found['planner_gib']:,.0f} GiB over its {found['planner_gpus']} GPUs, "
        f"{found['planner_over_rule']:,.1f} times as much."
    )
