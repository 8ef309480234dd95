"""Judges what the ranks reported: a check is ok, a warning or failed, and says what to do.

Failed: the job would stop, or come out wrong. Warning: it would run, slower or less safely than it should.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from whalepod.doctor.probe import Link, Report
from whalepod.spec.hardware import spelled_gpu
from whalepod.spec.layout import Layout

Status = Literal["ok", "warning", "failed"]
STATES: tuple[Status, ...] = ("ok", "warning", "failed")

MAY_DIFFER = ("python", "driver")  # a warning only
SLOW_RANK, LAME_RANK = 0.8, 0.5  # of the median rank's speed
SLOW_LINK, LAME_LINK = 0.5, 0.1  # of the good links' bandwidth
SLOW_LATENCY = 5.0  # times the good links'
BELOW_DATABASE = 0.4
CLOCK_S = 1.0
FULL = 0.92  # of the free memory
OPEN_FILES, FEW_FILES = 4096, 256
SHM_GIB = 1.0
"""For NCCL in containers: its manual, "troubleshooting", asks for `--shm-size=1g --ulimit memlock=-1`."""
SLOW_DISK_MB_S = 50.0
SLOW_SAVE_S = 600.0


@dataclass(frozen=True)
class Check:
    """found: one line of what there is; remedy: what to do, where something is to be done."""

    name: str
    status: Status
    found: str
    remedy: str | None = None


@dataclass(frozen=True)
class Needs:
    """What a job takes: memory of each rank, and disk for so many checkpoints of so many GiB."""

    memory_gib: float | None = None
    checkpoint_gib: float = 0.0
    checkpoints: int = 1
    fp8: bool = False


def judge(reports: Sequence[Report], layout: Layout, needs: Needs) -> tuple[Check, ...]:
    """All checks, in the order in which one would mend them."""
    names = Names(reports)
    return (
        _versions(reports, names),
        _limits(reports, names),
        _memory(reports, names, needs),
        _fp8(reports, names, needs),
        _speed(reports, names),
        *_disk(reports, names, needs),
        _clocks(reports, names),
        _links(reports, names),
        _axes(reports, names, layout),
    )


def worst(checks: Iterable[Check]) -> Status:
    return _worst(check.status for check in checks)


def _worst(states: Iterable[Status]) -> Status:
    return STATES[max(map(STATES.index, states), default=0)]


class Names:
    """What ranks and hosts are called. Hosts of one name are told apart by a number."""

    def __init__(self, reports: Sequence[Report]) -> None:
        self.host: dict[int, str] = {}
        seen: dict[str, str] = {}
        count: Counter[str] = Counter()
        for report in reports:
            if report.host_id not in seen:
                count[report.host] += 1
                number = count[report.host]
                seen[report.host_id] = report.host if number == 1 else f"{report.host}-{number}"
            self.host[report.rank] = seen[report.host_id]

    def ranks(self, ranks: Iterable[int]) -> str:
        """`rank 3 (host-b)`, `ranks 4-7 (host-b)`; of many hosts the first four."""
        parts = []
        for host, found in groupby(sorted(ranks), lambda rank: self.host[rank]):
            here = list(found)
            whole = here == list(range(here[0], here[-1] + 1)) and len(here) > 1
            text = f"{here[0]}-{here[-1]}" if whole else ", ".join(map(str, here))
            parts.append(f"rank{'s' * (len(here) > 1)} {text} ({host})")
        return ", ".join(parts[:4]) + (f" and {len(parts) - 4} more" if len(parts) > 4 else "")


def _versions(reports: Sequence[Report], names: Names) -> Check:
    differing: list[str] = []
    status: Status = "ok"
    for what in dict.fromkeys(key for r in reports for key in r.versions):
        found: dict[str, list[int]] = {}
        for r in reports:
            found.setdefault(r.versions.get(what, "none"), []).append(r.rank)
        if len(found) > 1:
            usual, *others = sorted(found, key=lambda v: -len(found[v]))
            odd = "; ".join(f"{v} on {names.ranks(found[v])}" for v in others)
            differing.append(f"{what} {usual}, but {odd}")
            status = _worst((status, "warning" if what in MAY_DIFFER else "failed"))
    if differing:
        remedy = "install the same environment everywhere; ranks of different versions may hang or disagree"
        return Check("versions", status, "; ".join(differing), remedy)
    return Check("versions", "ok", ", ".join(f"{k} {v}" for k, v in reports[0].versions.items()))


def _limits(reports: Sequence[Report], names: Names) -> Check:
    on_cuda = reports[0].device != "cpu"
    across = len(set(names.host.values())) > 1
    rules: list[tuple[str, Status, Callable[[Report], bool], str]] = [
        ("open files", "failed", lambda r: 0 <= r.open_files < FEW_FILES, f"ulimit -n {OPEN_FILES} or more"),
        (
            "open files",
            "warning",
            lambda r: 0 <= r.open_files < OPEN_FILES,
            f"ulimit -n {OPEN_FILES} or more",
        ),
        (
            "locked memory",
            "warning",
            lambda r: on_cuda and across and r.locked_memory >= 0,
            "ulimit -l unlimited (in a container --ulimit memlock=-1), for RDMA",
        ),
        (
            "/dev/shm",
            "warning",
            lambda r: on_cuda and r.shm_gib < SHM_GIB,
            "in a container --shm-size=1g or more",
        ),
    ]
    words = (
        f"{min(r.open_files for r in reports):,} open files, "
        f"/dev/shm {min(r.shm_gib for r in reports):.1f} GiB, locked memory "
        + ("unlimited" if all(r.locked_memory < 0 for r in reports) else "limited")
    )
    for what, status, broken, remedy in rules:
        if ranks := [r.rank for r in reports if broken(r)]:
            return Check("limits", status, f"{words}; too little of {what}: {names.ranks(ranks)}", remedy)
    return Check("limits", "ok", words)


def _memory(reports: Sequence[Report], names: Names, needs: Needs) -> Check:
    least = min(reports, key=lambda r: r.memory_free_gib)
    free = least.memory_free_gib
    words = f"{free:.1f} GiB free for {names.ranks([least.rank])}, the least"
    if needs.memory_gib is not None:
        words += f"; the plan takes {needs.memory_gib:.2f}"
        remedy = (
            "end what else runs there, or shrink layout.micro_batch, recompute, or spread over more ranks"
        )
        if needs.memory_gib > free:
            return Check("memory", "failed", words, remedy)
        if needs.memory_gib > FULL * free:
            return Check("memory", "warning", words, remedy)
    usual = statistics.median(r.memory_free_gib for r in reports)
    if free < 0.8 * usual:
        return Check("memory", "warning", f"{words}; usually {usual:.1f}", "see what else runs there")
    return Check("memory", "ok", words)


def _fp8(reports: Sequence[Report], names: Names, needs: Needs) -> Check:
    broken = [r for r in reports if r.fp8 not in ("hardware", "emulated")]
    if broken:
        found = f"{broken[0].fp8}: {names.ranks(r.rank for r in broken)}"
        return Check("FP8", "failed" if needs.fp8 else "warning", found, "train with layout.precision bf16")
    emulated = [r.rank for r in reports if r.fp8 == "emulated"]
    if not emulated:
        return Check("FP8", "ok", "in hardware; a product agrees with FP32")
    found = "emulated (right, but slow)"
    if len(emulated) < len(reports):
        found += f" on {names.ranks(emulated)}"
    remedy = "layout.precision bf16 is faster here" if needs.fp8 else None
    return Check("FP8", "warning" if needs.fp8 else "ok", found, remedy)


def _speed(reports: Sequence[Report], names: Names) -> Check:
    usual = statistics.median(r.tflops for r in reports)
    slowest = min(reports, key=lambda r: r.tflops)
    share = slowest.tflops / usual
    words = f"a product at {usual:.3g} TFLOP/s; the slowest rank is {1 - share:.0%} below"
    if share >= SLOW_RANK:
        return Check("speed", "ok", words)
    slow = [r.rank for r in reports if r.tflops < SLOW_RANK * usual]
    return Check(
        "speed",
        "failed" if share < LAME_RANK else "warning",
        f"{slowest.tflops:.3g} instead of {usual:.3g} TFLOP/s at worst: {names.ranks(slow)}",
        "every step waits for the slowest: look for heat, power limits, other jobs there, or leave it out",
    )


def _disk(reports: Sequence[Report], names: Names, needs: Needs) -> tuple[Check, ...]:
    on = [(r, r.disk) for r in reports if r.disk is not None]
    if broken := [(r, d) for r, d in on if d.error is not None]:
        disk = broken[0][1]
        where = f"{disk.folder} on {names.ranks(r.rank for r, _ in broken)}"
        return (
            Check("disk", "failed", f"{where}: {disk.error}", "free or mount it, or choose another `out`"),
        )
    slowest = min((d for _, d in on), key=lambda d: d.write_mb_s)
    free = min(d.free_gib for _, d in on)
    want = needs.checkpoint_gib * needs.checkpoints
    words = (
        f"{slowest.folder}: writes {slowest.write_mb_s:,.0f} MB/s, fsync {slowest.fsync_ms:.1f} ms, reads "
        f"{slowest.read_mb_s:,.0f} MB/s; {free:,.1f} GiB free"
    )
    checks = []
    if want:
        words += f", {want:.3g} needed ({needs.checkpoints} checkpoints of {needs.checkpoint_gib:.3g})"
    # Hosts that write into one folder share its speed; where each has its own, they do not.
    seconds = needs.checkpoint_gib * 2**30 / (slowest.write_mb_s * 1e6) if slowest.write_mb_s else 0.0
    if want > free:
        remedy = "free space, lower train.keep_checkpoints, or choose another `out`"
        checks.append(Check("disk", "failed", words, remedy))
    elif seconds > SLOW_SAVE_S or slowest.write_mb_s < SLOW_DISK_MB_S:
        found = f"{words}; a checkpoint would take {seconds:,.0f} s through this host" if seconds else words
        checks.append(Check("disk", "warning", found, "a faster disk or file system for `out`"))
    else:
        checks.append(Check("disk", "ok", words))
    if apart := [r.rank for r, d in on if not d.sees_first]:
        checks.append(
            Check(
                "shared folder",
                "failed",
                f"{names.ranks(apart)}: no sight of what the first rank writes",
                "checkpoints need one folder that all hosts see: put `out` on a shared file system",
            )
        )
    return tuple(checks)


def _clocks(reports: Sequence[Report], names: Names) -> Check:
    offsets = [r.clock_s for r in reports]
    spread, error = max(offsets) - min(offsets), max(r.clock_error_s for r in reports)
    words = f"within {max(spread, error) * 1e3:.1f} ms"
    if spread <= CLOCK_S + error:
        return Check("clocks", "ok", words)
    usual = statistics.median(offsets)
    off = [r.rank for r in reports if abs(r.clock_s - usual) > CLOCK_S / 2]
    found = f"{spread:.1f} s apart: {names.ranks(off)}"
    return Check("clocks", "warning", found, "let NTP set them: logs and traces cannot be compared else")


# ---------------------------------------------------------------------------------------------- links


@dataclass(frozen=True)
class Pair:
    """A link as both ends saw it, the worse figure of the two."""

    a: int
    b: int
    latency_s: float
    gb_s: float


def pairs(reports: Sequence[Report]) -> list[Pair]:
    ends: dict[tuple[int, int], list[Link]] = {}
    for r in reports:
        for link in r.links:
            ends.setdefault((min(r.rank, link.peer), max(r.rank, link.peer)), []).append(link)
    return [
        Pair(a, b, max(x.latency_s for x in both), min(x.gb_s for x in both))
        for (a, b), both in sorted(ends.items())
    ]


def _links(reports: Sequence[Report], names: Names) -> Check:
    found: list[str] = []
    remedies: list[str] = []
    status: Status = "ok"
    every = pairs(reports)
    if not every:
        return Check("links", "ok", "one rank: there are none")
    for across, title in ((False, "inside a host"), (True, "between hosts")):
        some = [p for p in every if (names.host[p.a] != names.host[p.b]) == across]
        if not some:
            continue
        good, quick = _quantile([p.gb_s for p in some], 0.8), _quantile([p.latency_s for p in some], 0.2)
        slowest = min(some, key=lambda p: p.gb_s)
        words = f"{title} {good:.3g} GB/s each way, {quick * 1e6:,.0f} us"
        slow = [p for p in some if p.gb_s < SLOW_LINK * good]
        late = [p for p in some if p.latency_s > SLOW_LATENCY * quick and p.latency_s > 1e-3]
        if slow:
            lame = slowest.gb_s < LAME_LINK * good
            status = _worst((status, "failed" if lame else "warning"))
            words += f"; slow: {_culprit(slow, some, names)}, {slowest.gb_s:.3g} GB/s at worst"
            remedies.append("look at the cable, adapter and switch port there, or leave that host out")
        elif late:
            status = _worst((status, "warning"))
            latest = max(p.latency_s for p in late)
            words += f"; late: {_culprit(late, some, names)}, {latest * 1e3:.1f} ms at worst"
            remedies.append("look for a detour or a busy link there")
        known = _database(reports[0].device, across)
        if known is not None and good < BELOW_DATABASE * known:
            status = _worst((status, "warning"))
            words += f"; this hardware usually has {known:.0f}"
            remedies.append(
                "check that NCCL uses the adapters (NCCL_DEBUG=INFO, NCCL_IB_HCA)"
                if across
                else "check that peer-to-peer and NVLink work (nvidia-smi topo -m)"
            )
        found.append(words)
    return Check("links", status, "; ".join(found), "; ".join(dict.fromkeys(remedies)) or None)


def _database(device: str, across: bool) -> float | None:
    """GB/s of a link of this accelerator between one pair, where the hardware database knows it."""
    gpu = spelled_gpu(device)
    if gpu is None:
        return None
    if across:
        return gpu.nic_gb_s
    return (gpu.scale_up.peer_gb_s or gpu.scale_up.gb_s) if gpu.scale_up else gpu.pcie_gb_s


def _culprit(slow: Sequence[Pair], every: Sequence[Pair], names: Names) -> str:
    """The host, else the rank, whose links are all slow while none of the others' is; else the links."""
    for host in dict.fromkeys(names.host[r] for p in slow for r in (p.a, p.b)):
        if _all_of([p for p in every if host in (names.host[p.a], names.host[p.b])], slow, every):
            return f"every link of host {host}"
    for rank in dict.fromkeys(r for p in slow for r in (p.a, p.b)):
        if _all_of([p for p in every if rank in (p.a, p.b)], slow, every):
            return f"every link of {names.ranks([rank])}"
    hosts = {frozenset((names.host[p.a], names.host[p.b])) for p in slow}
    if len(hosts) == 1 and len(next(iter(hosts))) == 2 and len(slow) > 1:
        return " to ".join(sorted(next(iter(hosts))))
    listed = [f"{names.ranks([p.a])} to {names.ranks([p.b])}" for p in sorted(slow, key=lambda p: p.gb_s)]
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")


