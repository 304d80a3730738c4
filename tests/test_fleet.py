"""Instances that are lost and come back, and pools that follow the load."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from backends.simulated.clock import Clock
from reports.record.run_record import read_record
from workbench.cli.app import app
from workbench.cluster.fleet import Fleet, FleetPool
from workbench.recording.recorder import Recorder
from workbench.settings.fleet_spec import Failure, Scaling, parse_failures, parse_scalings

SAMPLE = Path(__file__).parents[1] / "traces" / "samples" / "sample.jsonl"
BOTH = ("--pool", "both:2")
PAIR = ("--pool", "prefill:2", "--pool", "decode:2")


def workbench(*words: object) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


def simulated(out: Path, trace: Path, *words: object) -> tuple[Any, dict[str, Any]]:
    """(record, meta.json) of a run."""
    ran = workbench("simulate", trace, *words, "--out", out)
    assert ran.exit_code == 0, ran.output
    return read_record(out / "overlap"), json.loads((out / "overlap/meta.json").read_text())


def spans(meta: dict[str, Any]) -> list[tuple[int, str, float, float]]:
    return [(span["instance"], span["state"], span["begin_s"], round(span["end_s"], 6)) for span in meta["fleet"]]


def written(path: Path, *requests: tuple[float, int, int]) -> Path:
    """A trace of requests: when they arrive, prompt and output."""
    rows = [
        {"request_id": f"r{i}", "arrival_s": at, "input_length": prompt, "output_length": output}
        for i, (at, prompt, output) in enumerate(requests)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# -- failures ----------------------------------------------------------------------------------------------------------


class FixedTimes:
    """A batch takes a second for a prompt and a tenth of one for a step of decodes."""

    def __init__(self, request: object) -> None:
        pass

    def forward(self, batch: Any, stage: int = 0) -> float:
        return 1.0 if batch.prefill_tokens else 0.1

    def transfer_s(self, batch: Any, stage: int) -> float:
        return 0.0


def test_a_request_whose_instance_is_lost_before_its_first_token_begins_anew_on_another(tmp_path):
    trace = written(tmp_path / "t.jsonl", (0.0, 100, 11))
    asked = (*BOTH, "--cost", "tests.test_fleet:FixedTimes")
    alone, _ = simulated(tmp_path / "alone", trace, *asked)
    lost, meta = simulated(tmp_path / "lost", trace, *asked, "--fail", "both.0:at=500ms,for=1s")
    # By hand: half of its prompt's second is lost with instance 0; instance 1 takes a second, and ten steps of 0.1 s.
    assert spans(meta) == [
        (0, "up", 0.0, 0.5),
        (0, "down", 0.5, 1.5),
        (0, "up", 1.5, pytest.approx(2.5, abs=0.02)),
        (1, "up", 0.0, pytest.approx(2.5, abs=0.02)),
    ]
    assert lost.requests["instance"].tolist() == [1] and lost.requests["status"] == ["finished"]
    assert lost.requests["scheduled_s"] == alone.requests["scheduled_s"], "the first batch that held it is the lost one"
    for name in ("first_token_s", "finish_s"):
        assert lost.requests[name][0] == pytest.approx(alone.requests[name][0] + 0.5, abs=1e-9), name
    assert set(lost.iterations["instance"].tolist()) == {1}, "what was lost was never processed"


def test_a_request_that_has_got_tokens_ends_with_its_instance_and_keeps_what_was_written(tmp_path):
    trace = written(tmp_path / "t.jsonl", (0.0, 100, 11), (2.0, 100, 5))
    record, meta = simulated(
        tmp_path / "o", trace, *BOTH, "--cost", "tests.test_fleet:FixedTimes", "--fail", "both.0:at=1350ms,for=200ms"
    )
    # A second for the prompt, then 0.1 s for each token: three more were there after 1.35 s (and a little for the CPU).
    assert record.requests["status"] == ["aborted:instance_gone", "finished"]
    assert record.requests["output_tokens"].tolist() == [4, 5]
    assert record.requests["finish_s"][0] == 1.35
    assert (0, "down", 1.35, 1.55) in spans(meta)


def test_an_instance_that_comes_back_takes_requests_and_counts_its_batches_on(tmp_path):
    record, meta = simulated(tmp_path / "o", SAMPLE, "--requests", 150, *BOTH, "--fail", "both.1:at=3s,for=2s")
    mine = record.iterations["instance"] == 1
    starts_s = record.iterations["start_s"][mine]
    assert not ((starts_s > 3) & (starts_s < 5)).any() and (starts_s > 5).any()
    assert np.unique(record.iterations["iteration"][mine]).size == mine.sum()
    statuses = set(record.requests["status"])
    assert statuses == {"finished", "aborted:instance_gone"}
    assert (1, "down", 3.0, 5.0) in spans(meta)


@pytest.mark.parametrize("retraction", ["host", "prefill"])
@pytest.mark.parametrize("at", ["2s", "4s", "6s"])
def test_every_request_of_a_pair_ends_once_whoever_is_lost(tmp_path, retraction, at):
    record, _ = simulated(
        *(tmp_path / "o", SAMPLE, "--requests", 120, "--rate", 30, "--pool", "prefill:2"),
        *("--pool", "decode:2,kv-tokens=9000", "--reserved-decode-tokens", 0, "--decode-retraction", retraction),
        *("--fail", f"prefill.0:at={at},for=1s", "--fail", f"decode.1:at={at}", "--fail", "prefill.1:at=7s,for=500ms"),
    )
    assert len(record.requests["status"]) == 120
    assert {status.split(":")[0] for status in record.requests["status"]} <= {"finished", "aborted"}
    done = np.array(record.requests["status"]) == "finished"
    assert done.sum() > 60 and not np.isnan(record.requests["finish_s"]).any()


def test_requests_that_come_while_nobody_is_there_are_refused(tmp_path):
    trace = written(tmp_path / "t.jsonl", (0.0, 50, 2), (5.0, 50, 2), (9.0, 50, 2))
    record, _ = simulated(tmp_path / "o", trace, "--pool", "both:1", "--fail", "both.0:at=4s,for=2s")
    assert record.requests["status"] == ["finished", "aborted:no_instance", "finished"]


def test_a_failure_that_finds_nothing_to_lose_is_noted_and_changes_nothing(tmp_path):
    without, _ = simulated(tmp_path / "w", SAMPLE, "--requests", 20, *PAIR)
    record, meta = simulated(tmp_path / "o", SAMPLE, "--requests", 20, *PAIR, "--fail", "decode.1:at=4000s")
    assert "fail: decode.1 at 4000 s did nothing: the run was over by then" in meta["trace"]["notes"]
    assert record.requests["finish_s"].tolist() == without.requests["finish_s"].tolist()
    assert meta["totals"]["simulated_s"] < 100


def test_a_run_with_failures_and_scaling_leaves_the_same_bytes_twice_and_step_by_step(tmp_path):
    asked = (
        *("--requests", 80, "--rate", 20, "--pool", "prefill:1,gpu=l40s", "--pool", "decode:1,gpu=l40s"),
        *("--fail", "decode.0:at=3s,for=1s"),
        *("--autoscale", "decode:max=3,signal=kv,target=0.1,every=500ms,start=1s,cool-down=2s"),
    )
    for name, more in (("a", ()), ("b", ()), ("exact", ("--exact",))):
        simulated(tmp_path / name, SAMPLE, *asked, *more)
    for file in ("requests.csv", "iterations.csv", "itl.csv", "events.csv"):
        first = (tmp_path / "a/overlap" / file).read_bytes()
        assert first == (tmp_path / "b/overlap" / file).read_bytes() == (tmp_path / "exact/overlap" / file).read_bytes()


# -- scaling -----------------------------------------------------------------------------------------------------------


class Scripted:
    """Instances whose load is said beforehand, as what sends requests and as what runs them."""

    def __init__(self, clock: Clock, waiting: Callable[[float, int], int], busy: Callable[[float, int], int]) -> None:
        self._clock, self._waiting, self._busy = clock, waiting, busy
        self.open: set[int] = set()
        self.said: list[tuple[float, str, int]] = []

    def shut(self, number: int) -> None:
        self.open.discard(number)

    def back(self, number: int) -> None:
        self.open.add(number)

    def gone(self, number: int, written: Callable[[str], int]) -> None:
        self.shut(number)
        self.said.append((self._clock.now_s(), "gone", number))

    def load(self, number: int) -> int:
        return self._busy(self._clock.now_s(), number)

    def begin(self, number: int) -> None:
        self.said.append((self._clock.now_s(), "begin", number))

    def end(self, number: int) -> Callable[[str], int]:
        self.said.append((self._clock.now_s(), "end", number))
        return lambda rid: 0

    def waiting(self, number: int) -> int:
        return self._waiting(self._clock.now_s(), number)

    def kv_share(self, number: int) -> float:
        return 0.1


def scaled(
    scaling: Scaling,
    waiting: Callable[[float, int], int],
    busy: Callable[[float, int], int],
    until_s: float,
    failures: tuple[Failure, ...] = (),
) -> tuple[list[tuple[int, str, float, float]], Scripted]:
    clock = Clock()
    recorder = Recorder(clock.now_s)
    recorder.by_id["r"] = None  # type: ignore[assignment]  # somebody is always there
    script = Scripted(clock, waiting, busy)
    pool = FleetPool("both", "both", range(scaling.most), scaling.least, None, scaling)
    fleet = Fleet(clock, [pool], failures, script, script, recorder)
    clock.run(until=until_s)
    return [(span.instance, span.state, span.begin_s, span.end_s) for span in fleet.spans(until_s)], script


def test_a_pool_follows_its_queue_as_worked_out_by_hand():
    scaling = Scaling("both", 4, 1, "queue", target=2, every_s=10, start_s=15, cool_down_s=30)

    def waiting(now_s: float, number: int) -> int:
        return 7 if now_s < 25 else 3 if now_s < 45 else 0

    def busy(now_s: float, number: int) -> int:
        return 1 if now_s < 75 else 0

    found, script = scaled(scaling, waiting, busy, 140)
    # 10 s: 7 wait, the target is 2: four are wanted, twice as many as there are is the most: one starts, until 25 s.
    # 20 s: again; with the one that starts there are two, so two more start, until 35 s.
    # 30 s: 3 wait on each of two: three are wanted, and four are there with those that start. 40 s: there are no more.
    # From 45 s on nothing waits; 70 s is the first look 30 s after the last change, at 35 s: 3, the last of those with the
    # least to do, drains, and has a request still. 100 and 130 s are 30 s apart, and there is nothing left to be done.
    assert found == [
        (0, "up", 0.0, 140),
        (1, "starting", 10.0, 25.0),
        (1, "up", 25.0, 130.0),
        (2, "starting", 20.0, 35.0),
        (2, "up", 35.0, 100.0),
        (3, "starting", 20.0, 35.0),
        (3, "up", 35.0, 70.0),
        (3, "draining", 70.0, 140),
    ]
    assert not script.open, "those that were taken away get nothing"
    assert script.said == [(100.0, "end", 2), (130.0, "end", 1)]


def test_an_instance_that_drains_is_the_first_to_be_taken_back():
    scaling = Scaling("both", 2, 1, "queue", target=2, every_s=10, start_s=20, cool_down_s=10)
    found, script = scaled(
        scaling, lambda now_s, number: 9 if now_s < 15 or 45 < now_s < 55 else 0, lambda now_s, number: 1, 60
    )
    # Started at 10 s, there at 30 s; nothing waits at 40 s: it drains, and at 50 s takes requests again at once.
    assert found[1:] == [
        (1, "starting", 10.0, 30.0),
        (1, "up", 30.0, 40.0),
        (1, "draining", 40.0, 50.0),
        (1, "up", 50.0, 60),
    ]
    assert script.open == {1} and not script.said


def test_draining_has_an_end():
    scaling = Scaling("both", 2, 1, "queue", target=2, every_s=10, start_s=5, drain_s=7, cool_down_s=10)
    found, script = scaled(scaling, lambda now_s, number: 9 if now_s < 15 else 0, lambda now_s, number: 1, 40)
    assert found[1:] == [(1, "starting", 10.0, 15.0), (1, "up", 15.0, 30.0), (1, "draining", 30.0, 37.0)]
    assert script.said == [(37.0, "end", 1), (37.0, "gone", 1)], "what it still had is lost with it"


def test_an_instance_that_is_lost_counts_against_the_most_and_comes_back_by_itself():
    scaling = Scaling("both", 3, 2, "queue", target=2, every_s=10, start_s=5, cool_down_s=100)
    lost = Failure("both", 1, 8.0, 20.0)
    found, script = scaled(scaling, lambda now_s, number: 9, lambda now_s, number: 1, 40, (lost,))
    # At 10 s one is up and one down: of three, one more may start.
    assert found == [
        (0, "up", 0.0, 40),
        (1, "up", 0.0, 8.0),
        (1, "down", 8.0, 28.0),
        (1, "up", 28.0, 40),
        (2, "starting", 10.0, 15.0),
        (2, "up", 15.0, 40),
    ]
    assert script.said == [(8.0, "end", 1), (8.0, "gone", 1), (28.0, "begin", 1)]


@pytest.mark.parametrize("signal", ["queue", "kv", "slo"])
def test_pools_of_both_sides_grow_under_load_and_everybody_is_served(tmp_path, signal):
    target = {"queue": 1, "kv": 0.05, "slo": 0.05}[signal]
    scaled = [f"{role}:max=4,signal={signal},target={target},every=500ms,start=1s,cool-down=2s" for role in PAIR[1::2]]
    scaled = [text.replace(":2", "") for text in scaled]
    record, meta = simulated(
        *(tmp_path / "o", SAMPLE, "--requests", 150, "--rate", 40, "--slo-ttft", 0.1, "--slo-tpot", 0.012),
        *("--pool", "prefill:1,gpu=l40s", "--pool", "decode:1,gpu=l40s"),
        *(word for text in scaled for word in ("--autoscale", text)),
    )
    assert set(record.requests["status"]) == {"finished"}
    more = {span["instance"] for span in meta["fleet"]} - {0, 4}
    assert more, "somebody was started"
    for span in meta["fleet"]:
        if span["state"] == "starting" and span["end_s"] < meta["totals"]["simulated_s"]:
            assert span["end_s"] - span["begin_s"] == pytest.approx(1.0)
    for number in more:
        first_s = min(span["end_s"] for span in meta["fleet"] if span["instance"] == number)
        rows = record.iterations["instance"] == number
        assert (record.iterations["start_s"][rows] >= first_s).all(), "nobody works before it has started"


# -- what cannot be ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flag", "value", "said"),
    [
        ("--fail", "decode.5:at=3s", "fail: decode.5: the pool has instances 0 to 1"),
        ("--fail", "decod.0:at=3s", "fail: decod.0: no such pool; there are prefill, decode"),
        ("--fail", "decode.0:at=3", "fail: decode.0: at: '3' has no unit"),
        ("--fail", "decode.0:at=3s,for=4", "fail: decode.0: for: '4' has no unit"),
        ("--fail", "decode.0:at=3s,for=0s", "fail: decode.0: for: is not above 0"),
        ("--fail", "decode.0:for=3s", "fail: decode.0: at is missing"),
        ("--fail", "decode:at=3s", "fail: 'decode:at=3s' is not POOL.N:at=TIME[,for=TIME]"),
        ("--fail", "decode.0:at=3s,at=4s", "fail: decode.0: at: given twice"),
        ("--fail", "decode.0:at=3s,when=4s", "fail: decode.0: when: no such key; there are at, for"),
        ("--autoscale", "dec:max=3", "autoscale: dec: no such pool; there are prefill, decode"),
        ("--autoscale", "decode:min=4,max=3", "autoscale: decode: min: 4 is more than max 3"),
        ("--autoscale", "decode:max=0", "autoscale: decode: max: '0' is not a whole number above 0"),
        ("--autoscale", "decode", "autoscale: decode: max is missing"),
        (
            "--autoscale",
            "decode:max=1",
            "autoscale: decode: the pool begins with 2, which is not between min 1 and max 1",
        ),
        ("--autoscale", "decode:max=4,start=20", "autoscale: decode: start: '20' has no unit"),
        ("--autoscale", "decode:max=4,cool-down=x", "autoscale: decode: cool-down: 'x' is not a number with its unit"),
        ("--autoscale", "decode:max=4,signal=cpu", "autoscale: decode: signal: 'cpu' is not one of queue, kv, slo"),
        ("--autoscale", "decode:max=4,signal=slo", "autoscale: decode: signal: slo needs slo_ttft, or for a pool that"),
        (
            "--autoscale",
            "decode:max=4,signal=kv,target=80",
            "autoscale: decode: target: 80 is no share between 0 and 1",
        ),
        ("--autoscale", "decode:max=4,every=0s", "autoscale: decode: every: is not above 0"),
        ("--autoscale", "decode:max=20000", "20002 is more than 10000 instances"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(tmp_path, flag, value, said):
    ran = workbench("simulate", SAMPLE, *PAIR, flag, value, "--out", tmp_path / "o")
    assert ran.exit_code == 2 and said in ran.output.replace("\n", ""), ran.output
    assert not (tmp_path / "o").exists()


def test_instances_that_step_together_neither_fail_alone_nor_scale(tmp_path):
    moe = ("--model", "Qwen/Qwen3-30B-A3B", "--pool", "both:2,ep=2")
    for flag, value in (("--fail", "both.0:at=1s"), ("--autoscale", "both:max=4")):
        ran = workbench("simulate", SAMPLE, *moe, flag, value, "--out", tmp_path / "o")
        assert ran.exit_code == 2 and "its instances share experts (ep) and step together" in ran.output


def test_plan_does_not_scale_what_it_counts(tmp_path):
    ran = workbench("plan", SAMPLE, "--slo", "ttft_p99=1s", "--autoscale", "both:max=3")
    assert ran.exit_code == 2 and "autoscale: plan looks for how many instances it takes" in ran.output


def test_prices_stay_with_a_record_and_a_report_may_have_others(tmp_path):
    prices = tmp_path / "prices.toml"
    prices.write_text('currency = "EUR"\n[gpu_hour]\nl40s = 2.0\nh100 = 5.0\n')
    asked = ("--requests", 30, "--pool", "both:2,gpu=l40s", "--prices", prices)
    _, meta = simulated(tmp_path / "o", SAMPLE, *asked)
    assert meta["prices"] == {"currency": "EUR", "source": "", "gpu_hour": {"l40s": 2.0}}
    told = json.loads(workbench("report", tmp_path / "o", "--json").output)["runs"]["overlap"]["metrics"]
    assert told["cost"] == pytest.approx(2.0 * told["gpu_hours"])
    prices.write_text("[gpu_hour]\nl40s = 4.0\n")
    other = json.loads(workbench("report", tmp_path / "o", "--prices", prices, "--json").output)["runs"]["overlap"]
    assert other["metrics"]["cost"] == pytest.approx(4.0 * told["gpu_hours"])
    prices.write_text("[gpu_hour]\nh100 = 4.0\n")
    for words in (("report", tmp_path / "o"), ("simulate", SAMPLE, *asked, "--out", tmp_path / "x")):
        ran = workbench(*words, "--prices", prices)
        assert ran.exit_code == 2 and "gpu_hour: no price for l40s" in ran.output
    assert not (tmp_path / "x").exists()


def test_a_pool_scaled_twice_is_refused_and_values_have_defaults():
    (scaling,) = parse_scalings(["a-b:max=3"])
    assert scaling == Scaling("a-b", 3, 1, "queue", 4.0, 5.0, 60.0, float("inf"), 60.0)
    assert parse_failures(["a-b.2:at=1500ms"]) == [Failure("a-b", 2, 1.5)]
    with pytest.raises(ValueError, match="autoscale: a: given twice"):
        parse_scalings(["a:max=2", "a:max=3"])


# -- whatever happens ----------------------------------------------------------------------------------------------------


def troubles() -> st.SearchStrategy[list[tuple[str, int, int, int | None]]]:
    """Failures: pool, place, when (ms), for how long."""
    one = st.tuples(
        st.sampled_from(["prefill", "decode"]),
        st.integers(0, 1),
        st.integers(0, 6000),
        st.none() | st.integers(1, 2000),
    )
    return st.lists(one, max_size=4)


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    troubles(),
    st.sampled_from(["host", "prefill"]),
    st.sampled_from([1, 16]),
    st.sampled_from(["queue", "kv"]),
    st.sampled_from(["", ",drain=0s", ",drain=300ms"]),
)
def test_every_request_ends_once_and_no_instance_is_two_things_at_once_whoever_comes_and_goes(
    tmp_path, troubles, retraction, page, signal, drain
):
    scale = f"signal={signal},target=0.3,every=300ms,start=500ms,cool-down=500ms{drain}"
    words = [
        *("--requests", 50, "--rate", 30, "--gpu", "l40s", "--page-size", page, "--decode-retraction", retraction),
        *("--pool", "prefill:1", "--pool", "decode:1,kv-tokens=9008", "--reserved-decode-tokens", 0, "--force"),
        *("--autoscale", f"prefill:max=2,{scale}", "--autoscale", f"decode:max=2,{scale}"),
    ]
    for pool, place, at, lasts in troubles:
        words += ["--fail", f"{pool}.{place}:at={at}ms" + (f",for={lasts}ms" if lasts is not None else "")]
    record, meta = simulated(tmp_path / "o", SAMPLE, *words)
    assert meta["totals"]["ended"] == 50 and not np.isnan(record.requests["finish_s"]).any()
    assert {status.partition(":")[0] for status in record.requests["status"]} <= {"finished", "aborted"}
    for number in range(4):
        mine = sorted((s["begin_s"], s["end_s"], s["state"]) for s in meta["fleet"] if s["instance"] == number)
        assert all(before[1] <= after[0] + 1e-9 for before, after in pairwise(mine))
        rows = record.iterations["instance"] == number
        serving = [(begin, end) for begin, end, state in mine if state in ("up", "draining")]
        for start_s in record.iterations["start_s"][rows].tolist():
            assert any(begin - 1e-9 <= start_s <= end + 1e-6 for begin, end in serving), (number, start_s)
        assert np.unique(record.iterations["iteration"][rows]).size == rows.sum()
