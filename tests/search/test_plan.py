"""`workbench plan`: the highest rate, what it is worth, and what is said about it."""

from __future__ import annotations

import json
import math

import pytest

from tests.search.run import SAMPLE, line, workbench, write_trace
from traces import open_trace
from traces.generate import Workload, generate
from traces.in_memory import in_memory
from traces.requests.lengths import parse_lengths
from traces.reshape import reshape
from traces.write import write_trace as write_trace_file
from workbench.cluster.simulate import simulate_loop
from workbench.search.rate import MOST_SIMULATIONS, highest_rate, simulator
from workbench.search.slo import judge, parse_slo
from workbench.settings.run_settings import RunSettings


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    """Short and bursty enough to be quick, and to have limits of every kind."""
    path = tmp_path_factory.mktemp("trace") / "t.jsonl"
    workload = Workload(
        requests=100, rate=5.0, input_lengths=parse_lengths("200-1200"), seed=3, output_lengths=parse_lengths("4-40")
    )
    write_trace_file(generate(workload), path)
    return in_memory(open_trace(path))


def search(trace, slo: str, target: float | None = None, **settings):
    """(what was found, rates that were simulated in order)."""
    simulate = simulator(RunSettings(**settings), "overlap", trace, "", "")
    rates: list[float] = []

    def counted(rate, watch):
        rates.append(rate)
        return simulate(rate, watch)

    requests = list(trace)
    arrivals = sum(request.arrival_s is not None for request in requests)
    return highest_rate(counted, parse_slo(slo), arrivals, len(requests), target), rates


@pytest.mark.parametrize(
    ("slo", "settings"),
    [
        ("ttft_p99=400ms", {"max_running": 4}),
        ("tpot_mean=12ms,ttft_p90=300ms", {}),
        ("e2e_mean=1.5s", {"gpu": "l40s"}),
    ],
)
@pytest.mark.slow
def test_the_highest_rate_is_that_of_brute_force_within_two_percent_and_twelve_simulations(trace, slo, settings):
    found, rates = search(trace, slo, **settings)
    assert len(rates) <= MOST_SIMULATIONS == 12
    assert len(rates) == len(found.probes)
    assert found.rate < found.lost_at <= found.rate * 1.02 * (1 + 1e-9)
    # Brute force: rates around what was found, every run to its end, without early stopping.
    simulate = simulator(RunSettings(**settings), "overlap", trace, "", "")
    limits = parse_slo(slo)
    factors = (0.7, 0.8, 0.9, 0.94, 0.97, 1.0, 1.02, 1.04, 1.07, 1.1, 1.2, 1.4)
    kept = [factor for factor in factors if judge(simulate(found.rate * factor, None), limits).kept]
    assert kept == [factor for factor in factors if factor <= max(kept)]
    assert 1.0 <= max(kept) <= 1.02


def test_stopping_early_never_changes_a_verdict(trace):
    limits = parse_slo("ttft_p90=150ms,tpot_p99=15ms")
    found, _ = search(trace, "ttft_p90=150ms,tpot_p99=15ms")
    simulate = simulator(RunSettings(), "overlap", trace, "", "")
    stopped = [probe for probe in found.probes if probe.stopped]
    assert stopped
    for probe in stopped[:3]:
        assert not judge(simulate(probe.rate, None), limits).kept


def test_all_runs_of_a_search_see_the_same_requests_with_scaled_arrivals(trace):
    arrivals = [[r.arrival_s for r in reshape(trace, rate) if r.arrival_s is not None] for rate in (1.0, 4.0)]
    assert arrivals[0] == pytest.approx([4 * at for at in arrivals[1]])
    runs = [
        simulate_loop(RunSettings(), "overlap", reshape(trace, rate), trace_sha256="", command="") for rate in (1, 4)
    ]
    for name in ("request_id", "input_tokens", "output_tokens"):
        columns = [dict(zip(run.requests["request_id"], run.requests[name], strict=True)) for run in runs]
        assert columns[0] == columns[1]


