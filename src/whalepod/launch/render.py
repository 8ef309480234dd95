"""Templates into text: what comes from a run.yaml is quoted for the language that it lands in."""

from __future__ import annotations

import json
import re
import shlex
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

TEMPLATES = Path(__file__).parent / "templates"


def render(template: str, **values: Any) -> str:
    """The text of a template, with one newline at its end."""
    return _environment().get_template(template).render(**values).strip() + "\n"


def comment(lines: list[str]) -> str:
    """Lines of a comment in a shell, YAML or Python file."""
    return "\n".join(f"# {one_line(line)}" for line in lines)


def one_line(text: object) -> str:
    """Without what could end a comment's line."""
    return re.sub(r"[^\x20-\x7e\xa0-\uffff]|[\u2028\u2029\ufeff]", "?", str(text))


def quoted(text: object) -> str:
    """One word of a shell, of which nothing is expanded."""
    return shlex.quote(one_line(text))


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        autoescape=False,  # of HTML, which nothing here is
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # Not jinja's own tojson, which writes < and ' as HTML wants them.
    environment.filters |= {"q": quoted, "comment": one_line, "tojson": json.dumps}
    return environment
