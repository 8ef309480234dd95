"""Text for training: any source of documents as one deterministic stream.

A source is a word, a path or a name:

    stdlib                  the Python standard library's own .py files: real text on every machine, offline
    notes.txt, a/folder     a file; a folder, searched recursively
    'a/**/*.md'             a glob
    chats.jsonl             one JSON object a line, the text under `text_field`
    hf:NAME[:SPLIT]         a Hugging Face dataset
    hf:json:PATH            local files through the same library; also parquet, csv, text, arrow

Documents come in one fixed shuffled order. Neighbouring files resemble each other, so a cap on the bytes or a
held-out share taken from an alphabetical order would be a different kind of text; taken from this order, both
are a fair sample.

A document is a file, a line of a .jsonl file or a row of a dataset. A long file is cut at line ends into
pieces of at most 1 MiB, each a document: reading stays flat in memory however large the file. Where the whole
source is a handful of files they are cut finer, so that there is something to shuffle and to hold out.
"""

from __future__ import annotations

import codecs
import glob
import hashlib
import json
import logging
import os
import platform
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from whalepod.spec.errors import UserError, nearest

log = logging.getLogger(__name__)

STDLIB = "stdlib"
MAX_PIECE_BYTES = 1 << 20
MIN_PIECE_BYTES = 4 << 10
FEW_FILES = 16  # below this many files, cut them so that there are about...
WANTED_PIECES = 64  # ...this many documents
STDLIB_TABLES = {"encodings", "pydoc_data"}
SNIFF_BYTES = 8 << 10
ORDER_SEED = 0x7768616C65
RULES_VERSION = 2  # part of every fingerprint: raise it when the same source yields other documents

