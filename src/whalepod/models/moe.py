"""Mixture of experts: router, token dispatch, grouped products (V2, section 2.2; V3, section 2.1.2).

A token picks K of E experts. `Router` scores and picks; a dispatcher brings each token's row to
its experts; `GroupedExperts` runs all experts as grouped matrix products; the dispatcher brings
the rows back and sums them. The dispatcher is a seam: `LocalDispatcher` sorts rows on this device,
`parallel/exchange` sends them to other devices behind the same three methods.

Rows of one expert are contiguous and their count is rounded up to `alignment`. Kernels specialise
on the row count (oneDNN compiles one per shape, FP8 products need whole blocks), and free counts
change every step. A padding row repeats some token with weight 0. Because the weight multiplies
the activation before the down-projection, a padding row adds exactly nothing to any output or
gradient, so it needs no mask, and both directions of dispatch are pure gathers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from whalepod.models.mlp import SwiGLU
from whalepod.spec.errors import UserError
from whalepod.spec.model import ModelSpec, MoE


class Router(nn.Module):
    """Scores experts in float32 and picks K; parameter names as in the checkpoints.

    `load` [E] counts picks since it was last zeroed (training mode only); balancing and metrics
    read it, and recomputation sets `counts_load` to False so that no pick counts twice.
    `balance_weight` multiplies the sequence-wise balance loss of every sequence; the trainer sets it to
    alpha over the number of sequences. Where this device has parts of sequences, `sum_counts` adds up
    counts [B, E] over their other parts.
    """

    load: Tensor
    e_score_correction_bias: Tensor | None

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        assert spec.moe is not None
        self.config = spec.moe
        num_experts = spec.moe.n_routed_experts
        self.weight = nn.Parameter(torch.empty(num_experts, spec.hidden_size))
        self.balance_weight = 0.0
        self.counts_load = True
        self.sum_counts: Callable[[Tensor], Tensor] = lambda counts_BE: counts_BE
        self.register_buffer("load", torch.zeros(num_experts), persistent=False)
        bias = torch.zeros(num_experts) if spec.moe.selection_bias else None
        self.register_buffer("e_score_correction_bias", bias)

    def forward(self, x_BSD: Tensor) -> tuple[Tensor, Tensor]:
        """Returns expert ids [T, K] and their weights [T, K] in float32."""
        m = self.config
        logits = F.linear(x_BSD.flatten(0, 1).float(), self.weight.float())
        scores_TE = logits.softmax(-1) if m.scoring_func == "softmax" else logits.sigmoid()
        with torch.no_grad():
            ids_TK = select_experts(m, scores_TE, self.e_score_correction_bias)
        weights_TK = scores_TE.gather(1, ids_TK)
        if m.norm_topk_prob:
            weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
        weights_TK = weights_TK * m.routed_scaling_factor
        if self.training:
            if self.counts_load:
                with torch.no_grad():
                    ones = self.load.new_ones(()).expand(ids_TK.numel())
                    self.load.scatter_add_(0, ids_TK.flatten(), ones)
            if self.balance_weight:
                counted = ids_TK
                if m.selection_bias:
                    # V3 counts the K highest affinities, whatever bias and groups select (equation 18).
                    counted = scores_TE.detach().topk(m.num_experts_per_tok, dim=-1, sorted=False).indices
                scores_BSE = scores_TE.unflatten(0, x_BSD.shape[:2])
                loss = sequence_balance_loss(scores_BSE, counted, self.sum_counts)
                weights_TK = _AddLoss.apply(weights_TK, self.balance_weight * loss)
        return ids_TK, weights_TK


def select_experts(m: MoE, scores_TE: Tensor, bias_E: Tensor | None) -> Tensor:
    """The K experts of each token [T, K]: the best, or the best of the best groups.

    The bias steers the choice only; weights come from the unbiased scores.
    """
    choice = scores_TE if bias_E is None else scores_TE + bias_E
    if m.topk_method != "greedy" and m.n_group > 1:
        grouped = choice.unflatten(-1, (m.n_group, -1))
        best = grouped.topk(2, dim=-1).values.sum(-1) if m.selection_bias else grouped.amax(-1)
        groups = best.topk(m.topk_group, dim=-1, sorted=False).indices
        closed = torch.ones_like(best, dtype=torch.bool).scatter_(1, groups, False)
        choice = grouped.masked_fill(closed.unsqueeze(-1), float("-inf")).flatten(-2)
    return choice.topk(m.num_experts_per_tok, dim=-1, sorted=False).indices


def routers(model: nn.Module) -> list[Router]:
    """A model's routers, first layer first."""
    return [module for module in model.modules() if isinstance(module, Router)]


