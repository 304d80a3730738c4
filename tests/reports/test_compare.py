"""Two runs of one trace, request by request."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from reports.compare.comparison import compare, first_difference
from reports.imported.engine_settings import settings_of
from reports.imported.llmservingsim import read_measured
from reports.record.errors import RecordError
from reports.record.run_record import RunRecord, read_record, write_record
from tests.cost.test_profile import ROOT, workbench
from tests.meta_form import check_meta
from tests.reports.records import record_of, request_row
from workbench.cli.app import app
from workbench.settings.loading import recorded_settings

SAMPLE = ROOT / "traces" / "samples" / "sample.jsonl"


def run(scale: float = 1.0, late_s: float = 0.0, **meta: object) -> RunRecord:
    """Four requests of 11 tokens; every latency is ``scale`` times 1, 2, 3, 4 s, queued ``late_s`` after arrival."""
    rows = [
        request_row(
            request_id=f"r{i}",
            arrival_s=float(i),
            queued_s=i + late_s,
            scheduled_s=i + late_s + 0.1 * scale,
            first_token_s=i + late_s + 0.5 * i * scale,
            finish_s=i + late_s + i * scale,
            input_tokens=100,
            output_tokens=11,
        )
        for i in range(1, 5)
    ]
    return record_of(rows, name=f"x{scale}", **meta)


def test_a_run_compared_with_itself_has_no_error():
    found = compare(run(), run())
    for error in found.latencies.values():
        assert error.mean == error.absolute_mean == error.signed_median == 0
        assert set(error.percentiles.values()) == {0}
    assert found.throughput_error == 0 and found.requests == 4


def test_errors_are_of_the_second_relative_to_the_first():
    found = compare(run(), run(1.1))
    for name in ("ttft", "tpot", "e2e"):
        error = found.latencies[name]
        assert error.mean == pytest.approx(0.1) and error.absolute_mean == pytest.approx(0.1)
        assert error.percentiles == pytest.approx({"p50": 0.1, "p90": 0.1, "p99": 0.1})
    assert found.latencies["e2e"].reference_mean_s == pytest.approx(2.5)
    less = compare(run(), run(0.9)).latencies["e2e"]
    assert less.signed_mean == pytest.approx(-0.1) and less.absolute_median == pytest.approx(0.1)


def test_latencies_begin_where_the_reference_says():
    queued = run(late_s=0.3, latency_from="queued")
    assert compare(queued, run()).latencies["e2e"].mean == pytest.approx(0)
    assert compare(queued, run(), "arrival").latencies["e2e"].mean < 0


def test_runs_of_different_traces_are_refused_in_one_line():
    other = run()
    other.requests["input_tokens"] = other.requests["input_tokens"] + np.array([0, 0, 5, 0])
    with pytest.raises(RecordError, match="not runs of one trace: input_tokens of r3: 100 and 105"):
        compare(run(), other)
    short = record_of([request_row(request_id="r1", arrival_s=0.0, finish_s=1.0, first_token_s=0.5, output_tokens=2)])
    with pytest.raises(RecordError, match="4 requests and 1"):
        compare(run(), short)


def test_what_the_first_run_lost_and_the_second_was_not_given_is_left_out():
    lossy = run()
    lossy.requests["status"][2] = "rejected:http_503"
    given = run(1.1)
    for name, values in given.requests.items():
        given.requests[name] = [values[i] for i in (0, 1, 3)] if isinstance(values, list) else values[[0, 1, 3]]
    found = compare(lossy, given)
    assert found.requests == 3 and found.latencies["e2e"].absolute_mean == pytest.approx(0.1)
    assert found.notes == ["requests that did not finish in x1.0 and are not in x1.1, left out: 1"]
    with pytest.raises(RecordError, match="4 requests and 3"):
        compare(run(), given)
    lossy.requests["input_tokens"][2] = 0
    assert compare(lossy, run()).requests == 3, "how long a prompt was that failed need not be known"


def test_an_answer_in_one_piece_has_no_first_token_and_counts_for_throughput_when_it_ends():
    whole = run()
    whole.requests["first_token_s"][1] = np.nan
    found = compare(whole, run())
    assert found.latencies["e2e"].absolute_mean == 0 and len(found.pairs["ttft"][0]) == 3
    assert found.throughput_error is not None and 0 < found.throughput_error < 1


def test_requests_are_matched_by_id_in_any_order_and_by_place_when_named_differently():
    turned = copy.deepcopy(run(1.2))
    for name, values in turned.requests.items():
        turned.requests[name] = list(reversed(values)) if isinstance(values, list) else values[::-1].copy()
    assert compare(run(), turned).latencies["e2e"].absolute_mean == pytest.approx(0.2)
    renamed = run(1.2)
    renamed.requests["request_id"] = [f"bench-{i}" for i in range(4)]
    found = compare(run(), renamed)
    assert found.latencies["e2e"].absolute_mean == pytest.approx(0.2) and "by their order" in found.notes[0]


def test_the_first_batch_that_differs_is_found():
    lines = [{"instance": 0, "mode": "decode", "prefill": [], "decode": ["a"], "retracted": []} for _ in range(5)]
    assert first_difference(lines, copy.deepcopy(lines)) == {"equal": True, "batches": 5}
    other = copy.deepcopy(lines)
    other[3]["decode"] = ["a", "b"]
    found = first_difference(lines, other)
    assert (found["equal"], found["batch"], found["differs_in"]) == (False, 3, ["decode"])
    assert first_difference(lines, lines[:4])["differs_in"] == ["length"]


@pytest.mark.slow
def test_the_command_prints_a_table_json_and_an_error_budget(tmp_path):
    flags = ("--requests", 60, "--ignore-eos", "--decisions")
    for name, more in (("a", ()), ("b", ("--gpu", "h200"))):
        done = workbench("simulate", SAMPLE, *flags, *more, "--out", tmp_path / name)
        assert done.returncode == 0, done.stderr
    a, b = tmp_path / "a/overlap", tmp_path / "b/overlap"
    table = workbench("compare", a, b)
    assert table.returncode == 0 and "TTFT" in table.stdout and "decisions" in table.stdout
    done = workbench("compare", a, b, "--trace", SAMPLE, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    parts = {part["part"]: part for part in found["budget"]["parts"]}
    assert found["latencies"]["tpot"]["mean"] < -0.05
    # The GPUs differ and the engines do not: step times explain it.
    assert parts["step times"]["tpot"] == pytest.approx(found["latencies"]["tpot"]["mean"], abs=0.02)
    assert abs(parts["scheduling and the rest"]["tpot"]) < 0.02
    total = sum(part["tpot"] for part in parts.values())
    assert total == pytest.approx(found["latencies"]["tpot"]["mean"], abs=1e-9)


@pytest.fixture(scope="module")
def runs_of_two_gpus(tmp_path_factory):
    """The same under a link that is said and under the one that is assumed."""
    folder = tmp_path_factory.mktemp("links")
    for name, more in (
        ("said", ("--link", "5GB/s", "--link-latency", "40us")),
        ("assumed", ()),
        ("one", ("--tp", "1", "--model", "Qwen/Qwen3-8B")),
    ):
        flags = ("--gpu", "l40s", "--tp", "2", "--requests", "12", "--ignore-eos", *more)
        done = CliRunner().invoke(app, ["simulate", str(SAMPLE), *map(str, flags), "--out", str(folder / name)])
        assert done.exit_code == 0, done.output
    return folder


def compared(a, b, *more):
    done = CliRunner().invoke(app, ["compare", str(a / "overlap"), str(b / "overlap"), *map(str, more)])
    assert done.exit_code == 0, done.output
    return " ".join(done.stdout.split()) if "--json" not in more else json.loads(done.stdout)


def test_the_link_is_named_as_a_cause_where_the_reference_says_another(runs_of_two_gpus):
    a, b = runs_of_two_gpus / "said", runs_of_two_gpus / "assumed"
    said = compared(a, b, "--trace", SAMPLE)
    assert (
        "link between GPUs: 18.9GB/s and 5.31us here, 5GB/s and 40us in A; with A's the errors of the means are" in said
    )
    found = compared(a, b, "--trace", SAMPLE, "--json")
    assert found["latencies"]["tpot"]["mean"] < -0.05
    assert found["budget"]["links"]["with_reference"]["tpot"] == pytest.approx(0, abs=1e-6)
    assert "link" not in compared(a, b).split("error budget")[-1], "without the trace nothing is run again"


def test_without_a_link_of_the_reference_its_weight_is_told(runs_of_two_gpus, tmp_path):
    b = runs_of_two_gpus / "assumed"
    a = tmp_path / "unknown" / "overlap"
    record = read_record(runs_of_two_gpus / "said/overlap")
    for name in ("link", "link_latency"):
        record.meta["settings"].pop(name)
    write_record(record, a)
    found = compared(a.parent, b, "--trace", SAMPLE, "--json")
    links = found["budget"]["links"]
    assert links["assumed"] and links["twice_as_slow"]["tpot"] > found["latencies"]["tpot"]["mean"]
    assert links["twice_as_fast"]["tpot"] < found["latencies"]["tpot"]["mean"]
    said = compared(a.parent, b, "--trace", SAMPLE)
    assert "link between GPUs: 18.9GB/s and 5.31us assumed; twice as slow the errors of the means would be TTFT" in said


def test_one_gpu_has_no_link_to_name(runs_of_two_gpus):
    one = runs_of_two_gpus / "one"
    assert "links" not in compared(one, one, "--trace", SAMPLE, "--json")["budget"]


def test_two_runs_called_alike_are_told_apart_in_every_line(tmp_path):
    for folder in ("vllm", "sglang"):
        write_record(run(), tmp_path / folder / "overlap")
    done = CliRunner().invoke(app, ["compare", str(tmp_path / "vllm/overlap"), str(tmp_path / "sglang/overlap")])
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("sglang/overlap (B) against vllm/overlap (A): ")
    (budget,) = (line for line in done.stdout.splitlines() if line.startswith("error budget: "))
    assert " of x1.0" not in budget and "overlap" not in budget


@pytest.mark.slow
def test_the_page_of_a_comparison_shows_its_errors_and_every_request(tmp_path):
    for name, record in (("a", run()), ("b", run(1.25))):
        write_record(record, tmp_path / name)
    page = tmp_path / "page.html"
    done = workbench("compare", tmp_path / "a", tmp_path / "b", "--out", page)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(f"report: {page}\n")
    text = page.read_text()
    table = re.search(r'<table class="errors">.*?</table>', text, re.DOTALL)
    rows = re.findall(r'<tr><th scope="row">(.*?)</th>(.*?)</tr>', table[0])
    cells = {name: re.findall("<td>(.*?)</td>", row) for name, row in rows}
    assert cells["E2E"] == ["2.500 s", *["+25.0%"] * 4, "25.0%", "25.0%", "+25.0%"]
    charts = re.findall(r"<figcaption>(\w+) .*?class=\"dots\" d=\"(.*?)\"", text, re.DOTALL)
    dots = {name: path.split("M")[1:] for name, path in charts}
    assert set(dots) == {"TTFT", "TPOT", "E2E", "Queueing"} and {len(each) for each in dots.values()} == {4}
    x, y = (float(value) for value in dots["E2E"][-1].removesuffix("h0").split())
    # The slowest: 4 s against 5 s, on axes from 0 to 5 s; B's reaches the top.
    assert (x - 8) / (260 - 6 - 8) == pytest.approx(0.8, abs=1e-3) and y == pytest.approx(6)
    assert workbench("compare", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "a").returncode == 2


@pytest.mark.slow
def test_mismatched_traces_and_missing_runs_exit_with_2(tmp_path):
    write_record(run(), tmp_path / "a")
    write_record(record_of([request_row(request_id="q", arrival_s=0.0, finish_s=1.0)]), tmp_path / "b")
    for arguments in (
        (tmp_path / "a", tmp_path / "b"),
        (tmp_path / "a", tmp_path / "c"),
        (tmp_path / "a",) * 2 + ("--from", "x"),
    ):
        done = workbench("compare", *arguments)
        assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


# -- measured runs -----------------------------------------------------------------------------------------------------


def measured(folder: Path, **changes: object) -> Path:
    folder.mkdir(exist_ok=True)
    meta = {
        "model": "meta-llama/Llama-3.1-8B",
        "vllm_version": "0.19.0",
        "dataset_path": "x/trace.jsonl",
        "engine_kwargs": {
            "tensor_parallel_size": 2,
            "data_parallel_size": 2,
            "max_num_seqs": 64,
            "dtype": "bfloat16",
            "enable_expert_parallel": True,
            "max_model_len": None,
        },
    }
    (folder / "meta.json").write_text(json.dumps(meta | {"kv_cache": {"num_gpu_blocks": 100, "block_size": 16}}))
    row = {
        "request_id": "bench-0",
        "input_toks": 10,
        "output_toks": 5,
        "arrival_time": 1e9,
        "queued_ts": 100.0,
        "scheduled_ts": 100.1,
        "first_token_ts": 100.5,
        "last_token_ts": 101.0,
    }
    later = row | {
        "request_id": "bench-1",
        "queued_ts": 102.0,
        "scheduled_ts": 102.0,
        "first_token_ts": 102.5,
        "last_token_ts": 103.0,
        "arrival_time": 1e9 + 1.9,
    }
    (folder / "requests.jsonl").write_text("\n".join(json.dumps(line) for line in (row, later | changes)) + "\n")
    return folder


def test_a_measured_run_becomes_a_record_with_the_settings_of_its_engine(tmp_path):
    done = workbench("import", measured(tmp_path / "m"), "--out", tmp_path / "r")
    assert done.returncode == 0, done.stderr
    record = read_record(tmp_path / "r")
    check_meta(record.meta, "imported")
    assert record.meta["hardware"]["gpus"] == 4
    assert record.requests["first_token_s"].tolist() == [0.5, 2.5]
    assert record.requests["queued_s"].tolist() == [0.0, 2.0]
    # The second needed 0.1 s longer from the client to the engine than the first.
    assert record.requests["arrival_s"].tolist() == pytest.approx([0.0, 1.9])
    settings = record.meta["settings"]
    assert (settings["tp"], settings["dp"], settings["ep"], settings["max_running"]) == (2, 2, 4, 64)
    assert settings["engine"] == "vllm-0.19" and settings["kv_tokens"] == 1600
    assert workbench("import", tmp_path / "m", "--out", tmp_path / "r").returncode == 2
    assert workbench("import", tmp_path / "m", "--out", tmp_path / "r", "--force").returncode == 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"queued_ts": None}, "line 2: queued_ts: missing"),
        ({"input_toks": "ten"}, "line 2: input_toks: 'ten'"),
        ({"first_token_ts": 99.0}, "line 2: first_token_ts: not between"),
        ({"output_toks": 5.5}, "line 2: output_toks: 5.5 is not a whole number"),
        ({"last_token_ts": float("inf")}, "line 2: last_token_ts: inf is not a number"),
        ({"arrival_time": "late"}, "line 2: arrival_time: 'late'"),
        ({"instance": "a"}, "line 2: instance: 'a'"),
        ({"request_id": "bench-0"}, "line 2: request_id: 'bench-0' is on line 1, too"),
        ({"last_token_ts": 10**30}, r"line 2: last_token_ts: larger than 9e\+18"),
        ({"input_toks": 1e30}, r"line 2: input_toks: larger than 9e\+18"),
    ],
)
def test_a_bad_line_of_a_measured_run_is_named(tmp_path, changes, said):
    with pytest.raises(RecordError, match=said):
        read_measured(measured(tmp_path / "m", **changes))


def test_a_note_says_that_the_preset_of_another_version_stands_for_the_engine(tmp_path):
    folder = measured(tmp_path / "m")
    meta = json.loads((folder / "meta.json").read_text())
    for version, noted in (("0.19.0", False), ("0.19", False), ("0.190.1", True), ("0.33.0", True)):
        (folder / "meta.json").write_text(json.dumps(meta | {"vllm_version": version}))
        record = read_measured(folder)
        said = f"measured under vLLM {version}: engine vllm-0.19 stands for it, unless --engine names another"
        assert record.meta["settings"]["engine"] == "vllm-0.19"
        assert record.meta["trace"]["notes"] == ([said] if noted else [])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--tp 2", 'engine_kwargs: "--tp 2" is not an object'),
        ({"tensor_parallel_size": {}}, "engine_kwargs: tensor_parallel_size: {} is not a number"),
        ({"block_size": "16", "num_gpu_blocks_override": 8}, 'engine_kwargs: block_size: "16" is not a number'),
        ({"data_parallel_size": 1.5}, "engine_kwargs: data_parallel_size: 1.5 is not a whole number"),
    ],
)
def test_engine_arguments_that_cannot_be_reckoned_with_are_named(tmp_path, arguments, said):
    folder = measured(tmp_path / "m")
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | {"engine_kwargs": arguments}))
    with pytest.raises(RecordError) as refused:
        read_measured(folder)
    assert str(refused.value).startswith(f"{folder / 'meta.json'}: {said}")


def test_the_link_that_a_publisher_names_for_several_gpus_is_kept(tmp_path):
    folder = measured(tmp_path / "m")
    (folder / "config.json").write_text(json.dumps({"link_bw": 16, "link_latency": 20000}))
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({**meta, "engine_kwargs": {"tensor_parallel_size": 1}}))
    assert "link" not in read_measured(folder).meta["settings"], "one GPU has none"
    (folder / "meta.json").write_text(json.dumps({**meta, "engine_kwargs": {"tensor_parallel_size": 2}}))
    found = read_measured(folder).meta
    assert (found["settings"]["link"], found["settings"]["link_latency"]) == ("16GB/s", "20us")
    assert recorded_settings(found, "measured")["link"] == "16GB/s"
    for bad in ({"link_bw": "16"}, {"link_bw": 0}, {"link_latency": True}):
        (folder / "config.json").write_text(json.dumps(bad))
        with pytest.raises(RecordError, match=r"config.json: link_\w+: .* is not a number above 0"):
            read_measured(folder)


def test_a_row_without_its_arrival_makes_all_arrive_when_they_were_queued_and_a_note_says_so(tmp_path):
    whole = read_measured(measured(tmp_path / "m"))
    assert whole.meta["trace"]["notes"] == [] and whole.requests["arrival_s"].tolist() == pytest.approx([0.0, 1.9])
    done = workbench("import", measured(tmp_path / "m", arrival_time=None), "--out", tmp_path / "r")
    record = read_record(tmp_path / "r")
    assert record.requests["arrival_s"].tolist() == record.requests["queued_s"].tolist() == [0.0, 2.0]
    (note,) = record.meta["trace"]["notes"]
    assert note.startswith(
        "1 of 2 requests have no arrival_time (the first is number 2 in requests.jsonl): every request"
    )
    assert f"note: {note}\n" in done.stdout


def test_engine_arguments_without_a_counterpart_are_left_out():
    assert settings_of({"seed": 42, "max_model_len": None, "enable_prefix_caching": False}) == {
        "ignore_eos": True,
        "cache": "none",
    }
