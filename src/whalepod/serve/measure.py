"""How fast a server is under a load: so many requests in flight, or so many arriving a second.

With a concurrency the loop is closed: who has an answer asks again, so the server is never asked more than it
takes. With a rate it is open: requests arrive as in a Poisson process whatever becomes of those before, and
a server that is too slow shows in its queue. Every answer has its full length, greedily.
"""

from __future__ import annotations

import asyncio
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np

from whalepod.serve.client import OK, Answer, complete
from whalepod.spec.errors import UserError
from whalepod.spec.model import shown

Progress = Callable[[str, int, int], None]
MAX_CONCURRENCY = 100_000
RATE_SECONDS = 30  # of arrivals, where nobody says how many requests
_TEXT = """the of and to in is that for it as was with be by on not he his but at are this have from or had an
they which one you were all her she there would their we him been has when who will no more if out so up said
what its about than into them can only other time new some could these two may first then do any like my"""
WORDS = _TEXT.split()


@dataclass(frozen=True)
class Load:
    """What is asked. concurrency: requests in flight, each number a point of its own; or rate: requests per
    second. requests: of a point; None is 4 for each in flight and at least 8, or 30 seconds' arrivals.
    shared_prefix: tokens that all prompts begin with, which the server knows from the warm-up on."""

    concurrency: tuple[int, ...] = (1, 8, 32)
    rate: float | None = None
    requests: int | None = None
    prompt_tokens: int = 512
    new_tokens: int = 128
    shared_prefix: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        _check("--rate", self.rate, 1e-3, 1e5)
        for name, least, most in (
            ("requests", 1, 10**6), ("prompt_tokens", 1, 10**7), ("new_tokens", 1, 10**7),
            ("shared_prefix", 0, self.prompt_tokens), ("seed", 0, 2**63),
        ):  # fmt: skip
            _check(f"--{name.replace('_', '-')}", getattr(self, name), least, most)

    @property
    def points(self) -> Iterator[tuple[int | None, int]]:
        """(requests in flight, requests) of each point."""
        if self.rate is not None:
            yield None, self.requests or max(8, round(RATE_SECONDS * self.rate))
            return
        for concurrency in self.concurrency:
            yield concurrency, self.requests or max(8, 4 * concurrency)


def parse_load(concurrency: str | None, rate: float | None, **more: Any) -> Load:
    """concurrency: as typed, `1,8,32`; None is that too, unless there is a rate. Raises UserError."""
    if rate is not None:
        if concurrency is not None:
            raise UserError("--concurrency and --rate exclude each other: give one of them")
        return Load((), rate, **more)
    if concurrency is None:
        return Load(**more)
    parts = concurrency.split(",")
    if not all(re.fullmatch(r"\s*\d{1,9}\s*", part, re.ASCII) for part in parts):
        raise UserError(f"--concurrency must be like 8 or 1,8,32, not {shown(concurrency)}")
    for part in parts:
        _check("--concurrency", int(part), 1, MAX_CONCURRENCY)
    return Load(tuple(map(int, parts)), **more)


class Prompts:
    """Random prompts, each different from the others. vocabulary: token ids to draw from; None draws words.

    tokens_per_word: of the server's tokenizer, to be set once it has counted some words.
    """

    def __init__(self, load: Load, vocabulary: Sequence[int] | None) -> None:
        self._load, self._vocabulary = load, vocabulary
        self._random = random.Random(load.seed)
        self._shared = self._draw(load.shared_prefix)
        self.tokens_per_word = 1.0

    def next(self) -> str | list[int]:
        load = self._load
        if self._vocabulary is not None:
            return [*self._shared, *self._draw(load.prompt_tokens - load.shared_prefix)]
        words = max(1, round(load.prompt_tokens / self.tokens_per_word))
        shared = self._shared[: round(load.shared_prefix / self.tokens_per_word)]
        return " ".join([*shared, *self._draw(words - len(shared))])

    def _draw(self, count: int) -> list[Any]:
        return self._random.choices(WORDS if self._vocabulary is None else self._vocabulary, k=count)


