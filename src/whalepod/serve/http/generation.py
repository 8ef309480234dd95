"""One HTTP request that generates, from its body to its last byte.

Whatever ends it, be it the client's going, an error or the time limit, closes the engine's iterators: nobody
generates for no one.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from typing import Any, cast

import anyio
import anyio.to_thread
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from whalepod.serve.http.answers import Answer
from whalepod.serve.http.api_error import ApiError
from whalepod.serve.http.body import read_body
from whalepod.serve.http.config import ServerConfig
from whalepod.serve.http.gate import Gate
from whalepod.serve.http.job import Job
from whalepod.serve.http.metrics import Metrics
from whalepod.serve.request import Busy, Chunk, Draining, Service
from whalepod.spec.errors import UserError
from whalepod.text.tokenizer import Tokenizer

LARGE_BODY_BYTES = 32 << 10  # from here on a thread reads it
THREADS = 2  # for such: a flood of them leaves the rest of the machine alone

log = logging.getLogger(__name__)


class Generation:
    """The ASGI application of an endpoint that generates. make: a job of a body."""

    def __init__(
        self,
        service: Service,
        tokenizer: Tokenizer,
        config: ServerConfig,
        gate: Gate,
        metrics: Metrics,
        make: Callable[[bytes], Job],
        chat: bool,
    ) -> None:
        self._service, self._tokenizer, self._config = service, tokenizer, config
        self._gate, self._metrics, self._make, self._chat = gate, metrics, make, chat
        self._threads = anyio.CapacityLimiter(THREADS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        http, since = HttpRequest(scope, receive), time.perf_counter()
        self._gate.check_key(http)
        with self._gate.admitted():
            try:
                body = await read_body(http, self._config.max_body_bytes, self._config.body_timeout_s)
                await _unless_gone(receive, self._answer(body, since, scope, receive, send))
            except ClientDisconnect:
                return  # nobody is there to be told
        self._metrics.finished(time.perf_counter() - since)

    async def _answer(self, body: bytes, since: float, scope: Scope, receive: Receive, send: Send) -> None:
        job = await self._job(body)
        self._gate.check_ready()  # it may have begun to drain meanwhile
        answer = Answer(job, self._config.model_name, self._tokenizer, self._chat)
        clocks = [self._metrics.clock(since) for _ in job.requests]
        stream = _EventStream(send, self._config.send_timeout_s)

        async def take(index: int, chunk: Chunk) -> None:
            clocks[index].saw(chunk)
            events = answer.take(index, chunk)
            if job.stream:
                await stream.send(events)

        try:
            async with asyncio.timeout(self._config.request_timeout_s):
                await self._run(job, take)
            if not job.stream:
                await JSONResponse(answer.whole())(scope, receive, send)
                return
            if job.include_usage:
                await stream.send([answer.usage_event()])
            await stream.end("[DONE]")
        except Exception as error:
            if isinstance(error, ClientDisconnect):
                raise
            known = self.known(error)
            if not stream.begun:
                raise known from None
            await stream.end(json.dumps(known.body()))

    async def _job(self, body: bytes) -> Job:
        if len(body) < LARGE_BODY_BYTES:
            return self._make(body)
        return await anyio.to_thread.run_sync(self._make, body, limiter=self._threads)

    async def _run(self, job: Job, take: Callable[[int, Chunk], Awaitable[None]]) -> None:
        """All sequences at once; the first error ends them all."""

        async def run(index: int) -> None:
            chunks = cast(AsyncGenerator[Chunk], self._service.generate(job.requests[index]))
            reason = None
            try:
                async for chunk in chunks:
                    reason = chunk.finish_reason
                    await take(index, chunk)
            finally:
                await chunks.aclose()
            if reason is None:
                raise RuntimeError("the engine ended a sequence without a reason")

        tasks = [asyncio.create_task(run(index)) for index in range(len(job.requests))]
        try:
            await asyncio.gather(*tasks)
        finally:
            await _cancelled(*tasks)

    def known(self, error: Exception) -> ApiError:
        """What a client is told of an error."""
        if isinstance(error, ApiError):
            return error
        if isinstance(error, Busy):
            return self._gate.later(429, str(error), "busy")
        if isinstance(error, Draining):
            return self._gate.later(503, str(error), "draining")
        if isinstance(error, UserError):
            return ApiError(400, str(error))
        if isinstance(error, TimeoutError):
            return ApiError(504, f"the answer took longer than {self._config.request_timeout_s:g} s")
        log.error("a request failed", exc_info=error)
        return ApiError(500, "the server failed at this request; its log says more")


class _EventStream:
    """Server-sent events. The response begins with the first, so that an error before has its own status."""

    def __init__(self, send: Send, timeout_s: float) -> None:
        self._send, self._timeout_s = send, timeout_s
        self.begun = False

    async def send(self, events: list[dict[str, Any]]) -> None:
        if events:
            await self._write([json.dumps(event, allow_nan=False) for event in events], more=True)

    async def end(self, last: str) -> None:
        await self._write([last], more=False)

    async def _write(self, lines: list[str], more: bool) -> None:
        data = "".join(f"data: {line}\n\n" for line in lines).encode()
        try:
            async with asyncio.timeout(self._timeout_s):
                if not self.begun:
                    self.begun = True
                    await self._send(
                        {"type": "http.response.start", "status": 200, "headers": _STREAM_HEADERS}
                    )
                await self._send({"type": "http.response.body", "body": data, "more_body": more})
        except TimeoutError:
            raise ClientDisconnect from None  # it reads no more: as good as gone


_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would hold events back
]


async def _unless_gone(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Does `work` while the client is there. Raises ClientDisconnect when it has gone."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, watching = asyncio.create_task(work), asyncio.create_task(gone())
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
    finally:
        await _cancelled(working, watching)
    working.result()


async def _cancelled(*tasks: asyncio.Task[Any]) -> None:
    """Cancels what still runs and waits for its end."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
