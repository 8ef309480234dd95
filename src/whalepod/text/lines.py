"""JSON from files: an object on every line, or one of settings."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from whalepod.spec.errors import UserError

MAX_LINE_BYTES = 64 << 20
MAX_SETTINGS_BYTES = 64 << 20


class Line(NamedTuple):
    """A line that is not empty: its number, what it holds, and the bytes of the file read by then."""

    number: int
    value: Any
    done: int


def json_lines(path: Path) -> Iterator[Line]:
    """Raises UserError, with the line's number, for what cannot be read."""
    done = 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES + 1), b""), start=1):
                done += len(line)
                if line.strip():
                    yield Line(number, _value(line, f"{path}, line {number}"), done)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def read_settings(path: Path) -> dict[str, Any]:
    """A model folder's JSON file of settings; empty where there is none. Raises UserError."""
    try:
        if not path.is_file():
            return {}
        if path.stat().st_size > MAX_SETTINGS_BYTES:
            raise UserError(f"{path} is longer than {MAX_SETTINGS_BYTES >> 20} MiB")
        found = json.loads(path.read_bytes())
    except UserError:
        raise
    except (OSError, ValueError, RecursionError):
        raise UserError(f"{path} is not JSON") from None
    return found if isinstance(found, dict) else {}


def _value(line: bytes, where: str) -> Any:
    if len(line) > MAX_LINE_BYTES:
        raise UserError(f"{where}: longer than {MAX_LINE_BYTES >> 20} MiB")
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON: {str(error).splitlines()[0]}") from None