JSONL_SUFFIXES = {".jsonl", ".ndjson"}
# Taken for text without a look inside. Any other file is opened and kept if it begins with valid UTF-8.
TEXT_SUFFIXES = {
    *JSONL_SUFFIXES,
    *(".txt", ".md", ".rst", ".tex", ".html", ".xml", ".csv", ".tsv", ".json", ".yaml", ".yml", ".toml"),
    *(".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".rs", ".go", ".java", ".js", ".ts", ".sh"),
}
SKIPPED_FOLDERS = {"__pycache__", "node_modules", "site-packages", "dist-packages"}
LOCAL_BUILDERS = {"json", "parquet", "csv", "text", "arrow"}

Progress = Callable[[str, int, int], None]  # (what is being done, done, total)


@dataclass(frozen=True)
class _Files:
    """The files of a source. `names` are relative to it, so that a moved folder hashes alike."""

    paths: tuple[Path, ...]
    names: tuple[str, ...]
    label: str


def documents(source: str, *, text_field: str = "text", max_bytes: int | None = None) -> Iterator[str]:
    """The documents of `source`, none of them blank, in an order that depends on the source's names alone.

    `max_bytes` stops after that many bytes of UTF-8, in the middle of a document if need be.
    Raises UserError at once for a source that is missing or unreadable, and while iterating for a bad line or
    a source without any text.
    """
    if max_bytes is not None and max_bytes <= 0:
        raise UserError(f"max_bytes is {max_bytes}, it must be positive")
    if source.startswith("hf:"):
        stream = _dataset_documents(source, text_field)
    else:
        stream = _file_documents(_find(source), text_field)
    return _capped(stream, source, max_bytes)


def fingerprint(source: str, *, text_field: str = "text") -> str:
    """A hash (hex) of names, sizes and modification times: changes when the source does, and reads no text.

    A dataset of the hub hashes by its name only; delete the cache to follow one that was changed in place.
    """
    digest = hashlib.sha256(f"{RULES_VERSION}\0{text_field}\0".encode())
    if source.startswith("hf:"):
        name, split, data_files = _parse_dataset(source)
        digest.update(f"hf\0{name}\0{split}\0".encode())
        files = _find(data_files) if data_files else _Files((), (), source)
    else:
        files = _find(source)
    if source == STDLIB:
        digest.update(f"python\0{platform.python_version()}\0".encode())
    for path, name in zip(files.paths, files.names, strict=True):
        stat = path.stat()
        digest.update(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def total_bytes(source: str) -> int | None:
    """Size of the source's files in bytes, for a progress bar; None for a dataset."""
    if source.startswith("hf:"):
        return None
    return sum(path.stat().st_size for path in _find(source).paths)


def clean(text: str) -> str:
    """`text` with lone surrogates replaced: JSON can spell them, UTF-8 and so the tokenizer cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-8", "replace").decode()
    return text


def missing(path: Path, what: str = "file or folder", also: tuple[str, ...] = ()) -> UserError:
    """The error for a path that is not there, with the nearest name that is."""
    if not path.parent.is_dir():
        return UserError(f"no {what} {str(path)!r}: the folder {str(path.parent)!r} does not exist")
    hint = nearest(path.name, [*(entry.name for entry in path.parent.iterdir()), *also])
    # A folder's whole listing would not be one clear line: keep the hint only when one name is close.
    return UserError(f"no {what} {str(path)!r}{hint if hint.startswith(' (did you mean') else ''}")


def _capped(stream: Iterator[str], source: str, max_bytes: int | None) -> Iterator[str]:
    left = max_bytes
    empty = True
    for raw in stream:
        if not raw or raw.isspace():
            continue
        text = clean(raw)
        empty = False
        if left is not None:
            data = text.encode()
            if len(data) >= left:
                yield data[:left].decode(errors="ignore")
                return
            left -= len(data)
        yield text
    if empty:
        raise UserError(f"{source!r} holds no text")


# ---------------------------------------------------------------------------------------------------- files


def _find(source: str) -> _Files:
    """The files behind `source`, sorted by name."""
    try:
        return _find_files(source)
    except (OSError, RuntimeError) as error:  # RuntimeError: ~ of an unknown user
        raise UserError(f"cannot read {source!r}: {getattr(error, 'strerror', None) or error}") from error


def _find_files(source: str) -> _Files:
    if not source:
        raise UserError("the text source is empty: give 'stdlib', a file, a folder, a glob or hf:NAME")
    if source == STDLIB:
        found = _stdlib()
    elif (path := Path(source).expanduser()).is_dir():
        found = {os.path.relpath(p, path): p for p in _walk(path)}
    elif path.is_file():
        found = {path.name: path}
    elif path.exists():
        raise UserError(f"{source!r} is neither a regular file nor a folder")
    elif glob.has_magic(source):
        found = {p: Path(p) for p in glob.glob(str(path), recursive=True) if os.path.isfile(p)}
        if not found:
            raise UserError(f"no file matches {source!r}")
    else:
        raise missing(path, also=(STDLIB,) if os.sep not in source else ())
    names = tuple(sorted(found))
    if not any(found[name].stat().st_size for name in names):
        raise UserError(f"{source!r} holds no text")
    return _Files(tuple(found[name] for name in names), names, source)


def _stdlib() -> dict[str, Path]:
    """Python's own .py files by name below the library folder, tests included, installed packages not.

    Tables of character codes and of rendered help are left out: they are data with a .py ending, and a
    small model that reads them writes little else.
    """
    found: dict[str, Path] = {}
    for key in ("stdlib", "platstdlib"):
        root = Path(sysconfig.get_paths()[key])
        names = {os.path.relpath(p, root): p for p in _walk(root) if p.suffix == ".py"}
        found |= {name: p for name, p in names.items() if Path(name).parts[0] not in STDLIB_TABLES}
    return found


def _walk(root: Path) -> Iterator[Path]:
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in SKIPPED_FOLDERS and name[0] != "."]
        for name in names:
            path = Path(folder, name)
            if name[0] != "." and path.is_file():  # not a socket, not a dangling link
                yield path


def _looks_like_text(path: Path) -> bool:
    if path.suffix.lower() in TEXT_SUFFIXES:
        return True
    with path.open("rb") as file:
        head = file.read(SNIFF_BYTES)
    try:
        # Incremental: the sniffed bytes may end inside a character.
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return b"\0" not in head


def _file_documents(files: _Files, text_field: str) -> Iterator[str]:
    """Plans now, so that mistakes show before the first document is asked for; reads as it is iterated."""
    alone = len(files.paths) == 1
    try:
        paths = [path for path in files.paths if _looks_like_text(path)]
        if not paths:
            raise UserError(
                f"{files.label!r} is not UTF-8 text (other formats: hf:parquet:PATH and the like)"
            )
        spans, piece_bytes = _spans(paths)
    except OSError as error:
        raise UserError(f"cannot read {error.filename!r}: {error.strerror}") from error
    skipped = len(files.paths) - len(paths)
    return _read(paths, spans, piece_bytes, text_field, alone=alone, skipped=skipped)


def _read(
    paths: list[Path],
    spans: npt.NDArray[np.int64],
    piece_bytes: int,
    text_field: str,
    *,
    alone: bool,
    skipped: int,
) -> Iterator[str]:
    for index, start, end in spans[_order(len(spans))]:
        path = paths[index]
        try:
            with path.open("rb") as file:
                if path.suffix.lower() in JSONL_SUFFIXES:
                    file.seek(start)
                    yield _json_text(file.read(end - start), path, int(start), text_field)
                    continue
                first = _line_start(file, int(start), piece_bytes)
                length = _line_start(file, int(end), piece_bytes) - first
                file.seek(first)
                data = file.read(max(length, 0))
        except OSError as error:
            raise UserError(f"cannot read {str(path)!r}: {error.strerror}") from error
        try:
            if b"\0" in data:
                raise UnicodeDecodeError("utf-8", data, data.index(b"\0"), data.index(b"\0") + 1, "zero byte")
            yield data.decode().removeprefix("\ufeff")
        except UnicodeDecodeError as error:
            if alone:
                where = first + error.start
                raise UserError(f"{str(path)!r} is not UTF-8 text: {error.reason} at byte {where}") from error
            skipped += 1
    if skipped:
        log.info("skipped %d of %d files or pieces that are not UTF-8 text", skipped, len(spans) + skipped)


def _spans(paths: list[Path]) -> tuple[npt.NDArray[np.int64], int]:
    """Where each document lies: rows of (file, first byte, end byte), and the size of a piece in bytes.

    24 bytes a document, so that a .jsonl file of ten million lines can be shuffled without holding its text.
    The cuts of a plain file are provisional: `_line_start` moves both sides of each to the same line start.
    """
    sizes = [path.stat().st_size for path in paths]
    piece_bytes = MAX_PIECE_BYTES
    if len(paths) < FEW_FILES:
        piece_bytes = min(max(sum(sizes) // WANTED_PIECES, MIN_PIECE_BYTES), MAX_PIECE_BYTES)
    parts = []
    for index, (path, size) in enumerate(zip(paths, sizes, strict=True)):
        if path.suffix.lower() in JSONL_SUFFIXES:
            edges = _line_edges(path)
        else:
            edges = np.append(np.arange(0, size, piece_bytes, dtype=np.int64), size)
        part = np.stack([np.full(len(edges) - 1, index), edges[:-1], edges[1:]], axis=1)
        parts.append(part[part[:, 2] - part[:, 1] > (1 if path.suffix.lower() in JSONL_SUFFIXES else 0)])
    return np.concatenate(parts).astype(np.int64), piece_bytes


def _line_edges(path: Path) -> npt.NDArray[np.int64]:
    """Byte offsets [lines + 1] where the lines of a file begin, and where the last one ends."""
    edges = [np.zeros(1, np.int64)]
    size = 0
    with path.open("rb") as file:
        while chunk := file.read(16 << 20):
            edges.append(np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n")) + size + 1)
            size += len(chunk)
    joined = np.concatenate(edges)
    return joined if joined[-1] == size else np.append(joined, size)


def _line_start(file: BinaryIO, position: int, piece_bytes: int) -> int:
    """The first line start at or after `position`; in a line longer than a piece, the next character's start.

    Never beyond the next cut, so cuts keep their order and every byte lies in exactly one piece.
    """
    if position == 0:
        return 0
    file.seek(position - 1)
    ahead = file.read(piece_bytes)
    newline = ahead.find(b"\n")
    if newline >= 0:
        return position + newline
    if len(ahead) < piece_bytes:
        return position - 1 + len(ahead)  # the file's end
    return position + next((i for i, byte in enumerate(ahead[1:5]) if byte & 0xC0 != 0x80), 0)


def _json_text(line: bytes, path: Path, start: int, text_field: str) -> str:
    if line.isspace():
        return ""
    try:
        record = json.loads(line)
        if isinstance(record, dict) and isinstance(record.get(text_field), str):
            return record[text_field]
        problem = f"no text under {text_field!r}"
        if isinstance(record, dict):
            problem += nearest(text_field, [key for key, value in record.items() if isinstance(value, str)])
    except (ValueError, RecursionError):
        problem = "not a JSON object"
    with path.open("rb") as file:  # counted only now: line numbers are wanted for mistakes alone
        number = file.read(start).count(b"\n") + 1
    raise UserError(f"{str(path)!r} line {number}: {problem}")


def _order(count: int) -> npt.NDArray[np.int64]:
    # The raw stream of a bit generator is fixed for ever; Generator.permutation may change with numpy.
    return np.argsort(np.random.Philox(key=ORDER_SEED).random_raw(count), kind="stable")


# ------------------------------------------------------------------------------------------------- datasets


def _parse_dataset(source: str) -> tuple[str, str, str | None]:
    """(name or builder, split, local files or None) of `hf:NAME[:SPLIT]` or `hf:BUILDER:PATH`."""
    name, _, rest = source.removeprefix("hf:").partition(":")
    if not name:
        raise UserError(f"{source!r} names no dataset: write hf:NAME, hf:NAME:SPLIT or hf:json:PATH")
    if name in LOCAL_BUILDERS:
        if not rest:
            raise UserError(f"{source!r} names no file: write hf:{name}:PATH")
        return name, "train", rest
    return name, rest or "train", None


def _dataset_documents(source: str, text_field: str) -> Iterator[str]:
    name, split, data_files = _parse_dataset(source)
    try:
        import datasets  # type: ignore[import-not-found]  # optional, and heavy: imported when asked for
    except ImportError as error:
        raise UserError(
            f"{source!r} needs the library datasets: pip install datasets (or whalepod[data])"
        ) from error
    options = {"data_files": [str(path) for path in _find(data_files).paths]} if data_files else {}
    try:
        table: Any = datasets.load_dataset(name, split=split, **options)
    except Exception as error:  # the library and those below it raise everything there is
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"cannot load the dataset {source!r}: {reason}") from error
    if text_field not in table.column_names:
        hint = nearest(text_field, table.column_names)
        raise UserError(f"the dataset {source!r} has no column {text_field!r}{hint}")
    return (str(table[int(row)][text_field] or "") for row in _order(len(table)))
