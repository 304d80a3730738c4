"""Results of benchmark tools become run records: `workbench import`."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from reports.imported.recognise import TAKES, read_results
from reports.record.errors import RecordError
from reports.record.run_record import RunRecord, read_record
from tests.meta_form import check_meta
from tests.reports import results_of_tools as tools
from tests.reports.results_of_tools import written, written_aiperf
from workbench.cli.app import app


def column(record: RunRecord, name: str) -> list[Any]:
    """A column by request id, NaN as None."""
    values = record.requests[name]
    pairs = zip(record.requests["request_id"], values if isinstance(values, list) else values.tolist(), strict=True)
    return {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in pairs}


def notes(record: RunRecord) -> str:
    return "\n".join(record.meta["trace"]["notes"])


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


# -- what each tool writes ---------------------------------------------------------------------------------------------


def test_vllm_bench_serve_has_every_request_with_its_times(tmp_path):
    record = read_results(written(tmp_path / "vllm.json", tools.vllm()))
    check_meta(record.meta, "imported")
    assert record.name == "vllm" and record.meta["model"] == "meta-llama/Llama-3.1-8B"
    assert column(record, "arrival_s") == {"r1": 0.0, "r2": 0.5, "r3": 0.75, "r4": 1.5}
    assert column(record, "first_token_s") == {"r1": 0.25, "r2": 0.625, "r3": None, "r4": 1.75}
    assert column(record, "finish_s") == {"r1": 0.75, "r2": 0.625, "r3": None, "r4": 2.25}
    assert column(record, "status") == {"r1": "finished", "r2": "finished", "r3": "rejected:http_503", "r4": "finished"}
    assert column(record, "input_tokens") == {"r1": 10, "r2": 20, "r3": 15, "r4": 30}
    assert column(record, "output_tokens") == {"r1": 4, "r2": 1, "r3": 0, "r4": 3}
    assert record.itl[0].tolist() == [0.125, 0.25, 0.5] and record.itl[1].tolist() == [2, 1, 1]
    assert set(column(record, "queued_s").values()) == set(column(record, "scheduled_s").values()) == {None}
    assert "1 request failed: Service Unavailable" in notes(record)
    assert "5 tokens after the first ones came in 4 pieces" in notes(record)
    assert "concurrency" not in record.meta["settings"] and record.meta["settings"]["client"]["request_rate"] == 2.0


@pytest.mark.parametrize(
    ("version", "says_when", "fields"),
    [
        ("0.14.0", False, set()),
        ("0.19.0", True, {"start_times"}),
        ("0.33.0", True, {"start_times", "latencies", "queue_times"}),
    ],
)
def test_what_each_version_of_the_vllm_client_wrote_is_read(version, says_when, fields):
    # Six requests of five tokens, two at a time, by `vllm bench serve` of these versions; a server sent a token every 10 ms.
    path = Path(__file__).parent / "client_results" / f"vllm-{version}.json"
    assert set(json.loads(path.read_text())) & {"start_times", "latencies", "queue_times"} == fields
    record = read_results(path)
    requests, notes = record.requests, record.meta["trace"]["notes"]
    assert requests["output_tokens"].tolist() == [5] * 6 and requests["input_tokens"].tolist() == [8] * 6
    assert set(requests["status"]) == {"finished"} and record.meta["settings"]["concurrency"] == 2
    took_s = requests["finish_s"] - requests["first_token_s"]
    assert ((took_s >= 0.039) & (took_s < 1)).all() and record.itl[1].sum() == 24
    assert any("does not say when requests were sent" in note for note in notes) is not says_when
    for at_s in requests["arrival_s"]:
        assert ((requests["arrival_s"] <= at_s) & (requests["finish_s"] > at_s)).sum() <= 2


def test_requests_are_in_order_of_arrival_and_keep_the_names_of_their_places_in_the_file(tmp_path):
    result = tools.vllm() | {"start_times": [5000.0, 5003.0, 5001.0, 5002.0]}
    record = read_results(written(tmp_path / "vllm.json", result))
    assert record.requests["request_id"] == ["r1", "r3", "r4", "r2"]


def test_an_earlier_vllm_does_not_say_when_requests_were_sent_and_a_note_tells_what_stands_there(tmp_path):
    result = tools.vllm()
    del result["start_times"], result["latencies"], result["queue_times"]
    record = read_results(written(tmp_path / "a.json", result))
    assert column(record, "arrival_s") == {"r1": 0.0, "r2": 0.5, "r3": 1.0, "r4": 1.5}
    assert column(record, "finish_s") == {"r1": 0.75, "r2": 0.625, "r3": None, "r4": 2.25}
    assert "they stand 0.5 s apart, the mean of --request-rate 2" in notes(record)
    at_once = read_results(written(tmp_path / "b.json", result | {"request_rate": "inf"}))
    assert set(column(at_once, "arrival_s").values()) == {0.0} and "all at once" in notes(at_once)
    for more in ({"ramp_up_strategy": "linear"}, {"request_rate": "trace"}, {"request_rate": None}):
        with pytest.raises(RecordError, match=r"start_times: missing, and request_rate .* does not say when"):
            read_results(written(tmp_path / "c.json", result | more))


def test_an_sglang_line_gives_a_closed_loop_and_what_the_server_says_of_itself(tmp_path):
    record = read_results(written(tmp_path / "sg.jsonl", tools.sglang()))
    # Two at a time: the third goes when the second has ended, the fourth when first and third have, both after 1 s.
    assert column(record, "arrival_s") == {"r1": 0.0, "r2": 0.0, "r3": 0.5, "r4": 1.0}
    assert column(record, "finish_s") == {"r1": 1.0, "r2": 0.5, "r3": 1.0, "r4": 1.75}
    assert "each where the earliest of --max-concurrency 2 places was free again" in notes(record)
    assert record.meta["model"] == "Qwen/Qwen3-32B"
    settings = {key: value for key, value in record.meta["settings"].items() if key != "client"}
    assert settings == {
        "ignore_eos": True,
        "engine": "sglang",
        "concurrency": 2,
        "tp": 2,
        "page_size": 1,
        "chunk": 8192,
        "mem_fraction": 0.85,
        "dtype": "bf16",
        "cache": "none",
    }


def test_of_several_runs_in_a_file_one_has_to_be_chosen(tmp_path):
    path = written(tmp_path / "sg.jsonl", tools.sglang(), tools.sglang() | {"max_concurrency": 4})
    with pytest.raises(RecordError) as refused:
        read_results(path)
    assert str(refused.value) == (
        f"{path}: holds 2 runs, choose with --run: 1: request_rate inf, max_concurrency 2; "
        "2: request_rate inf, max_concurrency 4"
    )
    assert set(column(read_results(path, run=2), "arrival_s").values()) == {0.0}
    for wrong in (0, 3):
        with pytest.raises(RecordError, match=f"--run {wrong}: there are 2"):
            read_results(path, run=wrong)
    with pytest.raises(RecordError, match="--run 2: it holds one run"):
        read_results(written_aiperf(tmp_path / "ai"), run=2)


@pytest.mark.parametrize("form", ["json", "indented", "yaml"])
def test_a_guidellm_report_is_read_in_every_form(tmp_path, form):
    path = tmp_path / f"benchmarks.{'yaml' if form == 'yaml' else 'json'}"
    report = tools.guidellm()
    path.write_text(
        yaml.dump(report) if form == "yaml" else json.dumps(report, indent=2 if form == "indented" else None)
    )
    record = read_results(tmp_path, "truth")
    check_meta(record.meta, "imported")
    assert record.name == "truth" and record.meta["model"] == "llama-3.1-8b"
    assert column(record, "arrival_s") == {"q1": 0.0, "q2": 0.25, "q3": 0.5, "q4": 0.75}
    assert column(record, "first_token_s") == {"q1": 0.125, "q2": 0.5, "q3": None, "q4": 0.875}
    assert column(record, "finish_s") == {"q1": 0.625, "q2": 1.0, "q3": 0.75, "q4": None}
    assert column(record, "status") == {"q1": "finished", "q2": "finished", "q3": "rejected:error", "q4": "unfinished"}
    assert column(record, "input_tokens") == {"q1": 101, "q2": 102, "q3": 0, "q4": 104}
    assert set(record.requests["session_id"]) == {""} and record.meta["settings"]["concurrency"] == 2
    assert "1 request not yet sent when the benchmark stopped" in notes(record) and "503: no room" in notes(record)
    assert not len(record.itl[0])


def test_a_guidellm_report_before_0_4_has_its_times_elsewhere(tmp_path):
    record = read_results(written(tmp_path / "old.json", tools.guidellm_before_0_4()))
    assert column(record, "first_token_s") == {"q1": 0.125, "q2": None, "q3": None}
    assert column(record, "finish_s") == {"q1": 0.625, "q2": 1.125, "q3": 0.75}
    assert record.meta["model"] == "llama-3.1-8b" and "concurrency" not in record.meta["settings"]
    assert "holds 3 of 21 requests, a sample" in notes(record)
    assert "1 answer came in one piece" in notes(record)


def test_turns_of_a_conversation_keep_their_session(tmp_path):
    report = tools.guidellm()
    first, second = report["benchmarks"][0]["requests"]["successful"]
    first["info"] |= {"conversation_id": "c1", "turn_index": 1}
    record = read_results(written(tmp_path / "g.json", report))
    assert column(record, "session_id") == {"q1": "c1", "q2": "c1", "q3": "", "q4": ""}
    assert column(record, "turn") == {"q1": 0, "q2": 1, "q3": None, "q4": None}
    assert second["info"]["turn_index"] == 0


def test_aiperf_records_are_exact_to_the_nanosecond_and_leave_out_the_warm_up(tmp_path):
    folder = written_aiperf(tmp_path / "ai")
    record = read_results(folder)
    check_meta(record.meta, "imported")
    assert record.name == "ai" and record.meta["model"] == "llama-3.1-8b"
    assert column(record, "arrival_s") == {"x1": 0.0, "x2": 0.25, "x3": 0.5, "x4": 0.75}
    assert column(record, "first_token_s") == {"x1": 0.125, "x2": 0.5, "x3": None, "x4": None}
    # Of those that failed: when they did. Moments of a request are one nanosecond past the millisecond.
    assert column(record, "finish_s") == {"x1": 0.375, "x2": 0.75, "x3": 0.749999999, "x4": 0.874999999}
    statuses = {"x1": "finished", "x2": "finished", "x3": "aborted:cancelled", "x4": "rejected:http_503"}
    assert column(record, "status") == statuses
    assert record.itl[0].tolist() == [0.125] and record.itl[1].tolist() == [4]
    assert column(record, "cached_tokens") == {"x1": 32, "x2": 32, "x3": 0, "x4": 0}
    assert "1 request of the warm-up left out" in notes(record)
    assert record.meta["settings"]["concurrency"] == 2 and record.meta["settings"]["client"]["version"] == "0.13.0"
    for given_file in ("profile_export.jsonl", "profile_export_aiperf.json"):
        again = read_results(folder / given_file, "ai")
        assert again.meta == record.meta and column(again, "finish_s") == column(record, "finish_s")


def test_an_aiperf_summary_that_cannot_be_read_costs_the_model_and_the_load_and_a_note_says_so(tmp_path):
    folder = written_aiperf(tmp_path / "ai")
    (folder / "profile_export_aiperf.json").write_text('{"aiperf_version": ')
    record = read_results(folder)
    assert record.meta["model"] == "unknown" and "concurrency" not in record.meta["settings"]
    assert column(record, "arrival_s") == {"x1": 0.0, "x2": 0.25, "x3": 0.5, "x4": 0.75}
    said = "model, version and load of the run are not known: "
    assert f"{said}{folder / 'profile_export_aiperf.json'}: line 1, column 20: Expecting value" in notes(record)


def test_answers_that_are_not_streamed_have_no_first_token(tmp_path):
    lines = tools.aiperf()
    for line in lines:
        line["metrics"].pop("time_to_first_token", None)
        line["metrics"].pop("inter_chunk_latency", None)
    record = read_results(written(tmp_path / "profile_export.jsonl", *lines))
    assert column(record, "first_token_s")["x1"] is None and column(record, "finish_s")["x1"] == 0.375
    assert "2 answers came in one piece" in notes(record)
    whole = tools.sglang() | {"itls": [[], [], [], []]}
    record = read_results(written(tmp_path / "sg.jsonl", whole))
    assert set(column(record, "first_token_s").values()) == {None}


# -- what is refused ---------------------------------------------------------------------------------------------------


def without(result: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in result.items() if name not in names}


DETAILED = ("input_lens", "output_lens", "ttfts", "itls", "start_times", "generated_texts", "errors")


def test_aggregates_alone_are_refused_with_the_option_that_writes_the_rest(tmp_path):
    report = tools.guidellm()
    report["benchmarks"][0]["requests"] = {"successful": [], "errored": [], "incomplete": []}
    for name, result, said in (
        (
            "vllm.json",
            without(tools.vllm(), *DETAILED),
            "vllm bench serve writes what is per request with --save-detailed",
        ),
        (
            "sg.jsonl",
            without(tools.sglang(), *DETAILED),
            "bench_serving writes what is per request with --output-details",
        ),
        ("g.json", report, "benchmarks[0]: requests: missing: holds aggregates only; guidellm writes every request"),
        (
            "profile_export_aiperf.json",
            tools.aiperf_summary(),
            "holds aggregates only, and profile_export.jsonl is not",
        ),
        ("e.json", without(tools.vllm(), "output_lens", "ttfts", "itls"), "asked for no tokens, such as of embeddings"),
    ):
        path = written(tmp_path / name, result)
        with pytest.raises(RecordError) as refused:
            read_results(path)
        assert (
            str(refused.value).startswith(f"{path}: ") and said in str(refused.value) and "\n" not in str(refused.value)
        )


def test_what_is_something_else_is_told_what_is_taken(tmp_path):
    (tmp_path / "folder").mkdir()
    written(tmp_path / "trace.jsonl", {"request_id": "a", "arrival_s": 0.0})
    (tmp_path / "benchmarks.csv").write_text("Run Info,Metadata\nModel,x\n")
    (tmp_path / "list.json").write_text("[1]")
    for name in ("folder", "trace.jsonl", "benchmarks.csv", "list.json"):
        done = run("import", tmp_path / name, "--out", tmp_path / "out")
        assert done.exit_code == 2 and done.stderr.count("\n") == 1
        assert "nothing that can be imported; workbench import takes " in done.stderr
        assert all(each in done.stderr for each in TAKES)
    assert not (tmp_path / "out").exists()
    (tmp_path / "empty.json").write_text("\n")
    assert (
        "empty.json: empty; workbench import takes " in run("import", tmp_path / "empty.json", "--out", tmp_path).stderr
    )
    assert "no such file or folder" in run("import", tmp_path / "no", "--out", tmp_path / "out").stderr
    written(tmp_path / "requests.jsonl", {"queued_ts": 1.0})
    with pytest.raises(RecordError, match=r"give the folder, which holds requests\.jsonl and meta\.json"):
        read_results(tmp_path / "requests.jsonl")


def changed(result: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy with one value replaced, or taken away where it is ``...``."""
    result = copy.deepcopy(result)
    inner = result
    for step in path[:-1]:
        inner = inner[step]
    if value is ...:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return result


