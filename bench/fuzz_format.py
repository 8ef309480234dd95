"""What a format is to fuzz.py, and what several of them are made of."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fuzz_mutate import Parts

from whalepod.spec.errors import UserError
from whalepod.text.tokenizer import Tokenizer, train_tokenizer

TEMPLATE = (
    b"{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<u>{{ m['content'] }}{% else %}"
    b"<a>{{ m.content.split('</think>')[-1] }}{{ eos_token }}{% endif %}{% endfor %}"
    b"{% if tools %}{{ tools | tojson }}{% endif %}{% if add_generation_prompt %}<a>{% endif %}"
)
CHAT = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day"}]
SCHEMA = {
    "type": "object", "required": ["a"], "additionalProperties": False, "$defs": {"n": {"type": "integer"}},
    "properties": {
        "a": {"type": "string", "pattern": "^[a-z]{1,4}$"}, "b": {"$ref": "#/$defs/n"},
        "c": {"type": "array", "items": {"enum": ["x", 1, None]}, "maxItems": 3}, "d": {"type": "string",
        "maxLength": 5},
    },
}  # fmt: skip
TOOL = {"type": "function", "function": {"name": "f", "parameters": SCHEMA}}


class Refused(UserError):
    """An input was not taken, and properly so."""


@dataclass(frozen=True)
class Format:
    seeds: list[Parts]
    kinds: dict[str, str]  # of each part; see fuzz_mutate.py
    read: Callable[[Parts], None]


def dump(value: Any) -> bytes:
    return json.dumps(value).encode()


def put(folder: Path, parts: Parts) -> Path:
    for name, data in parts.items():
        (folder / name).write_bytes(data)
    return folder


def words(text: bytes) -> str:
    return text.decode("utf-8", "surrogateescape")


def small_tokenizer(folder: Path) -> Tokenizer:
    text = folder / "corpus.txt"
    text.write_text("Hello there, good day to all of you who read this. " * 40)
    return train_tokenizer(str(text), 300, cache_dir=folder / "cache")