def _all_of(some: Sequence[Pair], slow: Sequence[Pair], every: Sequence[Pair]) -> bool:
    """Whether these several links, but not all there are, are the slow ones."""
    return 1 < len(some) < len(every) and set(some) == set(slow)


def _quantile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(int(share * len(values)), len(values) - 1)]


def _axes(reports: Sequence[Report], names: Names, layout: Layout) -> Check:
    wrong: dict[str, list[int]] = {}
    for r in reports:
        for line in r.wrong:
            wrong.setdefault(line, []).append(r.rank)
    if wrong:
        lines = [f"{line} on {names.ranks(ranks)}" for line, ranks in wrong.items()]
        more = f"; {len(lines) - 3} more" if len(lines) > 3 else ""
        return Check(
            "collectives",
            "failed",
            "; ".join(lines[:3]) + more,
            "nothing trained here can be trusted: look at the device and its links with the vendor's tests",
        )
    axes = list(dict.fromkeys(axis for r in reports for axis in r.axes))
    crossing = [
        axis
        for axis in ("tp", "cp")
        if any(len({names.host[o] for o in layout.group(axis, r.rank)}) > 1 for r in reports)
    ]
    if crossing:
        return Check(
            "collectives",
            "warning",
            f"right along {', '.join(axes)}; but {' and '.join(crossing)} leave the host",
            "they speak in every layer: fewer of them, so that one host holds a group",
        )
    return Check(
        "collectives", "ok", f"right along {', '.join(axes)}" if axes else "one rank: there are none"
    )
