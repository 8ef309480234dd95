"""Schedules as data: equal to what torch executes, sound by themselves, and timed as theory says."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.pipelining import schedules as torch_schedules

from whalepod.spec.errors import UserError
from whalepod.spec.schedule import (
    RULES,
    Action,
    Overlap,
    Step,
    actions_of,
    check_schedule,
    rank_of_stage,
    schedule_actions,
    stages_of_rank,
    stages_per_rank,
)
from whalepod.spec.timeline import StageTimes, peak_in_flight, simulate

TORCH: dict[str, Any] = {
    "gpipe": torch_schedules.ScheduleGPipe,
    "1f1b": torch_schedules.Schedule1F1B,
    "interleaved": torch_schedules.ScheduleInterleaved1F1B,
    "interleaved_zero_bubble": torch_schedules.ScheduleInterleavedZeroBubble,
    "zbv": torch_schedules.ScheduleZBVZeroBubble,
    "dualpipev": torch_schedules.ScheduleDualPipeV,
}
RANKS = (1, 2, 4, 8)
MICRO_BATCHES = (1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 16, 17, 24, 33)
UNIT = StageTimes(1.0, 1.0, 1.0)


def accepted(name: str, pp: int, stages: int, micro_batches: int) -> bool:
    try:
        check_schedule(name, pp, stages, micro_batches)
    except UserError:
        return False
    return True


GRID = [
    (name, pp, stages, m)
    for name in RULES
    for pp in RANKS
    for stages in (1, 2, 3, 4)
    for m in MICRO_BATCHES
    if accepted(name, pp, stages, m)
]


def stand_in(rank: int, stage: int, pp: int, num_stages: int) -> Any:
    """As much of a PipelineStage as a schedule's constructor and 1F1B's loop look at; it keeps a diary."""
    diary: list[Step] = []

    def forward(chunk: int, *_: Any, **__: Any) -> torch.Tensor:
        diary.append(Action(stage, "F", chunk))
        return torch.zeros(())

    def backward(chunk: int, **_: Any) -> None:
        diary.append(Action(stage, "B", chunk))

    return SimpleNamespace(
        submod=nn.Identity(),
        stage_index=stage,
        num_stages=num_stages,
        group_rank=rank,
        group_size=pp,
        is_first=stage == 0,
        is_last=stage == num_stages - 1,
        stage_index_to_group_rank={},
        diary=diary,
        forward_one_chunk=forward,
        backward_one_chunk=backward,
        perform_reduce_grad=lambda scale: None,
        get_fwd_recv_ops=lambda chunk: [],
        get_fwd_send_ops=lambda chunk: [],
        get_bwd_recv_ops=lambda chunk: [],
        get_bwd_send_ops=lambda chunk: [],
    )


def torch_order(name: str, pp: int, stages: int, m: int) -> list[list[Step]]:
    """What torch's own schedule would run, rank by rank."""
    num_stages = pp * stages
    cls = TORCH[name]
    if issubclass(cls, torch_schedules.PipelineScheduleSingle):
        # These run a loop of their own, and what 1F1B stores for the last rank is not what it runs.
        orders = []
        for rank in range(pp):
            stage = stand_in(rank, rank, pp, pp)
            schedule: Any = cls(stage, m, loss_fn=lambda output, target: output)
            schedule._initialize_stage = lambda *_: None
            schedule._step_microbatches(target_mbs=[None] * m)
            orders.append(stage.diary)
        return orders
    own = stages_of_rank(name, 0, pp, stages)
    schedule = cls([stand_in(0, stage, pp, num_stages) for stage in own], m, loss_fn=lambda o, t: o)
    with_messages = schedule.pipeline_order_with_comms
    executed = [[translated(a) for a in with_messages[rank] if a.is_compute_op] for rank in range(pp)]
    assert executed == [[translated(a) for a in schedule.pipeline_order[r] if a] for r in range(pp)]
    assert schedule.stage_index_to_group_rank == {s: rank_of_stage(name, s, pp) for s in range(num_stages)}
    return executed


def translated(action: Any) -> Step:
    if action.sub_actions is not None:
        return Overlap(*(translated(a) for a in action.sub_actions))  # type: ignore[arg-type]
    return Action(action.stage_index, action.computation_type.value, action.microbatch_index)


@pytest.mark.parametrize("name", RULES)
def test_equal_to_what_torch_executes(name: str) -> None:
    cases = [case for case in GRID if case[0] == name]
    assert len(cases) > 20
    for case in cases:
        ours = schedule_actions(*case)
        theirs = torch_order(*case)
        assert ours == theirs, case
        assert str(ours[0][-1]) == str(theirs[0][-1])


@pytest.mark.parametrize("name", RULES)
def test_what_is_refused_torch_refuses_too(name: str) -> None:
    refused = [
        (pp, m) for pp in RANKS for m in MICRO_BATCHES if not accepted(name, pp, stages_per_rank(name), m)
    ]
    for pp, m in refused:
        with pytest.raises(ValueError, match="microbatches"):
            torch_order(name, pp, stages_per_rank(name), m)


cases = st.sampled_from(GRID)
moments = st.floats(0.125, 8, allow_nan=False)


