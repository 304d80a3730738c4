"""What is large is imported where it is used: a simulation runs without Arrow, pandas and matplotlib, to the same bytes."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from reports.record.csv_text import write_columns
from reports.record.schema import MODES, Kind
from traces import sample_path
from workbench.cli.app import app

BLOCKED = ("pandas", "pyarrow", "matplotlib")
FLOATS = st.one_of(
    st.floats(allow_infinity=False),
    st.floats(-1e-3, 1e-3),
    st.integers(-(10**17), 10**17).map(float),
    st.integers(-(10**12), 10**12).map(lambda number: number / 1e9),
    st.sampled_from([0.0, 1e-6, 1e-5, 9.99e-5, 1e-4, 9999999999.5, 1e10, 123456789012.0, 1e22, 5e-324, math.nan]),
)
TIMES_S = st.one_of(
    st.floats(-4e9, 4e9), st.floats(-1e-4, 1e-4), st.sampled_from([0.0, 1e-9, 1e-6, 1e-5, 9.99e-5, 1e-4, math.nan])
)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]))
ROWS = st.lists(
    st.tuples(TEXTS, st.integers(-(2**63), 2**63 - 1), st.integers(0, len(MODES) - 1), TIMES_S, FLOATS), max_size=20
)


@settings(derandomize=True, deadline=None)
@given(ROWS)
@example([('"', 0, 0, 1e-9, math.inf), ("a,b\r\n", -1, 2, -1e-6, -math.inf)])
def test_without_arrow_a_table_has_the_same_bytes(rows):
    texts, ints, modes, times, numbers = zip(*rows, strict=True) if rows else ([],) * 5
    kinds = {"id": Kind.TEXT, "n": Kind.INT, "mode": Kind.MODE, "at_s": Kind.TIME, "x": Kind.NUMBER}
    columns = {
        "id": list(texts),
        "n": np.array(ints, np.int64),
        "mode": np.array(modes, np.int8),
        "at_s": np.round(np.array(times, np.float64), 9) + 0.0,
        "x": np.array(numbers, np.float64),
    }
    with_arrow, without = io.BytesIO(), io.BytesIO()
    write_columns(columns, kinds, with_arrow)
    with mock.patch.dict(sys.modules, {"pyarrow": None}):
        write_columns(columns, kinds, without)
    assert without.getvalue() == with_arrow.getvalue()


@pytest.mark.slow
def test_simulate_runs_without_pandas_arrow_and_matplotlib(tmp_path: Path):
    words = ["simulate", str(sample_path()), "--requests", "20", "--json", "--out"]
    blocked = f"import sys; sys.modules.update(dict.fromkeys({BLOCKED})); from workbench.cli.main import main; main()"
    bare = subprocess.run(
        [sys.executable, "-c", blocked, *words, str(tmp_path / "bare")], capture_output=True, text=True, timeout=300
    )
    assert bare.returncode == 0, bare.stderr
    full = CliRunner().invoke(app, [*words, str(tmp_path / "full")])
    assert full.exit_code == 0, full.output
    numbers = [
        json.loads(out.replace(f"{tmp_path}/{name}", ""))
        for out, name in ((bare.stdout, "bare"), (full.stdout, "full"))
    ]
    assert numbers[0] == numbers[1]
    tables = sorted(path.relative_to(tmp_path / "full") for path in (tmp_path / "full").rglob("*.csv"))
    assert len(tables) >= 3
    for table in tables:
        assert (tmp_path / "bare" / table).read_bytes() == (tmp_path / "full" / table).read_bytes()
