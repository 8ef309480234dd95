"""Chat templates are programs of strangers: jinja2's sandbox, with bounds on what one expression may ask for.

The sandbox reaches neither files nor Python's insides, and here no power, repetition, padding or sum in a
single expression makes numbers or texts without end. A template can still loop for long: nothing stops that.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sized
from functools import wraps
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

MAX_CHARS = 1 << 24  # of one value or of a whole rendering
MAX_NUMBER = 10**6  # as an argument, where it may be a width or a count
MAX_DEPTH = 200  # of a template's syntax tree
_MAX_BITS = 1 << 14
_WIDE = re.compile(r"\d{5}|\*")  # in a format string: a width beyond 9,999, or one from outside
_FILTERS = ("center", "indent", "slice", "batch", "format", "round", "truncate", "wordwrap")


class ChatEnvironment(ImmutableSandboxedEnvironment):
    """As templates expect from `transformers`: trimmed blocks, `tojson` without HTML, `raise_exception`."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True)
        self.globals["raise_exception"] = _refuse
        del self.globals["lipsum"]
        self.filters["tojson"] = _to_json  # jinja2's own escapes for HTML
        self.filters |= {name: _bounded(self.filters[name]) for name in _FILTERS}

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        """Refuses what is nested so deeply that compiling it takes for ever."""
        tree = super()._parse(source, name, filename)
        level: list[nodes.Node] = [tree]
        for _ in range(MAX_DEPTH):
            level = [child for node in level for child in node.iter_child_nodes()]
        _check(not level)
        return tree

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        a, b = (len(v) if isinstance(v, Sized) else 0 for v in (left, right))
        if operator == "%" and isinstance(left, str):
            _check(not _WIDE.search(left))
        elif operator == "+":
            _check(a + b <= MAX_CHARS)
        elif operator == "*" and (a or b):
            count = right if a else left
            _check(not isinstance(count, int) or (a or b) * count <= MAX_CHARS)
        elif operator in ("*", "**") and isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
            _check(bits <= _MAX_BITS)
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        _check_numbers(*args, *kwargs.values())
        return super().call(__context, __obj, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        _check(wrapped is None or not _WIDE.search(value.__self__))
        return wrapped


def render(template: Template, values: dict[str, Any]) -> str:
    """Raises TemplateError where there is too much of it; whatever else the template fails with passes."""
    pieces: list[str] = []
    size = 0
    for piece in template.generate(values):
        pieces.append(piece)
        size += len(piece)
        if size > MAX_CHARS:
            raise TemplateError(f"it writes more than {MAX_CHARS} characters")
    return "".join(pieces)


def _bounded(inner: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(inner)  # with the marks by which jinja2 knows what to pass
    def outer(*args: Any, **kwargs: Any) -> Any:
        _check_numbers(*args, *kwargs.values())
        _check(inner.__name__ != "do_format" or not _WIDE.search(str(args[0])))
        return inner(*args, **kwargs)

    return outer


def _check_numbers(*values: Any) -> None:
    _check(all(not isinstance(v, int) or abs(v) <= MAX_NUMBER for v in values))


def _check(fine: bool) -> None:
    if not fine:
        raise SecurityError("an expression is nested too deeply, or asks for a number or text too large")


def _to_json(value: Any, ensure_ascii: bool = False, **more: Any) -> str:
    _check_numbers(*more.values())
    return json.dumps(value, ensure_ascii=ensure_ascii, **more)


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)
