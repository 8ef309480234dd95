"""Conversations as token ids, with the model's own chat template, and which of them are to be learnt.

A file has one conversation a line: `{"messages": [{"role": "user", "content": "..."}, ...]}`, as the OpenAI
API writes them; other keys of the object go to the template too (`tools`). Learnt is what the template makes
of the assistant's turns, behind the words with which it asks for one. A token that is only seen stands in the
ids as -1 - id, a number below 0, which no loss counts.

Templates come from files and are run in jinja2's sandbox, which reaches neither files nor Python's insides.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from whalepod.spec.errors import UserError
from whalepod.text.lines import json_lines
from whalepod.text.tokenizer import Tokenizer


def seen_only(token: int) -> int:
    """The mark of a token that is read and not learnt; twice is the token again."""
    return -1 - token


class ChatTemplate:
    """What a model's folder says of how a conversation is written down."""

    def __init__(self, folder: Path | str) -> None:
        self._folder = Path(folder)
        self._config = read_settings(self._folder / "tokenizer_config.json")
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _refuse
        environment.filters["tojson"] = _to_json  # jinja2's own escapes for HTML
        try:
            self._template = environment.from_string(self.source)
        except TemplateError as error:
            raise UserError(f"the chat template of {self._folder} cannot be read: {error}") from None

    @cached_property
    def source(self) -> str:
        """The template's text: chat_template.jinja, else what tokenizer_config.json holds."""
        file = self._folder / "chat_template.jinja"
        if file.is_file():
            return file.read_text(encoding="utf-8")
        found = self._config.get("chat_template")
        if isinstance(found, list):  # several, by name
            named = {
                e["name"]: e["template"]
                for e in found
                if isinstance(e, dict) and {"name", "template"} <= e.keys()
            }
            found = named.get("default")
        if not isinstance(found, str):
            raise UserError(f"the tokenizer in {self._folder} has no chat template: chat data needs one")
        return found

    def render(self, messages: list[dict[str, Any]], prompt: bool = False, **more: Any) -> str:
        """The conversation as text; with `prompt` up to where the assistant's answer begins."""
        named: dict[str, Any] = {"tools": None, "documents": None}  # always there, as in transformers
        named |= {"bos_token": self._named("bos_token"), "eos_token": self._named("eos_token")}
        try:
            return self._template.render(messages=messages, add_generation_prompt=prompt, **(named | more))
        except (TemplateError, TypeError, ValueError, KeyError, RecursionError) as error:
            raise UserError(f"the chat template refuses a conversation: {error}") from None

    def _named(self, key: str) -> str:
        value = self._config.get(key)
        return str(value.get("content", "")) if isinstance(value, dict) else str(value or "")


def encoded(conversation: dict[str, Any], template: ChatTemplate, tokenizer: Tokenizer) -> list[int]:
    """Ids of a conversation; those outside the assistant's turns as `seen_only`.

    A template may write an earlier turn differently once more turns follow (R1 drops its reasoning): such a
    turn is seen and not learnt. Raises UserError where nothing is left to learn.
    """
    messages = conversation["messages"]
    more = {key: value for key, value in conversation.items() if key != "messages"}
    whole = template.render(messages, **more)
    ids: list[int] = []
    done = learnt = 0
    for index, message in enumerate(messages):
        if message.get("role") != "assistant":
            continue
        before = template.render(messages[:index], prompt=True, **more)
        through = template.render(messages[: index + 1], **more)
        if not (
            whole.startswith(through) and through.startswith(before) and done <= len(before) < len(through)
        ):
            continue
        ids += map(seen_only, tokenizer.encode(whole[done : len(before)], special=True))
        answer = tokenizer.encode(whole[len(before) : len(through)], special=True)
        ids += answer
        learnt += len(answer)
        done = len(through)
    if not learnt:
        raise UserError("it has no turn of the assistant that the chat template keeps as it was written")
    ids += map(seen_only, tokenizer.encode(whole[done:], special=True))
    return ids


def conversations(path: Path | str) -> Iterator[tuple[dict[str, Any], int]]:
    """Each conversation of a .jsonl file, and how many bytes of it were read by then."""
    path = Path(path)
    for number, found, done in json_lines(path):
        messages = found.get("messages") if isinstance(found, dict) else None
        if not isinstance(messages, list) or not messages or not all(_is_message(m) for m in messages):
            raise UserError(
                f'{path}, line {number}: expected {{"messages": [{{"role": ..., "content": ...}}, ...]}}'
            )
        yield found, done


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and isinstance(message.get("role"), str) and "content" in message


def read_settings(path: Path) -> dict[str, Any]:
    """A model folder's JSON file of settings; empty where there is none. Raises UserError."""
    try:
        found = json.loads(path.read_bytes()) if path.is_file() else {}
    except (OSError, ValueError, RecursionError):
        raise UserError(f"{path} is not JSON") from None
    return found if isinstance(found, dict) else {}


def _to_json(value: Any, ensure_ascii: bool = False, **more: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **more)


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)
