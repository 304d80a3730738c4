"""What our front end takes, fitted to what its processes took, and kept in a file that a simulation takes."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

pytest.importorskip("httpx2")

import workbench
from backends.simulated.front_end import FrontEndModel
from ground.errors import InputError
from tests.serving.server import ROOT
from traces import TraceRequest
from workbench.calibrate import measured_front_end as front_end
from workbench.calibrate.front_end_fit import (
    Spent,
    fit_process,
    front_end_of,
    latency_beside,
    medians,
    write_front_end,
)
from workbench.calibrate.front_end_loads import Answered, Load, held_out, loads, text_of
from workbench.calibrate.measured_front_end import Found, compare
from workbench.cli.app import app
from workbench.cli.calibrate_front_end import notes
from workbench.settings.front_end_file import read_front_end

IDLE_S, STEP_S, LOOK_S = 0.006, 4e-4, 1e-3


def made(load: Load, request_s: float, prompt_token_s: float, chunk_s: float, more: float = 1.0) -> Spent:
    """What a load would take a process with these costs."""
    requests, tokens = len(load.asked), sum(2 * asked.words for asked in load.asked)
    chunks = sum(asked.outputs for asked in load.asked)
    steps = sum({asked.outputs: -(-requests // load.streams) * asked.outputs for asked in load.asked}.values())
    wall_s = 0.02 * steps + load.rest_s
    spent = (
        request_s * requests + prompt_token_s * tokens + chunk_s * chunks + STEP_S * steps + IDLE_S * wall_s + LOOK_S
    )
    return Spent(load.name, requests, tokens, chunks, steps, wall_s, more * spent, more * spent / 4)


COSTS = st.floats(1e-4, 5e-3), st.floats(2e-7, 2e-5), st.floats(5e-6, 3e-4)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(*COSTS)
def test_each_cost_is_found_again_from_the_loads_that_it_makes(request_s, prompt_token_s, chunk_s):
    spent = [made(load, request_s, prompt_token_s, chunk_s) for load in loads()]
    fit = fit_process(spent, lambda each: each.http_s)
    assert fit.request_s == pytest.approx(request_s, rel=0.02)
    assert fit.prompt_token_s == pytest.approx(prompt_token_s, rel=0.02)
    assert fit.chunk_s == pytest.approx(chunk_s, rel=0.02)
    assert fit.mean_error < 1e-3 and [name for name, *_ in fit.loads] == [load.name for load in loads()]


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.integers(0, 2), st.floats(2.0, 5.0))
def test_what_one_thing_takes_more_is_ascribed_to_it_and_to_nothing_else(which, factor):
    costs = [5e-4, 2e-6, 3e-5]
    more = [cost * factor if place == which else cost for place, cost in enumerate(costs)]
    plain, slower = (
        fit_process([made(load, *each) for load in loads()], lambda spent: spent.http_s) for each in (costs, more)
    )
    for place, name in enumerate(("request_s", "prompt_token_s", "chunk_s")):
        ratio = getattr(slower, name) / getattr(plain, name)
        assert ratio == pytest.approx(factor if place == which else 1.0, rel=0.05)


def test_no_cost_is_below_zero_and_scatter_is_told():
    chance = np.random.default_rng(3)
    noisy = [made(load, 5e-4, 0.0, 3e-5, 1 + chance.uniform(-0.1, 0.1)) for load in loads()]
    fit = fit_process(noisy, lambda each: each.http_s)
    assert min(fit.request_s, fit.prompt_token_s, fit.chunk_s) >= 0
    assert 0.001 < fit.mean_error < 0.1
    assert fit.to_json()["loads"][0].keys() == {"load", "cpu_s", "fitted_s"}


def test_one_disturbed_round_changes_nothing_for_the_median_of_all_counts():
    rounds = [[made(load, 5e-4, 2e-6, 3e-5) for load in loads()] for _ in range(4)]
    rounds.append([replace(each, http_s=each.http_s * 50) for each in rounds[0]])
    assert medians(rounds) == medians(rounds[:3])


def test_loads_that_do_not_tell_the_costs_apart_are_refused():
    one = made(loads()[0], 5e-4, 2e-6, 3e-5)
    with pytest.raises(InputError, match="do not tell requests, prompt tokens and chunks apart"):
        fit_process([one] * 6, lambda each: each.http_s)
    with pytest.raises(InputError, match="no CPU time was seen"):
        fit_process([made(load, 5e-4, 2e-6, 3e-5, 0.0) for load in loads()], lambda each: each.http_s)


def fitted(factor: float = 1.0):
    return fit_process([made(load, 5e-4, 2e-6, 3e-5) for load in loads()], lambda each: factor * each.http_s)


def test_the_latency_is_what_is_left_of_the_wait_at_rest():
    waits = [(0.004 + 5e-4 + 2e-6 * tokens + 3e-5, tokens) for tokens in (10, 20, 300)]
    assert latency_beside(waits, fitted()) == pytest.approx(0.004, rel=0.01)
    assert latency_beside([(1e-5, 10)], fitted()) == 0.0, "no request comes before it was sent"


def test_chunks_pass_the_slower_of_the_two_processes():
    for http, detokenizer in ((1.0, 0.2), (0.2, 1.0)):
        found = front_end_of(fitted(http), fitted(detokenizer), 0.003)
        assert found.chunk_s == pytest.approx(3e-5, rel=0.02)
        assert found.request_s == pytest.approx(5e-4 * http, rel=0.02), "requests pass the first alone"


def test_every_load_has_texts_of_its_own_and_all_loads_together_vary_each_of_the_three():
    assert text_of(12, 1) == text_of(12, 1) != text_of(12, 2) and len(text_of(12, 1).split()) == 12
    shapes = {(len(load.asked), load.asked[0].words, load.asked[0].outputs) for load in loads() if load.asked}
    assert all(len({shape[place] for shape in shapes}) > 1 for place in range(3))
    due = [asked.due_s for asked in held_out().asked]
    assert due == sorted(due) and held_out() == held_out()


def test_the_check_compares_with_a_simulation_of_what_was_really_asked():
    model = FrontEndModel(request_s=0.02, prompt_token_s=1e-5, chunk_s=1e-4, latency_s=0.05)
    asked = [TraceRequest(f"r{n}", 0.4 * n, 60 + 10 * n, 30) for n in range(6)]
    shared = {"model": front_end.MODEL, "gpu": front_end.GPU, "ignore_eos": True}

    def seen(front_end_: str) -> list[Answered]:
        table = workbench.simulate(asked, **shared, front_end=front_end_).requests
        columns = (table[name] for name in ("request_id", "arrival_s", "input_tokens", "output_tokens"))
        ends = (table["first_token_s"], table["finish_s"])
        return [Answered(*row) for row in zip(*columns, *ends, strict=True)]

    checked = compare(seen("none"), model)
    assert checked.without == pytest.approx(checked.measured)
    assert checked.predicted["ttft_s"] > checked.measured["ttft_s"] + 0.07


def test_what_is_written_is_what_a_simulation_takes(tmp_path):
    file = tmp_path / "here.toml"
    model = front_end_of(fitted(), fitted(0.2), 0.004)
    write_front_end(file, model, ["About it."])
    assert file.read_text().startswith("# About it.\nrequest_s = 0.0005")
    for name, value in asdict(read_front_end(str(file))).items():
        assert value == pytest.approx(getattr(model, name), rel=1e-3)
    requests = [TraceRequest("a", 0.0, 100, 5)]
    plain, behind = (workbench.simulate(requests, front_end=each) for each in ("none", str(file)))
    first = [run.requests["first_token_s"][0] for run in (plain, behind)]
    assert first[1] - first[0] == pytest.approx(0.004 + 5e-4 + 100 * 2e-6 + 3e-5, rel=0.02)
    assert behind.meta["front_end"]["engine"] == behind.meta["settings"]["front_end"] == str(file)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--front-end", "--out", "fe"], "out: fe: a front end is kept in a file of its own; --out NAME.toml"),
        (["--front-end", "--out", "there.toml"], "there.toml: exists; --force replaces it"),
        (["--front-end", "model", "--out", "f.toml"], "front_end: measured alone, without MODEL"),
        (["--front-end", "--from", "x", "--out", "f.toml"], "front_end: measured alone, without --from"),
        (["--front-end", "--backend", "cpu", "--out", "f.toml"], "front_end: measured alone, without --backend"),
        (["--front-end", "--tp", "2", "--out", "f.toml"], "front_end: measured alone, without --tp"),
        (["--front-end", "--ranks", "2", "--out", "f.toml"], "ranks: goes with --links alone"),
        (["--tokenizer", "t", "--out", "f.toml"], "tokenizer: goes with --front-end alone"),
        (["--tokenizer", "t", "m", "--out", "f"], "tokenizer: goes with --front-end alone"),
    ],
)
def test_what_does_not_go_with_the_front_end_is_refused(words, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("there.toml").write_text("")
    done = CliRunner().invoke(app, ["calibrate", *words])
    assert (done.exit_code, done.stderr) == (2, f"error: {said}\n")


def calibrate(*words: str) -> object:
    return CliRunner().invoke(app, ["calibrate", "--front-end", *words])


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few and small requests: nothing is concluded from what they took."""

    def fewer(load: Load, count: int) -> Load:
        small = [replace(asked, words=1 + asked.words // 40, outputs=min(asked.outputs, 6)) for asked in load.asked]
        return replace(load, asked=tuple(small[:count]), rest_s=min(load.rest_s, 0.5))

    few = [fewer(load, 4 + place) for place, load in enumerate(loads())]
    checked = fewer(held_out(), 3)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(front_end, "ROUNDS", 1)
    monkeypatch.setattr(front_end, "loads", lambda: few)
    monkeypatch.setattr(front_end, "AT_REST", fewer(front_end.AT_REST, 3))
    monkeypatch.setattr(front_end, "held_out", lambda: checked)


@pytest.mark.server
def test_a_server_of_ours_is_measured_and_the_file_is_taken(tmp_path, short):
    file = tmp_path / "here.toml"
    done = calibrate("--json", "--out", str(file))
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    model = read_front_end(str(file))
    for name, value in asdict(model).items():
        assert value >= 0 and value == pytest.approx(found["front_end"][name], rel=1e-3)
    assert found["tokenizer"] == "built-in bytes" and 0 <= found["busy"] <= 1
    assert [row["load"] for row in found["processes"]["http"]["loads"]] == [load.name for load in loads()]
    assert all(row["cpu_s"] > 0 for row in found["processes"]["http"]["loads"])
    assert found["held_out"]["measured"].keys() == found["held_out"]["predicted"].keys() == {"ttft_s", "itl_s"}
    assert [path.name for path in tmp_path.iterdir()] == ["here.toml"]


@pytest.mark.server
def test_a_server_that_does_not_start_is_one_line_and_no_file(tmp_path, short):
    file = tmp_path / "here.toml"
    done = calibrate("--tokenizer", str(tmp_path / "none"), "--out", str(file))
    assert done.exit_code == 2 and done.stderr.count("\n") == 1, done.output
    assert done.stderr.startswith("error: the server did not start: ") and str(tmp_path / "none") in done.stderr
    assert not list(tmp_path.iterdir())


def test_an_interrupt_leaves_nothing_behind(tmp_path, monkeypatch):
    def interrupted(*_: object) -> Found:
        raise KeyboardInterrupt

    monkeypatch.setattr(front_end, "measure_front_end", interrupted)
    done = calibrate("--out", str(tmp_path / "here.toml"))
    assert (done.exit_code, done.stderr) == (130, "interrupted: nothing was written\n")
    assert not list(tmp_path.iterdir())


def test_what_is_found_is_shown_with_how_well_it_fits(tmp_path, monkeypatch):
    seconds = {"ttft_s": 0.08, "itl_s": 0.03}
    checked = front_end.Checked(seconds, {"ttft_s": 0.078, "itl_s": 0.03}, {"ttft_s": 0.072, "itl_s": 0.03})
    model = front_end_of(fitted(), fitted(0.2), 0.004)
    found = Found(model, fitted(), fitted(0.2), checked, "built-in bytes", 0.3)
    monkeypatch.setattr(front_end, "measure_front_end", lambda *_: found)
    file = tmp_path / "here.toml"
    shown = calibrate("--out", str(file)).stdout
    for words in (
        "a prompt token",
        "96 requests, 16 at a time",
        "TTFT, mean",
        "-2.5%",
        f"simulate with: --front-end {file}",
    ):
        assert words in shown
    assert "note: others used this machine: 30% of its time a process waited for a core" in shown
    assert "a prompt token was a byte" in notes(found)[1]
    assert notes(replace(found, busy=0.01, tokenizer="x")) == []
    assert "# Others used this machine: 30% of its time a process waited for a core." in file.read_text()
