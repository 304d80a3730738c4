"""Searches over pools: what ``--vary NAME.key`` varies, and whether to prefill and decode in different pools."""

from __future__ import annotations

import json
from math import inf

import pytest

from tests.search.run import SAMPLE, line, sweep, workbench
from workbench.search.both_in_one import Offer, Span, cheaper_spans
from workbench.search.results import read_results
from workbench.settings.pool_keys import pools_at

PAIR = ("--pool", "prefill:1", "--pool", "decode:1")


def test_instances_and_settings_of_one_pool_vary_and_those_of_others_stay(tmp_path):
    found = sweep(tmp_path / "s", *PAIR, "--vary", "prefill.instances=1..2", "--vary", "decode.gpu=h100,h200")
    assert list(found["status"]) == ["finished"] * 4
    assert list(found["prefill.instances"]) == [1, 1, 2, 2]
    assert list(found["decode.gpu"]) == ["h100", "h200"] * 2
    assert list(found["gpus"]) == [2, 2, 3, 3]
    page = (tmp_path / "s" / "sweep.html").read_text()
    assert "--pool prefill:2 --pool decode:1,gpu=h200" in page, "the command of a point says what it is"


def test_a_point_of_pools_runs_as_simulate_runs_it(tmp_path):
    sweep(tmp_path / "s", *PAIR, "--vary", "prefill.chunk=256,none", "--keep-records")
    for number, chunk in enumerate(("256", "0")):
        out = tmp_path / chunk
        pools = ("--pool", f"prefill:1,chunk={chunk}", "--pool", "decode:1")
        assert workbench("simulate", SAMPLE, "--requests", 12, *pools, "--out", out).returncode == 0
        for name in ("requests.csv", "iterations.csv"):
            kept = tmp_path / "s" / "records" / f"{number:04d}" / name
            assert kept.read_bytes() == (out / "overlap" / name).read_bytes()


def test_a_sweep_over_pools_goes_on_where_it_was_and_reads_back_what_it_wrote(tmp_path):
    asked = (*PAIR, "--vary", "decode.tp=1,2", "--vary", "prefill.overlap-prefills=true,false")
    sweep(tmp_path / "s", *asked)
    before = (tmp_path / "s" / "results.csv").read_bytes()
    sweep(tmp_path / "s", *asked, "--resume")
    assert (tmp_path / "s" / "results.csv").read_bytes() == before
    _, rows = read_results(tmp_path / "s")
    assert rows[3]["decode.tp"] == 2 and rows[3]["prefill.overlap_prefills"] is False
    assert rows[3]["pool"] == ("prefill:1,overlap-prefills=false", "decode:1,tp=2")


def test_random_searches_draw_instances_of_a_pool(tmp_path):
    found = sweep(
        tmp_path / "s", *PAIR, "--vary", "prefill.instances=1..40", "--search", "random", "--points", 3, "--seed", 1
    )
    assert found["prefill.instances"].between(1, 40).all() and found["prefill.instances"].is_unique


@pytest.mark.parametrize(
    ("varied", "said"),
    [
        ("prefil.gpu=h100,h200", "prefil.gpu: no pool is called prefil; there are prefill, decode"),
        ("prefill.instances=0..3", "prefill.instances: 0 is less than 1"),
        ("prefill.instances=3..1", "prefill.instances: '3..1': the range does not rise"),
        ("prefill.instances=1,x", "prefill.instances: 'x' is not a whole number"),
        ("prefill.router=round_robin", "prefill.router: is of the whole run, not of a pool"),
        ("prefill.gpuu=h100", "prefill.gpuu: no such setting; nearest: gpu"),
        ("prefill.instance=1,2", "prefill.instance: no such setting; nearest: instances"),
        ("prefill.qqq=1,2", "prefill.qqq: no such setting; `workbench simulate --help` lists them"),
        ("decode.tp=0,1", "decode.tp: 0 is less than 1"),
        ("prefill.spare-rows=1,2", "prefill.spare_rows: has no effect at any point: it needs a pool of role decode"),
        ("prefill.chunk", "prefill.chunk: no values; write prefill.chunk=v1,v2"),
        ("prefill.tp=1,1", "prefill.tp: 1 is given twice"),
    ],
)
def test_what_no_pool_can_vary_is_refused_in_one_line(varied, said):
    assert said in line("sweep", SAMPLE, "--requests", 12, *PAIR, "--vary", varied)


def test_a_setting_that_the_pool_has_and_a_pool_that_is_not_there_are_refused():
    asked = ("sweep", SAMPLE, "--requests", 12, "--vary", "prefill.gpu=h100,h200")
    assert "prefill.gpu: both varied and set" in line(*asked, "--pool", "prefill:1,gpu=l40s", "--pool", "decode:1")
    assert "prefill.gpu: there are no pools; give them with --pool" in line(*asked)


