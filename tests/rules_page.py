"""The tables of engines in docs/scheduler.md: what was counted of each preset's decisions, and the rules that it sets.

``python -m tests.rules_page`` writes it anew.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ground.json_file import read_json
from workbench.scheduler.rules import EngineRules
from workbench.scheduler.settings import Setting, settings_of
from workbench.settings.engines import engine_names
from workbench.settings.loading import settings_from
from workbench.settings.parity import COUNTS

PAGE = Path(__file__).resolve().parents[1] / "docs" / "scheduler.md"
BAR = "\\|"
"""That is none of a table's."""
COUNTED = "| preset | recording | scenarios equal | steps before the first difference |\n|---|---|---|---|\n"
HEAD = "| setting | what it says | other than the default in |\n|---|---|---|\n"


def table() -> str:
    """Each rule, its help text, and which presets set it to what."""
    presets = {name: settings_from(None, {"engine": name}) for name in engine_names()}
    return HEAD + "".join(_row(rule, presets) for rule in settings_of(EngineRules).values())


def counted() -> str:
    """What was counted of each preset, recording by recording."""
    counts = read_json(COUNTS)
    return COUNTED + "".join(
        f"| {preset} | {name.removesuffix('.json.gz')} | {of['equal']} of {of['scenarios']} | "
        f"{of['equal_steps']:,} of {of['steps']:,} |\n"
        for preset in engine_names()
        for name, of in sorted(counts.get(preset, {}).items())
    )


def with_tables(page: str) -> str:
    """A page with the tables in the place of those that it has. Raises ValueError where it has none."""
    for head, made in ((COUNTED, counted()), (HEAD, table())):
        first = page.index(head)
        end = page.index("\n\n", first) + 1
        page = page[:first] + made + page[end:]
    return page


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
    PAGE.write_text(with_tables(PAGE.read_text()))
