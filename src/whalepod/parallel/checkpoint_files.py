"""Checkpoint folders on the disk: whole or not there, whatever happens while they are written.

    step_00000100.unfinished/   while it is written; removed at the next start if its writer died
    step_00000100/              appears by one rename, when all of it is on the disk
        shard-...safetensors    tensors, a file or more of each rank
        state.json              where the run stands (`Progress`)
        manifest.json           bytes and CRC-32 of every other file

A folder is whole if every file has the size and the CRC-32 that its manifest says, and no weights are in it
that the manifest does not know. Nothing here is a pickle, and no file is opened that the manifest does not
name.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import stat
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from whalepod.parallel.comm import Axis
from whalepod.spec.errors import UserError

log = logging.getLogger(__name__)

MANIFEST, STATE = "manifest.json", "state.json"
CHUNK_BYTES = 4 << 20
_MAX_JSON_BYTES = 256 << 20
_NAME = re.compile(r"step_(\d{8,12})")
_STALE = re.compile(r"step_\d{8,12}\.(unfinished|removed)")
_PLAIN = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")

Files = dict[str, tuple[int, int]]
"""Bytes and CRC-32 by name."""


@dataclass(frozen=True)
class Progress:
    """Where a run stands: everything that is not a tensor. text: the hash of the tokens it trains on."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    skipped: int = 0  # steps that changed nothing, for NaN or infinite gradients
    text: str = ""


class CheckedFile:
    """A file as it is written, in pieces: counts bytes and CRC-32, and is on the disk when closed."""

    def __init__(self, path: Path) -> None:
        self.bytes, self.crc = 0, 0
        self._file: BinaryIO = path.open("wb", buffering=0)

    def write(self, data: Any) -> None:
        view = memoryview(data).cast("B")
        for start in range(0, len(view), CHUNK_BYTES):
            piece = view[start : start + CHUNK_BYTES]
            self.crc = zlib.crc32(piece, self.crc)
            self.bytes += len(piece)
            while len(piece):  # a nearly full disk takes a part
                piece = piece[self._file.write(piece) :]

    def close(self) -> tuple[int, int]:
        """Bytes and CRC-32 of the whole."""
        with self._file as file:
            os.fsync(file.fileno())
        return self.bytes, self.crc

    def abandon(self) -> None:
        self._file.close()


# ------------------------------------------------------------------------------------------------ writing


def path_of(folder: Path, step: int) -> Path:
    return folder / f"step_{step:08d}"


def unfinished(folder: Path, step: int) -> Path:
    return folder / f"step_{step:08d}.unfinished"


def begin(folder: Path, step: int) -> Path:
    """An empty folder to write the files of a checkpoint into."""
    path = unfinished(folder, step)
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path


def commit(folder: Path, progress: Progress, files: Files) -> Path:
    """Makes a checkpoint of files that are on the disk; returns its path. Raises OSError."""
    begun, final = unfinished(folder, progress.step), path_of(folder, progress.step)
    for name, (size, _) in files.items():
        if not (begun / name).is_file() or (begun / name).stat().st_size != size:
            raise OSError(f"{name} did not arrive: the run's folder must be one that all hosts share")
    files = files | {STATE: _write_json(begun / STATE, asdict(progress))}
    listed = {name: {"bytes": size, "crc32": crc} for name, (size, crc) in sorted(files.items())}
    _write_json(begun / MANIFEST, {"files": listed})
    _sync(begun)
    if final.exists():  # one that was found damaged
        _remove(final)
    begun.rename(final)
    _sync(folder)
    return final


def retain(folder: Path, step: int, keep: int, keep_every: int = 0) -> None:
    """Removes checkpoints up to `step`, but not the newest `keep` and those of every `keep_every` steps."""
    until = [s for s in steps_saved(folder) if s <= step]
    kept = {*until[-keep:], *(s for s in until if keep_every and s % keep_every == 0)}
    for old in _steps(folder):
        if old <= step and old not in kept:
            try:
                _remove(path_of(folder, old))
            except OSError as error:
                log.warning("checkpoint %s could not be removed: %s", path_of(folder, old), _line(error))


def remove_stale(folder: Path) -> None:
    """Removes what writers left that died."""
    if folder.is_dir():
        for path in folder.iterdir():
            if _STALE.fullmatch(path.name):
                shutil.rmtree(path, ignore_errors=True)


def _remove(path: Path) -> None:
    """First out of the way: a half-removed checkpoint must not look like one."""
    gone = path.with_suffix(".removed")
    shutil.rmtree(gone, ignore_errors=True)
    path.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def _write_json(path: Path, value: Mapping[str, Any]) -> tuple[int, int]:
    file = CheckedFile(path)
    try:
        file.write(json.dumps(value, indent=1).encode())
    except BaseException:
        file.abandon()
        raise
    return file.close()


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ------------------------------------------------------------------------------------------------ reading


