"""meta.json is one type: its documentation says the same, and records that earlier versions wrote are read."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from reports.metrics.summary import summarise
from reports.page.report_page import write_report
from reports.record.meta import RUN_KINDS, PoolMeta, RunMeta, kind_of
from reports.record.run_record import read_meta, read_record, write_record
from reports.record.schema import META_FILE
from tests.meta_form import ASKED_FOR, COUNTED, OWN, PARTS, documented, names
from workbench.settings.loading import recorded_settings, settings_from

EARLIER = Path(__file__).parent / "earlier"
"""A record of each kind, as the last version wrote it that had no type for meta.json."""


def test_the_documentation_has_every_key_and_no_other():
    said = documented()
    assert set(said) == names(RunMeta)
    for part, kind in PARTS.items():
        assert names(kind) <= set(re.findall(r"`(\w+)`", said[part])), part
    assert names(PoolMeta, always=True) <= set(re.findall(r"`(\w+)`", said["pools"]))
    assert set(RUN_KINDS) <= set(re.findall(r"`(\w+)`", said["kind"]))


def test_every_key_is_filled_in_by_some_kind_of_run():
    assert set(OWN) == set(COUNTED) == set(RUN_KINDS)
    assert names(RunMeta, always=True).union(ASKED_FOR, *OWN.values()) == names(RunMeta)
    assert names(PARTS["totals"], always=True).union(*COUNTED.values()) == names(PARTS["totals"])


@pytest.mark.parametrize("kind", RUN_KINDS)
def test_a_record_of_an_earlier_version_is_read_and_written_as_one_of_this(kind, tmp_path):
    assert "kind" not in json.loads((EARLIER / kind / META_FILE).read_text())
    record = read_record(EARLIER / kind)
    meta = record.meta
    assert kind_of(meta) == kind
    # The same keys as now: only what made it, pools, parity, front end and how sure it is of a simulated and `cost_notes`
    # of a served run came later.
    later = {"kind", "pools", "parity", "front_end", "rests_on", "accuracy"}
    assert set(meta) == (OWN[kind] | names(RunMeta, always=True)) - later
    assert set(meta["totals"]) == names(PARTS["totals"], always=True) | COUNTED[kind]
    summary = summarise(record)
    assert summary["requests_finished"] == len(record.requests["request_id"])
    assert write_report({kind: record}, tmp_path / "page.html", "Earlier", "", None, None)
    write_record(record, tmp_path / "again")
    assert read_record(tmp_path / "again").meta == meta


@pytest.mark.parametrize("kind", ["simulated", "replayed", "served", "imported"])
def test_the_settings_of_an_earlier_record_are_taken_with_like(kind):
    meta = read_meta(EARLIER / kind)
    recorded = recorded_settings(meta, kind)
    settings = settings_from(None, {}, like=EARLIER / kind)
    assert recorded and all(getattr(settings, name) == value for name, value in recorded.items())
    if kind == "simulated":  # with --chunk 0 --page-size 16 --queue-timeout 30
        assert (settings.chunk, settings.page_size, settings.queue_timeout) == (None, 16, 30.0)


def test_what_the_workbench_was_once_called_is_read(tmp_path):
    said = json.loads((EARLIER / "replayed" / META_FILE).read_text())
    said["versions"]["llm-workbench"] = said["versions"].pop("workbench")
    (tmp_path / META_FILE).write_text(json.dumps(said))
    assert read_meta(tmp_path)["versions"] == read_meta(EARLIER / "replayed")["versions"]
