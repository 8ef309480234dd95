"""Cutting a model into stages: contiguous, complete, and the best there is."""

from __future__ import annotations

import dataclasses
import itertools
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whalepod.spec.counts import head_flops, layer_flops, mtp_flops
from whalepod.spec.errors import UserError
from whalepod.spec.presets import load_model_spec
from whalepod.spec.stages import best_sizes, split_stages

V3 = load_model_spec("deepseek-v3")


def test_costs_are_the_models() -> None:
    split = split_stages(V3, 16, 4096)
    assert [end for _, end in split.layers][:-1] == [start for start, _ in split.layers][1:]
    assert split.layers[0][0] == 0
    assert split.layers[-1][1] == 61
    ends = head_flops(V3).total + mtp_flops(V3, 4096).total
    last = sum(layer_flops(V3, layer, 4096).total for layer in range(*split.layers[-1])) + ends
    assert split.costs[-1] == pytest.approx(last)
    whole = sum(layer_flops(V3, layer, 4096).total for layer in range(61)) + ends
    assert sum(split.costs) == pytest.approx(whole)
    assert split.num_stages == 16


def test_head_and_mtp_weigh_as_layers_do() -> None:
    """V3's head and its MTP block with the head again leave its last stage fewer layers than the others."""
    sizes = [end - start for start, end in split_stages(V3, 8, 4096).layers]
    assert sizes[-1] < min(sizes[:-1])
    even = split_stages(V3, 8, 4096, [8, 8, 8, 8, 8, 7, 7, 7])
    assert split_stages(V3, 8, 4096).imbalance < even.imbalance


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.sampled_from([1.0, 1.5, 2.25, 4.0]), min_size=1, max_size=6),
    st.sampled_from([0.0, 0.5, 3.0, 9.0]),
    st.data(),
)
def test_no_split_is_better(costs: list[float], last: float, data: st.DataObject) -> None:
    stages = data.draw(st.integers(1, len(costs)))

    def by_stage(sizes: tuple[int, ...]) -> list[float]:
        ends = list(itertools.accumulate(sizes))
        sums = [sum(costs[end - size : end]) for size, end in zip(sizes, ends, strict=True)]
        return [*sums[:-1], sums[-1] + last]

    def quality(sizes: tuple[int, ...]) -> tuple[float, float]:
        found = by_stage(sizes)
        return max(found), sum(x * x for x in found)

    possible = [
        sizes
        for sizes in itertools.product(range(len(costs) + 1), repeat=stages)
        if sum(sizes) == len(costs) and all(sizes[:-1])
    ]
    assert quality(best_sizes(tuple(costs), last, stages)) == min(map(quality, possible))


def test_many_layers_are_quick() -> None:
    deep = dataclasses.replace(V3, num_hidden_layers=128)
    start = time.perf_counter()
    split_stages(deep, 64, 4096)
    assert time.perf_counter() - start < 2


def test_given_by_hand() -> None:
    split = split_stages(V3, 4, 4096, [0, 30, 31, 0])
    assert split.layers == ((0, 0), (0, 30), (30, 61), (61, 61))
    assert split.costs[0] == 0
    assert split.costs[-1] > 0


@pytest.mark.parametrize(
    ("stages", "layers", "message"),
    [
        (62, None, "61 layers for 62 pipeline stages .*nearest: 61"),
        (0, None, "1 to 61 stages are possible; nearest: 1"),
        (4, [20, 20, 21], "lists 3 stages .20, 20, 21., but there are 4"),
        (4, [20, 20, 20, 2], "add up to 62, but .* has 61 layers"),
        (4, [31, 0, 30, 0], "every stage needs at least 1 layer"),
        (2, [62, -1], "every stage needs at least 1 layer"),
    ],
)
def test_refusals(stages: int, layers: list[int] | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        split_stages(V3, stages, 4096, layers)
