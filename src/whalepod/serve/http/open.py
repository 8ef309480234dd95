"""A folder served: until a signal comes, or beside what else this process does."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from whalepod.serve.http.config import ServerConfig
from whalepod.serve.http.server import Server, make_app
from whalepod.serve.request import Sampling
from whalepod.serve.start import EngineConfig, Say, open_engine
from whalepod.spec.errors import UserError
from whalepod.text.chat import ChatTemplate
from whalepod.text.lines import read_settings


@dataclass(frozen=True)
class ServerOptions:
    """model_name: None is the folder's. drain_s: for what runs to finish, on SIGTERM."""

    host: str = "127.0.0.1"
    port: int = 8000
    model_name: str | None = None
    api_keys: tuple[str, ...] = ()
    drain_s: float = 30.0


def serve_forever(config: EngineConfig, options: ServerOptions, say: Say) -> None:
    """Serves until SIGTERM or SIGINT, then drains. On ranks that follow it returns with the first one's end.

    Raises UserError for what cannot be served, before anything is loaded.
    """
    with open_server(config, options, say) as server:
        if server is not None:
            server.run()


@contextmanager
def background_server(config: EngineConfig, options: ServerOptions, say: Say) -> Iterator[str | None]:
    """The URL of a server that a thread of this process runs meanwhile; None as in `open_server`."""
    with open_server(config, options, say) as server:
        if server is None:
            yield None
            return
        thread = threading.Thread(target=server.run, name="server", daemon=True)
        thread.start()
        try:
            while not server.started and thread.is_alive():
                time.sleep(0.01)
            yield server.url
        finally:
            server.handle_exit(signal.SIGTERM, None)
            thread.join()


@contextmanager
def open_server(config: EngineConfig, options: ServerOptions, say: Say) -> Iterator[Server | None]:
    """A server with its engine, ready to run; None on ranks that follow, when they are through."""
    folder = Path(config.path)
    defaults = _defaults(folder)
    with open_engine(config, say) as engine:
        if engine is None:
            yield None
            return
        spec, room = engine.spec, engine.max_tokens
        context = min(spec.max_position_embeddings, room)
        server = ServerConfig(
            model_name=options.model_name or folder.resolve().name,
            api_keys=options.api_keys,
            sampling=defaults,
            add_bos=read_settings(folder / "tokenizer_config.json").get("add_bos_token") is True,
            max_prompt_tokens=context,
            max_new_tokens=context,
            max_context_tokens=context,
            max_concurrent=engine.max_running + config.max_waiting,
            drain_timeout_s=options.drain_s,
        )
        if not options.api_keys and options.host not in ("127.0.0.1", "::1", "localhost"):
            say(f"no --api-key: whoever reaches {options.host} may use this server")
        app = make_app(engine, engine.tokenizer, _chat(folder, say), server)

        def started(url: str) -> None:
            say(f"serving {server.model_name} at {url} (API: {url}/v1, a page to chat on: {url}/)")

        yield Server(app, options.host, options.port, started)


def _chat(folder: Path, say: Say) -> ChatTemplate | None:
    try:
        return ChatTemplate(folder)
    except UserError:
        say("no chat template: /v1/chat/completions is refused, /v1/completions works")
        return None


def _defaults(folder: Path) -> Sampling:
    """What holds where a request says nothing: of the folder's generation config, else the API's own."""
    found = read_settings(folder / "generation_config.json")
    wanted = {"temperature": 1.0}
    for name in ("temperature", "top_p", "top_k", "repetition_penalty"):
        value = found.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            wanted[name] = value
    if found.get("do_sample") is False:
        wanted["temperature"] = 0.0
    return Sampling(**wanted)  # type: ignore[arg-type]
