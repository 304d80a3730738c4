"""Generated, written, converted and reshaped traces."""

from __future__ import annotations

import re
import shlex
import tempfile
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from traces import TraceError, TraceRequest, open_trace, sample_path
from traces.describe import describe
from traces.generate import ARRIVALS, Workload, arrival_times_s, generate
from traces.in_memory import in_memory
from traces.requests.lengths import Lengths, parse_lengths
from traces.reshape import reshape
from traces.write import record_of, write_trace
from workbench.cli.trace import app

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "traces"
VOCAB = 50_000

lengths = st.builds(lambda low, more: Lengths("uniform", low, low + more), st.integers(1, 60), st.integers(0, 60))
workloads = st.builds(
    Workload,
    requests=st.integers(1, 30),
    arrivals=st.sampled_from(ARRIVALS),
    rate=st.floats(0.1, 100),
    input_lengths=lengths,
    output_lengths=lengths,
    turns=st.builds(lambda high: Lengths("uniform", 1, high), st.integers(1, 4)),
    system_prompts=st.integers(0, 3),
    system_tokens=st.integers(1, 90),
    think_time_s=st.sampled_from([0.0, 1.5]),
    seed=st.integers(0, 2**32),
)


def facts(requests: Iterable[TraceRequest]) -> list[tuple]:
    """All that a simulator sees of requests, tokens included."""
    return [
        (
            r.request_id,
            r.arrival_s,
            r.input_length,
            r.output_length,
            r.max_tokens,
            r.session_id,
            r.turn,
            r.think_time_s,
            r.priority,
            r.adapter,
            r.slo_ttft_s,
            r.slo_tpot_s,
            r.constrained,
            r.prompt_tokens(VOCAB).tobytes(),
            r.output_tokens(VOCAB).tobytes(),
        )
        for r in requests
    ]


@settings(max_examples=40, deadline=None)
@given(workloads, st.sampled_from(["t.jsonl", "t.jsonl.gz", "t.jsonl.zst"]))
def test_generating_writing_converting_and_reading_keep_every_request(workload: Workload, name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        first, second = Path(folder) / name, Path(folder) / ("again_" + name)
        assert write_trace(generate(workload), first) == workload.requests
        assert facts(open_trace(first)) == facts(generate(workload))
        write_trace(open_trace(first), second)
        assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize(
    "name",
    [
        "mooncake_conversation.jsonl.gz",
        "weka_agentic_max64k.jsonl.gz",
        "lmcache_agent_trace.jsonl.gz",
        "azure2023_code.csv.gz",
    ],
)
def test_a_converted_real_trace_has_the_same_requests_and_tokens(tmp_path: Path, name: str) -> None:
    if not (DATA / name).exists():
        pytest.skip("the reference data (../shared/data) is not here")
    trace = reshape(open_trace(DATA / name), requests=120)
    write_trace(trace, tmp_path / "t.jsonl")
    assert facts(open_trace(tmp_path / "t.jsonl")) == facts(trace)


def test_optional_fields_survive_writing(tmp_path: Path) -> None:
    request = TraceRequest(
        "a", 0.0, 3, 2, max_tokens=9, session_id="s", priority=-2, adapter="lora", slo_ttft_s=0.5, slo_tpot_s=0.0
    )
    write_trace([request], tmp_path / "t.jsonl")
    assert facts(open_trace(tmp_path / "t.jsonl")) == facts([request])
    assert open_trace(tmp_path / "t.jsonl").info.closed_loop


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text("old")
    with pytest.raises(TraceError, match="exists; --force overwrites it"):
        write_trace(generate(Workload(3)), path)

    def broken() -> Iterable[TraceRequest]:
        yield from generate(Workload(3))
        raise TraceError("x", 1, "", "bad")

    with pytest.raises(TraceError, match="bad"):
        write_trace(broken(), path, force=True)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_the_command_in_the_samples_readme_makes_the_same_bytes(tmp_path: Path) -> None:
    readme = (sample_path().parent / "README.md").read_text()
    command = re.search(r"workbench trace (generate .*?)\n\n", readme, re.DOTALL)
    assert command is not None
    words = shlex.split(command[1].replace("\\\n", " "))
    words[1] = str(tmp_path / "sample.jsonl")
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "sample.jsonl").read_bytes() == sample_path().read_bytes()


@pytest.mark.parametrize("arrivals", [kind for kind in ARRIVALS if kind != "closed-loop"])
def test_open_arrivals_come_at_the_rate_asked_for(arrivals: str) -> None:
    workload = Workload(1, arrivals=arrivals, rate=5.0, cv=3.0)
    times_s = list(islice(arrival_times_s(workload, np.random.default_rng(0)), 20_001))
    gaps_s = np.diff(times_s)
    assert gaps_s.min() >= 0 and 1 / gaps_s.mean() == pytest.approx(5.0, rel=0.1)
    expected_cv = {"poisson": (0.95, 1.05), "gamma": (2.7, 3.3), "constant": (0, 1e-6), "burst": (2, 5)}[arrivals]
    assert expected_cv[0] <= gaps_s.std() / gaps_s.mean() <= expected_cv[1]


