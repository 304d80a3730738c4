"""Which loop the settings imply."""

from __future__ import annotations

import pytest

from workbench.loops import LOOPS, select_loop


@pytest.mark.parametrize(
    ("pp", "overlap", "name"),
    [(1, True, "overlap"), (1, False, "normal"), (2, True, "pipeline"), (2, False, "pipeline")],
)
def test_more_than_one_stage_means_pipeline_else_overlap_unless_it_is_switched_off(pp, overlap, name):
    assert select_loop(pp, overlap) == name
    assert name in LOOPS


def test_overlap_is_on_unless_switched_off():
    assert select_loop(1) == "overlap"
