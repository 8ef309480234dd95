"""Where the rows of balanced routing go: how many nodes and ranks a token reaches."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from whalepod.spec.model import MoE

DRAWN_TOKENS = 8192
FEW = 2048  # where a part in a hundred is enough


def expected_nodes(moe: MoE, nodes: int) -> float:
    """Nodes among `nodes` that one token's experts lie on, on average (DeepSeek-V3, section 2.1.2: experts of
    at most `topk_group` groups of `n_group`, those with the best experts)."""
    return 1.0 if nodes <= 1 else reached(moe, nodes, 1, DRAWN_TOKENS, FEW)[0]


@lru_cache(maxsize=256)
def reached(moe: MoE, nodes: int, places: int, tokens: int, drawn: int = DRAWN_TOKENS) -> tuple[float, float]:
    """Nodes, and ranks, that a token's experts lie on, on average: of `nodes` x `places` ranks that share the
    experts out, with loads of `tokens` tokens that are even.

    Drawn, by the router's own rule: the best groups are those with the best experts, so picks are no even
    choice among all of their experts. But picks beyond an expert's share, `moved` of all, go to any in the
    groups that their token has reached.
    """
    experts, k, rows = moe.n_routed_experts, moe.num_experts_per_tok, np.arange(drawn)[:, None]
    groups = 1 if moe.topk_method == "greedy" else moe.n_group
    random = np.random.default_rng(0)
    scores = random.random((drawn, experts))
    if groups > 1:
        grouped = scores.reshape(drawn, groups, -1)
        best = np.sort(grouped, axis=-1)[..., -2:].sum(-1) if moe.selection_bias else grouped.max(-1)
        limit = np.sort(best, axis=-1)[:, -moe.topk_group, None]
        scores = np.where((best >= limit)[..., None], grouped, -2.0).reshape(drawn, experts)
    picks = np.argpartition(scores, -k)[:, -k:]
    # Mean excess of a count that scatters by its root.
    moved = 0.4 * min(1.0, (experts / (tokens * k)) ** 0.5)
    open_groups = np.zeros((drawn, groups), dtype=bool)
    open_groups[rows, picks * groups // experts] = True
    scores = np.where(open_groups.repeat(experts // groups, axis=1), random.random(scores.shape), -2.0)
    scores[rows, picks] = np.where(random.random(picks.shape) < moved, -1.0, 1.0)
    picks = np.argpartition(scores, -k)[:, -k:]
    rank = picks * nodes * places // experts
    hit = np.zeros((drawn, nodes, places), dtype=bool)
    hit[rows, rank // places, rank % places] = True
    return float(hit.any(2).sum(1).mean()), float(hit.sum((1, 2)).mean())
