"""The HTTP server: an OpenAI-compatible API, its health and metrics, and a page to chat on."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import importlib.resources
import logging
import re
import socket
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn
from fastapi import Depends, FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from whalepod.serve.http import metrics as server_metrics
from whalepod.serve.http.api_error import ApiError
from whalepod.serve.http.config import ServerConfig
from whalepod.serve.http.connection import patient_connection
from whalepod.serve.http.gate import Gate
from whalepod.serve.http.generation import Generation
from whalepod.serve.http.job import JobMaker
from whalepod.serve.request import Service
from whalepod.spec.errors import UserError
from whalepod.text.chat import ChatTemplate
from whalepod.text.tokenizer import Tokenizer

FLUSH_S = 5  # for the last bytes of answers, once the engine has ended

log = logging.getLogger(__name__)


def make_app(
    service: Service, tokenizer: Tokenizer, chat: ChatTemplate | None, config: ServerConfig
) -> FastAPI:
    """The application. `app.state.drain()` lets what runs finish and takes nothing new."""
    app = FastAPI(title="whalepod", docs_url=None, redoc_url=None, openapi_url=None)
    metrics = server_metrics.Metrics(service)
    gate = Gate(service, config, metrics)
    maker = JobMaker(tokenizer, chat, config)
    common = (service, tokenizer, config, gate, metrics)
    chats = Generation(*common, maker.chat, chat=True)
    texts = Generation(*common, maker.completion, chat=False)
    app.router.routes.append(Route("/v1/chat/completions", chats, methods=["POST"]))
    app.router.routes.append(Route("/v1/completions", texts, methods=["POST"]))
    app.add_middleware(_Counted, metrics=metrics, routes=app.routes)
    app.add_exception_handler(ApiError, _tell)
    app.add_exception_handler(HTTPException, _tell_http)
    app.add_exception_handler(UserError, lambda _, error: _tell(_, chats.known(error)))
    app.add_exception_handler(Exception, lambda _, __: _tell(_, ApiError(500, "the server failed")))
    with_key = [Depends(gate.check_key)]
    model = {"id": config.model_name, "object": "model", "created": int(time.time()), "owned_by": "whalepod"}
    model["max_model_len"] = config.max_context_tokens or config.max_prompt_tokens + config.max_new_tokens
    page, page_headers = _page()

    @app.get("/v1/models", dependencies=with_key)
    async def models() -> Any:
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{name:path}", dependencies=with_key)
    async def one_model(name: str) -> Any:
        if name != config.model_name:
            raise ApiError(404, f"there is no model {name[:100]!r}", param="model", code="model_not_found")
        return model

    @app.get("/health")
    async def health() -> Any:
        if service.failure is not None:
            raise ApiError(503, "the engine is broken", code="broken")
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> Any:
        gate.check_ready()
        return {"status": "ready"}

    @app.get("/metrics", dependencies=with_key)
    async def metrics_text() -> Response:
        return Response(metrics.text(), headers={"Content-Type": server_metrics.CONTENT_TYPE})

    @app.get("/")
    async def chat_page() -> Response:
        return HTMLResponse(page, headers=page_headers)

    async def drain() -> None:
        gate.draining = True
        # The engine keeps to its time; one that does not is left.
        await asyncio.wait_for(service.drain(config.drain_timeout_s), config.drain_timeout_s + FLUSH_S)

    app.state.drain = drain
    app.state.config = config
    return app


def run_server(
    app: FastAPI,
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    on_start: Callable[[str], None] | None = None,
) -> None:
    """Serves until SIGTERM or SIGINT, then drains and returns; a second signal ends it at once.

    on_start is told the URL, once connections are taken: with port 0 it names the port that was free.
    """
    Server(app, host, port, on_start).run()


class Server(uvicorn.Server):
    """uvicorn, except that a signal begins a drain: meanwhile /ready says so, and running answers go on.

    It listens once it is made, on `url`; `run` answers.
    """

    def __init__(
        self, app: FastAPI, host: str, port: int, on_start: Callable[[str], None] | None = None
    ) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = _listener(family, host, port)
        shown = f"[{host}]" if family == socket.AF_INET6 else host
        self.url = f"http://{shown}:{self._listener.getsockname()[1]}"
        self._drain, self._on_start = app.state.drain, on_start
        self._told_to_end = False
        self._draining: asyncio.Task[None] | None = None
        settings = uvicorn.Config(
            app,
            http=patient_connection(app.state.config.head_timeout_s),
            ws="none",
            lifespan="off",
            loop="asyncio",
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=app.state.config.max_connections,
            timeout_graceful_shutdown=FLUSH_S,
        )
        super().__init__(settings)

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        super().run(sockets or [self._listener])

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._told_to_end:
            self.should_exit = self.force_exit = True
        self._told_to_end = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self._on_start:
            self._on_start(self.url)

    async def on_tick(self, counter: int) -> bool:
        if self._told_to_end and self._draining is None:
            self._draining = asyncio.create_task(self._drain())
        if self._draining and self._draining.done():
            if error := self._draining.exception():
                log.error("the engine did not drain", exc_info=error)
            return True
        return await super().on_tick(counter)


def _listener(family: socket.AddressFamily, host: str, port: int) -> socket.socket:
    # asyncio sets TCP_NODELAY on connections of a socket that names its protocol: without it a stream's first
    # event waits 40 ms, until the client has acknowledged the head.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot listen on {host}, port {port}: {reason}") from None
    return listener


class _Counted:
    """Counts each answer by endpoint and status; one that the client did not wait for is a 499."""

    def __init__(self, app: ASGIApp, metrics: server_metrics.Metrics, routes: list[BaseRoute]) -> None:
        self._app, self._metrics, self._routes = app, metrics, routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 499

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, counted)
        except Exception:
            status = 500
            raise
        finally:
            known = [path for route in self._routes if (path := getattr(route, "path", "")) == scope["path"]]
            self._metrics.answered(known[0] if known else "other", status)  # strangers make up no labels


def _tell(_: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body(), error.status, headers=error.headers)


def _tell_http(_: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _tell(_, ApiError(error.status_code, str(error.detail), headers=dict(error.headers or {})))


def _page() -> tuple[str, dict[str, str]]:
    """The chat page, and headers that let it run its own script and nothing else."""
    page = importlib.resources.files("whalepod.serve.http").joinpath("page.html").read_text("utf-8")
    hashes = {
        kind: base64.b64encode(hashlib.sha256(found[1].encode()).digest()).decode()
        for kind in ("script", "style")
        if (found := re.search(f"<{kind}>(.*?)</{kind}>", page, re.DOTALL))
    }
    policy = (
        f"default-src 'none'; script-src 'sha256-{hashes['script']}'; style-src 'sha256-{hashes['style']}'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return page, {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff"}
