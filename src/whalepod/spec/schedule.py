"""Pipeline schedules as data: what each rank does, and in which order.

A pipeline cuts the model into stages and the batch into micro-batches. Every stage runs every
micro-batch forward (F) and backward (B), and a rank runs one thing at a time, so all that a
schedule decides is an order. The orders differ in how long ranks idle and how many micro-batches
they hold between F and B:

* `gpipe` (arXiv 1811.06965): all forward, then all backward. Holds every micro-batch.
* `1f1b` (arXiv 1806.03377): backward as soon as possible. Idles as long, holds at most pp.
* `interleaved` (arXiv 2104.04473): several thinner stages on each rank: the bubble shrinks as much.
* `interleaved_zero_bubble` (arXiv 2401.10241, ZB1P): B falls into I, the gradient of the stage's
  input, for which the stage before waits, and W, the gradient of the weights, for which nobody
  does; W fills bubbles.
* `zbv` (the same, section 6): two stages on each rank, laid out as a V: rank r holds stages r and
  2 pp - 1 - r, so the loss is where the tokens are, and no rank idles if F, I and W take equally long.
* `dualpipev` (DeepSeek-V3, section 3.2.1, folded as a V): forward of one micro-batch overlapped with
  backward of another, so that the exchange of the one hides behind the computation of the other.

The same lists are timed by the planner, drawn by the report and, as a test holds, executed by
`torch.distributed.pipelining`. Notation is torch's: `3F0` is stage 3, forward, micro-batch 0.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, cast

from whalepod.spec.errors import UserError, nearest

Kind = Literal["F", "B", "I", "W"]
Placement = Literal["loop", "v"]


class Action(NamedTuple):
    """One stage's work on one micro-batch: F, B (= I and W at once), I or W."""

    stage: int
    kind: Kind
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.micro_batch}"


class Overlap(NamedTuple):
    """A forward and a full backward of the same rank, run together."""

    forward: Action
    backward: Action

    def __str__(self) -> str:
        return f"({self.forward};{self.backward})OVERLAP_F_B"


Step = Action | Overlap


def actions_of(step: Step) -> tuple[Action, ...]:
    """The one action of a step, or the two of an overlapped pair."""
    return (step,) if isinstance(step, Action) else (step.forward, step.backward)


@dataclass(frozen=True)
class Rule:
    """What a schedule asks for. `num_stages` and `default`: stages per rank, None for any number."""

    placement: Placement
    num_stages: int | None
    default: int
    build: Callable[[int, int, int, int], list[Step]]  # (rank, pp, stages per rank, micro-batches)
    accepts: Callable[[int, int], bool]  # (pp, micro-batches)
    needs: str


def schedule_actions(
    name: str, pp: int, num_stages_per_rank: int | None, num_micro_batches: int
) -> list[list[Step]]:
    """What each of `pp` ranks does, in order. `num_stages_per_rank` None is the schedule's own.

    Raises UserError when the schedule cannot be made so.
    """
    check_schedule(name, pp, num_stages_per_rank, num_micro_batches)
    rule, stages = RULES[name], stages_per_rank(name, num_stages_per_rank)
    return [rule.build(rank, pp, stages, num_micro_batches) for rank in range(pp)]


def check_schedule(name: str, pp: int, num_stages_per_rank: int | None, num_micro_batches: int) -> None:
    """Raises UserError, with the rule, the numbers and the nearest valid values."""
    stages = stages_per_rank(name, num_stages_per_rank)
    rule = RULES[name]
    for what, value in (("pp", pp), ("stages per rank", stages), ("micro-batches", num_micro_batches)):
        if value < 1:
            raise UserError(f"schedule {name}: {what} must be at least 1, not {value}")
    if rule.num_stages not in (None, stages):
        plural = "s" * (rule.num_stages != 1)
        raise UserError(
            f"schedule {name} puts exactly {rule.num_stages} stage{plural} on each rank, not {stages}"
        )
    if not rule.accepts(pp, num_micro_batches):
        below = next((m for m in range(num_micro_batches, 0, -1) if rule.accepts(pp, m)), None)
        above = next(m for m in range(num_micro_batches, num_micro_batches + 2 * pp) if rule.accepts(pp, m))
        raise UserError(
            f"schedule {name} over pp {pp} needs {rule.needs}, not {num_micro_batches}; "
            f"nearest: {', '.join(str(m) for m in (below, above) if m is not None)}"
        )


