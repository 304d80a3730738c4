"""`workbench sweep` as a user runs it."""

from __future__ import annotations

import json
import os
import signal
import time

import pandas as pd
import pytest

from tests.patience import PATIENCE_S
from tests.search.run import SAMPLE, changed, line, signalled, sweep, workbench, write_trace


@pytest.mark.slow
def test_a_grid_leaves_a_line_for_every_point_with_the_numbers_of_simulate(tmp_path):
    results = sweep(tmp_path / "o", "--vary", "tp=1,2", "--vary", "chunk=256,none", "--keep-records")
    assert list(results.point) == [0, 1, 2, 3] and set(results.status) == {"finished"}
    assert list(results.tp) == [1, 1, 2, 2] and list(results.gpus) == [1, 1, 2, 2]
    assert results.chunk.isna().tolist() == [False, True, False, True]
    alone = workbench(
        "simulate", SAMPLE, "--requests", 12, "--tp", 2, "--chunk", 256, "--out", tmp_path / "s", "--json"
    )
    metrics = json.loads(alone.stdout)["runs"]["overlap"]["metrics"]
    for name, value in metrics.items():
        if value is not None:
            assert results[name][2] == value, name
    assert results.output_throughput_per_gpu[2] == metrics["output_throughput"] / 2
    requests = pd.read_csv(tmp_path / "o" / "records" / "0002" / "requests.csv")
    assert (requests.finish_s - requests.arrival_s).quantile(0.99) == pytest.approx(results.e2e_p99_s[2], rel=1e-9)
    assert "<html" in (tmp_path / "o" / "sweep.html").read_text()


def test_compared_loops_get_the_same_gpus_and_what_cannot_be_is_recorded_with_its_reason(tmp_path):
    results = sweep(tmp_path / "o", "--vary", "loop=normal,overlap,pipeline", "--vary", "tp=1,2,3")
    by_point = results.set_index(["loop", "tp"])
    assert by_point.gpus["pipeline", 2] == by_point.gpus["normal", 2] == 2
    assert by_point.status["pipeline", 1] == "invalid" and "needs 2 GPUs" in by_point.reason["pipeline", 1]
    assert by_point.reason["normal", 3].startswith("tp: 3 does not divide the 32 attention heads")


@pytest.mark.slow
def test_a_random_sweep_is_the_same_file_whatever_ran_first(tmp_path):
    flags = (
        "--vary",
        "rate=2..40:log",
        "--vary",
        "max_running=2..32",
        "--search",
        "random",
        "--points",
        5,
        "--seed",
        4,
    )
    sweep(tmp_path / "one", *flags, "--jobs", 1)
    sweep(tmp_path / "two", *flags, "--jobs", 2)
    assert (tmp_path / "one/results.csv").read_bytes() == (tmp_path / "two/results.csv").read_bytes()


@pytest.mark.slow
def test_optuna_runs_different_points_and_goes_on_where_it_was(tmp_path):
    pytest.importorskip("optuna")
    flags = ("--vary", "max_running=2..32", "--vary", "cache=radix,none", "--search", "optuna")
    results = sweep(tmp_path / "o", *flags, "--points", 6)
    assert len(results) == 6 == len(results[["max_running", "cache"]].drop_duplicates())
    journal = (tmp_path / "o" / "results.csv").read_text().splitlines(keepends=True)
    (tmp_path / "o" / "results.csv").write_text("".join(journal[:4]))
    again = sweep(tmp_path / "o", *flags, "--points", 6, "--resume")
    assert list(again.point) == list(range(6)) and len(again[["max_running", "cache"]].drop_duplicates()) == 6
    pd.testing.assert_frame_equal(again[:3], results[:3])


def test_optuna_stops_when_a_small_space_is_used_up(tmp_path):
    pytest.importorskip("optuna")
    results = sweep(tmp_path / "o", "--vary", "cache=radix,none", "--search", "optuna", "--points", 9)
    assert sorted(results.cache.fillna("none")) == ["none", "radix"]


@pytest.mark.slow
def test_a_killed_sweep_goes_on_and_repeats_no_finished_point(tmp_path):
    trace = write_trace(tmp_path / "t.jsonl", 20)
    words = ["sweep", trace, "--vary", "max_running=2..17", "--jobs", 2, "--out", tmp_path / "o"]
    assert signalled(signal.SIGKILL, 5, *words).returncode == -signal.SIGKILL
    journal = tmp_path / "o" / "results.csv"
    finished = journal.read_text().splitlines()[1:]
    assert len(finished) == 5
    with journal.open("a") as file:
        file.write("15,finis")  # what a kill in the middle of a write leaves
    done = workbench(*words, "--resume")
    assert done.returncode == 0, done.stderr
    results = pd.read_csv(journal)
    assert list(results.point) == list(range(16)) and set(results.status) == {"finished"}
    # Each was kept as it stood: those lines are in the file still, and nobody wrote another.
    assert set(finished) <= set(journal.read_text().splitlines())


