"""What is asked of the engine and what comes back: plain values, no torch."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Literal, Protocol

from whalepod.spec.errors import UserError

FinishReason = Literal["stop", "length", "abort"]
MAX_LOGPROBS = 20


class Busy(UserError):
    """The queue is full: ask again later."""


class Draining(UserError):
    """No new requests are taken: the engine is about to end."""


@dataclass(frozen=True)
class Sampling:
    """How a token is picked from the logits, in this order: penalties, temperature, top_k, top_p, min_p.

    temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 keep every token; seed None is a new one.
    repetition divides the logits of tokens in prompt or output (multiplies them where negative); presence and
    frequency are subtracted for tokens in the output, once and by their count.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 100:
            raise UserError(f"temperature must be between 0 and 100, not {self.temperature}")
        if self.top_k < 0:
            raise UserError(f"top_k must be 0 (all tokens) or more, not {self.top_k}")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise UserError(f"seed must be between 0 and {2**63 - 1}, not {self.seed}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p must be above 0 and at most 1, not {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise UserError(f"min_p must be between 0 and 1, not {self.min_p}")
        if not 0.01 <= self.repetition_penalty <= 100:
            raise UserError(f"repetition_penalty must be between 0.01 and 100, not {self.repetition_penalty}")
        for name in ("presence_penalty", "frequency_penalty"):
            if not -2 <= getattr(self, name) <= 2:
                raise UserError(f"{name} must be between -2 and 2, not {getattr(self, name)}")

    @property
    def has_penalties(self) -> bool:
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)


@dataclass(frozen=True)
class Grammar:
    """What the output must be. source: a JSON schema, a regular expression, or nothing for any JSON
    object."""

    kind: Literal["json_object", "json_schema", "regex"]
    source: str = ""


@dataclass(frozen=True)
class Request:
    """One sequence to continue.

    stop: strings before which the text ends. stop_ids: tokens that end it, besides EOS unless `ignore_eos`.
    logprobs: None for none, else how many alternatives of each token are listed too.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int = 128
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    stop_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    logprobs: int | None = None
    grammar: Grammar | None = None

    def __post_init__(self) -> None:
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_LOGPROBS:
            raise UserError(f"logprobs must be between 0 and {MAX_LOGPROBS}, not {self.logprobs}")
        if any(not text for text in self.stop):
            raise UserError("a stop string must not be empty")


@dataclass(frozen=True)
class TokenInfo:
    """A token of the output. logprob: of the model's own distribution, before temperature; None if not asked.
    top: the likeliest tokens and their logprobs, best first."""

    id: int
    text: str
    logprob: float | None = None
    top: tuple[tuple[int, str, float], ...] = ()


@dataclass(frozen=True)
class Chunk:
    """What is new of a sequence: text that is whole UTF-8 and cannot become part of a stop string, and
    tokens.

    The last has a `finish_reason`: `stop` (EOS or a stop string), `length`, `abort`. Counts are those so far;
    cached_tokens: of the prompt, found in the prefix cache.
    """

    text: str
    tokens: tuple[TokenInfo, ...]
    finish_reason: FinishReason | None
    prompt_tokens: int
    cached_tokens: int
    new_tokens: int


@dataclass(frozen=True)
class Stats:
    """Of an engine: requests and pages now, the rest counted since its start."""

    running: int = 0
    waiting: int = 0
    pages: int = 0
    pages_in_use: int = 0
    page_size: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    new_tokens: int = 0
    preemptions: int = 0
    finished: int = 0
    steps: int = 0


class Service(Protocol):
    """An engine as a server sees it."""

    def generate(self, request: Request) -> AsyncIterator[Chunk]:
        """Chunks of the output as they come. Closing the iterator ends the request.

        Raises at the first step UserError for what cannot be done, Busy for a full queue, Draining."""
        ...

    def stats(self) -> Stats: ...

    @property
    def failure(self) -> BaseException | None:
        """What ended the engine, if it is broken."""
        ...

    async def drain(self, timeout_s: float) -> None:
        """Takes no more requests, lets those there finish, and ends; what is left by then is aborted."""
        ...
