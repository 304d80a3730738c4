"""The page about the scheduler names every engine rule, who follows it, and how far decisions are alike."""

from __future__ import annotations

from pathlib import Path

from tests.rules_page import PAGE, counted, table, with_tables
from workbench.scheduler.rules import EngineRules
from workbench.scheduler.settings import settings_of
from workbench.settings.engines import engine_names

RECORDINGS = Path(__file__).parents[1] / "benchmarks" / "recordings"


def test_the_page_has_the_tables_of_engines_as_they_are():
    page = PAGE.read_text()
    assert page == with_tables(page), "python -m tests.rules_page writes it anew"


def test_the_table_names_every_rule_and_every_preset_with_rules_of_its_own():
    rows = table().splitlines()[2:]
    assert [row.split("`")[1] for row in rows] == list(settings_of(EngineRules))
    assert all(name in table() for name in engine_names() if name != "workbench")
    assert all(row.count(" | ") == 2 for row in rows)


def test_the_counts_are_of_every_preset_that_has_a_recording():
    presets = {row.split("|")[1].strip() for row in counted().splitlines()[2:]}
    recorded = {name for name in engine_names() if list(RECORDINGS.glob(f"{name}*.json.gz"))}
    assert len(recorded) >= 6
    assert presets == recorded
