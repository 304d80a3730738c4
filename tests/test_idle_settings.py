"""Every setting acts, or it is refused or noted: over all pairs of a setting and a choice beside it."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from typer.testing import CliRunner

from reports.record.run_record import read_meta
from tests.meta_form import check_meta
from workbench.cli.app import app
from workbench.recording.trace_notes import trace_notes
from workbench.scheduler.config import PREFIX_POLICIES, ConfigError, SchedulerConfig
from workbench.settings.engines import engine_names
from workbench.settings.idle import acts, check_effects, needs
from workbench.settings.loading import settings_from
from workbench.settings.real import check_device_effects, live_notes, without_idle
from workbench.settings.run_settings import RunSettings

BY_PRIORITY = {
    "batching": "mixed",
    "mixed_order": "admission",
    "policy": "priority",
    "preempt_first": "priority",
}
LINKS = ("link", "link_latency", "gpus_per_node", "nodes", "node_link", "node_link_latency")
VALUES: dict[str, Any] = {
    "front_end": "vllm",
    "router": "least_requests",
    "evict": "lfu",
    "blank_pages": "queue",
    "mixed_order": "admission",
    "admit_for": "prompt",
    "long_prefill_tokens": 64,
    "long_prefill_alone": "free",
    "preempt_first": "priority",
    "after_own_preemption": "go-on",
    "preemption_gap": True,
    "chunk": 512,
    "max_prefill_tokens": 4096,
    "max_batch_tokens": 4096,
    "mixed_chunk": True,
    "preempt_threshold": 2,
    "conservativeness": 0.5,
    "max_passed_over": 8,
    "max_prefill_streak": 3,
    "micro_batches": 4,
    "mem_fraction": 0.8,
    "kv_dtype": "fp8",
    "kv_windows": "exact",
    "expert_skew": 1.2,
    "share_in_batch_tokens": 64,
    "overlap_prefills": False,
    "overlap": False,
    "charge": "pages",
    "reserve_ignore_eos": True,
    "round_reserve": False,
    "outputs_counted": "result",
    "full_when": "exhausted",
    "evict_for": "batch",
    "share_chunks": False,
    "share_launched": True,
    "touch_part": False,
    "reserve": "none",
    "page_rest": "running",
    "kv_margin": 0,
    "chunk_cut": "tokens",
    "retract_ahead": 20,
    "retract_ties": "last",
    "retract_while_ending": False,
    "share_prompts": "result",
    "touch_known": True,
    "split_at_prompt": True,
    "refresh_waiting": 32,
    "look_touches": True,
    "defer_shared_tokens": 32,
    "queue_order": "policy",
    "mixed_join": "after",
    "preempt_for": "place",
    "aborted_kv": "drop",
    "page_beside": False,
    "prompt_budget": "whole",
    "rows_first": False,
    "look_when_spent": True,
    "leaves": "decode",
    "evict_amount": "all",
    "abort_partial": "result",
    "stops_known": "result",
    "in_flight_token": "lose",
    "give_back": "ended",
    "link": "16GB/s",
    "link_latency": "20us",
    "gpus_per_node": 4,
    "nodes": 2,
    "node_link": "50GB/s",
    "node_link_latency": "10us",
    "first_token": "prefill",
    "reserved_decode_tokens": 64,
    "spare_rows": 8,
    "decode_cache": True,
    "decode_retraction": "prefill",
    "handshake_timeout": 3.0,
    "transfer_timeout": 3.0,
    "kv_link": "16GB/s",
    "kv_link_latency": "5us",
    "kv_link_per": "instance",
    "decode_router": "least_tokens",
    "expert_exchange": "naive",
}
"""A value of every setting that acts only beside others."""
HANDOVER = (
    *("first_token", "reserved_decode_tokens", "spare_rows", "decode_cache", "decode_retraction"),
    *("handshake_timeout", "transfer_timeout", "kv_link", "kv_link_latency", "kv_link_per", "decode_router"),
)
SPOILED: dict[str, list[dict[str, Any]]] = {
    **{name: [{"pool": ("both:2",)}, {"dp": 2}] for name in HANDOVER},
    "front_end": [{"pool": ("prefill:1", "decode:1")}],
    "router": [{"dp": 1}],
    "evict": [{"cache": "none"}, {"cache": "blocks"}],
    "blank_pages": [{"cache": "radix"}, {"cache": "none"}],
    "mixed_order": [{"batching": "prefill-first"}],
    "admit_for": [{"batching": "mixed"}, {"batching": "prefill-first"}],
    "long_prefill_tokens": [{"batching": "mixed"}, {"batching": "prefill-first"}],
    "long_prefill_alone": [{"batching": "mixed"}, {"batching": "mixed", "mixed_order": "admission"}],
    "preempt_first": [{"batching": "mixed"}, {"batching": "mixed", "mixed_order": "admission", "policy": "fcfs"}],
    "after_own_preemption": [{"policy": "fcfs"}, {**BY_PRIORITY, "preempt_first": "newest"}],
    "preemption_gap": [{"policy": "fcfs"}, {**BY_PRIORITY, "preempt_first": "newest"}],
    "chunk": [{"batching": "mixed"}],
    "max_prefill_tokens": [{"batching": "mixed"}],
    "max_batch_tokens": [{"batching": "prefill-first"}],
    "mixed_chunk": [{"batching": "mixed"}],
    "preempt_threshold": [{"policy": "fcfs"}, {"policy": "edf"}, {"policy": "priority", "batching": "mixed"}],
    "conservativeness": [{"batching": "mixed"}, {"reserve": "full"}, {"reserve": "none"}],
    "share_in_batch_tokens": [{"cache": "none"}],
    "max_passed_over": [{"policy": name, "cache": "none"} for name in ("fcfs", "lpm", "dfs-weight")],
    "max_prefill_streak": [{"batching": "mixed"}],
    "micro_batches": [{"loop": "overlap"}, {"loop": "normal,overlap"}],
    "mem_fraction": [{"kv_tokens": 10_000}],
    "kv_windows": [{"kv_tokens": 10_000}],
    "expert_skew": [{"cost": "fitted:costs.json", "model": "Qwen/Qwen3-8B", "gpu": "h100"}],
    "kv_dtype": [{"kv_tokens": 10_000, "cost": "fitted:costs.json", "model": "Qwen/Qwen3-8B", "gpu": "h100"}],
    "overlap_prefills": [{"loop": "normal"}, {"loop": "pipeline", "pp": 2}],
    "overlap": [{"loop": "overlap"}, {"pp": 2}],
    "charge": [{"batching": "mixed"}],
    "reserve_ignore_eos": [{"batching": "mixed"}],
    "round_reserve": [{"batching": "mixed"}],
    "outputs_counted": [{"batching": "mixed"}, {"loop": "normal"}],
    "full_when": [{"batching": "mixed"}],
    "evict_for": [{"batching": "mixed"}],
    "share_chunks": [{"cache": "none"}, {"cache": "blocks"}],
    "share_launched": [{"cache": "none"}, {"cache": "blocks"}, {"share_prompts": "launch"}],
    "touch_part": [{"cache": "none"}],
    "reserve": [{"batching": "mixed"}],
    "page_rest": [{"batching": "mixed"}],
    "kv_margin": [{"batching": "mixed"}, {"charge": "pages"}],
    "chunk_cut": [{"batching": "mixed"}, {"charge": "pages"}],
    "retract_ahead": [{"batching": "mixed"}],
    "retract_ties": [{"batching": "mixed"}],
    "retract_while_ending": [{"batching": "mixed"}, {"loop": "normal"}],
    "share_prompts": [{"cache": "none"}],
    "touch_known": [{"cache": "none"}],
    "split_at_prompt": [{"cache": "none"}],
    "refresh_waiting": [{"cache": "none"}, {"batching": "mixed"}],
    "look_touches": [{"policy": "fcfs"}, {"policy": "lpm", "cache": "none"}],
    "defer_shared_tokens": [{"policy": "fcfs"}, {"policy": "lpm", "cache": "none"}],
    "queue_order": [{"policy": "fcfs"}],
    "mixed_join": [{"mixed_chunk": False}, {"batching": "mixed"}],
    "preempt_for": [{"policy": "fcfs"}, {"policy": "priority", "batching": "mixed"}],
    "aborted_kv": [{"cache": "none"}],
    "page_beside": [{"charge": "tokens"}],
    "prompt_budget": [{"charge": "tokens"}],
    "rows_first": [{"full_when": "refused"}],
    "look_when_spent": [{"full_when": "refused"}],
    "leaves": [{"batching": "mixed"}],
    "evict_amount": [{"cache": "none"}],
    "abort_partial": [{"abort_running": "now"}],
    "stops_known": [{"loop": "normal"}],
    "in_flight_token": [{"loop": "normal"}],
    "give_back": [{"loop": "normal"}],
    **{name: [{"tp": 1}, {"tp": 1, "dp": 2}] for name in LINKS},
    "expert_exchange": [{"ep": 1}, {"ep": 1, "tp": 2}],
}
"""Choices beside which each of them does nothing."""
HEEDED: dict[str, dict[str, Any]] = {
    **{name: {"pool": ("prefill:1", "decode:2")} for name in HANDOVER},
    "front_end": {"dp": 2},
    "router": {"dp": 2},
    "evict": {"cache": "radix"},
    "blank_pages": {"cache": "blocks"},
    "mixed_order": {"batching": "mixed"},
    "admit_for": {"batching": "mixed", "mixed_order": "admission"},
    "long_prefill_tokens": {"batching": "mixed", "mixed_order": "admission"},
    "long_prefill_alone": {"batching": "mixed", "mixed_order": "admission", "long_prefill_tokens": 32},
    "preempt_first": {"batching": "mixed", "mixed_order": "admission", "policy": "priority"},
    "after_own_preemption": BY_PRIORITY,
    "preemption_gap": BY_PRIORITY,
    "chunk": {"batching": "prefill-first"},
    "max_prefill_tokens": {"batching": "prefill-first"},
    "max_batch_tokens": {"batching": "mixed"},
    "mixed_chunk": {"batching": "prefill-first"},
    "preempt_threshold": {"policy": "priority"},
    "conservativeness": {"batching": "prefill-first"},
    "share_in_batch_tokens": {"cache": "radix"},
    "max_passed_over": {"policy": "lof", "cache": "none"},
    "max_prefill_streak": {"batching": "prefill-first"},
    "micro_batches": {"loop": "pipeline", "pp": 2},
    "mem_fraction": {},
    "kv_windows": {},
    "expert_skew": {},
    "kv_dtype": {"kv_tokens": 10_000},
    "overlap_prefills": {"loop": "overlap"},
    "overlap": {},
    "charge": {"batching": "prefill-first"},
    "reserve_ignore_eos": {"batching": "prefill-first"},
    "round_reserve": {"batching": "prefill-first"},
    "outputs_counted": {"batching": "prefill-first"},
    "full_when": {"batching": "prefill-first"},
    "evict_for": {"batching": "prefill-first"},
    "share_chunks": {"cache": "radix"},
    "share_launched": {"share_prompts": "result"},
    "touch_part": {"cache": "radix"},
    "reserve": {"batching": "prefill-first"},
    "page_rest": {"batching": "prefill-first"},
    "kv_margin": {"batching": "prefill-first"},
    "chunk_cut": {"batching": "prefill-first"},
    "retract_ahead": {"batching": "prefill-first"},
    "retract_ties": {"batching": "prefill-first"},
    "retract_while_ending": {"batching": "prefill-first"},
    "share_prompts": {"cache": "radix"},
    "touch_known": {"cache": "radix"},
    "split_at_prompt": {"cache": "radix"},
    "refresh_waiting": {"cache": "radix"},
    "look_touches": {"policy": "lpm"},
    "defer_shared_tokens": {"policy": "lpm"},
    "queue_order": {"policy": "lof"},
    "mixed_join": {"mixed_chunk": True},
    "preempt_for": {"policy": "priority"},
    "aborted_kv": {"cache": "radix"},
    "page_beside": {"charge": "pages"},
    "prompt_budget": {"charge": "pages"},
    "rows_first": {"full_when": "exhausted"},
    "look_when_spent": {"full_when": "exhausted"},
    "leaves": {"batching": "prefill-first"},
    "evict_amount": {"cache": "radix"},
    "abort_partial": {"abort_running": "result"},
    "stops_known": {"loop": "overlap"},
    "in_flight_token": {"loop": "overlap"},
    "give_back": {"loop": "overlap"},
    **{name: {"tp": 2} for name in LINKS},
    "expert_exchange": {"ep": 2, "tp": 2, "model": "Qwen/Qwen3-30B-A3B"},
}
ALWAYS: dict[str, set[str]] = {
    "what is run": {"engine", "model", "gpu", "machine", "dtype", "cost", "seed"},
    "how it is laid out": {"loop", "tp", "pp", "dp", "pool", "role", "ep", "cuda_graphs", "slots", "draft_tokens"},
    "what there is room for": {"kv_tokens", "max_context", "page_size", "max_running", "reserved_pages"},
    "what others act beside": {"batching", "policy", "cache"},
    "what becomes of who loses its KV": {"requeue"},
    "when an abort ends a request": {"abort_running"},
    "refused without a chunk size": {"chunk_depth"},
    "when a request ends": {
        "ignore_eos",
        "max_tokens",
        "queue_timeout",
        "request_timeout",
    },
    "which requests come, and when": {"requests", "rate", "speedup", "concurrency"},
    "which instances are there, and when": {"fail", "autoscale"},
    "what is counted": {"slo_ttft", "slo_tpot"},
    "how a simulation goes": {"exact"},
}
"""Settings that act whatever stands beside them, or contradict it and are refused by both classes themselves."""
CHOICES: dict[str, list[Any]] = {
    "loop": ["normal", "overlap", "pipeline", "normal,overlap", "overlap,pipeline"],
    "batching": ["prefill-first", "mixed"],
    "policy": ["fcfs", "lpm", "edf", "priority", "random"],
    "cache": ["radix", "blocks", "none"],
    "pp": [1, 2],
    "dp": [1, 2],
    "kv_tokens": [None, 10_000],
    "engine": [*engine_names()],
}


def said(flags: dict[str, Any]) -> str:
    """What is said to these flags: a refusal, or notes."""
    try:
        settings = settings_from(None, flags)
        notes = check_effects(settings, flags, None)
        # What a preset's engine does not have acts here all the same: tests/test_engines.py.
        return "; ".join(note for note in notes if not note.endswith("the run has it all the same"))
    except ConfigError as error:
        return f"refused: {error}"


def test_the_tables_hold_every_setting_that_acts_only_beside_others():
    declared = {field.name for field in dataclasses.fields(RunSettings) if needs(field.name) is not None}
    assert declared == set(VALUES) == set(SPOILED) == set(HEEDED)


def test_every_setting_is_said_to_act_always_or_to_need_something():
    always = [name for names in ALWAYS.values() for name in names]
    fields = {field.name for kind in (RunSettings, SchedulerConfig) for field in dataclasses.fields(kind)}
    assert sorted(always) == sorted({name for name in fields if needs(name) is None})
    assert fields == set(always) | set(VALUES)


def test_a_running_scheduler_refuses_a_setting_without_effect():
    config = SchedulerConfig(kv_tokens=1000, max_context=100)
    for name in ("share_in_batch_tokens", "max_passed_over", "chunk"):
        assert getattr(config.changed({name: 1}, config), name) == 1
        beside = dataclasses.replace(config, **SPOILED[name][0])
        with pytest.raises(ConfigError, match=f"^{name}: has no effect here: it needs {needs(name)}$"):
            beside.changed({name: 1}, beside)


@pytest.mark.parametrize("name", VALUES)
def test_a_setting_without_effect_is_refused_by_name_with_what_it_needs(name):
    for beside in SPOILED[name]:
        assert said({**beside, name: VALUES[name]}).startswith(f"refused: {name}: "), beside
        default = getattr(RunSettings, name)
        if default is not None:  # the default, if somebody gives it, is a setting like any other
            assert said({**beside, name: default}) == f"refused: {name}: has no effect here: it needs {needs(name)}"
    assert said({**HEEDED[name], name: VALUES[name]}) == ""


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("name", VALUES)
def test_of_every_pair_the_setting_acts_or_something_is_said(name, choice):
    for value in CHOICES[choice]:
        flags = {choice: value, name: VALUES[name]}
        if value is None:
            del flags[choice]
        answer = said(flags)
        if answer.startswith("refused:"):
            continue
        settings = settings_from(None, flags)
        acting = [acts(settings, loop, name) for loop in settings.loops]
        assert any(acting)
        assert (answer == "") is all(acting), (flags, answer)


@pytest.mark.parametrize("choice", CHOICES)
def test_a_default_or_a_preset_is_never_held_against_anybody(choice):
    for value in CHOICES[choice]:
        flags = {} if value is None else {choice: value}
        if flags.get("loop") in ("pipeline", "overlap,pipeline"):
            flags["pp"] = 2
        if flags.get("pp") == 2:
            flags.setdefault("loop", "pipeline")
        assert said(flags) == ""


def test_a_setting_that_acts_under_some_of_the_loops_is_noted():
    flags = {"loop": "overlap,pipeline", "tp": 2, "micro_batches": 4}
    assert said(flags) == "micro_batches: has no effect under overlap: it needs the pipeline loop"


def test_what_a_file_sets_without_effect_is_noted(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('batching = "mixed"\nchunk = 512\n')
    assert check_effects(settings_from(file, {}), {}, file) == [
        f"{file}: chunk: has no effect here: it needs prefill-first batching"
    ]
    with pytest.raises(ConfigError, match=r"^max_prefill_tokens: has no effect here"):
        check_effects(settings_from(file, {"max_prefill_tokens": 100}), {"max_prefill_tokens": 100}, file)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_a_real_runner_does_not_heed_is_refused_as_a_flag_and_noted_in_a_file(device, tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('gpu = "h100"\ncost = "roofline"\nkv-dtype = "bf16"\nmem-fraction = 0.8\nchunk = 512\n')
    idle = ["gpu", "cost", "kv_dtype"] + (["mem_fraction"] if device == "cpu" else [])
    notes = check_device_effects({"gpu": None}, file, device)
    assert [note.split(": ")[:2] for note in notes] == [[str(file), name] for name in idle]
    assert all(f"has no effect on a real {device} runner" in note for note in notes)
    for name in idle:
        with pytest.raises(ConfigError, match=f"^{name}: has no effect on a real {device} runner: "):
            check_device_effects({name: 0.8}, None, device)


def test_what_has_no_place_in_real_time_or_on_a_server_is_noted_in_a_file(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text("rate = 2.0\nexact = true\nrequests = 3\nchunk = 512\nignore-eos = true\n")
    exact = f"{file}: exact: has no effect here: no step is skipped in real time"
    load = "has no effect here: its requests come from clients, not from a trace"
    assert live_notes(file, "live") == [exact]
    assert live_notes(file, "live", "served") == [f"{file}: rate: {load}", exact, f"{file}: requests: {load}"]
    used = without_idle(settings_from(file, {}), "live", "served")
    assert used == RunSettings(chunk=512, ignore_eos=True), "a record of it is simulated under what it ran under"
    file.write_text("exact = false\nconcurrency = 4\nspeedup = 2.0\n")
    assert live_notes(file, "live") == live_notes(None, "live", "served") == []


@pytest.mark.parametrize("words", [("replay", "t.jsonl", "--backend", "cpu"), ("serve", "m", "--backend", "simulated")])
def test_a_real_run_and_a_server_say_on_the_terminal_what_a_file_sets_in_vain(words, tmp_path):
    file = tmp_path / "run.toml"
    file.write_text("exact = true\nloop = 'normal,overlap'\n")
    ran = CliRunner().invoke(app, [*words, "--config", str(file)])
    assert ran.exit_code == 2
    assert f"note: {file}: exact: has no effect here: no step is skipped in real time\n" in ran.stderr


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"rate": 2.0, "speedup": 2.0}, "speedup: has no effect beside rate"),
        ({"rate": 2.0, "concurrency": 2}, "concurrency: replaces arrivals"),
        ({"pp": 1, "loop": "pipeline"}, "loop: pipeline needs pp of 2 or more"),
    ],
)
def test_settings_that_exclude_each_other_are_refused(flags, says):
    assert said(flags).startswith(f"refused: {says}")


TRACE = [{"arrival_s": i / 10, "input_length": 20, "output_length": 3} for i in range(4)]


@pytest.mark.parametrize(
    ("policy", "changes", "says"),
    [
        ("edf", {}, "no request has a deadline"),
        ("edf", {"slo_ttft_s": 2.0}, None),
        ("priority", {}, "all requests have priority 0"),
        ("priority", {"priority": 3}, None),
        ("fcfs", {"priority": 3}, "priorities of the trace have no effect under policy fcfs"),
        ("fcfs", {}, None),
    ],
)
def test_what_the_policy_does_not_heed_of_a_trace_is_noted(policy, changes, says, tmp_path):
    trace = tmp_path / "t.jsonl"
    trace.write_text("".join(json.dumps(line | (changes if i == 2 else {})) + "\n" for i, line in enumerate(TRACE)))
    words = ["simulate", trace, "--policy", policy, "--out", tmp_path / "o"]
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    meta = read_meta(tmp_path / "o/overlap")
    check_meta(meta, "simulated")
    notes = " ".join(meta["trace"]["notes"])
    assert says in notes if says else "policy" not in notes and "deadline" not in notes


@pytest.mark.parametrize(("policy", "cache"), [("lpm", "none"), ("dfs-weight", "none"), ("lpm", "radix")])
def test_a_policy_by_prefixes_without_a_prefix_cache_is_noted(policy, cache):
    notes = trace_notes(RunSettings(policy=policy, cache=cache), [])
    expected = [f"there is no prefix cache: policy {policy} served them as fcfs does"]
    assert notes == (expected if cache == "none" else [])


def test_a_sweep_takes_a_setting_that_acts_at_some_points_and_refuses_one_that_acts_at_none(tmp_path):
    trace = tmp_path / "t.jsonl"
    trace.write_text("".join(json.dumps(line) + "\n" for line in TRACE))
    words = ["sweep", str(trace), "--preempt-threshold", "2", "--jobs", "1", "--vary", "max_running=4,8"]
    refused = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "a")])
    assert refused.exit_code == 2
    some = ["sweep", str(trace), "--jobs", "1", "--chunk", "256", "--vary", "batching=prefill-first,mixed"]
    done = CliRunner().invoke(app, [*some, "--out", str(tmp_path / "b")])
    assert done.exit_code == 0, done.output
    idle = ["sweep", str(trace), "--jobs", "1", "--batching", "mixed", "--vary", "chunk=256,512"]
    done = CliRunner().invoke(app, [*idle, "--out", str(tmp_path / "c")])
    assert done.exit_code == 2
    assert "chunk: has no effect at any point: it needs prefill-first batching" in done.output


@pytest.mark.parametrize("policy", PREFIX_POLICIES)
def test_policies_by_prefixes_keep_to_arrivals_without_a_cache(policy, tmp_path):
    trace = tmp_path / "t.jsonl"
    lines = [
        {"arrival_s": 0, "input_length": 20 + i * 37 % 50, "output_length": 3, "hash_ids": [i % 3], "block_size": 16}
        for i in range(12)
    ]
    trace.write_text("".join(json.dumps(line) + "\n" for line in lines))
    decided = []
    for name in ("fcfs", policy):
        words = ["simulate", trace, "--policy", name, "--cache", "none", "--max-running", "2", "--decisions"]
        done = CliRunner().invoke(app, [str(word) for word in (*words, "--out", tmp_path / name)])
        assert done.exit_code == 0, done.output
        decided.append((tmp_path / name / "overlap" / "decisions.jsonl").read_text())
    assert decided[0] == decided[1]
