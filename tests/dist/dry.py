"""A step counted for real and in a dry run: every rank does both and hands back the pairs.

`python tests/dist/dry.py V3-like 2 bf16 1` prints every layout of two ranks in the parity table; a further
argument has torch's profiler count the allocations too, which takes minutes.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import tempfile
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent))
import parity
from harness import run_ranks

from whalepod.dryrun.role import measure
from whalepod.dryrun.routing import draw_picks
from whalepod.models import moe
from whalepod.parallel.ledger import Ledger
from whalepod.parallel.mesh import Groups, make_mesh, open_world
from whalepod.parallel.parallelize import seeded
from whalepod.spec.layout import Layout
from whalepod.spec.model import ModelSpec
from whalepod.spec.run import RunConfig, make_run
from whalepod.train.step import TrainStep

LENGTH, BATCH, STEPS = 128, 8, 4


@dataclass(frozen=True)
class Seen:
    """What a step did on one rank. peak: bytes of tensors; for the real one by torch's profiler, which hears
    of every allocation, and by the ledger."""

    calls: dict[tuple[str, str], int]
    bytes: dict[tuple[str, str], int]
    flops: int
    peak: int
    ledger_peak: int = 0


@dataclass(frozen=True)
class Pair:
    layout: Layout
    rank: int
    real: Seen
    dry: Seen


def config(layout: Layout) -> RunConfig:
    values = {f.name: getattr(layout, f.name) for f in fields(layout)}
    values["stage_layers"] = layout.stage_layers and list(layout.stage_layers)
    return make_run({"layout": values, "data": {"sequence_length": LENGTH}})


def real_step(layout: Layout, spec: ModelSpec, groups: Groups, profiled: bool) -> Seen:
    """The third step of a job: by then all that stays has been made."""
    picks = partial(draw_picks, spec.moe, ep=layout.ep) if spec.moe else None
    chosen = moe.select_experts

    def forced(m: Any, scores: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        chosen(m, scores, bias)
        assert picks is not None
        return picks(len(scores))

    moe.select_experts = forced
    try:
        gc.collect()
        # A profile of its own for each job: torch sorts the events of a long one for minutes.
        watched = profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True)
        with watched if profiled else nullcontext():
            with record_function("before"):
                torch.zeros(1)
            mesh = make_mesh(layout, torch.device("cpu"), groups)
            work = TrainStep(config(layout), spec, mesh, seeded(spec, 0))
            extra = 1 + spec.num_nextn_predict_layers
            rows = torch.zeros(BATCH // mesh["dp"].size, LENGTH + extra, dtype=torch.int64)
            work.balance(work.step(rows, 1e-4)[1])
            before = Counter(mesh.traffic.calls), Counter(mesh.traffic.bytes)
            with record_function("step 0"):
                work.balance(work.step(rows, 1e-4)[1])
            calls, sent = mesh.traffic.calls - before[0], mesh.traffic.bytes - before[1]
            for again in range(1, STEPS if profiled else 1):
                with record_function(f"step {again}"):
                    work.balance(work.step(rows, 1e-4)[1])
        peak = 0
        if profiled:
            with tempfile.NamedTemporaryFile(suffix=".json") as file:
                watched.export_chrome_trace(file.name)
                peak = peak_of(json.loads(Path(file.name).read_text())["traceEvents"])
        flops = FlopCounterMode(display=False)
        flops.mod_tracker = _NoModules()  # torch's own cannot be where a schedule splits the backward pass
        with flops:
            work.step(rows, 1e-4)
        ledger = Ledger()
        # Held in no variable, or last step's gradients would stay for its sake.
        ledger.hold([*work.parallel.held(work.optimizer), rows], "state")
        with ledger:
            work.balance(work.step(rows, 1e-4)[1])
        return Seen(dict(calls), dict(sent), flops.get_total_flops(), peak, ledger.peak.bytes)
    finally:
        moe.select_experts = chosen


class _NoModules(nullcontext[Any]):
    parents = frozenset({"Global"})


def peak_of(events: list[dict[str, Any]]) -> int:
    """The most that was allocated at a time during the step, over what lay there before the job."""
    spans = {e["name"]: (e["ts"], e["ts"] + e["dur"]) for e in events if e.get("cat") == "user_annotation"}
    totals = [(e["ts"], e["args"]["Total Allocated"]) for e in events if e.get("name") == "[memory]"]

    def within(name: str) -> list[int]:
        start, end = spans[name]
        return [total for at, total in totals if start <= at <= end]

    # What was sent lives on until a busy thread lets go of it: the least of a few steps is the step's own.
    return min(max(within(f"step {i}")) for i in range(STEPS)) - min(within("before"))


def dry_step(layout: Layout, spec: ModelSpec, rank: int) -> Seen:
    found = measure(config(layout), spec, rank, on_gpu=False)
    return Seen(dict(found.counts.calls), dict(found.counts.bytes), found.counts.flops_uncut, found.peak)


def both(layouts: list[Layout], spec: ModelSpec, profiled: bool) -> list[Pair]:
    """This rank's pairs; the real job first, then the dry run as the same rank."""
    rank = int(os.environ["RANK"])
    # Threads that carry messages need the interpreter to let go of tensors, and should not wait for it.
    sys.setswitchinterval(1e-5)
    with open_world(torch.device("cpu")):
        groups: Groups = {}
        real = [real_step(layout, spec, groups, profiled) for layout in layouts]
    return [
        Pair(layout, rank, seen, dry_step(layout, spec, rank))
        for layout, seen in zip(layouts, real, strict=True)
    ]


def compare(
    model: str, num_ranks: int, precision: str, wanted: list[dict[str, Any]], profiled: bool = False
) -> list[Pair]:
    """Every rank's pairs of the layouts that the model can have. profiled: torch's profiler listens too."""
    spec = parity.models()[model]
    layouts = [
        Layout(**axes, micro_batch=1, global_batch=BATCH, precision=precision)  # type: ignore[arg-type]
        for axes in wanted
        if spec.moe is not None or axes.get("ep", 1) == 1
    ]
    return [p for pairs in run_ranks(both, num_ranks, layouts, spec, profiled, timeout_s=500) for p in pairs]


if __name__ == "__main__":
    name, count, kind, every = sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    for pair in compare(name, count, kind, parity.LAYOUTS[count][::every], profiled=len(sys.argv) > 5):
        layout, real, dry = pair.layout, pair.real, pair.dry
        axes = {f.name: v for f in fields(Layout) if (v := getattr(layout, f.name)) != f.default}
        profiler = f", the profiler's {dry.peak / real.peak:.3f}" if real.peak else ""
        print(
            pair.rank,
            {key: value for key, value in axes.items() if key != "global_batch"},
            f"collectives {'equal' if (real.calls, real.bytes) == (dry.calls, dry.bytes) else 'DIFFER'}",
            f"flops {dry.flops / real.flops:.6f} "
            f"peak over the ledger's {dry.peak / real.ledger_peak:.3f}{profiler}",
        )
