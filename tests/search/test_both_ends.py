"""A plan at both ends of the band, and the commands that deploy what it chose."""

from __future__ import annotations

import json
import shlex
from typing import Any

import pytest
from typer.testing import CliRunner

from reports.page.plan_page import plan_page_html
from tests.search.run import SAMPLE
from traces import open_trace
from traces.in_memory import in_memory
from workbench.cli.app import app
from workbench.cluster.device import hardware_on, runner_options
from workbench.cluster.pools import resolve_pools
from workbench.fleet.planned import FleetSettings
from workbench.scheduler.config import SchedulerSettings
from workbench.scheduler.settings import settings_of
from workbench.search.both_ends import both_ends
from workbench.search.rate import simulator
from workbench.search.slo import measured_s, parse_slo
from workbench.settings import accuracy
from workbench.settings.deploy import Deployed, deploy_commands, our_command
from workbench.settings.idle import acts
from workbench.settings.loading import settings_from
from workbench.settings.run_settings import RunSettings


def bands(low: float, high: float, **more: tuple[float, float]) -> dict[str, Any]:
    """What a record has of errors, of E2E and of more."""
    each = {"e2e": (low, high), **more}
    return {"bands": {name: {"low": a, "high": b, "rows": 20, "group": "g"} for name, (a, b) in each.items()}}


@pytest.fixture(scope="module")
def simulate():
    """Runs of the sample's first requests, and the rates they were at."""
    trace = in_memory(open_trace(SAMPLE))
    run = simulator(RunSettings(requests=20), "overlap", trace, "", "")
    return run


def test_the_slow_end_is_a_run_at_a_higher_rate_with_limits_as_much_lower(simulate):
    at: list[float] = []

    def counted(rate, watch):
        at.append(rate)
        return simulate(rate, watch)

    # Half of what it really takes: at 2/s it is as busy as the model at 4/s, and its times are twice as long.
    record = simulate(4.0, None)
    (limit,) = parse_slo("tpot_mean=1s")
    twice_s = 2 * measured_s(record, limit)
    above, below = (parse_slo(f"tpot_mean={twice_s * factor}s") for factor in (1.001, 0.999))
    assert both_ends(counted, above, 2.0, True, bands(-0.5, 0.1)).slow_kept is True  # type: ignore[union-attr]
    assert both_ends(counted, below, 2.0, True, bands(-0.5, 0.1)).slow_kept is False  # type: ignore[union-attr]
    assert at == [4.0, 4.0]
    # A latency has the band of its own where there is one.
    own = bands(-0.5, 0.1, tpot=(-0.75, 0.0))
    assert both_ends(counted, above, 2.0, True, own).slow_kept is False  # type: ignore[union-attr]


def test_the_fast_end_is_asked_of_what_does_not_keep_the_slo(simulate):
    record = simulate(1.0, None)
    (limit,) = parse_slo("tpot_mean=1s")
    half_s = 0.5 * measured_s(record, limit)
    found = both_ends(simulate, parse_slo(f"tpot_mean={half_s * 1.001}s"), 2.0, False, bands(-0.2, 1.0))
    assert found is not None and found.fast == 0.5 and found.slow == 1.25
    assert (found.slow_kept, found.fast_kept) == (False, True)


def test_nothing_is_said_of_the_ends_where_nothing_was_compared(simulate):
    assert both_ends(simulate, parse_slo("tpot_mean=1s"), 2.0, True, {"bands": {}, "why": "so"}) is None


def plan(*more: str) -> dict[str, Any]:
    said = ["plan", str(SAMPLE), "--requests", "20", "--slo", "tpot_p99=11ms", "--rate", "2", "--json", *more]
    done = CliRunner().invoke(app, said)
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture
def recorded(monkeypatch):
    """Errors of vLLM: as if predictions were between two thirds and all of what was measured."""

    def group(low: float, high: float) -> None:
        rows = [[load, None, error, error] for load, error in enumerate([low] * 10 + [high] * 10)]
        of = {
            "engine": "vllm",
            "family": "hopper",
            "model": "dense",
            "layout": "tp 1",
            "cost": "roofline",
            "rows": rows,
        }
        monkeypatch.setattr(accuracy, "read_recorded", lambda: {"every": {"roofline": 1}, "groups": [of]})

    return group


