"""A step counted for real and in a dry run: every rank does both and hands back the pairs.

`python tests/dist/dry.py` prints the whole table.
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

LENGTH, BATCH = 64, 8


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


def real_step(layout: Layout, spec: ModelSpec, groups: Groups) -> Seen:
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
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as watched:
            with record_function("before"):
                torch.zeros(1)
            mesh = make_mesh(layout, torch.device("cpu"), groups)
            work = TrainStep(config(layout), spec, mesh, seeded(spec, 0))
            extra = 1 + spec.num_nextn_predict_layers
            rows = torch.zeros(BATCH // mesh["dp"].size, LENGTH + extra, dtype=torch.int64)
            work.balance(work.step(rows, 1e-4)[1])
            before = Counter(mesh.traffic.calls), Counter(mesh.traffic.bytes)
            with record_function("step"):
                work.balance(work.step(rows, 1e-4)[1])
            calls, sent = mesh.traffic.calls - before[0], mesh.traffic.bytes - before[1]
        with tempfile.NamedTemporaryFile(suffix=".json") as file:
            watched.export_chrome_trace(file.name)
            peak = peak_of(json.loads(Path(file.name).read_text())["traceEvents"])
        flops = FlopCounterMode(display=False)
        flops.mod_tracker = _NoModules()  # torch's own cannot be where a schedule splits the backward pass
        with flops:
            work.step(rows, 1e-4)
        ledger = Ledger()
        state = [t for part in work.parallel.parts for t in (*part.parameters(), *part.buffers())]
        weights = [*work.state.decayed, *work.state.plain]
        state += [*weights, *(w.grad for w in weights if w.grad is not None), rows]
        state += [t for values in work.optimizer.state.values() for t in values.values()]
        ledger.hold(state, "state")
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

    return max(within("step")) - min(within("before"))


def dry_step(layout: Layout, spec: ModelSpec, rank: int) -> Seen:
    found = measure(config(layout), spec, rank, on_gpu=False)
    return Seen(dict(found.counts.calls), dict(found.counts.bytes), found.counts.flops_uncut, found.peak)


def both(layouts: list[Layout], spec: ModelSpec) -> list[Pair]:
    """This rank's pairs; the real job first, then the dry run as the same rank."""
    rank = int(os.environ["RANK"])
    with open_world(torch.device("cpu")):
        groups: Groups = {}
        real = [real_step(layout, spec, groups) for layout in layouts]
    return [
        Pair(layout, rank, seen, dry_step(layout, spec, rank))
        for layout, seen in zip(layouts, real, strict=True)
    ]


def layouts_for(spec: ModelSpec, num_ranks: int, precision: str, every: int = 1) -> list[Layout]:
    """Those of the parity table that the model can have."""
    out = []
    for axes in parity.LAYOUTS[num_ranks][::every]:
        if spec.moe is None and axes.get("ep", 1) > 1:
            continue
        out.append(Layout(**axes, micro_batch=1, global_batch=BATCH, precision=precision))  # type: ignore[arg-type]
    return out


def compare(model: str, num_ranks: int, precision: str, every: int = 1) -> list[Pair]:
    spec = parity.models()[model]
    layouts = layouts_for(spec, num_ranks, precision, every)
    return [p for pairs in run_ranks(both, num_ranks, layouts, spec, timeout_s=900) for p in pairs]


if __name__ == "__main__":
    for pair in compare(sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4])):
        axes = {f.name: v for f in fields(Layout) if (v := getattr(pair.layout, f.name)) != f.default}
        wrong = {
            k: (pair.real.bytes.get(k), pair.dry.bytes.get(k))
            for k in {*pair.real.bytes, *pair.dry.bytes}
            if pair.real.bytes.get(k) != pair.dry.bytes.get(k) or pair.real.calls.get(k) != pair.dry.calls.get(k)
        }
        print(
            pair.rank,
            {k: v for k, v in axes.items() if k not in ("global_batch",)},
            f"peak {pair.dry.peak / pair.real.peak:.3f} ledger {pair.real.ledger_peak / pair.real.peak:.3f}",
            f"flops {pair.dry.flops / pair.real.flops:.4f}",
            f"WRONG {wrong}" if wrong else "",
        )
