"""Times of training kernels on one GPU: each a roofline of its own, smooth at the ridge.

A kernel takes as long as its arithmetic at the share of the peak that such kernels reach, or its bytes at
the share of the memory bandwidth, whichever is longer, and somewhat more where they are alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from whalepod.planner.roofline import smooth_max
from whalepod.planner.software import Shares
from whalepod.spec.errors import UserError
from whalepod.spec.hardware import Gpu

Times = np.ndarray
RIDGE = 4.0  # how sharp the roofline's ridge is
LAUNCH_S = 4e-6  # from one kernel's end to the next one's work on the device


@dataclass(frozen=True)
class Kernels:
    """The kernels of a GPU under a stack's shares. `precision` arguments are arrays of names."""

    gpu: Gpu
    shares: Shares

    def rate(self, share_of: Mapping[str, float], precision: np.ndarray) -> np.ndarray:
        """FLOP/s that products of each precision reach when they fill the GPU."""
        rates = np.zeros(np.shape(precision))
        for name in set(np.asarray(precision, dtype=object).ravel().tolist()):
            peak = self.gpu.peak_flops(name)
            if peak is None:
                raise UserError(f"{self.gpu.name} has no {name} matrix products; use bf16")
            rates[precision == name] = peak * share_of.get(name, share_of["bf16"])
        return rates

    @property
    def bandwidth(self) -> float:
        """Bytes per second of the device memory, at the reachable share."""
        return self.gpu.memory_tb_s * 1e12 * self.shares.memory

    @property
    def optimizer_bandwidth(self) -> float:
        """The same of the optimiser's pass over its state."""
        return self.gpu.memory_tb_s * 1e12 * (self.shares.optimizer or self.shares.memory)

    @property
    def launch(self) -> float:
        """Seconds that a kernel takes however small it is."""
        return LAUNCH_S if self.gpu.measured is None else self.gpu.measured.dispatch_us * 1e-6

    def product(self, rows, inner, columns, precision, out_bytes=None) -> Times:
        """rows x inner times inner x columns. `out_bytes` an element: that of the precision, BF16's for FP8;
        accumulation into FP32 is 8."""
        flops = 2.0 * rows * inner * columns
        out_bytes = np.where(precision == "fp32", 4.0, 2.0) if out_bytes is None else out_bytes
        element = np.where(precision == "fp8", 1.0, np.where(precision == "fp32", 4.0, 2.0))
        moved = element * (rows * inner + inner * columns) + out_bytes * rows * columns
        rate = self.rate(self.shares.gemm, precision) * inner / (inner + self.shares.half_k)
        return smooth_max(flops / rate, moved / self.bandwidth, power=RIDGE) + self.launch

    def grouped(self, experts, rows, inner, columns, precision, out_bytes=None, of="rows") -> Times:
        """`experts` products of `rows` x inner times inner x columns; `of` names the routed dimension:
        `rows`, or `inner` in the gradient of the weights."""
        flops = 2.0 * experts * rows * inner * columns
        out_bytes = np.where(precision == "fp32", 4.0, 2.0) if out_bytes is None else out_bytes
        element = np.where(precision == "fp8", 1.0, np.where(precision == "fp32", 4.0, 2.0))
        moved = experts * (element * (rows * inner + inner * columns) + out_bytes * rows * columns)
        routed, fixed = (rows, inner) if of == "rows" else (inner, np.minimum(rows, columns))
        rate = self.rate(self.shares.grouped, precision) * fixed / (fixed + self.shares.half_k)
        rate = rate * routed / (routed + self.shares.half_rows)
        return smooth_max(flops / rate, moved / self.bandwidth, power=RIDGE) + self.launch

    def attention(
        self, flops: np.ndarray, precision: np.ndarray, tokens: float, width: int, backward: bool = False
    ) -> Times:
        """Causal attention of the given FLOPs (of this pass) over whole sequences of `tokens` with keys of
        `width`, never in FP8."""
        short, narrow = self.shares.half_attention[backward]
        share = self.shares.attention[backward] / (1 + short / tokens + narrow / width)
        high = np.where(precision == "fp8", "bf16", precision)
        return flops / self.rate({"bf16": share}, high) + self.launch

    def stream(self, moved: np.ndarray) -> Times:
        """Elementwise work that moves so many bytes."""
        return moved / self.bandwidth

    def gather(self, moved: np.ndarray) -> Times:
        """Rows copied from and to scattered places."""
        return moved / (self.gpu.memory_tb_s * 1e12 * self.shares.permute)
