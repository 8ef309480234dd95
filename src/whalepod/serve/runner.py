"""One step of the model: the tokens of all runs through it, and what is picked behind those that write.

Drafts (multi-token prediction; V3, section 2.2): the MTP block guesses the token after the one that was just
picked. In the next step the guess goes through the model behind that token. What is picked there is picked as
if there were no drafts; where it is the guess, the row behind it counts too and the step has brought two
tokens.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from whalepod.parallel.inference import Inference
from whalepod.serve.paged import PagedCache
from whalepod.serve.picked import Next, Picked, Wish
from whalepod.serve.sampling import penalized, pick, uniform
from whalepod.serve.scheduler import Run, Sequence


class Runner:
    """A model and its cache, on this device or spread. speculate: guess with the MTP block, if it has one."""

    def __init__(self, inference: Inference, num_pages: int, page_size: int, speculate: bool = False) -> None:
        self.inference = inference
        self.speculates = speculate and inference.has_mtp
        self.cache = PagedCache(inference, num_pages, page_size, mtp=self.speculates)

    @torch.inference_mode()
    def run(self, runs: Seq[Run], wishes: Seq[Wish]) -> list[Next]:
        """Of each run the tokens that come next: none of one that does not write, several where drafts were
        right. Where other replicas run and this one has nothing to, `runs` may be empty."""
        tokens = self._tensor([t for run in runs for t in run.tokens] or [0])
        positions = self._tensor([p for run in runs for p in range(run.start, run.end)] or [0])
        hidden = self.inference.hidden(tokens, positions, self.cache.step(runs))
        picked = self._pick(hidden, runs, wishes)
        drafts = self._guess(hidden, runs, wishes, picked) if self.speculates else [()] * len(runs)
        return [Next(*pair) for pair in zip(picked, drafts, strict=True)]

    def _tensor(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.inference.device)

    def _pick(self, hidden_TD: Tensor, runs: Seq[Run], wishes: Seq[Wish]) -> list[list[Picked]]:
        rows: list[int] = []
        owners: list[tuple[int, int]] = []  # of each row: its run, and how many tokens of it come before
        end = 0
        for index, run in enumerate(runs):
            end += run.end - run.start
            if run.writes:
                count = 1 + len(run.drafts)
                rows += range(end - count, end)
                owners += ((index, place) for place in range(count))
        out: list[list[Picked]] = [[] for _ in runs]
        if not rows:
            return out
        logits = self.inference.logits(hidden_TD, self._tensor(rows))
        raw = logits
        changed = [i for i, (index, _) in enumerate(owners) if not wishes[index].is_plain]
        if changed:
            logits = logits.float().clone()
            for i in changed:
                index, _ = owners[i]
                self._change(logits[i], runs[index].sequence, wishes[index])
        samplings = [wishes[index].sampling for index, _ in owners]
        uniforms = [
            uniform(wishes[index].sampling.seed or 0, runs[index].sequence.num_new + place)
            for index, place in owners
        ]
        tokens = pick(logits, samplings, uniforms)
        for i, (index, place) in enumerate(owners):
            drafts = runs[index].drafts
            if len(out[index]) < place or (place and out[index][-1].token != drafts[place - 1]):
                continue  # behind a draft that was wrong
            out[index].append(_described(raw[i], tokens[i], wishes[index].logprobs))
        return out

    def _change(self, logits_V: Tensor, sequence: Sequence, wish: Wish) -> None:
        if wish.sampling.has_penalties:
            prompt, output = sequence.tokens[: sequence.num_prompt], sequence.tokens[sequence.num_prompt :]
            logits_V.copy_(penalized(logits_V, wish.sampling, prompt, output))
        if wish.mask is not None:
            wish.mask.apply(logits_V)

    def _guess(
        self, hidden_TD: Tensor, runs: Seq[Run], wishes: Seq[Wish], picked: list[list[Picked]]
    ) -> list[tuple[int, ...]]:
        """The MTP block over every row whose next token is known; the last one's guess is a run's draft."""
        known: list[Run] = []
        rows: list[int] = []
        following: list[int] = []
        first = 0
        for run, found in zip(runs, picked, strict=True):
            count = run.count + max(0, len(found) - 1)
            known.append(Run(run.sequence, run.start, count, (), run.writes))
            rows += range(first, first + count)
            tokens = [*run.sequence.tokens, *(p.token for p in found)]
            following += tokens[run.start + 1 : run.start + count + 1]
            first += run.end - run.start
        positions = [p for run in known for p in range(run.start, run.end)]
        ends, end = [], 0
        for run in known:
            end += run.count
            ends.append(end - 1)
        writing = [run.writes and wish.is_plain for run, wish in zip(runs, wishes, strict=True)]
        wanted = [e for e, writes in zip(ends, writing, strict=True) if writes]
        best = self.inference.guesses(
            hidden_TD,
            self._tensor(rows or [0]),
            self._tensor(following or [0]),
            self._tensor(positions or [0]),
            self.cache.step(known),
            self._tensor(wanted),
        )
        guesses = iter(best.tolist())
        return [(next(guesses),) if writes else () for writes in writing]


def _described(logits_V: Tensor, token: int, wanted: int | None) -> Picked:
    if wanted is None:
        return Picked(token)
    logprobs = logits_V.float().log_softmax(-1)
    best = logprobs.topk(min(wanted, len(logprobs))) if wanted else None
    top = () if best is None else tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return Picked(token, float(logprobs[token]), top)