def test_a_plan_says_whether_its_choice_stands_at_both_ends_and_what_deploys_it(recorded):
    recorded(-0.5, 0.25)
    found = plan("--engine", "vllm", "--vary", "tp=1,2")
    lines = "\n".join(found["answer"])
    assert (
        "At the slow end of the band (requests take 100.0% longer than predicted) it does not keep the SLO; the cheapest "
        "that then does is tp 2 (2 h100)." in lines
    ), lines
    assert "At the fast end (requests take 20.0% less than predicted) nothing cheaper does." in lines
    best = found["candidates"][0]
    assert best["both_ends"] == {"slow": 2.0, "fast": 0.8, "slow_kept": False, "fast_kept": True}
    assert [each["engine"] for each in found["deploy"]] == ["workbench", "vllm", "sglang"]
    assert found["rests_on"]


def test_a_plan_of_what_nobody_measured_says_so(recorded):
    recorded(-0.5, 0.25)
    found = plan()
    assert (
        "Whether that stands where predictions err is not known: not compared with anything measured: workbench, cost "
        "roofline." in found["answer"]
    )
    assert found["candidates"][0]["both_ends"] is None


def commands(experts: bool = False, **flags: Any) -> dict[str, Deployed]:
    settings = settings_from(None, flags)
    return {each.engine: each for each in deploy_commands(settings, settings.loops[0], 100_000, experts)}


def test_vllm_is_told_what_it_has_flags_for():
    found = commands(engine="vllm", tp=4, dp=2, max_running=64, max_batch_tokens=4096, kv_dtype="fp8", dtype="bf16")
    assert found["vllm"].command == (
        "vllm serve meta-llama/Llama-3.1-8B --tensor-parallel-size 4 --data-parallel-size 2 --max-num-seqs 64 "
        "--max-num-batched-tokens 4096 --dtype bfloat16 --kv-cache-dtype fp8_e4m3 --gpu-memory-utilization 0.9 "
        "--block-size 16 --scheduling-policy fcfs --async-scheduling"
    )
    assert found["vllm"].without == []
    # What it has not, or in another meaning, is named.
    lacking = commands(engine="vllm", policy="sjf", page_size=8, queue_timeout=3.0)["vllm"]
    assert "--scheduling-policy" not in lacking.words and "--block-size" not in lacking.words
    assert [line.partition(":")[0] for line in lacking.without] == ["page_size", "policy", "queue_timeout"]
    experts = commands(experts=True, engine="vllm", dp=2)["vllm"]
    assert "--data-parallel-size" not in experts.words and "start 2 of these" in experts.without[0]


def test_sglang_is_told_what_it_has_flags_for():
    found = commands(engine="sglang", tp=2, max_running=64, chunk=4096, policy="lpm", loop="normal")
    assert found["sglang"].command == (
        "python -m sglang.launch_server --model-path meta-llama/Llama-3.1-8B --tp-size 2 --max-running-requests 64 "
        "--chunked-prefill-size 4096 --max-prefill-tokens 16384 --schedule-conservativeness 1.0 --max-total-tokens 100000 "
        "--page-size 1 --schedule-policy lpm --radix-eviction-policy lru --disable-overlap-schedule"
    )
    assert [line.partition(":")[0] for line in found["sglang"].without] == ["mem_fraction"]
    assert "--chunked-prefill-size -1" in commands(engine="sglang", chunk=0)["sglang"].command


def test_each_of_several_pools_has_commands_with_its_own_settings_and_role():
    found = plan("--pool", "fast=both:1,gpu=h200", "--pool", "cheap=both:2,chunk=512")["deploy"]
    ours, *found = found
    assert ours["command"].endswith(" --pool fast=both:1 --pool cheap=both:2,chunk=512") and ours["without"] == []
    assert [(each["engine"], each["pool"]) for each in found] == [
        (engine, pool) for engine in ("vllm", "sglang") for pool in ("fast", "cheap")
    ]
    sglang = {each["pool"]: each["command"] for each in found if each["engine"] == "sglang"}
    kv = {pool: int(command.split("--max-total-tokens ")[1].split()[0]) for pool, command in sglang.items()}
    assert kv["fast"] > kv["cheap"], "each has the KV of its own GPU"


