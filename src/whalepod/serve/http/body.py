"""The body of a request: read within its limits, and parsed so that nothing odd gets past.

JSON as Python reads it knows NaN, integers of any size and strings that are no Unicode; here they are errors.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
from contextlib import suppress
from typing import Any, NoReturn

from fastapi import Request as HttpRequest

from whalepod.serve.http.api_error import ApiError

MAX_DEPTH = 64
MAX_DIGITS = 40
LINGER_BYTES = 64 << 20  # of a body that is too large, read and dropped so that its sender hears the answer
LINGER_S = 5.0

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


async def read_body(http: HttpRequest, max_bytes: int, timeout_s: float) -> bytes:
    """The whole body. Raises ApiError 413, 415 or 408; `ClientDisconnect` if the client goes away."""
    kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # nor can a page of another site send this without asking first
        raise ApiError(415, "the Content-Type must be application/json")
    if http.headers.get("content-encoding", "identity").lower() != "identity":
        raise ApiError(415, "a compressed body is not read")
    body = bytearray()
    stream = http.stream()
    try:
        async with asyncio.timeout(timeout_s):
            async for piece in stream:
                body += piece
                if len(body) > max_bytes:
                    break
            else:
                return bytes(body)
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {timeout_s:g} s", headers=_CLOSE) from None
    dropped = len(body)
    body.clear()
    with suppress(TimeoutError):  # whoever is slower does not hear the answer
        async with asyncio.timeout(LINGER_S):
            async for piece in stream:
                dropped += len(piece)
                if dropped > LINGER_BYTES:
                    break
    raise ApiError(413, f"the body must be at most {max_bytes} bytes long", headers=_CLOSE)


_CLOSE = {"Connection": "close"}


def parse_json(body: bytes) -> Any:
    """Raises ApiError 400 for anything but proper JSON of a sane depth."""
    try:
        text = body.decode("utf-8")
        found = json.loads(text, parse_int=_int, parse_float=_float, parse_constant=_constant)
        if _SURROGATE.search(body):
            json.dumps(found, ensure_ascii=False).encode("utf-8")  # half a surrogate pair is no character
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not UTF-8 (at byte {error.start})") from None
    except UnicodeEncodeError:
        raise ApiError(400, "the body has half a surrogate pair, which is no character") from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno} column {error.colno}"
        raise ApiError(400, f"the body is not JSON: {error.msg} ({where})") from None
    except RecursionError:
        raise ApiError(400, f"the body is nested more than {MAX_DEPTH} deep") from None
    _check_depth(found)
    return found


def _check_depth(found: Any) -> None:
    level = [found]
    for _ in range(MAX_DEPTH + 1):
        level = [
            item
            for value in level
            if isinstance(value, dict | list)
            for item in (value.values() if isinstance(value, dict) else value)
            if isinstance(item, dict | list)
        ]
        if not level:
            return
    raise ApiError(400, f"the body is nested more than {MAX_DEPTH} deep")


def _int(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ApiError(400, f"a number has more than {MAX_DIGITS} digits")
    return int(digits)


def _float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ApiError(400, "a number is too large")
    return value


def _constant(name: str) -> NoReturn:
    raise ApiError(400, f"{name} is not JSON")
