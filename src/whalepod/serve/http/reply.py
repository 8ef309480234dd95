"""A model's text as reasoning, content and tool calls, told apart while it is written.

R1 and the models after it put their reasoning between `<think>` and `</think>`; a chat template may have
opened it in the prompt already. Tool calls come in one of two forms, V3's and V3.1's, each inside
`<｜tool▁calls▁begin｜>` ... `<｜tool▁calls▁end｜>`:

    <｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME\\n```json\\n{...}\\n```<｜tool▁call▁end｜>
    <｜tool▁call▁begin｜>NAME<｜tool▁sep｜>{...}<｜tool▁call▁end｜>

Text arrives cut anywhere. What could still become a mark, or white space that a mark would swallow, is held
back until it is known, so however the text is cut, the same parts come out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from whalepod.serve.output import settled

THINK, THOUGHT = "<think>", "</think>"
CALLS, CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL, CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
SEPARATOR = "<｜tool▁sep｜>"

_FENCE = re.compile(r"\s*(?:`+[a-z]*)?\s*")  # "```json\n", which V3 writes before the arguments
_BEHIND_ARGUMENTS = "` \t\r\n"  # what may stand between JSON and the end of a call


@dataclass(frozen=True)
class Part:
    """A piece of the reply. `call` begins a tool call and names its function; `arguments` go to the last."""

    kind: Literal["reasoning", "content", "call", "arguments"]
    text: str


class Reader(Protocol):
    """Turns the text of one reply into parts as it comes."""

    def push(self, text: str) -> list[Part]: ...

    def finish(self) -> list[Part]:
        """What was held back, when no more text comes."""
        ...


class Splitter:
    """Reads a free reply. thinking: it begins inside reasoning; tools: calls are looked for.

    A state is the method that reads it: it takes what it can from `_text`, and says whether another state
    is to go on with the rest.
    """

    def __init__(self, thinking: bool = False, tools: bool = False) -> None:
        self._state: Callable[[bool], bool] = self._reasoning if thinking else self._start
        self._tools = tools
        self._text = ""  # not yet told apart
        self._parts: list[Part] = []
        self._trim = thinking  # white space that comes next is dropped
        self._head = ""

    def push(self, text: str) -> list[Part]:
        self._text += text
        return self._read(last=False)

    def finish(self) -> list[Part]:
        return self._read(last=True)

    def _read(self, last: bool) -> list[Part]:
        while self._state(last):
            pass
        parts, self._parts = self._parts, []
        return parts

    def _start(self, last: bool) -> bool:
        rest = self._text.lstrip()
        if rest.startswith(THINK):
            return self._go(self._reasoning, rest[len(THINK) :], trim=True)
        if THINK.startswith(rest) and not last:
            return False
        return self._go(self._content, self._text)

    def _reasoning(self, last: bool) -> bool:
        self._drop_space()
        before, mark, rest = self._find(THOUGHT)
        if mark:
            self._emit("reasoning", before.rstrip())
            return self._go(self._content, rest, trim=True)
        self._emit_known("reasoning", last, (THOUGHT,), None)
        return False

    def _content(self, last: bool) -> bool:
        self._drop_space()
        if not self._tools:
            self._emit("content", self._text)
            self._text = ""
            return False
        before, mark, rest = self._find(CALLS, CALL)
        if mark:
            self._emit("content", before.rstrip())
            return self._go(self._calls if mark == CALLS else self._call_head, rest)
        if last:
            self._emit("content", self._text)
            self._text = ""
        else:
            self._emit_known("content", last, (CALLS, CALL), None)
        return False

    def _calls(self, last: bool) -> bool:
        """Between two calls: nothing belongs there."""
        _, mark, rest = self._find(CALL, CALLS_END)
        if mark == CALL:
            return self._go(self._call_head, rest)
        if mark:
            return self._go(self._content, rest, trim=True)
        self._text = self._text[settled(self._text, (CALL, CALLS_END)) :]
        return False

    def _call_head(self, last: bool) -> bool:
        before, mark, rest = self._find(SEPARATOR, CALL_END, CALLS_END)
        if mark == SEPARATOR:
            self._head = before.strip()
            return self._go(self._call_form, rest)
        if mark or last:  # no call at all: it is shown as the text that it is
            self._emit("content", before.strip())
            return self._go(self._calls, CALLS_END + rest if mark == CALLS_END else rest)
        return False

    def _call_form(self, last: bool) -> bool:
        """Behind the separator stand V3.1's arguments, or V3's name."""
        rest = self._text.lstrip()
        if not rest and not last:
            return False
        if not rest or rest[0] in "{<":
            self._emit("call", self._head)
            return self._go(self._arguments, rest)
        return self._go(self._call_name, rest)

    def _call_name(self, last: bool) -> bool:
        before, mark, rest = self._find("\n", CALL_END)
        if not mark and not last:
            return False
        self._emit("call", before.strip())
        return self._go(self._fence if mark == "\n" else self._calls, rest)

    def _fence(self, last: bool) -> bool:
        fence = _FENCE.match(self._text)
        assert fence
        if fence.end() == len(self._text) and not last:
            return False
        return self._go(self._arguments, self._text[fence.end() :])

    def _arguments(self, last: bool) -> bool:
        before, mark, rest = self._find(CALL_END, CALLS_END)
        if mark:
            self._emit("arguments", before.rstrip(_BEHIND_ARGUMENTS))
            return self._go(self._calls, CALLS_END + rest if mark == CALLS_END else rest)
        self._emit_known("arguments", last, (CALL_END, CALLS_END), _BEHIND_ARGUMENTS)
        return False

    def _go(self, state: Callable[[bool], bool], rest: str, trim: bool = False) -> bool:
        self._state, self._text, self._trim = state, rest, trim
        return True

    def _drop_space(self) -> None:
        if self._trim:
            self._text = self._text.lstrip()
            self._trim = not self._text

    def _find(self, *marks: str) -> tuple[str, str, str]:
        """The text before the first of `marks`, that mark, the text behind; all of it if there is none."""
        found = [(at, mark) for mark in marks if (at := self._text.find(mark)) >= 0]
        if not found:
            return self._text, "", ""
        at, mark = min(found)
        return self._text[:at], mark, self._text[at + len(mark) :]

    def _emit_known(
        self,
        kind: Literal["reasoning", "content", "arguments"],
        last: bool,
        marks: tuple[str, ...],
        trim: str | None,
    ) -> None:
        """Lets out what no mark can claim any more; white space at its end waits for what follows."""
        known = self._text if last else self._text[: settled(self._text, marks)]
        known = known.rstrip(trim)
        self._emit(kind, known)
        self._text = "" if last else self._text[len(known) :]

    def _emit(self, kind: Literal["reasoning", "content", "call", "arguments"], text: str) -> None:
        if text or kind == "call":
            self._parts.append(Part(kind, text))


class ForcedCall:
    """Reads a reply that a grammar made the arguments of one function."""

    def __init__(self, name: str) -> None:
        self._begin = [Part("call", name)]

    def push(self, text: str) -> list[Part]:
        if not text:
            return []
        begin, self._begin = self._begin, []
        return [*begin, Part("arguments", text)]

    def finish(self) -> list[Part]:
        return []


class ChosenCall:
    """Reads what a grammar made `{"name": ..., "arguments": {...}}`: a call of one of many functions."""

    def __init__(self) -> None:
        self._text = ""

    def push(self, text: str) -> list[Part]:
        self._text += text
        return []

    def finish(self) -> list[Part]:
        try:
            call = json.loads(self._text)
            return [Part("call", call["name"]), Part("arguments", json.dumps(call["arguments"]))]
        except (ValueError, TypeError, KeyError, RecursionError):  # cut short
            return [Part("content", self._text)] if self._text else []