FIRST = ("benchmarks", 0, "requests", "successful", 0)


@pytest.mark.parametrize(
    ("make", "path", "value", "said"),
    [
        (tools.vllm, ("ttfts",), ..., "ttfts: missing"),
        (tools.vllm, ("itls",), [[]], "itls: has 1 values, input_lens has 4"),
        (tools.vllm, ("start_times",), [0.0], "start_times: has 1 values, input_lens has 4"),
        (tools.vllm, ("ttfts", 1), math.nan, "ttfts[1]: NaN is not a number of 0 or more"),
        (tools.vllm, ("itls", 0, 2), -1.0, "itls[0][2]: -1.0 is not a number of 0 or more"),
        (tools.vllm, ("itls", 3), None, "itls[3]: missing"),
        (tools.vllm, ("input_lens", 2), 1.5, "input_lens[2]: 1.5 is not a whole number"),
        (tools.vllm, ("output_lens", 0), "4", 'output_lens[0]: "4" is not a number of 0 or more'),
        (tools.vllm, ("latencies", 0), 0.125, "latencies[0]: 0.125 is less than the time to its first token"),
        (tools.sglang, ("max_concurrency",), 1.5, "max_concurrency: 1.5 is not a whole number"),
        (tools.guidellm, (*FIRST, "prompt_tokens"), None, "requests.successful[0]: prompt_tokens: missing"),
        (tools.guidellm, (*FIRST, "info", "timings", "request_start"), None, "info.timings: request_start: missing"),
        (tools.guidellm, (*FIRST, "info", "timings", "request_end"), "x", 'info.timings: request_end: "x" is not'),
        (tools.guidellm, (*FIRST, "info", "timings", "first_token_iteration"), 5.0, "are not in this order"),
        (tools.guidellm, (*FIRST, "request_id"), "q1", "two requests are called q1"),
        (tools.guidellm, ("benchmarks",), [], "holds no run"),
        (tools.guidellm, ("benchmarks", 0), 7, "benchmarks[0]: 7 is not an object"),
        (tools.aiperf, (1, "metrics", "request_latency"), ..., "line 2.metrics: request_latency: missing"),
        (
            tools.aiperf,
            (1, "metrics", "request_latency", "unit"),
            "min",
            "unit: 'min' is none; there are ns, us, ms, s, sec",
        ),
        (
            tools.aiperf,
            (3, "metadata", "request_start_ns"),
            1.5,
            "line 4.metadata: request_start_ns: 1.5 is not a whole",
        ),
        (
            tools.aiperf,
            (3, "metrics", "output_sequence_length"),
            ...,
            "line 4.metrics: output_sequence_length: missing",
        ),
        (tools.aiperf, (1, "metrics", "time_to_first_token", "value"), 1e9, "less than the time to the first token"),
    ],
)
def test_a_wrong_value_is_one_line_with_file_place_and_field(tmp_path, make, path, value, said):
    result = changed(make(), path, value)
    file = written(tmp_path / "result", *(result if isinstance(result, list) else [result]))
    with pytest.raises(RecordError) as refused:
        read_results(file)
    assert str(refused.value).startswith(f"{file}: ") and said in str(refused.value) and "\n" not in str(refused.value)


