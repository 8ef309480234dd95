"""What the protocols share: legs there and back, and the trip of one layer's rows over them.

A protocol (`flat`, `two_hop`) is one leg or two. A leg copies rows into the order of their destinations
(its `Fan`), sends them along one axis, and brings results back the same way: the reverse all-to-all, then
the sum over each row's copies. That sum is what makes a second leg worth while: behind a slow link rows are
copied after they have crossed it, and summed before they cross it again.

    dispatch            legs in order,   parcels            -> rows sorted by expert
    its backward        legs in reverse, gradients
    combine             legs in reverse, experts' results   -> sums at the source
    its backward        legs in order,   gradients
"""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from whalepod.parallel.comm import Axis, keep
from whalepod.parallel.exchange.fan import Fan
from whalepod.parallel.exchange.landing import Landing, land
from whalepod.parallel.exchange.overlap import Overlapped
from whalepod.parallel.exchange.wire import Parcel, pack_grads, to_bytes, unpack_grads
from whalepod.spec.layout import Wire


@dataclass(frozen=True)
class Leg:
    """A crossing along one axis: copies of rows, and how many of them go to and come from each rank."""

    axis: Axis
    fan: Fan
    send: Sequence[int]
    receive: Sequence[int]
    away: Sequence[bool]  # which ranks of the axis are in other nodes
    crossed: Counter[str]  # bytes that this rank has sent out of its node, by direction

    def there(self, copies_SB: Tensor, direction: str) -> Tensor:
        """Starts to send copies; `wait` on the result for what arrives."""
        self._count(copies_SB, self.send, direction)
        return self.axis.start_all_to_all(copies_SB, self.send, self.receive)

    def back(self, arrived_RB: Tensor, direction: str) -> Tensor:
        """Starts to send what became of the rows that arrived; `wait` on the result for the copies'."""
        self._count(arrived_RB, self.receive, direction)
        return self.axis.start_all_to_all(arrived_RB, self.receive, self.send)

    def _count(self, rows: Tensor, splits: Sequence[int], direction: str) -> None:
        if not self.axis.traffic.paused:
            leaving = sum(n for n, away in zip(splits, self.away, strict=True) if away)
            self.crossed[direction] += leaving * rows.shape[1] * rows.element_size()


class Route(NamedTuple):
    """Where one layer's rows go; all sizes that depend on the routing are settled in it."""

    first: Leg
    pick_S: Tensor | None  # the pick (t x K + k) that each first copy serves; None: all of its token
    num_picks: int  # that end on this rank
    onward: Callable[[Tensor], Leg] | None = None  # the second leg, for the ids [R, M] that have arrived


class Exchange(Overlapped):
    """Expert parallelism's dispatcher; one serves all layers of a model.

    Rank r of `num_ranks` holds E / num_ranks experts from r x E / num_ranks on. `crossed` tallies the bytes
    that this rank has sent to other nodes, by direction: `dispatch`, `combine` and their `_backward`.
    """

    def __init__(self, num_ranks: int, rank: int, wire: Wire) -> None:
        self.num_ranks, self.rank = num_ranks, rank
        self.wire: Wire = wire
        self.crossed: Counter[str] = Counter()

    @abstractmethod
    def route(self, ids_TK: Tensor, num_local: int) -> Route:
        """The way of each pick to its expert's rank, of which each holds `num_local` experts."""

    def known(self, *sizes: Tensor) -> list[list[int]]:
        """Sizes as numbers: the one place that waits for the device, and that a dry run replaces."""
        parts = torch.cat(sizes).cpu().split([len(part) for part in sizes])
        return [part.tolist() for part in parts]

    def travel(self, x_TD: Tensor, ids_TK: Tensor, num_experts: int) -> Trip:
        assert num_experts % self.num_ranks == 0, (num_experts, self.num_ranks)
        num_local = num_experts // self.num_ranks
        route = self.route(ids_TK, num_local)
        picks = ids_TK.shape[1] if route.pick_S is None else 1
        parcel = Parcel(self.wire, x_TD.shape[1], x_TD.dtype, picks)
        return Trip(route, parcel, ids_TK, num_local, self.rank)