def steps_saved(folder: Path) -> list[int]:
    """Steps of the checkpoints whose files have the right names and sizes, ascending."""
    return [step for step in _steps(folder) if incomplete(path_of(folder, step)) is None]


def newest_whole(folder: Path, axis: Axis) -> Path | None:
    """The newest checkpoint of which every byte is right; None where there is none at all.

    The ranks of `axis` read a share each, and agree. Damaged ones are passed over with a line that says which
    and why. Raises UserError if there are only such.
    """
    steps = json.loads(axis.share(json.dumps(_steps(folder)[::-1]).encode())[0])
    for step in steps:
        path = path_of(folder, step)
        mine = damage(path, axis.rank, axis.size)
        problem = next((p.decode() for p in axis.share((mine or "").encode()) if p), None)
        if problem is None:
            return path
        if axis.rank == 0:
            log.warning("checkpoint %s is passed over: %s", path, problem)
    if steps:
        raise UserError(f"none of the {len(steps)} checkpoints in {folder} is whole; --restart begins anew")
    return None


def incomplete(path: Path) -> str | None:
    """What is wrong with a checkpoint's names and sizes; None if nothing."""
    try:
        files = _manifest(path)
        for name, (size, _) in files.items():
            found = (path / name).stat()
            if not stat.S_ISREG(found.st_mode):
                return f"{name} is not a file"
            if found.st_size != size:
                return f"{name} has {found.st_size} bytes, its manifest says {size}"
        others = sorted(p.name for p in path.glob("*.safetensors") if p.name not in files)
    except FileNotFoundError as error:
        return f"it has no {Path(str(error.filename)).name}"
    except (OSError, ValueError) as error:
        return f"it cannot be read: {_line(error)}"
    return f"it holds {others[0]}, which its manifest does not list" if others else None


def damage(path: Path, rank: int = 0, num_ranks: int = 1) -> str | None:
    """What is wrong with a checkpoint, to the byte, as far as it is this rank's to read; None if nothing."""
    if (problem := incomplete(path)) is not None:
        return problem
    try:
        for name, (_, crc) in sorted(_manifest(path).items())[rank::num_ranks]:
            if _crc_of(path / name) != crc:
                return f"{name} is damaged: its CRC-32 is not that of its manifest"
    except (OSError, ValueError) as error:
        return f"it cannot be read: {_line(error)}"
    return None


def read_progress(path: Path) -> Progress:
    try:
        values = _read_json(path / STATE)
        return Progress(
            int(values["step"]),
            int(values["tokens"]),
            float(values["seconds"]),
            int(values.get("skipped", 0)),
            str(values.get("text", "")),
        )
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise UserError(f"checkpoint {path} has no readable {STATE}: {_line(error)}") from None


def _steps(folder: Path) -> list[int]:
    if not folder.is_dir():
        return []
    names: Iterable[re.Match[str] | None] = (_NAME.fullmatch(p.name) for p in folder.iterdir() if p.is_dir())
    return sorted(int(match.group(1)) for match in names if match)


def _manifest(path: Path) -> Files:
    """Raises OSError, or ValueError for one that is not as we write it: it may come from anywhere."""
    values = _read_json(path / MANIFEST).get("files")
    if not isinstance(values, dict) or STATE not in values:
        raise ValueError(f"{MANIFEST} does not list the files")
    files: Files = {}
    for name, facts in values.items():
        size, crc = (facts.get(key) if isinstance(facts, dict) else None for key in ("bytes", "crc32"))
        if not _PLAIN.fullmatch(name) or type(size) is not int or type(crc) is not int:
            raise ValueError(f"{MANIFEST} does not describe {name[:80]!r}")
        files[name] = size, crc
    return files


def _read_json(path: Path) -> dict[str, Any]:
    found = path.stat()
    if not stat.S_ISREG(found.st_mode) or found.st_size > _MAX_JSON_BYTES:
        raise ValueError(f"{path.name} is not a file of a sensible size")
    try:
        values = json.loads(path.read_bytes())
    except RecursionError:
        raise ValueError(f"{path.name} is nested too deeply") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path.name} holds no mapping")
    return values


def _crc_of(path: Path) -> int:
    crc = 0
    with path.open("rb", buffering=0) as file:
        while piece := file.read(CHUNK_BYTES):
            crc = zlib.crc32(piece, crc)
    return crc


def _line(error: BaseException) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split())[:200]
