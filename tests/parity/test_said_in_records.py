"""What a record and its page say of a preset's parity."""

from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner

from reports.record.run_record import read_meta
from tests.meta_form import check_meta
from workbench.cli.app import app
from workbench.settings.loading import settings_from
from workbench.settings.parity import COUNTS, parity_of

SAMPLE = Path(__file__).parents[2] / "traces/samples/sample.jsonl"


def test_the_page_names_what_was_counted_of_the_preset(tmp_path):
    ran = CliRunner().invoke(
        app, ["simulate", str(SAMPLE), "--requests", "5", "--engine", "vllm-0.33", "--out", str(tmp_path / "run")]
    )
    assert ran.exit_code == 0, ran.output
    (file,) = tmp_path.rglob("meta.json")
    meta = read_meta(file.parent)
    check_meta(meta, "simulated")
    counts = json.loads(COUNTS.read_text())["vllm-0.33.0"].values()
    equal, scenarios, alike, steps = (
        sum(c[name] for c in counts) for name in ("equal", "scenarios", "equal_steps", "steps")
    )
    assert meta["parity"] == (
        f"vllm-0.33.0: {equal} of {scenarios} recorded scenarios decided alike, {alike:,} of {steps:,} batches before the "
        "first difference"
    )
    assert meta["parity"] in next(tmp_path.rglob("*.html")).read_text()


def test_a_rule_that_is_given_otherwise_is_named():
    said = parity_of(settings_from(None, {"engine": "vllm", "cache": "none", "max_running": 7}))
    assert said is not None and said.endswith("; here without its cache")
    ours = {"engine": "sglang", "max_passed_over": 64, "max_prefill_streak": 2, "requeue": "front"}
    said = parity_of(settings_from(None, ours))
    assert said is not None and said.endswith("; here without its max_passed_over, max_prefill_streak, requeue")


def test_our_own_way_is_compared_with_no_engine():
    assert parity_of(settings_from(None, {})) is None
