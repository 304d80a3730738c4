"""Clusters of different instances behind one router: what --pool and [[pool]] say, what runs, and what is left behind."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from reports.metrics.summary import summarise
from reports.record.meta import PoolMeta
from reports.record.run_record import read_record
from workbench.cli.app import app
from workbench.cluster.pools import resolve_pools
from workbench.scheduler.settings import ConfigError
from workbench.settings.loading import recorded_settings, settings_from
from workbench.settings.pool_spec import parse_pools
from workbench.settings.run_settings import RUN_WIDE, RunSettings

SAMPLE = Path(__file__).parents[1] / "traces" / "samples" / "sample.jsonl"
CSVS = ("requests.csv", "iterations.csv", "itl.csv", "events.csv")
MIXED = ("--pool", "both:2,gpu=h100", "--pool", "cheap=both:3,gpu=l40s,tp=2,chunk=512,mixed-chunk=true")
IDENTITY = ("name", "count", "first_instance", "gpu", "gpus")
TOML = """
[[pool]]
count = 2
gpu = "h100"

[[pool]]
name = "cheap"
role = "both"
count = 3
gpu = "l40s"
tp = 2
chunk = 512
mixed-chunk = true
"""


def workbench(*words: object) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


def simulated(out: Path, *words: object, loop: str = "overlap") -> Path:
    """The folder of a run of the first requests of the sample."""
    ran = workbench("simulate", SAMPLE, "--requests", 24, *words, "--out", out)
    assert ran.exit_code == 0, ran.output
    return out / loop


def files(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in CSVS}


def meta(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "meta.json").read_text())


@pytest.mark.parametrize("router", ["round_robin", "least_requests", "least_tokens", "cache_aware"])
def test_pools_of_one_kind_are_a_number_of_instances_to_the_byte(tmp_path, router):
    alike = simulated(tmp_path / "dp", "--dp", 2, "--router", router)
    two = simulated(tmp_path / "two", "--pool", "both:1", "--pool", "other=both:1", "--router", router)
    one = simulated(tmp_path / "one", "--pool", "both:2", "--router", router)
    assert files(two) == files(alike) == files(one)
    assert meta(two)["hardware"] == meta(alike)["hardware"]
    assert meta(one)["pools"] == meta(alike)["pools"]


def test_flags_and_tables_of_a_file_say_the_same_and_a_record_says_it_again(tmp_path):
    (tmp_path / "run.toml").write_text(TOML)
    flags = simulated(tmp_path / "flags", *MIXED)
    file = simulated(tmp_path / "file", "--config", tmp_path / "run.toml")
    again = simulated(tmp_path / "again", "--like", flags)
    assert files(flags) == files(file) == files(again)
    assert meta(flags)["settings"] == meta(file)["settings"] == meta(again)["settings"]
    assert [tuple(pool[name] for name in IDENTITY) for pool in meta(again)["pools"]] == [
        ("both", 2, 0, "h100", 1),
        ("cheap", 3, 2, "l40s", 2),
    ]


def test_each_instance_runs_as_one_of_its_kind_alone_would(tmp_path):
    # Taking turns, every second request goes to each of the two.
    rows = [
        {"request_id": f"r{i}", "arrival_s": i / 4, "input_length": 300 + 50 * i, "output_length": 20 + i}
        for i in range(24)
    ]

    def run(name: str, rows: list[dict[str, Any]], *words: object) -> dict[str, dict[str, str]]:
        trace = tmp_path / f"{name}.jsonl"
        trace.write_text("".join(json.dumps(row) + "\n" for row in rows))
        ran = workbench("simulate", trace, *words, "--out", tmp_path / name)
        assert ran.exit_code == 0, ran.output
        written = csv.DictReader((tmp_path / name / "overlap/requests.csv").open())
        return {row["request_id"]: row for row in written}

    together = run("both", rows, "--pool", "both:1,gpu=h100", "--pool", "b=both:1,gpu=l40s")
    for number, gpu in enumerate(("h100", "l40s")):
        alone = run(gpu, rows[number::2], "--gpu", gpu)
        for name, row in alone.items():
            assert together[name]["instance"] == str(number)
            for column in ("first_token_s", "finish_s"):
                took_s = float(row[column]) - float(row["arrival_s"])
                assert float(together[name][column]) - float(together[name]["arrival_s"]) == pytest.approx(took_s)


def test_a_record_tells_its_pools_and_counts_the_gpus_of_all(tmp_path):
    found = meta(simulated(tmp_path / "o", *MIXED))
    assert found["hardware"]["gpus"] == 2 * 1 + 3 * 2
    assert found["hardware"]["gpu"] == "GPUs (2 h100, 6 l40s)"
    assert set(found["pools"][0]) <= set(PoolMeta.__dataclass_fields__)
    assert found["pools"][1]["settings"] == {"gpu": "l40s", "tp": 2, "chunk": 512, "mixed_chunk": True}
    assert found["pools"][0]["kv_tokens"] != found["pools"][1]["kv_tokens"]
    assert found["settings"]["gpu"] is None, "no pool goes by a GPU of the run"
    instances = read_record(tmp_path / "o/overlap").requests["instance"]
    assert set(instances.tolist()) == set(range(5))


def test_instances_that_decode_have_as_much_kv_whatever_the_chunks_and_less_the_more_requests_run():
    def kv_tokens(**said: Any) -> list[int]:
        settings = settings_from(None, {"pool": ("prefill:1", "decode:1"), **said})
        return [pool.recipe.scheduler.kv_tokens for pool in resolve_pools(settings, "overlap")]

    prefill, decode = kv_tokens()
    small, same = kv_tokens(chunk=512)
    none, also = kv_tokens(chunk=0)
    assert none < prefill < small
    assert decode == same == also
    assert kv_tokens(max_running=512)[1] < decode


def test_pools_may_have_different_numbers_of_stages_and_the_loops_that_these_imply(tmp_path):
    folder = simulated(tmp_path / "o", "--pool", "both:1", "--pool", "deep=both:1,pp=2")
    found = meta(folder)
    assert [pool["loop"] for pool in found["pools"]] == ["overlap", "pipeline"]
    record = read_record(folder)
    stages = record.iterations["stage"][record.iterations["instance"] == 1]
    assert set(stages.tolist()) == {0, 1}
    assert set(record.iterations["stage"][record.iterations["instance"] == 0].tolist()) == {0}
    shares = summarise(record)
    busy_s = (record.iterations["end_s"] - record.iterations["start_s"]).sum()
    span_s = record.requests["finish_s"].max() - record.requests["arrival_s"].min()
    assert shares["gpu_busy_share"] == pytest.approx(busy_s / (3 * span_s), rel=1e-3)


def test_every_compared_loop_runs_in_every_pool(tmp_path):
    out = tmp_path / "o"
    ran = workbench("simulate", SAMPLE, "--requests", 12, *MIXED, "--loop", "normal,overlap", "--out", out)
    assert ran.exit_code == 0, ran.output
    for loop in ("normal", "overlap"):
        assert {pool["loop"] for pool in meta(out / loop)["pools"]} == {loop}


def test_experts_may_be_shared_within_a_pool(tmp_path):
    moe = ("--model", "Qwen/Qwen3-30B-A3B", "--batching", "mixed")
    alone = simulated(tmp_path / "dp", *moe, "--dp", 2, "--ep", 2)
    pool = simulated(tmp_path / "pool", *moe, "--pool", "both:2,ep=2")
    assert files(alone) == files(pool)
    beside = simulated(tmp_path / "beside", *moe, "--pool", "both:2,ep=2", "--pool", "single=both:1")
    instances = read_record(beside).iterations["instance"]
    assert set(instances.tolist()) == {0, 1, 2}


def test_terminal_page_and_json_tell_the_pools_apart(tmp_path):
    ran = workbench("simulate", SAMPLE, "--requests", 24, *MIXED, "--out", tmp_path / "o")
    said = " ".join(ran.output.split())
    assert "overlap, pool both: 2 x 1 h100" in said and "overlap, pool cheap: 3 x 2 l40s" in said
    page = (tmp_path / "o/report.html").read_text()
    assert '<section id="pools">' in page and "<th>overlap: cheap</th>" in page
    assert '"cheap 2"' in page, "lanes are called after their pool"
    assert "Peaks are the largest of one instance" in " ".join(page.split())
    assert "GPUs (2 h100, 6 l40s) (simulated)" in page and "x GPUs" not in page
    ran = workbench("simulate", SAMPLE, "--requests", 24, *MIXED, "--out", tmp_path / "j", "--json")
    (run,) = json.loads(ran.stdout)["runs"].values()
    assert [pool["name"] for pool in run["pools"]] == ["both", "cheap"]
    assert sum(pool["requests"] for pool in run["pools"]) == 24
    assert sum(pool["output_tokens"] for pool in run["pools"]) == sum(
        read_record(tmp_path / "j/overlap").requests["output_tokens"].tolist()
    )
    plain = workbench("simulate", SAMPLE, "--requests", 24, "--dp", 2, "--out", tmp_path / "d", "--json")
    (run,) = json.loads(plain.stdout)["runs"].values()
    assert "pools" not in run, "instances that are all alike are one pool"


def test_weights_and_notes_of_cost_models_are_said_by_pool_where_they_differ(tmp_path):
    pools = ("--pool", "wide=both:1,tp=16", "--pool", "small=both:1,dtype=fp8")
    ran = workbench("simulate", SAMPLE, "--requests", 8, *pools, "--out", tmp_path / "o")
    said = " ".join(ran.output.split())
    assert "weights: wide: bf16 (from torch_dtype); small: fp8 (from --dtype)" in said
    assert (
        "note: pool wide: links: tp 16 spreads over 2 nodes of 8 GPUs" in said and "note: pool small: links" not in said
    )
    page = (tmp_path / "o/report.html").read_text()
    assert "wide: bf16 (from torch_dtype); small: fp8 (from --dtype)" in page and "pool wide: links: tp 16" in page


def test_names_default_to_the_role_and_the_first_number_that_is_free():
    names = [pool.name for pool in parse_pools(["both:1", "both:2", "both-3=both:1", "both:1"])]
    assert names == ["both", "both-2", "both-3", "both-4"]


@pytest.mark.parametrize("text", ["both:2", "x=both:1,gpu=h100,tp=2", "both-2=both:4,mixed_chunk=true"])
def test_a_pool_is_written_as_it_is_read(text):
    (pool,) = parse_pools([text])
    assert parse_pools([pool.text]) == [pool]


def test_every_setting_of_an_instance_may_be_a_pools_own():
    own = {"engine": "vllm-0.19.0", "policy": "lpm", "tp": 2, "batching": "mixed", "kv_tokens": 5000, "dtype": "fp8"}
    (pool,) = settings_from(None, {"pool": [",".join(["both:1", *(f"{k}={v}" for k, v in own.items())])]}).pools(
        "overlap"
    )
    assert {name: getattr(pool.settings, name) for name in own} == own
    assert not set(own) & RUN_WIDE


def test_an_engine_of_a_pool_brings_its_preset_and_what_the_run_says_wins():
    pools = settings_from(
        None, {"engine": "vllm-0.19", "max_running": 7, "pool": ["both:1", "ours=both:1,engine=workbench"]}
    ).pools("overlap")
    vllm, ours = (pool.settings for pool in pools)
    assert (vllm.batching, ours.batching) == ("mixed", RunSettings.batching)
    assert vllm.max_running == ours.max_running == 7


REFUSED = {
    "pool: 'both' is not [NAME=]ROLE:N[,key=value...]": ("both",),
    "pool prefill: role prefill needs a pool of role decode beside it": ("prefill:2",),
    "pool d: role decode needs a pool of role prefill beside it": ("d=decode:1,gpu=h100",),
    "pool both: role both does not go with prefill and decode": ("both:1", "prefill:1", "decode:1"),
    "pool prefill: 0 instances": ("prefill:0", "decode:1"),
    "pool decode: pp: 2 stages; a decode instance has one": ("prefill:1", "decode:1,pp=2"),
    "pool decode: page_size: 16, but 1 in pool prefill": ("prefill:1", "decode:1,page-size=16"),
    "pool decode: kv_dtype: fp8, but bf16 in pool prefill": ("prefill:1", "decode:1,kv-dtype=fp8"),
    "pool decode: model: is of the whole run": ("prefill:1", "decode:1,model=Qwen/Qwen3-8B"),
    "pool prefill: kv_link: '50' has no unit": ("prefill:1,kv-link=50", "decode:1"),
    "pool decode: chunk: has no effect there: it needs a pool of role both or prefill": (
        "prefill:1",
        "decode:1,chunk=512",
    ),
    "pool prefill: spare_rows: has no effect there: it needs a pool of role decode": (
        "prefill:1,spare-rows=3",
        "decode:1",
    ),
    "pool prefill: request_timeout: has no effect there: it needs a pool of role both or decode": (
        "prefill:1,request-timeout=3",
        "decode:1",
    ),
    "pool prefill: transfer_timeout: has no effect there: it needs a pool of role decode": (
        "prefill:1,transfer-timeout=3",
        "decode:1",
    ),
    "pool decode: handshake_timeout: has no effect there: it needs a pool of role prefill": (
        "prefill:1",
        "decode:1,handshake-timeout=3",
    ),
    "pool decode: page_rest: has no effect there: it needs a pool of role both": (
        "prefill:1",
        "decode:1,page-rest=running",
    ),
    "pool decode: evict: has no effect there: it needs decode_cache": ("prefill:1", "decode:1,evict=lfu"),
    "pool decode: cache: has no effect there: it needs decode_cache": ("prefill:1", "decode:1,cache=blocks"),
    "pool bth: role: 'bth' is not one of both, prefill, decode": ("bth:1",),
    "pool both: 0 instances": ("both:0",),
    "pool both: gpux: no such setting; nearest: gpu": ("both:1,gpux=h100",),
    "pool both: 'tp' is not key=value": ("both:1,tp",),
    "pool both: tp: given twice": ("both:1,tp=1,tp=2",),
    "pool both: tp: 'two' is not a whole number": ("both:1,tp=two",),
    "pool both: tp: 0 is less than 1": ("both:1,tp=0",),
    "pool both: rate: is of the whole run, not of a pool": ("both:1,rate=3",),
    "pool both: model: is of the whole run, not of a pool": ("both:1,model=Qwen/Qwen3-8B",),
    "pool a: named twice": ("a=both:1", "a=both:2"),
    "pool both-2: unknown GPU 'h1000'": ("both:1", "both:1,gpu=h1000"),
    "pool both: evict: has no effect there: it needs": ("both:1,cache=none,evict=lfu",),
    "pool: 20000 is more than 10000 instances": ("both:20000",),
    "pool both: tp: 3 does not divide": ("both:1,tp=3",),
    "pool both-2: engine: 'foo' is not known": ("both:1", "both:1,engine=foo"),
    "pool both: cost: 'foo' is not one of": ("both:1,cost=foo",),
    "pool both: nowhere: not a profile": ("both:1,cost=profile:nowhere",),
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_pool_that_cannot_be_is_one_line_and_leaves_nothing(tmp_path, message):
    words = [word for text in REFUSED[message] for word in ("--pool", text)]
    ran = workbench("simulate", SAMPLE, *words, "--out", tmp_path / "o")
    assert ran.exit_code == 2 and not (tmp_path / "o").exists()
    assert ran.stderr.count("\n") == 1 and ran.stderr.startswith(f"error: {message}"), ran.stderr


def test_what_pools_leave_without_effect_is_refused(tmp_path):
    every = ("--pool", "both:1,gpu=h100", "--pool", "b=both:1,gpu=l40s")
    ran = workbench("simulate", SAMPLE, "--gpu", "b200", *every, "--out", tmp_path / "o")
    assert ran.exit_code == 2 and ran.stderr.startswith("error: gpu: has no effect here")
    mixed = ("--chunk", 100, "--pool", "both:1,chunk=512", "--pool", "b=both:1,chunk=1024")
    ran = workbench("simulate", SAMPLE, *mixed, "--out", tmp_path / "o")
    assert ran.stderr == "error: chunk: has no effect here: it needs a pool that does not say it itself\n"
    ran = workbench("simulate", SAMPLE, "--dp", 2, *every, "--out", tmp_path / "o")
    assert ran.exit_code == 2 and ran.stderr.startswith("error: dp: is short for --pool both:N")
    pairs = ("--pool", "prefill:1", "--pool", "decode:1")
    ran = workbench("simulate", SAMPLE, "--mixed-chunk", *pairs, "--out", tmp_path / "o")
    assert ran.stderr == "error: mixed_chunk: has no effect here: it needs a pool of role both\n"
    ran = workbench("simulate", SAMPLE, "--loop", "normal,pipeline", *pairs, "--out", tmp_path / "o")
    assert ran.stderr.startswith("error: pool decode: loop: pipeline runs stages, and a decode instance has one")
    ran = workbench("simulate", SAMPLE, "--loop", "examples.loop:loop", *pairs, "--out", tmp_path / "o")
    assert ran.stderr.startswith("error: pool prefill: loop: 'examples.loop:loop' is no loop of role prefill")
    ran = workbench("simulate", SAMPLE, "--first-token", "prefill", "--pool", "both:2", "--out", tmp_path / "o")
    assert ran.stderr.startswith("error: first_token: has no effect here: it needs pools of role prefill and decode")
    ran = workbench("simulate", SAMPLE, "--router", "least_tokens", "--pool", "both:1", "--out", tmp_path / "o")
    assert ran.exit_code == 2 and ran.stderr.startswith("error: router: has no effect here")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('pool = "prefil:1"', "pool prefil: role: 'prefil' is not one of both, prefill, decode"),
        ("pool = 3", "pool: 3 is not a list of pools"),
        ("[[pool]]\ncount = 0", "pool both: count: 0 is not a whole number above 0"),
        ("[[pool]]\ngpu = [1]", "pool both: gpu: [1] is not one plain value"),
        ("pool = []", "pool: there is none in the list"),
        ('pool = ["both:1,gpuu=h100"]', "pool both: gpuu: no such setting; nearest: gpu"),
        ("[[pool]]\ngpuu = 1", "pool both: gpuu: no such setting; nearest: gpu"),
        ("[[pool]]\nseed = 1", "pool both: seed: is of the whole run"),
        ("[[pool]]\nchunk = -5", "pool both: chunk: -5 is less than 1"),
        ('[[pool]]\nchunk = "512"', "pool both: chunk: '512' is not int"),
        ("[[pool]]\nchunk = true", "pool both: chunk: True is not int"),
        ("[[pool]]\nmixed-chunk = 1", "pool both: mixed_chunk: 1 is not bool"),
        ("[[pool]]\nname = 3", "pool: name: 3 is not text"),
        ("[[pool]]\nrole = 3", "pool: role: 3 is not text"),
    ],
)
def test_a_bad_table_is_one_line_that_names_the_file(tmp_path, text, message):
    path = tmp_path / "run.toml"
    path.write_text(text)
    ran = workbench("simulate", SAMPLE, "--config", path, "--out", tmp_path / "o")
    assert ran.exit_code == 2 and ran.stderr.startswith(f"error: {path}: {message}"), ran.stderr


def test_a_flag_for_a_number_of_instances_takes_the_place_of_a_files_pools(tmp_path):
    (tmp_path / "run.toml").write_text(TOML)
    assert len(resolve_pools(settings_from(tmp_path / "run.toml", {"dp": 4}), "overlap")) == 1
    assert len(meta(simulated(tmp_path / "o", "--config", tmp_path / "run.toml", "--dp", 4))["pools"]) == 1
    (tmp_path / "dp.toml").write_text("dp = 3")
    assert settings_from(tmp_path / "dp.toml", {"pool": ["both:2"]}).instances == 2


def test_a_sweep_counts_and_prices_the_gpus_of_all_pools(tmp_path):
    (tmp_path / "prices.toml").write_text("[gpu_hour]\nh100 = 3.0\nl40s = 1.0\n")
    out = tmp_path / "s"
    words = ("--requests", 12, *MIXED, "--vary", "max_running=32,64", "--prices", tmp_path / "prices.toml", "--jobs", 1)
    ran = workbench("sweep", SAMPLE, *words, "--out", out)
    assert ran.exit_code == 0, ran.output
    rows = list(csv.DictReader((out / "results.csv").open()))
    assert len(rows) == 2 and {row["gpus"] for row in rows} == {"8"}
    assert {float(row["cost_per_hour"]) for row in rows} == {2 * 3.0 + 6 * 1.0}
    ran = workbench("sweep", SAMPLE, "--vary", "pool=both:1,both:2", "--out", tmp_path / "t")
    assert ran.exit_code == 2 and "pool: cannot be varied" in ran.stderr


@pytest.mark.parametrize(
    ("pools", "message"),
    [
        (["prefil:1"], "settings.pool prefil: role: 'prefil' is not one of"),
        (3, "settings.pool: 3 is not a list of pools"),
    ],
)
def test_a_record_whose_pools_cannot_be_is_named(pools, message):
    with pytest.raises(ConfigError) as caught:
        recorded_settings({"settings": {"pool": pools}}, "run/meta.json")
    assert str(caught.value).startswith(f"run/meta.json: {message}")


def test_one_cost_fit_of_different_pools_is_refused(tmp_path):
    folder = simulated(tmp_path / "o", *MIXED)
    ran = workbench("calibrate", "--from", folder, "--out", tmp_path / "costs.json")
    assert ran.exit_code == 2 and "its pools (both, cheap) are of different instances" in ran.stderr
    assert not (tmp_path / "costs.json").exists()


def test_a_replay_refuses_pools(tmp_path):
    (tmp_path / "two.toml").write_text('pool = ["both:2"]\n')
    ran = workbench("replay", SAMPLE, "--model", "any", "--backend", "cpu", "--config", tmp_path / "two.toml")
    assert (ran.exit_code, ran.stderr) == (
        2,
        "error: pool: is for simulation; a real runner is one instance without it\n",
    )


@pytest.mark.parametrize(("name", "value"), [("pool", ["both:2"]), ("dp", 2)])
def test_one_server_is_one_instance(name, value):
    from workbench.serving.serve_settings import ServeSettings

    with pytest.raises(ValueError, match=f"^{name}: a server is one instance; a fleet starts one for each$"):
        ServeSettings(settings_from(None, {name: value}))


@pytest.mark.parametrize(
    ("vary", "message"),
    [
        ("decode.chunk=256,512", "decode.chunk: has no effect at any point: it needs a pool of role both or prefill"),
        ("prefill.spare-rows=1,2", "prefill.spare_rows: has no effect at any point: it needs a pool of role decode"),
        ("decode.evict=lru,lfu", "decode.evict: has no effect at any point: it needs decode_cache"),
    ],
)
def test_a_sweep_refuses_what_does_nothing_in_the_pool_that_it_names(tmp_path, vary, message):
    pools = ("--pool", "prefill:1", "--pool", "decode:1")
    ran = workbench("sweep", SAMPLE, *pools, "--vary", vary, "--out", tmp_path / "o")
    assert ran.exit_code == 2 and message in ran.output
    assert not (tmp_path / "o").exists()