def test_pools_that_prefill_and_decode_are_deployed_as_such():
    found = plan("--no-both-in-one", "--pool", "prefill:1", "--pool", "decode:2")
    ours, *others = found["deploy"]
    assert ours["command"].endswith(" --pool prefill:1 --pool decode:2") and ours["without"] == []
    of = {(each["engine"], each["pool"]): each for each in others}
    for role in ("prefill", "decode"):
        assert f"--disaggregation-mode {role} " in of["sglang", role]["command"]
        assert of["vllm", role]["without"][0].startswith(f"role: {role}; --kv-transfer-config")
    assert any("start 2 of these" in line for line in of["sglang", "decode"]["without"])
    # What does nothing on instances that decode alone is not named as lacking.
    named = [{line.partition(":")[0] for line in of["sglang", role]["without"]} for role in ("prefill", "decode")]
    assert "split_at_prompt" in named[0] - named[1] and "charge" in named[0] - named[1]
    page = plan_page_html(found, ["pools"])
    assert "To deploy it with workbench:" in page
    assert "To deploy pool decode with sglang:" in page and ">prefill:1, decode:2<" in page


@pytest.mark.parametrize(
    "flags",
    [
        {"dp": 3, "router": "cache_aware", "gpu": "l40s", "chunk": 512, "cost": "measured", "seed": 9},
        {"pool": ("fast=both:1,max-running=8", "cheap=both:2,chunk=512"), "router": "cache_aware", "policy": "lpm"},
        {"pool": ("prefill:1,tp=2,pp=2", "decode:2,overlap=false"), "decode_router": "least_requests", "page_size": 16},
        {"engine": "sglang", "pool": ("prefill:1", "decode:2,engine=sglang,max-running=4")},
    ],
)
def test_our_one_command_starts_the_same_fleet(monkeypatch, flags):
    settings = settings_from(None, flags)
    words = our_command(settings.pools(settings.loops[0])).words
    fleet = started(monkeypatch, *words[2:], "--gpu", "l40s")
    assert (fleet.run.router, fleet.run.decode_router) == (settings.router, settings.decode_router)
    ours, theirs = fleet.run.pools(fleet.loop), settings.pools(settings.loops[0])
    assert [(pool.name, pool.role, pool.count, pool.loop) for pool in ours] == [
        (pool.name, pool.role, pool.count, pool.loop) for pool in theirs
    ]
    for one, other in zip(ours, theirs, strict=True):
        names = [name for name in settings_of(SchedulerSettings) if acts(other.settings, other.loop, name)]
        assert {name: getattr(one.settings, name) for name in names} == {
            name: getattr(other.settings, name) for name in names
        }


def started(monkeypatch, *words: str) -> FleetSettings:
    """What a fleet would be started with."""
    from workbench.fleet import launcher

    seen: list[FleetSettings] = []
    monkeypatch.setattr(launcher, "run_fleet", lambda fleet, *more, **named: seen.append(fleet) or 0)
    done = CliRunner().invoke(app, ["serve", *words, "--backend", "simulated"])
    assert done.exit_code == 0, done.output
    return seen[0]


def served(monkeypatch, *words: str) -> RunSettings:
    """The settings that a server would be started with."""
    from workbench.serving import supervisor

    seen: list[RunSettings] = []
    monkeypatch.setattr(supervisor, "serve", lambda settings, force: seen.append(settings.run) or 0)
    done = CliRunner().invoke(app, ["serve", *words, "--backend", "simulated"])
    assert done.exit_code == 0, done.output
    return seen[0]


