"""One forward pass of a worker while serving: the decode step of a batch, or a chunk of prompts.

Layer by layer by kind (dense, experts), each a list of kernels (`serve_kernels`) and of the layout's
collectives: with TP, an all-reduce after attention and one after the MLP; with data-parallel attention,
tokens are gathered before the experts and reduce-scattered after, or exchanged with the experts' ranks.
Batches may be numpy arrays. Times in seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist

import numpy as np

from whalepod.planner.serve_kernels import Array, Kernels, smooth_max
from whalepod.planner.serve_layout import Worker
from whalepod.planner.serve_measured import MeasuredKernels
from whalepod.planner.serve_software import Engine
from whalepod.spec.hardware import Cluster
from whalepod.spec.model import GQA, MLA, ModelSpec

CACHE_BYTES = {"bf16": 2.0, "fp8": 1.0, "fp32": 4.0}
_WIRE_BYTES = {"bf16": 2.0, "fp8": 1.03, "fp4": 0.5625, "fp32": 2.0}
_ACTIVATION_PASSES = 14.0
"""Reads and writes of the hidden state per layer by kernels that compute little: two norms, residuals,
quantisation, rotary, routing."""
_OVERLAP_TAX = 1.2
"""Computing beside DeepEP's exchange of large batches, which holds 20 to 24 of Hopper's 132 cores."""

Attention = Callable[[float], Array]
"""One layer's attention for a share of the batch, in seconds."""


@dataclass(frozen=True)
class Traffic:
    """What the tokens do to the experts.

    skew: spread of the experts' popularity (sigma of a log-normal), which leaves cold experts unread and
    makes one rank the hottest; the default fits runs on random prompts.
    imbalance: the hottest rank's load over the mean, where it is known (1: balanced, as with redundant
    experts); None follows from `skew`.
    """

    skew: float = 0.86
    imbalance: float | None = None

    def hit_share(self, tokens: Array, chance: float) -> Array:
        """Share of experts that at least one of `tokens` visits, at a mean `chance` per token."""
        weights = np.exp(self.skew * _QUANTILES - self.skew**2 / 2)
        weights = np.minimum(weights / weights.mean() * chance, 1.0)
        left = np.power(1.0 - weights, np.asarray(tokens, float)[..., None])
        return 1.0 - left.mean(axis=-1)

    def hottest(self, ranks: int, experts_per_rank: float) -> float:
        """Load of the hottest of `ranks` over the mean."""
        if self.imbalance is not None or ranks <= 1:
            return self.imbalance or 1.0
        spread = float(np.sqrt(np.expm1(self.skew**2) / experts_per_rank))
        # Expected maximum of n normal draws.
        return 1.0 + spread * max(0.0, float(np.sqrt(2 * np.log(ranks))) - 0.58)


DEFAULT_TRAFFIC = Traffic()

# Medians of 16 equal bins of the normal distribution.
_QUANTILES = np.array([NormalDist().inv_cdf((i + 0.5) / 16) for i in range(16)])