def test_a_file_that_breaks_off_leaves_nothing_behind(tmp_path):
    for make in (tools.vllm, tools.sglang, tools.guidellm, tools.aiperf):
        result = make()
        file = written(tmp_path / make.__name__, *(result if isinstance(result, list) else [result]))
        file.write_bytes(file.read_bytes()[:-300])
        done = run("import", file, "--out", tmp_path / "out", "--trace", tmp_path / "trace.jsonl")
        assert done.exit_code == 2, make
        assert done.stderr.startswith(f"error: {file}: line ") and done.stderr.count("\n") == 1
        assert sorted(tmp_path.glob("[!a-z]*")) == [] and not (tmp_path / "out").exists()
        assert not (tmp_path / "trace.jsonl").exists()


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of everything in a result."""
    steps = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return ([path] if path else []) + [found for step, inner in steps for found in places(inner, (*path, step))]


MAKERS: list[Callable[[], Any]] = [
    tools.vllm,
    tools.sglang,
    tools.guidellm,
    tools.guidellm_before_0_4,
    tools.aiperf,
]
WRONG = [..., None, True, -1, 0, 1.5, 1e308, 10**400, math.nan, math.inf, "", "x", [], [1], [[]], {}, {"a": 1}]


@settings(
    max_examples=400, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_whatever_is_wrong_it_is_a_record_or_one_line(tmp_path, data):
    result = data.draw(st.sampled_from(MAKERS))()
    for _ in range(data.draw(st.integers(1, 2))):
        found = places(result)
        if found:
            result = changed(result, data.draw(st.sampled_from(found)), data.draw(st.sampled_from(WRONG)))
    file = written(tmp_path / "result", *(result if isinstance(result, list) else [result]))
    try:
        record = read_results(file)
    except RecordError as refused:
        assert str(refused).startswith(f"{file}: ") and "\n" not in str(refused)
        return
    moments = np.array([record.requests[name] for name in ("arrival_s", "first_token_s", "finish_s")])
    assert np.isfinite(moments[0]).all() and not np.isinf(moments).any()
    assert not (moments[2] < moments[0]).any()


# -- what becomes of it ------------------------------------------------------------------------------------------------


def test_a_measured_run_is_simulated_and_compared_and_invents_no_iteration(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run("import", written(tmp_path / "vllm.json", tools.vllm()), "--out", "truth", "--trace", "truth.jsonl")
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("4 requests of meta-llama/Llama-3.1-8B: truth\nsettings: ignore_eos True\nnote: ")
    assert "note: not in truth.jsonl, for they did not finish: 1 request\n" in done.stdout
    assert "workbench simulate truth.jsonl --like truth" in done.stdout
    assert sorted(path.name for path in (tmp_path / "truth").iterdir()) == ["itl.csv", "meta.json", "requests.csv"]
    lines = [json.loads(line) for line in (tmp_path / "truth.jsonl").read_text().splitlines()]
    assert [line["request_id"] for line in lines] == ["r1", "r2", "r4"]
    assert lines[2] == {"request_id": "r4", "arrival_s": 1.5, "input_length": 30, "output_length": 3}
    done = run("simulate", "truth.jsonl", "--like", "truth", "--gpu", "h100", "--out", "sim")
    assert done.exit_code == 0, done.output
    done = run("compare", "truth", "sim/overlap", "--trace", "truth.jsonl", "--out", "page.html")
    assert done.exit_code == 0, done.output
    said = " ".join(done.stdout.split())
    assert "overlap (B) against vllm (A): 3 requests, latencies from arrival" in said
    assert "error budget: A has no iterations, so step time, CPU phases and scheduling cannot be told apart" in said
    assert "s are the first token," in said and "queueing" not in said
    assert "note: requests that did not finish in vllm and are not in overlap, left out: 1" in said
    done = run("report", "truth", "sim/overlap")
    assert done.exit_code == 0, done.output
    assert "vllm has no iterations: nothing is known of its batches" in " ".join(done.stdout.split())
    assert "These runs served different traces" not in done.stdout
    assert "seen by clients: when the engine queued" in (tmp_path / "report.html").read_text()


def test_a_record_and_its_trace_are_written_both_or_neither(tmp_path):
    file = written(tmp_path / "vllm.json", tools.vllm())
    trace, out = tmp_path / "t.jsonl", tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("x")
    done = run("import", file, "--out", out, "--trace", trace)
    assert done.exit_code == 2 and not trace.exists() and (out / "mine.txt").exists()
    (out / "mine.txt").unlink()
    trace.write_text("mine")
    done = run("import", file, "--out", out, "--trace", trace)
    assert (
        done.exit_code == 2 and "t.jsonl: exists; --force overwrites it" in done.stderr and trace.read_text() == "mine"
    )
    assert not list(out.iterdir())
    (out / "mine.txt").write_text("x")
    done = run("import", file, "--out", out, "--trace", trace, "--force")
    assert done.exit_code == 2 and "no workbench run wrote" in done.stderr and trace.read_text() == "mine"
    (out / "mine.txt").unlink()
    done = run("import", file, "--out", out, "--trace", file, "--force")
    assert done.exit_code == 2 and "is the file to import" in done.stderr and "r1" not in file.read_text()
    done = run("import", file, "--out", out, "--trace", trace, "--force")
    assert done.exit_code == 0 and read_record(out).meta["trace"]["name"] == "t" and "r4" in trace.read_text()


def test_a_run_in_which_nothing_finished_is_a_record_and_no_trace(tmp_path):
    lost = {
        "errors": ["boom"] * 4,
        "output_lens": [0] * 4,
        "ttfts": [0.0] * 4,
        "itls": [[]] * 4,
        "latencies": [0.0] * 4,
    }
    file = written(tmp_path / "vllm.json", tools.vllm() | lost)
    trace, out = tmp_path / "t.jsonl", tmp_path / "out"
    done = run("import", file, "--out", out, "--trace", trace)
    assert (
        done.exit_code == 2
        and done.stderr == f"error: {trace}: no request of the run finished, so there is none to write\n"
    )
    assert not trace.exists() and not out.exists()
    assert run("import", file, "--out", out).exit_code == 0
    done = run("report", out, "--out", tmp_path / "page.html")
    assert done.exit_code == 0 and "finished 0 of 4 requests (4 rejected)" in " ".join(done.stdout.split())
