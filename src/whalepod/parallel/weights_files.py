"""Checkpoint folders of safetensors: reading what strangers wrote, and writing without half-done folders.

Reading: headers and index are checked before anything is allocated (types, sizes, offsets, file names),
then tensors or parts of them are read one at a time. Writing: shards go to a temporary folder beside the
target, which takes the target's place when all of it is on the disk.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, TypeGuard

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from whalepod.spec.errors import UserError
from whalepod.spec.model import shown

ADAPTER = "adapter_config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "generation_config.json",
    "chat_template.*",
)
"""Files that belong to a model and that no weights change."""

DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
}

Progress = Callable[[int, int], None]
"""Called after every tensor with the bytes done and the bytes in all."""

Region = tuple[slice, ...]

_MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit
_MAX_INDEX_BYTES = 256 * 2**20
_REOPEN_BYTES = 64 * 2**20


# ---------------------------------------------------------------------------------------- reading


@dataclass(frozen=True, slots=True)
class Entry:
    """Where one tensor lies; `dtype` as safetensors writes it."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int


class Checkpoint:
    """The tensors of a folder by name; headers are read and checked, the tensors not yet."""

    def __init__(self, folder: Path, entries: Mapping[str, Entry]) -> None:
        self.folder = folder
        self.entries = entries
        self._file: Path | None = None
        self._open: Any = None
        self._read_bytes = 0

    def read(self, name: str, region: Region | None = None) -> Tensor:
        """Tensor `name`, or a rectangular part of it, on the CPU in its stored type."""
        entry = self.entries[name]
        try:
            # The library maps files into memory, and pages once read stay counted as this process's until
            # the file is closed: opened anew now and then, they never amount to a whole shard.
            if self._file != entry.file or self._read_bytes > _REOPEN_BYTES:
                self._open, self._file, self._read_bytes = safe_open(entry.file, "pt"), entry.file, 0
            part = region is not None and any(
                (s.start, s.stop) != (0, n) for s, n in zip(region, entry.shape, strict=True)
            )
            tensor = self._open.get_slice(name)[region] if part else self._open.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{entry.file}: cannot read tensor {shown(name)}: {_line(error)}") from None
        self._read_bytes += tensor.nbytes
        return tensor


def open_checkpoint(folder: Path | str) -> Checkpoint:
    """Reads and checks index and headers. Raises UserError naming the file, and the tensor that is wrong."""
    folder = Path(folder)
    files, index = _weight_files(folder)
    entries: dict[str, Entry] = {}
    for file in files:
        for name, entry in read_header(file).items():
            if index.get(name, file.name) != file.name:
                continue  # the index says which of two holds
            if name in entries:
                raise UserError(f"tensor {shown(name)} is both in {entries[name].file} and in {file.name}")
            entries[name] = entry
    for name, file_name in index.items():
        if name not in entries:
            raise UserError(f"tensor {shown(name)} is missing from {folder / file_name}, against {INDEX}")
    return Checkpoint(folder, entries)


