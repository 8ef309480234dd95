"""What was predicted of a run beside what was measured, row by row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from whalepod.spec.counts import GIB
from whalepod.train.loop import RunResult


@dataclass(frozen=True)
class Row:
    """One figure. share: predicted over measured, None where nothing was measured."""

    what: str
    predicted: float
    measured: float

    @property
    def share(self) -> float | None:
        return self.predicted / self.measured if self.measured else None


def compared(result: RunResult) -> list[Row]:
    """Step time, tokens/s, memory and bytes by axis; without rows for what was not measured."""
    return list(_rows(result))


def _rows(result: RunResult) -> Iterator[Row]:
    found = result.predicted
    if found is None:
        return
    if found.step_s is not None and found.tokens_per_s is not None:
        yield Row("step, s", found.step_s, result.step_s)
        yield Row("tokens/s", found.tokens_per_s, result.tokens_per_s)
    if result.counted_gib:
        yield Row("memory, GiB", found.memory_gib, max(result.counted_gib))
    sent = result.bytes_by_axis
    for axis in sorted({*found.bytes_by_axis, *sent}):
        yield Row(f"sent over {axis}, GiB", found.bytes_by_axis.get(axis, 0.0) / GIB, sent.get(axis, 0) / GIB)


def prediction_table(result: RunResult) -> Table | None:
    """Of a run's result; None where there is nothing to compare."""
    rows = compared(result)
    if not rows or result.predicted is None:
        return None
    source = (
        result.predicted.hardware if result.predicted.calibrated else "uncalibrated: `whalepod calibrate`"
    )
    table = Table(box=None, pad_edge=False, title=f"a step ({source})", title_justify="left")
    table.add_column("")
    for name in ("predicted", "measured", "ratio"):
        table.add_column(name, justify="right")
    for row in rows:
        share = "" if row.share is None else f"{row.share:.2f}"
        table.add_row(row.what, _figure(row.predicted), _figure(row.measured), share)
    return table


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def choice_table(rows: Sequence[Mapping[str, Any]], memory_gib: float) -> Table:
    """What `auto` tried: rows of `dryrun.auto.choice_rows`, the chosen one marked."""
    table = Table(
        box=None, pad_edge=False, title_justify="left", title=f"auto, within {memory_gib:.2f} GiB of tensors"
    )
    for name in ("", "micro-batch", "recompute", "dry run, GiB", "measured, GiB", "tokens/s", "outcome"):
        table.add_column(name, justify="left" if name in ("", "recompute", "outcome") else "right")
    for row in rows:
        figures = (row["dry_run_gib"], row["measured_gib"], row["tokens_per_s"])
        shown = ["" if value is None else _figure(value) for value in figures]
        mark = ">" if row["chosen"] else ""
        table.add_row(mark, str(row["micro_batch"]), row["recompute"], *shown, row["outcome"])
    return table
