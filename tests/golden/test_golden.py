"""Golden commands leave the records and take the decisions that were kept of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.golden.cases import CASES, Case
from tests.golden.hashes import differences, run_case
from tests.golden.inputs import write_inputs
from tests.golden.make import read_golden

KEPT = read_golden()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the commands are run: it holds the traces that they name."""
    folder = tmp_path_factory.mktemp("golden")
    write_inputs(folder)
    return folder


def test_every_command_has_one_entry_and_every_entry_a_command():
    assert sorted(KEPT) == sorted(case.name for case in CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_command_leaves_the_record_and_takes_the_decisions_kept_of_it(case: Case, folder: Path):
    plain, exact = run_case(case, folder)
    found = differences(case, KEPT[case.name], plain, exact)
    assert not found, "\n".join(
        [
            case.command,
            *found,
            f"to look at both: python -m tests.golden.make {case.name} --keep FOLDER, here and before the change",
        ]
    )
