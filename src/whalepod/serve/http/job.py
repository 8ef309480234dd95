"""From the body of a request to what the engine is asked, and how its text is to be read.

All of it is plain computation: it runs in a thread when the body is large.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NoReturn

from whalepod.serve.http.api_error import ApiError
from whalepod.serve.http.body import parse_json
from whalepod.serve.http.config import ServerConfig
from whalepod.serve.http.protocol import Asked, ChatAsked, CompletionAsked, validated
from whalepod.serve.http.reply import THINK, THOUGHT, ChosenCall, ForcedCall, Reader, Splitter
from whalepod.serve.http.tools_prompt import ToolsPrompt
from whalepod.serve.request import Grammar, Request
from whalepod.spec.errors import UserError, nearest
from whalepod.text.chat import ChatTemplate
from whalepod.text.tokenizer import Tokenizer

_SEED_LIMIT = 2**63
_SLICE = 100_000  # characters that are encoded to see whether a text is hopelessly long


@dataclass(frozen=True)
class Job:
    """The sequences of one HTTP request, all choices of the first prompt first."""

    requests: tuple[Request, ...]
    n: int
    stream: bool
    include_usage: bool
    reader: Callable[[], Reader] = Splitter

    @property
    def prompt_tokens(self) -> int:
        return sum(len(request.prompt) for request in self.requests[:: self.n])


class JobMaker:
    """Makes jobs of bodies. Raises ApiError or UserError for what a client did wrong."""

    def __init__(self, tokenizer: Tokenizer, chat: ChatTemplate | None, config: ServerConfig) -> None:
        self._tokenizer, self._chat, self._config = tokenizer, chat, config

    def completion(self, body: bytes) -> Job:
        asked = validated(CompletionAsked, parse_json(body))
        prompts = asked.prompts
        self._check_counts(asked, len(prompts))
        logprobs = asked.logprobs
        grammar = _only(asked.grammars())
        ids = [self._completion_ids(prompt) for prompt in prompts]
        return self._job(asked, ids, asked.max_tokens, logprobs, grammar, Splitter)

    def chat(self, body: bytes) -> Job:
        asked = validated(ChatAsked, parse_json(body))
        if self._chat is None:
            raise UserError("this model has no chat template: use /v1/completions")
        self._check_counts(asked, 1)
        grammar = _only(asked.grammars())
        if grammar and asked.offered and not asked.forced:
            raise UserError('a grammar leaves no room for tool calls: set tool_choice to "none"')
        text, breaker = self._rendered(asked)
        thinking = text.rstrip().endswith(THINK)
        if thinking and grammar:  # it holds from the first token on, so the thinking ends before
            text, thinking = f"{text.rstrip()}\n\n{THOUGHT}\n\n", False
        ids = [i for piece in text.split(breaker) for i in self._encode(piece)]
        logprobs = (asked.top_logprobs or 0) if asked.logprobs else None
        max_tokens = asked.max_completion_tokens or asked.max_tokens
        return self._job(asked, [ids], max_tokens, logprobs, grammar, _reader(asked, thinking))

    def _job(
        self,
        asked: Asked,
        prompts: list[list[int]],
        max_tokens: int | None,
        logprobs: int | None,
        grammar: Grammar | None,
        reader: Callable[[], Reader],
    ) -> Job:
        sampling = asked.sampling(self._config.sampling)
        n = asked.n or 1
        requests = []
        for ids in prompts:
            request = Request(
                prompt=tuple(ids),
                max_new_tokens=self._new_tokens(len(ids), max_tokens),
                sampling=sampling,
                stop=asked.stops,
                stop_ids=frozenset(asked.stop_token_ids or ()),
                ignore_eos=bool(asked.ignore_eos),
                logprobs=logprobs,
                grammar=grammar,
            )
            seeds = [None if (seed := sampling.seed) is None else (seed + i) % _SEED_LIMIT for i in range(n)]
            requests += [replace(request, sampling=replace(sampling, seed=seed)) for seed in seeds]
        options = asked.stream_options
        usage = bool(options and options.include_usage)
        return Job(tuple(requests), n, bool(asked.stream), usage, reader)

    def _check_counts(self, asked: Asked, num_prompts: int) -> None:
        config, n = self._config, asked.n or 1
        if asked.model is not None and asked.model != config.model_name:
            message = (
                f"there is no model {asked.model[:100]!r}{nearest(asked.model[:100], [config.model_name])}"
            )
            raise ApiError(404, message, param="model", code="model_not_found")
        if n > config.max_n:
            raise ApiError(400, f"n must be at most {config.max_n}, not {n}", param="n")
        if num_prompts < 1:
            raise ApiError(400, "prompt must not be empty", param="prompt")
        if num_prompts * n > config.max_sequences:
            message = f"prompts times n must be at most {config.max_sequences}, not {num_prompts * n}"
            raise ApiError(400, message, param="prompt")

    def _new_tokens(self, prompt: int, asked: int | None) -> int:
        config = self._config
        room = config.max_new_tokens
        if prompt > config.max_prompt_tokens:
            self._too_long(prompt)
        if config.max_context_tokens is not None:
            room = min(room, config.max_context_tokens - prompt)
        if room < 1:
            self._too_long(prompt)
        if asked is not None and asked > room:
            message = f"max_tokens must be at most {room} with a prompt of {prompt} tokens, not {asked}"
            raise ApiError(400, message, param="max_tokens")
        return asked or min(config.default_max_new_tokens, room)

    def _too_long(self, tokens: int | None = None) -> NoReturn:
        config = self._config
        limit = min(config.max_prompt_tokens, (config.max_context_tokens or 2**63) - 1)
        found = "" if tokens is None else f", not {tokens}"
        message = f"a prompt must be at most {limit} tokens long{found}"
        raise ApiError(400, message, code="context_length_exceeded")

    def _completion_ids(self, prompt: str | list[int]) -> list[int]:
        """Marks written out in the text are taken as such: a completion's prompt is all the client's."""
        if isinstance(prompt, list):
            if max(prompt, default=0) >= self._tokenizer.vocab_size:
                raise ApiError(400, f"a token id must be below {self._tokenizer.vocab_size}", param="prompt")
            ids = prompt
        else:
            ids = self._encode(prompt)
            bos = self._tokenizer.bos_id
            if bos is not None and (not ids or (self._config.add_bos and ids[0] != bos)):
                ids = [bos, *ids]
        if not ids:
            raise ApiError(400, "a prompt must not be empty", param="prompt")
        return ids

    def _encode(self, text: str) -> list[int]:
        """Ids of a text. What is far too long is given up before all of it is read: that takes seconds."""
        limit = self._config.max_prompt_tokens
        if len(text) > 8 * limit + _SLICE:
            found = 0
            for start in range(0, len(text), _SLICE):
                found += len(self._tokenizer.encode_many([text[start : start + _SLICE]], special=True)[0])
                if found > limit + start // 1000:  # cuts may have split a few tokens
                    self._too_long()
        return self._tokenizer.encode_many([text], special=True)[0]

    def _rendered(self, asked: ChatAsked) -> tuple[str, str]:
        """The prompt, and a word that stands in it where a user's text would have been read as a mark.

        The ids come from the pieces between: a mark that a user or a tool wrote out stays text.
        """
        assert self._chat
        if len(asked.messages) > self._config.max_prompt_tokens:  # each is a token at least
            self._too_long()
        breaker = f"break{secrets.token_hex(16)}"
        messages = [message.for_template() for message in asked.messages]
        for message in messages:
            if message["role"] in ("user", "tool") and message["content"]:
                message["content"] = self._marks.sub(lambda m: m[0] + breaker, message["content"])
        more: dict[str, Any] = dict(asked.chat_template_kwargs or {})
        if asked.offered:
            tools = [tool.model_dump(exclude_none=True) for tool in asked.offered]
            messages, offer = self._tools.offer(tools, messages)
            more |= offer
        try:
            return self._chat.render(messages, prompt=True, **more), breaker
        except UserError:
            raise
        except Exception as error:  # a template is a program of someone else's: it may fail in any way
            raise UserError(f"the chat template fails at this conversation: {type(error).__name__}") from None

    @cached_property
    def _marks(self) -> re.Pattern[str]:
        """The first character of each of the tokenizer's special words."""
        words = [token.content for token in self._tokenizer.inner.get_added_tokens_decoder().values()]
        return re.compile(f"(?={_any_of(words)})." if words else r"(?!)", re.DOTALL)

    @cached_property
    def _tools(self) -> ToolsPrompt:
        assert self._chat
        return ToolsPrompt(self._chat.source)


def _only(grammars: list[Grammar]) -> Grammar | None:
    if len(grammars) > 1:
        raise UserError("only one of response_format, guided output and a forced tool call can hold")
    return grammars[0] if grammars else None


def _reader(asked: ChatAsked, thinking: bool) -> Callable[[], Reader]:
    names = [tool.function.name for tool in asked.offered]
    if asked.forced:
        return (lambda: ForcedCall(names[0])) if len(names) == 1 else ChosenCall
    return lambda: Splitter(thinking, tools=bool(names))


def _any_of(words: Sequence[str]) -> str:
    """A regular expression of what begins with one of `words`, as a tree: it looks at a character once."""
    if "" in words:
        return ""
    heads = sorted({word[0] for word in words})
    branches = [re.escape(head) + _any_of([w[1:] for w in words if w[0] == head]) for head in heads]
    return f"(?:{'|'.join(branches)})"
