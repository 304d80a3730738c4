"""The run record: what is written is what is read, to the byte, and nothing of the user's is ever removed."""

from __future__ import annotations

import io
import json
import math
import re
import struct
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reports.metrics.labels import METRICS
from reports.page.report_page import write_report
from reports.record.csv_text import read_columns, write_columns
from reports.record.run_record import (
    IterationLog,
    RecordError,
    RunRecord,
    prepare_out,
    read_meta,
    read_record,
    write_record,
)
from reports.record.schema import (
    EVENT_COLUMNS,
    HANDOVER_COLUMNS,
    ITERATION_COLUMNS,
    ITL_COLUMNS,
    REQUEST_COLUMNS,
    Kind,
)
from tests.reports.records import iteration_row, record_of, request_row, toy_run


def equal(one: RunRecord, other: RunRecord) -> bool:
    def same(left: object, right: object) -> bool:
        if isinstance(left, list):
            return left == right
        assert left.dtype == right.dtype  # type: ignore[attr-defined]
        return np.array_equal(left, right, equal_nan=left.dtype.kind == "f")  # type: ignore

    return (
        one.meta == other.meta
        and list(one.requests) == list(other.requests)
        and all(same(one.requests[name], other.requests[name]) for name in one.requests)
        and all(same(one.iterations[name], other.iterations[name]) for name in one.iterations)
        and all(same(*pair) for pair in zip(one.itl, other.itl, strict=True))
    )


@pytest.mark.parametrize("loop", ["normal", "overlap", "pipeline"])
def test_a_record_comes_back_as_it_was_written(tmp_path: Path, loop: str) -> None:
    record = toy_run(loop, number=30, pp=2 if loop == "pipeline" else 1)
    write_record(record, tmp_path / loop)
    assert equal(read_record(tmp_path / loop), record)


def test_an_old_record_names_the_workbench_as_a_new_one_does(tmp_path: Path) -> None:
    old = toy_run(number=3)
    old.meta["versions"] = {"llm-workbench": "0.1.0", "python": "3.11.2"}
    write_record(old, tmp_path / "old")
    assert read_meta(tmp_path / "old")["versions"] == {"workbench": "0.1.0", "python": "3.11.2"}


