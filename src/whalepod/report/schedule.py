"""`whalepod schedule`: a pipeline schedule as a picture, as a timeline for the terminal, as JSON. No torch.

All three show one value, a `TimedSchedule`: the actions that the runtime executes, played by the
clock of `spec/timeline`. Times are those of a rank's whole share of a micro-batch, whatever number
of stages it is cut into, so that schedules can be compared at equal work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from whalepod.spec.errors import UserError
from whalepod.spec.model import ModelSpec
from whalepod.spec.schedule import (
    Action,
    Overlap,
    Step,
    actions_of,
    schedule_actions,
    stages_of_rank,
    stages_per_rank,
)
from whalepod.spec.stages import StageSplit, split_stages
from whalepod.spec.timeline import StageTimes, Timeline, peak_in_flight, simulate

TITLES = {
    "gpipe": "GPipe",
    "1f1b": "1F1B",
    "interleaved": "Interleaved 1F1B",
    "interleaved_zero_bubble": "Interleaved zero bubble",
    "zbv": "ZBV zero bubble",
    "dualpipev": "DualPipeV",
}
COLOURS = {"F": "#2b6cb0", "B": "#c05621", "I": "#dd8a3a", "W": "#2f855a"}
MEANING = {"F": "forward", "B": "backward", "I": "gradient of inputs", "W": "gradient of weights"}
IDLE, GREY, INK = "#edf0f4", "#4a5568", "#1a202c"
LAP = 0.34  # how much lighter each further stage of a rank is
MAX_DRAWN = 60_000  # actions; a picture of more is a smear, and takes minutes


@dataclass(frozen=True)
class TimedSchedule:
    """A schedule, played. `held[rank]`: the most micro-batches held at a time, as shares of a rank."""

    name: str
    pp: int
    stages_per_rank: int
    num_micro_batches: int
    timeline: Timeline
    held: tuple[float, ...]
    split: StageSplit | None = None

    def stages(self, rank: int) -> tuple[int, ...]:
        return stages_of_rank(self.name, rank, self.pp, self.stages_per_rank)

    def bubble(self, rank: int) -> float:
        """Idle share of one rank's time."""
        return 1 - self.timeline.busy[rank] / self.timeline.makespan


def time_schedule(
    name: str,
    pp: int,
    num_micro_batches: int,
    num_stages_per_rank: int | None = None,
    times: Sequence[float] = (1.0, 2.0, 1.0, 1.0),
    p2p: float = 0.0,
    spec: ModelSpec | None = None,
    sequence_length: int = 4096,
    stage_layers: Sequence[int] | None = None,
) -> TimedSchedule:
    """Plays a schedule. times: of F, B, I and W of one micro-batch over one rank's share of the model.

    With `spec` the stages take as long as their part of that model costs (`split_stages`), the mean stage
    taking `times`. Raises UserError for what cannot be.
    """
    if len(times) != 4 or not min(times) > 0 or not isfinite(sum(times)) or not (isfinite(p2p) and p2p >= 0):
        shown = ", ".join(f"{time:g}" for time in times)
        raise UserError(f"times are four positive numbers, of F, B, I and W, not {shown}; p2p at least 0")
    stages = stages_per_rank(name, num_stages_per_rank)
    if pp * stages * num_micro_batches > MAX_DRAWN:
        raise UserError(
            f"{pp} ranks x {stages} stages x {num_micro_batches} micro-batches are more than the {MAX_DRAWN} "
            "forward passes that can be shown; try fewer micro-batches"
        )
    orders = schedule_actions(name, pp, stages, num_micro_batches)
    split = None if spec is None else split_stages(spec, pp * stages, sequence_length, stage_layers)
    shares = [1.0] * (pp * stages)
    if split is not None:
        mean = sum(split.costs) / len(split.costs)
        shares = [cost / mean for cost in split.costs]
    forward, backward, inputs, weights = (time / stages for time in times)
    timeline = simulate(
        orders,
        [StageTimes(forward * s, inputs * s, weights * s, backward=backward * s) for s in shares],
        p2p,
    )
    held = tuple(peak_in_flight(order, lambda _: 1 / stages) for order in orders)
    return TimedSchedule(name, pp, stages, num_micro_batches, timeline, held, split)


