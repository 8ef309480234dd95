"""What data-parallel ranks exchange in a step, and the optimiser's own time.

Gradients are summed and, from ZeRO 1 on, scattered; weights are gathered: once a step, with ZeRO 2 and 3
after every micro-batch, block by block. Both hide behind the passes that they belong to, where the links are
not taken by the experts' exchange.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from whalepod.planner.candidates import Candidates, Column
from whalepod.planner.cut import cut
from whalepod.planner.network import Network
from whalepod.planner.state import State, StateTypes, unit_counts
from whalepod.spec.model import ModelSpec

HIDDEN_SHARE = 0.85
"""Of a pass behind which sums and gathers can hide: the last blocks' have nothing after them."""


@dataclass(frozen=True)
class DataParallel:
    """Of candidates: arrays over rows, for the pipeline rank that holds most.

    bandwidth: of memory in the optimiser, in bytes per second.
    """

    spec: ModelSpec
    candidates: Candidates
    sequence_length: int
    network: Network
    types: StateTypes
    bandwidth: float

    @cached_property
    def state(self) -> State:
        return State(self.spec, self.candidates, self.types)

    @cached_property
    def elements(self) -> dict[str, Column]:
        """Parameters before ZeRO shards them: `plain` and `experts`; and `blocks`, how many they come in."""
        c = self.candidates
        out = {name: np.zeros(len(c)) for name in ("plain", "experts", "blocks")}
        for (schedule, pp, stages, stage_layers), rows in c.pipelines():
            layers = cut(self.spec, pp, stages, schedule, self.sequence_length, stage_layers)
            for name, held in self.state.elements(unit_counts(self.spec, layers), rows).items():
                out[name][rows] = held.max(1)
            out["blocks"][rows] = max(1, int((layers.dense + layers.moe).sum(1).max()))
        return out

    @cached_property
    def _seconds(self) -> tuple[Column, Column]:
        """Of all sums and of all gathers in a step."""
        c, n, m = self.candidates, self.network, self.candidates.accumulation
        sums, gathers, blocks = np.zeros(len(c)), np.zeros(len(c)), self.elements["blocks"]
        own = {"plain": c.tp, "experts": np.where(c.ep > 1, c.ep, c.tp)}
        for name, stride in own.items():
            shards, total = self.state.shards[name], self.elements[name] / blocks
            inner = n.inner(shards, stride)
            copies, across = c.dp_replicate, n.inner(c.dp_replicate, stride * shards)
            scatter = n.reduce_scatter(total * self.types.gradient, shards, inner)
            gather = n.all_gather(total * self.state.compute, shards, inner)
            repeat = n.all_reduce(total / shards * self.types.gradient, copies, across)
            sums += blocks * (np.where(c.zero >= 2, m, 1) * scatter + repeat)
            gathers += blocks * np.where(c.zero == 3, 2 * m, 1) * gather
        return sums, gathers

    @cached_property
    def optimizer(self) -> Column:
        """Seconds of AdamW, which is memory-bound: gradient, master and two moments read, the last three and
        the weight written."""
        shards, held = self.state.shards, self.elements
        own = held["plain"] / shards["plain"] + held["experts"] / shards["experts"]
        types = self.types
        moved = types.gradient + 2 * (types.master + types.moment1 + types.moment2) + types.weight
        return own * moved / self.bandwidth

    def shown(self, backward: Column, forward: Column, hidden: Column) -> Column:
        """Seconds of it that show, given a rank's backward and forward work in a step, and the exchange that
        hides behind them already."""
        c, (sums, gathers) = self.candidates, self._seconds
        free = HIDDEN_SHARE * np.clip(1 - hidden / np.maximum(backward + forward, 1e-30), 0.0, 1.0)
        # Once a step: behind the last micro-batch's backward pass, and the next step's first forward pass.
        behind = backward / np.where(c.zero >= 2, 1, c.accumulation)
        before = np.where(c.zero == 3, forward + backward, forward / c.accumulation)
        return np.maximum(sums - free * behind, 0.0) + np.maximum(gathers - free * before, 0.0)
