"""A service that says what it was told to, token by token, and a tokenizer and template like DeepSeek's."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

from tokenizers import AddedToken

from whalepod.serve.request import Busy, Chunk, Draining, Request, Stats, TokenInfo
from whalepod.spec.errors import UserError
from whalepod.text.chat import ChatTemplate
from whalepod.text.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

MARKS = (
    "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>", "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>",
    "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>",
)  # fmt: skip

TEMPLATE = """{{ bos_token }}{% for message in messages %}
{% if message['role'] == 'system' %}{{ message['content'] }}{% endif %}
{% if message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}{% endif %}
{% if message['role'] == 'tool' %}{{ '[' + message['content'] + ']' }}{% endif %}
{% if message['role'] == 'assistant' %}
{% if message['tool_calls'] is defined %}{% for call in message['tool_calls'] %}
{{ '<｜Assistant｜>' + call['function']['name'] + call['function']['arguments'] }}{% endfor %}
{% else %}{{ '<｜Assistant｜>' + message['content'].split('</think>')[-1] + eos_token }}{% endif %}
{% endif %}{% endfor %}{% if tools %}{{ tools | tojson }}{% endif %}
{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}
{% if add_generation_prompt and thinking %}{{ '<think>\\n' }}{% endif %}"""


def deepseek_folder(folder: Path, corpus: Path) -> tuple[Tokenizer, ChatTemplate]:
    trained = train_tokenizer(str(corpus), 512)
    trained.inner.add_tokens([AddedToken(mark, special=False, normalized=False) for mark in MARKS])
    trained.save(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return load_tokenizer(folder), ChatTemplate(folder)


class FakeService:
    """Says `reply` of each request. Remembers what it was asked, what it finished and what was closed.

    hold: while it is set, a sequence waits behind its first token.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.reply: Callable[[Request], str] = lambda request: f"seed {request.sampling.seed}"
        self.error: Exception | None = None
        self.reason = "stop"
        self.failure: BaseException | None = None
        self.limit = 64
        self.delay = 0.0
        self.asked: list[Request] = []
        self.finished: list[Request] = []
        self.closed: list[Request] = []
        self.running = 0
        self.draining = self.aborting = False
        self.hold = threading.Event()

    async def generate(self, request: Request) -> AsyncIterator[Chunk]:
        if self.draining:
            raise Draining("the engine is about to end")
        if self.running >= self.limit:
            raise Busy("the queue is full")
        if self.error:
            raise self.error
        self.asked.append(request)
        self.running += 1
        try:
            async for chunk in self._chunks(request):
                yield chunk
            self.finished.append(request)
        finally:
            self.running -= 1
            if not self.finished or self.finished[-1] is not request:
                self.closed.append(request)

    async def _chunks(self, request: Request) -> AsyncIterator[Chunk]:
        ids = self.tokenizer.encode(self.reply(request), special=True)
        decoder = self.tokenizer.stream()
        base = Chunk("", (), None, len(request.prompt), len(request.prompt) // 2, 0)
        for count, token in enumerate(ids[: request.max_new_tokens], start=1):
            while count > 1 and self.hold.is_set():
                await asyncio.sleep(0.005)
                if self.aborting:
                    yield replace(base, finish_reason="abort", new_tokens=count - 1)
                    return
            await asyncio.sleep(self.delay)
            yield replace(
                base, text=decoder.push(token), tokens=(self._info(token, request),), new_tokens=count
            )
        full = len(ids) > request.max_new_tokens
        new_tokens = min(len(ids), request.max_new_tokens)
        reason = "length" if full else self.reason
        yield replace(base, text=decoder.finish(), finish_reason=reason, new_tokens=new_tokens)

    def _info(self, token: int, request: Request) -> TokenInfo:
        text = self.tokenizer.decode([token], skip_special=False)
        if request.logprobs is None:
            return TokenInfo(token, text)
        top = tuple((i, self.tokenizer.decode([i]), -float(i)) for i in range(60, 60 + request.logprobs))
        return TokenInfo(token, text, float("-inf") if text == "!" else -token / 512, top)

    def stats(self) -> Stats:
        return Stats(running=self.running, waiting=3, pages=10, pages_in_use=4, prompt_tokens=77)

    async def drain(self, timeout_s: float) -> None:
        self.draining = True
        try:
            async with asyncio.timeout(timeout_s):
                while self.running:
                    await asyncio.sleep(0.005)
        except TimeoutError:
            self.aborting = True


def calls_v3(name: str, arguments: dict) -> str:
    call = f"function<｜tool▁sep｜>{name}\n```json\n{json.dumps(arguments)}\n```"
    return f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>{call}<｜tool▁call▁end｜><｜tool▁calls▁end｜>"


def bad_grammar(request: Request) -> str:
    raise UserError("the schema cannot be compiled")
