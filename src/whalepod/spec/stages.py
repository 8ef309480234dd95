"""Which layers each pipeline stage holds, by cost.

A pipeline runs at the pace of its slowest stage, and layers are not alike: a dense layer, a layer of
experts, the head and multi-token prediction (a block, and the head once more) all cost differently,
and an embedding is a lookup. Of all ways to cut the model into consecutive parts, `split_stages`
takes one whose costliest part is cheapest, and of those the most even.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate

from whalepod.spec.counts import head_flops, layer_flops, mtp_flops
from whalepod.spec.errors import UserError
from whalepod.spec.model import ModelSpec


@dataclass(frozen=True)
class StageSplit:
    """`layers[stage]`: the half-open range of main layers; `costs[stage]`: forward FLOPs per token.

    The embedding is on the first stage; final norm, head and MTP blocks are on the last, which may
    have nothing else.
    """

    layers: tuple[tuple[int, int], ...]
    costs: tuple[float, ...]

    @property
    def num_stages(self) -> int:
        return len(self.layers)

    @property
    def imbalance(self) -> float:
        """Cost of the costliest stage over the mean: by so much the split slows a full pipeline."""
        return max(self.costs) * len(self.costs) / sum(self.costs)


def split_stages(
    spec: ModelSpec, num_stages: int, sequence_length: int, stage_layers: Sequence[int] | None = None
) -> StageSplit:
    """The best split into `num_stages`, or the one given by `stage_layers`, the layers in each stage.

    Raises UserError when there are more stages than layers, or `stage_layers` does not add up.
    """
    num_layers = spec.num_hidden_layers
    if not 1 <= num_stages <= num_layers:
        raise UserError(
            f"{spec.name} has {num_layers} layers for {num_stages} pipeline stages (pp x stages per rank): "
            f"1 to {num_layers} stages are possible; nearest: {min(max(num_stages, 1), num_layers)}"
        )
    costs = tuple(layer_flops(spec, layer, sequence_length).total for layer in range(num_layers))
    last = head_flops(spec).total + mtp_flops(spec, sequence_length).total
    if stage_layers is None:
        sizes = best_sizes(costs, last, num_stages)
    else:
        sizes = tuple(stage_layers)
        _check_sizes(spec, num_stages, sizes)
    ends = list(accumulate(sizes))
    layers = tuple(zip([0, *ends[:-1]], ends, strict=True))
    stage_costs = [sum(costs[start:end]) for start, end in layers]
    stage_costs[-1] += last
    return StageSplit(layers, tuple(stage_costs))


def _check_sizes(spec: ModelSpec, num_stages: int, sizes: tuple[int, ...]) -> None:
    shown = ", ".join(map(str, sizes))
    if len(sizes) != num_stages:
        raise UserError(
            f"stage_layers lists {len(sizes)} stages ({shown}), but there are {num_stages} "
            "(pp x stages per rank)"
        )
    inner = sizes[1:-1]
    if min(sizes) < 0 or 0 in inner:
        raise UserError(
            f"stage_layers ({shown}): every stage needs at least 1 layer; only the first, which has the "
            "embedding, and the last, which has the head, may have 0"
        )
    if sum(sizes) != spec.num_hidden_layers:
        raise UserError(
            f"stage_layers ({shown}) add up to {sum(sizes)}, but {spec.name} has "
            f"{spec.num_hidden_layers} layers"
        )


@cache
def best_sizes(costs: tuple[float, ...], last: float, num_stages: int) -> tuple[int, ...]:
    """Layers per stage, given what each layer costs and what the last stage has besides: every stage has
    one, the last may have none; exact, by dynamic programming."""
    if num_stages == 1:
        return (len(costs),)
    sums = [0.0, *accumulate(costs)]
    everything = len(costs)

    def best(combine: bool, limit: float) -> list[list[tuple[float, int]]]:
        """table[k][i]: the least cost of k stages over the first i layers, and where the k-th begins.

        Cost is the largest stage, or with `combine` the sum of squares of stages within `limit`.
        """
        infinity: tuple[float, int] = (float("inf"), 0)
        table: list[list[tuple[float, int]]] = [[(0.0, 0)] + [infinity] * everything]
        for stage in range(1, num_stages + 1):
            final = stage == num_stages
            row: list[tuple[float, int]] = [infinity] * (everything + 1)
            for end in [everything] if final else range(stage, everything + 1):
                for start in range(stage - 1, end + final):
                    own = sums[end] - sums[start] + last * final
                    before = table[-1][start][0]
                    if own <= limit:
                        value = before + own * own if combine else max(before, own)
                        row[end] = min(row[end], (value, start))
            table.append(row)
        return table

    slowest = best(False, float("inf"))[-1][everything][0]
    table = best(True, slowest * (1 + 1e-12))
    sizes, end = [], everything
    for stage in range(num_stages, 0, -1):
        start = table[stage][end][1]
        sizes.append(end - start)
        end = start
    return tuple(reversed(sizes))
