"""Routing without values: fake tensors choose no experts, so a drawn choice stands for theirs.

`draw_picks` routes random tokens by the model's own rule (groups included) and then moves a few picks until
every expert has its share; with an imbalance, until the first rank's experts have so many times the mean.
All ranks of the job are taken to draw the same, so that what each receives is known. Sizes that a real run
reads from its tensors come from the exchange's own arithmetic over these picks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes as truly

from whalepod.models.moe import MoELayer, select_experts
from whalepod.parallel.comm import Axis
from whalepod.parallel.exchange import Exchange, Flat, TwoHop
from whalepod.parallel.parallelize import Part
from whalepod.spec.model import MoE


@lru_cache(maxsize=32)
def draw_picks(moe: MoE, tokens: int, ep: int = 1, imbalance: float = 1.0, seed: int = 0) -> Tensor:
    """Experts of `tokens` tokens, int64 [T, K]; each expert has its share of them, to the pick where groups
    allow it. imbalance: of the first of `ep` ranks' experts, over the mean."""
    experts, k = moe.n_routed_experts, moe.num_experts_per_tok
    share = np.full(experts, tokens * k / experts)
    if ep > 1:
        first = experts // ep
        share[:first] *= min(imbalance, ep)
        share[first:] *= (ep - min(imbalance, ep)) / (ep - 1)
    generator = torch.Generator().manual_seed(seed)
    chance = torch.rand(tokens, experts, generator=generator, dtype=torch.float64)
    weight = torch.from_numpy(share / share.mean()).clamp_min(1e-9)
    ids = select_experts(moe, chance.pow(1 / weight), None).numpy()
    # A drawn load is off by about the root of itself; what is left over the share moves on.
    goal = np.floor(np.cumsum(share) + 1e-9).astype(np.int64)
    _level(ids, np.diff(goal, prepend=0), moe, np.random.default_rng(seed))
    return torch.from_numpy(ids)


def _level(ids: np.ndarray, goal: np.ndarray, moe: MoE, random: np.random.Generator) -> None:
    """Moves picks of experts beyond their goal to others of the same token's groups, in place."""
    group = np.arange(len(goal)) // (len(goal) // moe.n_group)
    missing = goal - np.bincount(ids.ravel(), minlength=len(goal))
    for _ in range(3):  # a move may have to wait for another
        for expert in np.flatnonzero(missing < 0):
            tokens, places = np.nonzero(ids == expert)
            for at in random.permutation(len(tokens)):
                if missing[expert] >= 0:
                    break
                row = ids[tokens[at]]
                wanted = missing.copy()
                wanted[row] = 0
                if moe.topk_method != "greedy":
                    wanted[~np.isin(group, group[row])] = 0
                best = int(wanted.argmax())
                if wanted[best] > 0:
                    row[places[at]] = best
                    missing[best] -= 1
                    missing[expert] += 1


def settle(parts: Sequence[Part], picks_of: Callable[[int], Tensor]) -> None:
    """Gives every exchange of a model the sizes that the routing `picks_of(tokens)` has on all ranks."""
    exchanges = {
        id(m.dispatcher): m.dispatcher
        for part in parts
        for m in part.modules()
        if isinstance(m, MoELayer) and isinstance(m.dispatcher, Exchange)
    }
    for exchange in exchanges.values():
        _Settled(exchange, picks_of)


class _Settled:
    """Replaces the one place where an exchange reads numbers from tensors."""

    def __init__(self, exchange: Exchange, picks_of: Callable[[int], Tensor]) -> None:
        self._exchange: Any = exchange
        self._picks_of = picks_of
        self._sizes: dict[tuple[int, int], list[list[int]]] = {}
        self._now = (0, 0)
        splits = self._exchange.splits

        def note(ids_TK: Tensor, num_local: int) -> Any:
            self._now = (len(ids_TK), num_local)
            return splits(ids_TK, num_local)

        self._exchange.splits = note
        self._exchange.known = self._known

    def _known(self, *_sizes: Tensor) -> list[list[int]]:
        if self._now not in self._sizes:
            tokens, num_local = self._now
            with truly():
                self._sizes[self._now] = self._count(self._picks_of(tokens), num_local)
        return self._sizes[self._now]

    def _count(self, picks_TK: Tensor, num_local: int) -> list[list[int]]:
        exchange = self._exchange
        if isinstance(exchange, Flat):
            twin: Any = Flat(_Mirror.of(exchange.ep), 1)
        else:
            assert isinstance(exchange, TwoHop)
            twin = TwoHop(_Mirror.of(exchange.rail), _Mirror.of(exchange.node))
        kept: list[list[list[int]]] = []

        def keep(*sizes: Tensor) -> list[list[int]]:
            kept.append(Exchange.known(twin, *sizes))
            return kept[-1]

        twin.known = keep
        twin.splits(picks_TK, num_local)
        return kept[0]


class _Mirror(Axis):
    """An axis on which every other rank says what this one says."""

    @staticmethod
    def of(axis: Axis) -> _Mirror:
        return _Mirror(axis.name, axis.size, axis.rank)

    def start_all_to_all(self, rows: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        return rows[self.rank].unsqueeze(0).expand(self.size, *rows.shape[1:]).contiguous()
