"""Files with an object of JSON on every line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from whalepod.spec.errors import UserError

MAX_LINE_BYTES = 64 << 20


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


def _value(line: bytes, where: str) -> Any:
    if len(line) > MAX_LINE_BYTES:
        raise UserError(f"{where}: longer than {MAX_LINE_BYTES >> 20} MiB")
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON: {str(error).splitlines()[0]}") from None
