"""Conversations as token ids, with the model's own chat template, and which of them are to be learnt.

A file has one conversation a line: `{"messages": [{"role": "user", "content": "..."}, ...]}`, as the OpenAI
API writes them; other keys of the object go to the template too (`tools`). Learnt is what the template makes
of the assistant's turns, behind the words with which it asks for one. A token that is only seen stands in the
ids as -1 - id, a number below 0, which no loss counts.

Templates come from files and are run in a sandbox (sandbox.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from whalepod.spec.errors import UserError
from whalepod.text.lines import json_lines, read_settings
from whalepod.text.sandbox import ChatEnvironment, render
from whalepod.text.tokenizer import Tokenizer

MAX_MESSAGES = 1000


def seen_only(token: int) -> int:
    """The mark of a token that is read and not learnt; twice is the token again."""
    return -1 - token


class ChatTemplate:
    """What a model's folder says of how a conversation is written down."""

    def __init__(self, folder: Path | str) -> None:
        self._folder = Path(folder)
        self._config = read_settings(self._folder / "tokenizer_config.json")
        source = self.source
        try:
            self._template = ChatEnvironment().from_string(source)
        except Exception as error:  # constants are computed already, and may fail in any way
            raise UserError(f"the chat template of {self._folder} cannot be read: {_line(error)}") from None

    @cached_property
    def source(self) -> str:
        """The template's text: chat_template.jinja, else what tokenizer_config.json holds."""
        file = self._folder / "chat_template.jinja"
        if file.is_file():
            try:
                return file.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"cannot read {file}: {error}") from None
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
            values = {"messages": messages, "add_generation_prompt": prompt, **named, **more}
            return render(self._template, values)
        except Exception as error:  # it is a program of someone else's
            raise UserError(f"the chat template refuses a conversation: {_line(error)}") from None

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
        if len(messages) > MAX_MESSAGES:  # each turn of the assistant is rendered with all before it
            raise UserError(f"{path}, line {number}: more than {MAX_MESSAGES} messages in a conversation")
        yield found, done


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and isinstance(message.get("role"), str) and "content" in message


def _line(error: Exception) -> str:
    """The first line of what a template failed with, which may quote all that it was given."""
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
