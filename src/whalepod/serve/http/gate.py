"""Who is let in: those with a key, while there is room, as long as the server means to stay."""

from __future__ import annotations

import hmac
from collections.abc import Iterator
from contextlib import contextmanager

from fastapi import Request as HttpRequest

from whalepod.serve.http.api_error import ApiError
from whalepod.serve.http.config import ServerConfig
from whalepod.serve.http.metrics import Metrics
from whalepod.serve.request import Service


class Gate:
    """Raises ApiError for those who are not."""

    def __init__(self, service: Service, config: ServerConfig, metrics: Metrics) -> None:
        self._service, self._config, self._metrics = service, config, metrics
        self._keys = [key.encode() for key in config.api_keys]
        self._inside = 0
        self.draining = False

    def check_key(self, http: HttpRequest) -> None:
        if not self._keys:
            return
        kind, _, given = http.headers.get("authorization", "").partition(" ")
        offered = given.strip().encode("latin-1", "replace")
        # Every key is compared, each in constant time: how long it takes tells nothing.
        matches = [hmac.compare_digest(offered, key) for key in self._keys]
        if kind.lower() != "bearer" or not any(matches):
            message = "an API key is needed: Authorization: Bearer KEY"
            raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    def check_ready(self) -> None:
        if self._service.failure is not None:
            raise ApiError(503, "the engine is broken", code="broken")
        if self.draining:
            raise self.later(503, "the server is shutting down", "draining")

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """Holds one of the places for requests, taken before their bodies are read."""
        self.check_ready()
        if self._inside >= self._config.max_concurrent:
            raise self.later(429, f"{self._inside} requests are being worked on", "busy")
        self._inside += 1
        self._metrics.in_flight(1)
        try:
            yield
        finally:
            self._inside -= 1
            self._metrics.in_flight(-1)

    def later(self, status: int, message: str, code: str) -> ApiError:
        wait = {"Retry-After": str(self._config.retry_after_s)}
        return ApiError(status, f"{message}: try again later", code=code, headers=wait)
