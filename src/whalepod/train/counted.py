"""The tensors in memory at the peak of one step of a run.

On CUDA the allocator counts for itself. Elsewhere a ledger sees every operation, which slows that step; it is
not timed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from whalepod.parallel.ledger import Ledger
from whalepod.train.step import TrainStep

Result = TypeVar("Result")


def counted(work: TrainStep, step: Callable[[], Result]) -> tuple[Result, int]:
    """What `step`, a step of `work`, returns, and the bytes allocated at its peak."""
    device = work.mesh.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return step(), torch.cuda.max_memory_allocated(device)
    ledger = Ledger()
    ledger.hold(work.parallel.held(work.optimizer), "state")
    with ledger:
        found = step()
    return found, ledger.peak.bytes
