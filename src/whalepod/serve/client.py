"""A client of any OpenAI-compatible server: finds its model, and streams one completion with a clock beside.

What goes wrong with one request is a value, not an exception: under load some do, and they are counted.
"""

from __future__ import annotations

import json
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx

from whalepod.spec.errors import UserError, nearest
from whalepod.spec.model import shown

CONNECT_S = 10.0
READ_S = 600.0  # between two events: a queue may be long
OK = "ok"


@dataclass(frozen=True)
class Answer:
    """One request's. Times in seconds since it was sent.

    outcome: `ok`, an HTTP status, or `connection`, `timeout`, `cut` (it ended without [DONE]), `error` (told
    in the stream) or `malformed`. ttft_s: to the first event with text, None without one; tpot_s: of each
    later token, None where there was none. said: of a failure, by the server.
    """

    outcome: str
    latency_s: float
    ttft_s: float | None = None
    tpot_s: float | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    new_tokens: int = 0
    said: str = ""


def server_url(text: str) -> str:
    """The address without `/v1`, from what a user typed. Raises UserError."""
    try:
        parts = urlsplit(text)
        valid = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # a port that is no number
        valid = False
    if not valid or parts.query or parts.fragment:
        raise UserError(f"{shown(text)} is no server's URL: it must be like http://127.0.0.1:8000")
    return text.rstrip("/").removesuffix("/v1")


def open_client(url: str, api_key: str | None = None, trust_env: bool = True) -> httpx.AsyncClient:
    """trust_env: whether proxies of the environment hold, which a server of this machine is not behind."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        return httpx.AsyncClient(
            base_url=url,
            headers=headers,
            timeout=httpx.Timeout(READ_S, connect=CONNECT_S, pool=None),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
            trust_env=trust_env,
        )
    except (httpx.InvalidURL, ValueError) as error:  # ValueError: a key beyond ASCII, an odd proxy
        raise UserError(f"no client of {shown(url)}: {error}") from None


async def find_model(client: httpx.AsyncClient, wanted: str | None) -> str:
    """The name of the model to ask for. Raises UserError where nothing listens or none has that name."""
    try:
        response = await client.get("/v1/models")
    except httpx.HTTPError as error:
        why = "it does not answer" if isinstance(error, httpx.TimeoutException) else str(error)
        raise UserError(f"no server at {client.base_url}: {why or type(error).__name__}") from None
    if response.status_code != 200:
        raise UserError(f"{client.base_url} answers {response.status_code} at /v1/models: {_said(response)}")
    try:
        names = [str(model["id"]) for model in response.json()["data"]]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{client.base_url} is no OpenAI-compatible server: no list at /v1/models") from None
    if wanted is None:
        if len(names) != 1:
            raise UserError(f"the server has {len(names)} models, name one: {', '.join(names)}")
        return names[0]
    if wanted not in names:
        raise UserError(f"unknown model {shown(wanted)}{nearest(wanted[:100], names)}")
    return wanted


async def complete(client: httpx.AsyncClient, body: dict[str, Any]) -> Answer:
    """Streams one completion, greedily and to its full length unless `body` says otherwise."""
    asked = {"temperature": 0, "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}
    asked |= body
    stream = _Stream()
    outcome, said = "cut", ""
    try:
        async with client.stream("POST", "/v1/completions", json=asked) as response:
            if response.status_code != 200:
                await response.aread()
                outcome, said = str(response.status_code), _said(response)
            else:
                # To the very end, and so the connection can serve again.
                async for line in response.aiter_lines():
                    stream.take(line)
                if stream.error is not None:
                    outcome, said = "error", stream.error
                elif stream.done and stream.finish_reason:
                    outcome = OK
    except httpx.TimeoutException as error:
        outcome, said = "timeout", type(error).__name__
    except httpx.HTTPError as error:
        outcome, said = "connection", str(error) or type(error).__name__
    except (ValueError, TypeError, AttributeError, LookupError) as error:
        outcome, said = "malformed", f"an event that is none: {error}"
    return stream.answer(outcome, said)


class _Stream:
    """The events of one answer, and when they came."""

    def __init__(self) -> None:
        self._sent = time.perf_counter()
        self._first = self._last = 0.0
        self._events = 0
        self._usage: dict[str, Any] = {}
        self.done = False
        self.finish_reason: str | None = None
        self.error: str | None = None

    def take(self, line: str) -> None:
        if not line.startswith("data:"):
            return
        data = line.removeprefix("data:").strip()
        if data == "[DONE]":
            self.done = True
            return
        event = json.loads(data)
        if "error" in event:
            self.error = str(event["error"].get("message", ""))[:200]
            return
        if event.get("choices"):
            self._last = time.perf_counter()
            self._first = self._first or self._last
            self._events += 1
            self.finish_reason = event["choices"][0].get("finish_reason") or self.finish_reason
        self._usage = event.get("usage") or self._usage

    def answer(self, outcome: str, said: str) -> Answer:
        # A server that counts no tokens sends one an event, as a rule.
        new = int(self._usage.get("completion_tokens") or self._events)
        details = self._usage.get("prompt_tokens_details") or {}
        later = self._events > 1 and new > 1
        return Answer(
            outcome,
            time.perf_counter() - self._sent,
            self._first - self._sent if self._events else None,
            (self._last - self._first) / (new - 1) if later else None,
            int(self._usage.get("prompt_tokens") or 0),
            int(details.get("cached_tokens") or 0),
            new,
            said,
        )


def _said(response: httpx.Response) -> str:
    """What a server says of an error, in whichever form."""
    with suppress(ValueError, TypeError, LookupError):
        found = response.json()
        return str(found.get("error", found)["message"])[:200]
    return response.text[:200].strip() or response.reason_phrase
