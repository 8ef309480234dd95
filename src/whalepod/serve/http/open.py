"""A folder served until a signal comes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from whalepod.serve.http.config import ServerConfig
from whalepod.serve.http.server import make_app, run_server
from whalepod.serve.request import Sampling
from whalepod.serve.start import EngineConfig, open_engine
from whalepod.spec.errors import UserError
from whalepod.text.chat import ChatTemplate


@dataclass(frozen=True)
class ServerOptions:
    """model_name: None is the folder's. drain_s: for what runs to finish, on SIGTERM."""

    host: str = "127.0.0.1"
    port: int = 8000
    model_name: str | None = None
    api_keys: tuple[str, ...] = ()
    drain_s: float = 30.0


def serve_forever(config: EngineConfig, options: ServerOptions, say: Callable[[str], Any]) -> None:
    """Serves until SIGTERM or SIGINT, then drains. On ranks that follow it returns with the first one's end.

    Raises UserError for what cannot be served, before anything is loaded.
    """
    folder = Path(config.path)
    defaults = _defaults(folder)
    with open_engine(config, say) as engine:
        if engine is None:
            return
        spec, room = engine.spec, engine.max_tokens
        context = min(spec.max_position_embeddings, room)
        server = ServerConfig(
            model_name=options.model_name or folder.resolve().name,
            api_keys=options.api_keys,
            sampling=defaults,
            add_bos=_json(folder / "tokenizer_config.json").get("add_bos_token") is True,
            max_prompt_tokens=context,
            max_new_tokens=context,
            max_context_tokens=context,
            max_concurrent=engine.max_running + config.max_waiting,
            drain_timeout_s=options.drain_s,
        )
        app = make_app(engine, engine.tokenizer, _chat(folder, say), server)

        def started(url: str) -> None:
            say(f"serving {server.model_name} at {url} (API: {url}/v1, a page to chat on: {url}/)")

        run_server(app, options.host, options.port, on_start=started)


def _chat(folder: Path, say: Callable[[str], Any]) -> ChatTemplate | None:
    try:
        return ChatTemplate(folder)
    except UserError:
        say("no chat template: /v1/chat/completions is refused, /v1/completions works")
        return None


def _defaults(folder: Path) -> Sampling:
    """What holds where a request says nothing: the API's own defaults, under the folder's generation
    config."""
    found = _json(folder / "generation_config.json")
    wanted = {"temperature": 1.0}
    for name in ("temperature", "top_p", "top_k", "repetition_penalty"):
        value = found.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            wanted[name] = value
    if found.get("do_sample") is False:
        wanted["temperature"] = 0.0
    return Sampling(**wanted)  # type: ignore[arg-type]


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes()) if path.is_file() else {}
    except (OSError, ValueError, RecursionError):
        raise UserError(f"{path} is not JSON") from None
    return found if isinstance(found, dict) else {}
