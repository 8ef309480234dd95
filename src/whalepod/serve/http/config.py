"""What an operator decides about the server."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from whalepod.serve.request import Sampling
from whalepod.spec.errors import UserError


@dataclass(frozen=True)
class ServerConfig:
    """Limits of the server; each answers with an error of its own when it is passed.

    Attributes:
        model_name: what clients call the model.
        api_keys: any of them opens everything but /health, /ready and the page; none: no key is asked for.
        sampling: what holds where a request says nothing (of a folder's generation_config.json).
        add_bos: whether the text prompts of completions get BOS (add_bos_token of tokenizer_config.json).
        max_body_bytes: of a request; up to `max_concurrent` of them are held at once.
        max_prompt_tokens: of one prompt.
        max_new_tokens: the most a request may ask for.
        default_max_new_tokens: what it gets if it does not ask, where the context has room for it.
        max_context_tokens: prompt and output together; None: their two limits are all there is.
        max_concurrent: requests that are worked on or wait; beyond, 429.
        max_n: choices for a prompt.
        max_sequences: prompts times choices of a request.
        max_connections: open connections; beyond, 503 before a request is looked at.
        head_timeout_s: for the head of a request to arrive on an open connection.
        body_timeout_s: for a body to arrive.
        send_timeout_s: for a client to take one event of a stream.
        request_timeout_s: for the whole answer.
        drain_timeout_s: on SIGTERM, for what runs to finish.
        retry_after_s: what a 429 or 503 tells the client to wait.
    """

    model_name: str
    api_keys: tuple[str, ...] = ()
    sampling: Sampling = field(default_factory=lambda: Sampling(temperature=1.0))
    add_bos: bool = False
    max_body_bytes: int = 8 << 20
    max_prompt_tokens: int = 32768
    max_new_tokens: int = 32768
    default_max_new_tokens: int = 1024
    max_context_tokens: int | None = None
    max_concurrent: int = 256
    max_n: int = 16
    max_sequences: int = 128
    max_connections: int = 2048
    head_timeout_s: float = 15.0
    body_timeout_s: float = 30.0
    send_timeout_s: float = 60.0
    request_timeout_s: float = 3600.0
    drain_timeout_s: float = 30.0
    retry_after_s: int = 1

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            least = 0 if item.name.endswith("_s") else 1
            if isinstance(value, int | float) and not isinstance(value, bool) and value < least:
                raise UserError(f"{item.name} must be at least {least}, not {value}")
        if not self.model_name:
            raise UserError("model_name must not be empty")
        if any(not key.strip() for key in self.api_keys):
            raise UserError("an API key must not be empty")
