"""Inputs for fuzz.py: a valid file, changed where its format has joints, and now and then anywhere.

A part of an input is bytes of a kind: `json`, `jsonl`, `yaml`, `safetensors` are taken apart into trees, of
which a value is replaced, moved, copied, renamed, nested or dropped; `text` is changed word by word; `binary`
byte by byte. Everything follows from the random generator that is given.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import yaml

Parts = dict[str, bytes]

MAX_BYTES = 64 << 10  # of a part; larger ones find nothing that these do not, and cost the time of many

VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 8, 127, 128, 255, 256, 65535, 2**31 - 1, 2**31, 2**32, 2**53, 2**60,
    2**63 - 1, 2**63, 2**64, -(2**63) - 1, 10**12, 10**30, 10**5000, 0.0, -0.0, 0.5, 1e-320, 1e-9, 1e308,
    -1e308,
    float("nan"), float("inf"), float("-inf"), "", "a", "0", "1", "null", "auto", "\x00", "\ud800",
    "\u2028", "é",
    "﷽" * 40, "a" * 300, "a" * 5000, "../../etc/passwd", "/etc/passwd", "a/b", "C:\\x", "..",
    "model.safetensors",
    "F32", "F8_E4M3", "{{ x }}", "(a{1,9999}){1,9999}", "[", "[0]", "%s%n", [], {}, [[]], [0], ["a"],
    {"a": 1},
    {"": {}}, [None], list(range(300)),
)  # fmt: skip

TOKENS: dict[str, tuple[bytes, ...]] = {
    "yaml": (
        b"&a ", b"*a", b"<<: *a\n", b"<<: [*a, *a]\n", b"!!python/object/apply:os.system [id]", b"!!binary x",
        b"!!set {a}", b"!!omap [a: 1]", b"!!timestamp x", b"!!int x", b"!!float .", b"!!bool 3", b"---\n",
        b"...\n",
        b"%YAML 9.9\n", b"? ", b": ", b"- ", b"| ", b">-\n", b"~", b".inf", b".nan", b"1:30:30", b"0o17",
        b"2026-13-45", b"2026-11-30", b"{", b"}", b"[", b"]", b"\t", b"\x85", b"=", b"<<", b"auto",
        b"{a: &b [*b]}",
    ),
    "json": (
        b"{", b"}", b"[", b"]", b",", b":", b'"', b"\\", b"\\ud800", b"\\u0000", b"NaN", b"Infinity",
        b"-Infinity",
        b"1e999", b"1E400", b"0x1", b"01", b"-", b"null", b"true", b"\x00", b"\xff", b"\xef\xbb\xbf",
        b"/*", b" ",
    ),
    "text": (
        b"{{", b"}}", b"{%", b"%}", b"{#", b"#}", b"{% for m in messages %}", b"{% endfor %}", b"{% if x %}",
        b"{% endif %}", b"{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", b"{% set x = messages %}",
        b"| tojson",
        b"| join", b"| center(99999999)", b"* 999999999", b"** 99999", b"range(99999)", b"range(10 ** 9)",
        b"messages.__class__", b".__init__.__globals__", b"|attr('__class__')", b"raise_exception('x')",
        b"'%99999999d' % 1", b"'{:99999999}'.format(1)", b"| indent(99999999)", b"| list", b"| batch(1)",
        b"[::-1]",
        b"namespace()", b"cycler()", b"lipsum(n=9999)", b"joiner()", b"dict()", b"loop.cycle()",
        b"{% include 'x' %}",
        b"{% extends x %}", b"{% import 'os' %}", b"(a*)*b", b"{1,10000}", b"[^", b"\\p{L}", b"\\", b"(?=",
        b"(?:", b"|",
        b"+", b"?", b"*", b"x", b"99999999999999999999", b"-1", b"0", b"1e999", b"\x00", b"\xff\xfe",
        b"\n", b"=", b".",
        b"model", b"layout.tp", b"train.", b"[[[[", b"{a: {a: ", b"nan", b"\xe2\x80\xa8",
    ),
    "binary": (b"\x00" * 8, b"\xff" * 8, b"\x7f", b"\x80", b"\x00\x00\xc0\x7f", b"\x00\x00\x80\x7f",
    b"\x00\x00\x80\xff"),
}  # fmt: skip
_NUMBER = re.compile(rb"\d+(?:\.\d+)?")


def mutated(seeds: list[Parts], kinds: dict[str, str], rng: random.Random) -> Parts:
    """A seed with one to three changes, most of them in its first part."""
    parts = dict(rng.choice(seeds))
    names = list(parts)
    for _ in range(rng.choice((1, 1, 2, 3))):
        name = names[0] if rng.random() < 0.7 else rng.choice(names)
        other = rng.choice(seeds).get(name, b"")
        parts[name] = _KINDS[kinds[name]](parts[name], other, rng)[:MAX_BYTES]
    return parts


# ----------------------------------------------------------------------------------------------- by kind


def _json(data: bytes, other: bytes, rng: random.Random) -> bytes:
    tree = _parsed(json.loads, data)
    if tree is None or rng.random() < 0.15:
        return _bytes(data, other, rng, "json")
    return _dumped(_tree(tree, rng), rng)


def _jsonl(data: bytes, other: bytes, rng: random.Random) -> bytes:
    lines = data.split(b"\n")
    at = rng.randrange(len(lines))
    lines[at] = _json(lines[at], other, rng)
    return b"\n".join(lines)


def _yaml(data: bytes, other: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.5:
        return _bytes(data, other, rng, "yaml")
    tree = _parsed(lambda text: json.loads(_as_json(text)), data)
    return _bytes(data, other, rng, "yaml") if tree is None else _dumped(_tree(tree, rng), rng)


@lru_cache(maxsize=64)  # of seeds, mostly
def _as_json(text: bytes) -> str:
    return json.dumps(yaml.load(text, yaml.CSafeLoader), default=str)


def _safetensors(data: bytes, other: bytes, rng: random.Random) -> bytes:
    length = int.from_bytes(data[:8], "little")
    header, body = data[8 : 8 + length], data[8 + length :]
    if rng.random() < 0.3:
        body = _bytes(body, other, rng, "binary")
    else:
        header = _json(header, b"", rng)
    length = (
        len(header) if rng.random() < 0.9 else rng.choice((0, 1, len(header) - 1, 2**32, 2**63, 2**64 - 1))
    )
    return max(length, 0).to_bytes(8, "little") + header + body


def _plain(kind: str) -> Callable[[bytes, bytes, random.Random], bytes]:
    return lambda data, other, rng: _bytes(data, other, rng, kind)


_KINDS: dict[str, Callable[[bytes, bytes, random.Random], bytes]] = {
    "json": _json, "jsonl": _jsonl, "yaml": _yaml, "safetensors": _safetensors,
    "text": _plain("text"), "binary": _plain("binary"),
}  # fmt: skip


def _parsed(parse: Callable[[bytes], Any], data: bytes) -> Any:
    try:
        return parse(data)
    except Exception:  # it was changed before: bytes are all that is left of it
        return None


def _dumped(tree: Any, rng: random.Random) -> bytes:
    try:
        text = json.dumps(tree, ensure_ascii=rng.random() < 0.5)
    except (ValueError, RecursionError, TypeError):  # a number of thousands of digits; a date
        text = '{"a": ' + "9" * 5000 + "}"
    return text.encode("utf-8", "surrogatepass")


# ------------------------------------------------------------------------------------------------- trees


def _tree(root: Any, rng: random.Random) -> Any:
    """`root` with one change somewhere below it, or in its place."""
    holder: Any = {"root": root}
    place, key = holder, "root"
    while True:  # a walk down, as likely to stop at any depth
        inner = place[key]
        if not isinstance(inner, dict | list) or not inner or rng.random() < 0.3:
            break
        place, key = inner, rng.choice(list(inner)) if isinstance(inner, dict) else rng.randrange(len(inner))
    old = place[key]
    choice = rng.randrange(11)
    if choice == 0 and place is not holder:
        del place[key]
    elif choice == 1 and isinstance(place, dict) and place is not holder:
        del place[key]
        place[
            rng.choice((f"{key}x", "", "a" * 300, "\ud800", "__class__", "__metadata__", str(rng.random())))
        ] = old
    elif choice == 2:
        place[key] = rng.choice(([old], {"a": old}, [old, old], {str(key): old}))
    elif choice == 3:
        deep: Any = old
        for _ in range(rng.choice((10, 50, 100, 500))):
            deep = [deep] if rng.random() < 0.5 else {"a": deep}
        place[key] = deep
    elif choice == 4:
        place[key] = _node(root, rng)
    elif choice == 5 and isinstance(place, list):
        place[key:key] = [old] * rng.choice((1, 2, 10, 300))
    elif choice == 6 and isinstance(old, int | float) and not isinstance(old, bool) and abs(old) < 1e300:
        place[key] = rng.choice(
            (old + 1, old - 1, -old, old * 2, old * 10**6, float(old), old + 0.5, str(old))
        )
    elif choice == 7 and isinstance(old, str):
        place[key] = rng.choice(
            (old[:-1], old + old, old.upper(), old * 50, old + "\x00", "../" + old, "\n" + old)
        )
    elif choice == 8 and isinstance(place, dict) and place is not holder:
        place[rng.choice(("a", "extra", "model", "preset", "$ref", "type", "name"))] = rng.choice(VALUES)
    else:
        place[key] = rng.choice(VALUES)
    return holder["root"]


def _node(root: Any, rng: random.Random) -> Any:
    """A copy of some value of the tree."""
    node = root
    while isinstance(node, dict | list) and node and rng.random() < 0.7:
        node = rng.choice(list(node.values()) if isinstance(node, dict) else node)
    return json.loads(json.dumps(node, default=str))


# ------------------------------------------------------------------------------------------------- bytes


def _bytes(data: bytes, other: bytes, rng: random.Random, kind: str) -> bytes:
    at, to = sorted((rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)))
    span = min(to - at, rng.choice((1, 2, 8, 64, 1 << 16)))
    token = rng.choice(TOKENS[kind])
    choice = rng.randrange(9)
    if choice == 0:
        return data[:at] + data[at + span :]
    if choice == 1:
        return data[:at] + data[at : at + span] * rng.choice((2, 3, 50, 1000)) + data[at + span :]
    if choice == 2:
        return data[:at] + rng.randbytes(rng.choice((1, 1, 2, 9))) + data[at + rng.choice((0, 1)) :]
    if choice == 3:
        return data[:at]
    if choice == 4:
        return data[:at] + other[rng.randrange(len(other) + 1) :]
    if choice == 5 and (numbers := list(_NUMBER.finditer(data))):
        found = rng.choice(numbers)
        number = rng.choice(
            (b"0", b"-1", b"1", b"2", b"128", b"4294967296", b"1e308", b"9" * 30, b"9" * 5000, b"0.5")
        )
        return data[: found.start()] + number + data[found.end() :]
    if choice == 6:
        return data[:at] + token * rng.choice((2, 20, 400)) + data[at:]
    if choice == 7:
        return data[:at] + token + data[at + span :]
    return data[:at] + token + data[at:]
