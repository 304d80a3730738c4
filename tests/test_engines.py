"""Engine presets: what they set, and that what is said wins over them."""

from __future__ import annotations

from pathlib import Path

import pytest

import workbench
from backends.simulated.front_end import FrontEndModel
from backends.simulated.host import HostModel
from backends.simulated.kv_memory import ModelDoesNotFit
from reports.compare.differing_settings import notes
from reports.record.run_record import write_record
from tests.cost.profiles import batch, linear_profile
from traces import TraceRequest
from workbench.cluster.pools import resolve_pools
from workbench.cluster.resolve import resolve
from workbench.scheduler.config import ConfigError
from workbench.settings.engines import Hardware, engine_names, load_engine, short_names
from workbench.settings.loading import SETTINGS, settings_from
from workbench.settings.offers import not_offered
from workbench.settings.run_settings import RunSettings


@pytest.mark.parametrize("name", engine_names())
def test_every_preset_is_made_of_known_settings_and_phases(name):
    settings = settings_from(None, {"engine": name, "gpu": "h100"})
    engine = load_engine(name).on(Hardware("h100", 80 * 2**30))
    for field, value in engine.settings.items():
        assert getattr(settings, field) == SETTINGS[field].meant(value)
    HostModel(**engine.host)
    FrontEndModel(**engine.front_end)
    assert resolve(settings, settings.loops[0]).scheduler.batching == settings.batching


def test_a_preset_has_in_every_table_what_it_does_not_say_from_the_one_it_extends():
    above, below, synchronous = (load_engine(f"vllm-{version}.0") for version in ("0.24", "0.19", "0.12"))
    own = {"schedule_request_s": 3.9e-6, "process_token_s": 2.2e-6}
    assert below.host == {**above.host, **own} != above.host
    assert below.exchange == {**above.exchange, "sends": "logits"}
    assert synchronous.host["gap_rank_s"] == load_engine("vllm").host["gap_rank_s"] > 0
    assert not synchronous.exchange["quantised"]
    assert (
        load_engine("sglang-0.5.1").host["gap_recurrent_s"] == 0 < load_engine("sglang-0.5.6").host["gap_recurrent_s"]
    )


