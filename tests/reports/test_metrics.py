"""Metrics against numbers worked out by hand, against numpy, and against pandas reading the CSV files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reports.metrics.intervals import covered, length, overlap, union
from reports.metrics.percentiles import weighted_percentile
from reports.metrics.summary import summarise
from reports.record.run_record import RunRecord, write_record
from tests.reports.records import iteration_row, record_of, request_row, toy_run


def four_requests() -> RunRecord:
    """One GPU, four requests; all times in whole or half seconds.

    GPU      ....aaaaaa..bbbb..............cccc..
    second   0   1     4 5   7            10   12
    a: 0 to 8, two retractions; b: 1 to 6, one token; c: turned away at 2; d: 9 to 12, then aborted.
    """
    requests = [
        request_row(
            request_id="a",
            arrival_s=0.0,
            queued_s=0.0,
            scheduled_s=1.0,
            first_token_s=4.0,
            finish_s=8.0,
            input_tokens=100,
            output_tokens=5,
            cached_tokens=20,
            retractions=2,
        ),
        request_row(
            request_id="b",
            arrival_s=1.0,
            queued_s=1.0,
            scheduled_s=3.0,
            first_token_s=6.0,
            finish_s=6.0,
            input_tokens=60,
            output_tokens=1,
            cached_tokens=20,
        ),
        request_row(request_id="c", arrival_s=2.0, finish_s=2.0, input_tokens=1000, status="rejected:too long"),
        request_row(
            request_id="d",
            arrival_s=9.0,
            queued_s=9.0,
            scheduled_s=10.0,
            finish_s=12.0,
            input_tokens=40,
            status="aborted:timeout",
        ),
    ]
    iterations = [
        iteration_row(
            iteration=0,
            mode=0,
            start_s=1.0,
            end_s=4.0,
            requests=1,
            prefill_tokens=100,
            running=1,
            waiting=1,
            kv_used_tokens=100,
            receive_s=0.25,
            schedule_s=0.25,
            launch_host_s=0.5,
            process_s=1.0,
        ),
        iteration_row(
            iteration=1,
            mode=1,
            start_s=5.0,
            end_s=7.0,
            requests=2,
            decode_tokens=2,
            running=2,
            kv_used_tokens=162,
            process_s=1.0,
        ),
        iteration_row(
            iteration=2,
            mode=2,
            start_s=10.0,
            end_s=12.0,
            requests=1,
            prefill_tokens=40,
            decode_tokens=1,
            running=1,
            kv_used_tokens=40,
        ),
    ]
    return record_of(requests, iterations, {1.0: 3, 2.0: 1})


def test_four_requests_give_the_metrics_worked_out_by_hand() -> None:
    found = summarise(four_requests())
    expected = {
        "duration_s": 12.0,  # 0 to the abort at 12
        "requests_total": 4,
        "requests_finished": 2,
        "requests_aborted": 1,
        "requests_rejected": 1,
        "requests_unfinished": 0,
        "requests_cut": None,
        "cut_tokens": None,
        "request_throughput": 2 / 12,
        "input_throughput": 160 / 12,
        "output_throughput": 6 / 12,
        "total_throughput": 166 / 12,
        "ttft_mean_s": 4.5,
        "ttft_p50_s": 4.5,
        "ttft_p90_s": 4.9,
        "ttft_p99_s": 4.99,  # 4 and 5
        "tpot_mean_s": 1.0,
        "tpot_p50_s": 1.0,
        "tpot_p90_s": 1.0,
        "tpot_p99_s": 1.0,  # (8 - 4) / 4; b has none
        "itl_mean_s": 1.25,
        "itl_p50_s": 1.0,
        "itl_p90_s": 1.7,
        "itl_p99_s": 1.97,  # 1 1 1 2
        "e2e_mean_s": 6.5,
        "e2e_p50_s": 6.5,
        "e2e_p90_s": 7.7,
        "e2e_p99_s": 7.97,  # 8 and 5
        "queue_mean_s": 1.5,
        "queue_p50_s": 1.5,
        "queue_p90_s": 1.9,
        "queue_p99_s": 1.99,  # 1 and 2
        "goodput_rps": None,
        "goodput_share": None,
        "gpu_busy_share": 7 / 12,
        "cpu_exposed_share": 4 / 12,  # work from 0 to 8 and 9 to 12 is 11; the GPU worked 7 of it
        "no_work_share": 1 / 12,
        "bubble_share": None,
        "host_cpu_share": 3 / 12,
        "gpu_prefill_s": 3.0,
        "gpu_decode_s": 2.0,
        "gpu_mixed_s": 2.0,
        "cache_hit_rate": 40 / 200,  # c was never scheduled
        "retractions": 2,
        "iterations": 3,
        "iterations_prefill": 1,
        "iterations_decode": 1,
        "iterations_mixed": 1,
        "mean_decode_batch": 1.5,
        "peak_kv_used_tokens": 162,
        "peak_running": 2,
        "peak_waiting": 1,
        "gpu_hours": None,
        "energy_kwh": None,
        "energy_per_output_token_j": None,
        "cost": None,
        "cost_per_million_output_tokens": None,
    }
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name] == (None if value is None else pytest.approx(value, rel=1e-12)), name


def test_goodput_counts_what_met_the_slo_and_a_request_s_own_slo_wins() -> None:
    record = four_requests()
    assert summarise(record, slo_ttft_s=4.0)["goodput_share"] == 1 / 4  # a; b took 5
    assert summarise(record, slo_ttft_s=5.0)["goodput_rps"] == 2 / 12
    assert summarise(record, slo_tpot_s=0.5)["goodput_share"] == 1 / 4  # b has no TPOT to miss
    record.requests["slo_ttft_s"] = np.array([1.0, 9.0, np.nan, np.nan])
    assert summarise(record)["goodput_share"] == 1 / 4
    assert summarise(record, slo_ttft_s=100.0)["goodput_share"] == 1 / 4


def test_two_equal_stages_that_wait_for_each_other_have_half_of_the_time_in_bubbles() -> None:
    request = request_row(arrival_s=0.0, scheduled_s=0.0, first_token_s=2.0, finish_s=4.0, output_tokens=2)
    rows = [
        iteration_row(
            iteration=step,
            stage=stage,
            start_s=2.0 * step + stage,
            end_s=2.0 * step + stage + 1,
            mode=step,
            decode_tokens=step,
            process_s=0.1 * (stage == 0),
        )
        for step in (0, 1)
        for stage in (0, 1)
    ]
    found = summarise(record_of([request], rows))
    assert found["bubble_share"] == 0.5
    assert found["gpu_busy_share"] == 0.5
    assert found["iterations"] == 2  # not four: one forward pass, whatever the stages
    assert found["host_cpu_share"] == pytest.approx(0.2 / 4)


def test_an_instance_that_got_no_request_counts_as_idle() -> None:
    record = four_requests()
    record.meta["settings"] = {"dp": 2}
    assert summarise(record)["gpu_busy_share"] == pytest.approx(7 / 24)
    assert summarise(record)["no_work_share"] == pytest.approx(13 / 24)


def test_a_run_in_which_nothing_finished_has_counts_and_no_latencies() -> None:
    waiting = request_row(request_id="a", arrival_s=1.0, status="unfinished")
    found = summarise(record_of([waiting]), slo_ttft_s=1.0)
    assert found["requests_unfinished"] == 1 and found["iterations"] == 0
    assert all(found[name] is None for name in ("duration_s", "ttft_mean_s", "itl_p99_s", "goodput_rps"))
    assert all(found[name] is None for name in ("gpu_busy_share", "cache_hit_rate", "output_throughput"))
    going = record_of([waiting], [iteration_row(start_s=2.0, end_s=3.0)])
    assert summarise(going)["gpu_busy_share"] == 0.5  # an interrupted run lasts to its last iteration
    assert summarise(record_of([]))["requests_total"] == 0


@given(
    st.lists(st.tuples(st.floats(0, 1e3), st.integers(0, 5)), min_size=1, max_size=40).filter(
        lambda pairs: any(count for _, count in pairs)
    ),
    st.sampled_from([0, 1, 25, 50, 90, 99, 99.9, 100]),
)
def test_a_weighted_percentile_is_that_of_the_repeated_values_to_the_last_bit(
    pairs: list[tuple[float, int]], percent: float
) -> None:
    values = np.array([value for value, _ in pairs])
    counts = np.array([count for _, count in pairs])
    assert weighted_percentile(values, counts, percent) == np.percentile(np.repeat(values, counts), percent)


def test_no_values_have_no_percentile() -> None:
    with pytest.raises(ValueError, match="no values"):
        weighted_percentile(np.array([1.0]), np.array([0]), 50)


spans = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)).map(sorted), max_size=12)


@given(spans, spans)
def test_intervals_agree_with_counting_seconds(some: list[list[int]], others: list[list[int]]) -> None:
    def seconds(pairs: list[list[int]]) -> set[int]:
        return {second for begin, end in pairs for second in range(begin, end)}

    def joined(pairs: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
        return union(*(np.array([pair[side] for pair in pairs], dtype=float) for side in (0, 1)))

    one, other = joined(some), joined(others)
    assert (one[0][1:] > one[1][:-1]).all()
    assert length(one) == len(seconds(some))
    assert overlap(one, other) == len(seconds(some) & seconds(others))
    upto = covered(one, np.arange(31.0))
    assert upto.tolist() == [len([second for second in seconds(some) if second < at]) for at in range(31)]


@pytest.mark.parametrize("loop", ["normal", "overlap", "pipeline"])
def test_every_metric_equals_the_one_pandas_computes_from_the_csv_files(tmp_path: Path, loop: str) -> None:
    record = toy_run(loop, number=60, pp=2 if loop == "pipeline" else 1)
    record.requests["status"][5] = "aborted:by the client"
    write_record(record, tmp_path / "run")
    found = summarise(record, slo_ttft_s=0.1, slo_tpot_s=0.006)
    expected = by_pandas(tmp_path / "run", slo_ttft_s=0.1, slo_tpot_s=0.006)
    assert set(found) == set(expected)
    for name, value in found.items():
        wanted, tolerance = expected[name]
        assert value == (None if wanted is None else pytest.approx(wanted, rel=1e-9, abs=tolerance)), name


def by_pandas(folder: Path, slo_ttft_s: float, slo_tpot_s: float) -> dict[str, tuple[float | None, float]]:
    """The same definitions, written again the way a user would, without any code of ours; each with a tolerance."""
    requests = pd.read_csv(folder / "requests.csv")
    iterations = pd.read_csv(folder / "iterations.csv")
    gaps = pd.read_csv(folder / "itl.csv")
    done = requests[requests.status == "finished"]
    begin, end = requests.arrival_s.min(), requests.finish_s.max()
    duration = end - begin
    tpot = ((done.finish_s - done.first_token_s) / (done.output_tokens - 1))[done.output_tokens > 1]
    ttft = done.first_token_s - done.arrival_s
    samples = {
        "ttft": ttft,
        "tpot": tpot,
        "itl": gaps.loc[gaps.index.repeat(gaps["count"]), "itl_s"],
        "e2e": done.finish_s - done.arrival_s,
        "queue": done.scheduled_s - done.arrival_s,
    }
    result: dict[str, float | None] = {}
    for name, values in samples.items():
        result[f"{name}_mean_s"] = values.mean()
        for percent in (50, 90, 99):
            result[f"{name}_p{percent}_s"] = values.quantile(percent / 100)
    good = (ttft <= slo_ttft_s) & ((tpot.reindex(done.index) <= slo_tpot_s) | (done.output_tokens == 1))
    stages = iterations.stage.max() + 1
    # Moments, 10 microseconds apart, at which somebody is in the system, and at which each stage is busy.
    ticks = np.arange(0, int((duration + 1) * 1e5)) / 1e5 + begin
    ticks = ticks[ticks < end]
    present = inside(ticks, requests.arrival_s, requests.finish_s)
    first = iterations[iterations.stage == 0]
    seconds = iterations.end_s.clip(upper=end) - iterations.start_s.clip(upper=end)
    at_work = [inside(ticks, rows.start_s, rows.end_s) & present for _, rows in iterations.groupby("stage")]
    host = first[["receive_s", "schedule_s", "launch_host_s", "process_s"]].to_numpy().sum()
    by_mode = (iterations.end_s - iterations.start_s).groupby(iterations["mode"]).sum()
    decoding = first[first.decode_tokens > 0]

    result |= {
        "duration_s": duration,
        "requests_total": len(requests),
        "requests_finished": len(done),
        "requests_aborted": requests.status.str.startswith("aborted").sum(),
        "requests_rejected": 0,
        "requests_unfinished": 0,
        "requests_cut": None,
        "cut_tokens": None,
        "request_throughput": len(done) / duration,
        "input_throughput": done.input_tokens.sum() / duration,
        "output_throughput": done.output_tokens.sum() / duration,
        "total_throughput": (done.input_tokens + done.output_tokens).sum() / duration,
        "goodput_rps": good.sum() / duration,
        "goodput_share": good.sum() / len(requests),
        "gpu_busy_share": seconds.sum() / duration / stages,
        "cpu_exposed_share": (present & ~at_work[0]).mean(),
        "no_work_share": 1 - present.mean(),
        "bubble_share": 1 - sum(busy.sum() for busy in at_work) / stages / present.sum() if stages > 1 else None,
        "host_cpu_share": host / duration,
        "gpu_prefill_s": by_mode.get("prefill", 0),
        "gpu_decode_s": by_mode.get("decode", 0),
        "gpu_mixed_s": by_mode.get("mixed", 0),
        "cache_hit_rate": requests.cached_tokens.sum() / requests.input_tokens.sum(),
        "retractions": requests.retractions.sum(),
        "iterations": len(first),
        **{f"iterations_{mode}": (first["mode"] == mode).sum() for mode in ("prefill", "decode", "mixed")},
        "mean_decode_batch": decoding.decode_tokens.mean(),
        "peak_kv_used_tokens": iterations.kv_used_tokens.max(),
        "peak_running": iterations.running.max(),
        "peak_waiting": iterations.waiting.max(),
    }
    coarse = {"cpu_exposed_share", "no_work_share", "bubble_share"}  # as fine as the ticks
    meta = json.loads((folder / "meta.json").read_text())
    result |= dict.fromkeys(("gpu_hours", "energy_kwh", "energy_per_output_token_j"))  # where the record says no GPUs
    result |= dict.fromkeys(("cost", "cost_per_million_output_tokens"))
    for pool in meta.get("pools", []):  # all of one kind
        gpu_s = pool["count"] * pool["gpus"] * duration
        watts = {**pool["power_w"], "mixed": pool["power_w"]["prefill"]}
        within = seconds.groupby(iterations["mode"]).sum()
        busy_s = {mode: float(within.get(mode, 0.0)) * pool["tp"] for mode in ("prefill", "decode", "mixed")}
        joules = sum(watts[mode] * seconds_of for mode, seconds_of in busy_s.items())
        joules += watts["idle"] * (gpu_s - sum(busy_s.values()))
        result |= {"gpu_hours": gpu_s / 3600, "energy_kwh": joules / 3.6e6}
        result["energy_per_output_token_j"] = joules / done.output_tokens.sum()
    return {name: (value, 2e-3 if name in coarse else 1e-9) for name, value in result.items()}


def inside(ticks: np.ndarray, begin: pd.Series, end: pd.Series) -> np.ndarray:
    """Whether each tick lies in at least one interval."""
    return np.searchsorted(np.sort(begin), ticks, "right") > np.searchsorted(np.sort(end), ticks, "right")