def read_header(file: Path) -> dict[str, Entry]:
    """The tensors of one safetensors file, checked against the file's size."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(_MAX_HEADER_BYTES, size - 8):
                what = "is truncated or no safetensors file"
                raise UserError(f"{file} {what}: its {size} bytes do not hold its header")
            text = stream.read(length)
    except OSError as error:
        raise UserError(f"cannot read {file}: {_line(error)}") from None
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} has a corrupt safetensors header: {_line(error)}") from None
    if not isinstance(header, dict):
        raise UserError(f"{file} has a corrupt safetensors header: not a JSON object")
    header.pop("__metadata__", None)
    entries: dict[str, Entry] = {}
    expected = 0
    parsed = [_entry(file, name, value) for name, value in header.items()]
    # In order of position the first tensor cut short is the one named.
    for name, start, end, entry in sorted(parsed, key=lambda e: e[1:3]):
        if start != expected:
            raise UserError(f"{file} has a corrupt safetensors header: {shown(name)} is out of place")
        if 8 + length + end > size:
            needs = f"tensor {shown(name)} ends at byte {8 + length + end}, the file at {size}"
            raise UserError(f"{file} is truncated: {needs}")
        entries[name], expected = entry, end
    if 8 + length + expected != size:
        raise UserError(f"{file} is longer than its tensors: {size} bytes, not {8 + length + expected}")
    return entries


def _entry(file: Path, name: str, value: Any) -> tuple[str, int, int, Entry]:
    where = f"{file} has a corrupt safetensors header: tensor {shown(name)}"
    if not isinstance(value, dict):
        raise UserError(f"{where} is not described by a JSON object")
    dtype, shape, offsets = value.get("dtype"), value.get("shape"), value.get("data_offsets")
    if not isinstance(dtype, str):
        raise UserError(f"{where} has no dtype")
    if not _is_sizes(shape) or len(shape) > 8:
        raise UserError(f"{where} has shape {shown(shape)}")
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise UserError(f"{where} has data_offsets {shown(offsets)}")
    start, end = offsets
    if dtype in DTYPES and prod(shape) * DTYPES[dtype].itemsize != end - start:
        raise UserError(f"{where} of shape {shape} in {dtype} cannot have {end - start} bytes")
    return name, start, end, Entry(file, dtype, tuple(shape), end - start)


def _is_sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**60 for n in value)


def _weight_files(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """The safetensors files of a folder, and its index (empty without one)."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder with a checkpoint")
    if (folder / INDEX).exists():
        index = _read_index(folder / INDEX)
        files = [folder / name for name in sorted(set(index.values()))]
        for file in files:
            if not file.is_file():
                example = next(tensor for tensor, name in index.items() if name == file.name)
                raise UserError(f"shard {file} is missing: {INDEX} has tensor {shown(example)} in it")
        return files, index
    single = folder / SINGLE
    files = (
        [single] if single.is_file() else sorted(f for f in folder.glob("model*.safetensors") if f.is_file())
    )
    if not files:
        pickles = sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pt*"))
        if pickles:
            raise UserError(
                f"{folder} has only pickled weights ({shown(pickles[0].name)}): these can run code and are "
                "never loaded; save them as safetensors first"
            )
        raise UserError(f"{folder} has no weights: neither {SINGLE} nor {INDEX}")
    return files, {}


def _is_file_name(name: str) -> bool:
    """Whether it is one of a safetensors file that does not lead out of its folder."""
    fits = name.isprintable() and len(name.encode()) <= 255
    return fits and name.endswith(".safetensors") and not set(name) & set("/\\:")


def _read_index(path: Path) -> dict[str, str]:
    try:
        if path.stat().st_size > _MAX_INDEX_BYTES:
            raise UserError(f"{path} is larger than an index may be ({_MAX_INDEX_BYTES} bytes)")
        index = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {_line(error)}") from None
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {_line(error)}") from None
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{path} must hold a 'weight_map' of tensor names to file names")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not _is_file_name(file):
            raise UserError(f"{path}: {shown(file)}, for tensor {shown(name)}, is no safetensors file name")
    return weight_map


# ---------------------------------------------------------------------------------------- writing


