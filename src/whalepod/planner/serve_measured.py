"""This project's engine on CPUs that `whalepod calibrate` has measured: times of its kernels, and of what
surrounds them, from the profile's `served` section.

A product takes what such a linear layer took, interpolated by rows; attention over the cache likewise by
heads and width; everything else (dispatch of small operations, Python, books, small messages) is a
constant of a step, of a layer, of a layer with experts, of an expert, of a sequence: fitted to steps of
models without arithmetic. All follow the engine with the next calibration.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from whalepod.planner.measured import fitted_plane
from whalepod.planner.network import Network
from whalepod.planner.serve_kernels import Array, Kernels
from whalepod.spec.errors import UserError
from whalepod.spec.hardware import Cluster, Gpu
from whalepod.spec.measured import EngineStep, Measured, Served
from whalepod.spec.model import MoE

UNCALIBRATED = "serving on CPUs is planned from measurements only: run `whalepod calibrate` here first"
ELEMENT = {"bf16": 2.0, "fp32": 4.0}
SMALL = 2.0**12
"""Bytes of a message up to which it costs what the measured steps' own messages did."""


def served(gpu: Gpu) -> tuple[Measured, Served]:
    """A calibrated CPU's figures. Raises UserError without."""
    if gpu.measured is None or gpu.measured.served is None:
        raise UserError(UNCALIBRATED)
    return gpu.measured, gpu.measured.served


@dataclass(frozen=True)
class Around:
    """Seconds of a decode step besides its arithmetic: of the step, of a layer, what experts add to a layer,
    of each expert with tokens, and of each sequence in the step and in a layer; several ranks add `tp` or
    `ep`, of the step, of a layer and of a layer with experts."""

    step: float
    layer: float
    experts: float
    expert: float
    request: float
    request_layer: float
    tp: tuple[float, float, float] = (0.0, 0.0, 0.0)
    ep: tuple[float, float, float] = (0.0, 0.0, 0.0)


def around(steps: Sequence[EngineStep]) -> Around:
    """Fitted to measured steps, none below zero."""

    def features(row: EngineStep) -> list[float]:
        layers, more = row.dense_layers + row.expert_layers, row.requests - 1
        # Sequences choose by themselves among four times as many experts.
        hit = 4 * row.experts * (1 - 0.75**row.requests) * row.expert_layers
        return [1.0, layers, row.expert_layers, hit, more, more * layers]

    alone = [row for row in steps if row.tp == row.ep == 1]
    a, b, c, d, e, f = one = _positive([features(row) for row in alone], [row.seconds for row in alone])
    more: dict[str, tuple[float, float, float]] = {}
    for axis in ("tp", "ep"):
        rows = [row for row in steps if getattr(row, axis) > 1]
        extra = [row.seconds - float(np.dot(features(row), one)) for row in rows]
        # Experts that are shared out add nothing to layers without.
        columns = [
            [1.0, (row.dense_layers + row.expert_layers) * (axis == "tp"), row.expert_layers] for row in rows
        ]
        step, layer, experts = _positive(columns, extra) if rows else (0.0, 0.0, 0.0)
        more[axis] = (step, layer, experts)
    return Around(a, b, c, d, e, f, more["tp"], more["ep"])


def _positive(rows: list[list[float]], seconds: list[float]) -> list[float]:
    """Least squares of relative errors without negative terms: the most negative goes first."""
    a, y = np.array(rows), np.array(seconds)
    weight = 1.0 / np.maximum(np.abs(y), 1e-9)
    used = list(range(a.shape[1]))
    while used:
        found, *_ = np.linalg.lstsq(a[:, used] * weight[:, None], y * weight, rcond=None)
        if (found >= 0).all():
            break
        used.pop(int(found.argmin()))
    out = [0.0] * a.shape[1]
    for index, value in zip(used, found if used else (), strict=True):
        out[index] = float(value)
    return out


