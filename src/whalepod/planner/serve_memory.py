"""What one GPU of a worker holds while serving, by category, and how many tokens of cache are left room for.

MLA's latent cache is one vector for all heads: tensor parallelism repeats it on every rank, data-parallel
attention splits requests (and so the cache) over its ranks, pipeline stages split layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from whalepod.planner.serve_layout import Worker
from whalepod.spec.counts import (
    GIB,
    attention_params,
    expert_params,
    indexer_bytes_per_layer,
    kv_bytes_per_layer,
    mlp_params,
    mtp_params,
)
from whalepod.spec.model import GQA, ModelSpec

CONTEXT_BYTES = int(1.5 * GIB)
"""CUDA context, NCCL and the engine's own buffers: what an idle engine holds beside weights and cache."""
GRAPH_BYTES = int(1.0 * GIB)
"""Captured decode graphs with their workspaces."""
RESERVE_SHARE = 0.03
"""Of the GPU's memory, kept free against fragmentation (engines' own defaults keep 5 to 15 % of it, of which
the activations, counted apart here, are the larger part)."""

_FP8_SCALE = 1.0 + 4.0 / 128**2
_FP4_BYTES = 0.5625


@dataclass(frozen=True)
class ServeMemory:
    """Bytes per GPU by category. `cache_bytes_per_token`: on one rank, for a token of one of its requests.

    kv_capacity_tokens: of the whole worker, over its data-parallel ranks; 0 where the weights do not fit.
    """

    weights: int
    activations: int
    communication: int
    framework: int
    reserve: int
    cache: int
    cache_bytes_per_token: float
    kv_capacity_tokens: int
    total: int

    @property
    def fixed(self) -> int:
        """All but the cache."""
        return self.weights + self.activations + self.communication + self.framework + self.reserve

    @property
    def short(self) -> int:
        """Bytes that are missing for the weights and everything else but the cache."""
        return max(0, self.fixed - self.total)

    def by_category(self) -> dict[str, int]:
        names = ("weights", "cache", "activations", "communication", "framework", "reserve")
        return {name: getattr(self, name) for name in names}


def weight_bytes_per_gpu(spec: ModelSpec, worker: Worker, precision: str, mtp: bool = False) -> int:
    """Weights on the fullest pipeline stage's GPU.

    bf16, fp32: all; fp8: linear layers in FP8 with a scale per 128 x 128 block; fp4: experts and MLPs in
    NVFP4, attention in BF16. Embedding, head, router and norms are BF16. Experts are split over `ep` x
    `moe_tp`, shared experts and attention over `tp`; with DP attention dense layers too are split over `tp`
    only. MLA's down-projections are held whole by every rank.
    """
    layers = _stage_layers(spec, worker.pp)
    a = attention_params(spec)
    whole = a.attn_q_a + a.attn_kv_a
    plain = plain_bytes(precision)
    linear = {"fp8": _FP8_SCALE, "fp4": _FP4_BYTES}.get(precision, plain)
    attention = {"fp8": _FP8_SCALE}.get(precision, plain)
    per_layer = attention * (whole + (a.attention - whole) / worker.tp) + plain * (
        a.norms + a.attn_bias + a.indexer
    )
    total = 0.0
    for layer in layers:
        p = mlp_params(spec, layer)
        total += per_layer + linear * (p.dense_mlp + p.shared_experts) / worker.tp + plain * p.router
        total += 4.0 * p.selection_bias + 2.0 * plain * spec.hidden_size
        if p.routed_experts and spec.moe is not None:
            held = (spec.moe.n_routed_experts + worker.redundant(spec)) / worker.ep
            total += linear * held * expert_params(spec) / worker.moe_tp
    table = plain * spec.vocab_size * spec.hidden_size / worker.tp
    ends = 1 if spec.tie_word_embeddings else 2
    # The first stage holds the embedding, the last the head.
    total += table * (ends if worker.pp == 1 else 1)
    if mtp and spec.num_nextn_predict_layers:
        total += linear * mtp_params(spec).total / max(worker.stage_gpus, 1)
    return ceil(total)


def plain_bytes(precision: str) -> float:
    """Of an element of what no quantisation touches."""
    return 4.0 if precision == "fp32" else 2.0


def cache_bytes_per_token(spec: ModelSpec, worker: Worker, cache: str) -> float:
    """Cache bytes on one rank per token of a request that it holds.

    An FP8 latent is one byte per element with one scale per tensor, as the engines hold V3's; V3.2's own
    form with scales and a BF16 rotary key is larger (`counts.kv_bytes_per_layer`).
    """
    a = spec.attention
    if isinstance(a, GQA):
        split = min(worker.tp, a.num_key_value_heads)
        per_layer = kv_bytes_per_layer(spec, _format(cache)) / split
    elif cache == "fp8" and spec.indexer is None:
        per_layer = float(a.latent_dim)
    else:
        per_layer = kv_bytes_per_layer(spec, _format(cache))
    layers = len(_stage_layers(spec, worker.pp))
    return layers * (per_layer + indexer_bytes_per_layer(spec))


def _format(cache: str) -> str | int:
    return 32 if cache == "fp32" else cache


def serve_memory(
    spec: ModelSpec,
    worker: Worker,
    memory_gib: float,
    precision: str,
    cache: str,
    chunk_tokens: int,
    tokens_in_cache: float = 0.0,
    mtp: bool = False,
    framework: int = CONTEXT_BYTES + GRAPH_BYTES,
) -> ServeMemory:
    """Memory of one GPU with `tokens_in_cache` tokens held over the whole worker. framework: of an idle
    engine."""
    plain = plain_bytes(precision)
    weights = weight_bytes_per_gpu(spec, worker, precision, mtp)
    total = int(memory_gib * GIB)
    d = spec.hidden_size
    # A prefill pass: the hidden state in and out of experts (once per visited expert that may be local), the
    # widest projection, and the logits of the prompts' last tokens.
    copies = 8.0
    if spec.moe is not None:
        gathered = worker.dp
        copies += gathered * max(1.0, spec.moe.num_experts_per_tok / worker.ep)
    chunk = chunk_tokens / max(1, worker.dp) if worker.dp > 1 else chunk_tokens
    heads = spec.num_attention_heads / worker.tp
    width = getattr(spec.attention, "qk_head_dim", None) or getattr(spec.attention, "head_dim", 128)
    activations = int(plain * (chunk * (copies * d + 3.0 * heads * width) + 256 * spec.vocab_size))
    communication = int(2.0 * plain * chunk * max(1, worker.dp) * d) if worker.stage_gpus > 1 else 0
    reserve = int(RESERVE_SHARE * total)
    per_token = cache_bytes_per_token(spec, worker, cache)
    left = total - weights - activations - communication - framework - reserve
    # Every data-parallel rank holds its own requests; all ranks must hold some.
    capacity = int(max(0, left) / per_token) * worker.dp
    held = int(min(tokens_in_cache, capacity) / worker.dp * per_token)
    return ServeMemory(
        weights=weights,
        activations=activations,
        communication=communication,
        framework=framework,
        reserve=reserve,
        cache=held,
        cache_bytes_per_token=per_token,
        kv_capacity_tokens=capacity,
        total=total,
    )


def _stage_layers(spec: ModelSpec, stages: int) -> range:
    """Layers of the stage with the most weights: the last of equal stages, which is all experts."""
    count = ceil(spec.num_hidden_layers / stages)
    return range(spec.num_hidden_layers - count, spec.num_hidden_layers)
