"""What ranks find out together: clocks, links of pairs, collectives of every axis of the layout.

Pairs work in rounds, rank r with r XOR the round's mask: all pairs of up to 16 ranks; of more those of masks
that are powers of two, so that every rank is tried within its host and across.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from whalepod.doctor.probe import Link
from whalepod.parallel.comm import Axis
from whalepod.parallel.mesh import Mesh
from whalepod.spec.layout import GROUPS
from whalepod.train.metrics import synchronize

ALL_PAIRS = 16
SMALL, LARGE = 2**16, 2**26
SECONDS = 0.03  # that the bytes of a bandwidth should take
ELEMENTS = 4099


def clock_offset(world: Axis) -> tuple[float, float]:
    """(seconds that this rank's clock is ahead of the first's, how far that may be off)."""
    offsets, widths = [], []
    for _ in range(9):
        start = time.perf_counter()
        world.barrier()
        widths.append(time.perf_counter() - start)
        now = time.time()
        offsets.append(now - world.all_gather_floats([now])[0][0])
    return statistics.median(offsets), min(widths)


def masks(size: int) -> list[int]:
    """XOR masks of the rounds in which `size` ranks meet."""
    bits = max(size - 1, 1).bit_length()
    return list(range(1, 2**bits)) if size <= ALL_PAIRS else [2**bit for bit in range(bits)]


def time_links(world: Axis, device: torch.device) -> Iterator[Link]:
    """Of this rank to the others that it meets."""
    for mask in masks(world.size):
        world.barrier()
        peer = world.rank ^ mask
        if peer < world.size:
            yield _time_link(world, peer, device)


def _time_link(world: Axis, peer: int, device: torch.device) -> Link:
    def best(size: int, repeats: int, rounds: int) -> float:
        """Seconds of a swap of so many bytes, the fastest round of the slower end."""
        here, there = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
        found = []
        for _ in range(rounds):
            start = time.perf_counter()
            for _ in range(repeats):
                world.swap_into(there, here, peer)
            synchronize(device)
            found.append((time.perf_counter() - start) / repeats)
        mine = torch.tensor([min(found)], dtype=torch.float64, device=device)
        other = torch.zeros_like(mine)
        world.swap_into(other, mine, peer)
        return max(mine.item(), other.item())

    best(8, 1, 1)  # opens the connection
    latency = best(8, 10, 3)
    rate = SMALL / best(SMALL, 1, 2)
    size = min(max(int(rate * SECONDS), SMALL), LARGE)  # the same on both ends
    return Link(peer, latency, size / best(size, 1, 3) / 1e9)


def wrong_collectives(axis: Axis, device: torch.device) -> list[str]:
    """Operations of an axis that do not bring what they should, each as `operation: why`.

    Values are whole numbers, so that sums are exact in any order.
    """
    n, rank = axis.size, axis.rank
    base = (torch.arange(n * ELEMENTS, device=device) % 7).float()
    factors = [r % 5 + 1 for r in range(n)]
    mine, total = base * factors[rank], base * sum(factors)
    part = slice(rank * ELEMENTS, (rank + 1) * ELEMENTS)
    gathered = torch.cat([base[:ELEMENTS] * f for f in factors])
    split = [ELEMENTS] * n
    sent = torch.arange(n, device=device).repeat_interleave(ELEMENTS).float() + 10 * rank
    received = (10.0 * torch.arange(n, device=device)).repeat_interleave(ELEMENTS) + rank

    def into(call: Callable[[Tensor, Tensor], object], size: int, x: Tensor) -> Tensor:
        out = torch.empty(size, device=device)
        call(out, x)
        return out

    calls: dict[str, tuple[Callable[[], Tensor], Tensor]] = {
        "all_reduce": (lambda: axis.all_reduce(mine.clone()), total),
        "all_gather": (lambda: into(axis.gather_into, n * ELEMENTS, mine[:ELEMENTS].clone()), gathered),
        "reduce_scatter": (lambda: into(axis.reduce_scatter_into, ELEMENTS, mine), total[part]),
        "all_to_all": (lambda: axis.wait(axis.start_all_to_all(sent, split, split)), received),
        "broadcast": (lambda: axis.broadcast(mine.clone(), n - 1), base * factors[n - 1]),
        "send": (lambda: into(axis.shift_into, n * ELEMENTS, mine), base * factors[rank - 1]),
    }
    wrong = []
    for op, (call, expected) in calls.items():
        try:
            found = call()
        except RuntimeError as error:
            wrong.append(f"{op}: {str(error).splitlines()[0][:120]}")
            continue
        if not torch.equal(found, expected):
            off = int((found != expected).sum())
            wrong.append(f"{op}: {off:,} of {expected.numel():,} numbers are wrong")
    return wrong


def check_axes(mesh: Mesh) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(axes that ranks speak along, `axis/operation: why` of what went wrong)."""
    names = tuple(name for name in GROUPS if mesh[name].size > 1)
    wrong = [f"{name}/{line}" for name in names for line in wrong_collectives(mesh[name], mesh.device)]
    return names, tuple(wrong)


def sees_first(world: Axis, folder: Path) -> bool:
    """Whether a file that the first rank makes in its `folder` is in this rank's too."""
    mark = folder / f".whalepod-doctor-{world.share(os.urandom(8))[0].hex()}"
    if world.rank == 0:
        with suppress(OSError):  # the disk's own check says why
            mark.touch()
    world.barrier()
    found = mark.exists()
    world.barrier()
    if world.rank == 0:
        with suppress(OSError):
            mark.unlink(missing_ok=True)
    return found