def sequence_balance_loss(
    scores_BSE: Tensor, ids_TK: Tensor, sum_counts: Callable[[Tensor], Tensor] = lambda counts_BE: counts_BE
) -> Tensor:
    """Sequence-wise balance loss summed over sequences, without alpha (V3, equations 17 to 20).

    ids: the experts counted for each token in the loads f (equation 18). With parts of sequences and
    a `sum_counts` over all their parts, the part of the loss that arises here: the parts add up.
    """
    batch, _, num_experts = scores_BSE.shape
    k = ids_TK.shape[-1]
    with torch.no_grad():
        picks = ids_TK.view(batch, -1)
        counts = torch.zeros(batch, num_experts, device=picks.device).scatter_add_(
            1, picks, torch.ones((), device=picks.device).expand_as(picks)
        )
        counts = sum_counts(counts)
        whole_length = counts.sum(-1, keepdim=True) / k
        frequency = counts * (num_experts / k) / whole_length
    share = (scores_BSE / scores_BSE.sum(-1, keepdim=True)).sum(1) / whole_length
    return (frequency * share).sum()


class _AddLoss(torch.autograd.Function):
    """Passes x through; on the way back the added loss gets gradient 1.

    The loss joins the graph where it arises, so no caller (a pipeline stage, say) carries it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.shape = loss.shape
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, grad.new_ones(ctx.shape)


class Rows(NamedTuple):
    """Tokens sorted by expert: what the grouped products run on."""

    x_ND: Tensor
    weights_N: Tensor
    ends_E: Tensor  # int32, row after each expert's last; rows past the last expert are idle


class Dispatcher(Protocol):
    """The seam between routing and the experts' products.

    `start` lets the rows go and `finish` takes them in. What the layer computes between the two runs
    while they travel, and so does its backward pass while gradients travel back: autograd goes
    through nodes in the reverse order of their creation.
    """

    def start(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, num_experts: int) -> Any:
        """Sends each token's row off to its experts."""
        ...

    def finish(self, sent: Any) -> tuple[Rows, Any]:
        """Rows for the experts held here, and whatever `combine` needs to undo it."""
        ...

    def combine(self, y_ND: Tensor, plan: Any) -> Tensor:
        """Sums each token's rows [N, D] back to [T, D]; weights were applied by the experts."""
        ...


class GroupPlan(NamedTuple):
    token_N: Tensor  # the token each row comes from (padding rows: token 0)
    row_TK: Tensor  # the row of each token's k-th pick


def group_alignment(num_picks: int, num_experts: int) -> int:
    """Rows to round each expert's group up to: about an eighth of the mean group, at most 64.

    Keeps padding near 6 % of the rows on average while few distinct row counts occur.
    """
    eighth = num_picks // (8 * num_experts)
    return min(64, 1 << (eighth.bit_length() - 1)) if eighth else 1


class Groups(NamedTuple):
    """Where P picks stand when they are sorted by expert into N rows."""

    pick_N: Tensor  # the pick each row serves (padding rows: pick 0)
    row_P: Tensor  # the row of each pick
    ends_E: Tensor  # int32, row after each expert's last


def group_by_expert(ids_P: Tensor, num_experts: int) -> Groups:
    """Rows for picks of experts `ids_P`, each expert's together and padded to `group_alignment`."""
    num_picks, device = ids_P.numel(), ids_P.device
    alignment = group_alignment(num_picks, num_experts)
    # A bound that depends on shapes alone: no device synchronisation, and it traces.
    num_rows = num_picks + num_experts * (alignment - 1)
    counts = torch.zeros(num_experts, dtype=torch.int64, device=device)
    counts.scatter_add_(0, ids_P, torch.ones_like(ids_P))
    padded = (counts + alignment - 1) // alignment * alignment
    ends = padded.cumsum(0)
    order = ids_P.argsort(stable=True)
    shift = (ends - padded) - (counts.cumsum(0) - counts)
    row_of_sorted = torch.arange(num_picks, device=device) + shift[ids_P[order]]
    row_P = torch.empty_like(ids_P).scatter_(0, order, row_of_sorted)
    pick_N = torch.zeros(num_rows, dtype=torch.int64, device=device).scatter_(0, row_of_sorted, order)
    return Groups(pick_N, row_P, ends.to(torch.int32))


