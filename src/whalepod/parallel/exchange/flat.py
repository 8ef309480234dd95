"""flat: every pick is a row of its own, and one all-to-all brings it to its expert.

The plain way. A token with K picks travels K times, several times to one rank if it has several experts
there. Within a node that costs little; between nodes `two_hop` does better.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from whalepod.parallel.comm import Axis
from whalepod.parallel.exchange.fan import fan_to_picks
from whalepod.parallel.exchange.trip import Exchange, Leg, Route
from whalepod.spec.layout import Wire


class FlatSplits(NamedTuple):
    send: list[int]  # rows to each rank
    receive: list[int]


class Flat(Exchange):
    """`ep`: the ranks that share the experts out, `node_size` consecutive ones to a node."""

    def __init__(self, ep: Axis, node_size: int, wire: Wire = "bf16") -> None:
        super().__init__(ep.size, ep.rank, wire)
        self.ep = ep
        self._away = [i // node_size != ep.rank // node_size for i in range(ep.size)]

    def splits(self, ids_TK: Tensor, num_local: int) -> FlatSplits:
        """All sizes that depend on the routing, agreed among the ranks; the one wait for the device."""
        rank_of_pick = (ids_TK // num_local).flatten()
        send = torch.zeros(self.ep.size, dtype=torch.int64, device=ids_TK.device)
        send.scatter_add_(0, rank_of_pick, torch.ones_like(rank_of_pick))
        one_each = [1] * self.ep.size
        receive = self.ep.wait(self.ep.start_all_to_all(send, one_each, one_each))
        return FlatSplits(*self.known(send, receive))

    def route(self, ids_TK: Tensor, num_local: int) -> Route:
        splits = self.splits(ids_TK, num_local)
        fan, pick_S = fan_to_picks(ids_TK)
        return Route(Leg(self.ep, fan, *splits, self._away, self.crossed), pick_S, sum(splits.receive))
