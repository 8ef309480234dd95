"""How tokens are asked for and what a step of the model answers: plain values, no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from whalepod.serve.request import Sampling


class Mask(Protocol):
    """A grammar's view of one sequence."""

    def apply(self, logits_V: Any) -> None:
        """Rules out, in place, tokens that may not come next."""
        ...

    def accept(self, token: int) -> bool:
        """Takes the token that was picked; False if it does not fit, because none did."""
        ...


@dataclass(frozen=True)
class Wish:
    """How a sequence's tokens are picked. logprobs: None, or how many alternatives are wanted."""

    sampling: Sampling
    logprobs: int | None = None
    mask: Mask | None = None

    @property
    def is_plain(self) -> bool:
        """Whether a token's pick depends on the logits alone, so that drafts can be verified at once."""
        return self.mask is None and not self.sampling.has_penalties


@dataclass(frozen=True)
class Picked:
    """A token, its logprob if wanted, and the likeliest tokens with theirs."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Next:
    """What follows a run: tokens, and a guess of those after them."""

    picked: list[Picked]
    drafts: tuple[int, ...] = ()
