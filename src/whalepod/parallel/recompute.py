"""Recomputation: activations dropped in the forward pass and computed again in the backward pass.

`full` keeps the input of every block. `selective` keeps the results that are dear (matrix products,
attention, anything that travelled) and recomputes what is cheap for its size, as DeepSeek-V3 did
(section 3.2.3): norms, the up-projections of MLA, and SwiGLU. An up-projection is a matrix product
too, but its output is many times its input: 512 numbers become 32,768 in the key-value one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from whalepod.models.attention import MLAttention
from whalepod.models.lora import Adapter
from whalepod.models.mlp import SwiGLU
from whalepod.models.moe import GroupedExperts, Router, routers
from whalepod.models.tiled import OPERATIONS as _tiled
from whalepod.models.transformer import Block
from whalepod.parallel.comm import SAVED_BY_RECOMPUTE, Traffic
from whalepod.precision.products import OPERATIONS as _fp8
from whalepod.spec.layout import Recompute

_aten, _ops = torch.ops.aten, torch.ops._c10d_functional
_LINEAR = (_aten.mm.default, _fp8.fp8_mm.default)
_KEPT = {
    *_LINEAR,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten._grouped_mm.default,
    _fp8.fp8_grouped_mm.default,
    _tiled.tiled_attention.default,
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
        found = routers(block)
        contexts = _Selective(block, found, traffic) if policy == "selective" else partial(_full, found)
        block.forward = partial(
            checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False, context_fn=contexts
        )


Contexts = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]


def _full(found: list[Router]) -> Contexts:
    """Contexts of the first pass and of the repeated one."""
    return nullcontext(), _Repeat(found)


class _Repeat(AbstractContextManager[None]):
    """A repeated pass: the picks of experts were counted in the first.

    It may be entered again: schedules that split the backward pass go back twice, for inputs and weights.
    """

    def __init__(self, found: list[Router]) -> None:
        self._routers = found

    def __enter__(self) -> None:
        for router in self._routers:
            router.counts_load = False

    def __exit__(self, *_: object) -> None:
        for router in self._routers:
            router.counts_load = True


class _Replay(_Repeat):
    """A repeated pass in which what was kept is not computed, nor sent, again."""

    def __init__(self, found: list[Router], again: Any, traffic: Traffic) -> None:
        super().__init__(found)
        self._again, self._traffic = again, traffic
        self._kept: dict[Any, dict[Any, Any]] = {}

    def __enter__(self) -> None:
        super().__enter__()
        self._traffic.paused = True
        # torch forgets each result as it is used, which does for one pass back only.
        self._kept = {op: dict(results) for op, results in self._again.storage.items()}
        self._again.__enter__()

    def __exit__(self, *error: object) -> None:
        self._again.__exit__(*error)
        self._again.storage.update(self._kept)
        self._traffic.paused = False
        super().__exit__()


class _Selective:
    """Makes the contexts of one block.

    Of some results that are dear nobody reads the numbers in the repeated pass: what comes after the last
    product of an MLP or of the experts is added up and leaves the block, a product whose sum over devices is
    kept goes only there, and rows go on from the first of their two hops to the second. No derivative needs
    them. A stand-in takes their place.
    """

    def __init__(self, block: Block, found: list[Router], traffic: Traffic) -> None:
        self._routers, self._traffic = found, traffic
        self._in_up_projection = self._in_adapter = self._in_tail = False
        self._mode: Any = None  # of the first pass, while it runs
        self._kept: list[tuple[Any, int]] = []
        self._unread: set[tuple[Any, int]] = set()
        if isinstance(attention := block.self_attn, MLAttention):
            for module in (getattr(attention, "q_b_proj", None), attention.kv_b_proj):
                if module is not None:
                    module.register_forward_pre_hook(lambda *_: self._enter(True))
                    module.register_forward_hook(lambda *_: self._enter(False))
        for module in block.modules():
            if isinstance(module, Adapter):  # cheap, and B's derivative reads what A gave
                module.register_forward_pre_hook(lambda *_: self._adapter(True))
                module.register_forward_hook(lambda *_: self._adapter(False))
            elif isinstance(module, SwiGLU):
                module.down_proj.register_forward_pre_hook(lambda *_: self._tail(True))
                module.register_forward_hook(lambda *_: self._tail(False))
            elif isinstance(module, GroupedExperts):
                module.register_forward_hook(lambda *_: self._after_experts())

    def _enter(self, inside: bool) -> None:
        self._in_up_projection = inside

    def _adapter(self, inside: bool) -> None:
        self._in_adapter = inside

    def _tail(self, inside: bool) -> None:
        self._in_tail = inside

    def _after_experts(self) -> None:
        if self._kept:
            self._unread.add(self._kept[-1])  # their second product
        self._in_tail = True  # till the block's end

    def __call__(self) -> Contexts:
        first, again = create_selective_checkpoint_contexts(self._policy)
        return self._first(first), _Replay(self._routers, again, self._traffic)

    @contextmanager
    def _first(self, mode: Any) -> Iterator[None]:
        self._mode, self._in_tail = mode, False
        try:
            with mode:
                yield
            for op, index in self._unread:
                mode.storage[op][index] = tree_map(lambda x: _Unread(x.val), mode.storage[op][index])
        finally:
            self._mode, self._in_tail = None, False
            self._kept.clear()
            self._unread.clear()

    def _policy(self, context: Any, op: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
        keep = op in _KEPT and not (self._in_up_projection or self._in_adapter)
        if not keep:
            return CheckpointPolicy.PREFER_RECOMPUTE
        if op == _ops.reduce_scatter_tensor.default and self._kept and self._kept[-1][0] in _LINEAR:
            self._unread.add(self._kept[-1])
        self._kept.append((op, self._mode.func_counter[op] - 1))
        if self._in_tail or self._traffic.passing:
            self._unread.add(self._kept[-1])
        return CheckpointPolicy.MUST_SAVE


class _Unread:
    """In place of a kept result: a tensor of the same kind, whatever its numbers, made when asked for."""

    def __init__(self, like: Tensor) -> None:
        self._shape, self._dtype, self._device = like.shape, like.dtype, like.device

    def get_val(self, _allow_mutation: bool) -> Tensor:
        return torch.empty(self._shape, dtype=self._dtype, device=self._device)
