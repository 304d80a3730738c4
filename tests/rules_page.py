"""The table of engine rules in docs/scheduler.md, made of their declarations and of the presets that set them.

``python -m tests.rules_page`` writes it anew.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from workbench.scheduler.rules import EngineRules
from workbench.scheduler.settings import Setting, settings_of
from workbench.settings.engines import engine_names
from workbench.settings.loading import settings_from

PAGE = Path(__file__).resolve().parents[1] / "docs" / "scheduler.md"
BAR = "\\|"
"""That is none of a table's."""
HEAD = "| setting | what it says | other than the default in |\n|---|---|---|\n"


def table() -> str:
    """Each rule, its help text, and which presets set it to what."""
    presets = {name: settings_from(None, {"engine": name}) for name in engine_names()}
    return HEAD + "".join(_row(rule, presets) for rule in settings_of(EngineRules).values())


def with_table(page: str) -> str:
    """A page with the table in the place of the one that it has. Raises ValueError where it has none."""
    first = page.index(HEAD)
    end = page.index("\n\n", first) + 1
    return page[:first] + table() + page[end:]


def _row(rule: Setting, presets: dict[str, Any]) -> str:
    engines: dict[str, list[str]] = {}
    for name, preset in presets.items():
        value = getattr(preset, rule.name)
        if value != rule.default:
            engines.setdefault(_said(value), []).append(name)
    otherwise = "; ".join(f"`{value}`: {', '.join(names)}" for value, names in engines.items())
    return f"| `{rule.name}` | {rule.described.replace('|', BAR)} | {otherwise or 'none'} |\n"


def _said(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return "0" if value is None else str(value)


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text()))
