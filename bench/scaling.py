"""What a second worker brings: one core each, the same global batch, every way of dividing the work.

    python bench/scaling.py [--rounds 5] [--steps 1] [--global-batch 128] [--arms dp pp ...]

One pair of workers lives through the whole bench, each bound to a core of its own, and holds a Trainer for
every arm: the same model (v3-mini on Python's standard library, BF16 with FP32 masters), data and step as
`whalepod train`, under another layout. A round times, in an order that changes from round to round:

    one     the step of one worker, while the other sleeps (they take turns from round to round)
    apart   both make that step at once and never speak: the most that this machine's cores can give
    dp, pp, ep, tp, tp_ep, cp, zero3   both make one step together

A time is that of the slower worker. Ratios are taken within a round; medians, minima and maxima are over
rounds. Where the time goes, per step and worker:

    cpu     processor time of the process (a worker that waits sleeps, so wall time less this is waiting)
    talk    time inside collectives, sends and receives, waiting for the other included
    moving  processor time of that alone, and of the threads that carry messages during computation
    rest    clipping, optimiser and rounding back: what follows the backward pass

`work` is both workers' processor time, without moving, over that of one: above 1 it is what division added,
products of half the size, copies, Python run twice. `imbalance` is the busier worker's over their mean.
`unwaited` is one worker's processor time over the busier of the two's: the ratio if nobody ever waited, which
other load on the machine changes little. All is printed and written to results/scaling.json.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from record import save
from torch.distributed.pipelining import schedules

from whalepod.parallel import comm, shm
from whalepod.parallel.comm import Axis
from whalepod.parallel.mesh import Groups, make_mesh
from whalepod.spec.run import make_run
from whalepod.train.balance import balance_step
from whalepod.train.data import TokenFiles
from whalepod.train.loop import Trainer
from whalepod.train.start import prepare_data

ROOT = Path(__file__).resolve().parents[1]
ONE: dict[str, Any] = {"micro_batch": 16}
ARMS: dict[str, dict[str, Any]] = {
    "dp": {"dp_replicate": 2, "micro_batch": 16},
    # A V puts both ends of the model on one rank, so that its two stages can be balanced against the other
    # rank's to half a layer; of the schedules over a V this one splits fewest backward passes. Sixteen
    # sequences, as alone: smaller products slow the experts down by more than their bubble is worth.
    "pp": {"pp": 2, "schedule": "dualpipev", "micro_batch": 16},
    # Within a host `two_hop` is one hop, and a token travels once however many experts it has over there.
    "ep": {"dp_shard": 2, "ep": 2, "zero": 1, "exchange": "two_hop", "micro_batch": 16},
    "tp": {"tp": 2, "micro_batch": 16},
    "tp_ep": {"tp": 2, "ep": 2, "exchange": "two_hop", "micro_batch": 16},  # experts whole, not half as wide
    "cp": {
        "cp": 2,
        "zero": 1,
        "micro_batch": 32,
    },  # half of each sequence: as many tokens a pass as one worker
    "zero3": {"dp_shard": 2, "micro_batch": 16},
}
TARGETS = {"dp": 1.85, "pp": 1.7, "ep": 1.6, "tp": 1.5}
ALONE = ("one", "apart")
FIGURES = ("wall", "cpu", "talk", "moving", "rest", "loss")


class Talk:
    """Wall and processor time of this thread inside communication; nested calls count once."""

    def __init__(self) -> None:
        self.wall = self.cpu = 0.0
        self._depth = 0

    def reset(self) -> None:
        self.wall = self.cpu = 0.0

    def timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if self._depth:
                return call(*args, **kwargs)
            self._depth += 1
            wall, cpu = time.perf_counter(), time.thread_time()
            try:
                return call(*args, **kwargs)
            finally:
                self.wall += time.perf_counter() - wall
                self.cpu += time.thread_time() - cpu
                self._depth -= 1

        return wrapper

    def listen(self) -> None:
        """Puts the clock around every door through which this process speaks to others."""
        functional = SimpleNamespace()
        starts = ("all_gather_into_tensor", "reduce_scatter_tensor", "all_to_all_single", "all_reduce")
        for name in (*starts, "wait_tensor"):
            setattr(functional, name, self.timed(getattr(comm._ops, name)))
        doors: list[tuple[Any, tuple[str, ...]]] = [
            (Axis, ("all_reduce", "start_all_reduce", "gather_into", "reduce_scatter_into")),
            (dist.Work, ("wait",)),
            (schedules, ("_batch_p2p",)),
        ]
        for owner, names in doors:
            for name in names:
                setattr(owner, name, self.timed(getattr(owner, name)))
        comm._ops = functional  # type: ignore[assignment]


class Arm:
    """A Trainer under one layout, stepped from outside."""

    def __init__(
        self, layout: dict[str, Any], options: argparse.Namespace, files: TokenFiles, groups: Groups
    ) -> None:
        config = make_run(run_values(layout, options))
        self._bias_speed = config.loss.bias_update_speed
        self.trainer = Trainer(
            config, config.model_spec(), files, make_mesh(config.make_layout(), torch.device("cpu"), groups)
        )
        self._backward_end = 0.0
        backward = self.trainer.parallel.backward

        def marked(*args: Any) -> Any:
            result = backward(*args)
            self._backward_end = time.perf_counter()
            return result

        self.trainer.parallel.backward = marked  # type: ignore[method-assign]

    def steps(self, count: int, talk: Talk) -> list[float]:
        """FIGURES of so many steps: medians of seconds, and the last loss."""
        rows, t = [], self.trainer
        loss = 0.0
        for _ in range(count):
            t.mesh.world.barrier()
            talk.reset()
            start, cpu, own = time.perf_counter(), time.process_time(), time.thread_time()
            main, _mtp, _norm = t.step()
            balance_step(t.parallel.routers, self._bias_speed, t.mesh)
            loss = main.item()
            end = time.perf_counter()
            cpu, own = time.process_time() - cpu, time.thread_time() - own
            # Other threads of a worker with one thread of computation move bytes.
            moving = talk.cpu + max(cpu - own, 0.0)
            rows.append((end - start, cpu, talk.wall, moving, end - self._backward_end))
            t.progress = replace(t.progress, step=t.progress.step + 1)
        return [*map(statistics.median, zip(*rows, strict=True)), loss]


def run_values(layout: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    return {
        "model": options.model,
        "layout": layout | {"global_batch": options.global_batch},
        "data": {"sequence_length": options.length, "max_mib": 16},
        "loss": {"bias_update_speed": 0.02},
        "train": {"steps": 1000},
        "device": "cpu",
        "threads_per_worker": 1,
        "out": str(options.out.with_suffix(".run")),  # never written
    }


def worker(rank: int, store: str, options: argparse.Namespace, files: TokenFiles, path: str) -> None:
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) > 1:
        os.sched_setaffinity(0, {cores[rank]})
    torch.set_num_threads(1)
    dist.init_process_group(shm.register(), init_method=f"file://{store}", rank=rank, world_size=2)
    world, groups, talk = Axis("bench", 2, rank, dist.group.WORLD), {}, Talk()
    talk.listen()
    arms = {"one": Arm(ONE, options, files, groups)}
    arms |= {name: Arm(ARMS[name], options, files, groups) for name in options.arms}
    rounds: list[dict[str, Any]] = []
    for index in range(-1, options.rounds):  # the first only warms up: kernels are made for every new shape
        order = ["one", "apart", *options.arms]
        random.Random(index).shuffle(order)
        row: dict[str, Any] = {}
        for name in order:
            world.barrier()
            mine = [0.0] * len(FIGURES)
            if name != "one" or rank == index % 2:
                arm = arms["one" if name == "apart" else name]
                mine = arm.steps(options.steps if index >= 0 else options.warmup, talk)
            row[name] = [dict(zip(FIGURES, r, strict=True)) for r in world.all_gather_floats(mine)]
        if rank == 0:
            shown = ", ".join(
                f"{n} {max(r['wall'] for r in row[n]):.2f}" for n in ("one", "apart", *options.arms)
            )
            print(f"{f'round {index + 1}' if index >= 0 else 'warm-up'}: seconds a step: {shown}", flush=True)
        if index >= 0:
            rounds.append(row)
    if rank == 0:
        Path(path).write_text(json.dumps(rounds))
    dist.destroy_process_group()
    gc.collect()  # FSDP2's modules hold groups in reference cycles


def rate(row: dict[str, Any], name: str) -> float:
    """Steps per second of a round's arm, of both workers together where they work apart."""
    walls = [r["wall"] for r in row[name]]
    return sum(1 / w for w in walls) if name == "apart" else 1 / max(walls)


