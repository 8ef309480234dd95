"""Writes checkpoints while training goes on.

torch's distributed checkpoint plans which rank writes what of replicated tensors; each rank then copies its
share aside (on GPUs into pinned memory of the host) and a thread writes the copy. Between two steps the ranks
tell each other how far their threads are, with figures that they exchange at that place anyway, and when all
are through the first makes it a checkpoint (`checkpoint_files.commit`). So the background needs no
collectives, and what goes wrong in it is known to all ranks at the same step.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Sequence
from enum import IntEnum
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.checkpoint._hf_utils import CUSTOM_METADATA_KEY, DTYPE_MAP
from torch.futures import Future

from whalepod.parallel.checkpoint import quiet, tensors
from whalepod.parallel.checkpoint_files import (
    CheckedFile,
    Files,
    Progress,
    begin,
    commit,
    path_of,
    remove_stale,
    retain,
    unfinished,
)
from whalepod.parallel.comm import Axis
from whalepod.parallel.parallelize import Parallel
from whalepod.spec.errors import UserError

log = logging.getLogger(__name__)

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPE_MAP.items()}


class Status(IntEnum):
    """How far a rank is with the checkpoint that is being written."""

    IDLE, WRITING, WRITTEN, FAILED = range(4)


class Share(NamedTuple):
    """A tensor that this rank writes: its name and where in the whole it begins."""

    name: str
    offset: tuple[int, ...]
    tensor: Tensor


class Checkpointer:
    """The checkpoints of a run, written by all ranks together into `folder`.

    `start` and `finish` are called by all ranks at the same place; after a `start`, `settle` between steps.
    keep: how many of the newest stay; keep_every: and of which steps all do (0: of none).
    """

    def __init__(
        self,
        folder: Path,
        parallel: Parallel,
        optimizer: torch.optim.Optimizer,
        keep: int,
        keep_every: int = 0,
    ) -> None:
        self.folder, self.parallel, self.optimizer = folder, parallel, optimizer
        self.keep, self.keep_every = keep, keep_every
        self.world: Axis = parallel.mesh.world
        self.status = Status.IDLE
        self.failures = 0
        self._progress = Progress()
        self._thread: Thread | None = None
        self._copies: dict[str, Tensor] = {}
        self._files: Files = {}
        self._problem = ""
        if self.world.rank == 0:
            remove_stale(folder)

    def start(self, progress: Progress, background: bool = True) -> None:
        """Begins to write the state as it is now; the caller may change it as soon as this returns.

        Waits for a checkpoint that is still being written.
        """
        self.finish()
        self._progress, self._files, self._problem = progress, {}, ""
        if self._agreed(lambda: self._first(lambda: begin(self.folder, progress.step))):
            self._give_up()
            return
        shares, file = self._plan(unfinished(self.folder, progress.step))
        self.status = Status.WRITING
        if background and self._copy(shares):
            shares = [share._replace(tensor=self._copies[share.name]) for share in shares]
            self._thread = Thread(target=self._write, args=(shares, file), name="checkpoint", daemon=True)
            self._thread.start()
        else:
            self._write(shares, file)

    def settle(self, statuses: Sequence[float]) -> None:
        """Ends the checkpoint that is being written, if all ranks are through. statuses: by rank."""
        if Status.WRITING in statuses or all(status == Status.IDLE for status in statuses):
            return
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        mine = json.dumps([self._problem, self._files]).encode()
        told = [json.loads(each) for each in self.world.share(mine)]
        problems = (f"rank {rank}: {problem}" for rank, (problem, _) in enumerate(told) if problem)
        self._problem = next(problems, "")
        files = {name: (size, crc) for _, listed in told for name, (size, crc) in listed.items()}
        if self._problem or self._agreed(
            lambda: self._first(lambda: commit(self.folder, self._progress, files))
        ):
            self._give_up()
            return
        self.status = Status.IDLE
        self._first(lambda: retain(self.folder, self._progress.step, self.keep, self.keep_every))

    def finish(self) -> None:
        """Waits until the checkpoint that is being written is whole, or has failed."""
        if self.status != Status.IDLE:
            if self._thread is not None:
                self._thread.join()
            self.settle([row[0] for row in self.world.all_gather_floats([self.status])])

    def save(self, progress: Progress) -> Path:
        """Writes a checkpoint now. Raises UserError, on all ranks, if that fails."""
        self.finish()
        failed = self.failures
        self.start(progress, background=False)
        self.finish()
        if self.failures > failed:
            raise UserError(f"checkpoint of step {progress.step} could not be written: {self._problem}")
        return path_of(self.folder, progress.step)

    # ---------------------------------------------------------------------------------------------------

    def _plan(self, path: Path) -> tuple[list[Share], Path]:
        plan = _Plan(str(path), save_distributed=True)
        with quiet():
            dcp.save(
                tensors(self.parallel, self.optimizer), storage_writer=plan, no_dist=self.world.size == 1
            )
        return plan.shares, path / f"shard-{self.world.rank + 1:05d}-model-00001-of-00001.safetensors"

    def _copy(self, shares: Sequence[Share]) -> bool:
        """Whether there is room for a copy; then `_copies` is it. It stays, for the next."""
        try:
            for share in shares:
                if share.name not in self._copies:
                    pinned = share.tensor.device.type == "cuda"
                    self._copies[share.name] = torch.empty_like(share.tensor, device="cpu", pin_memory=pinned)
            for share in shares:
                self._copies[share.name].copy_(share.tensor, non_blocking=True)
            if self.parallel.mesh.device.type == "cuda":
                torch.cuda.synchronize()
        except (RuntimeError, MemoryError) as error:
            self._copies.clear()
            reason = str(error).splitlines()[0][:150]
            log.warning("no room for a copy, so writing checkpoints holds training up (%s)", reason)
            return False
        return True

    def _write(self, shares: Sequence[Share], file: Path) -> None:
        try:
            if shares:
                self._files = {file.name: write_shares(file, shares)}
            self.status = Status.WRITTEN
        except Exception as error:  # told to all ranks by the next `settle`
            text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            self._problem, self.status = text or type(error).__name__, Status.FAILED

    def _give_up(self) -> None:
        self.status = Status.IDLE
        self.failures += 1
        path = unfinished(self.folder, self._progress.step)
        self._first(lambda: shutil.rmtree(path, ignore_errors=True))
        if self.world.rank == 0:
            step = self._progress.step
            log.warning("checkpoint of step %d could not be written: %s", step, self._problem)

    def _first(self, act: Callable[[], Any]) -> None:
        if self.world.rank == 0:
            act()

    def _agreed(self, act: Callable[[], None]) -> str:
        """What went wrong in `act`, on any rank, told to all; empty if nothing."""
        problem = ""
        try:
            act()
        except OSError as error:
            problem = error.strerror or str(error)
        self._problem = next((told.decode() for told in self.world.share(problem.encode()) if told), "")
        return self._problem


class _Plan(HuggingFaceStorageWriter):
    """What torch's checkpoint would have this rank write: `shares`, instead of files."""

    shares: list[Share]

    def write_data(self, plan: Any, planner: Any) -> Future[list[Any]]:
        self.shares = [
            Share(item.index.fqn, tuple(item.tensor_data.chunk.offsets), planner.resolve_data(item).detach())
            for item in plan.items
        ]
        done: Future[list[Any]] = Future()
        done.set_result([])
        return done


def write_shares(path: Path, shares: Sequence[Share]) -> tuple[int, int]:
    """One safetensors file, as torch's distributed checkpoint reads it, written piece by piece: torch's own
    writer holds a second copy of everything. Returns bytes and CRC-32. Raises OSError."""
    offsets = {share.name: {"saved_offsets": share.offset} for share in shares}
    header: dict[str, Any] = {
        "__metadata__": {
            CUSTOM_METADATA_KEY: json.dumps(offsets),
            "DCP_VERSION": "1.0",
            "format": "pt",
        }
    }
    shares = sorted(shares, key=lambda share: -share.tensor.itemsize)  # so that all are aligned
    end = 0
    for share in shares:
        start, end = end, end + share.tensor.nbytes
        header[share.name] = {
            "dtype": _DTYPE_NAMES[share.tensor.dtype],
            "shape": list(share.tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file = CheckedFile(path)
    try:
        file.write(len(text).to_bytes(8, "little") + text)
        for share in shares:
            flat = share.tensor.cpu().contiguous().reshape(-1)
            file.write(flat.view(torch.uint8).numpy())
    except BaseException:
        file.abandon()
        raise
    return file.close()
