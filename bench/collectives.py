"""Collectives between CPU workers of this machine: our shared-memory backend beside gloo, by size.

    python bench/collectives.py [--ranks 2 4] [--rounds 7] [--max-mib 64]

The same workers hold one group of each kind; rounds alternate between the two. A figure is the median over
the rounds of the slowest rank's time for one call. The size is that of the larger tensor of the call (the
output of an all-gather, the input of a reduce-scatter). Every result of ours is compared, bit for bit, with a
plain computation in rank order. Writes results/collectives.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from record import save
from torch import Tensor

from whalepod.parallel import shm

ROOT = Path(__file__).resolve().parents[1]
SIZES = [4, 1 << 12, 1 << 16, 1 << 20, 1 << 22, 1 << 24, 1 << 26]
Call = Callable[[dist.ProcessGroup], Any]
warnings.filterwarnings("ignore", category=FutureWarning)  # torch 2.13 gives two of them longer names


def calls(
    num: int, rank: int, size: int
) -> tuple[dict[str, tuple[Call, Callable[[], bool]]], Callable[[], Any]]:
    """By name: one call, and whether what it left is right; and what sets the buffers back before a call."""
    part = max(1, size // 4 // num)  # elements of one rank's share
    total = part * num
    inputs = [torch.randn(total, generator=torch.Generator().manual_seed(r)) for r in range(num)]
    shares = [list(x.split(part)) for x in inputs]
    mine = inputs[rank]
    summed = inputs[0].clone()
    for x in inputs[1:]:
        summed += x
    gathered = torch.cat([s[0] for s in shares])
    out, small = torch.empty(total), torch.empty(part)
    outs = [torch.empty(part) for _ in range(num)]
    at_root = rank == 0

    def reset() -> None:
        out.copy_(mine)
        for tensor in (small, *outs):
            tensor.zero_()

    def broadcast(group: dist.ProcessGroup) -> None:
        dist.broadcast(mine if at_root else out, 0, group=group)

    def exchange(group: dist.ProcessGroup) -> None:
        to, source = (rank + 1) % num, (rank - 1) % num
        ops = [
            dist.P2POp(dist.isend, mine, to, group),
            dist.P2POp(dist.irecv, out, source, group),
        ]
        for work in dist.batch_isend_irecv(ops):
            work.wait()

    def same(expected: Tensor, holds: bool = True) -> Callable[[], bool]:
        return lambda: not holds or torch.equal(out, expected)

    return (
        {
            "all_reduce": (lambda g: dist.all_reduce(out, group=g), same(summed)),
            "all_gather": (lambda g: dist.all_gather_into_tensor(out, shares[rank][0], g), same(gathered)),
            "all_gather list": (
                lambda g: dist.all_gather(outs, shares[rank][0], g),
                lambda: torch.equal(torch.cat(outs), gathered),
            ),
            "reduce_scatter": (
                lambda g: dist.reduce_scatter_tensor(small, mine, group=g),
                lambda: torch.equal(small, summed[rank * part :][:part]),
            ),
            "all_to_all": (
                lambda g: dist.all_to_all_single(out, mine, group=g),
                same(torch.cat([s[rank] for s in shares])),
            ),
            "broadcast": (broadcast, same(inputs[0], not at_root)),
            "reduce": (lambda g: dist.reduce(out, 0, group=g), same(summed, at_root)),
            "gather": (
                lambda g: dist.gather(shares[rank][0], outs if at_root else None, 0, g),
                lambda: not at_root or torch.equal(torch.cat(outs), gathered),
            ),
            "scatter": (
                lambda g: dist.scatter(small, shares[0] if at_root else None, 0, g),
                lambda: torch.equal(small, shares[0][rank]),
            ),
            "send and receive": (exchange, same(inputs[(rank - 1) % num])),
        },
        reset,
    )


def time_call(call: Call, group: dist.ProcessGroup, repeats: int) -> float:
    dist.barrier(group)
    start = time.perf_counter()
    for _ in range(repeats):
        call(group)
    slowest = torch.tensor((time.perf_counter() - start) / repeats, dtype=torch.float64)
    dist.all_reduce(slowest, dist.ReduceOp.MAX, group=group)
    return slowest.item()


def worker(rank: int, num: int, store: str, sizes: list[int], rounds: int, path: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(shm.register(), init_method=f"file://{store}", rank=rank, world_size=num)
    if not shm.carries():
        raise SystemExit("shared memory is not to be had here; the log says why")
    ours, gloo = dist.group.WORLD, dist.new_group(backend="gloo")
    assert ours is not None
    assert isinstance(gloo, dist.ProcessGroup)
    rows = []
    for size in sizes:
        table, reset = calls(num, rank, size)
        for name, (call, is_right) in table.items():
            repeats = 20 if size <= 1 << 16 else 4 if size <= 1 << 22 else 1
            call(gloo)
            reset()
            call(ours)
            right = torch.tensor(is_right(), dtype=torch.uint8)
            dist.all_reduce(right, dist.ReduceOp.MIN)
            seconds: dict[str, list[float]] = {"gloo": [], "ours": []}
            for _ in range(rounds):
                for kind, group in (("gloo", gloo), ("ours", ours)):
                    reset()  # reductions in place would grow without bound
                    seconds[kind].append(time_call(call, group, repeats))
            medians = {f"{kind}_ms": statistics.median(values) * 1e3 for kind, values in seconds.items()}
            rows.append({"ranks": num, "op": name, "bytes": size, "exact": bool(right.item()), **medians})
    if rank == 0:
        Path(path).write_text(json.dumps(rows))
    dist.destroy_process_group()


def show_size(size: int) -> str:
    return f"{size >> 20} MiB" if size >= 1 << 20 else f"{size >> 10} KiB" if size >= 1 << 10 else f"{size} B"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--max-mib", type=int, default=64)
    parser.add_argument("--out", type=Path, default=ROOT / "results/collectives.json")
    args = parser.parse_args()
    shm.register()  # build before the workers start
    sizes = [size for size in SIZES if size <= args.max_mib << 20]
    rows: list[dict[str, Any]] = []
    args.out.parent.mkdir(exist_ok=True)
    for num in args.ranks:
        store, part = (
            args.out.with_suffix(f".store{os.getpid()}"),
            args.out.with_suffix(f".part{os.getpid()}"),
        )
        try:
            mp.spawn(worker, (num, str(store), sizes, args.rounds, str(part)), nprocs=num)
            rows += json.loads(part.read_text())
        finally:
            store.unlink(missing_ok=True)
            part.unlink(missing_ok=True)
    print(f"{'ranks':>5} {'collective':18} {'size':>8} {'gloo ms':>9} {'ours ms':>9} {'ratio':>6}")
    for row in sorted(rows, key=lambda row: (row["ranks"], row["op"], row["bytes"])):
        ratio = row["gloo_ms"] / row["ours_ms"]
        wrong = "" if row["exact"] else "  WRONG BITS"
        print(
            f"{row['ranks']:5} {row['op']:18} {show_size(row['bytes']):>8} {row['gloo_ms']:9.3f} "
            f"{row['ours_ms']:9.3f} {ratio:6.1f}{wrong}"
        )
    save(args.out, {"rows": rows})
    if not all(row["exact"] for row in rows):
        raise SystemExit("some results are not exact")


if __name__ == "__main__":
    main()