@dataclass(frozen=True)
class MeasuredKernels(Kernels):
    """`Kernels` of a calibrated CPU; `shared`: the axis, tp or ep, by which ranks share the model. A CPU with
    other peaks than those it was measured with (of more threads, say) is so many times as fast."""

    shared: str = ""

    @cached_property
    def _measured(self) -> Measured:
        return served(self.gpu)[0]

    @cached_property
    def _served(self) -> Served:
        return served(self.gpu)[1]

    @cached_property
    def _around(self) -> Around:
        return around(self._served.steps)

    @property
    def around(self) -> tuple[float, float, float]:
        return getattr(self._around, self.shared) if self.shared else (0.0, 0.0, 0.0)

    @property
    def _more_flops(self) -> float:
        return self.gpu.tflops[self._served.precision] / self._measured.peak_tflops[self._served.precision]

    @property
    def _more_memory(self) -> float:
        return self.gpu.memory_tb_s * 1e3 / self._measured.peak_gb_s

    @cached_property
    def _element(self) -> float:
        return ELEMENT[self._served.precision]

    @cached_property
    def _products(self) -> tuple[np.ndarray, np.ndarray, float]:
        """Logarithms of rows and of FLOP/s with endless inner lengths, and the length of half of that."""
        found: dict[int, dict[int, float]] = {}
        for row in self._served.products:
            found.setdefault(row.rows, {})[row.inner] = row.flop_s
        both = [(min(x), max(x), x[min(x)] / x[max(x)]) for x in found.values() if len(x) > 1]
        # rate = endless * k / (k + half), at two lengths
        halves = [a * b * (1 - ratio) / (ratio * b - a) for a, b, ratio in both if a < ratio * b]
        half = max(0.0, float(np.median(halves))) if halves else 0.0
        rows = sorted(found)
        rates = [found[r][max(found[r])] * (1 + half / max(found[r])) for r in rows]
        return np.log(rows), np.log(rates), half

    def _rate(self, rows: Array, inner: float) -> Array:
        sizes, rates, half = self._products
        rows = np.maximum(np.asarray(rows, float), 1e-9)
        rate = np.exp(np.interp(np.log(rows), sizes, rates)) * inner / (inner + half)
        # How much of it is reading weights, which goes by the memory.
        most = 2e9 * np.maximum(rows, 1.0) * self._measured.peak_gb_s / self._element
        reads = np.minimum(rate / most, 1.0)
        rate = rate / (reads / self._more_memory + (1 - reads) / self._more_flops)
        return rate * np.minimum(rows, 1.0)  # a part of a row reads as much as all of it

    def gemm(self, m: Array, k: float, n: float, precision: str) -> Array:
        return 2.0 * m * k * n / self._rate(m, k)

    def experts(self, rows: Array, hit: Array, hidden: int, width: float, precision: str) -> Array:
        each = np.maximum(rows / hit, 1.0)
        products = self.gemm(each, hidden, 2 * width, precision) + self.gemm(each, width, hidden, precision)
        fixed = self._around.experts + self.around[2]
        return fixed + hit * (self._around.expert + products) + self.passes(rows, hidden, 4.0)

    def per_head(self, tokens: Array, heads: float, k: float, n: float) -> Array:
        return heads * self.gemm(tokens, k, n, "")

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
        rows, requests = self._served.attention, np.asarray(requests, float)
        seconds: Array = self._around.request_layer * np.maximum(requests - 1.0, 0.0)
        # One sequence's pages are read where they lie, those of several are put together.
        for alone in (True, False):
            fit = [row for row in rows if (row.requests == 1) == alone] or list(rows)
            rate, (by_heads, by_width) = fitted_plane(
                [[row.heads for row in fit], [row.width for row in fit]], [row.flop_s for row in fit]
            )
            slower = 1 + by_heads / heads + by_width / latent
            time = 4.0 * requests * keys * heads * latent * slower / (rate * self._more_flops)
            seconds = seconds + np.where((requests <= 1) == alone, time, 0.0)
        return seconds

    def prefill_attention(
        self, tokens: Array, keys: Array, heads: float, key_width: float, cache: str
    ) -> Array:
        rows = [row for row in self._measured.attention if row.precision == self._served.precision]
        rate, (by_tokens, by_width) = fitted_plane(
            [[row.tokens for row in rows], [row.width for row in rows]], [row.forward_flop_s for row in rows]
        )
        slower = 1 + by_tokens / np.maximum(2.0 * keys, 1.0) + by_width / (key_width / 2)
        # Values are filled up to the width of keys, which the measured FLOPs do not count.
        return 2.0 * tokens * keys * heads * key_width * slower / (rate * self._more_flops)

    def passes(self, tokens: Array, width: float, passes: float) -> Array:
        return self._stream(2.0 * tokens * width * passes)

    def _stream(self, moved: Array) -> Array:
        """Bytes as if of BF16."""
        rate = self._measured.stream_gb_s * 1e9 * self._more_memory
        return moved * self._element / 2.0 / rate

    # ---------------------------------------------------------------------------------- communication

    @cached_property
    def _network(self) -> Network:
        return Network(Cluster(self.gpu, self.domain, self.domain))

    def _beyond(self, op: str, size: Array, ranks: int) -> Array:
        """Seconds that a collective takes more than a small one does, which `Around` counts."""
        size = np.asarray(size, float) * self._element / 2.0

        def seconds(total: Array) -> Array:
            if op == "all_to_all":
                found = self._network.all_to_all(total, ranks)
                return 0.0 * total if found is None else found
            return getattr(self._network, op)(total, ranks, ranks)

        return np.maximum(seconds(np.maximum(size, SMALL)) - seconds(np.full_like(size, SMALL)), 0.0)

    def all_reduce(self, size: Array, ranks: int) -> Array:
        """As a reduce-scatter and an all-gather, for that is what the engine does."""
        if ranks <= 1:
            return 0.0 * np.asarray(size, float)
        return self._beyond("reduce_scatter", size, ranks) + self._beyond("all_gather", size, ranks)

    def gather(self, size: Array, ranks: int, stride: int = 1) -> Array:
        return self._beyond("all_gather", size, ranks) if ranks > 1 else 0.0 * np.asarray(size, float)

    def send(self, size: Array, far: bool) -> Array:
        return self._network.send(np.asarray(size, float) * self._element / 2.0, np.array(far))

    def exchange(
        self, tokens: Array, hidden: int, moe: MoE, ranks: int, bytes_: float, dedupe: bool
    ) -> Array:
        if ranks <= 1:
            return 0.0 * np.asarray(tokens, float)
        reached = ranks * (1.0 - (1.0 - 1.0 / ranks) ** moe.num_experts_per_tok)
        sent = tokens * hidden * bytes_ * reached * (ranks - 1) / ranks
        return self._beyond("all_to_all", sent, ranks)
