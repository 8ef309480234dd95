"""From what a calibration measured to what formulas take: shares of peaks, times of collectives.

A product's formula is rate = share * peak * k / (k + half), so 1 / rate is a line in 1 / k, and a line is
fitted. Between measured sizes of a collective its time is interpolated, both on logarithmic scales.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from whalepod.spec.measured import Collective, Measured

MIN_HALF, MAX_HALF = 1e-3, 1e6


def fitted_shares(measured: Measured) -> dict[str, Any]:
    """Fields of `software.Shares` that the tables tell; `gemm` and `grouped` by measured precision."""
    peaks = {precision: tflops * 1e12 for precision, tflops in measured.peak_tflops.items()}
    out: dict[str, Any] = {
        "memory": measured.stream_gb_s / measured.peak_gb_s,
        "permute": measured.gather_gb_s / measured.peak_gb_s,
        "optimizer": measured.optimizer_gb_s / measured.peak_gb_s,
    }
    products = [row for row in measured.products if row.precision in peaks]
    # One half length serves all precisions: that of BF16, where most is computed.
    main = [row for row in products if row.precision == "bf16"] or products
    if main:
        _, half_k = _line([row.inner for row in main], [row.flop_s for row in main])
        out["half_k"] = half_k
        out["gemm"] = {
            p: _level(row.flop_s * (1 + half_k / row.inner) for row in products if row.precision == p)
            / peaks[p]
            for p in {row.precision for row in products}
        }
        groups = [row for row in measured.grouped if row.precision in peaks]
        main = [row for row in groups if row.precision == "bf16"] or groups
        if main:
            full = [row.flop_s * (1 + half_k / row.inner) for row in main]
            _, half_rows = _line([row.rows for row in main], full)
            out["half_rows"] = half_rows
            out["grouped"] = {
                p: _level(
                    row.flop_s * (1 + half_k / row.inner) * (1 + half_rows / row.rows)
                    for row in groups
                    if row.precision == p
                )
                / peaks[p]
                for p in {row.precision for row in groups}
            }
    attended = [row for row in measured.attention if row.precision == "bf16" and "bf16" in peaks]
    if attended:
        sizes = [[row.tokens for row in attended], [row.width for row in attended]]
        ways = ([row.forward_flop_s for row in attended], [row.backward_flop_s for row in attended])
        fits = [fitted_plane(sizes, rates) for rates in ways]
        out["attention"] = tuple(rate / peaks["bf16"] for rate, _ in fits)
        out["half_attention"] = tuple(halves for _, halves in fits)
    return out


def _line(sizes: list[int], rates: list[float]) -> tuple[float, float]:
    """(rate at endless size, size at half of it): 1 / rate = a + b / size, by least squares of the relative
    errors."""
    rate, size = np.array(rates), np.array(sizes, dtype=float)
    if np.ptp(size) == 0:  # one size tells no line
        return float(rate.max()), MIN_HALF
    (a, b), *_ = np.linalg.lstsq(np.stack([rate, rate / size], 1), np.ones(len(rate)), rcond=None)
    if a <= 0 or b <= 0:  # no limit to be seen, or no fall towards small sizes
        return _level(rates), MIN_HALF
    return float(1 / a), float(np.clip(b / a, MIN_HALF, MAX_HALF))


def fitted_plane(sizes: list[list[int]], rates: list[float]) -> tuple[float, tuple[float, ...]]:
    """(rate at endless sizes, halves): 1 / rate = (1 + sum of half / size) / endless, as in `_line`; what
    does not fall towards small sizes has a half of 0."""
    rate = np.array(rates)
    used = [i for i, values in enumerate(sizes) if np.ptp(values) > 0]
    while True:
        columns = [rate, *(rate / np.array(sizes[i], dtype=float) for i in used)]
        found, *_ = np.linalg.lstsq(np.stack(columns, 1), np.ones(len(rate)), rcond=None)
        if (found > 0).all():
            break
        if not used:
            return _level(rates), (0.0,) * len(sizes)
        used.pop(int(found[1:].argmin()))
    halves = dict(zip(used, found[1:] / found[0], strict=True))
    return float(1 / found[0]), tuple(float(halves.get(i, 0.0)) for i in range(len(sizes)))


def _level(rates: Iterable[float]) -> float:
    """The one rate that times at these rates are nearest to, relatively."""
    rate = np.array(list(rates))
    return float((rate**2).sum() / rate.sum())


Curves = Mapping[int, tuple[np.ndarray, np.ndarray]]


def collective_curves(table: tuple[Collective, ...], op: str) -> Curves:
    """Logarithms of sizes and of seconds by number of ranks; empty where nothing was measured."""
    out: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    for ranks in sorted({row.ranks for row in table if row.op == op and row.ranks > 1}):
        rows = sorted((row.bytes, row.seconds) for row in table if row.op == op and row.ranks == ranks)
        sizes, seconds = zip(*rows, strict=True)
        out[ranks] = np.log(np.array(sizes, dtype=float)), np.log(np.array(seconds))
    return out


def collective_seconds(curves: Curves, total: np.ndarray | float, ranks: np.ndarray | int) -> np.ndarray:
    """Seconds for `total` bytes among `ranks`; 0 among one.

    Smaller than measured takes as long as the smallest, larger as long in proportion. Other numbers of ranks
    go by the nearest one and what each of them moves, (ranks - 1) / ranks.
    """
    total, ranks = np.broadcast_arrays(np.asarray(total, dtype=float), np.asarray(ranks))
    out = np.zeros(total.shape)
    known = np.array(list(curves))
    size = np.log(np.maximum(total, 1.0))
    for number in np.unique(ranks):
        if number < 2:
            continue
        near = int(known[np.abs(np.log(known / number)).argmin()])
        sizes, seconds = curves[near]
        time = np.interp(size, sizes, seconds) + np.maximum(size - sizes[-1], 0.0)
        moves = (1 - 1 / number) / (1 - 1 / near)
        out = np.where(ranks == number, np.exp(time) * moves, out)
    return out
