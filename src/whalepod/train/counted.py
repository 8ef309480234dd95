"""One step of a run, counted: the tensors in memory at its peak, and what it hands to collectives.

On CUDA the allocator counts for itself. Elsewhere a ledger sees every operation, which slows that step; it is
not timed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from whalepod.parallel.ledger import Ledger
from whalepod.train.step import TrainStep


@dataclass
class Counted:
    """peak: bytes; bytes_by_axis: of one step. Filled when the step is over."""

    peak: int = 0
    bytes_by_axis: dict[str, int] = field(default_factory=dict)


@contextmanager
def counted_step(work: TrainStep) -> Iterator[Counted]:
    """Counts what `work` does inside."""
    device, traffic = work.mesh.device, work.mesh.traffic
    before, out = Counter(traffic.bytes), Counted()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield out
        out.peak = torch.cuda.max_memory_allocated(device)
    else:
        ledger = Ledger()
        ledger.hold(work.parallel.held(work.optimizer), "state")
        with ledger:
            yield out
        out.peak = ledger.peak.bytes
    axes: Counter[str] = Counter()
    for (axis, _), count in (Counter(traffic.bytes) - before).items():
        axes[axis] += count
    out.bytes_by_axis = dict(axes)
