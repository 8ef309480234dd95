"""The paged cache, and attention over it: per layer one latent (or key-value) row a token, in pages.

All of a step's tokens stand in one row [1, T] of the model, run behind run. Each layer writes their rows into
the pages and attends run by run: those of a few tokens, which write, together and in the absorbed form, over
rows gathered from their pages and padded to the longest; those that are read in each by itself, in the form
that costs less.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from whalepod.models.attention import Attention
from whalepod.parallel.inference import Inference
from whalepod.serve.scheduler import Run
from whalepod.spec.counts import kv_elements_per_layer
from whalepod.spec.model import ModelSpec

FEW = 4
"""Tokens of a run up to which it is put together with others."""


@cache
def multiplies_bf16() -> bool:
    """Whether this machine's CPU multiplies BF16 by itself, and torch was built with oneDNN."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def token_bytes(spec: ModelSpec, dtype: torch.dtype, mtp: bool = False) -> int:
    """Of one token in all layers of a model on one device; mtp: in those of multi-token prediction too."""
    layers = spec.num_hidden_layers + mtp * spec.num_nextn_predict_layers
    return layers * kv_elements_per_layer(spec) * dtype.itemsize


class PagedCache:
    """Rows [pages, page_size, width] of each layer that is here; `mtp`: of those of multi-token prediction
    too."""

    def __init__(self, inference: Inference, num_pages: int, page_size: int, mtp: bool) -> None:
        own = [m for m in inference.layers if mtp or m.layer < inference.spec.num_hidden_layers]
        # Not `empty`: what is masked out is multiplied by 0 still, and must be finite.
        self.rows = {
            m.layer: torch.zeros(
                num_pages, page_size, m.cache_width, dtype=inference.dtype, device=inference.device
            )
            for m in own
        }
        self.page_size, self.device = page_size, inference.device

    @property
    def token_bytes(self) -> int:
        return sum(rows.shape[-1] * rows.element_size() for rows in self.rows.values())

    def step(self, runs: Sequence[Run]) -> Step:
        """What attention needs to know of a step's runs: made once, used by every layer."""
        size, first = self.page_size, 0
        slots: list[int] = []
        spans: list[_Span] = []
        for run in runs:
            pages = run.sequence.holding.pages
            slots += [pages[p // size] * size + p % size for p in range(run.start, run.end)]
            spans.append(_Span(first, run.start, run.end, pages[: -(-run.end // size)]))
            first += run.end - run.start
        few = [span for span in spans if span.count <= FEW]
        return Step(
            self,
            self._tensor(slots),
            [(span, self._tensor(span.pages)) for span in spans if span.count > FEW],
            self._together(few) if few else None,
        )

    def _tensor(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)

    def _together(self, spans: list[_Span]) -> _Few:
        count, width = max(s.count for s in spans), max(len(s.pages) for s in spans)
        table = torch.tensor([s.pages + [0] * (width - len(s.pages)) for s in spans])
        # Queries are padded in front, with repetitions of a run's first: all of them may look somewhere.
        index = [[s.first + max(0, i - (count - s.count)) for i in range(count)] for s in spans]
        last = [[s.start + max(0, i - (count - s.count)) for i in range(count)] for s in spans]
        # To the end of the last page: a part of it would have to be copied.
        mask = torch.arange(width * self.page_size) <= torch.tensor(last).unsqueeze(-1)
        out = [i * count + count - s.count + j for i, s in enumerate(spans) for j in range(s.count)]
        rows = [s.first + j for s in spans for j in range(s.count)]
        owners = [i for i, s in enumerate(spans) for _ in range(s.count)]
        seen = [p for s in spans for p in range(s.start, s.end)]
        tensors = (
            table,
            torch.tensor(index),
            mask.unsqueeze(1),
            *map(torch.tensor, (out, rows, owners, seen)),
        )
        return _Few(spans, *(t.to(self.device) for t in tensors))


class _Span(NamedTuple):
    """A run's place: its first row in the step, and its first position and end in the sequence."""

    first: int
    start: int
    end: int
    pages: list[int]

    @property
    def count(self) -> int:
        return self.end - self.start


class _Few(NamedTuple):
    """Runs that attend together: R of them, Q queries each, L positions."""

    spans: list[_Span]
    table_RP: Tensor  # pages
    index_RQ: Tensor  # the step's row of each query
    mask: Tensor  # [R, 1, Q, L], True where it may look
    out: Tensor  # of the R x Q results those that count
    rows: Tensor  # and where they go
    owners: Tensor  # of each token its run,
    last: Tensor  # and its position, up to which it may look

    def rows_of(self, rows: Tensor) -> Tensor:
        """[R, pages, page_size, width]."""
        if len(self.spans) == 1:
            return _rows(rows, self.spans[0].pages, self.table_RP[0]).unsqueeze(0)
        return rows[self.table_RP]


def _rows(rows: Tensor, pages: list[int], index: Tensor) -> Tensor:
    """A sequence's pages: where they lie side by side, as they do until the pool has been through some churn,
    without a copy."""
    first = pages[0]
    if pages == list(range(first, first + len(pages))):
        return rows[first : first + len(pages)]
    return rows[index]


@dataclass(frozen=True)
class Step:
    """Attention of one step, the models' seam `attend`: q [1, T, H, width] and kv [1, T, width]."""

    cache: PagedCache
    slots: Tensor
    long: list[tuple[_Span, Tensor]]
    few: _Few | None

    @property
    def only_few(self) -> bool:
        """Whether every run is one of those that write."""
        return self.few is not None and not self.long

    def __call__(self, attention: Attention, q: Tensor, kv: Tensor) -> Tensor:
        rows, num_tokens = self.cache.rows[attention.layer], len(self.slots)
        rows.flatten(0, 1)[self.slots] = kv[0, :num_tokens]
        parts: list[tuple[Tensor | slice, Tensor]] = []
        dtype, q = q.dtype, q.to(attention.compute_dtype or q.dtype)
        for span, pages in self.long:
            seen = _rows(rows, span.pages, pages).flatten(0, 1)[: span.end].unsqueeze(0).to(q.dtype)
            part = slice(span.first, span.first + span.count)
            form = attention.absorbed if attention.prefers_absorbed(span.count) else attention.expanded
            parts.append((part, form(q[:, part], seen, None)[0]))
        if self.few is not None:
            few = self.few
            seen = few.rows_of(rows).flatten(1, 2).to(q.dtype)
            found = attention.absorbed(q[0][few.index_RQ], seen, few.mask)
            parts.append((few.rows, found.flatten(0, 1)[few.out]))
        if len(parts) == 1 and len(parts[0][1]) == q.shape[1] and isinstance(parts[0][0], slice):
            return parts[0][1].unsqueeze(0).to(dtype)
        # Zeros: tokens may stand behind the runs that are nobody's and only make parts equal.
        out = q.new_zeros(1, q.shape[1], q.shape[2] * attention.value_width)
        for place, values in parts:
            out[0, place] = values
        return out.to(dtype)
