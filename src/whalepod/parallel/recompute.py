"""Recomputation: activations dropped in the forward pass and computed again in the backward pass.

`full` keeps the input of every block. `selective` keeps the results that are dear (matrix products,
attention, anything that travelled) and recomputes what is cheap for its size, as DeepSeek-V3 did
(section 3.2.3): norms, the up-projections of MLA, and SwiGLU. An up-projection is a matrix product
too, but its output is many times its input: 512 numbers become 32,768 in the key-value one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from whalepod.models.attention import MLAttention
from whalepod.models.moe import routers
from whalepod.models.transformer import Block
from whalepod.parallel.comm import SAVED_BY_RECOMPUTE, Traffic
from whalepod.spec.layout import Recompute

_aten = torch.ops.aten
_KEPT = {
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten._grouped_mm.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    # Routing decides what travels where: it must not come out differently the second time.
    _aten.topk.default,
    *SAVED_BY_RECOMPUTE,
}


def apply_recompute(part: nn.Module, policy: Recompute, traffic: Traffic) -> None:
    """Makes every block of a model part recompute by `policy`."""
    if policy == "none":
        return
    for block in [m for m in part.modules() if isinstance(m, Block)]:
        context = _Selective(block, traffic) if policy == "selective" else _Full(block)
        block.forward = partial(
            checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False, context_fn=context
        )


class _Full:
    """Contexts of the first pass and of the repeated one."""

    def __init__(self, block: Block) -> None:
        self._routers = routers(block)

    def __call__(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        return _nothing(), self._uncounted()

    @contextmanager
    def _uncounted(self) -> Iterator[None]:
        """The expert loads of a repeated pass were counted in the first."""
        for router in self._routers:
            router.counts_load = False
        try:
            yield
        finally:
            for router in self._routers:
                router.counts_load = True


class _Selective(_Full):
    def __init__(self, block: Block, traffic: Traffic) -> None:
        super().__init__(block)
        self._traffic = traffic
        self._in_up_projection = False
        if isinstance(attention := block.self_attn, MLAttention):
            for module in (getattr(attention, "q_b_proj", None), attention.kv_b_proj):
                if module is not None:
                    module.register_forward_pre_hook(lambda *_: self._enter(True))
                    module.register_forward_hook(lambda *_: self._enter(False))

    def _enter(self, inside: bool) -> None:
        self._in_up_projection = inside

    def __call__(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        first, again = create_selective_checkpoint_contexts(self._policy)
        return first, self._replayed(again)

    def _policy(self, _context: Any, op: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
        keep = op in _KEPT and not self._in_up_projection
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    @contextmanager
    def _replayed(self, again: AbstractContextManager[Any]) -> Iterator[None]:
        # Collectives answer from what was kept: nothing travels, nothing counts.
        before, self._traffic.paused = self._traffic.paused, True
        try:
            with self._uncounted(), again:
                yield
        finally:
            self._traffic.paused = before


@contextmanager
def _nothing() -> Iterator[None]:
    yield
