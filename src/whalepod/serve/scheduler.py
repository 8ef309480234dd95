"""Which tokens of which sequences go through the model next: continuous batching, no torch.

A step is a list of runs: so many tokens of a sequence, from where its cache ends. A sequence that writes
needs one token a step (and its drafts), and has it before any prompt is read in. Prompts take what is left of
the step's tokens, in chunks, or half of it while more of them wait, so that a long one does not keep the
others waiting. When pages run out the youngest that runs gives up its own and waits at the head of the queue;
it is read in again later, mostly from pages that are still known.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from whalepod.serve.pages import Holding, PagePool
from whalepod.spec.errors import UserError


@dataclass(eq=False)
class Sequence:
    """A prompt and what was written behind it. computed: tokens whose rows are in the cache; drafts: guesses
    of the next tokens, to be verified in the next run; cached: tokens of the prompt that were found there."""

    tokens: list[int]
    num_prompt: int
    max_tokens: int  # of prompt and output
    computed: int = 0
    cached: int = 0
    drafts: tuple[int, ...] = ()
    holding: Holding = field(default_factory=Holding)
    finished: bool = False

    @property
    def num_new(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def missing(self) -> int:
        """Tokens whose rows are not in the cache: one of a sequence that writes."""
        return len(self.tokens) - self.computed


class Run(NamedTuple):
    """Tokens [start, start + count) of a sequence, and behind them its drafts. `writes`: what comes next is
    to be picked."""

    sequence: Sequence
    start: int
    count: int
    drafts: tuple[int, ...]
    writes: bool

    @property
    def tokens(self) -> list[int]:
        return [*self.sequence.tokens[self.start : self.start + self.count], *self.drafts]

    @property
    def end(self) -> int:
        return self.start + self.count + len(self.drafts)


class Scheduler:
    """max_running: sequences at once; max_step_tokens: tokens of a step."""

    def __init__(self, pool: PagePool, max_running: int, max_step_tokens: int) -> None:
        assert max_running > 0
        assert max_step_tokens > 0
        self.pool, self.max_running, self.max_step_tokens = pool, max_running, max_step_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.preemptions = 0

    @property
    def is_idle(self) -> bool:
        return not self.waiting and not self.running

    def check(self, sequence: Sequence) -> None:
        """Raises UserError for one that could never finish."""
        room = self.pool.num_pages * self.pool.page_size
        if sequence.max_tokens > room:
            raise UserError(
                f"prompt and output of {sequence.max_tokens} tokens do not fit the cache of {room}: "
                "ask for fewer, or serve with a larger cache"
            )

    def add(self, sequence: Sequence) -> None:
        """Queues one that `check` has passed."""
        self.waiting.append(sequence)

    def schedule(self) -> list[Run]:
        """The next step; empty only when there is nothing to do."""
        runs: dict[int, Run] = {}
        left = self.max_step_tokens
        # Those that write come before those that are read in, or a long prompt would hold them up.
        order = sorted(self.running, key=lambda each: each.missing > 1)
        for place, sequence in enumerate(order):
            if left == 0:
                break
            if sequence not in self.running:  # preempted for the sake of another
                continue
            later = len(order) - place - 1
            run = self._run(sequence, left, others=later > 0 or bool(self.waiting), later=later)
            while not self.pool.extend(sequence.holding, run.end):
                if run.drafts:  # not for a guess's sake
                    run = run._replace(drafts=())
                    continue
                youngest = self.running[-1]
                self._preempt(youngest)
                if (dropped := runs.pop(id(youngest), None)) is not None:
                    left += dropped.end - dropped.start
                if youngest is sequence:
                    break
            else:
                runs[id(sequence)] = run
                left -= run.end - run.start
        found = [*runs.values()]
        if len(found) == len(self.running):  # else pages are short, or this step's tokens
            found += self._admitted(left)
        assert found or self.is_idle
        return found

    def _admitted(self, left: int) -> Iterator[Run]:
        """Runs of those who wait, in turn, while there is room for their whole prompt."""
        while left and self.waiting and len(self.running) < self.max_running:
            sequence = self.waiting[0]
            found = self.pool.find(sequence.tokens, sequence.holding)
            needed = self.pool.pages_for(len(sequence.tokens)) - len(sequence.holding.pages)
            # What is left over is for those that run to write on, or they would push this one out again.
            spare = min(len(self.running), self.pool.num_pages // 16)
            if needed + spare > self.pool.available:
                self.pool.release(sequence.holding)
                return
            sequence.computed = found
            if not sequence.num_new:
                sequence.cached = found
            run = self._run(sequence, left, others=len(self.waiting) > 1, later=0)
            extended = self.pool.extend(sequence.holding, run.end)
            assert extended
            self.waiting.popleft()
            self.running.append(sequence)
            left -= run.count + len(run.drafts)
            yield run

    def _run(self, sequence: Sequence, left: int, others: bool, later: int) -> Run:
        """others: whether more are to be read in, for whom a prompt leaves half of the step. later: sequences
        that come after it and need a token each, before which no guess goes."""
        count = min(sequence.missing, left)
        if others and sequence.missing > left // 2:
            count = min(sequence.missing, max(1, left // 2))
        writes = count == sequence.missing
        room = min(left - count - later, sequence.max_tokens - len(sequence.tokens) - 1)
        drafts = sequence.drafts[:room] if writes and room > 0 else ()
        return Run(sequence, sequence.computed, count, drafts, writes)

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.pool.release(sequence.holding)
        sequence.computed = 0
        sequence.drafts = ()
        self.waiting.appendleft(sequence)
        self.preemptions += 1

    def ran(self, run: Run, accepted: list[int], drafts: tuple[int, ...] = ()) -> None:
        """After a step: the rows of a run are in the cache and `accepted` tokens come next, all but the last
        equal to the run's drafts. The rows of other drafts are written over. `drafts` are for the next run.
        """
        sequence = run.sequence
        sequence.computed = run.start + run.count + max(0, len(accepted) - 1)
        sequence.tokens += accepted
        sequence.drafts = drafts
        self.pool.publish(sequence.holding, sequence.tokens[: sequence.computed])

    def finish(self, sequence: Sequence) -> None:
        """Takes a sequence out, wherever it stands."""
        sequence.finished = True
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        self.pool.release(sequence.holding)

    def check_integrity(self) -> None:
        """Raises AssertionError where pages and sequences do not agree."""
        everyone = [*self.running, *self.waiting]
        self.pool.check_integrity(s.holding for s in everyone)
        assert len({id(s) for s in everyone}) == len(everyone), "a sequence is there twice"
        assert len(self.running) <= self.max_running
        for s in self.running:
            assert 0 <= s.computed < len(s.tokens) <= s.max_tokens
            assert not s.finished
            assert len(s.holding.pages) >= self.pool.pages_for(s.computed)
        assert all(not s.holding.pages and not s.finished for s in self.waiting)
