"""two_hop: a token crosses to a node once, however many experts it has there (DeepSeek-V3, section 3.2.2).

Links between nodes are several times slower than links within one (InfiniBand 50 GB/s, NVLink 160 GB/s in
the report). So a row first crosses to the rank at its own place in the target node (`rail`: the ranks at
one place in every node), ids and weights of all its picks with it; that rank passes it on within the node
(`node`) once to each rank that holds one of its experts. On the way back results are summed by the rank
where the token entered the node, and one row crosses back.

V3's router lets a token reach 4 nodes at most: 8 picks, but 4 crossings. FP8 parcels are passed on as they
came, so a row is rounded once.

With one node there is no first hop, with one rank to a node the second is empty.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from whalepod.parallel.comm import Axis
from whalepod.parallel.exchange.fan import fan_to_columns
from whalepod.parallel.exchange.trip import Exchange, Leg, Route
from whalepod.spec.layout import Wire


class TwoHopSplits(NamedTuple):
    rail_send: list[int]  # rows to each node
    rail_receive: list[int]
    node_send: list[int]  # of those, rows to each rank of this node
    node_receive: list[int]
    picks: int  # that end on this rank


class TwoHop(Exchange):
    """`rail`: the ranks at this place in every node. `node`: the ranks of this node. Experts are numbered
    along the nodes: rank of expert = node x node's size + place."""

    def __init__(self, rail: Axis, node: Axis, wire: Wire = "bf16") -> None:
        super().__init__(rail.size * node.size, rail.rank * node.size + node.rank, wire)
        self.rail, self.node = rail, node

    def splits(self, ids_TK: Tensor, num_local: int) -> TwoHopSplits:
        """All sizes that depend on the routing, agreed among the ranks; the one wait for the device.

        The source counts for both hops, so that no row has to arrive before the second hop's sizes are known.
        """
        nodes, places, tokens = self.rail.size, self.node.size, len(ids_TK)
        rank_TK = ids_TK // num_local
        picks = torch.zeros(tokens, self.num_ranks, dtype=torch.int64, device=ids_TK.device)
        picks.scatter_add_(1, rank_TK, torch.ones_like(rank_TK))
        reached = (picks > 0).unflatten(1, (nodes, places))
        rail_send = reached.any(2).sum(0)
        per_rank = torch.stack([reached.sum(0), picks.sum(0).view(nodes, places)])  # [2, nodes, places]
        told = torch.cat([rail_send.unsqueeze(1), *per_rank], dim=1)
        heard = self.rail.wait(self.rail.start_all_to_all(told, [1] * nodes, [1] * nodes))
        node_told = heard[:, 1:].sum(0).view(2, places).T.contiguous()  # rows and picks, to each place
        node_heard = self.node.wait(self.node.start_all_to_all(node_told, [1] * places, [1] * places))
        lists = self.known(rail_send, heard[:, 0], node_told[:, 0], node_heard[:, 0], node_heard[:, 1])
        return TwoHopSplits(*lists[:4], picks=sum(lists[4]))

    def route(self, ids_TK: Tensor, num_local: int) -> Route:
        splits = self.splits(ids_TK, num_local)
        if self.rail.size == 1:
            return Route(self._within(splits, num_local, ids_TK), None, splits.picks)
        node_TK = ids_TK // (num_local * self.node.size)
        fan = fan_to_columns(_reached(node_TK, self.rail.size), sum(splits.rail_send))
        away = [node != self.rail.rank for node in range(self.rail.size)]
        first = Leg(self.rail, fan, splits.rail_send, splits.rail_receive, away, self.crossed)
        return Route(first, None, splits.picks, partial(self._within, splits, num_local))

    def _within(self, splits: TwoHopSplits, num_local: int, ids_RK: Tensor) -> Leg:
        """The second leg. Ids of experts in other nodes are in the parcels too."""
        places = self.node.size
        place_RK = ids_RK // num_local - self.rail.rank * places
        elsewhere = (place_RK < 0) | (place_RK >= places)
        reached = _reached(place_RK.masked_fill(elsewhere, places), places + 1)[:, :places]
        fan = fan_to_columns(reached, sum(splits.node_send))
        return Leg(self.node, fan, splits.node_send, splits.node_receive, [False] * places, self.crossed)


def _reached(index_RK: Tensor, size: int) -> Tensor:
    """[R, size]: whether any of a row's K indices is this one."""
    none = torch.zeros(len(index_RK), size, dtype=torch.bool, device=index_RK.device)
    return none.scatter_(1, index_RK, True)
