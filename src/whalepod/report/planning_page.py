"""A plan as one HTML file: tables, pictures and all in it, nothing fetched. jinja2 escapes every text."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from whalepod.report.calculator import calculator_line
from whalepod.report.planning_pictures import Panel, png
from whalepod.report.planning_tables import dollars, price_words, three
from whalepod.report.serving_tables import layout_words

TEMPLATES = Path(__file__).parent / "templates"


def plan_page(doc: Mapping[str, Any], panels: Sequence[tuple[str, Panel, float]]) -> str:
    """The page of `report/planning`'s or `report/serving`'s JSON, with a picture for each panel."""
    pictures = [(title, embedded(png([("", draw, height)]))) for title, draw, height in panels]
    return template("plan.html").render(
        doc=doc, pictures=pictures, calculator=calculator_line(doc["web_calculator"], doc["gpu"])
    )


def embedded(picture: bytes) -> str:
    """A PNG as an address that holds it."""
    return f"data:image/png;base64,{b64encode(picture).decode('ascii')}"


@cache
def template(name: str) -> Template:
    """A template of this package."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {
        "dollars": dollars,
        "price_words": price_words,
        "serve_words": layout_words,
    }
    environment.filters |= {"figure": figure, "three": three}
    return environment.get_template(name)


def figure(value: float | None, form: str = "{:,.0f}") -> str:
    """A number in a form of str.format; a dash for None."""
    return "–" if value is None else form.format(value)
