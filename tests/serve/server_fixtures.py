"""A server over HTTP on a free port, with a fake service behind it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from signal import SIGTERM
from typing import Any

import httpx
from fake_service import FakeService

from whalepod.serve.http.server import Server, ServerConfig, make_app


@dataclass
class Running:
    url: str
    service: FakeService
    server: Server
    thread: threading.Thread

    def post(self, path: str = "/v1/completions", json: Any = None, **more: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=json, timeout=30, **more)

    def get(self, path: str, **more: Any) -> httpx.Response:
        return httpx.get(self.url + path, timeout=30, **more)

    def metric(self, name: str) -> float:
        lines = self.get("/metrics").text.splitlines()
        return next(float(line.split()[-1]) for line in lines if line.startswith(name))


def wait_for(condition: Callable[[], object]) -> None:
    """Until it holds; ten seconds are a failure."""
    pause = threading.Event()
    for _ in range(1000):
        if condition():
            return
        pause.wait(0.01)
    raise AssertionError("it did not come about")


@contextmanager
def running(tokenizer: Any, chat: Any, **config: Any) -> Iterator[Running]:
    service = FakeService(tokenizer)
    app = make_app(service, tokenizer, chat, ServerConfig(**{"model_name": "whale", **config}))
    started = threading.Event()
    server = Server(app, "127.0.0.1", 0, lambda _: started.set())
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    assert started.wait(10)
    try:
        yield Running(server.url, service, server, thread)
    finally:
        service.hold.clear()
        server.handle_exit(SIGTERM, None)
        thread.join(20)
        assert not thread.is_alive()