class Trip:
    """One layer's rows under way, from `start` to the end of the backward pass (`overlap.Travel`)."""

    landing: Landing

    def __init__(self, route: Route, parcel: Parcel, ids_TK: Tensor, num_local: int, rank: int) -> None:
        self.route, self.parcel, self.num_local, self.rank = route, parcel, num_local, rank
        self.legs = [route.first]
        self.ids_SM, self.shape_TK = self._of_copies(ids_TK).int(), ids_TK.shape
        self.in_flight: Tensor | None = None

    @property
    def ends_E(self) -> Tensor:
        return self.landing.ends_E

    def depart(self, x_TD: Tensor, weights_TK: Tensor) -> None:
        # Encoded once per token, then copied as bytes.
        body_SB = self.legs[0].fan.spread(self.parcel.encode(x_TD))
        picks = [to_bytes(self.ids_SM), to_bytes(self._of_copies(weights_TK.float()))]
        with self._passed_on():
            self.in_flight = self.legs[0].there(torch.cat([body_SB, *picks], dim=1), "dispatch")

    def arrive(self) -> tuple[Tensor, Tensor]:
        with self._passed_on():
            parcels = self._landed()
        if self.route.onward is not None:
            leg = self.route.onward(keep(self.parcel.ids(parcels)))
            self.legs.append(leg)
            # Unopened: what was rounded at the source is not rounded again.
            parcels = leg.axis.wait(leg.there(leg.fan.spread(parcels), "dispatch"))
        ids_RM = self.parcel.ids(parcels) - self.rank * self.num_local
        self.landing = land(ids_RM, self.num_local, self.route.num_picks)
        return self.landing.sort(self.parcel.decode(parcels), self.parcel.weights(parcels))

    def turn_back(self, grad_ND: Tensor, grad_weights_N: Tensor) -> None:
        grads = self.landing.sort_back(grad_ND, grad_weights_N)
        for leg in reversed(self.legs[1:]):
            grad_SD, grad_SM = self._grads(leg.axis.wait(leg.back(pack_grads(*grads), "dispatch_backward")))
            grads = leg.fan.collect(grad_SD), leg.fan.collect(grad_SM)
        self.in_flight = self.legs[0].back(pack_grads(*grads), "dispatch_backward")

    def come_home(self) -> tuple[Tensor, Tensor]:
        grad_SD, grad_SM = self._grads(self._landed())
        fan = self.legs[0].fan
        if self.route.pick_S is None:
            return fan.collect(grad_SD), fan.collect(grad_SM)
        return fan.collect(grad_SD), grad_SM.flatten()[fan.copies].view(self.shape_TK)

    def combine(self, y_ND: Tensor) -> Tensor:
        y = self.landing.collect(y_ND)
        for leg in reversed(self.legs):
            y = leg.fan.collect(leg.axis.wait(leg.back(y, "combine")))
        return y

    def spread(self, grad_TD: Tensor) -> Tensor:
        for leg in self.legs:
            grad_TD = leg.axis.wait(leg.there(leg.fan.spread(grad_TD), "combine_backward"))
        return self.landing.spread(grad_TD)

    def _passed_on(self) -> AbstractContextManager[None]:
        """Of what a first of two legs brings, the second's route is all that is needed afterwards."""
        return self.legs[0].axis.traffic.only_passed_on(self.route.onward is not None)

    def _of_copies(self, of_picks_TK: Tensor) -> Tensor:
        """What a first copy has to carry of its token's picks: all, or the one it serves."""
        if self.route.pick_S is None:
            return self.route.first.fan.spread(of_picks_TK)
        return of_picks_TK.flatten()[self.route.pick_S].unsqueeze(1)

    def _grads(self, copies_SB: Tensor) -> tuple[Tensor, Tensor]:
        return unpack_grads(copies_SB, self.parcel.hidden, self.parcel.dtype)

    def _landed(self) -> Tensor:
        assert self.in_flight is not None
        landed, self.in_flight = self.legs[0].axis.wait(self.in_flight), None
        return landed