@dataclass(frozen=True)
class Step:
    """A worker at work: builds the parts of a pass. `precision`: of the linear layers (`fp4`: the experts'
    and the dense MLPs'; attention stays BF16, as in the published NVFP4 checkpoint)."""

    spec: ModelSpec
    worker: Worker
    cluster: Cluster
    software: Engine
    precision: str
    traffic: Traffic = DEFAULT_TRAFFIC

    @cached_property
    def kernels(self) -> Kernels:
        s, w, gpu = self.software, self.worker, self.cluster.gpu
        if s.measured:
            shared = "tp" if w.tp > 1 else "ep" if w.dp > 1 else ""
            return MeasuredKernels(gpu, s.kernels, self.cluster.domain, shared=shared)
        return Kernels(gpu, s.kernels, self.cluster.domain, s.floors, s.reach)

    @property
    def _attention_precision(self) -> str:
        return "bf16" if self.precision == "fp4" else self.precision

    # ---------------------------------------------------------------------------------------- decode

    def decode(self, batch: Array, context: Array, drafts: int = 0) -> dict[str, Array]:
        """Parts of one step of `batch` running requests in the worker at a mean `context`, in seconds.

        drafts: speculated tokens that are verified in the same pass and written by MTP blocks before.
        """
        w, s = self.worker, self.software
        batch = np.asarray(batch, float) / (w.pp if s.pipelined else 1)
        per_rank = np.maximum(batch / w.dp, 1.0)
        tokens, total = per_rank * (1 + drafts), np.maximum(batch, 1.0) * (1 + drafts)

        def attention(share: float) -> Array:
            return self._decode_attention(per_rank * share, tokens * share, context)

        parts = self.layers(tokens, total, attention, decode=True)
        parts["head"] = self.head(tokens, total)
        if drafts:  # each is written by one more block and the head
            layers = sum(time for name, time in parts.items() if name != "head")
            parts["drafts"] = drafts * (layers / self.spec.num_hidden_layers + parts["head"])
        if w.pp > 1:
            parts["pipeline"] = self.hand_on(tokens)
        # Without graphs the host issues the layers; kernels longer than that hide it.
        issue = np.maximum(1e-6 * s.decode_layer_us * self.spec.num_hidden_layers - sum(parts.values()), 0.0)
        parts["host"] = 1e-6 * (s.step_us + s.request_us * per_rank) + self.kernels.around[0] + issue
        return parts

    def _decode_attention(self, requests: Array, tokens: Array, context: Array) -> Array:
        return self.projections(tokens) + self.decode_scores(requests, tokens, context)

    def projections(self, tokens: Array) -> Array:
        """One layer's products around attention, but those that its form decides about."""
        if isinstance(self.spec.attention, GQA):
            return self._gqa_projections(tokens)
        return self._mla_projections(tokens, expand=False)

    def decode_scores(self, requests: Array, tokens: Array, context: Array) -> Array:
        """One layer's attention over the cache for `tokens` of `requests`."""
        spec, k, a, tp = self.spec, self.kernels, self.spec.attention, self.worker.tp
        heads, cache = spec.num_attention_heads / tp, self.software.cache
        keys = context if spec.indexer is None else np.minimum(context, spec.indexer.index_topk)
        # All of a request's speculated tokens share one reading of its cache.
        share = np.maximum(tokens / requests, 1.0)
        if isinstance(a, GQA):
            width = 2.0 * a.head_dim * max(a.num_key_value_heads / tp, 1.0)
            return k.decode_attention(
                requests, keys * share, heads, 2.0 * a.head_dim, width / share, cache, CACHE_BYTES[cache]
            )
        heads_padded = max(heads, self.software.kernels.min_heads)
        width = a.latent_dim + a.kv_lora_rank
        time = k.decode_attention(
            requests, keys * share, heads_padded, width, a.latent_dim / share, cache, CACHE_BYTES[cache]
        )
        time = time + k.per_head(tokens, heads, a.qk_nope_head_dim, a.kv_lora_rank)
        time = time + k.per_head(tokens, heads, a.kv_lora_rank, a.v_head_dim)
        return time + self._indexer(tokens, requests, context)

    def _indexer(self, tokens: Array, requests: Array, keys: Array) -> Array:
        """One layer's lightning indexer, its projections included; zero without one."""
        spec, k, i, a = self.spec, self.kernels, self.spec.indexer, self.spec.attention
        if i is None:
            return 0.0
        rank = a.q_lora_rank if isinstance(a, MLA) and a.q_lora_rank else spec.hidden_size
        time = k.gemm(tokens, rank, i.index_n_heads * i.index_head_dim, self._attention_precision)
        time = time + k.gemm(tokens, spec.hidden_size, i.index_head_dim + i.index_n_heads, "bf16")
        return time + k.indexer(tokens, requests, keys, i.index_n_heads, i.index_head_dim)

    def _mla_projections(self, tokens: Array, expand: bool) -> Array:
        spec, k, a = self.spec, self.kernels, self.spec.attention
        assert isinstance(a, MLA)
        p, d, heads = self._attention_precision, spec.hidden_size, spec.num_attention_heads / self.worker.tp
        q = heads * a.qk_head_dim
        if a.q_lora_rank is None:
            time = k.gemm(tokens, d, q + a.latent_dim, p)
        else:  # the two down-projections are one product, held whole by every rank
            time = k.gemm(tokens, d, a.q_lora_rank + a.latent_dim, p) + k.gemm(tokens, a.q_lora_rank, q, p)
        if expand:
            time = time + k.gemm(tokens, a.kv_lora_rank, heads * (a.qk_nope_head_dim + a.v_head_dim), p)
        return time + k.gemm(tokens, heads * a.v_head_dim, d, p)

    def _gqa_projections(self, tokens: Array) -> Array:
        spec, k, a, tp = self.spec, self.kernels, self.spec.attention, self.worker.tp
        assert isinstance(a, GQA)
        q = spec.num_attention_heads * a.head_dim
        kv = 2 * max(a.num_key_value_heads, tp) * a.head_dim
        p = self._attention_precision
        d = spec.hidden_size
        return k.gemm(tokens, d, (q + kv) / tp, p) + k.gemm(tokens, q / tp, d, p)

    # ---------------------------------------------------------------------------------------- prefill

    def prefill(self, tokens: Array, prompt: Array, active: float = 1.0) -> dict[str, Array]:
        """Parts of a pass of `tokens` prompt tokens on each of `active` x dp attention ranks, of prompts of
        `prompt` tokens. Chunks of one prompt cost alike: keys are half the prompt on average."""
        spec, k, a = self.spec, self.kernels, self.spec.attention
        tokens = np.asarray(tokens, float)
        total = tokens * np.maximum(self.worker.dp * active, 1.0)
        heads, cache = spec.num_attention_heads / self.worker.tp, self.software.cache
        keys = prompt / 2.0
        if spec.indexer is not None:
            keys = np.minimum(keys, spec.indexer.index_topk)

        def attention(share: float) -> Array:
            n = tokens * share
            if isinstance(a, GQA):
                return self._gqa_projections(n) + k.prefill_attention(n, keys, heads, 2.0 * a.head_dim, cache)
            width = a.qk_head_dim + a.v_head_dim
            scores = k.prefill_attention(n, keys, heads, width, cache)
            return self._mla_projections(n, expand=True) + scores + self._indexer(n, n / prompt, prompt / 2.0)

        parts = self.layers(tokens, total, attention, decode=False)
        parts = {name: time * self.software.prefill_slowdown for name, time in parts.items()}
        parts["head"] = self.head(np.maximum(tokens / prompt, 1.0), np.maximum(total / prompt, 1.0))
        if self.worker.pp > 1:
            parts["pipeline"] = self.hand_on(tokens)
        issue = 1e-6 * self.software.prefill_layer_us * spec.num_hidden_layers
        parts["host"] = np.maximum(issue - sum(parts.values()), 0.0)
        return parts

    def hand_on(self, tokens: Array) -> Array:
        """The hidden state through all pipeline stages."""
        w = self.worker
        far = w.num_gpus > self.cluster.domain
        return (w.pp - 1) * self.kernels.send(2.0 * tokens * self.spec.hidden_size, far)

    # ------------------------------------------------------------------------------------------- pass

    def layers(self, tokens: Array, total: Array, attention: Attention, decode: bool) -> dict[str, Array]:
        """All layers without the head: `tokens` per attention rank, `total` over the worker's stage."""
        w = self.worker
        if not (self.software.overlap and w.ep >= self.software.exchange_ranks and w.dp > 1):
            return self._layers(tokens, total, attention(1.0), decode)
        # Two half batches: while one computes, the other's tokens travel. Weights are read once per half, and
        # the exchange of large batches takes some cores.
        halves = self._layers(tokens / 2, total / 2, attention(0.5), decode)
        parts = {name: 2.0 * time * (1.0 if decode else _OVERLAP_TAX) for name, time in halves.items()}
        travel = 2.0 * halves["exchange"]
        compute = sum(time for name, time in parts.items() if name != "exchange")
        parts["exchange"] = smooth_max(compute, travel) - compute
        return parts

    def _layers(self, tokens: Array, total: Array, attention: Array, decode: bool) -> dict[str, Array]:
        """Parts of all layers, one after the other."""
        spec, k, w, s = self.spec, self.kernels, self.worker, self.software
        layers, moe_layers, d = spec.num_hidden_layers, spec.num_moe_layers, spec.hidden_size
        dense_layers = layers - moe_layers
        glue = 1e-6 * s.glue_us + k.around[1] + k.passes(tokens, d, _ACTIVATION_PASSES)
        parts = {"attention": layers * attention, "other": layers * glue}
        reduce = k.all_reduce(2.0 * tokens * d, w.tp)
        # One all-reduce after attention, one after the MLP; DP's experts have their own exchange instead.
        parts["all_reduce"] = (2 * layers if w.dp == 1 else layers + dense_layers) * reduce
        width = spec.intermediate_size / w.tp
        dense = k.gemm(tokens, d, 2 * width, self.precision) + k.gemm(tokens, width, d, self.precision)
        parts["dense_mlp"] = dense_layers * dense
        if spec.moe is None:
            return parts
        parts["experts"] = moe_layers * self._experts(total) * s.experts_slowdown
        parts["router"] = moe_layers * k.gemm(tokens, d, spec.moe.n_routed_experts, "bf16")
        if spec.moe.n_shared_experts:
            shared = spec.moe.n_shared_experts * spec.moe.moe_intermediate_size / w.tp
            time = k.gemm(tokens, d, 2 * shared, self.precision) + k.gemm(tokens, shared, d, self.precision)
            parts["shared_experts"] = moe_layers * time
        if w.dp > 1:
            parts["exchange"] = moe_layers * self._exchange(tokens, total, decode)
        return parts

    def _experts(self, total: Array) -> Array:
        """One layer's routed experts on the hottest rank, for `total` tokens of the stage."""
        spec, w, moe = self.spec, self.worker, self.spec.moe
        assert moe is not None
        held = (moe.n_routed_experts + w.redundant(spec)) / w.ep
        chance = moe.num_experts_per_tok / moe.n_routed_experts
        hit = held * self.traffic.hit_share(total, chance)
        rows = total * moe.num_experts_per_tok / w.ep
        hot = self.traffic.hottest(w.ep, held)
        width = moe.moe_intermediate_size / w.moe_tp
        return self.kernels.experts(rows * hot, np.maximum(hit, 1.0), spec.hidden_size, width, self.precision)

    def _exchange(self, tokens: Array, total: Array, decode: bool) -> Array:
        """One layer's tokens to their experts and back, of a worker with data-parallel attention."""
        spec, k, w, moe = self.spec, self.kernels, self.worker, self.spec.moe
        assert moe is not None
        d = spec.hidden_size
        wire = _WIRE_BYTES[self.precision]
        if w.ep >= self.software.exchange_ranks:
            hot = self.traffic.hottest(w.ep, moe.n_routed_experts / w.ep)
            out = k.exchange(tokens, d, moe, w.ep, bytes_=wire, dedupe=not decode)
            back = k.exchange(tokens, d, moe, w.ep, bytes_=2.0, dedupe=not decode)
            return (out + back) * np.sqrt(hot) * self.software.gather_slowdown
        out, back = k.gather(total * d * wire, w.dp, w.tp), k.gather(total * d * 2.0, w.dp, w.tp)
        return (out + back) * self.software.gather_slowdown

    def head(self, tokens: Array, total: Array) -> Array:
        """Output head over the vocabulary, split over `tp`, or over all GPUs with gathered tokens."""
        rows = total if self.worker.dp > 1 else tokens
        columns = self.spec.vocab_size / self.worker.stage_gpus
        return self.kernels.gemm(rows, self.spec.hidden_size, columns, "bf16")
