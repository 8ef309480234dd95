"""Cross-entropy of a linear head, in slices of tokens: the T x V logits never exist as a whole.

The gradient of the loss with respect to the logits is softmax minus one-hot, known as soon as the
logits are; so the forward pass of each slice also computes its share of the gradients, and the
logits are dropped. At DeepSeek-V3's vocabulary the logits of one 4K sequence and their gradient
would be 4 GiB in float32. (torch's own `linear_cross_entropy` chunks too; in BF16 on CPUs it is
over twice as slow and sums the loss in BF16: `bench/head_loss.py`.)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

SLICE_ELEMENTS = 1 << 22  # of logits: 16 MiB in float32
IGNORED = -100


def head_loss(h_TD: Tensor, weight_VD: Tensor, targets_T: Tensor) -> Tensor:
    """Sum over tokens of the negative log-likelihood of `targets_T` under softmax(h W^T), float32.

    Negative targets are left out of the sum.
    """
    return _HeadLoss.apply(h_TD, weight_VD, targets_T)


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h_TD: Tensor, weight_VD: Tensor, targets_T: Tensor) -> Tensor:
        needs = h_TD.requires_grad or weight_VD.requires_grad
        grad_h = torch.empty_like(h_TD) if needs else None
        grad_w = torch.zeros(weight_VD.shape, dtype=torch.float32, device=weight_VD.device) if needs else None
        total = torch.zeros((), dtype=torch.float32, device=h_TD.device)
        rows = max(1, SLICE_ELEMENTS // weight_VD.shape[0])
        for h, targets, out in zip(
            h_TD.split(rows),
            targets_T.split(rows),
            grad_h.split(rows) if grad_h is not None else [None] * -(-len(h_TD) // rows),
            strict=True,
        ):
            logits = F.linear(h, weight_VD).float()
            counted = (targets >= 0).unsqueeze(1)
            index = targets.clamp_min(0).unsqueeze(1)
            log_sum = logits.logsumexp(-1, keepdim=True)
            total += ((log_sum - logits.gather(1, index)) * counted).sum()
            if out is None or grad_w is None:
                continue
            grad = logits.sub_(log_sum).exp_()
            grad.scatter_add_(1, index, grad.new_full((len(grad), 1), -1.0))
            grad = grad.mul_(counted).to(h.dtype)
            torch.mm(grad, weight_VD, out=out)
            grad_w += grad.t() @ h
        if grad_h is not None and grad_w is not None:
            ctx.save_for_backward(grad_h, grad_w.to(weight_VD.dtype))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        grad_h, grad_w = ctx.saved_tensors
        return grad_h * grad, grad_w * grad, None
