"""Fitting engines' hosts: it finds what is there, and looks at no row that belongs to scoring."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks import host_fit
from benchmarks.board.predict import predict
from benchmarks.board.silicon import Row
from tests.fidelity.rows import row
from workbench.settings import engines
from workbench.settings.engines import load_engine

PRESET = "sglang-0.5.9"
GROUP = host_fit.Group(PRESET, "host", ("gap_s", "gap_request_s"), lambda row: True, "tpot")


def measured(published: Row) -> Row:
    return replace(published, tpot_s=predict(published, engine=PRESET).tpot_s)


def test_a_fit_finds_the_gaps_with_which_its_rows_were_made(monkeypatch, capsys):
    presets = {**engines._presets()}
    presets[PRESET] = {**presets[PRESET], "host": {**load_engine(PRESET).host, "gap_s": 2e-3, "gap_request_s": 1e-4}}
    with monkeypatch.context() as patched:
        patched.setattr(engines, "_presets", lambda: presets)
        rows = [measured(row(engine="sglang", version="0.5.9", output_tokens=30, concurrency=n)) for n in (1, 4, 16)]
    rows = [replace(one, configuration=next(f"c{n}" for n in range(99) if not scores(one, n))) for one in rows]
    gap_s, gap_request_s = host_fit.fit(GROUP, rows, rounds=3, jobs=1)
    assert gap_s == pytest.approx(2e-3, rel=0.05) and gap_request_s == pytest.approx(1e-4, rel=0.1)
    said = capsys.readouterr().out
    assert "3 rows of c" in said and "begins with: gap_s 100.0 us" in said


def scores(one: Row, number: int) -> bool:
    return replace(one, configuration=f"c{number}").scores


def test_a_row_that_belongs_to_scoring_stops_it():
    one = row(engine="sglang", version="0.5.9")
    scored = replace(one, configuration=next(f"c{n}" for n in range(99) if scores(one, n)))
    with pytest.raises(AssertionError, match="belongs to scoring"):
        host_fit.fit(GROUP, [scored], rounds=1, jobs=1)


def test_groups_are_of_presets_and_of_numbers_that_there_are():
    for group in host_fit.GROUPS.values():
        assert set(group.names) <= set(host_fit.fields_of(group.table))
        load_engine(group.preset)
