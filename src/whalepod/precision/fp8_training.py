"""Linear layers and experts that compute in FP8, forward and backward (DeepSeek-V3, section 3.3).

    forward           y  = x W^T     x in tiles of 1 x 128, W in blocks of 128 x 128
    input gradient    dx = dy W      dy in tiles of 1 x 128
    weight gradient   dW = dy^T x    both in tiles of 128 x 1: along the tokens, over which it sums

Results are BF16. Kept for the backward pass is the FP8 form of x, half of what BF16 keeps; for the weight
gradient its tiles are turned round. W is quantised again on the way back, from the BF16 copy of its FP32
master that the layer holds anyway.

`blocks` is the report's negative example (appendix B.2): dy in blocks of 128 x 128 for the input gradient,
with which a 16B model diverged.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from whalepod.precision import libraries
from whalepod.precision.products import (
    Quantized,
    multiply,
    multiply_groups,
    quantize,
    sum_groups,
    turned,
)
from whalepod.precision.storage import KEPT_HIGH
from whalepod.precision.tiles import COLUMN, ROW, SQUARE
from whalepod.spec.run import FP8Config


def compute_in_fp8(model: nn.Module, recipe: FP8Config) -> None:
    """Makes linear layers and stacked experts compute in FP8, in place; head, embeddings, norms, routers and
    attention's core stay as they are."""
    if torch.cuda.is_available():
        libraries.choose()
    for path, module in model.named_modules():
        if path.rpartition(".")[2] in KEPT_HIGH:
            continue
        if type(module) is nn.Linear:
            module.__class__ = FP8TrainedLinear  # hooks and attributes stay
            module.recipe = recipe  # type: ignore[assignment]
        elif hasattr(module, "product"):
            module.product = partial(fp8_experts, recipe=recipe)  # type: ignore[assignment]


class FP8TrainedLinear(nn.Linear):
    """`nn.Linear` with a weight in high precision and products in FP8: x [..., in] -> [..., out]."""

    recipe: FP8Config

    def forward(self, x: Tensor) -> Tensor:
        out = fp8_linear(x, self.weight, self.recipe)
        return out if self.bias is None else out + self.bias


def fp8_linear(x: Tensor, weight: Tensor, recipe: FP8Config) -> Tensor:
    """x [..., K] times weight [N, K] transposed, in FP8: [..., N]."""
    return _Linear.apply(x.reshape(-1, x.shape[-1]), weight, recipe).view(*x.shape[:-1], -1)


def fp8_experts(x_ND: Tensor, weight: Tensor, ends_E: Tensor, recipe: FP8Config) -> Tensor:
    """Rows x_ND, an expert's before its end, times that expert's weight [E, M, D] transposed: [N, M]."""
    return _Experts.apply(x_ND, weight, ends_E, recipe)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, recipe: FP8Config) -> Tensor:
        ctx.recipe, fmt = recipe, recipe.scales
        x8 = quantize(x, ROW, fmt)
        ctx.save_for_backward(*x8, weight)
        return multiply(x8, quantize(weight, SQUARE, fmt), fmt, x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        values, scale, weight = ctx.saved_tensors
        fmt = ctx.recipe.scales
        dx = dw = None
        if ctx.needs_input_grad[0]:
            grad8 = quantize(grad, _tile(ctx.recipe), fmt)
            dx = multiply(grad8, quantize(weight, SQUARE, fmt).mT, fmt, grad.dtype)
        if ctx.needs_input_grad[1]:
            along_tokens = turned(Quantized(values, scale), fmt)
            dw = multiply(quantize(grad, COLUMN, fmt).mT, along_tokens.mT, fmt, weight.dtype)
        return dx, dw, None


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, ends: Tensor, recipe: FP8Config) -> Tensor:
        ctx.recipe, fmt = recipe, recipe.scales
        x8 = quantize(x, ROW, fmt)
        ctx.save_for_backward(*x8, weight, ends)
        return multiply_groups(x8, quantize(weight, SQUARE, fmt), ends, fmt, x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        values, scale, weight, ends = ctx.saved_tensors
        fmt = ctx.recipe.scales
        dx = dw = None
        if ctx.needs_input_grad[0]:
            grad8 = quantize(grad, _tile(ctx.recipe), fmt)
            dx = multiply_groups(grad8, quantize(weight, SQUARE, fmt).mT, ends, fmt, grad.dtype)
        if ctx.needs_input_grad[1]:
            x8 = Quantized(values, scale)
            dw = sum_groups(quantize(grad, COLUMN, fmt), turned(x8, fmt), ends, fmt, weight.dtype)
        return dx, dw, None, None


def _tile(recipe: FP8Config) -> tuple[int, int]:
    return SQUARE if recipe.gradients == "blocks" else ROW
