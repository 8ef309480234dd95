"""The bubble, for real: two pipeline ranks on a core each, every schedule, beside what theory says.

    python bench/pipeline.py [--rounds 4] [--micro-batches 4 8] [--schedules 1f1b zbv ...]

A small V3-like model is trained on random tokens by `parallelize`, as the trainer does it. Every forward (F),
backward (B) and its halves (I: inputs, W: weights) of a stage is timed where it happens; a rank is idle for
what is left of a step, from the start of both ranks to the end of the later one's last action. Optimiser and
sums of gradients come after it and are no part of a pipeline.

    measured            1 - busy time / (ranks x step)
    simulated measured  spec/timeline.py with each stage's own median times: what the order alone must lose
    simulated nominal   the same with equal stages and F : I : W = 1 : 1 : 1
    formula             (p - 1) / (m + p - 1), for gpipe and 1f1b

What is measured above the second is messages, Python between actions and uneven times. Schedules take turns;
figures are medians over rounds. `relative` is over the least of all schedules in the same round: of the step,
and of the busy time, which is what splitting B into I and W, or the model into more stages, adds.

torch's first stage has no I of its own (nobody waits for the gradient of tokens): its W does both, which the
measured times show. Four ranks on two cores would say nothing about time, so two it is.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from record import save

from whalepod.models.transformer import Transformer
from whalepod.parallel import pipeline, shm
from whalepod.parallel.comm import Axis
from whalepod.parallel.mesh import Groups, make_mesh
from whalepod.parallel.parallelize import Parallel, parallelize, seeded
from whalepod.report.schedule import COLOURS, MEANING, TITLES
from whalepod.spec import layout as spec_layout
from whalepod.spec.layout import Layout
from whalepod.spec.model import ModelSpec
from whalepod.spec.presets import load_model_spec
from whalepod.spec.schedule import Step, actions_of, rank_of_stage, schedule_actions
from whalepod.spec.stages import split_stages
from whalepod.spec.timeline import StageTimes, Timeline, simulate

ROOT = Path(__file__).resolve().parents[1]
RANKS = 2
SCHEDULES: tuple[str, ...] = get_args(spec_layout.Schedule)


class Event(NamedTuple):
    """One action as it ran, in seconds since the step's start."""

    stage: int
    kind: str
    micro_batch: int
    start: float
    end: float


@contextmanager
def recorded() -> Iterator[list[Event]]:
    """Every action of this rank, in order, while the context is open."""
    events: list[Event] = []
    cls: Any = pipeline.TorchStage
    kinds: dict[str, Callable[[tuple[Any, ...], dict[str, Any]], str]] = {
        "forward_one_chunk": lambda args, kwargs: "F",
        "backward_one_chunk": lambda args, kwargs: (
            "B" if (args[2] if len(args) > 2 else kwargs.get("full_backward", True)) else "I"
        ),
        "backward_weight_one_chunk": lambda args, kwargs: "W",
    }

    def timed(name: str, original: Any) -> Any:
        def wrapper(self: Any, chunk: int, *args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = original(self, chunk, *args, **kwargs)
            kind = kinds[name]((chunk, *args), kwargs)
            events.append(Event(self.stage_index, kind, chunk, start, time.perf_counter()))
            return result

        return wrapper

    originals = {name: getattr(cls, name) for name in kinds}
    for name, original in originals.items():
        setattr(cls, name, timed(name, original))
    try:
        yield events
    finally:
        for name, original in originals.items():
            setattr(cls, name, original)


def model_spec() -> ModelSpec:
    """V3-like, wide enough for actions of tens of milliseconds, and even: eight equal layers, a small head.

    Equal stages are what theory's formulas are about; an uneven model is what `split_stages` is for.
    """
    return load_model_spec("v3-mini").with_(
        num_hidden_layers=8,
        first_k_dense_replace=0,
        num_nextn_predict_layers=0,
        hidden_size=512,
        num_attention_heads=8,
        moe_intermediate_size=256,
        n_routed_experts=8,
        n_group=1,
        topk_group=1,
        num_experts_per_tok=2,
        vocab_size=256,
    )


def make_layout(schedule: Any, micro_batches: int, micro_batch: int) -> Layout:
    return Layout(
        pp=RANKS, schedule=schedule, micro_batch=micro_batch, global_batch=micro_batches * micro_batch
    )


def timed_step(parallel: Parallel, rows: torch.Tensor, world: Axis) -> list[Event]:
    """The passes of one step; events count from the moment when both ranks are ready."""
    world.barrier()
    start = time.perf_counter()
    with recorded() as events:
        parallel.backward(rows, rows.numel(), 0.0)
    return [e._replace(start=e.start - start, end=e.end - start) for e in events]


def worker(rank: int, store: str, options: argparse.Namespace, path: str) -> None:
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank]})
    torch.set_num_threads(1)
    dist.init_process_group(shm.register(), init_method=f"file://{store}", rank=rank, world_size=RANKS)
    world = Axis("bench", RANKS, rank, dist.group.WORLD)
    spec, groups = model_spec(), Groups()
    arms: dict[tuple[str, int], tuple[Parallel, torch.Tensor]] = {}
    for name in options.schedules:
        for count in options.micro_batches:
            layout = make_layout(name, count, options.micro_batch)
            with torch.device("meta"):
                model = Transformer(spec)
            mesh = make_mesh(layout, torch.device("cpu"), groups)
            parallel = parallelize(model, mesh, options.length, seeded(model.spec, 0))
            parallel.train()
            generator = torch.Generator().manual_seed(1)
            shape = (layout.global_batch, options.length + 1)
            arms[name, count] = parallel, torch.randint(0, spec.vocab_size, shape, generator=generator)
    rounds = []
    for index in range(-1, options.rounds):  # the first warms up: kernels are made for every new shape
        order = list(arms)
        random.Random(index).shuffle(order)
        row = []
        for name, count in order:
            row.append((name, count, timed_step(*arms[name, count], world)))
        if index >= 0:
            rounds.append(row)
        if rank == 0:
            print(f"round {index + 1} of {options.rounds}", flush=True)
    Path(f"{path}.{rank}").write_text(json.dumps(rounds))
    dist.destroy_process_group()
    gc.collect()