def test_the_same_record_gives_the_same_bytes(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        write_record(toy_run(number=30), tmp_path / folder)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == ["iterations.csv", "itl.csv", "meta.json", "requests.csv"]
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_the_files_look_as_the_documentation_says(tmp_path: Path) -> None:
    request = request_row(request_id="a", arrival_s=0.1, queued_s=0.1, scheduled_s=1e-6, input_tokens=7, priority=2.0)
    iteration = iteration_row(iteration=3, mode=1, launch_s=0.0004, receive_s=5e-9, end_s=3600.000000001, process_s=1.0)
    write_record(record_of([request], [iteration], {0.25: 3, 1e-9: 1}), tmp_path / "run")
    assert (tmp_path / "run/requests.csv").read_text().splitlines() == [
        ",".join(name for name in REQUEST_COLUMNS if name not in HANDOVER_COLUMNS),
        "a,,0,0.1,0.1,0.000001,,,7,0,0,0,finished,,,2,",
    ]
    assert (tmp_path / "run/iterations.csv").read_text().splitlines() == [
        ",".join(ITERATION_COLUMNS),
        "3,0,0,decode,0.0004,0,3600.000000001,0,0,0,0,0,0,0,0.000000005,0,0,1",
    ]
    assert (tmp_path / "run/itl.csv").read_text() == "itl_s,count\n0.000000001,1\n0.25,3\n"
    meta = json.loads((tmp_path / "run/meta.json").read_text())
    assert list(meta) == sorted(meta) and meta["format"] == "workbench run"


@given(st.lists(st.one_of(st.floats(-1e6, 1e6), st.floats(-1e-4, 1e-4), st.just(math.nan)), min_size=1))
def test_seconds_are_written_without_exponent_and_read_back_exactly(values: list[float]) -> None:
    seconds = np.round(np.array(values), 9) + 0.0
    file = io.BytesIO()
    write_columns({"x_s": seconds, "id": ["i"] * len(values)}, {"x_s": Kind.TIME, "id": Kind.TEXT}, file)
    lines = file.getvalue().decode().splitlines()[1:]
    texts = [line.removesuffix(",i") for line in lines]
    assert all(re.fullmatch(r"(-?\d+(\.\d{1,9})?)?", text) for text in texts)
    assert np.array_equal([float(text or "nan") for text in texts], seconds, equal_nan=True)
    file.seek(0)
    frame = pd.read_csv(file)
    assert np.allclose(frame["x_s"].astype(float), seconds, rtol=1e-12, atol=0, equal_nan=True)


@given(st.lists(st.text(st.characters(exclude_characters="\x00", exclude_categories=["Cs"])), min_size=1, max_size=8))
def test_any_text_survives_in_an_id(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    path = tmp_path_factory.mktemp("ids") / "ids.csv"
    kinds = {"id": Kind.TEXT, "n": Kind.INT}
    with path.open("wb") as file:
        write_columns({"id": texts, "n": np.arange(len(texts))}, kinds, file)
    assert read_columns(path, kinds)["id"] == texts


def test_rows_beyond_one_chunk_are_all_written(tmp_path: Path) -> None:
    path, n = tmp_path / "n.csv", 150_001
    with path.open("wb") as file:
        write_columns({"n": np.arange(n)}, {"n": Kind.INT}, file)
    assert np.array_equal(read_columns(path, {"n": Kind.INT})["n"], np.arange(n))


def test_the_log_keeps_whole_numbers_exact_and_takes_numpy_values() -> None:
    log = IterationLog()
    log.append(tuple(iteration_row(iteration=2**60 + 1, mode=2, start_s=0.5).values()))
    log.append(tuple(iteration_row(iteration=np.int64(7), end_s=np.float64(1.5)).values()))
    columns = log.columns()
    assert len(log) == 2
    assert columns["iteration"].tolist() == [2**60 + 1, 7]
    assert columns["mode"].dtype == np.int8 and columns["mode"].tolist() == [2, 0]
    assert columns["end_s"].tolist() == [0.0, 1.5]
    for count in ("requests", "kv_used_tokens"):
        with pytest.raises(struct.error):
            log.append(tuple(iteration_row(**{count: 1.5}).values()))
    assert {len(column) for column in log.columns().values()} == {2}, "what is refused leaves nothing behind"


def test_consecutive_decode_steps_at_once_are_the_same_as_one_by_one() -> None:
    one_by_one, at_once = IterationLog(), IterationLog()
    same = {
        "instance": 3,
        "mode": 1,
        "requests": 4,
        "decode_tokens": 4,
        "waiting": 1,
        "running": 5,
        "receive_s": 0.1,
        "schedule_s": 0.2,
        "launch_host_s": 0.3,
        "process_s": 0.4,
    }
    for log in (one_by_one, at_once):
        log.append(tuple(iteration_row(iteration=1, start_s=0.1, context_tokens=7).values()))
    for i in range(3):
        own = {"launch_s": 0.5 + i, "start_s": 0.6 + i, "end_s": 0.7 + i, "kv_used_tokens": 2**60 + i}
        one_by_one.append(tuple(iteration_row(iteration=2 + i, context_tokens=100 + 4 * i, **own, **same).values()))
    first = iteration_row(
        iteration=2, context_tokens=100, launch_s=0.5, start_s=0.6, end_s=0.7, kv_used_tokens=2**60, **same
    )
    at_once.append(tuple(first.values()))
    at_once.go_on([1.5, 2.5], [1.6, 2.6], [1.7, 2.7], [2**60 + 1, 2**60 + 2])
    for log in (one_by_one, at_once):
        log.append(tuple(iteration_row(iteration=5, prefill_tokens=9).values()))
    for name, column in at_once.columns().items():
        assert column.tolist() == one_by_one.columns()[name].tolist(), name


def test_an_empty_log_gives_empty_columns() -> None:
    assert {name: len(column) for name, column in IterationLog().columns().items()} == dict.fromkeys(
        ITERATION_COLUMNS, 0
    )


def test_times_are_rounded_to_nanoseconds_and_equal_gaps_are_merged() -> None:
    record = record_of([request_row(request_id="a", arrival_s=0.1 + 0.2)], itl={0.1: 2, 0.1 + 1e-12: 3})
    assert record.requests["arrival_s"].tolist() == [0.3]
    assert [part.tolist() for part in record.itl] == [[0.1], [5]]


def test_columns_that_do_not_fit_are_refused() -> None:
    good = toy_run(number=3)
    short = {**good.requests, "arrival_s": good.requests["arrival_s"][:2]}
    with pytest.raises(RecordError, match="arrival_s has 2 rows"):
        RunRecord(good.meta, short, good.iterations, good.itl)
    with pytest.raises(RecordError, match="unknown column speed; missing column mode"):
        wrong = {("speed" if name == "mode" else name): values for name, values in good.iterations.items()}
        RunRecord(good.meta, good.requests, wrong, good.itl)
    with pytest.raises(RecordError, match="input_tokens: whole numbers wanted"):
        RunRecord(good.meta, {**good.requests, "input_tokens": np.array([1.5, 2, 3])}, good.iterations, good.itl)


def test_columns_that_only_some_traces_have_may_be_missing() -> None:
    good = toy_run(number=3)
    few = {name: values for name, values in good.requests.items() if name not in ("slo_ttft_s", "turn")}
    record = RunRecord(good.meta, few, good.iterations, good.itl)
    assert list(record.requests) == list(REQUEST_COLUMNS) and np.isnan(record.requests["turn"]).all()


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path) -> None:
    record = toy_run(number=3)
    record.iterations["mode"] = np.full_like(record.iterations["mode"], 9)  # no such mode: writing fails half way
    with pytest.raises(Exception, match="out of bounds"):
        write_record(record, tmp_path / "run")
    assert list(tmp_path.iterdir()) == []
    record.meta["bad"] = math.nan
    with pytest.raises(RecordError, match=r"meta\.json cannot hold"):
        write_record(record, tmp_path / "run")


def test_decisions_are_moved_into_the_record(tmp_path: Path) -> None:
    (tmp_path / "d").write_text("{}\n")
    write_record(toy_run(number=3), tmp_path / "run", {"decisions.jsonl": tmp_path / "d"})
    assert (tmp_path / "run/decisions.jsonl").read_text() == "{}\n" and not (tmp_path / "d").exists()


def test_an_existing_folder_is_not_written_into(tmp_path: Path) -> None:
    write_record(toy_run(number=3), tmp_path / "run")
    with pytest.raises(RecordError, match="exists and is not an empty folder"):
        write_record(toy_run(number=3), tmp_path / "run")


def broken(folder: Path, name: str, change: tuple[str, str]) -> Path:
    write_record(toy_run(number=4), folder)
    path = folder / name
    text = path.read_text()
    assert change[0] in text
    path.write_text(text.replace(*change, 1))
    return folder


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("requests.csv", ("request_id,", "id,"), r"requests\.csv: line 1: no column request_id"),
        ("requests.csv", ("r2,s2,0", "r2,s2,zero"), r"requests\.csv: line 4, column instance: 'zero' is not a whole"),
        ("requests.csv", ("r2,s2,0,", "r2,s2,0,soon"), r"line 4, column arrival_s: 'soon.*' is not a number"),
        ("requests.csv", ("r2,s2,0", "r2,s2,"), r"line 4, column instance: '' is not a whole number"),
        ("requests.csv", ("r2,s2,0,", "r2,s2,0,9999999999"), r"arrival_s: '9{10}.*' is not within what a record"),
        ("itl.csv", ("\n", "\nnan,1\n"), r"line 2, column itl_s: 'nan' is not a time"),
        ("requests.csv", ("r2,s2,0,", "r2,s2,0"), r"line 4: 16 values where the header has 17"),
        (
            "iterations.csv",
            ("prefill,0", "waiting,0"),
            r"iterations\.csv: line 2, column mode: 'waiting' is not one of",
        ),
        ("meta.json", ('"hardware"', "hardware"), r"meta\.json: line \d+, column \d+: "),
        ("meta.json", ("workbench run", "somebody's"), r"meta\.json: not the description of a workbench run"),
        ("meta.json", ('"format_version": 1', '"format_version": 2'), "format version 2, this workbench reads 1"),
    ],
)
def test_a_broken_file_is_told_in_one_line(tmp_path: Path, name: str, change: tuple[str, str], says: str) -> None:
    with pytest.raises(RecordError, match=says) as error:
        read_record(broken(tmp_path / "run", name, change))
    assert "\n" not in str(error.value)


