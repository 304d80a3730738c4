"""Records of instances, made one."""

from __future__ import annotations

import json

import numpy as np

from reports.record.run_record import read_record, write_record
from tests.reports.records import iteration_row, record_of, request_row
from workbench.fleet.merged import merge_traces, merged, names


def part(names_and_arrivals, launches=(), itl=None):
    requests = [request_row(request_id=name, arrival_s=at, input_tokens=10) for name, at in names_and_arrivals]
    iterations = [
        iteration_row(iteration=i, launch_s=at, start_s=at, end_s=at + 0.5, requests=1) for i, at in enumerate(launches)
    ]
    return record_of(requests, iterations, itl)


def put_together(parts, roles, name="fleet"):
    return merged({"name": name, "settings": {}}, parts, roles, names(parts, roles))


def with_events(record, *rows):
    ids, iterations, events, tokens = zip(*rows, strict=True)
    record.events = {
        "request_id": list(ids),
        "instance": np.zeros(len(rows), np.int64),
        "iteration": np.array(iterations),
        "event": list(events),
        "tokens": np.array(tokens),
    }
    return record


def test_requests_and_iterations_of_all_stand_in_the_order_of_their_times_with_their_instances():
    first = with_events(part([("a", 1.0), ("c", 3.0)], (1.0, 4.0), {0.5: 2}), ("a", 0, "prefill", 10))
    second = with_events(part([("b", 2.0)], (2.0, 3.0), {0.5: 1, 0.7: 1}), ("b", 0, "prefill", 9))
    record = put_together({0: first, 2: second}, {0: "both", 2: "both"})
    assert record.requests["request_id"] == ["a", "b", "c"]
    assert record.requests["instance"].tolist() == [0, 2, 0]
    assert record.iterations["launch_s"].tolist() == [1.0, 2.0, 3.0, 4.0]
    assert record.iterations["instance"].tolist() == [0, 2, 2, 0]
    assert record.iterations["iteration"].tolist() == [0, 0, 1, 1]
    assert [list(each) for each in record.itl] == [[0.5, 0.7], [3, 1]]
    assert (record.events["request_id"], record.events["instance"].tolist()) == (["a", "b"], [0, 2])


def test_stages_of_an_iteration_stay_together():
    rows = [(0, 0, 1.0), (0, 1, 1.0), (1, 0, 2.0), (1, 1, 2.0)]
    staged = record_of([], [iteration_row(iteration=i, stage=stage, launch_s=at) for i, stage, at in rows])
    record = put_together({0: staged, 1: part([], (1.5,))}, {0: "both", 1: "both"})
    columns = [record.iterations[name].tolist() for name in ("instance", "iteration", "stage")]
    assert list(zip(*columns, strict=True)) == [(0, 0, 0), (0, 0, 1), (1, 0, 0), (0, 1, 0), (0, 1, 1)]


def test_a_name_that_several_instances_have_is_told_apart_and_any_other_kept():
    parts = {0: part([("same-1", 0.0), ("own", 1.0)]), 3: part([("same-1", 2.0)])}
    found = names(parts, {0: "both", 3: "both"})
    assert found == {0: {"same-1": "same-1@0", "own": "own"}, 3: {"same-1": "same-1@3"}}


def test_no_two_requests_are_called_the_same_whatever_clients_call_theirs():
    parts = {0: part([("a", 0.0), ("a@1", 1.0)]), 1: part([("a", 2.0)])}
    assert names(parts, {0: "both", 1: "both"}) == {0: {"a": "a@0", "a@1": "a@1"}, 1: {"a": "a@1'"}}
    parts = {0: part([("r-1", 0.0), ("r-2", 1.0), ("r-1-5", 2.0)])}
    assert names(parts, {0: "decode"}) == {0: {"r-1": "r-2", "r-2": "r-3", "r-1-5": "r-1"}}


def test_halves_are_called_after_their_request_without_its_room():
    parts = {0: part([("a-b-77", 0.1), ("c-99", 2.0)]), 1: part([("a-b-77", 0.2), ("a-b-12", 0.15), ("c-99", 2.0)])}
    found = names(parts, {0: "prefill", 1: "decode"})
    assert found[1] == {"a-b-77": "a-b-1", "a-b-12": "a-b-2", "c-99": "c"} == found[0]


def test_halves_of_a_request_are_one_line_with_both_instances_and_the_moments_of_each(tmp_path):
    prefill = with_events(
        record_of(
            [
                request_row(
                    request_id="r-7",
                    status="handed_over",
                    arrival_s=1.0,
                    queued_s=1.1,
                    scheduled_s=1.3,
                    bootstrap_s=1.2,
                    prefill_start_s=1.3,
                    prefill_end_s=1.8,
                    transfer_start_s=1.5,
                    cached_tokens=4,
                )
            ],
            [iteration_row(iteration=0, launch_s=1.3)],
        ),
        ("r-7", 0, "prefill", 6),
    )
    decode = record_of(
        [
            request_row(
                request_id="r-7",
                arrival_s=1.05,
                transfer_end_s=1.9,
                decode_admission_s=2.0,
                first_token_s=2.0,
                finish_s=3.0,
                output_tokens=5,
            ),
            request_row(request_id="lost-8", arrival_s=0.5, finish_s=0.6, status="aborted:prefill_gone"),
        ],
        [iteration_row(iteration=0, launch_s=2.0)],
    )
    roles = {0: "prefill", 1: "prefill", 2: "decode"}
    record = put_together({0: part([]), 1: prefill, 2: decode}, roles)
    write_record(record, tmp_path / "pairs")
    found = read_record(tmp_path / "pairs").requests
    assert found["request_id"] == ["lost", "r"]
    line = {name: values[1] for name, values in found.items()}
    assert (line["instance"], line["prefill_instance"], line["decode_instance"]) == (2, 1, 2)
    assert (line["bootstrap_s"], line["prefill_start_s"], line["prefill_end_s"]) == (1.2, 1.3, 1.8)
    assert (line["transfer_start_s"], line["transfer_end_s"], line["decode_admission_s"]) == (1.5, 1.9, 2.0)
    assert (line["arrival_s"], line["queued_s"], line["scheduled_s"], line["cached_tokens"]) == (1.0, 1.1, 1.3, 4)
    assert (line["status"], line["output_tokens"], line["first_token_s"]) == ("finished", 5, 2.0)
    assert np.isnan(found["prefill_instance"][0]), "its other half is not known"
    assert record.events["request_id"] == ["r"] and record.events["instance"].tolist() == [1]


def test_the_trace_of_all_begins_at_zero_and_is_in_the_order_of_the_record(tmp_path):
    said = {0: [("a", 5.0), ("c", 7.25)], 1: [("a", 6.0)]}
    for number, lines in said.items():
        text = "".join(json.dumps({"request_id": name, "arrival_s": at}) + "\n" for name, at in lines)
        (tmp_path / f"{number}.jsonl").write_text(text)
    named = names({number: part(lines) for number, lines in said.items()}, {0: "both", 1: "both"})
    out = tmp_path / "all.jsonl"
    paths = {number: tmp_path / f"{number}.jsonl" for number in (0, 1)}
    assert merge_traces(paths, named, {"a@0": 5.0, "a@1": 6.0, "c": 5.5}, out) == 3
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(line["request_id"], line["arrival_s"]) for line in found] == [("a@0", 0.0), ("c", 0.5), ("a@1", 1.0)]