def measure(options: argparse.Namespace) -> list[dict[tuple[str, int], list[list[Event]]]]:
    """By round, schedule and micro-batches: each rank's events."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rounds"
        mp.spawn(worker, (str(Path(folder) / "store"), options, str(path)), nprocs=RANKS)
        ranks = [json.loads(Path(f"{path}.{rank}").read_text()) for rank in range(RANKS)]
    return [
        {
            (rows[0][0], rows[0][1]): [[Event(*event) for event in row[2]] for row in rows]
            for rows in zip(*by_rank, strict=True)
        }
        for by_rank in zip(*ranks, strict=True)
    ]


def length_of(step: Sequence[Sequence[Event]]) -> float:
    return max(event.end for events in step for event in events)


def busy_of(step: Sequence[Sequence[Event]]) -> float:
    return sum(event.end - event.start for events in step for event in events)


def bubble_of(step: Sequence[Sequence[Event]]) -> float:
    return 1 - busy_of(step) / (len(step) * length_of(step))


def stage_times(steps: Sequence[Sequence[Sequence[Event]]], num_stages: int) -> list[StageTimes]:
    """Each stage's median times over steps. What a schedule does not do takes no time."""
    seconds: dict[tuple[int, str], list[float]] = defaultdict(lambda: [])
    for step in steps:
        for event in (e for events in step for e in events):
            seconds[event.stage, event.kind].append(event.end - event.start)

    def median(stage: int, kind: str) -> float:
        return statistics.median(seconds[stage, kind] or [0.0])

    return [
        StageTimes(median(s, "F"), median(s, "I"), median(s, "W"), backward=median(s, "B"))
        for s in range(num_stages)
    ]


def checked(orders: list[list[Step]], step: Sequence[Sequence[Event]]) -> None:
    """What ran is what the schedule says; an overlapped pair may run in either order."""
    for order, events in zip(orders, step, strict=True):
        ran = [(e.stage, e.kind, e.micro_batch) for e in events]
        place = 0
        for planned in order:
            actions = [tuple(action) for action in actions_of(planned)]
            assert sorted(ran[place : place + len(actions)]) == sorted(actions), (planned, ran[place])
            place += len(actions)
        assert place == len(ran)


def summary(name: str, count: int, rounds: list[Any], options: argparse.Namespace) -> dict[str, Any]:
    orders = schedule_actions(name, RANKS, None, count)
    steps = [row[name, count] for row in rounds]
    for step in steps:
        checked(orders, step)
    layout = make_layout(name, count, options.micro_batch)
    split = split_stages(model_spec(), layout.num_stages, options.length)
    times = stage_times(steps, layout.num_stages)
    lengths, bubbles = [length_of(step) for step in steps], [bubble_of(step) for step in steps]

    def relative(figure: Callable[[Any], float]) -> float:
        """Over the least of all schedules, within a round."""
        least = [min(figure(step) for (_, c), step in row.items() if c == count) for row in rounds]
        return statistics.median(figure(step) / best for step, best in zip(steps, least, strict=True))

    rank_work = [
        sum(c for s, c in enumerate(split.costs) if rank_of_stage(name, s, RANKS) == r) for r in (0, 1)
    ]
    return {
        "schedule": name,
        "micro_batches": count,
        "layers": [end - start for start, end in split.layers],
        "measured": statistics.median(bubbles),
        "measured_min": min(bubbles),
        "measured_max": max(bubbles),
        "nominal": simulate(orders, StageTimes(1, 1, 1)).bubble,
        "simulated": simulate(orders, times).bubble,
        "formula": (RANKS - 1) / (count + RANKS - 1) if name in ("gpipe", "1f1b") else None,
        "step_s": statistics.median(lengths),
        "step_relative": relative(length_of),
        "work_relative": relative(busy_of),
        "work_share_of_ranks": [w / sum(rank_work) for w in rank_work],
        "action_ms": [
            {"F": t.forward * 1e3, "I": t.input * 1e3, "W": t.weight * 1e3, "B": (t.backward or 0) * 1e3}
            for t in times
        ],
    }