OURS: list[dict[str, Any]] = [
    {"engine": "sglang", "max_running": 64, "chunk": 4096, "tp": 2},
    {"engine": "vllm", "gpu": "b200", "policy": "priority", "max_context": 3000},
    {"engine": "vllm-0.12", "gpu": "a100", "kv_tokens": 9000, "page_size": 32},
    {"engine": "vllm-0.24", "max_batch_tokens": 512, "cache": "none"},
    {"engine": "vllm-0.14", "pp": 2, "cuda_graphs": False},
    {"engine": "sglang-0.4.10", "gpu": "l40s", "chunk": 0, "evict": "lfu"},
    {"engine": "sglang-0.5.23", "batching": "mixed", "admit_for": "prompt", "charge": "tokens"},
    {"engine": "mini-sglang", "loop": "normal", "retract_ahead": 3},
    {"policy": "lpm", "max_passed_over": 0, "max_prefill_streak": 4, "mixed_chunk": True},
    {"batching": "mixed", "max_running": 3, "overlap": False, "queue_timeout": 2.5},
    {"model": "Qwen/Qwen3-30B-A3B", "tp": 2, "ep": 2, "dtype": "int4", "kv_dtype": "fp8", "link": "16GB/s"},
    {"cost": "measured", "front_end": "vllm", "seed": 9, "kv_windows": "exact"},
]


@pytest.mark.parametrize("flags", OURS)
def test_our_own_command_starts_the_scheduler_of_the_plan(flags, monkeypatch):
    settings = settings_from(None, flags)
    (loop,) = settings.loops
    (ours, *_) = deploy_commands(settings, loop, 100_000, False)
    assert ours.words[:2] == ["workbench", "serve"]
    run = served(monkeypatch, *shlex.split(ours.command)[2:], "--gpu", settings.gpu)
    # All that acts there: what does nothing needs no flag.
    names = [name for name in settings_of(SchedulerSettings) if acts(settings, loop, name)]
    assert len(names) > 15
    assert {name: getattr(run, name) for name in names} == {name: getattr(settings, name) for name in names}
    assert (run.engine, run.tp, run.pp, run.loops) == (settings.engine, settings.tp, settings.pp, [loop])
    # On another GPU the limits that the preset has by the GPU are the plan's still.
    other = served(
        monkeypatch, *shlex.split(ours.command)[2:], "--gpu", "rtx-4090" if flags.get("kv_tokens") else "h200"
    )
    assert {name: getattr(other, name) for name in names} == {name: getattr(settings, name) for name in names}
    # Nothing is said that the real runner would refuse.
    runner_options(run, loop, "cuda")


def test_what_our_runner_has_not_is_named_and_no_flag():
    ours = commands(model="Qwen/Qwen3-30B-A3B", tp=2, ep=2, dtype="int4", kv_dtype="fp8")["workbench"]
    assert ours.command == "workbench serve Qwen/Qwen3-30B-A3B --loop overlap --tp 2"
    assert sorted(line.partition(":")[0] for line in ours.without) == ["dtype", "ep", "kv_dtype"]
    together = commands(model="Qwen/Qwen3-30B-A3B", dp=2, ep=2)["workbench"]
    assert together.command == "" and together.without[0].startswith("ep: instances that share their experts")


def test_every_command_that_a_plan_prints_for_us_is_one_that_serve_takes(monkeypatch):
    found = plan("--engine", "vllm-0.24", "--vary", "max_running=8,32", "--vary", "policy=fcfs,priority")
    printed = [each["command"] for each in found["deploy"] if each["engine"] == "workbench"]
    assert printed and printed[0].startswith("workbench serve meta-llama/Llama-3.1-8B --engine vllm-0.24.0 ")
    for command in printed:
        assert served(monkeypatch, *shlex.split(command)[2:]).engine == "vllm-0.24.0"