@settings(max_examples=60, deadline=None)
@given(cases, st.data())
def test_every_action_once_and_no_deadlock(case: tuple[str, int, int, int], data: st.DataObject) -> None:
    name, pp, stages, m = case
    orders = schedule_actions(*case)
    done = Counter(action for order in orders for step in order for action in actions_of(step))
    assert set(done.values()) == {1}
    for stage in range(pp * stages):
        for micro_batch in range(m):
            kinds = {kind for kind in "FBIW" if Action(stage, kind, micro_batch) in done}  # type: ignore[arg-type]
            assert kinds in ({"F", "B"}, {"F", "I", "W"})
    for rank, order in enumerate(orders):
        held = stages_of_rank(name, rank, pp, stages)
        assert {action.stage for step in order for action in actions_of(step)} == set(held)

    times = [StageTimes(*data.draw(st.tuples(moments, moments, moments))) for _ in range(min(pp * stages, 4))]
    times = [times[stage % len(times)] for stage in range(pp * stages)]
    p2p = data.draw(st.sampled_from((0.0, 0.25)))
    timeline = simulate(orders, times, p2p)
    for order, row in zip(orders, timeline.spans, strict=True):
        assert [span.step for span in row] == order
        assert all(a.end <= b.start for a, b in pairwise(row))
    cost = [m * (t.forward + t.input + t.weight) for t in times]
    work = [sum(cost[stage] for stage in stages_of_rank(name, rank, pp, stages)) for rank in range(pp)]
    assert timeline.busy == pytest.approx(work)
    assert timeline.makespan >= max(work) - 1e-9
    assert 0 <= timeline.bubble < 1


@pytest.mark.parametrize("pp", RANKS)
@pytest.mark.parametrize("m", [8, 16, 33])
def test_bubbles_of_the_papers(pp: int, m: int) -> None:
    equal = (pp - 1) / (m + pp - 1)
    for name in ("gpipe", "1f1b"):
        assert simulate(schedule_actions(name, pp, 1, m), UNIT).bubble == pytest.approx(equal)
    if m % pp == 0:
        thinner = simulate(schedule_actions("interleaved", pp, 4, m), UNIT).bubble
        assert thinner == pytest.approx((pp - 1) / (4 * m + pp - 1))
        # ZB1P: (p - 1)(F + I - W) on each rank.
        plain = simulate(schedule_actions("interleaved_zero_bubble", pp, 1, m), UNIT)
        assert plain.makespan == pytest.approx(3 * m + (pp - 1))
    if m >= 2 * pp:
        dual = simulate(schedule_actions("dualpipev", pp, 2, m), UNIT)
        assert dual.bubble <= equal
        # ZBV: nothing but the way to the last rank and back.
        zbv = simulate(schedule_actions("zbv", pp, 2, m), UNIT)
        assert zbv.makespan == pytest.approx(6 * m + (pp - 1))


@settings(max_examples=60, deadline=None)
@given(cases)
def test_activations_held(case: tuple[str, int, int, int]) -> None:
    name, pp, stages, m = case
    for rank, order in enumerate(schedule_actions(*case)):
        peak = peak_in_flight(order)
        round_ = m // max(1, m // pp)
        most = {
            "gpipe": m,
            "1f1b": pp - rank,
            "interleaved": (stages - 1) * round_ + 2 * (pp - 1 - rank) + 1,
            # A turn's W comes `rank` turns late, and until then its activations stay.
            "interleaved_zero_bubble": (stages - 1) * round_ + pp - 1 - rank + 1 + rank,
            "zbv": 2 * pp,
            "dualpipev": 2 * pp + 1,
        }[name]
        assert peak <= min(most, m * stages)
    halves = peak_in_flight(schedule_actions(*case)[0], lambda stage: 0.5)
    assert halves == peak_in_flight(schedule_actions(*case)[0]) / 2


def test_overlapped_pairs_and_messages_take_their_own_time() -> None:
    pair = [Overlap(Action(0, "F", 1), Action(0, "B", 0))]
    order: list[list[Step]] = [[Action(0, "F", 0), *pair, Action(0, "B", 1)]]
    assert simulate(order, StageTimes(1, 1, 1, overlapped=2.5)).makespan == 1 + 2.5 + 2
    assert simulate(order, StageTimes(1, 1, 1, backward=1.5)).makespan == 1 + 2.5 + 1.5
    # Forward to rank 1, back with the gradient; rank 1 works on the second micro-batch meanwhile.
    there_and_back = simulate(schedule_actions("1f1b", 2, 1, 2), UNIT, p2p=0.5)
    assert there_and_back.makespan == 1 + 0.5 + (1 + 2) + (1 + 2) + 0.5 + 2


def test_a_circular_wait_is_named() -> None:
    with pytest.raises(ValueError, match="never ends: rank 0 for 0B0, rank 1 for 1B0"):
        simulate([[Action(0, "B", 0), Action(0, "F", 0)], [Action(1, "B", 0), Action(1, "F", 0)]], UNIT)


def test_placement() -> None:
    assert [stages_of_rank("interleaved", r, 4) for r in range(4)] == [(0, 4), (1, 5), (2, 6), (3, 7)]
    assert [stages_of_rank("zbv", r, 4) for r in range(4)] == [(0, 7), (1, 6), (2, 5), (3, 4)]
    assert stages_of_rank("1f1b", 2, 4) == (2,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("1f1", 2, None, 4), r"unknown schedule '1f1' \(did you mean '1f1b'\?\)"),
        (("1f1b", 0, None, 4), "pp must be at least 1, not 0"),
        (("zbv", 2, 3, 4), "exactly 2 stages on each rank, not 3"),
        (("gpipe", 2, 2, 4), "exactly 1 stage on each rank, not 2"),
        (("1f1b", 4, None, 3), "over pp 4 needs at least pp micro-batches to fill it, not 3; nearest: 4"),
        (("interleaved", 4, 2, 9), "equal rounds of about pp, not 9; nearest: 8, 10"),
        (("dualpipev", 4, None, 5), "at least 2 x pp micro-batches to fill it, not 5; nearest: 8"),
    ],
)
def test_refusals_name_the_rule_and_what_is_near(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        schedule_actions(*arguments)
