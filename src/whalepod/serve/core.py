"""The books of one replica: who asked for what, what goes through the model next, what that means for whom.

No torch and no model: every rank keeps the books of every replica, alike, from the same events and the same
picked tokens (`fleet.py`).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace

from whalepod.serve.pages import PagePool
from whalepod.serve.picked import Mask, Next, Picked, Wish
from whalepod.serve.request import FinishReason, Grammar, Request, Stats
from whalepod.serve.scheduler import Run, Scheduler, Sequence
from whalepod.spec.model import ModelSpec

PAGE_SIZE = 64  # tokens; FlashMLA's


@dataclass(frozen=True)
class CoreConfig:
    """Of each replica. num_pages: of `page_size` tokens each. max_running: sequences at once.
    max_step_tokens: tokens through the model at once, which bounds how long those that write wait for a
    prompt. speculate: guess tokens with the model's multi-token prediction."""

    num_pages: int
    max_running: int = 64
    max_step_tokens: int = 512
    page_size: int = PAGE_SIZE
    speculate: bool = False


@dataclass(eq=False)
class Job:
    """A request on its way. ends: tokens that end it. picked: what the last step brought it."""

    request: Request
    ends: frozenset[int]
    sequence: Sequence
    wish: Wish
    number: int = 0
    picked: list[Picked] = field(default_factory=list)
    reason: FinishReason | None = None


class Core:
    """Jobs and scheduler of one replica."""

    def __init__(self, spec: ModelSpec, config: CoreConfig) -> None:
        self.spec = spec
        pool = PagePool(config.num_pages, config.page_size)
        self.scheduler = Scheduler(pool, config.max_running, config.max_step_tokens)
        self._jobs: dict[int, Job] = {}  # by their sequence
        self._prompt_tokens = self._cached_tokens = self._new_tokens = self._finished = self._steps = 0

    @property
    def is_idle(self) -> bool:
        return self.scheduler.is_idle

    @property
    def load(self) -> int:
        return len(self._jobs)

    def admit(self, request: Request, ends: frozenset[int]) -> Job:
        """Raises UserError for what the model or the cache cannot take."""
        self.spec.check_prompt(list(request.prompt), request.max_new_tokens)
        length = len(request.prompt)
        sequence = Sequence([*request.prompt], length, length + request.max_new_tokens)
        self.scheduler.check(sequence)
        if request.sampling.seed is None:
            sampling = replace(request.sampling, seed=random.getrandbits(63))
            request = replace(request, sampling=sampling)
        return Job(request, ends | request.stop_ids, sequence, Wish(request.sampling, request.logprobs))

    def begin(self, job: Job, make_mask: Callable[[Grammar], Mask]) -> None:
        """Queues a job."""
        if job.request.grammar is not None and job.wish.mask is None:
            job.wish = replace(job.wish, mask=make_mask(job.request.grammar))
        self.scheduler.add(job.sequence)
        self._jobs[id(job.sequence)] = job

    def schedule(self) -> tuple[list[Run], list[Job]]:
        """The next step's runs and whose they are."""
        runs = self.scheduler.schedule()
        return runs, [self._jobs[id(run.sequence)] for run in runs]

    def apply(self, runs: Seq[Run], jobs: Seq[Job], following: Seq[Next]) -> list[Job]:
        """What a step brought. Returns the jobs that got tokens, those that ended by them with a `reason`."""
        changed = []
        for run, job, after in zip(runs, jobs, following, strict=True):
            picked = after.picked
            for place, each in enumerate(picked):
                if each.token in job.ends:
                    picked, job.reason = picked[: place + 1], "stop"
                    break
            if run.writes and job.sequence.num_new == 0:
                self._prompt_tokens += job.sequence.num_prompt
                self._cached_tokens += job.sequence.cached
            self.scheduler.ran(run, [each.token for each in picked], after.drafts)
            self._new_tokens += len(picked)
            mask = job.wish.mask
            if mask is not None and not all(mask.accept(each.token) for each in picked):
                job.reason = "abort"
            if len(job.sequence.tokens) >= job.sequence.max_tokens and job.reason is None:
                job.reason = "length"
            if job.reason is not None:
                self.end(job)
            if picked:
                job.picked = [*picked]
                changed.append(job)
        self._steps += bool(runs)
        return changed

    def end(self, job: Job) -> None:
        """Takes a job out, wherever it stands; nothing if it is out."""
        if self._jobs.pop(id(job.sequence), None) is not None:
            self.scheduler.finish(job.sequence)
            self._finished += 1

    def stats(self) -> Stats:
        pool = self.scheduler.pool
        return Stats(
            running=len(self.scheduler.running),
            waiting=len(self.scheduler.waiting),
            pages=pool.num_pages,
            pages_in_use=pool.in_use,
            page_size=pool.page_size,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens,
            new_tokens=self._new_tokens,
            preemptions=self.scheduler.preemptions,
            finished=self._finished,
            steps=self._steps,
        )