def test_a_point_says_nothing_of_pools_with_other_names():
    pools = ("fast=both:1,gpu=h100", "both-2=both:2")
    assert pools_at(pools, {"both-2.instances": 5, "fast.chunk": None, "tp": 2}) == (
        "fast=both:1,gpu=h100,chunk=none",
        "both-2=both:5",
    )


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    out = tmp_path_factory.mktemp("plan") / "p"
    (prices := out.parent / "prices.toml").write_text("[gpu_hour]\nh100 = 3.0\nl40s = 1.0\n")
    done = workbench(
        *("plan", SAMPLE, "--requests", 40, "--slo", "ttft_p99=400ms,tpot_p99=30ms", "--rate", 8, "--prices", prices),
        *(
            "--pool",
            "prefill:1,gpu=h100",
            "--pool",
            "decode:1,gpu=l40s,spare-rows=4",
            "--vary",
            "decode.instances=1..2",
        ),
        *("--out", out),
    )
    assert done.returncode == 0, done.stderr
    return json.loads((out / "plan.json").read_text()), done.stdout, (out / "plan.html").read_text()


def test_a_plan_for_two_sides_searches_both_in_one_of_the_same_kinds_on_no_more_gpus(plan):
    found, _, _ = plan
    ways = {tuple(candidate["pools"]): candidate["disaggregated"] for candidate in found["candidates"]}
    decode = "decode:{},gpu=l40s,spare-rows=4"
    assert {pools for pools, pairs in ways.items() if pairs} == {
        ("prefill:1,gpu=h100", decode.format(count)) for count in (1, 2)
    }
    # What only a decode instance has is left away; an H100 is the GPU of the run, too.
    assert {pools for pools, pairs in ways.items() if not pairs} == {
        (f"both:{count}{gpu}",) for count in (1, 2, 3) for gpu in ("", ",gpu=l40s")
    }


def test_a_plan_says_which_way_is_cheaper_and_at_which_loads(plan):
    found, printed, page = plan
    text = " ".join(found["answer"])
    assert "serving both in one" in text or "serves both in one" in text
    assert "to prefill and decode in different pools" in text.lower().replace("it cheaper ", "")
    offers = {
        way: [
            Offer(c["cost_per_hour"], inf if c["unbounded"] else c["highest_rate"] or 0.0)
            for c in found["candidates"]
            if c["disaggregated"] is way
        ]
        for way in (True, False)
    }
    spans = [(span["over_rate"], span["up_to_rate"] or inf) for span in found["disaggregated_cheaper"]]
    assert spans == [(span.over, span.upto) for span in cheaper_spans(offers[True], offers[False])]
    assert "both:1,gpu=l40s" in page and "prefill:1,gpu=h100 + decode:1" in page
    assert "pools" in printed


def test_without_the_other_way_a_plan_searches_what_it_was_asked(tmp_path):
    done = workbench(
        *("plan", SAMPLE, "--requests", 30, "--slo", "ttft_p99=1s", "--rate", 2, *PAIR, "--no-both-in-one", "--json")
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [candidate["pools"] for candidate in found["candidates"]] == [["prefill:1", "decode:1"]]
    assert "disaggregated_cheaper" not in found


def test_what_breaks_first_between_pools_of_different_kv_names_the_side(tmp_path):
    done = workbench(
        *("plan", SAMPLE, "--requests", 60, "--slo", "ttft_p99=120ms", "--rate", 2, "--json", "--no-both-in-one"),
        *("--pool", "prefill:1", "--pool", "decode:1,kv-tokens=6000"),
    )
    assert done.returncode == 0, done.stderr
    breaks = json.loads(done.stdout)["candidates"][0]["breaks_first"]
    assert breaks.startswith("ttft_p99: requests over the limit spend") and breaks.endswith(
        "of the time waiting for pages on the decode side (the decode pool)"
    )


def test_the_loads_at_which_one_way_is_cheaper_are_those_worked_out_by_hand():
    ours = [Offer(3, 5), Offer(6, 12)]
    theirs = [Offer(2, 2), Offer(4, 4), Offer(5, 8)]
    # Up to 2 theirs costs 2, up to 4 it costs 4 against 3, up to 5 it costs 5 against 3, up to 8 ours costs 6, then alone.
    assert cheaper_spans(ours, theirs) == [Span(2, 5), Span(8, 12)]
    assert cheaper_spans([Offer(3, inf)], [Offer(3, inf)]) == []
    assert cheaper_spans([Offer(2, inf)], [Offer(3, 7)]) == [Span(0.0, inf)]
    assert cheaper_spans([Offer(1, 0.0)], theirs) == []
