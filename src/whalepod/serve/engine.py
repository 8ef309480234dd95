"""The engine as others use it: requests from any thread or event loop, text back as it is written.

One thread runs the model, step after step; what is asked meanwhile waits in an inbox that it empties between
two steps. If a step fails the engine is broken: everyone who waits gets the error, and so does who comes
later.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from queue import SimpleQueue

from whalepod.serve.core import Job
from whalepod.serve.fleet import Fleet
from whalepod.serve.output import Output
from whalepod.serve.picked import Mask
from whalepod.serve.request import Busy, Chunk, Draining, FinishReason, Request, Stats
from whalepod.spec.errors import UserError
from whalepod.spec.model import ModelSpec
from whalepod.text.tokenizer import Tokenizer

Event = Chunk | BaseException
HEARTBEAT_S = 30.0


@dataclass(eq=False)
class _Stream:
    """A request and who waits for it: `put` may be called from the engine's thread."""

    request: Request
    put: Callable[[Event], None]
    output: Output
    mask: Mask | None
    job: Job | None = None


class Engine:
    """Serves a model (a Fleet) and its tokenizer. max_waiting: requests that may wait for their turn."""

    def __init__(self, fleet: Fleet, tokenizer: Tokenizer, max_waiting: int = 1024) -> None:
        self._fleet, self.tokenizer, self._max_waiting = fleet, tokenizer, max_waiting
        self._ends = frozenset() if tokenizer.eos_id is None else frozenset({tokenizer.eos_id})
        self._wake = threading.Condition()
        self._inbox: deque[Callable[[], None]] = deque()
        self._open: set[_Stream] = set()  # not over, those in the inbox too
        self._by_job: dict[int, _Stream] = {}
        self._draining = self._stopping = False
        self._stats = fleet.stats()
        self.failure: BaseException | None = None
        self._thread = threading.Thread(target=self._live, name="engine", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------------- for those who ask

    async def generate(self, request: Request) -> AsyncIterator[Chunk]:
        """Chunks of the output as they come. Closing the iterator ends the request.

        Raises at the first step UserError for what cannot be done, Busy for a full queue, Draining.
        """
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[Event]()

        def put(event: Event) -> None:
            with suppress(RuntimeError):  # the loop is closed by now: nobody waits
                loop.call_soon_threadsafe(queue.put_nowait, event)

        mask = None if request.grammar is None else await asyncio.to_thread(self._mask, request)
        stream = self._submit(request, put, mask)
        try:
            while True:
                chunk = _chunk(await queue.get())
                yield chunk
                if chunk.finish_reason is not None:
                    return
        finally:
            self._leave(stream)

    def stream(self, request: Request) -> Iterator[Chunk]:
        """The same for callers without an event loop."""
        queue: SimpleQueue[Event] = SimpleQueue()
        stream = self._submit(request, queue.put, self._mask(request))
        try:
            while True:
                chunk = _chunk(queue.get())
                yield chunk
                if chunk.finish_reason is not None:
                    return
        finally:
            self._leave(stream)

    def complete(
        self, requests: Iterable[Request], on_done: Callable[[int, str], None] | None = None
    ) -> list[tuple[str, FinishReason]]:
        """Texts of many requests, all at once, in their order. on_done: called with number and text of each
        as it ends. The queue's limit does not hold for these."""
        queue: SimpleQueue[tuple[int, Event]] = SimpleQueue()
        texts: dict[int, str] = {}
        reasons: dict[int, FinishReason] = {}
        streams = []
        try:
            for number, request in enumerate(requests):
                texts[number] = ""

                def put(event: Event, number: int = number) -> None:
                    queue.put((number, event))

                streams.append(self._submit(request, put, self._mask(request), limited=False))
            while len(reasons) < len(texts):
                number, event = queue.get()
                chunk = _chunk(event)
                texts[number] += chunk.text
                if chunk.finish_reason is not None:
                    reasons[number] = chunk.finish_reason
                    if on_done is not None:
                        on_done(number, texts[number])
        finally:
            for stream in streams:
                self._leave(stream)
        return [(texts[number], reasons[number]) for number in texts]

    @property
    def spec(self) -> ModelSpec:
        return self._fleet.spec

    @property
    def max_tokens(self) -> int:
        """That the cache holds of one sequence."""
        return self._fleet.config.num_pages * self._fleet.config.page_size

    @property
    def max_running(self) -> int:
        return self._fleet.max_running

    def check(self, request: Request) -> None:
        """Raises UserError for what the model or the cache cannot take."""
        self._fleet.check(request)

    @property
    def token_bytes(self) -> float:
        """Of a token's rows in the caches of this device."""
        return self._fleet.token_bytes

    def stats(self) -> Stats:
        """As of the end of the last step; who waits includes the inbox."""
        stats = self._stats
        return replace(stats, waiting=max(stats.waiting, len(self._open) - stats.running))

    async def drain(self, timeout_s: float) -> None:
        """Takes no more requests, lets those there finish, and ends; what is left by then is aborted."""
        await asyncio.to_thread(self.close, timeout_s)

    def close(self, timeout_s: float = 0.0) -> None:
        """`drain` for callers without an event loop."""
        with self._wake:
            self._draining = True
            self._wake.wait_for(lambda: not self._open or self.failure is not None, timeout_s)
            self._stopping = True
            self._wake.notify_all()
        self._thread.join()

    # ------------------------------------------------------------------- between the two

    def _mask(self, request: Request) -> Mask | None:
        """Compiled by who asks, and not by the thread on which everyone waits."""
        return None if request.grammar is None else self._fleet.make_mask(request.grammar)

    def _submit(
        self, request: Request, put: Callable[[Event], None], mask: Mask | None, limited: bool = True
    ) -> _Stream:
        stream = _Stream(request, put, Output(self.tokenizer, request.stop), mask)
        with self._wake:
            if self.failure is not None:
                raise RuntimeError("the engine is broken") from self.failure
            if self._draining:
                raise Draining("the server is about to end and takes no new requests")
            waiting = len(self._open) - self._fleet.max_running
            if limited and waiting >= self._max_waiting:
                raise Busy(f"{self._max_waiting} requests wait already: try again later")
            self._open.add(stream)
            self._inbox.append(lambda: self._begin(stream))
            self._wake.notify_all()
        return stream

    def _leave(self, stream: _Stream) -> None:
        """Whoever asked is gone; nothing happens if the stream is over."""
        with self._wake:
            if stream in self._open:
                self._inbox.append(lambda: self._abandon(stream))
                self._wake.notify_all()

    # ------------------------------------------------------------------- the engine's thread

    def _live(self) -> None:
        try:
            while True:
                with self._wake:
                    # Not for ever: other ranks wait for the next step, and no collective waits that long.
                    self._wake.wait_for(
                        lambda: self._inbox or self._stopping or not self._fleet.is_idle, HEARTBEAT_S
                    )
                    tasks, stopping = [*self._inbox], self._stopping
                    self._inbox.clear()
                for task in tasks:
                    task()
                if stopping:
                    break
                for job in self._fleet.step():
                    self._tell(self._by_job[id(job)])
                if self._fleet.is_idle:
                    self._fleet.check_integrity()
                self._stats = self._fleet.stats()
            for stream in [*self._by_job.values()]:
                self._fleet.end(stream.job, "abort")  # type: ignore[arg-type]
                self._tell(stream)
            self._fleet.stop()
        except BaseException as error:  # whatever it is, nobody may wait for ever
            self._break(error)

    def _begin(self, stream: _Stream) -> None:
        try:
            # A grammar's end is EOS, and nothing may follow it.
            goes_on = stream.request.ignore_eos and stream.request.grammar is None
            ends = frozenset() if goes_on else self._ends
            stream.job = self._fleet.add(stream.request, ends, stream.mask)
        except UserError as error:
            self._over(stream)
            stream.put(error)
            return
        self._by_job[id(stream.job)] = stream

    def _abandon(self, stream: _Stream) -> None:
        if stream in self._open:
            if stream.job is not None:
                self._fleet.end(stream.job, "abort")
            self._over(stream)

    def _over(self, stream: _Stream) -> None:
        if stream.job is not None:
            del self._by_job[id(stream.job)]
        with self._wake:
            self._open.remove(stream)
            self._wake.notify_all()

    def _tell(self, stream: _Stream) -> None:
        """Passes on what a step brought."""
        job, output, request = stream.job, stream.output, stream.request
        assert job is not None
        picked, job.picked = job.picked, []
        sequence, text = job.sequence, ""
        after = sequence.num_new - len(picked)  # tokens of the output, those of this step one by one
        for place, each in enumerate(picked):
            after += 1
            if each.token not in job.ends:
                text += output.push([each.token])
            if output.stopped:
                picked = picked[: place + 1]
                break
        if output.stopped:
            self._fleet.end(job, "stop")
        if job.reason is not None:
            text += output.finish()
            if output.stopped:
                job.reason = "stop"
            self._over(stream)
        stream.put(
            Chunk(
                text,
                output.infos(picked, request.logprobs is not None),
                job.reason,
                sequence.num_prompt,
                sequence.cached,
                after,
            )
        )

    def _break(self, error: BaseException) -> None:
        with self._wake:
            self.failure = error
            waiting = [*self._open]
            self._open.clear()
            self._wake.notify_all()
        for stream in waiting:
            stream.put(error)


def _chunk(event: Event) -> Chunk:
    if isinstance(event, BaseException):
        raise event
    return event
