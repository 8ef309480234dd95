"""Attention in strips of queries: what a CPU runs in place of torch's fused kernel when it trains.

A strip is some queries against all keys that any of them may see; what no query of it sees is not computed.
Scores, softmax and sums are FP32, products those of the operands' type with FP32 results. The backward pass
makes the probabilities again from the log of each softmax's sum, as FlashAttention does (arXiv 2205.14135).
Values may be narrower than keys, which torch's kernel would have padded.

Both passes are one operation to torch, so a dry run and FLOP counters see no strips.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

STRIP = 128  # queries, of every head that shares its keys; a quarter of a short sequence's
SCRATCH = 1 << 20  # scores at a time, as long as one head's strip is not more

_library = torch.library.Library("whalepod", "FRAGMENT")
_library.define(
    "tiled_attention(Tensor q, Tensor k, Tensor v, Tensor? mask, bool is_causal, float scale)"
    " -> (Tensor, Tensor)"
)
_library.define(
    "tiled_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor log_sum, "
    "Tensor? mask, bool is_causal, float scale) -> (Tensor, Tensor, Tensor)"
)
OPERATIONS: Any = torch.ops.whalepod


def tiled(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float) -> Tensor:
    """q [B, H, S, D], k [B, heads, L, D], v [B, heads, L, V], heads dividing H -> [B, H, S, V].

    mask: bool [S, L] or [B, 1, S, L]; is_causal: without a mask, and S = L.
    """
    return _Tiled.apply(q, k, v, mask, is_causal, scale)


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, *how: Any) -> Tensor:
        mask, *ctx.how = how
        out, log_sum = OPERATIONS.tiled_attention(q, k, v, *how)
        ctx.save_for_backward(q, k, v, out, log_sum, mask)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *saved, mask = ctx.saved_tensors
        grads = OPERATIONS.tiled_attention_backward(grad, *saved, mask, *ctx.how)
        return (*grads, None, None, None)


# ------------------------------------------------------------------------------------------------- on a CPU


def _forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    out, log_sum = _like(q, k, v, mask, is_causal, scale)
    work = _Work(q, k, mask, is_causal, scale)
    queries, keys, values = work.rows(q), work.keys(k), work.keys(v)
    outs, sums = work.rows_view(out), work.rows_view(log_sum.unsqueeze(-1))
    with _products(q.dtype):
        for heads, strip, seen in work.strips():
            scores = work.scores(queries, keys, heads, strip, seen)
            largest = scores.amax(-1, keepdim=True)
            torch.softmax(scores, -1, out=scores)
            # The largest share is exp(largest - log of the sum).
            sums[heads, :, strip] = (largest - scores.amax(-1, keepdim=True).log_()).unflatten(1, work.shape)
            outs[heads, :, strip] = torch.bmm(scores, values[heads, seen]).unflatten(1, work.shape)
    return out, log_sum


def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    log_sum: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    work = _Work(q, k, mask, is_causal, scale)
    queries, keys, values, grads = work.rows(q), work.keys(k), work.keys(v), work.rows(grad)
    sums = work.rows(log_sum.unsqueeze(-1))
    dots = (grads * work.rows(out)).sum(-1, keepdim=True)
    found = _results(q, k, v)
    grad_q = work.rows_view(found[0])
    grad_k, grad_v = (work.keys(x).zero_() for x in found[1:])  # in FP32 they are the results
    with _products(q.dtype):
        for heads, strip, seen in work.strips():
            shares = work.scores(queries, keys, heads, strip, seen)
            shares.sub_(sums[heads, :, strip].flatten(1, 2)).exp_()
            query, above = queries[heads, :, strip].flatten(1, 2), grads[heads, :, strip].flatten(1, 2)
            grad_v[heads, seen].baddbmm_(shares.mT, above)
            change = torch.bmm(above, values[heads, seen].mT)
            change.sub_(dots[heads, :, strip].flatten(1, 2)).mul_(shares)
            grad_k[heads, seen].baddbmm_(change.mT, query, alpha=scale)
            grad_q[heads, :, strip] = (
                torch.bmm(change, keys[heads, seen]).mul_(scale).unflatten(1, work.shape)
            )
    for low, high in zip(found[1:], (grad_k, grad_v), strict=True):
        if low.dtype != high.dtype:
            low.copy_(high.view_as(low))
    return found


class _Work:
    """How a call is cut. A head is one of keys and values; the G = H / heads query heads that share it go
    together, G x strip rows of one product."""

    def __init__(self, q: Tensor, k: Tensor, mask: Tensor | None, is_causal: bool, scale: float) -> None:
        self.batch, self.heads, self.length = k.shape[:3]
        self.group, self.queries = q.shape[1] // k.shape[1], q.shape[2]
        self.is_causal, self.scale = is_causal, scale
        self.mask = None if mask is None else mask.expand(self.batch, 1, *mask.shape[-2:])[:, 0]
        self.shape = (self.group, -1)
        self._dark: dict[int, Tensor] = {}

    def rows_view(self, x: Tensor) -> Tensor:
        """[B, H, S, X] as [B x heads, G, S, X]; a view of a tensor that is contiguous in this order."""
        return x.view(self.batch * self.heads, self.group, *x.shape[2:])

    def rows(self, x: Tensor) -> Tensor:
        return self.rows_view(_wide(x))

    def keys(self, x: Tensor) -> Tensor:
        """[B, heads, L, X] as [B x heads, L, X]."""
        return _wide(x).flatten(0, 1)

    def strips(self) -> Iterator[tuple[slice, slice, slice]]:
        """Heads, queries and the keys that these may see, one strip after the other."""
        height = min(STRIP, -(-self.queries // 4))
        for start in range(0, self.queries, height):
            strip = slice(start, min(start + height, self.queries))
            rows = self.group * (strip.stop - strip.start)
            for first, last, seen in self._seen(strip):
                step = max(1, SCRATCH // (rows * (seen.stop - seen.start)))
                for head in range(first, last, step):
                    yield slice(head, min(head + step, last)), strip, seen

    def _seen(self, strip: slice) -> Iterator[tuple[int, int, slice]]:
        """Ranges of B x heads and the keys that a strip of theirs sees."""
        everything = self.batch * self.heads
        if self.mask is None:
            yield 0, everything, slice(0, strip.stop if self.is_causal else self.length)
            return
        for sequence in range(self.batch):
            found = self.mask[sequence, strip].any(0).nonzero()
            assert len(found)
            seen = slice(int(found[0]), int(found[-1]) + 1)
            yield sequence * self.heads, (sequence + 1) * self.heads, seen

    def scores(self, queries: Tensor, keys: Tensor, heads: slice, strip: slice, seen: slice) -> Tensor:
        """[heads, G x strip, seen], FP32, -inf where a query may not look."""
        query, key = queries[heads, :, strip].flatten(1, 2), keys[heads, seen]
        out = query.new_empty(len(query), query.shape[1], key.shape[1])
        out.baddbmm_(query, key.mT, beta=0, alpha=self.scale)
        each = out.unflatten(1, self.shape)
        if self.is_causal:
            size = strip.stop - strip.start
            if size not in self._dark:
                self._dark[size] = torch.ones(size, size, dtype=torch.bool).triu_(1)
            each[..., -size:].masked_fill_(self._dark[size], float("-inf"))
        elif self.mask is not None:
            each.masked_fill_(~self.mask[heads.start // self.heads, strip, seen], float("-inf"))
        return out


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.float32, memory_format=torch.contiguous_format).contiguous()


@contextmanager
def _products(dtype: torch.dtype) -> Iterator[None]:
    """FP32 products of what was BF16: by the processor's BF16 instructions, where it has them."""
    matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    if dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


# -------------------------------------------------------------------------------------------- shapes alone


def _like(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=torch.float32)


def _results(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _results_like(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _results(q, k, v)


for _name, _real, _fake in (
    ("tiled_attention", _forward, _like),
    ("tiled_attention_backward", _backward, _results_like),
):
    _library.impl(_name, _real, "CPU")
    _library.impl(_name, _fake, "Meta")
