"""Who is missing when a job stands still.

A collective waits for all its ranks, so one that hangs, or is stopped, holds up all others, and none of them
can say which it is. Here a thread of each rank writes down a few times a minute, in the job's store, where
its rank stands: step, module, place in the code, and the collective it waits in if it does. A rank whose
stack has not moved for `limit_s` reads what the others wrote. If none of them has moved either, one prints a
report that names those that have not arrived, and all end with an error, so that the launcher can start them
again.

A rank that computes moves, however long it takes: it holds the others up, but is not taken for hung.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from types import FrameType
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed import Store
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from whalepod.parallel.comm import Traffic
from whalepod.parallel.mesh import Mesh

_LONGEST_BEAT_S = 10.0
_LISTED = 16
EXIT_CODE = 1


class Hung(RuntimeError):
    """No rank has moved for too long."""


@dataclass(frozen=True)
class Standing:
    """Where a rank stands. beat: counts up while its process runs; still_s: since when it has not moved.

    waiting: [axis, operation] of the collective it waits in; calls: of collectives so far, by axis.
    """

    rank: int
    host: str
    pid: int
    beat: int
    still_s: float
    step: int
    where: str
    waiting: tuple[str, str] | None
    calls: Mapping[str, int]


class Watchdog:
    """Watches this rank from `start` to `end`. `step`: of the run, to be told by the loop.

    modules: whose names a report uses. limit_s: how long nothing may move. A job of one rank has none.
    """

    def __init__(self, mesh: Mesh, modules: Sequence[nn.Module], limit_s: float) -> None:
        self.step = 0
        self._mesh, self._limit_s = mesh, limit_s
        self._beat_s = min(_LONGEST_BEAT_S, limit_s / 8)
        self._names = {id(m): name for part in modules for name, m in part.named_modules()}
        self._main = threading.get_ident()
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        if self._mesh.world.size > 1:
            # A connection of its own: the training thread may sit in the other one.
            store: Any = dist.distributed_c10d._get_default_store()
            store = dist.PrefixStore("watchdog", store.clone())
            # At once: a rank that stops before its first beat is to be named too.
            self._tell(store, self._standing(0, 0.0, ()))
            self._thread = threading.Thread(target=self._watch, args=(store,), name="watchdog", daemon=True)
            self._thread.start()

    def end(self) -> None:
        self._end.set()
        if self._thread is not None:
            self._thread.join()

    # ---------------------------------------------------------------------------------- this rank's place

    def _watch(self, store: Store) -> None:
        mark: Any = None
        beat, since, not_before = 0, time.monotonic(), 0.0
        while not self._end.wait(self._beat_s):
            beat += 1
            frames = [*_frames(self._main)]
            now = [(frame.f_code, frame.f_lasti) for frame in frames], sum(self._traffic.calls.values())
            if now != mark:
                mark, since = now, time.monotonic()
            standing = self._standing(beat, time.monotonic() - since, frames)
            del frames
            try:
                self._tell(store, standing)
                if standing.still_s >= self._limit_s and time.monotonic() > not_before:
                    self._judge(store, standing)
                    not_before = time.monotonic() + self._limit_s / 4
            except RuntimeError as error:  # the store is gone, and with it its host
                if standing.still_s >= self._limit_s:
                    self._leave(f"{_told(standing)}; the job's store does not answer: {error}")

    def _tell(self, store: Store, standing: Standing) -> None:
        store.set(str(standing.rank), json.dumps(asdict(standing)))

    @property
    def _traffic(self) -> Traffic:
        return self._mesh.traffic

    def _standing(self, beat: int, still_s: float, frames: Sequence[FrameType]) -> Standing:
        calls: dict[str, int] = {}
        for (axis, _), count in [*self._traffic.calls.items()]:
            calls[axis] = calls.get(axis, 0) + count
        waiting = self._traffic.waiting
        if waiting is None and frames and "/torch/distributed/" in frames[0].f_code.co_filename:
            waiting = ("torch", frames[0].f_code.co_name)  # a send or receive of torch's pipelines
        return Standing(
            rank=self._mesh.world.rank,
            host=socket.gethostname(),
            pid=os.getpid(),
            beat=beat,
            still_s=still_s,
            step=self.step,
            where=self._place(frames, still_s > self._beat_s),
            waiting=waiting,
            calls=calls,
        )

    def _place(self, frames: Sequence[FrameType], still: bool) -> str:
        """Module, direction, and the line of our own code. Of a rank that moves not the module: to look at a
        frame's variables is to hold on to their tensors."""
        selves = (id(frame.f_locals.get("self")) for frame in frames) if still else ()
        module = next((self._names[key] or "model" for key in selves if key in self._names), "")
        functions = {frame.f_code.co_name for frame in frames}
        direction = "backward" if functions & {"backward", "_engine_run_backward"} else "forward"
        ours = next((f for f in frames if "/whalepod/" in f.f_code.co_filename and not _is_comm(f)), None)
        line = "" if ours is None else f"{os.path.basename(ours.f_code.co_filename)}:{ours.f_lineno}"
        return ", ".join(part for part in (f"{module} {direction}" if module else "", line) if part)

    # ------------------------------------------------------------------------------------- all ranks' places

    def _judge(self, store: Store, mine: Standing) -> None:
        """Returns if some rank has moved; else reports and ends the process."""
        before = self._read(store)
        if self._end.wait(1.5 * self._beat_s):
            return
        everyone = self._read(store)
        beats = {standing.rank: standing.beat for standing in before}
        silent = {s.rank for s in everyone if s.beat == beats.get(s.rank)} - {mine.rank}
        if any(s.still_s < self._limit_s / 2 for s in everyone if s.rank not in silent):
            return
        missing = _missing(everyone, silent, self._mesh, mine)
        if store.add("reported", 1) == 1:
            print(self._report(everyone, silent, missing, mine), file=sys.stderr, flush=True)
        else:
            time.sleep(2 * self._beat_s)  # for the one that reports
        self._leave(_summary(missing, mine))

    def _read(self, store: Store) -> list[Standing]:
        keys = [str(rank) for rank in range(self._mesh.world.size)]
        there = [key for key in keys if store.check([key])]
        return [Standing(**json.loads(text)) for text in store.multi_get(there)] if there else []

    def _report(
        self, everyone: Sequence[Standing], silent: set[int], missing: Sequence[Standing], mine: Standing
    ) -> str:
        lines = [f"whalepod: nothing has moved for {mine.still_s:.0f} s: {_summary(missing, mine)}"]
        blamed = {standing.rank for standing in missing}
        for standing in sorted(everyone, key=lambda s: (s.rank not in blamed, s.rank))[:_LISTED]:
            how = "does not answer, was last seen" if standing.rank in silent else "stands"
            lines.append(f"  {_told(standing, how)}")
        unheard = {*range(self._mesh.world.size)} - {standing.rank for standing in everyone}
        if unheard:
            lines.append(f"  never heard of: ranks {', '.join(map(str, sorted(unheard)[:_LISTED]))}")
        if len(everyone) > _LISTED:
            lines.append(f"  ... and {len(everyone) - _LISTED} ranks more")
        return "\n".join(lines)

    def _leave(self, reason: str) -> None:
        handler = get_error_handler()
        handler.initialize()
        handler.record_exception(Hung(reason))  # for the launcher, if it asked for a file
        sys.stderr.flush()
        os._exit(EXIT_CODE)  # the training thread cannot be woken


