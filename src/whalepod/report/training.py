"""The picture of what added workers brought: loss, speed and memory of runs side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from whalepod.spec.errors import UserError

BLUE, ORANGE, GREY = "#2b6cb0", "#dd6b20", "#a0aec0"


@dataclass(frozen=True)
class Curve:
    """One run: its label, the lines of its metrics.jsonl, and figures for the bars."""

    label: str
    metrics: Sequence[dict[str, Any]]
    tokens_per_s: float
    state_mib_per_worker: float
    predicted_state_mib_per_worker: float


def draw_scaling(curves: Sequence[Curve], title: str, path: Path) -> Path:
    """Writes a PNG with four panels: loss by step, tokens/s, memory per worker, expert load."""
    if not curves:
        raise UserError("nothing to draw")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, ((loss, speed), (memory, load)) = plt.subplots(2, 2, figsize=(11, 7.5), layout="constrained")
    figure.suptitle(title)
    longest = max(curves, key=lambda c: len(c.metrics))
    for curve, colour, width in zip(curves, (BLUE, ORANGE, GREY), (5.0, 1.5, 1.0), strict=False):
        steps = [row["step"] for row in curve.metrics]
        loss.plot(steps, [row["loss"] for row in curve.metrics], color=colour, lw=width, label=curve.label)
    held_out = _series(longest, "validation_loss")
    if held_out:
        loss.plot(*zip(*held_out, strict=True), "o", color="black", ms=4, label="held-out")
    loss.set(title="Loss", xlabel="step", ylabel="nats per token")
    loss.legend()

    labels = [curve.label for curve in curves]
    bars = speed.bar(labels, [curve.tokens_per_s for curve in curves], color=(BLUE, ORANGE, GREY))
    base = curves[0].tokens_per_s
    speed.bar_label(bars, [f"{c.tokens_per_s:,.0f}\n{c.tokens_per_s / base:.2f}x" for c in curves])
    speed.set(title="Throughput", ylabel="tokens per second")
    speed.margins(y=0.15)

    places = range(len(curves))
    predicted = [c.predicted_state_mib_per_worker for c in curves]
    memory.bar([p - 0.2 for p in places], predicted, 0.4, color=GREY, label="predicted")
    measured = memory.bar(
        [p + 0.2 for p in places],
        [c.state_mib_per_worker for c in curves],
        0.4,
        color=BLUE,
        label="measured",
    )
    memory.bar_label(measured, [f"{c.state_mib_per_worker:,.0f}" for c in curves])
    memory.set(title="Weights, gradients and optimiser per worker", ylabel="MiB")
    memory.margins(y=0.15)
    memory.set_xticks(list(places), labels)
    memory.legend()

    loads = _series(longest, "expert_load_worst")
    if loads:
        load.plot(*zip(*loads, strict=True), color=BLUE)
    load.axhline(1.0, color=GREY, ls=":")
    load.set(title="Busiest expert over the mean", xlabel="step", ylabel="times")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def _series(curve: Curve, key: str) -> list[tuple[int, float]]:
    """(step, value) where a run's metrics have a value."""
    return [(row["step"], row[key]) for row in curve.metrics if row[key] is not None]
