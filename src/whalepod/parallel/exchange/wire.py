"""What a row looks like while it travels: bytes.

A parcel is one row of a uint8 matrix: the activation, then one expert id (int32) and one weight (float32)
for each pick that the row serves. One message instead of three, gloo needs to know no FP8, and a rank in
the middle can pass parcels on unopened.

`bf16` sends activations as they are (float32 where the model runs in float32). `fp8` sends E4M3 with a
float32 scale for each 1 x 128 tile, half the bytes. As in DeepSeek-V3 (section 3.3.3) only what goes to
the experts is rounded so; what they return, and gradients, keep their type. The gradient passes the
rounding straight through.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from whalepod.precision.fp8 import FP8
from whalepod.precision.tiles import ROW, Quantized, dequantize, quantize
from whalepod.spec.layout import FP8_BLOCK, Wire


def to_bytes(x_RD: Tensor) -> Tensor:
    return x_RD.contiguous().view(torch.uint8)


class Parcel(NamedTuple):
    """How to read parcels: what they hold is known on both sides."""

    wire: Wire
    hidden: int
    dtype: torch.dtype  # of the activations
    picks: int  # ids and weights in each parcel

    def encode(self, x_TD: Tensor) -> Tensor:
        """Activations as bytes [T, B]."""
        if self.wire == "fp8":
            values, scale = quantize(x_TD, ROW, "float32")
            return torch.cat([to_bytes(values), to_bytes(scale)], dim=1)
        return to_bytes(x_TD)

    def decode(self, parcels_RB: Tensor) -> Tensor:
        """[R, hidden] activations of parcels."""
        body = parcels_RB[:, : self._body]
        if self.wire == "fp8":
            values, scale = body.split([self.hidden, self._body - self.hidden], dim=1)
            return dequantize(Quantized(values.view(FP8), scale.view(torch.float32)), self.dtype)
        return body.view(self.dtype)

    def ids(self, parcels_RB: Tensor) -> Tensor:
        """[R, picks] global expert ids, int64."""
        end = self._body + 4 * self.picks
        return parcels_RB[:, self._body : end].view(torch.int32).long()

    def weights(self, parcels_RB: Tensor) -> Tensor:
        """[R, picks] float32."""
        return parcels_RB[:, self._body + 4 * self.picks :].view(torch.float32)

    @property
    def _body(self) -> int:
        if self.wire == "fp8":
            return self.hidden + self.hidden // FP8_BLOCK * torch.float32.itemsize
        return self.hidden * self.dtype.itemsize


def pack_grads(grad_RD: Tensor, grad_weights_RM: Tensor) -> Tensor:
    """Gradients of a row and of its picks' weights, as one row of bytes."""
    return torch.cat([to_bytes(grad_RD), to_bytes(grad_weights_RM)], dim=1)


def unpack_grads(parcels_RB: Tensor, hidden: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    body = hidden * dtype.itemsize
    return parcels_RB[:, :body].view(dtype), parcels_RB[:, body:].view(torch.float32)
