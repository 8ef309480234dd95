"""SIGTERM and Ctrl-C end a run between two steps, with a checkpoint."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """number: of the signal that has asked this process to end, or 0."""

    number: int = 0

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Signals are noted while this lasts; elsewhere than in the main thread none arrives."""

        def note(number: int, _frame: FrameType | None) -> None:
            self.number = number

        with _handled(note):
            yield self


@contextmanager
def passed_on() -> Iterator[StopRequest]:
    """This process waits for workers: what asks it to end asks them. A third time ends it at once."""
    request, times = StopRequest(), 0

    def pass_on(number: int, _frame: FrameType | None) -> None:
        nonlocal times
        times += 1
        if times > 2:
            raise KeyboardInterrupt
        request.number = number
        for child in multiprocessing.active_children():
            with suppress(ProcessLookupError, TypeError):
                os.kill(child.pid, number)  # pyright: ignore[reportArgumentType]

    with _handled(pass_on):
        yield request


@contextmanager
def _handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
