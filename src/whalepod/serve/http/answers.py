"""The engine's chunks as OpenAI's objects: events of a stream, or one answer at the end.

Both come from the same deltas, so that a stream adds up to what the whole answer says.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable
from typing import Any, Protocol

from whalepod.serve.http.api_error import ApiError
from whalepod.serve.http.job import Job
from whalepod.serve.http.reply import Part, Reader
from whalepod.serve.request import Chunk, TokenInfo
from whalepod.text.tokenizer import BYTE_OF_CHARACTER, Tokenizer

LOWEST_LOGPROB = -9999.0  # OpenAI's word for minus infinity, which JSON cannot say

Json = dict[str, Any]


class Answer:
    """The answer to one job, built chunk by chunk."""

    def __init__(self, job: Job, model: str, tokenizer: Tokenizer, chat: bool) -> None:
        self._job, self._chat = job, chat
        self._common = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }
        wanted = job.requests[0].logprobs is not None
        self._choices: list[_Choice] = [
            _ChatChoice(tokenizer, wanted, job.reader()) if chat else _TextChoice(tokenizer, wanted)
            for _ in job.requests
        ]
        self._last: list[Chunk | None] = [None] * len(job.requests)

    def take(self, index: int, chunk: Chunk) -> list[Json]:
        """Adds a chunk of one sequence; the events that tell a stream's reader of it.

        Raises ApiError if the engine gave the sequence up."""
        if chunk.finish_reason == "abort":
            raise ApiError(503, "the engine ended before the answer was complete", code="aborted")
        first, self._last[index] = self._last[index] is None, chunk
        choice = self._choices[index]
        deltas = choice.begin() if first else []
        deltas += choice.take(chunk)
        return [self._event([{"index": index, **delta}]) for delta in deltas]

    def usage_event(self) -> Json:
        return self._event([]) | {"usage": self.usage()}

    def usage(self) -> Json:
        done = [chunk for chunk in self._last if chunk]
        first = [chunk for chunk in self._last[:: self._job.n] if chunk]  # choices share their prompt
        prompt, new = self._job.prompt_tokens, sum(chunk.new_tokens for chunk in done)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": new,
            "total_tokens": prompt + new,
            "prompt_tokens_details": {"cached_tokens": sum(chunk.cached_tokens for chunk in first)},
        }

    def whole(self) -> Json:
        choices = [{"index": index, **choice.whole()} for index, choice in enumerate(self._choices)]
        kind = "chat.completion" if self._chat else "text_completion"
        return {**self._common, "object": kind, "choices": choices, "usage": self.usage()}

    def _event(self, choices: list[Json]) -> Json:
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        event = {**self._common, "object": kind, "choices": choices}
        return event | {"usage": None} if self._job.include_usage else event


class _Choice(Protocol):
    def begin(self) -> list[Json]: ...

    def take(self, chunk: Chunk) -> list[Json]:
        """What a chunk changes, as events say it."""
        ...

    def whole(self) -> Json: ...


class _TextChoice:
    """A choice of completions."""

    def __init__(self, tokenizer: Tokenizer, logprobs: bool) -> None:
        self._tokenizer, self._wanted = tokenizer, logprobs
        self._text = ""
        self._offset = 0
        self._logprobs: Json = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        self._reason: str | None = None

    def begin(self) -> list[Json]:
        return []

    def take(self, chunk: Chunk) -> list[Json]:
        self._text += chunk.text
        self._reason = chunk.finish_reason
        found = self._list(chunk.tokens) if self._wanted else None
        if not chunk.text and not chunk.finish_reason and not (found and found["tokens"]):
            return []
        return [{"text": chunk.text, "logprobs": found, "finish_reason": chunk.finish_reason}]

    def whole(self) -> Json:
        logprobs = self._logprobs if self._wanted else None
        return {"text": self._text, "logprobs": logprobs, "finish_reason": self._reason}

    def _list(self, tokens: Iterable[TokenInfo]) -> Json:
        found: Json = {name: [] for name in self._logprobs}
        for token in tokens:
            found["tokens"].append(token.text)
            found["token_logprobs"].append(_finite(token.logprob))
            found["top_logprobs"].append({text: _finite(logprob) for _, text, logprob in reversed(token.top)})
            found["text_offset"].append(self._offset)
            self._offset += len(token.text)
        for name, values in found.items():
            self._logprobs[name] += values
        return found


class _ChatChoice:
    """A choice of chat completions."""

    def __init__(self, tokenizer: Tokenizer, logprobs: bool, reader: Reader) -> None:
        self._tokenizer, self._wanted, self._reader = tokenizer, logprobs, reader
        self._message: Json = {"role": "assistant", "content": None}
        self._logprobs: list[Json] = []
        self._untold: list[Json] = []  # logprobs of tokens whose text is held back
        self._reason: str | None = None

    def begin(self) -> list[Json]:
        return [{"delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}]

    def take(self, chunk: Chunk) -> list[Json]:
        if self._wanted:
            self._untold += [self._entry(token) for token in chunk.tokens]
        parts = self._reader.push(chunk.text)
        if chunk.finish_reason:
            parts += self._reader.finish()
        delta = self._delta(parts)
        events: list[Json] = []
        if delta or (chunk.finish_reason and self._untold):
            told = {"content": self._untold} if self._wanted else None
            self._logprobs += self._untold
            self._untold = []
            events.append({"delta": delta, "logprobs": told, "finish_reason": None})
        if chunk.finish_reason:
            called = "tool_calls" in self._message and chunk.finish_reason == "stop"
            self._reason = "tool_calls" if called else chunk.finish_reason
            events.append({"delta": {}, "logprobs": None, "finish_reason": self._reason})
        return events

    def whole(self) -> Json:
        message = dict(self._message)
        if message["content"] is None and "tool_calls" not in message:
            message["content"] = ""
        logprobs = {"content": self._logprobs} if self._wanted else None
        return {"message": message, "logprobs": logprobs, "finish_reason": self._reason}

    def _delta(self, parts: list[Part]) -> Json:
        """The parts as one change of the message, which is changed too."""
        delta: Json = {}
        for part in parts:
            if part.kind in ("reasoning", "content"):
                name = "content" if part.kind == "content" else "reasoning_content"
                delta[name] = delta.get(name, "") + part.text
                self._message[name] = (self._message.get(name) or "") + part.text
                continue
            calls = self._message.setdefault("tool_calls", [])
            changes = delta.setdefault("tool_calls", [])
            if part.kind == "call":
                identity = {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function"}
                calls.append({**identity, "function": {"name": part.text, "arguments": ""}})
                function = {"name": part.text, "arguments": ""}
                changes.append({"index": len(calls) - 1, **identity, "function": function})
                continue
            if not changes:
                changes.append({"index": len(calls) - 1, "function": {"arguments": ""}})
            calls[-1]["function"]["arguments"] += part.text
            changes[-1]["function"]["arguments"] += part.text
        return delta

    def _entry(self, token: TokenInfo) -> Json:
        top = [self._named(i, text, logprob) for i, text, logprob in token.top]
        return {**self._named(token.id, token.text, token.logprob), "top_logprobs": top}

    def _named(self, token_id: int, text: str, logprob: float | None) -> Json:
        token_bytes = _bytes(self._tokenizer, token_id, text)
        return {"token": text, "logprob": _finite(logprob), "bytes": list(token_bytes)}


def _finite(logprob: float | None) -> float:
    """What JSON can say; NaN too becomes the lowest."""
    return logprob if logprob is not None and logprob > LOWEST_LOGPROB else LOWEST_LOGPROB


def _bytes(tokenizer: Tokenizer, token_id: int, text: str) -> bytes:
    """A token's bytes, which its text does not tell where they are a piece of a character."""
    token = tokenizer.inner.id_to_token(token_id) if "\ufffd" in text and tokenizer.byte_level else None
    if token is None or not all(character in BYTE_OF_CHARACTER for character in token):
        return text.encode("utf-8", "replace")
    return bytes(BYTE_OF_CHARACTER[character] for character in token)
