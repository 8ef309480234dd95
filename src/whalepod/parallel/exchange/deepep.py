"""DeepEP (github.com/deepseek-ai/DeepEP): DeepSeek's own exchange kernels, behind the same three methods.

Cannot run without Hopper or newer GPUs: this file was written against DeepEP's documentation (docs/legacy.md)
and `deep_ep.Buffer` as of 2.1.0, and has not been run. `Buffer` is in releases 1 and 2 alike, and its
internode kernels do what `two_hop` does. The one test is marked `gpu`.

Dispatch gives a rank one row [R, D] for each token with an expert here, with ids [R, K] of the experts here
(-1 for others) and weights [R, K]; combine adds up, without weights, what the ranks return for a token.
They are each other's transpose, so each is the other's backward pass, over the same handle.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from torch import Tensor

from whalepod.parallel.comm import Axis
from whalepod.parallel.exchange.landing import Landing, land
from whalepod.parallel.exchange.overlap import Overlapped
from whalepod.precision.tiles import ROW, Quantized, dequantize, quantize
from whalepod.spec.layout import Wire


def is_installed() -> bool:
    return find_spec("deep_ep") is not None


class DeepEP(Overlapped):
    """A dispatcher over the ranks of `ep`; one serves all layers, which then share its buffers.

    Activations must be BF16, and FP8 parcels need a hidden size in multiples of 128. DeepEP counts no bytes.
    """

    def __init__(self, ep: Axis, wire: Wire = "bf16") -> None:
        self.ep = ep
        self.wire: Wire = wire
        self._buffer: Any = None

    def travel(self, x_TD: Tensor, ids_TK: Tensor, num_experts: int) -> _Trip:
        if self._buffer is None:
            self._buffer = _make_buffer(self.ep, x_TD)
        return _Trip(self._buffer, self.wire, ids_TK, num_experts, num_experts // self.ep.size)


def _make_buffer(ep: Axis, x_TD: Tensor) -> Any:
    from deep_ep import Buffer  # type: ignore[import-not-found]

    row_bytes = x_TD.shape[1] * max(x_TD.element_size(), 2)
    nvlink_bytes = rdma_bytes = 0
    for config in (Buffer.get_dispatch_config(ep.size), Buffer.get_combine_config(ep.size)):
        nvlink_bytes = max(config.get_nvl_buffer_size_hint(row_bytes, ep.size), nvlink_bytes)
        rdma_bytes = max(config.get_rdma_buffer_size_hint(row_bytes, ep.size), rdma_bytes)
    return Buffer(ep.group, nvlink_bytes, rdma_bytes)


class _Trip:
    """`overlap.Travel`. Kernels run on DeepEP's own stream; an event says when the current one may go on."""

    landing: Landing

    def __init__(self, buffer: Any, wire: Wire, ids_TK: Tensor, num_experts: int, num_local: int) -> None:
        self._buffer, self._ids = buffer, ids_TK
        self._wire: Wire = wire
        self._num_experts, self._num_local = num_experts, num_local
        self._handle: Any = None
        self._under_way: Any = None

    @property
    def ends_E(self) -> Tensor:
        return self.landing.ends_E

    def depart(self, x_TD: Tensor, weights_TK: Tensor) -> None:
        per_rank, per_node, per_expert, in_rank, _ = self._buffer.get_dispatch_layout(
            self._ids, self._num_experts
        )
        x_RD, ids_RK, weights_RK, picks_of_expert, self._handle, event = self._buffer.dispatch(
            tuple(quantize(x_TD, ROW, "float32")) if self._wire == "fp8" else x_TD,
            topk_idx=self._ids,
            topk_weights=weights_TK.float(),
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_node,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
            async_finish=True,
        )
        self._under_way = x_RD, ids_RK, weights_RK, sum(picks_of_expert), x_TD.dtype, event

    def arrive(self) -> tuple[Tensor, Tensor]:
        x_RD, ids_RK, weights_RK, num_picks, dtype, event = self._landed()
        event.current_stream_wait()
        if self._wire == "fp8":
            x_RD = dequantize(Quantized(*x_RD), dtype)
        # Ids count from the first expert here already.
        self.landing = land(ids_RK, self._num_local, num_picks)
        return self.landing.sort(x_RD, weights_RK)

    def turn_back(self, grad_ND: Tensor, grad_weights_N: Tensor) -> None:
        grad_RD, grad_RK = self.landing.sort_back(grad_ND, grad_weights_N)
        self._under_way = self._buffer.combine(grad_RD, self._handle, topk_weights=grad_RK, async_finish=True)

    def come_home(self) -> tuple[Tensor, Tensor]:
        grad_TD, grad_TK, event = self._landed()
        event.current_stream_wait()
        return grad_TD, grad_TK

    def combine(self, y_ND: Tensor) -> Tensor:
        return self._buffer.combine(self.landing.collect(y_ND), self._handle)[0]

    def spread(self, grad_TD: Tensor) -> Tensor:
        return self.landing.spread(self._buffer.dispatch(grad_TD.contiguous(), handle=self._handle)[0])

    def _landed(self) -> Any:
        landed, self._under_way = self._under_way, None
        return landed