@dataclass(frozen=True, slots=True)
class Planned:
    """A tensor to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def write_checkpoint(
    folder: Path | str,
    config: Mapping[str, Any],
    plan: Sequence[Planned],
    tensors: Iterable[tuple[str, Tensor]],
    *,
    max_shard_bytes: int,
    companions: Path | None = None,
    progress: Progress | None = None,
) -> None:
    """Writes `tensors`, which come in the order of `plan`, as a checkpoint that appears all at once.

    A folder that is a checkpoint already is replaced; its other files stay. `companions`: a folder to take
    tokenizer files and the like from. Holds one shard in memory. Raises UserError if the folder must not
    be overwritten or cannot be written.
    """
    if max_shard_bytes < 1:
        raise UserError(f"max_shard_bytes must be at least 1, not {max_shard_bytes}")
    folder = Path(folder)
    shards = _shards(plan, max_shard_bytes)
    total = sum(p.num_bytes for p in plan)
    done = 0
    try:
        with _replacing(folder) as new:
            _write_json(new / "config.json", config)
            if companions is not None:
                copy_companions(companions, new)
            weight_map: dict[str, str] = {}
            stream = iter(tensors)
            for number, shard in enumerate(shards, start=1):
                part = f"model-{number:05}-of-{len(shards):05}.safetensors"
                file = new / (SINGLE if len(shards) == 1 else part)
                held: dict[str, Tensor] = {}
                for planned in shard:
                    name, tensor = next(stream)
                    assert planned == Planned(name, tuple(tensor.shape), tensor.dtype), planned
                    held[name] = tensor.contiguous()
                    weight_map[name] = file.name
                    done += planned.num_bytes
                    if progress is not None:
                        progress(done, total)
                save_file(held, file, metadata={"format": "pt"})
                shutil.copymode(new / "config.json", file)  # the library leaves files to their owner alone
                _sync(file)
            assert next(stream, None) is None, "more tensors than planned"
            if len(shards) > 1:
                _write_json(new / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {folder}: {_line(error)}") from None


def write_adapter(folder: Path | str, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Writes an adapter as PEFT reads it, all at once; over another adapter only. Raises UserError."""
    folder = Path(folder)
    try:
        with _replacing(folder) as new:
            _write_json(new / ADAPTER, config)
            file = new / "adapter_model.safetensors"
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, {"format": "pt"})
            shutil.copymode(new / ADAPTER, file)
            _sync(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {folder}: {_line(error)}") from None


def copy_companions(source: Path, target: Path) -> None:
    """Copies tokenizer, generation config and chat templates, as far as there are any.

    Raises UserError for a link that leads out of the folder: what it names may be no one's to pass on.
    """
    whole = source.resolve()
    # In the hub's cache a snapshot is links to the blobs beside `snapshots`.
    home = whole.parent.parent if whole.parent.name == "snapshots" else whole
    for pattern in COMPANIONS:
        for file in sorted(source.glob(pattern)):
            if file.is_file():
                if not file.resolve().is_relative_to(home):
                    raise UserError(
                        f"{file} is a link that leads out of its folder: put the file itself there"
                    )
                shutil.copyfile(file, target / file.name)


def _shards(plan: Sequence[Planned], max_bytes: int) -> list[list[Planned]]:
    shards: list[list[Planned]] = [[]]
    size = 0
    for planned in plan:
        if shards[-1] and size + planned.num_bytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(planned)
        size += planned.num_bytes
    return shards


@contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """A new empty folder that takes the place of `folder` when the body ends, and vanishes if it fails.

    What a killed process left beside `folder` is put right by the next to write there.
    """
    folder = Path(os.path.realpath(folder))
    new, old = (folder.with_name(f".{folder.name}.{kind}") for kind in ("new", "old"))
    if old.is_dir():
        _retire(old, folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; a checkpoint is a folder")
    if folder.is_dir() and any(folder.iterdir()) and not _is_checkpoint(folder):
        raise UserError(f"{folder} is not empty and not a checkpoint: not overwritten")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        yield new
        _sync(new)
        if folder.is_dir():
            folder.rename(old)
        new.rename(folder)
        _sync(folder.parent)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        if old.is_dir():
            _retire(old, folder)
        raise
    if old.is_dir():
        _retire(old, folder)


def _retire(old: Path, folder: Path) -> None:
    """Ends a replaced folder: back to its place if nothing is there, else only its other files go there."""
    if not folder.exists():
        old.rename(folder)
        return
    for file in old.iterdir():
        if not _is_weights(file) and not (folder / file.name).exists():
            file.rename(folder / file.name)
    shutil.rmtree(old, ignore_errors=True)


def _is_checkpoint(folder: Path) -> bool:
    has_config = (folder / "config.json").is_file() or (folder / ADAPTER).is_file()
    return has_config and any(_is_weights(file) for file in folder.iterdir())


def _is_weights(file: Path) -> bool:
    weights = file.name.startswith(("model", "adapter_model")) and file.suffix == ".safetensors"
    return file.name == INDEX or weights


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    _sync(path)


def _sync(path: Path) -> None:
    """Until data are on the disk a rename may outlive them."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _line(error: BaseException) -> str:
    """The first line of an error's message."""
    return (str(error).splitlines() or [type(error).__name__])[0]