def test_a_server_like_a_record_has_the_rules_of_its_preset_and_says_what_is_for_simulation(monkeypatch, tmp_path):
    from workbench.serving import supervisor

    said = f"simulate {SAMPLE} --requests 3 --engine vllm-0.12 --gpu a100 --front-end vllm --out {tmp_path / 'out'}"
    assert CliRunner().invoke(app, said).exit_code == 0
    seen: list[RunSettings] = []
    monkeypatch.setattr(supervisor, "serve", lambda settings, force: seen.append(settings.run) or 0)

    def serve(*words: str) -> str:
        done = CliRunner().invoke(app, ["serve", *words, "--backend", "simulated"])
        assert done.exit_code == 0, done.output
        return done.stderr

    alone = (
        "note: engine: rules, loop and limits are those of vllm-0.12.0; its CPU phases and front end are for "
        "simulation alone\n"
    )
    assert serve("--like", str(tmp_path / "out/normal")) == alone
    assert serve("llama-3.1-8b", "--engine", "vllm-0.12", "--gpu", "a100") == alone
    like, asked = seen
    names = settings_of(SchedulerSettings)
    assert {name: getattr(like, name) for name in names} == {name: getattr(asked, name) for name in names}
    assert (asked.engine, asked.max_batch_tokens, asked.loops, like.front_end) == (
        "vllm-0.12.0",
        2048,
        ["normal"],
        "none",
    )
    assert "note: policy: vllm-0.12.0 has no lpm, but fcfs, priority" in serve(
        "llama-3.1-8b", "--engine", "vllm-0.12", "--policy", "lpm"
    )
    assert serve("llama-3.1-8b", "--policy", "lpm") == ""


def test_limits_of_a_preset_go_by_the_device_that_is_there(monkeypatch):
    class Found:
        name, total_memory = "NVIDIA H200", 141 * 2**30

    def settings(device: str) -> RunSettings:
        return settings_from(None, {"engine": "vllm-0.24"}, hardware=hardware_on(device))

    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: Found)
    assert (settings("cuda").max_running, settings("cpu").max_running) == (1024, 256)
    Found.name = "NVIDIA A100-SXM4-80GB"
    assert (settings("cuda").max_running, settings("cuda").max_batch_tokens) == (256, 2048)


def test_a_server_like_a_record_has_its_settings(monkeypatch, tmp_path):
    said = f"simulate {SAMPLE} --requests 3 --engine sglang --max-running 32 --dp 2 --concurrency 2 --out {tmp_path / 'out'}"
    assert CliRunner().invoke(app, said).exit_code == 0
    record = tmp_path / "out" / "overlap"
    run = started(monkeypatch, "--like", str(record)).run
    assert (run.model, run.max_running, run.dp, run.concurrency) == ("meta-llama/Llama-3.1-8B", 32, 2, None)
    (pool,) = resolve_pools(settings_from(None, {}, record), "overlap")
    assert run.scheduler(1000, 100, 1) == settings_from(None, {}, record).scheduler(1000, 100, 1)
    assert pool.recipe.scheduler.kv_tokens == run.kv_tokens
    # What is said beside it wins.
    assert (
        served(monkeypatch, "Qwen/Qwen3-8B", "--like", str(record), "--max-running", "8", "--dp", "1").max_running == 8
    )
    refused = CliRunner().invoke(app, ["serve", "--backend", "simulated"])
    assert refused.exit_code == 2 and refused.stderr == "error: model: say which, or --like RECORD, which has one\n"


def test_a_sweep_says_how_sure_its_best_points_are(recorded, tmp_path):
    recorded(-0.5, 0.25)
    said = [
        "sweep",
        str(SAMPLE),
        "--requests",
        "5",
        "--engine",
        "vllm",
        "--vary",
        "tp=1,2",
        "--out",
        str(tmp_path / "out"),
    ]
    done = CliRunner().invoke(app, [*said, "--json"])
    assert done.exit_code == 0, done.output
    front = json.loads(done.stdout)["pareto"]
    assert front and all(point["accuracy"]["bands"]["e2e"]["low"] == -0.5 for point in front)
    assert "errors of predictions like this" in (tmp_path / "out" / "sweep.html").read_text()
    shown = CliRunner().invoke(app, [*said, "--resume"]).stdout
    assert "20 rows of vllm on hopper, dense" in " ".join(shown.split()) and "step times: the roofline of h100" in shown
