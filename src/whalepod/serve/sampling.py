"""From logits to a token. What is drawn depends on a request's seed, the token's place and its logits alone:
not on who else is in the batch, nor on how often the request was put off.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from whalepod.serve.request import Sampling

COLDEST = 1e-4
"""A lower temperature is greedy: there is nothing else to draw."""
LIKELY = 1024
"""Tokens to sort at first: what top_p and min_p leave is mostly among them, and a vocabulary is dear to
sort."""


def uniform(seed: int, index: int) -> float:
    """The number in [0, 1) that draws a request's output token `index`."""
    return random.Random((seed << 32) + index).random()


def penalized(logits_V: Tensor, sampling: Sampling, prompt: Sequence[int], output: Sequence[int]) -> Tensor:
    """Logits after the penalties, float32."""
    scores = logits_V.float()
    vocabulary = len(scores)
    counts = torch.bincount(torch.tensor(output, dtype=torch.int64), minlength=vocabulary).to(scores.device)
    if sampling.repetition_penalty != 1.0:
        seen = counts > 0
        seen[torch.tensor(prompt, dtype=torch.int64, device=scores.device)] = True
        factor = sampling.repetition_penalty
        scores = torch.where(seen, torch.where(scores > 0, scores / factor, scores * factor), scores)
    return scores - sampling.frequency_penalty * counts - sampling.presence_penalty * (counts > 0)


def pick(logits_NV: Tensor, samplings: Sequence[Sampling], uniforms: Sequence[float]) -> list[int]:
    """A token for each row of logits, by its Sampling (penalties aside) and its number in [0, 1)."""
    picked = logits_NV.argmax(-1)
    drawn = [i for i, s in enumerate(samplings) if s.temperature >= COLDEST]
    if drawn:
        device = logits_NV.device
        own = [samplings[i] for i in drawn]
        temperatures = torch.tensor([s.temperature for s in own], device=device)
        u = torch.tensor([uniforms[i] for i in drawn], device=device, dtype=torch.float64)
        scores = logits_NV[drawn].float()
        scores = (scores - scores.amax(-1, keepdim=True)) / temperatures.unsqueeze(1)
        probabilities = scores.softmax(-1)
        picked[drawn] = _draw(probabilities, own, u)
    return picked.tolist()


def _draw(probabilities: Tensor, samplings: Sequence[Sampling], u: Tensor) -> Tensor:
    vocabulary = probabilities.shape[-1]
    out = torch.empty(len(samplings), dtype=torch.int64, device=probabilities.device)
    plain = [i for i, s in enumerate(samplings) if not s.top_k and s.top_p == 1 and not s.min_p]
    if plain:
        out[plain] = _at(probabilities[plain], u[plain])
    rest = [i for i in range(len(samplings)) if i not in set(plain)]
    for size in (LIKELY, vocabulary):
        if not rest or (size == LIKELY and vocabulary <= LIKELY):
            continue
        own = [samplings[i] for i in rest]
        shares, ids = probabilities[rest].topk(min(size, vocabulary), dim=-1)
        kept, is_whole = _kept(shares, own)
        chosen = ids.gather(-1, _at(shares * kept, u[rest]).unsqueeze(-1)).squeeze(-1)
        done = [j for j in range(len(rest)) if is_whole[j] or size == vocabulary]
        for j in done:
            out[rest[j]] = chosen[j]
        rest = [i for j, i in enumerate(rest) if j not in set(done)]
    return out


def _kept(shares_NK: Tensor, samplings: Sequence[Sampling]) -> tuple[Tensor, list[bool]]:
    """Which of the likeliest K tokens stay, and of each row whether none beyond them would."""
    device, width = shares_NK.device, shares_NK.shape[-1]
    top_k = torch.tensor([s.top_k or 1 << 62 for s in samplings], device=device).unsqueeze(1)
    top_p = torch.tensor([s.top_p for s in samplings], device=device).unsqueeze(1)
    min_p = torch.tensor([s.min_p for s in samplings], device=device).unsqueeze(1)
    # A token stays if those before it leave room: the first always does.
    before = shares_NK.cumsum(-1) - shares_NK
    total = torch.where(
        top_k < width, (shares_NK * (torch.arange(width, device=device) < top_k)).sum(-1, True), 1
    )
    kept = (torch.arange(width, device=device) < top_k) & (before < top_p * total)
    kept &= shares_NK >= min_p * shares_NK[:, :1]
    return kept, (~kept[:, -1]).tolist()


def _at(weights_NK: Tensor, u: Tensor) -> Tensor:
    """Of each row the index that `u` of the way through its sum falls on."""
    sums = weights_NK.double().cumsum(-1)
    index = torch.searchsorted(sums, (u * sums[:, -1]).unsqueeze(1), right=True).squeeze(1)
    last = weights_NK.shape[-1] - 1 - (weights_NK.flip(-1) > 0).int().argmax(-1)
    return torch.minimum(index, last)