def test_a_folder_that_is_no_run_is_told_apart(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="no such folder"):
        read_record(tmp_path / "nowhere")
    write_record(toy_run(number=3), tmp_path / "out/normal")
    with pytest.raises(RecordError, match=r"not a run: it holds no meta\.json \(its folders normal do\)"):
        read_record(tmp_path / "out")
    (tmp_path / "out/normal/requests.csv").unlink()
    with pytest.raises(RecordError, match=r"requests\.csv: cannot be read"):
        read_record(tmp_path / "out/normal")


def test_a_record_needs_neither_iterations_nor_gaps_nor_events(tmp_path: Path) -> None:
    record = toy_run(number=3)
    write_record(record, tmp_path / "run")
    for name in ("iterations.csv", "itl.csv"):
        (tmp_path / "run" / name).unlink()
    read = read_record(tmp_path / "run")
    assert read.requests["request_id"] == record.requests["request_id"]
    assert not len(read.iterations["iteration"]) and not len(read.itl[0]) and not read.events["request_id"]


def test_events_are_written_and_read_back(tmp_path: Path) -> None:
    rows = {
        "request_id": ["a", "a"],
        "instance": [0, 0],
        "iteration": [0, 4],
        "event": ["prefill", "retracted"],
        "tokens": [7, 0],
    }
    plain = toy_run(number=3)
    write_record(RunRecord(plain.meta, plain.requests, plain.iterations, plain.itl, rows), tmp_path / "run")
    read = read_record(tmp_path / "run").events
    assert {name: list(values) for name, values in read.items()} == rows