class LocalDispatcher:
    """All experts are on this device: sort rows by expert, and back. Nothing travels."""

    def start(
        self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, num_experts: int
    ) -> tuple[Rows, GroupPlan]:
        return self.dispatch(x_TD, ids_TK, weights_TK, num_experts)

    def finish(self, sent: tuple[Rows, GroupPlan]) -> tuple[Rows, GroupPlan]:
        return sent

    def dispatch(
        self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, num_experts: int
    ) -> tuple[Rows, GroupPlan]:
        groups = group_by_expert(ids_TK.flatten(), num_experts)
        plan = GroupPlan(groups.pick_N // ids_TK.shape[1], groups.row_P.view_as(ids_TK))
        weights = weights_TK.new_zeros(groups.pick_N.shape).scatter(0, groups.row_P, weights_TK.flatten())
        return Rows(_Spread.apply(x_TD, *plan), weights, groups.ends_E), plan

    def combine(self, y_ND: Tensor, plan: GroupPlan) -> Tensor:
        return _Collect.apply(y_ND, *plan)


def _collect(y_ND: Tensor, row_TK: Tensor) -> Tensor:
    # Gathers and sums in one pass, in float32 whatever the type, without [T, K, D] in between.
    return F.embedding_bag(row_TK, y_ND, mode="sum")


class _Spread(torch.autograd.Function):
    """Token rows to expert rows; its transpose is `_Collect`, and both only gather.

    Autograd's own transpose of a gather is a scatter-add: serial on CPUs, unordered on GPUs.
    """

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, token_N: Tensor, row_TK: Tensor) -> Tensor:
        ctx.save_for_backward(row_TK)
        return x_TD.index_select(0, token_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, None, None]:
        return _collect(grad_ND, ctx.saved_tensors[0]), None, None


class _Collect(torch.autograd.Function):
    """Sums each token's expert rows; padding rows get a gradient that their weight 0 removes."""

    @staticmethod
    def forward(ctx: Any, y_ND: Tensor, token_N: Tensor, row_TK: Tensor) -> Tensor:
        ctx.save_for_backward(token_N)
        return _collect(y_ND, row_TK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None, None]:
        return grad_TD.index_select(0, ctx.saved_tensors[0]), None, None


GroupedProduct = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Rows [N, in], weights [E, out, in] and `Rows.ends_E` -> [N, out]: each row times its expert's weight."""


def grouped_product(x_ND: Tensor, weight: Tensor, ends_E: Tensor) -> Tensor:
    return F.grouped_mm(x_ND, weight.transpose(1, 2), offs=ends_E)


class GroupedExperts(nn.Module):
    """All routed experts as three stacked weights and two grouped products.

    `product` makes these; `precision/` may put another in its place.
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        assert spec.moe is not None
        num_experts, width = spec.moe.n_routed_experts, spec.moe.moe_intermediate_size
        # Gate and up stand side by side in a dimension of their own, so that both are one product
        # and a shard of the width keeps them paired.
        self.gate_up = nn.Parameter(torch.empty(num_experts, 2, width, spec.hidden_size))
        self.down = nn.Parameter(torch.empty(num_experts, spec.hidden_size, width))
        self.product: GroupedProduct = grouped_product

    def forward(self, rows: Rows) -> Tensor:
        """[N, D] outputs, already multiplied by the rows' weights."""
        gate_up, down, ends = self.gate_up.flatten(1, 2), self.down, rows.ends_E
        multiple = 16 // down.element_size()
        for size in down.shape[1:]:
            if size % multiple:
                raise UserError(
                    f"grouped products in {down.dtype} need sizes in multiples of {multiple} (16 bytes): "
                    f"hidden_size and the experts' width, not {size}"
                )
        hidden = self.product(rows.x_ND, gate_up, ends)
        gate, up = hidden.chunk(2, dim=-1)
        hidden = F.silu(gate) * up * rows.weights_N.unsqueeze(-1).to(hidden.dtype)
        return self.product(hidden, down, ends)


class MoELayer(nn.Module):
    """Routed experts plus shared experts (one MLP of their joint width)."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        m = spec.moe
        assert isinstance(m, MoE)
        self.gate = Router(spec)
        self.experts = GroupedExperts(spec)
        self.dispatcher: Dispatcher = LocalDispatcher()
        self.shared_experts = (
            SwiGLU(spec.hidden_size, m.n_shared_experts * m.moe_intermediate_size)
            if m.n_shared_experts
            else None
        )

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.run(x_BSD.flatten(0, 1), *self.gate(x_BSD)).view_as(x_BSD)

    def run(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """[T, D]: each token's experts, routed as given, and the shared ones."""
        sent = self.dispatcher.start(x_TD, ids_TK, weights_TK, self.gate.weight.shape[0])
        # Here, and not after the routed experts: it computes while tokens travel.
        shared_TD = None if self.shared_experts is None else self.shared_experts(x_TD)
        rows, plan = self.dispatcher.finish(sent)
        out_TD = self.dispatcher.combine(self.experts(rows), plan)
        return out_TD if shared_TD is None else out_TD + shared_TD
