"""Cross-entropy of a linear head, in slices of tokens: the T x V logits never exist as a whole.

The gradient of the loss with respect to the logits is softmax minus one-hot, known as soon as the
logits are; so the forward pass of each slice also computes its share of the gradients, and the
logits are dropped. At DeepSeek-V3's vocabulary the logits of one 4K sequence and their gradient
would be 4 GiB in float32. (torch's own `linear_cross_entropy` chunks too; in BF16 on CPUs it is
over twice as slow and sums the loss in BF16: `bench/head_loss.py`.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

SLICE_ELEMENTS = 1 << 22  # of logits: 16 MiB in float32


Combine = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def seen(targets: Tensor) -> Tensor:
    """The tokens of targets, those too that no loss counts: they stand there as -1 - token."""
    return torch.where(targets < 0, -1 - targets, targets)


def not_counted(targets: Tensor) -> Tensor:
    """The same targets, for no loss to count."""
    return torch.where(targets < 0, targets, -1 - targets)


def head_loss(h: Tensor, weight_VD: Tensor, targets: Tensor) -> Tensor:
    """Sum over tokens of the negative log-likelihood of `targets` under softmax(h W^T), float32.

    h [..., D], targets [...]. Negative targets are left out of the sum.
    """
    return _apply(h, weight_VD, targets, 0, None)


def partial_head_loss(h: Tensor, weight_VD: Tensor, targets: Tensor, first: int, combine: Combine) -> Tensor:
    """The same where this device holds only some rows of the head: `first` and those after it.

    combine(log_sum [T, 1], target_logit [T, 1]) makes both, known for these rows, whole: the log-sum-exp
    over all rows, and the target's logit, which is 0 where the target is not among these rows.
    The gradient of h is the part that comes from these rows.
    """
    return _apply(h, weight_VD, targets, first, combine)


def _apply(h: Tensor, weight_VD: Tensor, targets: Tensor, first: int, combine: Combine | None) -> Tensor:
    h_TD, targets_T = h.reshape(-1, h.shape[-1]), targets.reshape(-1)
    # Within a Function's forward pass gradients are always off: whether they are wanted is known here.
    return _HeadLoss.apply(h_TD, weight_VD, targets_T, first, combine, torch.is_grad_enabled())


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        h_TD: Tensor,
        weight_VD: Tensor,
        targets_T: Tensor,
        first: int,
        combine: Combine | None,
        trains: bool,
    ) -> Tensor:
        needs = trains and (h_TD.requires_grad or weight_VD.requires_grad)
        grad_h = torch.empty_like(h_TD) if needs else None
        needs_w = needs and weight_VD.requires_grad
        grad_w = (
            torch.zeros(weight_VD.shape, dtype=torch.float32, device=weight_VD.device) if needs_w else None
        )
        total = torch.zeros((), dtype=torch.float32, device=h_TD.device)
        rows = max(1, min(len(h_TD), SLICE_ELEMENTS // len(weight_VD)))
        # Reused by all slices: on a CPU, memory that has just been allocated costs more than what is done
        # with it. `low` holds the logits as they are computed, later their gradient.
        low = torch.empty(rows, len(weight_VD), dtype=h_TD.dtype, device=h_TD.device)
        high = torch.empty_like(low, dtype=torch.float32)
        part = torch.empty_like(weight_VD) if needs_w else None
        for start in range(0, len(h_TD), rows):
            h, targets = h_TD[start : start + rows], targets_T[start : start + rows]
            logits, grad = high[: len(h)], low[: len(h)]
            logits.copy_(torch.mm(h, weight_VD.t(), out=grad))
            counted = (targets >= 0).unsqueeze(1)
            index = (targets - first).unsqueeze(1)
            here = (index >= 0) & (index < len(weight_VD))
            index = index.clamp(0, len(weight_VD) - 1)
            target_logit = logits.gather(1, index) * here
            largest = logits.amax(-1, keepdim=True)
            shares = torch.softmax(logits, -1, out=logits)
            # The largest share is exp(largest - log_sum), and never so small that its logarithm is lost.
            own_sum = largest - shares.amax(-1, keepdim=True).log_()
            log_sum, scale = own_sum, counted
            if combine is not None:
                log_sum, target_logit = combine(own_sum, target_logit)
                scale = (own_sum - log_sum).exp_() * counted
            total += ((log_sum - target_logit) * counted).sum()
            if grad_h is None:
                continue
            grad.copy_(shares.mul_(scale).scatter_add_(1, index, -(here & counted).float()))
            torch.mm(grad, weight_VD, out=grad_h[start : start + rows])
            if grad_w is not None and part is not None:
                grad_w += torch.mm(grad.t(), h, out=part)
        if grad_h is not None:
            ctx.save_for_backward(grad_h, None if grad_w is None else grad_w.to(weight_VD.dtype))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None, None, None]:
        grad_h, grad_w = ctx.saved_tensors
        return grad_h * grad, None if grad_w is None else grad_w * grad, None, None, None, None
