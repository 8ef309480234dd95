"""Scheduler and pages against a cache that remembers every row: each sequence reads its own."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whalepod.serve.pages import Holding, PagePool
from whalepod.serve.scheduler import Run, Scheduler, Sequence
from whalepod.spec.errors import UserError

WORDS = 3  # few, so that prefixes meet


def follows(tokens: list[int]) -> int:
    """What a model that reads everything would write next."""
    return sum((i + 1) * t for i, t in enumerate(tokens)) % WORDS


@dataclass
class Model:
    """Runs steps on a cache of (position, token) rows, and looks at every row that attention would read."""

    scheduler: Scheduler
    guesses: random.Random | None = None
    rows: dict[tuple[int, int], tuple[int, int]] = field(default_factory=dict)
    computed: int = 0  # rows

    def row(self, sequence: Sequence, position: int) -> tuple[int, int]:
        page, offset = divmod(position, self.scheduler.pool.page_size)
        return sequence.holding.pages[page], offset

    def step(self) -> None:
        runs = self.scheduler.schedule()
        assert len({id(run.sequence) for run in runs}) == len(runs)
        assert sum(run.end - run.start for run in runs) <= self.scheduler.max_step_tokens
        for run in runs:  # all rows are written before any is read
            for position, token in enumerate(run.tokens, start=run.start):
                self.rows[self.row(run.sequence, position)] = (position, token)
                self.computed += 1
        for run in runs:
            self.finish(run)

    def finish(self, run: Run) -> None:
        sequence = run.sequence
        read = [self.rows[self.row(sequence, p)] for p in range(run.end)]
        assert read == list(enumerate([*sequence.tokens[: run.start + run.count], *run.drafts]))
        accepted: list[int] = []
        if run.writes:
            assert run.start + run.count == len(sequence.tokens)
            accepted.append(follows(sequence.tokens))
            for draft in run.drafts:
                if draft != accepted[-1]:
                    break
                accepted.append(follows([*sequence.tokens, *accepted]))
        drafts = (self.guesses.randrange(WORDS),) if self.guesses and run.writes else ()
        self.scheduler.ran(run, accepted, drafts)
        if len(sequence.tokens) == sequence.max_tokens:
            self.scheduler.finish(sequence)


def sequence(prompt: list[int], new: int) -> Sequence:
    return Sequence([*prompt], len(prompt), len(prompt) + new)


def alone(prompt: list[int], new: int) -> list[int]:
    tokens = [*prompt]
    for _ in range(new):
        tokens.append(follows(tokens))
    return tokens


requests = st.tuples(st.lists(st.integers(0, WORDS - 1), min_size=1, max_size=40), st.integers(1, 20))


@settings(max_examples=300, deadline=None)
@given(
    asked=st.lists(st.tuples(st.integers(0, 10), requests), min_size=1, max_size=12),
    page_size=st.integers(1, 8),
    spare=st.integers(0, 12),
    max_running=st.integers(1, 6),
    max_step=st.integers(1, 24),
    seed=st.none() | st.integers(0, 5),
    gone=st.sets(st.integers(0, 11)),
)
def test_everyone_gets_what_they_would_alone(
    asked: list[tuple[int, tuple[list[int], int]]],
    page_size: int,
    spare: int,
    max_running: int,
    max_step: int,
    seed: int | None,
    gone: set[int],
) -> None:
    longest = max(len(prompt) + new for _, (prompt, new) in asked)
    pool = PagePool(-(-longest // page_size) + spare, page_size)
    model = Model(Scheduler(pool, max_running, max_step), None if seed is None else random.Random(seed))
    arrivals = sorted(asked, key=lambda each: each[0])
    there: list[tuple[Sequence, list[int], int]] = []
    step = 0
    while arrivals or not model.scheduler.is_idle:
        while arrivals and arrivals[0][0] <= step:
            _, (prompt, new) = arrivals.pop(0)
            there.append((sequence(prompt, new), prompt, new))
            model.scheduler.add(there[-1][0])
        if not model.scheduler.is_idle:
            model.step()
        for index in gone & set(range(len(there))):
            if step == 5 + index and not there[index][0].finished:
                model.scheduler.finish(there[index][0])
        model.scheduler.check_integrity()
        step += 1
        assert step < 5000, "it does not end"
    assert pool.in_use == 0
    for found, prompt, new in there:
        assert found.finished
        whole = alone(prompt, new)
        assert found.tokens == whole[: len(found.tokens)]
        assert len(found.tokens) == len(whole) or gone


def test_a_known_prefix_is_not_computed_again() -> None:
    pool = PagePool(32, 4)
    model = Model(Scheduler(pool, 4, 64))
    prompt = [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]
    for expected in (0, 8):
        first = sequence(prompt, 1)
        model.scheduler.add(first)
        before = model.computed
        while not model.scheduler.is_idle:
            model.step()
        assert first.cached == expected
        assert model.computed - before == len(prompt) - expected
    # Of a prompt that is wholly known the last page is computed again: its last token must be.
    again = sequence(prompt[:8], 1)
    model.scheduler.add(again)
    model.step()
    assert again.cached == 4
    other = sequence([1, *prompt[1:]], 1)
    model.scheduler.add(other)
    model.step()
    assert other.cached == 0


def test_who_waits_is_served_in_turn_and_the_youngest_gives_way() -> None:
    pool = PagePool(4, 2)
    model = Model(Scheduler(pool, 4, 64))
    a, b, c = (sequence([i, i], 4) for i in range(3))
    for each in (a, b, c):
        model.scheduler.add(each)
    model.step()
    assert model.scheduler.running == [a, b, c]
    model.step()  # one page is left, and three want one
    assert model.scheduler.running == [a, b]
    assert model.scheduler.waiting[0] is c
    assert model.scheduler.preemptions == 1
    assert len(c.tokens) == 3  # what it wrote stays
    while not model.scheduler.is_idle:
        model.step()
    assert [each.tokens for each in (a, b, c)] == [alone([i, i], 4) for i in range(3)]


def test_long_prompts_do_not_hold_up_those_who_write() -> None:
    pool = PagePool(64, 4)
    model = Model(Scheduler(pool, 4, 8))
    short, long = sequence([1], 12), sequence([2] * 60, 1)
    model.scheduler.add(short)
    model.step()
    model.scheduler.add(long)
    for step in range(8):
        assert len(short.tokens) == 2 + step
        model.step()
    assert long.computed == 7 * 8  # a step's eighth token is the writer's


def test_who_came_after_a_long_prompt_writes_while_it_is_read_in() -> None:
    model = Model(Scheduler(PagePool(64, 4), 4, 8))
    short, long = sequence([1] * 9, 6), sequence([2] * 90, 1)
    model.scheduler.add(long)
    model.scheduler.add(short)
    while short.num_new < 6:
        before = long.computed
        model.step()
        assert long.computed > before or long.finished
    assert not long.finished


def test_guesses_take_no_ones_turn() -> None:
    model = Model(Scheduler(PagePool(256, 4), 8, 8), random.Random(0))
    everyone = [sequence([i % 3], 40) for i in range(8)]
    for each in everyone:
        model.scheduler.add(each)
    for step in range(1, 30):
        model.step()
        assert min(each.num_new for each in everyone) >= step - 1


def test_what_can_never_fit_is_refused() -> None:
    scheduler = Scheduler(PagePool(4, 4), 2, 8)
    with pytest.raises(UserError, match="17 tokens do not fit the cache of 16"):
        scheduler.check(sequence([0] * 10, 7))
    scheduler.check(sequence([0] * 10, 6))


def test_integrity_is_checked() -> None:
    pool = PagePool(4, 4)
    holding = Holding()
    assert pool.extend(holding, 9)
    pool.check_integrity([holding])
    with pytest.raises(AssertionError):
        pool.check_integrity([])
    holding.pages.pop()
    with pytest.raises(AssertionError):
        pool.check_integrity([holding])


def test_idle_pages_are_given_up_last_page_first() -> None:
    pool = PagePool(4, 1)
    first = Holding()
    pool.extend(first, 3)
    pool.publish(first, [7, 8, 9])
    pool.release(first)
    other = Holding()
    assert pool.extend(other, 2)  # the free one, and the last of the known
    again = Holding()
    assert pool.find([7, 8, 9, 1], again) == 2
    pool.check_integrity([other, again])
