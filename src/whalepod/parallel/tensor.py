"""Tensor and sequence parallelism: the moves of activations that the sharding table asks for.

Between matrices each `tp` rank has its own part of the sequence (norms, residuals, router), within
them all of it and a part of the heads or of the width (arXiv 2205.05198). So a pair of matrices
costs one gather before it and one reduce-scatter behind it. MLA allows better: its down-projections
work on the sequence's part, and what is gathered is their output, the compressed query and the
latent, 2,112 wide instead of 7,168 in DeepSeek-V3.

Nothing is computed twice in a way that would reach the loss twice, so the gradient of a weight that
`tp` repeats is the sum of the ranks' gradients.
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from whalepod.models.attention import Attention
from whalepod.models.loss import partial_head_loss
from whalepod.models.mlp import SwiGLU
from whalepod.models.moe import MoELayer
from whalepod.parallel.comm import Axis
from whalepod.parallel.mesh import Mesh


def split_tensors(part: nn.Module, mesh: Mesh) -> None:
    """Puts the moves around the modules of a part whose parameters are this rank's shares."""
    tp = mesh["tp"]
    if tp.size == 1:
        return
    served: set[nn.Module | None] = set()  # shared experts whose layer makes their moves
    for name, found in part.named_modules():
        module: Any = found
        if isinstance(found, MoELayer) and mesh.layout.expert_tp > 1:
            module.forward = partial(_experts_layer, found, tp)
            served.add(found.shared_experts)
        elif isinstance(found, nn.Embedding):
            module.forward = partial(_embed, found, tp)
        elif isinstance(found, Attention):
            _around_attention(found, tp)
        elif isinstance(found, SwiGLU) and found not in served:
            # Width and tokens only: any order of the tokens does, so the first dimension, without a copy.
            module.register_forward_pre_hook(_gather_input(tp, 0))
            module.down_proj.register_forward_hook(_reduce_output(tp, 0))
        elif name == "lm_head":
            module.forward = partial(_logits, module, tp)
    if hasattr(part, "head_loss"):
        cast(Any, part).head_loss = partial(vocabulary_loss, tp)


def _around_attention(module: Attention, tp: Axis) -> None:
    parts: Any = module
    if hasattr(module, "q_a_proj"):
        parts.q_a_layernorm.register_forward_hook(_gather_output(tp, 1))
        parts.kv_a_proj_with_mqa.register_forward_hook(_gather_output(tp, 1))
    else:
        module.register_forward_pre_hook(_gather_input(tp, 1))
    parts.o_proj.register_forward_hook(_reduce_output(tp, 1))


def _gather_input(axis: Axis, dim: int) -> Any:
    return lambda _module, args: (axis.gather(args[0], dim), *args[1:])


def _gather_output(axis: Axis, dim: int) -> Any:
    return lambda _module, _args, out: axis.gather(out, dim)


def _reduce_output(axis: Axis, dim: int) -> Any:
    return lambda _module, _args, out: axis.reduce_scatter(out, dim)


def _embed(module: nn.Embedding, tp: Axis, tokens_BS: Tensor) -> Tensor:
    """Rows of the vocabulary that this rank has, zeros for others; summed, each rank keeps its part of
    the sequence [B, S / tp, D]."""
    rows = len(module.weight)
    index = tokens_BS - tp.rank * rows
    here = (index >= 0) & (index < rows)
    found = F.embedding(index.clamp(0, rows - 1), module.weight)
    return tp.reduce_scatter(found * here.unsqueeze(-1).to(found.dtype), 1)


def _logits(module: nn.Linear, tp: Axis, x_BSD: Tensor) -> Tensor:
    """Whole logits of the whole sequence, for generation; training uses `vocabulary_loss`."""
    return tp.gather(F.linear(tp.gather(x_BSD, 1), module.weight), -1)


def vocabulary_loss(tp: Axis, x_BSD: Tensor, weight_VD: Tensor, targets_BS: Tensor) -> Tensor:
    """Loss of a head whose vocabulary is split over `tp`; the same on every rank.

    x_BSD is this rank's part of the sequence, targets_BS [B, S] those of all of it. Of the logits only
    two numbers a token travel: each rank's log-sum-exp, and the target's logit where it is held.
    """
    rows = len(weight_VD)

    def combine(log_sum: Tensor, target_logit: Tensor) -> tuple[Tensor, Tensor]:
        both = tp.gather(torch.cat((log_sum, target_logit), dim=1)).unflatten(0, (tp.size, -1))
        return both[..., 0].logsumexp(0).unsqueeze(1), both[..., 1].sum(0).unsqueeze(1)

    return partial_head_loss(tp.gather(x_BSD, 1), weight_VD, targets_BS, tp.rank * rows, combine)


def _experts_layer(module: MoELayer, tp: Axis, x_BSD: Tensor) -> Tensor:
    """Experts split by width: each rank routes its part of the tokens, and every rank runs all of them.
    Routed and shared experts have one gather and one reduce-scatter between them."""
    routed = (x_BSD.flatten(0, 1), *module.gate(x_BSD))
    return tp.reduce_scatter(module.run(*(tp.gather(t) for t in routed))).view_as(x_BSD)
