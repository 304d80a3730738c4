"""ARCHITECTURE.md says what is there: every package, and tests that exist for what must always hold."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from tests.test_import_arrows import PACKAGES

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "ARCHITECTURE.md").read_text()
INVARIANTS = re.findall(r"^(\d+)\. (.*)$", TEXT.partition("## What must always hold")[2], re.M)
WALK = TEXT.partition("## A request on its way")[2].partition("\n## ")[0]


@cache
def names_in(file: str) -> set[str]:
    """The functions of a test file that pytest runs."""
    body = ast.parse((ROOT / file).read_text()).body
    return {node.name for node in body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def test_every_package_has_a_sentence_and_every_sentence_a_package():
    table = dict(re.findall(r"^\| `([\w/]+)` \| (.+) \|$", TEXT, re.M))
    packages = {str(file.parent.relative_to(ROOT)) for top in PACKAGES for file in (ROOT / top).rglob("__init__.py")}
    assert set(table) == packages
    assert all(len(sentence) > 10 for sentence in table.values())


def test_invariants_are_numbered_from_one_on():
    assert [int(number) for number, _ in INVARIANTS] == list(range(1, len(INVARIANTS) + 1))
    assert len(INVARIANTS) >= 15


@pytest.mark.parametrize(("number", "line"), INVARIANTS)
def test_an_invariant_names_tests_that_there_are(number, line):
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", line)
    assert named, f"invariant {number} names no test"
    for file, test in named:
        assert test in names_in(file), f"invariant {number}: {file} has no {test}"


def test_files_and_folders_that_are_named_are_there():
    named = set(re.findall(r"`((?:ground|workbench|backends|traces|reports|tests|docs)/[\w/.]+)`", TEXT))
    named |= set(re.findall(r"\b(docs/[\w-]+\.md|[A-Z]+\.md)\b", TEXT))
    assert len(named) > 40
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []
    assert "ARCHITECTURE.md" in (ROOT / "README.md").read_text()


def test_the_walk_of_a_request_goes_from_its_source_to_the_record():
    steps = [int(number) for number in re.findall(r"^(\d+)\. ", WALK, re.M)]
    assert steps == list(range(1, len(steps) + 1))
    places = [
        WALK.index(place) for place in ("workbench/clients", "scheduler/queue.py", "scheduler/kv", "reports/record")
    ]
    assert places == sorted(places)
