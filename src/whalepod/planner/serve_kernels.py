"""Times of one accelerator's kernels and of its collectives while serving, from a few constants each.

Every kernel is a launch floor plus a smooth maximum of what it computes, what it reads, and (matrix products)
the serial walk along the inner dimension, which bounds thin products that fill few cores. The shares of peak
FLOP/s and of bandwidth are measured per engine and architecture (`data/serving.yaml`), so that a GPU which
nobody measured still gets its own peaks. Sizes may be numpy arrays and broadcast; times are in seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from whalepod.planner.network import fast_gb_s
from whalepod.planner.roofline import smooth_max
from whalepod.planner.routing import expected_nodes
from whalepod.spec.hardware import Gpu
from whalepod.spec.model import MoE

Array = Any
"""A float or a numpy array of floats."""

WEIGHT_BYTES = {"bf16": 2.0, "fp8": 1.0, "fp4": 0.5625}
"""Bytes per weight; FP4 (NVFP4) has an E4M3 scale per 16. FP8's FP32 scale per 128 x 128 is left out."""

_EXPERT_TILE = 64
"""Rows an expert's matrix product is padded to, a tile of the grouped kernels."""
_PER_HEAD_SHARE = 0.5
_PER_HEAD_FLOOR_S = 4e-6
"""Products per head: 4 to 6 us up to 64 tokens, a third to half of peak beyond (mla_bmm tables)."""
_INDEXER_SHARE = 0.4
"""DeepSeek sparse attention on H800 stays near 38 % of peak (InferSim's tables)."""
_LINK_LATENCY_S = 5e-6
"""One hop over the network, NCCL's Simple protocol (measured 4 to 14 us)."""
_NIC_SHARE = 0.85
"""DeepEP on CX7: 43 of 50 GB/s."""
_EXCHANGE_SHARE = 0.7
"""DeepEP within a node: 313 of 450 GB/s on H100, 640 of 900 on B200, 98 to 153 of 200 on H800."""
_EXCHANGE_LATENCY_S = 13e-6
"""DeepEP low latency, eight tokens within a node: 15 and 16 us."""


@dataclass(frozen=True)
class Curve:
    """Constants of one kind of kernel; a share is of the peak of the GPU at the kernel's precision.

    floor_us: launch, prologue and epilogue. step_ns: serial time per element of the inner dimension (matrix
    products). row_passes: times that every routed row of activations crosses memory (experts), or the same
    for queries, keys and values (prefill attention).
    """

    floor_us: float
    flops_share: float = 1.0
    memory_share: float = 1.0
    step_ns: float = 0.0
    row_passes: float = 0.0


@dataclass(frozen=True)
class LinkCurve:
    """A collective over n ranks: latency, share of the link's bandwidth, and a term that grows with the
    square root of the bytes, which fits the slow middle between the two (us per sqrt(MB))."""

    latency_us: float
    share: float
    ramp_us: float = 0.0


@dataclass(frozen=True)
class KernelSet:
    """Curves of one engine on one architecture, by weight or cache precision.

    min_heads: query heads that decode attention is padded to. narrow_attention: it multiplies in the cache's
    own precision, as only Blackwell's kernels do.
    """

    gemm: Mapping[str, Curve] = field(hash=False)
    experts: Mapping[str, Curve] = field(hash=False)
    decode_attention: Mapping[str, Curve] = field(hash=False)
    prefill_attention: Mapping[str, Curve] = field(hash=False)
    all_reduce: LinkCurve
    gather: LinkCurve
    min_heads: int = 64
    narrow_attention: bool = False


