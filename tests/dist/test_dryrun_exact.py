"""The dry run against the real step: real processes, the parity table's layouts, the same routing.

Collectives by axis and operation, calls and bytes, and FLOPs by torch's own counter must be equal. Peak
memory: what the ledger counts of the real step's tensors, and for a few layouts what torch's profiler heard
from the allocator.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import dry
import parity

TOLERANCE = 0.01  # asked: 3 %


def check(pairs: list[dry.Pair]) -> None:
    assert pairs
    for pair in pairs:
        real, found = pair.real, pair.dry
        assert found.calls == real.calls, (pair.layout, pair.rank)
        assert found.bytes == real.bytes, (pair.layout, pair.rank)
        assert found.flops == real.flops, (pair.layout, pair.rank)
        assert found.peak == pytest.approx(real.ledger_peak, rel=TOLERANCE), (pair.layout, pair.rank)


@pytest.mark.slow
def test_two_ranks_every_layout() -> None:
    check(dry.compare("V3-like", 2, "bf16", parity.LAYOUTS[2]))


@pytest.mark.slow
@pytest.mark.parametrize("model", ["V2-like", "dense"])
def test_two_ranks_other_models(model: str) -> None:
    check(dry.compare(model, 2, "fp32", parity.LAYOUTS[2][::4]))


@pytest.mark.slow
def test_four_ranks() -> None:
    check(dry.compare("V3-like", 4, "bf16", parity.LAYOUTS[4][::4]))


def test_the_allocator_agrees() -> None:
    """torch's profiler hears of every allocation, whoever makes it."""
    layouts = [{"dp_replicate": 2}, {"pp": 2, "schedule": "zbv"}]
    pairs = dry.compare("V3-like", 2, "fp32", layouts, profiled=True)
    check(pairs)
    for pair in pairs:
        assert pair.dry.peak == pytest.approx(pair.real.peak, rel=0.03), (pair.layout, pair.rank)