def parse_times(text: str) -> tuple[float, ...]:
    """The times of "1,2,1,1"; raises UserError for anything but numbers."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"times are four numbers, of F, B, I and W, such as 1,2,1,1; not {text!r}") from None


def schedule_json(timed: TimedSchedule) -> dict[str, Any]:
    """The whole timeline with stable keys; times in the unit of the given times."""
    timeline = timed.timeline

    def step_json(step: Step) -> dict[str, Any]:
        kind = step.kind if isinstance(step, Action) else "F&B"
        parts = [{"stage": a.stage, "kind": a.kind, "micro_batch": a.micro_batch} for a in actions_of(step)]
        return {"action": str(step), "kind": kind, "parts": parts}

    result: dict[str, Any] = {
        "schedule": timed.name,
        "pp": timed.pp,
        "stages_per_rank": timed.stages_per_rank,
        "num_stages": timed.pp * timed.stages_per_rank,
        "micro_batches": timed.num_micro_batches,
        "makespan": timeline.makespan,
        "bubble_fraction": timeline.bubble,
        "ranks": [
            {
                "rank": rank,
                "stages": list(timed.stages(rank)),
                "busy": timeline.busy[rank],
                "bubble_fraction": timed.bubble(rank),
                "peak_micro_batches_held": timed.held[rank],
                "steps": [step_json(s.step) | {"start": s.start, "end": s.end} for s in row],
            }
            for rank, row in enumerate(timeline.spans)
        ],
    }
    if timed.split is not None:
        result["split"] = {
            "layers": [list(part) for part in timed.split.layers],
            "forward_gflop_per_token": [cost / 1e9 for cost in timed.split.costs],
            "imbalance": timed.split.imbalance,
        }
    return result


def schedule_table(timed: TimedSchedule, width: int = 116) -> Table:
    """One row per rank: its stages, its time as a strip of `width` minus the other columns, what it idles."""
    columns = max(width - 34, 20)
    scale = columns / timed.timeline.makespan
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False, title=_terminal_title(timed))
    table.title_justify = "left"
    table.add_column("rank", justify="right")
    table.add_column("stages")
    table.add_column("time →", no_wrap=True)
    table.add_column("idle", justify="right")
    table.add_column("held", justify="right")
    for rank, row in enumerate(timed.timeline.spans):
        strip = Text()
        for span in row:
            start, end = round(span.start * scale), round(span.end * scale)
            strip.append("·" * (start - len(strip)), style="dim")
            strip.append_text(_cell(span.step, end - len(strip), timed.pp))
        strip.append("·" * (columns - len(strip)), style="dim")
        table.add_row(
            str(rank),
            ", ".join(map(str, timed.stages(rank))),
            strip,
            f"{timed.bubble(rank):.1%}",
            f"{timed.held[rank]:g}",
        )
    notes = ", ".join(f"{kind} {meaning}" for kind, meaning in MEANING.items() if kind in _kinds(timed))
    table.caption = f"{notes}{', & both at once' if _overlaps(timed) else ''}. held: micro-batches at a time."
    table.caption_justify = "left"
    return table


def _cell(step: Step, width: int, pp: int) -> Text:
    """A step `width` characters wide: kind and micro-batch where they fit, else the kind."""
    if width <= 0:
        return Text()
    if isinstance(step, Overlap):
        label, colour = f"{step.forward.micro_batch}&{step.backward.micro_batch}", COLOURS["B"]
        label = label if len(label) < width else "&"
        half = width // 2
        text = Text(label.center(width))
        text.stylize(f"white on {COLOURS['F']}", 0, half)
        text.stylize(f"white on {colour}", half, width)
        return text
    label = f"{step.kind}{step.micro_batch}"
    label = label if len(label) < width or len(label) == width == 2 else step.kind
    return Text(label.center(width), style=f"white on {_shade(step, pp)}")


def draw_schedule(timed: TimedSchedule, path: Path, title: str | None = None) -> Path:
    """Writes a PNG: ranks as rows, time to the right, one box per action with its micro-batch.

    Colour is the kind of work; the further a rank's stage is from the tokens, the lighter the shade. An
    overlapped pair is a box cut in two, its forward above.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.patches import Patch, Rectangle

    makespan, unit = timed.timeline.makespan, _shortest(timed)
    inches = min(max(makespan / unit * 0.26, 9.0), 24.0)
    height = max(0.42 * timed.pp + 1.75, 2.9)
    digits = len(str(timed.num_micro_batches - 1))
    figure, axes = plt.subplots(figsize=(inches, height), layout="constrained")
    for rank, row in enumerate(timed.timeline.spans):
        axes.add_patch(Rectangle((0, rank - 0.41), makespan, 0.82, facecolor=IDLE, lw=0))
        for span in row:
            parts = actions_of(span.step)
            tall = 0.82 / len(parts)
            for place, action in enumerate(parts):
                bottom = rank - 0.41 + place * tall
                colour = _shade(action, timed.pp)
                box = (span.start, bottom)
                axes.add_patch(
                    Rectangle(box, span.end - span.start, tall, facecolor=colour, edgecolor="white", lw=0.6)
                )
                points = (span.end - span.start) / makespan * (inches - 1.2) * 72
                label = str(action.micro_batch)
                size = min(8.5, points / (0.62 * digits + 0.25), tall * 0.42 * 72 * 0.62)
                if size >= 3:
                    middle = (span.start + span.end) / 2
                    axes.text(
                        middle, bottom + tall / 2, label, fontsize=size, color="white", ha="center",
                        va="center_baseline",
                    )  # fmt: skip
    axes.set_xlim(0, makespan)
    axes.set_ylim(timed.pp - 0.5, -0.5)
    labels = [f"rank {r}\n{_stages_label(timed.stages(r))}" for r in range(timed.pp)]
    axes.set_yticks(range(timed.pp), labels, fontsize=7.5)
    axes.tick_params(axis="both", length=0, pad=5)
    axes.tick_params(axis="x", labelsize=7.5, colors=GREY)
    axes.set_xlabel("time", fontsize=8, color=GREY, loc="right")
    for side in axes.spines.values():
        side.set_visible(False)
    heading = f"{title or TITLES[timed.name]}: bubble {timed.timeline.bubble:.1%}"
    for text, above, size, weight, colour in (
        (heading, 25, 13, "bold", INK),
        (_headline(timed), 9, 9, "normal", GREY),
    ):
        axes.annotate(
            text, (0, 1), (0, above), "axes fraction", textcoords="offset points", fontsize=size,
            fontweight=weight, color=colour,
        )  # fmt: skip
    kinds = [kind for kind in COLOURS if kind in _kinds(timed)]
    handles = [Patch(color=COLOURS[kind], label=MEANING[kind]) for kind in kinds]
    laps = timed.stages_per_rank
    if laps > 1:
        ends = ((0, "a rank's first stage"), (laps - 1, "its last stage"))
        handles += [Patch(color=_lighter(GREY, LAP * min(lap, 2)), label=label) for lap, label in ends]
    handles.append(Patch(color=IDLE, label="idle"))
    figure.legend(
        handles=handles, loc="outside lower left", ncols=len(handles), fontsize=8, frameon=False,
        handlelength=1.1, handleheight=1.0, columnspacing=1.4,
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160)
    plt.close(figure)
    return path