def _missing(everyone: Sequence[Standing], silent: set[int], mesh: Mesh, mine: Standing) -> list[Standing]:
    """Those that do not answer; else those in no collective; else those that wait in an earlier one."""
    quiet = [standing for standing in everyone if standing.rank in silent]
    elsewhere = [standing for standing in everyone if standing.waiting is None]
    if quiet or elsewhere:
        return quiet or elsewhere
    axis = mine.waiting[0] if mine.waiting else "world"
    group = mesh.layout.group(axis, mine.rank) if axis in mesh.axes else []
    here = [standing for standing in everyone if standing.rank in group]
    most = max((standing.calls.get(axis, 0) for standing in here), default=0)
    return [standing for standing in here if standing.calls.get(axis, 0) < most]


def _summary(missing: Sequence[Standing], mine: Standing) -> str:
    axis, op = mine.waiting or ("", "")
    what = f"{op} #{mine.calls.get(axis, 0)} of axis {axis}" if axis else "no collective"
    named = [f"rank {s.rank} ({s.host}, pid {s.pid})" for s in missing[:_LISTED]]
    names = ", ".join(named) or "no rank in particular"
    return f"in step {mine.step} rank {mine.rank} waits in {what}; not arrived: {names}"


def _told(standing: Standing, how: str = "stands") -> str:
    doing = "in no collective"
    if standing.waiting is not None:
        axis, op = standing.waiting
        doing = f"waiting in {op} #{standing.calls.get(axis, 0)} of axis {axis}"
    place = f" at {standing.where}" if standing.where else ""
    return (
        f"rank {standing.rank} ({standing.host}, pid {standing.pid}) {how} in step {standing.step}{place}, "
        f"{doing}, for {standing.still_s:.0f} s"
    )


def _frames(thread: int) -> Iterator[FrameType]:
    """A thread's stack, innermost first."""
    frame = sys._current_frames().get(thread)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _is_comm(frame: FrameType) -> bool:
    return frame.f_code.co_filename.endswith("/parallel/comm.py")
