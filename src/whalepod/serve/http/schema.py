"""JSON schemas and regular expressions from strangers, held to sizes that a grammar can be made of.

Whether one is right is for the engine's grammar library to say; here it is only kept from being a bomb.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from whalepod.serve.request import Grammar
from whalepod.spec.errors import UserError

MAX_SCHEMA_BYTES = 64 << 10
MAX_SCHEMA_DEPTH = 32
MAX_SCHEMA_VALUES = 8192
MAX_REGEX_BYTES = 2048  # compiling takes longer than in proportion: this much about half a second
MAX_REPEAT = 10_000  # of maxLength, minItems, {m,n}: each may become that many states

_COUNTS = {"minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"}
_REPEATS = re.compile(r"\{(\d*),?(\d*)\}")


def schema_grammar(schema: dict[str, Any]) -> Grammar:
    """The grammar of a JSON schema. Raises UserError for one that is too large, or refers to elsewhere."""
    for total, (depth, key, value) in enumerate(_values(schema), start=1):
        if depth > MAX_SCHEMA_DEPTH:
            raise UserError(f"a JSON schema must be at most {MAX_SCHEMA_DEPTH} deep")
        if total > MAX_SCHEMA_VALUES:
            raise UserError(f"a JSON schema must have at most {MAX_SCHEMA_VALUES} values")
        if key in _COUNTS and isinstance(value, int | float) and value > MAX_REPEAT:
            raise UserError(f"{key} of a JSON schema must be at most {MAX_REPEAT}")
        if key == "pattern" and isinstance(value, str):
            _check_regex(value)
        if key == "$ref" and not (isinstance(value, str) and value.startswith("#")):
            raise UserError('$ref of a JSON schema must begin with "#": nothing is fetched')
    source = json.dumps(schema, ensure_ascii=False)
    if len(source.encode()) > MAX_SCHEMA_BYTES:
        raise UserError(f"a JSON schema must be at most {MAX_SCHEMA_BYTES >> 10} KiB")
    return Grammar("json_schema", source)


def regex_grammar(pattern: str) -> Grammar:
    _check_regex(pattern)
    return Grammar("regex", pattern)


def call_schema(functions: list[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    """What a call must be: the arguments of the only function, else `{"name": ..., "arguments": {...}}`."""
    if len(functions) == 1:
        return functions[0][1]
    forms = []
    for index, (name, parameters) in enumerate(functions):
        arguments = _moved(parameters, f"#/anyOf/{index}/properties/arguments")
        forms.append(
            {
                "type": "object",
                "properties": {"name": {"const": name}, "arguments": arguments},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
        )
    return {"anyOf": forms}


def _moved(schema: dict[str, Any], root: str) -> dict[str, Any]:
    """The schema with its references pointing to where it stands now."""
    moved = json.loads(json.dumps(schema))
    for _, _, value in _values(moved):
        if isinstance(value, dict) and isinstance(ref := value.get("$ref"), str) and ref.startswith("#"):
            value["$ref"] = root + ref[1:]
    return moved


def _values(root: Any) -> Iterator[tuple[int, str, Any]]:
    """Every value with its depth and key, without recursion."""
    todo: list[tuple[int, str, Any]] = [(0, "", root)]
    while todo:
        depth, key, value = todo.pop()
        yield depth, key, value
        if isinstance(value, dict):
            todo += [(depth + 1, name, item) for name, item in value.items()]
        elif isinstance(value, list):
            todo += [(depth + 1, "", item) for item in value]


def _check_regex(pattern: str) -> None:
    if len(pattern.encode(errors="replace")) > MAX_REGEX_BYTES:
        raise UserError(f"a regular expression must be at most {MAX_REGEX_BYTES} bytes long")
    counts = [int(count) for found in _REPEATS.findall(pattern) for count in found if count]
    if max(counts, default=0) > MAX_REPEAT:
        raise UserError(f"a regular expression must repeat at most {MAX_REPEAT} times")
