"""From logits to a token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from whalepod.spec.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy; top_k 0 and top_p 1 keep every token; seed None is a new one."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 100:
            raise UserError(f"temperature must be between 0 and 100, not {self.temperature}")
        if self.top_k < 0:
            raise UserError(f"top_k must be 0 (all tokens) or more, not {self.top_k}")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise UserError(f"seed must be between 0 and {2**63 - 1}, not {self.seed}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p must be above 0 and at most 1, not {self.top_p}")


def pick(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """Token ids [B] from logits [B, V]."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    scores, ids = (logits.float() / sampling.temperature).sort(dim=-1, descending=True)
    if sampling.top_k:
        scores[:, sampling.top_k :] = float("-inf")
    probabilities = scores.softmax(-1)
    # A token stays if those before it leave room: the first always does.
    before = probabilities.cumsum(-1) - probabilities
    probabilities = probabilities.masked_fill(before >= sampling.top_p, 0.0)
    place = torch.multinomial(probabilities, 1, generator=generator)
    return ids.gather(-1, place).squeeze(-1)
