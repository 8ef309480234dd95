"""The engine below text: token ids in, token ids out, many sequences at once."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from whalepod.models.transformer import Transformer
from whalepod.serve.pages import PagePool
from whalepod.serve.request import FinishReason, Request, Stats
from whalepod.serve.runner import Mask, Picked, Runner, Wish
from whalepod.serve.scheduler import Scheduler, Sequence

PAGE_SIZE = 64  # tokens; FlashMLA's


@dataclass(frozen=True)
class CoreConfig:
    """num_pages: of `PAGE_SIZE` tokens each. max_running: sequences at once. max_step_tokens: tokens through
    the model at once, which bounds how long those that write wait for a prompt. speculate: guess tokens with
    the model's multi-token prediction."""

    num_pages: int
    max_running: int = 64
    max_step_tokens: int = 512
    page_size: int = PAGE_SIZE
    speculate: bool = False


@dataclass(eq=False)
class Job:
    """A request on its way. eos: tokens that end it."""

    request: Request
    sequence: Sequence
    wish: Wish
    ends: frozenset[int]
    picked: list[Picked] = field(default_factory=list)
    reason: FinishReason | None = None


class Core:
    """Scheduler and model. `add`, then `step` until `is_idle`."""

    def __init__(self, model: Transformer, config: CoreConfig) -> None:
        self.config, self.spec = config, model.spec
        pool = PagePool(config.num_pages, config.page_size)
        self.scheduler = Scheduler(pool, config.max_running, config.max_step_tokens)
        self.runner = Runner(model, config.num_pages, config.page_size, config.speculate)
        self._jobs: dict[int, Job] = {}  # by their sequence
        self._prompt_tokens = self._cached_tokens = self._new_tokens = self._finished = self._steps = 0

    @property
    def is_idle(self) -> bool:
        return self.scheduler.is_idle

    def add(self, request: Request, ends: frozenset[int] = frozenset(), mask: Mask | None = None) -> Job:
        """Raises UserError for what the model or the cache cannot take."""
        self.spec.check_prompt(list(request.prompt), request.max_new_tokens)
        length = len(request.prompt)
        sequence = Sequence([*request.prompt], length, length + request.max_new_tokens)
        seed = request.sampling.seed
        wish = Wish(
            request.sampling, random.getrandbits(63) if seed is None else seed, request.logprobs, mask
        )
        self.scheduler.add(sequence)
        job = Job(request, sequence, wish, ends | request.stop_ids)
        self._jobs[id(sequence)] = job
        return job

    def step(self) -> list[Job]:
        """One pass of the model. Returns the jobs that got tokens or ended, with them in `picked`."""
        runs = self.scheduler.schedule()
        if not runs:
            self.scheduler.check_integrity()
            return []
        jobs = [self._jobs[id(run.sequence)] for run in runs]
        following = self.runner.run(runs, [job.wish for job in jobs])
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
            if len(job.sequence.tokens) >= job.sequence.max_tokens and job.reason is None:
                job.reason = "length"
            if job.reason is not None:
                self._end(job)
            if picked:
                job.picked = picked
                changed.append(job)
        self._steps += 1
        return changed

    def end(self, job: Job, reason: FinishReason) -> None:
        """Ends a job from outside: a stop string, a client that is gone."""
        if job.reason is None:
            job.reason = reason
            self._end(job)

    def _end(self, job: Job) -> None:
        self.scheduler.finish(job.sequence)
        del self._jobs[id(job.sequence)]
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