def draw(rows: list[dict[str, Any]], rounds: list[Any], count: int, path: Path) -> None:
    """One step of every schedule as it ran (the round with the median bubble), above its simulation."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    rows = [row for row in rows if row["micro_batches"] == count]
    figure, axes = pyplot.subplots(len(rows), 1, figsize=(12, 1.7 * len(rows)), squeeze=False)
    for row, axis in zip(rows, axes[:, 0], strict=True):
        name = row["schedule"]
        steps = sorted((r[name, count] for r in rounds), key=bubble_of)
        step = steps[(len(steps) - 1) // 2]
        times = [StageTimes(*(t[k] / 1e3 for k in "FIW"), backward=t["B"] / 1e3) for t in row["action_ms"]]
        simulated = events_of(simulate(schedule_actions(name, RANKS, None, count), times))
        for place, events in enumerate([*step, *simulated]):
            for e in events:
                alpha = 1.0 if e.stage < RANKS else 0.6
                box = {"color": COLOURS[e.kind], "alpha": alpha, "edgecolor": "white", "linewidth": 0.5}
                axis.barh(place + (place >= RANKS) * 0.4, e.end - e.start, 0.85, e.start, **box)
        axis.invert_yaxis()
        axis.set_yticks([0, 1, 2.4, 3.4], ["rank 0", "rank 1", "simulated 0", "simulated 1"], fontsize=7)
        axis.tick_params(axis="x", labelsize=7)
        axis.set_xlim(0, max(length_of(step), length_of(simulated)))
        axis.spines[["top", "right"]].set_visible(False)
        title = f"{TITLES[name]}: bubble {row['measured']:.1%}, simulated {row['simulated']:.1%}"
        axis.set_title(title, fontsize=9, loc="left")
    axes[-1, 0].set_xlabel("seconds", fontsize=8)
    legend = [Patch(color=color, label=MEANING[kind]) for kind, color in COLOURS.items()]
    figure.legend(handles=legend, loc="upper right", ncols=4, fontsize=8, frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def events_of(timeline: Timeline) -> list[list[Event]]:
    """A simulation's spans as events; an overlapped pair as its two halves."""
    rows = []
    for spans in timeline.spans:
        row = []
        for span in spans:
            width = (span.end - span.start) / len(actions_of(span.step))
            for i, action in enumerate(actions_of(span.step)):
                row.append(Event(*action, span.start + i * width, span.start + (i + 1) * width))
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--schedules", nargs="+", choices=SCHEDULES, default=list(SCHEDULES))
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--micro-batch", type=int, default=2, help="sequences")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--out", type=Path, default=ROOT / "results/pipeline.json")
    options = parser.parse_args()
    if len(os.sched_getaffinity(0)) < RANKS:
        raise SystemExit(f"this needs {RANKS} cores: ranks that share one show nothing")
    for name in options.schedules:
        for count in options.micro_batches:
            make_layout(name, count, options.micro_batch).check_model(model_spec(), options.length)
    shm.register()  # build before the workers start
    load_before = os.getloadavg()[0]
    rounds = measure(options)
    rows = [summary(n, c, rounds, options) for c in options.micro_batches for n in options.schedules]
    print(
        "micro-                            bubble                     simulated                step  relative"
    )
    print(
        "batches schedule                  measured (min to max)  measured nominal formula       s step  work"
    )
    for row in rows:
        formula = "" if row["formula"] is None else f"{row['formula']:.1%}"
        least, most = f"{row['measured_min']:.1%}", f"{row['measured_max']:.1%}"
        print(
            f"{row['micro_batches']:7} {row['schedule']:24} {row['measured']:9.1%} ({least:>5} to {most:>5}) "
            f"{row['simulated']:9.1%} {row['nominal']:7.1%} {formula:>7} {row['step_s']:7.2f} "
            f"{row['step_relative']:4.2f}  {row['work_relative']:4.2f}"
        )
    report = {
        "load_average_before": load_before,
        "ranks": RANKS,
        "rounds": options.rounds,
        "micro_batch_sequences": options.micro_batch,
        "sequence_length": options.length,
        "rows": rows,
    }
    save(options.out, report)
    draw(rows, rounds, options.micro_batches[-1], options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