def summary(name: str, rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over rounds: seconds are means of the two workers, `wall` is the slower one's."""

    def median(figure: Callable[[dict[str, Any]], float]) -> float:
        return statistics.median(map(figure, rounds))

    def mean(key: str) -> float:
        # Of the one worker and of the one that sleeps, whose figures are zeros.
        return median(lambda row: sum(r[key] for r in row[name]) / (1 if name == "one" else 2))

    def one_cpu(row: dict[str, Any]) -> float:
        return sum(r["cpu"] for r in row["one"])

    def compute(r: dict[str, float]) -> float:
        return r["cpu"] - r["moving"]

    ratios = [rate(row, name) / rate(row, "one") for row in rounds]
    copies = 2 if name == "apart" else 1
    return {
        "arm": name,
        "layout": ARMS.get(name, ONE),
        "target": TARGETS.get(name),
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "wall": median(lambda row: max(r["wall"] for r in row[name])),
        "cpu": mean("cpu"),
        "talk": mean("talk"),
        "moving": mean("moving"),
        "rest": mean("rest"),
        "unwaited": median(lambda row: one_cpu(row) * copies / max(r["cpu"] for r in row[name])),
        # Both workers' work over one worker's, and the busier worker's over their mean.
        "work": median(lambda row: sum(map(compute, row[name])) / copies / one_cpu(row)),
        "imbalance": median(lambda row: max(map(compute, row[name])) * 2 / sum(map(compute, row[name])))
        if name not in ALONE
        else 1.0,
        "loss": max(r["loss"] for r in rounds[-1][name]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1, help="of an arm in a round; their median counts")
    parser.add_argument("--warmup", type=int, default=2, help="steps of every arm before the first round")
    parser.add_argument("--global-batch", type=int, default=128)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--model", default="v3-mini")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--out", type=Path, default=ROOT / "results/scaling.json")
    options = parser.parse_args()
    if len(os.sched_getaffinity(0)) < 2:
        raise SystemExit("this needs two cores: two workers on one share its time and show nothing")
    shm.register()  # build before the workers start
    config = make_run(run_values(ONE, options))
    _tokenizer, files = prepare_data(config, config.model_spec())
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rounds.json"
        mp.spawn(worker, (str(Path(folder) / "store"), options, files, str(path)), nprocs=2)
        rounds = json.loads(path.read_text())
    rows = [summary(name, rounds) for name in ("one", "apart", *options.arms)]
    tokens = options.global_batch * options.length
    columns = ("unwaited", "wall", "cpu", "talk", "moving", "rest", "work", "imbalance", "loss")
    print("arm     tokens/s   ratio (min to max) target |" + "".join(f"{c:>10}" for c in columns))
    for row in rows:
        speed = tokens / row["wall"] * (2 if row["arm"] == "apart" else 1)
        print(
            f"{row['arm']:6} {speed:9,.0f}  {row['ratio']:6.2f} ({row['ratio_min']:.2f} to "
            f"{row['ratio_max']:.2f})   {row['target'] or '':>6} |"
            + "".join(f"{row[c]:10.3f}" for c in columns)
        )
    losses = [row["loss"] for row in rows if row["arm"] not in ALONE]
    assert max(losses) - min(losses) < 0.01 * min(losses), f"the arms must train the same model: {losses}"
    report = {
        "load_average_before": load_before,
        "model": options.model,
        "global_batch_sequences": options.global_batch,
        "sequence_length": options.length,
        "steps_a_round": options.steps,
        "arms": rows,
        "rounds": rounds,
    }
    save(options.out, report)


if __name__ == "__main__":
    main()
