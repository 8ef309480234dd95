"""Every layout gives the step of one device: the parity table, asserted (tests/dist/parity.py)."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import parity

CASES = [(ranks, model) for ranks in (8, 4, 2) for model in ("V3-like", "V2-like", "dense")]


@pytest.mark.slow
@pytest.mark.parametrize(("num_ranks", "model"), CASES)
def test_step_equals_that_of_one_device(num_ranks: int, model: str) -> None:
    rows = parity.table(num_ranks, model)
    assert len(rows) == len(parity.cases(num_ranks, model)) > 5
    assert not [row for row in rows if not row.passed]


def test_the_page_shows_this_table() -> None:
    page = (Path(__file__).parents[2] / "docs" / "parity.md").read_text()
    for num_ranks, layouts in parity.LAYOUTS.items():
        for axes in layouts:
            for model in parity.models():
                if axes in parity.cases(num_ranks, model):
                    assert f"| {parity.label(axes)} | {model} |" in page