@pytest.mark.slow
def test_resuming_runs_only_what_is_missing(tmp_path):
    flags = ("--vary", "max_running=2..5", "--keep-records")
    sweep(tmp_path / "o", *flags)
    lines = (tmp_path / "o" / "results.csv").read_text().splitlines(keepends=True)
    (tmp_path / "o" / "results.csv").write_text("".join(line for line in lines if not line.startswith("2,")))
    made = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "o" / "records").iterdir()}
    sweep(tmp_path / "o", *flags, "--resume")
    again = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "o" / "records").iterdir()}
    assert [name for name in sorted(made) if made[name] != again[name]] == ["0002"]
    assert (tmp_path / "o" / "results.csv").read_text() == "".join(lines)


def test_ctrl_c_keeps_what_is_finished(tmp_path):
    trace = write_trace(tmp_path / "t.jsonl", 20)
    words = ["sweep", trace, "--vary", "max_running=2..40", "--jobs", 2, "--out", tmp_path / "o"]
    done = signalled(signal.SIGINT, 3, *words)
    assert done.returncode == 130, done.stderr
    assert "Traceback" not in done.stderr and "--resume goes on" in done.stderr
    assert 3 <= len(pd.read_csv(tmp_path / "o" / "results.csv")) < 39
    assert "<html" in (tmp_path / "o" / "sweep.html").read_text()


def test_a_run_over_its_time_is_recorded_and_the_rest_goes_on(tmp_path):
    # The second point never ends by itself, and its time is up when the other two are there.
    code = """
import time
from workbench.search import executor, sweep
from workbench.search.results import Results

class Clock:
    now_s = 0.0
    def monotonic(self):
        return self.now_s

clock, run, add = Clock(), sweep.run_point, Results.add

def run_or_hang(shared, task):
    while task[0] == 1:
        time.sleep(1)
    return run(shared, task)

def add_and_pass(results, *rest):
    row = add(results, *rest)
    if len(results.rows) == 2:
        clock.now_s = 1e6
    return row

executor.time, sweep.run_point, Results.add = clock, run_or_hang, add_and_pass
"""
    trace = write_trace(tmp_path / "t.jsonl", 5)
    words = ("sweep", trace, "--vary", "max_running=1,2,3", "--jobs", 2, "--time-limit", 1e5, "--out", tmp_path / "o")
    done = changed(code, *words)
    assert done.returncode == 0, done.stderr
    results = pd.read_csv(tmp_path / "o" / "results.csv")
    assert list(results.status) == ["finished", "timed out", "finished"]
    assert results.reason[1] == "ran for more than 100000 s"


def test_points_that_reject_requests_are_not_compared(tmp_path):
    trace = tmp_path / "t.jsonl"
    lengths = [100, 100, 3000]
    trace.write_text(
        "".join(
            json.dumps({"arrival_s": i, "input_length": n, "output_length": 4}) + "\n" for i, n in enumerate(lengths)
        )
    )
    done = workbench("sweep", trace, "--vary", "kv_tokens=2000,8000", "--out", tmp_path / "o", "--json")
    results = pd.read_csv(tmp_path / "o" / "results.csv")
    assert list(results.status) == ["incomplete", "finished"]
    assert results.reason[0] == (
        "1 of 3 requests can never be served: "
        "r3 with 3000 input tokens is prompt_exceeds_kv (kv_tokens 2000, max_context 2001)"
    )
    assert {row["point"] for row in json.loads(done.stdout)["pareto"]} == {1}


def test_prices_add_cost(tmp_path):
    (tmp_path / "p.toml").write_text("[gpu_hour]\nh100 = 3\nl40s = 1.5\n")
    results = sweep(tmp_path / "o", "--vary", "gpu=h100,l40s,a100", "--prices", tmp_path / "p.toml")
    assert list(results.cost_per_hour[:2]) == [3, 1.5]
    expected = 3 / 3600 / results.output_throughput[0] * 1e6
    assert results.cost_per_million_output_tokens[0] == pytest.approx(expected, rel=1e-12)
    assert results.status[2] == "invalid" and "no price for a100" in results.reason[2]


