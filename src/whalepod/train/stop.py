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
        """Signals are noted while this lasts (a third is a KeyboardInterrupt); elsewhere than in the main
        thread none arrives."""
        with _handled(lambda number: None, self):
            yield self


@contextmanager
def passed_on() -> Iterator[StopRequest]:
    """This process waits for workers: what asks it to end asks them."""
    request = StopRequest()

    def ask_workers(number: int) -> None:
        for child in multiprocessing.active_children():
            if child.pid is not None:
                with suppress(ProcessLookupError):
                    os.kill(child.pid, number)

    with _handled(ask_workers, request):
        yield request


@contextmanager
def _handled(act: Callable[[int], None], request: StopRequest) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    times = 0

    def handler(number: int, _frame: FrameType | None) -> None:
        nonlocal times
        times += 1
        if times > 2:
            raise KeyboardInterrupt
        request.number = number
        act(number)

    before = {number: signal.signal(number, handler) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
