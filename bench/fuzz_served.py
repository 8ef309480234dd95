"""What a server reads from its clients and from the model, as formats of fuzz.py (see fuzz_files.py)."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from fuzz_format import CHAT, SCHEMA, TEMPLATE, TOOL, Format, Refused, dump, put, small_tokenizer
from fuzz_mutate import Parts

from whalepod.serve.batch import read_lines
from whalepod.serve.grammar import Grammars
from whalepod.serve.http.config import ServerConfig
from whalepod.serve.http.open import _defaults
from whalepod.serve.http.reply import Splitter
from whalepod.serve.http.schema import regex_grammar, schema_grammar
from whalepod.serve.http.server import make_app
from whalepod.serve.request import Chunk, Request, Stats
from whalepod.text.chat import ChatTemplate

REPLY = (
    "<think>\nso</think>\nYes.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n"
    '{"a": 1}\n```<｜tool▁call▁end｜>'
    "<｜tool▁call▁begin｜>g<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
)


def settings(folder: Path) -> Format:
    name = "generation_config.json"
    seed = {
        name: dump({"temperature": 0.6, "top_p": 0.95, "top_k": 20, "do_sample": True, "eos_token_id": 1})
    }
    return Format([seed], {name: "json"}, lambda p: _ignored(_defaults(put(folder, p))))


def _ignored(_: object) -> None:
    return None


def prompts(folder: Path) -> Format:
    lines = dump({"prompt": "Hello", "max_tokens": 3}) + b"\n" + dump({"messages": CHAT})
    return Format(
        [{"p.jsonl": lines}],
        {"p.jsonl": "jsonl"},
        lambda p: _ignored(read_lines(put(folder, p) / "p.jsonl")),
    )


def grammar(folder: Path) -> Format:
    words = small_tokenizer(folder)
    grammars = Grammars(words, words.vocab_size)
    grammars.mask(regex_grammar("a"))  # the first takes a second to set up

    def read(parts: Parts) -> None:
        if "regex" in parts:
            grammars.mask(regex_grammar(parts["regex"].decode(errors="replace")))
            return
        schema = _json(parts["schema"])
        grammars.mask(schema_grammar(schema))

    seeds = [{"schema": dump(s)} for s in (SCHEMA, {"anyOf": [SCHEMA["properties"]["c"], {"type": "null"}]})]
    seeds += [{"regex": r} for r in (b"[a-z]{2,5}(-\\d+)?|x*", "^(é|[^\\n])+\\.$".encode())]
    return Format(seeds, {"schema": "json", "regex": "text"}, read)


def _json(data: bytes) -> Any:
    """As the server would, which takes an object here."""
    try:
        found = json.loads(data.decode())
        json.dumps(found, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError):
        raise Refused("no JSON") from None
    if not isinstance(found, dict):
        raise Refused("no object")
    return found


def reply(_: Path) -> Format:
    def read(parts: Parts) -> None:
        text = parts["reply"].decode(errors="replace")
        step = 7 + len(text) // 100
        for thinking in (False, True):
            pieces, whole = Splitter(thinking, tools=True), Splitter(thinking, tools=True)
            found = [
                p for i in range(0, len(text), step) for p in pieces.push(text[i : i + step])
            ] + pieces.finish()
            at_once = whole.push(text) + whole.finish()
            assert _joined(found) == _joined(at_once), "another reply when it is cut"

    return Format([{"reply": REPLY.encode()}, {"reply": b"<think>a</think>b"}], {"reply": "text"}, read)


def _joined(parts: list[Any]) -> list[tuple[str, str]]:
    """Pieces of the same kind in a row are one; a call always begins another."""
    found: list[tuple[str, str]] = []
    for part in parts:
        if found and found[-1][0] == part.kind != "call":
            found[-1] = (part.kind, found[-1][1] + part.text)
        else:
            found.append((part.kind, part.text))
    return [pair for pair in found if pair[1] or pair[0] == "call"]


class _Service:
    """Takes any request whose grammar compiles, and says one word."""

    failure = None

    def __init__(self, grammars: Grammars) -> None:
        self._grammars = grammars

    async def generate(self, request: Request) -> AsyncIterator[Chunk]:
        if request.grammar is not None:
            self._grammars.mask(request.grammar)
        first = Chunk("Hi", (), None, len(request.prompt), 0, 1)
        yield first
        yield replace(first, text="", finish_reason="stop")

    def stats(self) -> Stats:
        return Stats()

    async def drain(self, timeout_s: float) -> None:
        return None


def http(folder: Path) -> Format:
    words = small_tokenizer(folder)
    put(folder, {"chat_template.jinja": TEMPLATE})
    config = ServerConfig(model_name="whale", api_keys=("key",), max_prompt_tokens=4096, max_new_tokens=64)
    grammars = Grammars(words, words.vocab_size)
    grammars.mask(regex_grammar("a"))  # the first takes a second to set up
    service: Any = _Service(grammars)
    app, loop = make_app(service, words, ChatTemplate(folder), config), asyncio.new_event_loop()

    def read(parts: Parts) -> None:
        status = loop.run_until_complete(_answered(app, parts))
        assert status < 500, f"status {status}"
        if status >= 400:
            raise Refused(str(status))

    text, chat = b"/v1/completions", b"/v1/chat/completions"
    bodies = [
        (text, {"prompt": "Hello", "max_tokens": 4, "temperature": 0.5, "stop": ["a"], "seed": 3,
        "top_p": 0.9}),
        (text, {"prompt": [[1, 2], [3]], "n": 2, "logprobs": 2, "guided_regex": "[a-z]{1,3}",
        "stream": True}),
        (chat, {"messages": CHAT, "tools": [TOOL], "tool_choice": "auto", "max_completion_tokens": 4,
        "top_k": 4}),
        (chat, {"messages": [*CHAT, {"role": "user", "content": [{"type": "text", "text": "x"}]}],
        "model": "whale",
                "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}},
                "chat_template_kwargs": {"thinking": True}, "stream": True,
                "stream_options": {"include_usage": True}}),
    ]  # fmt: skip
    seeds = [
        {"body": dump(b), "path": path, "key": b"Bearer key", "type": b"application/json"}
        for path, b in bodies
    ]
    return Format(seeds, {"body": "json", "path": "binary", "key": "binary", "type": "binary"}, read)


async def _answered(app: Any, parts: Parts) -> int:
    path = parts["path"].decode("latin-1")
    headers = [(b"content-type", parts["type"]), (b"authorization", parts["key"])]
    scope = {"type": "http", "method": "POST", "path": path, "raw_path": parts["path"], "query_string": b""}
    scope |= {
        "headers": headers,
        "http_version": "1.1",
        "scheme": "http",
        "server": ("x", 80),
        "root_path": "",
    }
    status, given = 0, False

    async def receive() -> dict[str, Any]:
        nonlocal given
        if given:
            await asyncio.Event().wait()  # the client stays
        given = True
        return {"type": "http.request", "body": parts["body"], "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        nonlocal status
        status = message.get("status", status)

    await app(scope, receive, send)
    return status


FORMATS: dict[str, Callable[[Path], Format]] = {
    f.__name__: f for f in (settings, prompts, grammar, reply, http)
}