@dataclass(frozen=True)
class Point:
    """A load that was measured. concurrency None: requests arrived at `rate`. duration_s: from the first
    request to the end of the last answer."""

    concurrency: int | None
    rate: float | None
    new_tokens: int
    duration_s: float
    answers: tuple[Answer, ...]

    @property
    def whole(self) -> list[Answer]:
        return [answer for answer in self.answers if answer.outcome == OK]

    @property
    def errors(self) -> Mapping[str, int]:
        """Failed requests by HTTP status, or by what else became of them."""
        return dict(Counter(answer.outcome for answer in self.answers if answer.outcome != OK))

    def as_dict(self) -> dict[str, Any]:
        """Plain values with their units in the names. Of answers that were whole, and None without any;
        `short_answers` ended before their full length all the same. Tokens are per second of the point."""
        whole = self.whole
        spread = {
            f"{name}_ms_{which}": value
            for name, values in {
                "ttft": [a.ttft_s for a in whole],
                "tpot": [a.tpot_s for a in whole],
                "latency": [a.latency_s for a in whole],
            }.items()
            for which, value in zip(("p50", "p99"), _percentiles_ms(values), strict=True)
        }
        said = {answer.outcome: answer.said for answer in self.answers if answer.outcome != OK}
        return {
            "concurrency": self.concurrency,
            "rate_per_s": self.rate,
            "requests": len(self.answers),
            "completed": len(whole),
            "errors": dict(self.errors),
            "error_messages": said,
            "short_answers": sum(a.new_tokens < self.new_tokens for a in whole),
            "duration_s": self.duration_s,
            "mean_in_flight": sum(a.latency_s for a in self.answers) / self.duration_s,
            "requests_per_s": len(whole) / self.duration_s,
            "output_tokens_per_s": sum(a.new_tokens for a in whole) / self.duration_s,
            "prompt_tokens_per_s": sum(a.prompt_tokens for a in whole) / self.duration_s,
            "prompt_tokens_mean": sum(a.prompt_tokens for a in whole) / len(whole) if whole else None,
            "cached_tokens_mean": sum(a.cached_tokens for a in whole) / len(whole) if whole else None,
            **spread,
        }


async def measure(
    client: httpx.AsyncClient,
    model: str,
    load: Load,
    vocabulary: Sequence[int] | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> list[Point]:
    """Every point of `load`, in turn, after one request that is left out. Raises UserError if that one fails:
    then the others would too."""
    prompts = Prompts(load, vocabulary)

    async def ask() -> Answer:
        body = {"model": model, "prompt": prompts.next(), "max_tokens": load.new_tokens}
        return await complete(client, body)

    first = await ask()
    if first.outcome != OK:
        raise UserError(f"the first request failed ({first.outcome}): {first.said}")
    if vocabulary is None and first.prompt_tokens:
        prompts.tokens_per_word = first.prompt_tokens / load.prompt_tokens
    points = []
    for concurrency, requests in load.points:
        stage = f"{load.rate:g} requests/s" if concurrency is None else f"{concurrency} in flight"
        answers: list[Answer] = []

        async def one(stage: str = stage, requests: int = requests, answers: list[Answer] = answers) -> None:
            answers.append(await ask())
            progress(stage, len(answers), requests)

        progress(stage, 0, requests)
        began = time.perf_counter()
        if concurrency is None:
            await _arriving(one, requests, load)
        else:
            await _in_flight(one, requests, concurrency)
        points.append(
            Point(concurrency, load.rate, load.new_tokens, time.perf_counter() - began, tuple(answers))
        )
    return points


async def _in_flight(one: Callable[[], Any], requests: int, concurrency: int) -> None:
    left = iter(range(requests))

    async def slot() -> None:
        for _ in left:
            await one()

    async with asyncio.TaskGroup() as group:
        for _ in range(min(concurrency, requests)):
            group.create_task(slot())


async def _arriving(one: Callable[[], Any], requests: int, load: Load) -> None:
    arrivals = random.Random(f"arrivals {load.seed}")
    due = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(requests):
            # By the clock: a late one does not move those after it.
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            group.create_task(one())
            due += arrivals.expovariate(load.rate or 1.0)


def _percentiles_ms(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    known = [1e3 * value for value in values if value is not None]
    if not known:
        return None, None
    median, high = np.percentile(known, (50, 99))
    return float(median), float(high)


def _check(flag: str, value: float | None, least: float, most: float) -> None:
    if value is not None and not least <= value <= most:
        raise UserError(f"{flag} must be from {least:.15g} to {most:.15g}, not {value:.15g}")
