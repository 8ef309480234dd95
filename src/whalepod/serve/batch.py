"""Many prompts from a file, continued together: offline throughput."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from whalepod.serve.engine import Engine
from whalepod.serve.request import Request, Sampling
from whalepod.spec.errors import UserError
from whalepod.text.chat import ChatTemplate
from whalepod.text.lines import json_lines
from whalepod.text.tokenizer import Tokenizer

Lines = list[tuple[int, dict[str, Any]]]
"""Objects of a file with their lines' numbers."""


@dataclass(frozen=True)
class BatchResult:
    """What a batch brought; tokens per second over all of it, prompts and new ones apart. lengths: of each
    prompt, and of its answer."""

    requests: int
    prompt_tokens: int
    cached_tokens: int
    new_tokens: int
    seconds: float
    prompt_tokens_per_s: float
    new_tokens_per_s: float
    lengths: list[tuple[int, int]]


def run_batch(
    engine: Engine,
    tokenizer: Tokenizer,
    folder: str | Path,
    lines: Lines,
    out: TextIO,
    max_new_tokens: int,
    sampling: Sampling,
    progress: Callable[[str, int, int], None] | None = None,
) -> BatchResult:
    """Continues prompts and writes a line of JSON for each, in their order.

    A line has a `prompt`, or `messages`, which the folder's chat template writes down, and may have a
    `max_tokens` of its own. Raises UserError, with the line's number, before anything is computed.
    """
    chat = ChatTemplate(folder) if any("messages" in line for _, line in lines) else None
    requests = [_request(n, line, tokenizer, chat, max_new_tokens, sampling) for n, line in lines]
    for (number, _), request in zip(lines, requests, strict=True):
        _check(engine, request, f"line {number}")
    before, start, done = engine.stats(), time.perf_counter(), 0

    def on_done(_number: int, _text: str) -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress("writing", done, len(requests))

    for (_, line), (text, reason) in zip(lines, engine.complete(requests, on_done), strict=True):
        answer = json.dumps({**line, "text": text, "finish_reason": reason}, ensure_ascii=False)
        out.write(answer.encode(errors="backslashreplace").decode() + "\n")  # half a character, as it came
    seconds, after = time.perf_counter() - start, engine.stats()
    prompts = after.prompt_tokens - before.prompt_tokens
    new = after.new_tokens - before.new_tokens
    cached = after.cached_tokens - before.cached_tokens
    # Answers that end early are as long as all of them on average.
    mean = round(new / len(requests))
    lengths = [(len(each.prompt), max(1, min(each.max_new_tokens, mean))) for each in requests]
    return BatchResult(
        len(requests), prompts, cached, new, seconds, prompts / seconds, new / seconds, lengths
    )


def _check(engine: Engine, request: Request, where: str) -> None:
    try:
        engine.check(request)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def read_lines(source: Path) -> Lines:
    """What a `.jsonl` file asks for. Raises UserError."""
    found: Lines = []
    for number, line, _ in json_lines(source):
        prompt = line.get("prompt") if isinstance(line, dict) else None
        messages = line.get("messages") if isinstance(line, dict) else None
        turns = isinstance(messages, list) and messages and all(isinstance(m, dict) for m in messages)
        if isinstance(prompt, str) == bool(turns):
            raise UserError(f'{source}, line {number}: expected {{"prompt": "..."}} or {{"messages": [...]}}')
        found.append((number, line))
    if not found:
        raise UserError(f"{source} holds no prompt")
    return found


def _request(
    number: int,
    line: dict[str, Any],
    tokenizer: Tokenizer,
    chat: ChatTemplate | None,
    max_new_tokens: int,
    sampling: Sampling,
) -> Request:
    wanted = line.get("max_tokens", max_new_tokens)
    if not isinstance(wanted, int) or isinstance(wanted, bool):
        raise UserError(f"line {number}: max_tokens must be a whole number, not {wanted!r}")
    if "messages" in line:
        assert chat is not None
        try:
            ids = tokenizer.encode(chat.render(line["messages"], prompt=True), special=True)
        except UserError as error:
            raise UserError(f"line {number}: {error}") from None
    else:
        ids = tokenizer.encode(line["prompt"])
    return Request(tuple(ids), wanted, sampling)


def shown(result: BatchResult, devices: int) -> str:
    """One line for a terminal."""
    cached = f" ({result.cached_tokens:,} of them cached)" if result.cached_tokens else ""
    return (
        f"{result.requests:,} prompts in {result.seconds:.1f} s on {devices} device{'s' * (devices > 1)}: "
        f"{result.prompt_tokens:,} prompt tokens{cached}, {result.new_tokens:,} new, "
        f"{result.new_tokens_per_s:,.0f} new tokens/s"
    )