def test_lengths_have_the_mean_or_median_they_are_given() -> None:
    rng = np.random.default_rng(0)
    for text, of in (("lognormal:mean=600,sigma=0.8", np.mean), ("lognormal:median=600,sigma=0.8", np.median)):
        assert of([parse_lengths(text).draw(rng) for _ in range(20_000)]) == pytest.approx(600, rel=0.05)
    assert {parse_lengths("3-5").draw(rng) for _ in range(100)} == {3, 4, 5}
    for wrong in ("0", "5-3", "x", "lognormal:sigma=1", "lognormal:mean=5,sigma=1,cap=3", "lognormal:mean=nan,sigma=1"):
        with pytest.raises(ValueError, match=f"'{wrong}' is not a length"):
            parse_lengths(wrong)


def test_a_rate_stretches_arrivals_and_keeps_their_shape() -> None:
    sample = open_trace(sample_path())
    faster = reshape(sample, rate=50.0)
    old, new = (np.array([r.arrival_s for r in t if r.arrival_s is not None]) for t in (sample, faster))
    assert (len(new) - 1) / (new[-1] - new[0]) == pytest.approx(50.0)
    assert new / new[-1] == pytest.approx(old / old[-1])
    assert [r.think_time_s for r in faster] == [r.think_time_s for r in sample]
    assert any("stretched" in note for note in faster.info.notes) and sample.info.notes == []


def test_a_speedup_divides_arrivals_and_requests_cut_sessions_at_their_end() -> None:
    sample = open_trace(sample_path())
    half = reshape(sample, speedup=4.0, requests=100)
    assert [r.arrival_s for r in half] == [
        r.arrival_s / 4 if r.arrival_s is not None else None for r in islice(sample, 100)
    ]
    assert half.sha256() == sample.sha256()


@pytest.mark.parametrize("options", [{"rate": 50.0}, {"speedup": 4.0}, {"requests": 100}])
def test_a_trace_in_memory_can_be_reshaped_again_and_again_and_stays_as_it_is(options: dict) -> None:
    held = in_memory(open_trace(sample_path()))
    once = [record_of(request) for request in reshape(open_trace(sample_path()), **options)]
    for _ in range(2):
        assert [record_of(request) for request in reshape(held, **options)] == once
    assert [record_of(request) for request in held] == [record_of(request) for request in open_trace(sample_path())]


def test_equal_arrivals_become_poisson_and_the_trace_says_so(tmp_path: Path) -> None:
    write_trace(generate(Workload(200, arrivals="closed-loop")), tmp_path / "t.jsonl")
    trace = reshape(open_trace(tmp_path / "t.jsonl"), rate=2.0, seed=3)
    times_s = [request.arrival_s for request in trace]
    assert times_s == [request.arrival_s for request in trace] == sorted(times_s)
    assert 199 / times_s[-1] == pytest.approx(2.0, rel=0.3)
    assert trace.info.notes == ["arrivals were all equal: now Poisson at 2/s, seed 3"]


@pytest.mark.parametrize("options", [{"rate": 0.0}, {"speedup": -1.0}, {"requests": 0}, {"rate": 1.0, "speedup": 1.0}])
def test_reshaping_into_nonsense_is_refused(options: dict) -> None:
    with pytest.raises(ValueError, match=r"must be positive|cannot be given together"):
        reshape(open_trace(sample_path()), **options)


@settings(max_examples=30, deadline=None)
@given(workloads)
def test_possible_reuse_is_what_comparing_all_tokens_finds(workload: Workload) -> None:
    requests = list(generate(workload))
    found, past = 0, list[np.ndarray]()
    for request in requests:
        prompt = request.prompt_tokens(2**31 - 1)
        best = 0
        for tokens in past:
            size = min(len(tokens), len(prompt) - 1)
            differ = np.flatnonzero(tokens[:size] != prompt[:size])
            best = max(best, int(differ[0]) if len(differ) else size)
        found += best
        past.append(np.concatenate([prompt, request.output_tokens(2**31 - 1)]))
    assert describe(requests).reusable_tokens == found


def test_mooncake_reuse_is_the_share_its_publishers_report() -> None:
    path = DATA / "mooncake_conversation.jsonl.gz"
    if not path.exists():
        pytest.skip("the reference data (../shared/data) is not here")
    assert describe(open_trace(path)).reusable_share == pytest.approx(0.37, abs=0.01)