def stages_per_rank(name: str, given: int | None = None) -> int:
    """`given`, or the schedule's own number; raises UserError for an unknown schedule."""
    if name not in RULES:
        raise UserError(f"unknown schedule {name!r}{nearest(name, RULES)}")
    return RULES[name].default if given is None else given


def rank_of_stage(name: str, stage: int, pp: int) -> int:
    """The rank that holds `stage`: in a loop stage mod pp; in a V the second half comes back."""
    lap, place = divmod(stage, pp)
    return pp - 1 - place if RULES[name].placement == "v" and lap % 2 else place


def stages_of_rank(name: str, rank: int, pp: int, num_stages_per_rank: int | None = None) -> tuple[int, ...]:
    """The stages that `rank` holds, in the model's order."""
    stages = range(pp * stages_per_rank(name, num_stages_per_rank))
    return tuple(stage for stage in stages if rank_of_stage(name, stage, pp) == rank)


Work = tuple[int, Kind]


def _work(stage: int, kinds: str) -> list[Work]:
    return [(stage, cast(Kind, kind)) for kind in kinds]


def _numbered(plan: Iterable[Work]) -> list[Step]:
    """Micro-batches in order: the n-th F of a stage is of micro-batch n, and so are I, W and B."""
    count: Counter[Work] = Counter()
    steps: list[Step] = []
    for stage, kind in plan:
        steps.append(Action(stage, kind, count[stage, kind]))
        count[stage, kind] += 1
    return steps


def _gpipe(rank: int, pp: int, stages: int, micro_batches: int) -> list[Step]:
    return _numbered(_work(rank, "F") * micro_batches + _work(rank, "B") * micro_batches)


def _one_forward_one_backward(rank: int, pp: int, stages: int, micro_batches: int) -> list[Step]:
    return _in_turns(rank, [rank] * micro_batches, [rank] * micro_batches, warm=pp - 1 - rank)


def _interleaved(rank: int, pp: int, stages: int, micro_batches: int) -> list[Step]:
    forwards, backwards, per_round = _rounds(rank, pp, stages, micro_batches)
    return _in_turns(rank, forwards, backwards, (stages - 1) * per_round + 2 * (pp - 1 - rank))


def _zero_bubble(rank: int, pp: int, stages: int, micro_batches: int) -> list[Step]:
    forwards, backwards, per_round = _rounds(rank, pp, stages, micro_batches)
    return _in_turns(rank, forwards, backwards, (stages - 1) * per_round + pp - 1 - rank, split=True)