VARY = ("--vary", "tp=1,2")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "error: vary: nothing varies"),
        (("--vary", "pagesize=1,2"), "error: pagesize: no such setting; nearest: page_size"),
        ((*VARY, "--tp", 2), "error: tp: both varied and set"),
        ((*VARY, "--loop", "normal,overlap"), "error: loop: 'normal,overlap' names several"),
        (("--vary", "loop=foo,normal"), "error: loop: 'foo' is not one of normal, overlap, pipeline"),
        (("--vary", "tp=3,5"), "error: none of the 2 points can run: tp: 3 does not divide"),
        ((*VARY, "--gpu", "h1000"), "error: none of the 2 points can run: unknown GPU 'h1000'"),
        ((*VARY, "--objective", "ttft"), "error: objective: no metric 'ttft'; nearest:"),
        ((*VARY, "--objective", "iterations"), "error: objective: iterations: is more of it better?"),
        ((*VARY, "--search", "best"), "error: search: 'best' is not one of grid, random, optuna"),
        ((*VARY, "--executor", "moon"), "error: executor: 'moon' is not one of local, ray"),
        ((*VARY, "--jobs", 0), "error: jobs: 0 is less than 1"),
        ((*VARY, "--time-limit", 0), "error: time_limit: 0.0 is not positive"),
        ((*VARY, "--points", 1), "error: points: the grid has 2, more than 1"),
        ((*VARY, "--prices", "nope.toml"), "error: nope.toml: No such file"),
        ((*VARY, "--config", "nope.toml"), "error: nope.toml: No such file"),
        ((*VARY, "--resume", "--force"), "error: resume: goes on with a sweep that --force would remove"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(arguments, says, tmp_path):
    assert line("sweep", SAMPLE, "--out", tmp_path / "o", *arguments).startswith(says)
    assert not (tmp_path / "o").exists()


def test_ray_that_is_not_installed_is_refused_with_what_to_install(tmp_path):
    import importlib.util

    if importlib.util.find_spec("ray") is not None:
        pytest.skip("ray is here")
    assert line("sweep", SAMPLE, *VARY, "--executor", "ray", "--out", tmp_path / "o") == (
        "error: executor: ray is not installed; pip install 'llm-workbench[ray]'"
    )


def test_the_same_results_come_from_ray(tmp_path):
    pytest.importorskip("ray", reason="no ray: pip install ray")
    sweep(tmp_path / "local", *VARY)
    sweep(tmp_path / "ray", *VARY, "--executor", "ray", "--jobs", 1)
    assert (tmp_path / "ray/results.csv").read_bytes() == (tmp_path / "local/results.csv").read_bytes()


@pytest.mark.slow
def test_a_changed_question_is_not_resumed(tmp_path):
    trace = write_trace(tmp_path / "t.jsonl", 6)
    words = ["sweep", trace, *VARY, "--out", tmp_path / "o"]
    assert workbench(*words).returncode == 0
    before = (tmp_path / "o" / "results.csv").read_bytes()
    assert "holds a sweep; --resume goes on with it, --force replaces it" in line(*words)
    assert "cannot be resumed: settings.chunk was not set and is 512" in line(*words, "--resume", "--chunk", 512)
    assert "cannot be resumed: space was" in line(*words[:2], "--vary", "tp=1,2,4", *words[4:], "--resume")
    write_trace(trace, 7)
    assert "cannot be resumed: trace.sha256 was" in line(*words, "--resume")
    assert (tmp_path / "o" / "results.csv").read_bytes() == before
    assert workbench(*words, "--force").returncode == 0
    (tmp_path / "o" / "mine.txt").write_text("precious")
    assert "nothing removed: it holds mine.txt" in line(*words, "--force")


def test_a_process_that_dies_costs_its_own_point_only():
    from workbench.search.executor import open_executor

    with open_executor("local", _die_if_odd, 2, None) as executor:
        for number in range(4):
            while not executor.free:
                executor.wait(1)
            executor.start(number, number)
        ended = []
        while executor.running:
            ended += executor.wait(1)
    assert any(done.fault and "SIGKILL" in done.fault for done in ended if done.key == 3)
    assert [done.result for done in ended if done.key == 2] in ([20], [])


def _die_if_odd(number: int) -> int:
    if number % 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return number * 10


def test_an_error_in_a_run_is_one_line_with_its_place():
    from workbench.search.executor import guarded

    result, fault = guarded(_divide, 0)
    assert result is None and fault is not None
    assert fault.startswith("ZeroDivisionError: ") and "(test_sweep_command.py:" in fault


def test_time_is_up_in_the_middle_of_a_task_without_a_process_of_its_own():
    from workbench.search.executor import guarded_within

    assert guarded_within(_divide, 4, PATIENCE_S) == (0.25, None, False)
    assert guarded_within(_sleep, PATIENCE_S, 0.05) == (None, None, True)


def _sleep(seconds: float) -> None:
    try:
        time.sleep(seconds)
    except Exception:
        pytest.fail("somebody took the end of the time for an error")


def _divide(number: int) -> float:
    return 1 / number
