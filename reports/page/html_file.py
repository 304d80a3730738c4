"""Pages of one file: a template of this package, with everything that it shows inside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ground.json_file import json_line

_HERE = Path(__file__).parent


def asset(name: str) -> str:
    """A style sheet or script of this package."""
    return (_HERE / "assets" / name).read_text(encoding="utf-8")


def rendered(template: str, **values: Any) -> str:
    """The page that a template makes of `values`; what it names and does not get is an error."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_HERE / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)


def embedded(data: Any) -> str:
    """JSON that may stand inside a script element: nothing in it can be taken for a tag."""
    return json_line(data).replace("<", "\\u003c")
