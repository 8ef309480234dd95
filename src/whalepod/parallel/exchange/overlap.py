"""The autograd nodes of an exchange, cut where computation can go on while rows travel.

DeepSeek-V3 hides the exchange behind computation (section 3.2.1, by pairing micro-batches). Within one
micro-batch the shared expert can do it, for it needs no exchange. So dispatch is two nodes, and the layer
computes its shared expert between them: `_Depart` starts the journey, `_Arrive` waits for it. Autograd runs
nodes in the reverse order of their creation: on the way back `_Arrive` starts the gradients' journey, what
was computed between runs its backward pass, and `_Depart` waits.

What is under way is kept by the trip: to autograd a tensor that has not arrived would be one like any other.
The nodes are tied together by an empty tensor, the ticket.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from whalepod.models.moe import Rows


class Travel(Protocol):
    """One layer's rows under way; D wide, T at the source, N sorted by expert at the other end."""

    @property
    def ends_E(self) -> Tensor:
        """Row after each local expert's last, once `arrive` has run."""
        ...

    def depart(self, x_TD: Tensor, weights_TK: Tensor) -> None:
        """Starts to send rows to their experts."""
        ...

    def arrive(self) -> tuple[Tensor, Tensor]:
        """Waits for them: [N, D] and weights [N]."""
        ...

    def turn_back(self, grad_ND: Tensor, grad_weights_N: Tensor) -> None:
        """Starts to send gradients home."""
        ...

    def come_home(self) -> tuple[Tensor, Tensor]:
        """Waits for them: [T, D] and [T, K]."""
        ...

    def combine(self, y_ND: Tensor) -> Tensor:
        """Each token's sum of its experts' results [T, D]."""
        ...

    def spread(self, grad_TD: Tensor) -> Tensor:
        """The transpose of `combine`: [N, D]."""
        ...


class Overlapped(ABC):
    """A dispatcher (`models.moe.Dispatcher`) of such trips."""

    @abstractmethod
    def travel(self, x_TD: Tensor, ids_TK: Tensor, num_experts: int) -> Travel:
        """The trip that these tokens are going to make."""

    def start(
        self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, num_experts: int
    ) -> tuple[Tensor, Travel]:
        trip = self.travel(x_TD, ids_TK, num_experts)
        return _Depart.apply(x_TD, weights_TK, trip), trip

    def finish(self, sent: tuple[Tensor, Travel]) -> tuple[Rows, Travel]:
        ticket, trip = sent
        x_ND, weights_N = _Arrive.apply(ticket, trip)
        return Rows(x_ND, weights_N, trip.ends_E), trip

    def combine(self, y_ND: Tensor, plan: Travel) -> Tensor:
        return _Combine.apply(y_ND, plan)


class _Depart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weights_TK: Tensor, trip: Travel) -> Tensor:
        ctx.trip = trip
        trip.depart(x_TD, weights_TK)
        return x_TD.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _ticket: Tensor) -> tuple[Tensor, Tensor, None]:
        return *ctx.trip.come_home(), None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ticket: Tensor, trip: Travel) -> tuple[Tensor, Tensor]:
        ctx.trip = trip
        return trip.arrive()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor, grad_weights_N: Tensor) -> tuple[Tensor, None]:
        ctx.trip.turn_back(grad_ND, grad_weights_N)
        return grad_ND.new_empty(0), None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_ND: Tensor, trip: Travel) -> Tensor:
        ctx.trip = trip
        return trip.combine(y_ND)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None]:
        return ctx.trip.spread(grad_TD), None
