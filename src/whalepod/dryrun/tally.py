"""What a rank's step computes and sends, counted: the whole, and one micro-batch in its middle by itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from whalepod.dryrun.world import replaced
from whalepod.parallel.comm import Traffic
from whalepod.parallel.ledger import Ledger
from whalepod.parallel.parallelize import Parallel
from whalepod.parallel.pipeline import TorchStage


@dataclass(frozen=True)
class Counts:
    """A rank's step: calls and bytes of collectives by (axis, operation), FLOPs by module kind."""

    calls: Counter[tuple[str, str]] = field(default_factory=Counter)
    bytes: Counter[tuple[str, str]] = field(default_factory=Counter)
    flops: Counter[str] = field(default_factory=Counter)
    flops_uncut: int = 0
    by_module: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Bytes by (axis, kind of module)."""

    def more(self, times: int, others: Counts) -> Counts:
        """These and so many times the others."""

        def add(a: Counter[Any], b: Counter[Any]) -> Counter[Any]:
            return Counter({key: a[key] + times * b[key] for key in {**a, **b}})

        return Counts(
            add(self.calls, others.calls),
            add(self.bytes, others.bytes),
            add(self.flops, others.flops),
            self.flops_uncut + times * others.flops_uncut,
            add(self.by_module, others.by_module),
        )


class Tally:
    """Counts of everything, and of one micro-batch in the middle of the step, by itself."""

    def __init__(self, traffic: Traffic, ledger: Ledger, index: int) -> None:
        self.middle, self._index = Counts(), index
        self._by_module: Counter[tuple[str, str]] = Counter()
        self._traffic, self._ledger = traffic, ledger
        self._stack = ExitStack()

    def __enter__(self) -> Tally:
        self._stack.enter_context(replaced(self._traffic, "add", self._noted(self._traffic.add)))
        for owner, names in _PASSES:
            for name in names:
                self._stack.enter_context(replaced(owner, name, self._split(getattr(owner, name))))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def now(self) -> Counts:
        t, ledger = self._traffic, self._ledger
        calls, sent, flops = Counter(t.calls), Counter(t.bytes), Counter(ledger.flops)
        return Counts(calls, sent, flops, ledger.flops_uncut, Counter(self._by_module))

    def add(self, counts: Counts) -> None:
        """Counts so much more."""
        self._traffic.calls.update(counts.calls)
        self._traffic.bytes.update(counts.bytes)
        self._ledger.flops.update(counts.flops)
        self._ledger.flops_uncut += counts.flops_uncut
        self._by_module.update(counts.by_module)

    def _noted(self, add: Callable[..., None]) -> Callable[..., None]:
        def noted(axis: str, op: str, tensor: Tensor) -> None:
            add(axis, op, tensor)
            if not self._traffic.paused:
                self._by_module[axis, self._ledger.module] += tensor.numel() * tensor.element_size()

        return noted

    def _split(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def counted(owner: Any, index: int, *args: Any, **kwargs: Any) -> Any:
            before = self.now() if index == self._index else None
            out = method(owner, index, *args, **kwargs)
            if before is not None:
                self.middle = self.middle.more(1, self.now().more(-1, before))
            return out

        return counted


_PASSES: tuple[tuple[type, tuple[str, ...]], ...] = (
    (Parallel, ("_micro_batch",)),
    (
        TorchStage,
        (
            *("forward_one_chunk", "backward_one_chunk", "backward_weight_one_chunk"),
            *("get_fwd_send_ops", "get_bwd_send_ops"),
        ),
    ),
)
"""Methods that work on one micro-batch of a step, whose number is their first argument."""