def _rounds(rank: int, pp: int, stages: int, micro_batches: int) -> tuple[list[int], list[int], int]:
    """The stages of a rank's forwards and of its backwards: about pp micro-batches through each in turn."""
    rounds = max(1, micro_batches // pp)
    per_round = micro_batches // rounds
    own = [stage for lap in range(stages) for stage in [lap * pp + rank] * per_round]
    return own * rounds, own[::-1] * rounds, per_round


def _in_turns(
    rank: int, forwards: Sequence[int], backwards: Sequence[int], warm: int, split: bool = False
) -> list[Step]:
    """`warm` forwards, then one forward and one backward in turns.

    With `split`, backward is I, and W follows as many turns later as there are ranks before this one.
    """
    gradient: Kind = "I" if split else "B"
    plan: list[Work] = [(stage, "F") for stage in forwards[:warm]]
    for turn, backward in enumerate(backwards):
        if warm + turn < len(forwards):
            plan.append((forwards[warm + turn], "F"))
        plan.append((backward, gradient))
        if split and turn >= rank:
            plan.append((backwards[turn - rank], "W"))
    if split:
        for backward in backwards[max(len(backwards) - rank, 0) :]:
            plan.append((backward, "W"))
    return _numbered(plan)


def _zbv(rank: int, pp: int, stages: int, micro_batches: int) -> list[Step]:
    low, high = rank, 2 * pp - 1 - rank
    # The order is that of enough micro-batches to fill the pipeline, with those that are not there left out.
    total = max(2 * pp - 1, micro_batches)
    plan = _work(low, "F") * (2 * (pp - rank) - 1)
    plan += (_work(high, "F") + _work(low, "F")) * rank
    plan += _work(high, "FIW") * (pp - rank)
    new = total - (2 * pp - 1 - rank)  # forwards of `low` still to come
    for turn in range(total - pp):
        plan += _work(low, "FIW" if turn < new else "IW") + _work(high, "FIW")
    plan += (_work(low, "I") + _work(high, "I")) * rank
    plan += _work(low, "IW") * (pp - rank)
    plan += _work(high, "W") * rank + _work(low, "W") * rank
    return [step for step in _numbered(plan) if isinstance(step, Action) and step.micro_batch < micro_batches]


def _dualpipev(rank: int, pp: int, stages: int, micro_batches: int) -> list[Step]:
    """The eight phases of DeepSeek's own DualPipeV (github.com/deepseek-ai/DualPipe)."""
    low, high, last = rank, 2 * pp - 1 - rank, pp - 1 - rank
    steps: list[Step] = []
    forwards: Counter[int] = Counter()
    backwards: Counter[int] = Counter()
    waiting: deque[Action] = deque()  # I without its W

    def forward(stage: int) -> Action:
        forwards[stage] += 1
        return Action(stage, "F", forwards[stage] - 1)

    def backward(stage: int, split: bool = False) -> Action:
        backwards[stage] += 1
        action = Action(stage, "I" if split else "B", backwards[stage] - 1)
        waiting.extend([action] * split)
        return action

    def weight() -> list[Step]:
        return [waiting.popleft()._replace(kind="W")] if waiting else []

    def overlap(forward_stage: int, backward_stage: int) -> Overlap:
        return Overlap(forward(forward_stage), backward(backward_stage))

    for _ in range(2 * last):
        steps.append(forward(low))
    for _ in range(rank + 1):
        steps += [forward(low), forward(high)]
    for _ in range(last):
        steps += [backward(high, split=True), *weight(), forward(high)]
    for turn in range(micro_batches - 2 * pp + rank + 1):
        # The rank at the V's bottom starts backward alone: nothing to overlap with shortens the bubble.
        alone = turn == 0 and last == 0
        steps += [forward(low), backward(high)] if alone else [overlap(low, high)]
        steps.append(overlap(high, low))
    for _ in range(last):
        steps += [backward(high), overlap(high, low)]
    # Half of the last backwards are split: their weights' part fills what would be the closing bubble.
    for turn in range(2 * (rank + 1)):
        steps.append(backward(high if turn % 2 == 0 else low, split=turn > rank))
    for _ in range(last):
        steps += [*weight(), backward(low, split=True)]
    while waiting:
        steps += weight()
    return steps


def _in_whole_rounds(pp: int, micro_batches: int) -> bool:
    return micro_batches % max(1, micro_batches // pp) == 0


RULES: Mapping[str, Rule] = {
    "gpipe": Rule("loop", 1, 1, _gpipe, lambda pp, m: True, "any number of micro-batches"),
    "1f1b": Rule(
        "loop", 1, 1, _one_forward_one_backward, lambda pp, m: m >= pp, "at least pp micro-batches to fill it"
    ),
    "interleaved": Rule(
        "loop", None, 2, _interleaved, _in_whole_rounds, "micro-batches in equal rounds of about pp"
    ),
    "interleaved_zero_bubble": Rule(
        "loop", None, 2, _zero_bubble, _in_whole_rounds, "micro-batches in equal rounds of about pp"
    ),
    "zbv": Rule("v", 2, 2, _zbv, lambda pp, m: True, "any number of micro-batches"),
    "dualpipev": Rule(
        "v", 2, 2, _dualpipev, lambda pp, m: m >= 2 * pp, "at least 2 x pp micro-batches to fill it"
    ),
}