def _headline(timed: TimedSchedule) -> str:
    stages = "" if timed.stages_per_rank == 1 else f" x {timed.stages_per_rank} stages"
    text = (
        f"{timed.pp} ranks{stages}, {timed.num_micro_batches} micro-batches; "
        f"makespan {timed.timeline.makespan:.4g}, at most {max(timed.held):g} micro-batches held"
    )
    if timed.split is not None:
        text += f", costliest stage {timed.split.imbalance:.2f} x the mean"
    return text


def _terminal_title(timed: TimedSchedule) -> str:
    return f"{TITLES[timed.name]}: bubble {timed.timeline.bubble:.1%}; {_headline(timed)}"


def _stages_label(stages: Sequence[int]) -> str:
    return f"stage{'s' * (len(stages) > 1)} {', '.join(map(str, stages))}"


def _kinds(timed: TimedSchedule) -> set[str]:
    return {a.kind for row in timed.timeline.spans for span in row for a in actions_of(span.step)}


def _overlaps(timed: TimedSchedule) -> bool:
    return any(isinstance(span.step, Overlap) for row in timed.timeline.spans for span in row)


def _shortest(timed: TimedSchedule) -> float:
    """The length of a typical short box: a forward of the mean stage, or what is shortest beside it."""
    lengths = sorted(s.end - s.start for row in timed.timeline.spans for s in row if s.end > s.start)
    return lengths[len(lengths) // 10]


def _shade(action: Action, pp: int) -> str:
    return _lighter(COLOURS[action.kind], LAP * min(action.stage // pp, 2))


def _lighter(colour: str, by: float) -> str:
    """A colour `by` of the way to white."""
    channels = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round(c + (255 - c) * min(by, 0.6)):02x}" for c in channels)