def test_a_target_inside_the_last_bracket_is_decided_by_a_run_of_its_own(trace):
    found, _ = search(trace, "ttft_p99=400ms", max_running=4)
    between = math.sqrt(found.rate * found.lost_at)
    again, rates = search(trace, "ttft_p99=400ms", target=between, max_running=4)
    assert between in rates and again.target_kept in (True, False)
    assert search(trace, "ttft_p99=400ms", target=found.rate / 2, max_running=4)[0].target_kept is True
    assert search(trace, "ttft_p99=400ms", target=found.rate * 2, max_running=4)[0].target_kept is False


def test_an_slo_that_an_idle_system_misses_takes_few_simulations_and_says_so(trace):
    found, rates = search(trace, "tpot_p99=1ms")
    assert found.rate == 0 and rates[-1] == 0 and len(rates) == 6
    assert "even when a request is alone" in found.breaks


def test_an_slo_that_a_burst_keeps_has_no_highest_rate(trace):
    found, rates = search(trace, "ttft_p99=1000s")
    assert math.isinf(found.rate) and len(rates) == 1 and found.breaks == ""


@pytest.mark.parametrize(
    ("slo", "settings", "says"),
    [
        ("ttft_p99=400ms", {"max_running": 4}, "because 4 requests run already (max_running)"),
        ("ttft_p90=1s", {"kv_tokens": 5000, "cache": "none"}, "the KV cache has no room"),
        ("tpot_p99=20ms", {"cache": "none"}, "(prefill interference)"),
    ],
)
def test_what_breaks_first_is_named_with_its_cause(trace, slo, settings, says):
    found, _ = search(trace, slo, **settings)
    assert says in found.breaks and found.breaks.startswith(slo.partition("=")[0])


@pytest.mark.slow
def test_the_cheapest_configuration_that_carries_the_load_wins_and_simulate_agrees(tmp_path):
    (tmp_path / "p.toml").write_text('currency = "EUR"\n[gpu_hour]\nh100 = 3\nl40s = 1\n')
    slo = "ttft_p99=500ms,tpot_p99=35ms"
    done = workbench(
        "plan",
        SAMPLE,
        "--requests",
        40,
        "--slo",
        slo,
        "--vary",
        "gpu=h100,l40s",
        "--vary",
        "tp=1,3",
        "--rate",
        3,
        "--prices",
        tmp_path / "p.toml",
        "--out",
        tmp_path / "o",
        "--json",
    )
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    rows = plan["candidates"]
    assert [row["status"] for row in rows] == ["finished", "finished", "invalid", "invalid"]
    assert all(row["simulations"] <= 12 for row in rows[:2])
    carrying = [row for row in rows if row["carries_target"]]
    assert carrying and rows[0]["cost_per_hour"] == min(row["cost_per_hour"] for row in carrying)
    for row in rows[:2]:
        assert row["carries_target"] == (row["unbounded"] or row["highest_rate"] >= 3)
        assert row["unbounded"] or row["margin"] == pytest.approx(row["highest_rate"] / 3 - 1)
    assert rows[2]["reason"].startswith("tp: 3 does not divide")
    assert any("EUR an hour" in sentence for sentence in plan["answer"])
    assert json.loads((tmp_path / "o" / "plan.json").read_text())["candidates"] == rows
    assert "<html" in (tmp_path / "o" / "plan.html").read_text()
    words = rows[0]["command"].split()[1:]
    again = workbench(*words, "--out", tmp_path / "s", "--json")
    metrics = json.loads(again.stdout)["runs"]["overlap"]["metrics"]
    assert metrics["ttft_p99_s"] <= 0.5 and metrics["tpot_p99_s"] <= 0.035
    assert metrics["ttft_p99_s"] == pytest.approx(rows[0]["at_highest_rate"]["ttft_p99"], rel=1e-3)


