"""One pass of this project's engine, as its scheduler makes them: sequences that write beside prompts that
are read in, all in one (`serve/paged.py`). `serve_step` times the two apart, as other engines do them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from whalepod.planner.serve_step import Step
from whalepod.spec.model import GQA, MLA


def pass_parts(
    step: Step, writing: int, keys: int, chunks: Sequence[tuple[int, int]], heads: int, total: int
) -> dict[str, float]:
    """Seconds by part on one attention rank. writing: sequences with one token each over the cache, filled up
    to `keys`; chunks: (start, tokens) of prompts; heads: tokens whose logits are wanted; total: tokens of all
    data-parallel ranks together."""
    s, k, worker = step.software, step.kernels, step.worker
    tokens = writing + sum(count for _, count in chunks)

    def attention(share: float) -> float:
        time = step.projections(tokens * share)
        if writing:
            time = time + step.decode_scores(writing * share, writing * share, keys)
        return time + share * sum(_chunk(step, start, count) for start, count in chunks)

    rows = float(max(tokens, 1))
    parts = step.layers(np.float64(rows), np.float64(max(total, rows)), attention, decode=not chunks)
    parts["head"] = step.head(max(heads, 1), max(heads, 1) * worker.dp)
    if worker.pp > 1:
        parts["pipeline"] = step.hand_on(rows)
    found = {name: float(time) for name, time in parts.items()}
    issue = 1e-6 * s.decode_layer_us * step.spec.num_hidden_layers
    found["host"] = max(0.0, issue - sum(found.values())) + k.around[0]
    found["host"] += 1e-6 * (s.step_us + s.request_us * (writing + len(chunks)))
    return found


def _chunk(step: Step, start: int, count: int) -> float:
    """One layer's attention of a prompt's tokens over themselves and those before, in the form that the model
    prefers (`MLAttention.prefers_absorbed`)."""
    k, a, cache = step.kernels, step.spec.attention, step.software.cache
    heads, end = step.spec.num_attention_heads / step.worker.tp, start + count
    # With tokens before them they look through a mask, which the kernel does not skip by.
    keys = end if start else count / 2
    if isinstance(a, GQA):
        return k.prefill_attention(count, keys, heads, 2.0 * a.head_dim, cache)
    assert isinstance(a, MLA)
    both, rank = a.qk_nope_head_dim + a.v_head_dim, a.kv_lora_rank
    if count * (2 * rank - both) < rank * both:
        time = k.per_head(count, heads, a.qk_nope_head_dim, rank) + k.per_head(
            count, heads, rank, a.v_head_dim
        )
        # All heads' queries are rows of one product.
        return time + 2 * k.gemm(count * heads, a.latent_dim, end, "bf16") + k.passes(count * heads, end, 8.0)
    made = k.gemm(end, rank, heads * both, "bf16") + k.passes(end, heads * a.qk_head_dim, 6.0)
    return made + k.prefill_attention(count, keys, heads, a.qk_head_dim + a.v_head_dim, cache)