def test_an_empty_run_is_not_read(tmp_path: Path) -> None:
    write_record(record_of([]), tmp_path / "run")
    with pytest.raises(RecordError, match="an empty run"):
        read_record(tmp_path / "run")


def an_output(folder: Path) -> Path:
    record = toy_run(number=3)
    for name in ("normal", "overlap"):
        write_record(record, folder / name)
    write_report({"normal": record}, folder / "report.html", "t", "c")
    (folder / ".pipeline.partial").mkdir()
    (folder / ".pipeline.partial/meta.json").write_text("{")
    return folder


def test_an_output_folder_is_kept_unless_forced(tmp_path: Path) -> None:
    prepare_out(tmp_path / "new/folder")
    prepare_out(tmp_path / "new/folder")  # there, but empty
    out = an_output(tmp_path / "out")
    with pytest.raises(RecordError, match=r"not empty .*--force"):
        prepare_out(out)
    prepare_out(out, force=True)
    assert list(out.iterdir()) == []


def test_a_single_run_is_replaced_when_forced(tmp_path: Path) -> None:
    write_record(toy_run(number=3), tmp_path / "run")
    prepare_out(tmp_path / "run", force=True)
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.parametrize(
    "stranger", ["thesis.md", "normal/notes.txt", "data/meta.json", "empty/", "report.html", ".x.partial/work.py"]
)
def test_force_removes_nothing_when_something_is_not_ours(tmp_path: Path, stranger: str) -> None:
    out = an_output(tmp_path / "out")
    path = out / stranger
    path.parent.mkdir(exist_ok=True)
    if stranger.endswith("/"):
        path.mkdir()
    else:
        path.write_text("{}")
    before = sorted(out.rglob("*"))
    with pytest.raises(RecordError, match="nothing removed"):
        prepare_out(out, force=True)
    assert sorted(out.rglob("*")) == before


def test_force_does_not_follow_links(tmp_path: Path) -> None:
    write_record(toy_run(number=3), tmp_path / "elsewhere")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/normal").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RecordError, match="nothing removed"):
        prepare_out(tmp_path / "out", force=True)
    assert (tmp_path / "elsewhere/meta.json").exists()


def test_a_file_is_no_output_folder(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(RecordError, match="not a folder"):
        prepare_out(tmp_path / "out", force=True)


def test_the_documentation_defines_every_column_and_every_metric() -> None:
    text = (Path(__file__).parents[2] / "docs/run-record.md").read_text()
    requests, iterations, itl = (
        text.split(f"## {name}")[1].split("\n## ")[0] for name in ("requests.csv", "iterations.csv", "itl.csv")
    )
    events = text.split("## events.csv")[1].split("\n## ")[0]
    for part, columns in (
        (requests, REQUEST_COLUMNS),
        (iterations, ITERATION_COLUMNS),
        (itl, ITL_COLUMNS),
        (events, EVENT_COLUMNS),
    ):
        assert [name for name in columns if f"`{name}`" not in part] == []
    metrics = text.split("## The metrics")[1]
    for name in METRICS:
        spread = re.sub(r"_(mean|p50|p90|p99)_s$", "_*", name)
        shortened = name.removeprefix("requests").removeprefix("iterations")
        assert any(f"`{shown}`" in metrics for shown in (name, spread, shortened)), name