@dataclass(frozen=True)
class Kernels:
    """`KernelSet` on a GPU whose fast domain spans `domain` of the ranks.

    floors: share of the launch floors that is left when kernels follow one another in a graph.
    reach: by precision, reachable share of peak against that of the GPU whose curves these are.
    """

    gpu: Gpu
    curves: KernelSet
    domain: int
    floors: float = 1.0
    reach: Mapping[str, float] = field(default_factory=dict, hash=False)

    @property
    def around(self) -> tuple[float, float, float]:
        """Seconds that several ranks add to a step, to a layer and to a layer with experts whatever they
        send; none here, where the curves have latencies."""
        return (0.0, 0.0, 0.0)

    def _flops(self, precision: str) -> float:
        # Precisions without hardware are computed in the next wider one (weights are still read narrow).
        for known in (precision, "fp8", "bf16"):
            peak = self.gpu.peak_flops(known)
            if peak:
                return peak * self.reach.get(known, 1.0)
        raise AssertionError("a GPU has a BF16 peak")

    def _floor(self, curve: Curve) -> float:
        return curve.floor_us * 1e-6 * self.floors

    @property
    def _memory(self) -> float:
        return self.gpu.memory_tb_s * 1e12

    def _fast(self, ranks: int, share: float) -> float:
        """Bytes per second to `ranks` of the domain at a share of the link."""
        return 1e9 * float(fast_gb_s(self.gpu, ranks, share))

    @property
    def _slow(self) -> float:
        assert self.gpu.nic_gb_s, "`serve_layout.check_links` refuses layouts that would need it"
        return 1e9 * self.gpu.nic_gb_s * _NIC_SHARE

    # ------------------------------------------------------------------------------------ computation

    def gemm(self, m: Array, k: float, n: float, precision: str) -> Array:
        """[m, k] x [k, n] with weights of `precision`, output BF16."""
        c = self.curves.gemm[precision]
        compute = 2.0 * m * k * n / (self._flops(precision) * c.flops_share)
        memory = (k * n * WEIGHT_BYTES[precision] + 2.0 * m * n) / (self._memory * c.memory_share)
        return self._floor(c) + smooth_max(compute, memory, k * c.step_ns * 1e-9)

    def experts(
        self,
        rows: Array,
        hit: Array,
        hidden: int,
        width: float,
        precision: str,
    ) -> Array:
        """The three grouped products of `hit` local experts of `width` on `rows` routed rows in all."""
        c = self.curves.experts[precision]
        weights = 3.0 * hidden * width
        padded = rows + hit * (_EXPERT_TILE / 2)
        compute = 2.0 * weights * padded / (self._flops(precision) * c.flops_share)
        memory = hit * weights * WEIGHT_BYTES[precision] / (self._memory * c.memory_share)
        moved = rows * hidden * 2.0 * c.row_passes / self._memory
        return self._floor(c) + smooth_max(compute, memory) + moved

    def per_head(self, tokens: Array, heads: float, k: float, n: float) -> Array:
        """[tokens, k] x [k, n] for each of `heads` in BF16: MLA's absorbed up-projections."""
        compute = 2.0 * tokens * heads * k * n / (self._flops("bf16") * _PER_HEAD_SHARE)
        return _PER_HEAD_FLOOR_S * self.floors + compute + self.passes(1.0, heads * k * n, 1.0)

    def indexer(self, tokens: Array, requests: Array, keys: Array, heads: int, width: int) -> Array:
        """Scores of V3.2's lightning indexer: `tokens` of `requests` against `keys` each, in FP8."""
        compute = 2.0 * tokens * keys * heads * width / (self._flops("fp8") * _INDEXER_SHARE)
        return _PER_HEAD_FLOOR_S + smooth_max(compute, self.passes(requests * keys, width / 2, 1.0))

    def decode_attention(
        self,
        requests: Array,
        keys: Array,
        heads: float,
        key_width: float,
        latent: float,
        cache: str,
        bytes_: float,
    ) -> Array:
        """One query token per request over `keys` cached ones.

        key_width: elements multiplied per head and key (scores and values); latent: cached elements per key;
        bytes_: of one element.
        """
        c = self.curves.decode_attention[cache]
        narrow = self.gpu.supports(cache) and self.curves.narrow_attention
        precision = cache if narrow else "bf16"
        pairs = requests * keys
        compute = 2.0 * pairs * heads * key_width
        compute = compute / (self._flops(precision) * c.flops_share)
        memory = pairs * latent * bytes_ / (self._memory * c.memory_share)
        return self._floor(c) + smooth_max(compute, memory, power=2.0)

    def prefill_attention(
        self, tokens: Array, keys: Array, heads: float, key_width: float, cache: str
    ) -> Array:
        """`tokens` queries over `keys` keys each on average (half the prompt, where causal)."""
        c = self.curves.prefill_attention[cache]
        compute = 2.0 * tokens * keys * heads * key_width / (self._flops("bf16") * c.flops_share)
        moved = 2.0 * tokens * heads * key_width * c.row_passes / self._memory
        return self._floor(c) + compute + moved

    def passes(self, tokens: Array, width: float, passes: float) -> Array:
        """Memory-bound work: `passes` reads or writes of [tokens, width] in BF16."""
        return 2.0 * tokens * width * passes / (0.8 * self._memory)

    # ------------------------------------------------------------------------------------ communication

    def all_reduce(self, size: Array, ranks: int) -> Array:
        """`size` bytes summed over `ranks`; across domains by reduce-scatter, network, all-gather."""
        return self._collective(size, ranks, self.curves.all_reduce, 2.0)

    def gather(self, size: Array, ranks: int, stride: int = 1) -> Array:
        """All-gather to, or reduce-scatter from, `size` bytes in all over `ranks`, each `stride` apart."""
        return self._collective(size, ranks, self.curves.gather, 1.0, stride)

    def _collective(self, size: Array, ranks: int, curve: LinkCurve, ways: float, stride: int = 1) -> Array:
        if ranks <= 1:
            return 0.0 * np.asarray(size, float)
        inner = max(1, min(ranks, self.domain // stride))
        time: Array = curve.latency_us * 1e-6 + 0.0 * size
        if inner > 1:
            time = time + ways * (inner - 1) / inner * size / self._fast(inner, curve.share)
            time = time + curve.ramp_us * 1e-6 * np.sqrt(size / 1e6)
        outer = -(-ranks // inner)
        if outer > 1:
            hops = ways * float(np.ceil(np.log2(outer)))
            time = time + hops * _LINK_LATENCY_S + ways * (outer - 1) / outer * size / inner / self._slow
        return time

    def send(self, size: Array, far: bool) -> Array:
        """`size` bytes to one rank, outside the domain where `far`."""
        return _LINK_LATENCY_S + size / (self._slow if far else self._fast(2, self.curves.gather.share))

    def exchange(
        self, tokens: Array, hidden: int, moe: MoE, ranks: int, bytes_: float, dedupe: bool
    ) -> Array:
        """One direction of the tokens' way to their experts or back (DeepEP): `tokens` of this rank, each to
        its experts on `ranks`. dedupe: a token crosses once per rank and node (high throughput) rather than
        once per expert (low latency)."""
        if ranks <= 1:
            return 0.0 * np.asarray(tokens, float)
        top_k, inner = moe.num_experts_per_tok, min(ranks, self.domain)
        copies = float(top_k)
        outside = 1.0 - inner / ranks
        far = copies
        if dedupe:
            copies = ranks * (1.0 - (1.0 - 1.0 / ranks) ** top_k)
            far = expected_nodes(moe, -(-ranks // inner))
        payload = tokens * hidden * bytes_
        near = payload * (copies if dedupe else copies * (1.0 - outside)) / self._fast(inner, _EXCHANGE_SHARE)
        if outside == 0.0:
            return _EXCHANGE_LATENCY_S + near
        return _EXCHANGE_LATENCY_S + np.maximum(near, payload * far * outside / self._slow)