def test_an_slo_that_cannot_be_met_is_one_clear_sentence(tmp_path):
    trace = write_trace(tmp_path / "t.jsonl", 20)
    done = workbench("plan", trace, "--slo", "tpot_p99=1us")
    assert done.returncode == 0
    text = " ".join(done.stdout.split())
    assert text.startswith(
        "The SLO (tpot_p99 1.0 µs) cannot be met: this configuration misses it even with one request"
    )


def test_a_rate_that_only_a_burst_goes_beyond_is_said_without_infinity(tmp_path):
    done = workbench("plan", SAMPLE, "--requests", 40, "--slo", "ttft_p99=200ms,tpot_p99=10ms", "--out", tmp_path / "p")
    assert done.returncode == 0
    text = " ".join(done.stdout.split())
    assert "(lost with all requests at once; " in text and "inf" not in text


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "error: slo: say what must be kept"),
        (("--slo", "speed=1s"), "error: slo: speed is not a latency"),
        (("--slo", "ttft_p99=1s", "--vary", "rate=1,2"), "error: rate: cannot be varied here"),
        (("--slo", "ttft_p99=1s", "--rate", -1), "error: rate: -1.0 is not positive"),
        (("--slo", "ttft_p99=1s", "--concurrency", 4), "error: concurrency: replaces arrivals"),
        (("--slo", "ttft_p99=1s", "--requests", 1), "error: "),
        (("--slo", "ttft_p99=1s", "--gpu", "h1000"), "error: unknown GPU 'h1000'"),
        (("--slo", "ttft_p99=1s", "--vary", "gpu=h1000,x"), "error: none of the 2 points can run: unknown GPU"),
        (("--slo", "ttft_p99=1s", "--jobs", 0), "error: jobs: 0 is less than 1"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(arguments, says, tmp_path):
    assert line("plan", SAMPLE, "--out", tmp_path / "o", *arguments).startswith(says)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "gpu_hour: missing"),
        ("[gpu_hour]\nh100 = 'much'\n", "gpu_hour.h100: 'much' is not a price of 0 or more"),
        ("[gpu_hour]\nh100 = -1\n", "gpu_hour.h100: -1 is not a price"),
        ("[prices]\nh100 = 1\n", "prices: no such entry"),
        ("[gpu_hour]\nl4 = 1\n", "gpu_hour: no price for h100"),
        ("[gpu_hour", "p.toml: "),
    ],
)
def test_a_bad_price_table_is_one_line_that_names_the_entry(text, says, tmp_path):
    (tmp_path / "p.toml").write_text(text)
    said = line("plan", SAMPLE, "--slo", "ttft_p99=1s", "--prices", tmp_path / "p.toml", "--out", tmp_path / "o")
    assert said.startswith("error: ") and says in said
    assert not (tmp_path / "o").exists()


def test_a_folder_with_something_else_in_it_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    for flags in ([], ["--force"]):
        said = line("plan", SAMPLE, "--requests", 5, "--slo", "ttft_p99=1s", "--out", tmp_path, *flags)
        assert said.endswith("exists and holds mine.txt, which no plan wrote")


def test_a_plan_says_what_it_assumes_of_links_that_a_choice_waits_for(tmp_path):
    flags = ("--requests", 8, "--slo", "tpot_p99=1s", "--gpu", "l40s", "--model", "Qwen/Qwen3-8B", "--vary", "tp=1,2")
    done = workbench("plan", SAMPLE, *flags, "--out", tmp_path / "p")
    assert done.returncode == 0, done.stderr
    said = "without NVLink, at 18.9GB/s and 5.31us, as on the machine that published tables were measured on"
    assert said in " ".join(done.stdout.split())
    assert said in " ".join(next((tmp_path / "p").glob("*.html")).read_text().split())
    done = workbench("plan", SAMPLE, *flags, "--link", "16GB/s", "--link-latency", "20us", "--out", tmp_path / "q")
    assert done.returncode == 0 and "NVLink" not in done.stdout
