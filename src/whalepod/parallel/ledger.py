"""Counts what a program allocates and computes, on real tensors and on fake ones alike.

`with Ledger() as ledger:` sees every operation below autograd. Of each new storage it notes the bytes and the
category, and through a weak reference the moment at which it goes; of each matrix product the FLOPs. Modules
are followed through their hooks, and into the backward pass by autograd's sequence numbers, so that the peak
and the FLOPs have a place in the model.

What a kernel takes inside for its own purposes is not seen.
"""

from __future__ import annotations

import weakref
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import (
    flop_registry,
    register_flop_formula,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from whalepod.models.attention import Attention
from whalepod.models.mlp import SwiGLU
from whalepod.models.moe import GroupedExperts, Router
from whalepod.models.tiled import OPERATIONS as _tiled
from whalepod.precision.products import OPERATIONS as _fp8

T = TypeVar("T")
_aten = torch.ops.aten
_SILENT = frozenset(
    {torch.ops.prim.device.default, _aten.detach.default, _aten.view.default, _aten.t.default}
)
"""Operations that make no storage and compute nothing, and come by the thousand."""


@dataclass(frozen=True)
class Peak:
    """The fullest moment: bytes by category, and where the program was."""

    bytes: int = 0
    categories: dict[str, int] = field(default_factory=dict)
    where: str = "start"

    def __str__(self) -> str:
        return self.where


@dataclass
class Span:
    """What happened within `Ledger.apart`, relative to its start: the fullest moment, what was left by
    category, the timeline's points and the number of operations."""

    peak: Peak = field(default_factory=Peak)
    left: Counter[str] = field(default_factory=Counter)
    points: list[tuple[int, Counter[str]]] = field(default_factory=list)
    operations: int = 0


class Ledger(TorchDispatchMode):
    """Counts while it is entered; it may be entered again and goes on.

    modules: whose calls are followed, by path ("" is a root). Memory that is there already is taken in with
    `hold`. `live`: bytes alive now, by category. `timeline`: (operation's number, bytes by category) at every
    change of at least `grain` bytes, once `begin` has been called. `flops`: by module kind (`kind_of`),
    causal attention at the half that it computes; `flops_uncut`: the same with attention counted whole, as
    torch's FlopCounterMode does. `handlers`: what stands for an operation, where it cannot be done as it is.
    `broken`: the place from which an exception has just left the modules.
    """

    def __init__(self, modules: Iterable[tuple[str, nn.Module]] = ()) -> None:
        super().__init__()
        followed = [*modules]
        self._modules = {id(module): name for name, module in followed}
        self._kinds = {id(m): kind for name, m in followed if (kind := kind_of(name, m)) is not None}
        self._alive: dict[int, tuple[int, str, Any]] = {}
        self.live: Counter[str] = Counter()
        self.total = 0
        self.peak = Peak()
        self.flops: Counter[str] = Counter()
        self.flops_uncut = 0
        self.timeline: list[tuple[int, dict[str, int]]] = []
        self.operations = 0
        self.handlers: dict[Any, Callable[..., Any]] = {}
        self._grain, self._last = 1 << 62, 0
        self._tags: list[str] = []
        self.broken = ""
        self._stack: list[int] = []
        self._marks: list[int] = []  # autograd sequence numbers at which ...
        self._places: list[tuple[int, ...]] = []  # ... the stack of modules changed to this
        self._hooks = ExitStack()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled under it, and torch's guard around each call costs more than ours

    # ----------------------------------------------------------------------------------- in and out

    def __enter__(self) -> Ledger:
        hooks = nn.modules.module
        before = hooks.register_module_forward_pre_hook(self._enter)
        # Recomputation leaves a block by an exception, as soon as it has what it needs.
        after = hooks.register_module_forward_hook(self._leave, always_call=True)
        self._hooks.callback(before.remove)
        self._hooks.callback(after.remove)
        resize = torch.UntypedStorage.resize_

        def resized(storage: Any, size: int) -> Any:
            # FSDP2 empties and refills storages in place; no operation is dispatched for it.
            out = resize(storage, size)
            self._resized(storage)
            return out

        torch.UntypedStorage.resize_ = resized  # type: ignore[method-assign]
        self._hooks.callback(lambda: setattr(torch.UntypedStorage, "resize_", resize))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._hooks.close()

    def begin(self, grain: int = 1 << 62) -> None:
        """Forgets peak, FLOPs and timeline so far, and keeps what is held; draws changes of `grain` bytes."""
        self.peak = Peak(self.total, dict(self.live))
        self.flops.clear()
        self.flops_uncut = self.operations = 0
        self.timeline = [(0, dict(self.live))]
        self._grain, self._last = max(grain, 1), self.total

    @contextmanager
    def tagged(self, category: str) -> Iterator[None]:
        """What is allocated meanwhile belongs to `category`."""
        self._tags.append(category)
        try:
            yield
        finally:
            self._tags.pop()

    def hold(self, tensors: Iterable[Tensor], category: str) -> None:
        """Takes in memory that was there before, or moves what is known into `category`."""
        for tensor in tensors:
            storage = _local(tensor).untyped_storage()
            key = storage._cdata
            if key in self._alive:
                size, old, reference = self._alive[key]
                self._alive[key] = (size, category, reference)
                self.live[old] -= size
                self.live[category] += size
            else:
                self._add(storage, category)

    @contextmanager
    def apart(self) -> Iterator[Span]:
        """Notes what happens meanwhile by itself too."""
        span = Span()
        before, total, operations = Counter(self.live), self.total, self.operations
        peak, drawn = self.peak, len(self.timeline)
        self.peak = Peak(self.total, dict(self.live), self.where)
        try:
            yield span
        finally:
            own = self.peak
            self.peak = max(peak, own, key=lambda p: p.bytes)
            span.peak = Peak(own.bytes - total, _minus(own.categories, before), own.where)
            span.left = _minus(self.live, before)
            span.points = [(at - operations, _minus(now, before)) for at, now in self.timeline[drawn:]]
            span.operations = self.operations - operations

    def again(self, span: Span, stand_in: Callable[[], T]) -> T:
        """Counts memory as if `span` happened again. `stand_in` leaves its results; what that takes is in the
        span."""
        before, total, operations = Counter(self.live), self.total, self.operations
        peak, grain = self.peak, self._grain
        self._grain = 1 << 62
        out = stand_in()
        self.peak, self._grain, self.operations = peak, grain, operations + span.operations
        self.live, self.total = _plus(before, span.left), total + sum(span.left.values())
        if total + span.peak.bytes > peak.bytes:
            self.peak = Peak(
                total + span.peak.bytes, dict(_plus(before, span.peak.categories)), span.peak.where
            )
        self.timeline += [(operations + at, dict(_plus(before, now))) for at, now in span.points]
        if span.points:
            self._last = sum(self.timeline[-1][1].values())
        return out

    # ------------------------------------------------------------------------------------ operations

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented  # it comes again, for what this rank has
        handler = self.handlers.get(func)
        out = (handler or func)(*args, **(kwargs or {}))
        if func in _SILENT:
            return out
        self.operations += 1
        if isinstance(out, Tensor):
            self._note(out)
        elif isinstance(out, list | tuple):
            for each in out:
                if isinstance(each, Tensor):
                    self._note(each)
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self._count(func, count, args, kwargs or {}, out)
        return out

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._alive:
            self._add(storage, self._category())

    def _category(self) -> str:
        if self._tags:
            return self._tags[-1]
        return "activations" if torch._C._current_autograd_node() is None else "working"

    def _add(self, storage: Any, category: str) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._alive[key] = (size, category, weakref.ref(storage, lambda _: self._gone(key)))
        self._change(category, size)

    def _gone(self, key: int) -> None:
        size, category, _ = self._alive.pop(key)
        self._change(category, -size)

    def _resized(self, storage: Any) -> None:
        key = storage._cdata
        if key not in self._alive:
            self._add(storage, "gathered")
            return
        size, category, reference = self._alive[key]
        self._alive[key] = (storage.nbytes(), category, reference)
        self._change(category, storage.nbytes() - size)

    def _change(self, category: str, size: int) -> None:
        self.live[category] += size
        self.total += size
        if self.total > self.peak.bytes:
            self.peak = Peak(self.total, dict(self.live), self.where)
        if abs(self.total - self._last) >= self._grain:
            self.timeline.append((self.operations, dict(self.live)))
            self._last = self.total

    # --------------------------------------------------------------------------------------- places

    def _enter(self, module: nn.Module, _args: Any) -> None:
        self.broken = ""
        if id(module) in self._modules:
            self._stack.append(id(module))
            self._mark()

    def _leave(self, module: nn.Module, _args: Any, out: Any) -> None:
        if out is not None:
            self.broken = ""
        elif not self.broken:  # modules around it are left by the same exception
            self.broken = self.where
        if self._stack and self._stack[-1] == id(module):
            self._stack.pop()
            self._mark()

    def _mark(self) -> None:
        self._marks.append(torch.autograd._get_sequence_nr())
        self._places.append(tuple(self._stack))

    def _modules_now(self) -> tuple[int, ...]:
        """Outermost first; in the backward pass those whose forward pass made the running node."""
        if self._stack:
            return tuple(self._stack)
        node = torch._C._current_autograd_node()
        if node is None:
            return ()
        index = bisect_right(self._marks, node._sequence_nr()) - 1
        return self._places[index] if index >= 0 else ()

    @property
    def where(self) -> str:
        """The innermost module and the direction, such as `layers.3.mlp.experts, backward`."""
        backward = torch._C._current_autograd_node() is not None
        names = [self._modules[key] for key in self._modules_now()]
        direction = "backward" if backward else "forward" if names else "between passes"
        return f"{names[-1] or 'model'}, {direction}" if names else direction

    @property
    def module(self) -> str:
        """The innermost module's path without its number, such as `layers.mlp.experts`."""
        names = [self._modules[key] for key in self._modules_now()]
        return ".".join(p for p in names[-1].split(".") if not p.isdigit()) if names else ""

    def _count(self, func: Any, count: Callable[..., int], args: Any, kwargs: Any, out: Any) -> None:
        flops = count(*args, **kwargs, out_val=out)
        self.flops_uncut += flops
        if func._overloadpacket in _CAUSAL_AT:
            kind = "attention core"
            place = _CAUSAL_AT[func._overloadpacket]
            if kwargs.get("is_causal", args[place] if len(args) > place else False):
                length = args[0 if place == 4 else 1].shape[-2]
                flops = flops * (length + 1) // (2 * length)
        else:
            found = (self._kinds[key] for key in reversed(self._modules_now()) if key in self._kinds)
            kind = next(found, "head")
        self.flops[kind] += flops


def kind_of(name: str, module: nn.Module) -> str | None:
    """What a module's matrix products are for; None leaves it to the module around."""
    if isinstance(module, Attention):
        return "attention"
    if isinstance(module, GroupedExperts):
        return "experts"
    if isinstance(module, Router):
        return "router"
    if isinstance(module, SwiGLU):
        return "shared experts" if name.endswith("shared_experts") else "dense"
    return "mtp" if name.endswith("eh_proj") else None


def _plus(a: Mapping[str, int], b: Mapping[str, int]) -> Counter[str]:
    out = Counter(a)
    out.update(b)  # unlike `+`, which drops what is not positive
    return out


def _minus(a: Mapping[str, int], b: Mapping[str, int]) -> Counter[str]:
    out = Counter(a)
    out.subtract(b)
    return out


def _local(tensor: Any) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


# What torch's own table of FLOPs leaves out; FlopCounterMode counts them too from here on.
@register_flop_formula(_aten._grouped_mm)
def _grouped_flops(a_shape: Any, b_shape: Any, *_args: Any, out_shape: Any = None, **_kwargs: Any) -> int:
    """Rows x inner x columns: padding rows are computed like any other."""
    if len(b_shape) == 3:  # [N, inner] x [E, inner, columns]
        return 2 * a_shape[0] * a_shape[1] * b_shape[2]
    return 2 * a_shape[0] * a_shape[1] * b_shape[1]  # weights' gradient: [rows, N] x [N, columns]


@register_flop_formula([_fp8.fp8_mm, _fp8.fp8_grouped_mm])
def _fp8_flops(
    a_shape: Any, _a: Any, b_shape: Any, _b: Any, *_args: Any, out_shape: Any = None, **_kwargs: Any
) -> int:
    """[M, K] x [N, K], or rows x their experts' weights: [N, K] x [E, M, K]."""
    return 2 * a_shape[0] * a_shape[1] * b_shape[-2]


@register_flop_formula(_fp8.fp8_grouped_sum)
def _fp8_sum_flops(
    a_shape: Any, _a: Any, b_shape: Any, _b: Any, *_args: Any, out_shape: Any = None, **_kwargs: Any
) -> int:
    """[N, M] x [N, K], summed over the rows of each expert."""
    return 2 * a_shape[0] * a_shape[1] * b_shape[1]


@register_flop_formula(_aten._scaled_dot_product_flash_attention_for_cpu)
def _attention_flops(q: Any, k: Any, v: Any, *_args: Any, out_shape: Any = None, **_kwargs: Any) -> int:
    return sdpa_flop_count(q, k, v)


@register_flop_formula(_aten._scaled_dot_product_flash_attention_for_cpu_backward)
def _attention_backward_flops(
    grad: Any, q: Any, k: Any, v: Any, *_args: Any, out_shape: Any = None, **_kwargs: Any
) -> int:
    return sdpa_backward_flop_count(grad, q, k, v)


@register_flop_formula(_tiled.tiled_attention)
def _tiled_flops(q: Any, k: Any, v: Any, *_args: Any, out_shape: Any = None, **_kwargs: Any) -> int:
    """Of [B, H, S, D], [B, heads, L, D] and [B, heads, L, V]."""
    return 2 * q[0] * q[1] * q[2] * k[2] * (q[3] + v[3])


@register_flop_formula(_tiled.tiled_attention_backward)
def _tiled_backward_flops(
    _grad: Any, q: Any, k: Any, v: Any, *_args: Any, out_shape: Any = None, **_kwargs: Any
) -> int:
    """Scores again, then as many products for each gradient."""
    return 2 * q[0] * q[1] * q[2] * k[2] * (3 * q[3] + 2 * v[3])


_CAUSAL_AT = {
    _tiled.tiled_attention: 4,
    _tiled.tiled_attention_backward: 7,
    _aten._scaled_dot_product_flash_attention_for_cpu: 4,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: 7,
    _aten._scaled_dot_product_flash_attention: 4,
    _aten._scaled_dot_product_flash_attention_backward: 11,
}
"""Where `is_causal` stands among the arguments."""
