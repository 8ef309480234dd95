"""Bodies that no server should take, each of which must be answered with a 4xx: data for serve_load.py."""

from __future__ import annotations

import json
from typing import Any

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


def _with(**fields: Any) -> bytes:
    return json.dumps({"prompt": "a", "max_tokens": 4, **fields}).encode()


def _schema(schema: Any) -> bytes:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    message = {"role": "user", "content": "a"}
    return json.dumps({"messages": [message], "max_tokens": 4, "response_format": form}).encode()


def _nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


def bodies() -> dict[str, tuple[str, bytes]]:
    """Path and body by what is wrong with it."""
    texts = {
        "nothing": b"",
        "truncated": _with()[:-7],
        "truncated in a string": b'{"prompt": "a',
        "something behind": _with() + b" x",
        "no object": b"[1, 2]",
        "deep JSON": b"[" * 1_000_000,
        "deep JSON objects": b'{"a":' * 200_000,
        "deep JSON, closed": b'{"prompt": "a", "user": ' + b"[" * 5000 + b"]" * 5000 + b"}",
        "invalid UTF-8": b'{"prompt": "\xff\xfe\x80"}',
        "half a surrogate pair": b'{"prompt": "\\ud800"}',
        "NaN": b'{"prompt": "a", "temperature": NaN}',
        "1e999": b'{"prompt": "a", "temperature": 1e999}',
        "a number of 100,000 digits": b'{"prompt": "a", "seed": ' + b"9" * 100_000 + b"}",
        "max_tokens 10^30": _with(max_tokens=10**30),
        "max_tokens -1": _with(max_tokens=-1),
        "n 10^12": _with(n=10**12),
        "temperature as text": _with(temperature="hot"),
        "prompt a number": _with(prompt=3),
        "prompt an object": _with(prompt={}),
        "prompt of token ids and text": _with(prompt=[1, "a"]),
        "token ids beyond the vocabulary": _with(prompt=[2**30]),
        "129 prompts": _with(prompt=["a"] * 129),
        "another model": _with(model="x" * 1000),
        "prompt of 10 MB": _with(prompt="word " * 2_000_000),
        "prompt of 7 MB, within the body's limit": _with(prompt="word " * 1_400_000),
        "prompt of 7 MB without a space": _with(prompt="ab" * 3_500_000),
        "a million token ids": _with(prompt=[5] * 1_000_000),
        "regular expression bomb": _with(guided_regex="(a{1,99999}){1,99999}"),
        "stop of 100,000 strings": _with(stop=["a"] * 100_000),
    }
    schemas = {
        "schema 40 deep": _nested(40),
        "schema of 9,000 values": {"enum": list(range(9000))},
        "schema of maxLength 10^9": {"type": "string", "maxLength": 10**9},
        "schema of minItems 10^18": {"type": "array", "minItems": 10**18},
        "schema with a pattern bomb": {"type": "string", "pattern": "(a{1,99999}){1,99999}"},
        "schema that refers elsewhere": {"$ref": "http://169.254.169.254/latest"},
        "schema that is a list": [],
    }
    found = {name: (COMPLETIONS, body) for name, body in texts.items()}
    return found | {name: (CHAT, _schema(schema)) for name, schema in schemas.items()}