def test_flags_and_files_win_over_the_preset(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('engine = "vllm-0.19"\nmax_running = 100\npage_size = 32\n')
    settings = settings_from(file, {"page_size": 8})
    assert (settings.batching, settings.max_running, settings.page_size) == ("mixed", 100, 8)
    assert settings_from(None, {}) == RunSettings()


def test_graphs_of_vllm_hold_every_decode_batch_and_small_mixed_steps():
    engine = load_engine("vllm-0.19")
    assert engine.capture_sizes(128) == [1, 2, 4, *range(8, 129, 8)]
    assert engine.mixed_capture_sizes(128) == [1, 2, 4, *range(8, 257, 8)]
    assert engine.mixed_capture_sizes(1000)[-1] == 512
    assert engine.capture_sizes(100)[-1] == 104
    assert load_engine("sglang-0.5").mixed_capture_sizes(128) == []


def test_vllm_sends_whole_rows_of_its_page_table_before_every_step(tmp_path):
    folder = linear_profile(tmp_path / "p")

    def beside(requests: int, **flags: object) -> float:
        settings = settings_from(
            None, {"cost": f"profile:{folder}", "kv_tokens": 100_000, "max_context": 32_000, **flags}
        )
        cost = resolve(settings, "overlap").cost
        return cost.beside_s(batch([100] * requests))

    # 32,000 tokens are 2,000 pages of four bytes a request, over PCIe 5.0.
    row_s = 2000 * 4 / 64e9
    vllm = {"engine": "vllm-0.19"}
    assert beside(200, **vllm) - beside(100, **vllm) == pytest.approx(100 * row_s)
    assert beside(200, **vllm, page_size=32) - beside(100, **vllm, page_size=32) == pytest.approx(50 * row_s)
    assert beside(200) == beside(100), "ours keeps its table on the GPU"


def test_an_unknown_engine_is_refused_with_the_nearest_name():
    with pytest.raises(ConfigError, match=r"engine: 'vllm-0' is not known; nearest: vllm-0\.33"):
        settings_from(None, {"engine": "vllm-0"})
    with pytest.raises(ConfigError) as near:
        settings_from(None, {"engine": "vllm-9"})
    assert str(near.value) == "engine: 'vllm-9' is not known; nearest: vllm-0.19, vllm, vllm-0.19.0", (
        "and not all 27 names"
    )
    with pytest.raises(ConfigError, match=r"engine: 'qqq' is not known; there are workbench, vllm-0\.33\.0, "):
        settings_from(None, {"engine": "qqq"})


def test_a_short_name_stands_for_one_version_and_the_settings_hold_that():
    assert settings_from(None, {"engine": "vllm-0.19"}).engine == "vllm-0.19.0"
    for short, exact in short_names().items():
        assert exact.startswith(short) and settings_from(None, {"engine": short}) == settings_from(
            None, {"engine": exact}
        )


def test_a_preset_has_what_the_one_it_extends_has_but_for_what_it_says():
    above, below = load_engine("vllm-0.14.0"), load_engine("vllm-0.12.0")
    assert below.graphs == above.graphs and below.page_entry_bytes == above.page_entry_bytes
    assert below.gpus == above.gpus and below.kv == above.kv == {"group_ratio": 1.25}
    assert below.settings == {**above.settings, "loop": "normal"}


def test_vllm_was_synchronous_before_0_14_unless_asked():
    loops = {name: settings_from(None, {"engine": name}).loops for name in engine_names() if name.startswith("vllm")}
    assert {name for name, loop in loops.items() if loop == ["normal"]} == {"vllm-0.12.0"}
    assert settings_from(None, {"engine": "vllm-0.12", "loop": "overlap"}).loops == ["overlap"]


@pytest.mark.parametrize(
    ("engine", "gpu", "tp", "limits"),
    [
        # get_batch_defaults: 70 GiB and more that are no A100; 0.33 knows GPUs of 160 GiB and more, too.
        ("vllm-0.33", "h100", 1, {"max_batch_tokens": 8192, "max_running": 1024, "graphs": 512}),
        ("vllm-0.33", "b200", 1, {"max_batch_tokens": 16384, "max_running": 1024, "graphs": 1024}),
        ("vllm-0.33", "mi300x", 1, {"max_batch_tokens": 16384, "max_running": 1024, "graphs": 512}),
        ("vllm-0.24", "b200", 1, {"max_batch_tokens": 8192, "max_running": 1024, "graphs": 512}),
        ("vllm-0.12", "a100", 1, {"max_batch_tokens": 2048, "max_running": 256, "graphs": 512}),
        ("vllm-0.12", "l40s", 4, {"max_batch_tokens": 2048, "max_running": 256, "graphs": 512}),
        # The largest decode graph goes by the group, too.
        ("sglang-0.5.23", "rtx-4090", 1, {"chunk": 4096, "graphs": 48}),
        ("sglang-0.5.10", "rtx-4090", 1, {"chunk": 2048, "graphs": 24}),
        ("sglang-0.5.10", "rtx-4090", 4, {"chunk": 2048, "graphs": 80}),
        ("sglang-0.5.9", "h100", 1, {"chunk": 8192, "graphs": 256}),
        ("sglang-0.5.6", "h200", 4, {"chunk": 8192, "graphs": 512}),
        ("sglang-0.5.6", "b200", 8, {"chunk": 16384, "graphs": 512}),
        ("sglang-0.5.1", "h100", 8, {"chunk": 8192, "graphs": 160}),
        ("sglang-0.5.1", "h200", 8, {"chunk": 8192, "graphs": 256}),
        ("sglang-0.4.10", "b200", 8, {"chunk": 16384, "graphs": 512}),
    ],
)
def test_default_limits_go_by_the_version_the_gpu_and_the_group(engine, gpu, tp, limits):
    settings = settings_from(None, {"engine": engine, "gpu": gpu, "tp": tp, "max_running": 1024, "kv_tokens": 10_000})
    found = {name: getattr(settings, name) for name in limits if name not in ("graphs", "max_running")}
    plain = settings_from(None, {"engine": engine, "gpu": gpu, "tp": tp})
    found |= {name: plain.max_running for name in limits if name == "max_running"}
    assert {**found, "graphs": resolve(settings, settings.loops[0]).host.graph_max_batch} == limits
    asked = settings_from(None, {"engine": engine, "gpu": gpu, "tp": tp, "chunk": 77, "max_batch_tokens": 99})
    assert (asked.chunk, asked.max_batch_tokens) == (77, 99)


def test_a_limit_that_nobody_asked_for_gives_way_to_a_smaller_budget_and_to_states():
    assert settings_from(None, {"engine": "vllm", "max_batch_tokens": 512}).max_running == 512
    with pytest.raises(ConfigError, match="max_batch_tokens: 512 cannot give each of 600"):
        asked = settings_from(None, {"engine": "vllm", "max_batch_tokens": 512, "max_running": 600})
        resolve(asked, "overlap")
    hybrid = {"engine": "vllm", "model": "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16", "gpu": "h100"}
    found = resolve(settings_from(None, hybrid), "overlap")
    assert 0 < found.scheduler.max_running < 256
    assert f"max_running: {found.scheduler.max_running}, for states have no room for vllm-0.33.0's own" in found.notes
    with pytest.raises(ModelDoesNotFit, match="--max-running"):
        resolve(settings_from(None, {**hybrid, "max_running": 300}), "overlap")


def test_each_pool_has_the_limits_of_its_own_gpu():
    pools = settings_from(
        None,
        {"engine": "vllm-0.33", "pool": ["a=both:1", "b=both:1,gpu=b200", "c=both:1,gpu=l40s,max_batch_tokens=512"]},
    ).pools("overlap")
    assert [pool.settings.max_batch_tokens for pool in pools] == [8192, 16384, 512]
    assert [pool.settings.max_running for pool in pools] == [1024, 1024, 256]


def test_each_pool_has_the_loop_of_its_own_engine_where_the_run_names_none():
    def loops(*pools: str, **flags: object) -> list[str]:
        settings = settings_from(None, {"pool": list(pools), **flags})
        return [pool.loop for pool in settings.pools(settings.loops[0])]

    assert loops("both:1,engine=vllm-0.12", "both:1,engine=vllm") == ["normal", "overlap"]
    assert loops("both:1,engine=vllm", "both:1", engine="vllm-0.12") == ["overlap", "normal"]
    assert loops("both:1,engine=workbench", "both:1,gpu=h200", engine="vllm-0.12") == ["overlap", "normal"]
    assert loops("both:1,engine=vllm-0.12", "both:1,engine=vllm", loop="overlap") == ["overlap"] * 2
    assert loops("both:1,engine=vllm-0.12,overlap=true", "both:1") == ["overlap"] * 2


def test_a_preset_run_with_what_its_engine_does_not_have_says_so(tmp_path):
    def said(like: Path | None = None, **flags: object) -> list[str]:
        settings = settings_from(None, flags, like)
        pools = [resolve_pools(settings, loop) for loop in settings.loops]
        notes = [note for of_loop in pools for pool in of_loop for note in pool.recipe.notes]
        return [note for note in notes if note.endswith("the run has it all the same")]

    assert said(engine="vllm", policy="lpm", chunk_depth=4000) == [
        "policy: vllm-0.33.0 has no lpm, but fcfs, priority; the run has it all the same",
        "chunk_depth: vllm-0.33.0 has no such setting; the run has it all the same",
    ]
    other = "policy: sglang-0.5.1.post1 has no priority, but lpm, random, fcfs, dfs-weight, lof; the run has it all the same"
    assert said(engine="sglang-0.5.1", policy="priority", loop="normal,overlap") == [other, other]
    assert said(engine="sglang", policy="priority", max_running=7) == [] == said(policy="edf", chunk_depth=4000)
    (of_pool,) = said(pool=["a=both:1,engine=vllm,policy=lof", "b=both:1,policy=lof"])
    assert of_pool.startswith("policy: vllm-0.33.0 has no lof")
    # A record says all settings, and so they win over another preset than its own; the notes are on its page.
    requests = [TraceRequest("one", 0.0, 10, 2)]
    record = workbench.simulate(requests, engine="sglang")
    write_record(record, tmp_path)
    of_record = said(tmp_path, engine="vllm-0.12")
    assert of_record[0].startswith("batching: vllm-0.12.0 has no prefill-first, but mixed;")
    page_notes = notes({"": workbench.simulate(requests, engine="vllm", policy="lpm")})
    assert page_notes[0].startswith("policy: vllm-0.33.0 has no lpm, but")


@pytest.mark.parametrize(
    ("engine", "asked", "said"),
    [
        ("vllm-0.12", {"batching": "prefill-first"}, "batching: vllm-0.12.0 has no prefill-first, but mixed"),
        ("vllm-0.12", {"kv_dtype": "fp16"}, "kv_dtype: vllm-0.12.0 has no fp16, but auto, bf16, fp8"),
        ("vllm-0.19", {"kv_dtype": "fp16"}, None),
        ("vllm-0.12", {"expert_exchange": "naive", "ep": 2, "tp": 2}, None),
        (
            "vllm-0.33",
            {"expert_exchange": "naive", "ep": 2, "tp": 2},
            "expert_exchange: vllm-0.33.0 has no naive, but ",
        ),
        (
            "vllm-0.14",
            {"expert_exchange": "sum-or-max", "ep": 2, "tp": 2},
            "expert_exchange: vllm-0.14.0 has no sum-or-",
        ),
        ("vllm-0.14", {"expert_exchange": "sum-or-max"}, None),  # there is nobody to exchange with
        ("vllm-0.14", {"page_size": 1}, "page_size: vllm-0.14.0 has no 1, but 16, 32, 64, 128, 256"),
        ("vllm-0.14", {"ep": 2, "tp": 2, "dp": 2}, "ep: vllm-0.14.0 has no 2, but 4"),
        ("vllm-0.14", {"ep": 4, "tp": 2, "dp": 2}, None),
        ("vllm-0.33", {"queue_timeout": 3.0}, "queue_timeout: vllm-0.33.0 has no such setting"),
        ("vllm-0.33", {"overlap_prefills": False}, "overlap_prefills: vllm-0.33.0 has no such setting"),
        ("vllm-0.33", {"admit_for": "chunk"}, "rules: not those of vllm-0.33.0: admit_for is prompt there, not chunk"),
        ("vllm-0.33", {"long_prefill_tokens": 4000}, None),
        ("sglang-0.4.10", {"evict": "lfu"}, "evict: sglang-0.4.10.post2 has no lfu, but lru"),
        ("sglang-0.4.10", {"request_timeout": 3.0}, "request_timeout: sglang-0.4.10.post2 has no such setting"),
        ("sglang-0.5.23", {"request_timeout": 3.0}, None),
        ("sglang-0.4.10", {"batching": "mixed"}, "batching: sglang-0.4.10.post2 has no mixed, but prefill-first"),
        ("sglang-0.5.23", {"evict": "fifo"}, "evict: sglang-0.5.23 has no fifo, but lru, lfu"),
        ("sglang-0.5.23", {"charge": "tokens"}, "rules: not those of sglang-0.5.23: charge is pages there, not tokens"),
        ("sglang-0.5.23", {"retract_ahead": 7}, None),
        (
            "sglang-0.5.23",
            {"round_reserve": True},
            "rules: not those of sglang-0.5.23: round_reserve is off there, not on",
        ),
        ("mini-sglang", {"pp": 2}, "pp: mini-sglang-20fcd7f has no such setting"),
        ("mini-sglang", {"policy": "priority"}, "policy: mini-sglang-20fcd7f has no priority, but fcfs"),
        ("workbench", {"charge": "pages", "queue_timeout": 3.0}, None),
    ],
)
def test_what_an_engine_of_a_version_has_not_is_said_and_nothing_else(engine, asked, said):
    settings = settings_from(None, {"engine": engine, "model": "Qwen/Qwen3-30B-A3B", **asked})
    notes = list(not_offered(settings, settings.loops[0]))
    assert len(notes) == (said is not None)
    assert said is None or (notes[0].startswith(said) and "all the same" in notes[0])


@pytest.mark.parametrize("engine", engine_names())
def test_a_preset_as_it_is_has_nothing_that_its_engine_has_not(engine):
    for more in ({}, {"gpu": "b200"}, {"cache": "none"}, {"max_running": 7, "kv_tokens": 4000}):
        settings = settings_from(None, {"engine": engine, **more})
        assert list(not_offered(settings, settings.loops[0])) == []


def test_several_stages_take_the_pipeline_loop_whatever_loop_the_preset_has():
    assert settings_from(None, {"engine": "vllm", "pp": 2}).loops == ["pipeline"]
    assert settings_from(None, {"engine": "vllm", "pp": 1}).loops == ["overlap"]
    with pytest.raises(ConfigError, match="loop: 'overlap' runs one stage, but pp is 2; use pipeline"):
        settings_from(None, {"engine": "vllm", "pp": 2, "loop": "overlap"})


def test_settings_of_what_engines_have_are_settings():
    for name in engine_names():
        for setting, values in load_engine(name).offers.items():
            if setting == "ep":
                assert set(values) <= {"all", "tp"}
                continue
            assert not SETTINGS[setting].choices or set(values) <= set(SETTINGS[setting].choices), (name, setting)
            own = load_engine(name).settings.get(setting)
            assert own is None or not values or own in values or own == 0, (name, setting)
