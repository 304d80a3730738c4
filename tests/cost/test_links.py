"""Links between GPUs: how they are said, what is assumed of them, and what collectives over them take."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from backends.simulated.catalogue.gpu_specs import CatalogueError, load_gpu
from backends.simulated.catalogue.model_specs import from_config, load_model
from backends.simulated.cost.models.communication import all_gather_s, all_reduce_s, all_to_all_s, next_stage_s
from backends.simulated.cost.models.operator_tables import Curve, OperatorTables, Provenance
from backends.simulated.cost.models.profile import ProfileCost
from backends.simulated.cost.models.roofline import RooflineCost
from backends.simulated.links import LinkError, spread
from ground.errors import InputError
from ground.link import Link, parse_latency, parse_rate, parse_time, written_rate, written_time
from tests.cost.profiles import batch
from workbench.cli.app import app
from workbench.cluster.pools import resolve_pools
from workbench.scheduler.config import ConfigError
from workbench.settings.loading import recorded_settings, settings_from

SAMPLE = Path(__file__).parents[2] / "traces/samples/sample.jsonl"
OLMO = from_config(
    {
        "model_type": "olmo2",
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "intermediate_size": 8192,
        "vocab_size": 100352,
        "max_position_embeddings": 4096,
    },
    "OLMo-2-1B",
    "config.json",
)
FACTS = "memory_bytes = 8e10\nmemory_bandwidth = 1e12\nbf16_flops = 1e14\n"


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("16GB/s", 16e9),
        ("16 GB/s", 16e9),
        ("1.5e1GB/s", 15e9),
        ("2GiB/s", 2**31),
        ("400Gbit/s", 50e9),
        (".5TB/s", 5e11),
    ],
)
def test_a_rate_is_a_number_with_its_unit(text, rate):
    assert parse_rate(text) == rate


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("16", "'16' has no unit: 16GB/s or 400Gbit/s"),
        (16, "16 has no unit: 16GB/s or 400Gbit/s"),
        (True, "True is not a number with its unit"),
        ("fast", "'fast' is not a number with its unit, as in 16GB/s"),
        ("-1GB/s", "'-1GB/s' is not a number with its unit"),
        ("16GB", "'GB' is none of the units B/s, kB/s"),
        ("16gb/s", "'gb/s' is none of the units"),
        ("20us", "'us' is none of the units"),
        ("0GB/s", "'0GB/s' is not above 0"),
        ("1e999GB/s", "'1e999GB/s' is not finite"),
        ("1e-300GB/s", "'1e-300GB/s' is less than 1kB/s"),
    ],
)
def test_a_rate_without_a_unit_or_above_no_bound_is_refused_in_one_line(text, said):
    with pytest.raises(InputError) as refused:
        parse_rate(text)
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_a_time_has_its_unit_too():
    assert [parse_time(text) for text in ("20us", "20 µs", "1.5ms", "0s", "900ns")] == pytest.approx(
        [20e-6, 20e-6, 1.5e-3, 0, 9e-7]
    )
    for text, said in (("20", "has no unit"), ("20min", "'min' is none of the units s, ms, us, ns")):
        with pytest.raises(InputError, match=said):
            parse_time(text)
    assert parse_time("300s") == 300
    with pytest.raises(InputError, match="'300s' is more than 60s"):
        parse_latency("300s")  # of a link


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.floats(1e3, 1e13), st.floats(1e-7, 10))
def test_what_is_written_is_read_as_the_same(rate, seconds):
    assert parse_rate(written_rate(rate)) == pytest.approx(rate, rel=1e-3)
    assert parse_time(written_time(seconds)) == pytest.approx(seconds, rel=1e-3, abs=1e-10)


def test_a_gpus_file_may_say_its_link_with_units(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(
        FACTS + 'link = "16GB/s"\nlink_latency = "20us"\nnode_link = "400Gbit/s"\nefficiency_like = "h100"\n'
    )
    found = load_gpu(str(path))
    assert found.link == Link(16e9, 20e-6) and found.node_link == Link(50e9, 10e-6)
    for text, said in (
        ('link = "16"\n', "mine.toml: link: '16' has no unit"),
        ("link = 16\n", "mine.toml: link: 16 has no unit"),
        ('link = "16GB/s"\nlink_bandwidth = 1e9\n', "mine.toml: link: given twice: link_bandwidth says the same"),
        ('link = "16GB/s"\nlink_efficiency = 0.5\n', "mine.toml: link: given twice: link_efficiency says the same"),
        ('link_latency = "20us"\nlink_latency_s = 1e-6\nlink_bandwidth = 1e9\n', "link_latency: given twice"),
        ("link_bandwidth = 1e9\npcie_link = 1\n", "mine.toml: pcie_link: 1 is not true or false"),
    ):
        path.write_text(FACTS + text)
        with pytest.raises(CatalogueError) as refused:
            load_gpu(str(path))
        assert said in str(refused.value)


# -- collectives -----------------------------------------------------------------------------------------------------


def test_collectives_in_a_node_are_a_latency_and_the_rings_volume():
    gpu = load_gpu("h100").with_links(100e9, 10e-6)
    assert all_reduce_s(1e6, 4, gpu) == pytest.approx(10e-6 + 1.5e6 / 100e9)
    assert all_gather_s(1e6, 4, gpu) == pytest.approx(10e-6 + 0.75e6 / 100e9)
    assert all_to_all_s(1e6, 4, gpu) == pytest.approx(10e-6 + 0.75e6 / 100e9)
    assert next_stage_s(100, 1000, 2, gpu) == pytest.approx(10e-6 + 2 * 100 * 1000 * 2 / 2 / 100e9)
    assert all_reduce_s(1e6, 1, gpu) == all_gather_s(1e6, 1, gpu) == all_to_all_s(1e6, 1, gpu) == 0


@pytest.mark.parametrize(
    ("model", "each_s"),
    [
        # One all-reduce a layer of two sums in fp32.
        (load_model("MiniMaxAI/MiniMax-M2.5"), 10e-6 + 2 * 3 / 4 * 64 * 2 * 4 / 100e9),
        # The queries and the keys of 16 heads of 128, gathered.
        (OLMO, 2 * (10e-6 + 3 / 4 * 64 * 2048 * 2 / 100e9)),
    ],
    ids=lambda value: getattr(value, "kind", ""),
)
def test_norms_over_the_heads_of_all_gpus_wait_for_the_link_in_every_layer(model, each_s):
    gpu = load_gpu("h100").with_links(100e9, 10e-6)
    bare = replace(
        model,
        stack=tuple(replace(each, mixer=replace(each.mixer, normed_over_all=None)) for each in model.stack),
    )
    step = batch([1000] * 64)
    curve = Curve([1, 64], [1e-3, 1e-3])
    source = Provenance(Path(), "test", "h100", "bf16")
    tables = OperatorTables(source, {"all": curve}, {}, {"lm_head": curve}, None)
    for tp, found_s in ((1, 0.0), (4, model.layers * each_s)):
        by_roofline, plain = (RooflineCost(each, gpu, tp=tp).forward(step) for each in (model, bare))
        assert by_roofline - plain == pytest.approx(found_s, abs=1e-12)
        if tp > 1:
            by_profile, plain = (ProfileCost(tables, each, gpu, tp=tp).reduce_s(64) for each in (model, bare))
            assert by_profile - plain == pytest.approx(found_s)


def test_collectives_over_nodes_go_through_both_links():
    gpu = load_gpu("h100").with_links(100e9, 10e-6, 10e9, 30e-6, gpus_per_node=4)
    # Inside: 2 * 3/4 of the message; between two nodes each GPU's quarter of it, once there and once back.
    assert all_reduce_s(1e6, 8, gpu) == pytest.approx(10e-6 + 1.5e6 / 100e9 + 30e-6 + 0.25e6 / 10e9)
    assert all_gather_s(1e6, 8, gpu) == pytest.approx(10e-6 + 0.75e6 / 100e9 + 30e-6 + 0.125e6 / 10e9)
    assert all_to_all_s(1e6, 8, gpu) == pytest.approx(30e-6 + 0.5e6 / 10e9)
    one_each = load_gpu("h100").with_links(100e9, 10e-6, 10e9, 30e-6, gpus_per_node=1)
    assert all_reduce_s(1e6, 2, one_each) == pytest.approx(30e-6 + 1e6 / 10e9)


def test_a_stage_that_begins_a_node_is_reached_over_its_link():
    gpu = load_gpu("h100").with_links(100e9, 10e-6, 10e9, 30e-6, gpus_per_node=4)
    near, far = (next_stage_s(100, 1000, 2, gpu, stage) for stage in (0, 1))
    assert near == pytest.approx(10e-6 + 2e5 / 100e9) and far == pytest.approx(30e-6 + 2e5 / 10e9)
    assert next_stage_s(100, 1000, 8, gpu, 0) == pytest.approx(30e-6 + 0.5e5 / 10e9)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.sampled_from([2, 4, 8, 16]), st.floats(1, 1e9), st.sampled_from([1, 2, 4, 8]))
def test_slower_links_never_make_a_collective_shorter(gpus, message, per_node):
    fast = load_gpu("h100").with_links(100e9, 10e-6, 50e9, 20e-6, per_node)
    for slow in (fast.with_links(link=50e9), fast.with_links(node_link=10e9), fast.with_links(link_latency_s=20e-6)):
        for collective in (all_reduce_s, all_gather_s, all_to_all_s):
            assert collective(message, gpus, slow) >= collective(message, gpus, fast)


# -- over machines ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tp", "together", "nodes", "per_node"),
    [(2, 2, None, 8), (8, 16, None, 8), (16, 16, None, 8), (4, 4, 2, 2), (6, 12, None, 6), (5, 15, None, 5)],
)
def test_gpus_spread_evenly_over_as_few_machines_as_hold_them(tp, together, nodes, per_node):
    assert spread(load_gpu("h100"), tp, together, nodes).gpus_per_node == per_node


@pytest.mark.parametrize(
    ("tp", "together", "nodes", "said"),
    [
        (4, 4, 3, "4 GPUs that work together, tp 4, do not spread evenly over 3"),
        (2, 2, 4, "do not spread evenly over 4"),
        (2, 6, 2, "6 GPUs that work together, tp 2, do not spread evenly over 2"),
        (16, 16, 1, "16 GPUs over 1 are 16 on each, and a machine has 8"),
    ],
)
def test_a_spread_that_machines_do_not_have_is_refused(tp, together, nodes, said):
    with pytest.raises(LinkError, match=said):
        spread(load_gpu("h100"), tp, together, nodes)


# -- settings --------------------------------------------------------------------------------------------------------


def resolved(**flags):
    made = settings_from(None, flags)
    return [pool.recipe for pool in resolve_pools(made, made.loops[0])]


def test_links_are_flags_keys_of_pools_and_facts_of_a_machine(tmp_path):
    box = tmp_path / "box.toml"
    box.write_text('gpu = "rtx-pro-6000"\ngpus-per-node = 2\nlink = "16GB/s"\nlink_latency = "20us"\n')
    by_flags = resolved(gpu="rtx-pro-6000", tp=2, link="16GB/s", link_latency="20us", gpus_per_node=2)[0]
    by_file = resolved(machine=str(box), tp=2)[0]
    by_pool = resolved(pool=(f"both:1,machine={box},tp=2",))[0]
    assert by_flags.gpu == by_file.gpu == by_pool.gpu and by_file.gpu.link == Link(16e9, 20e-6)
    assert resolved(machine=str(box), tp=2, link="9GB/s")[0].gpu.link == Link(9e9, 20e-6), "flags win"
    two = resolved(pool=("both:1,tp=2,link=16GB/s", "both:1,tp=2"), gpu="l40s")
    assert [recipe.gpu.link.bandwidth for recipe in two] == [16e9, 27.2e9]


def test_a_record_keeps_what_the_machines_file_said(tmp_path):
    box = tmp_path / "box.toml"
    box.write_text('link = "16GB/s"\n')
    made = settings_from(None, {"machine": str(box), "tp": 2, "gpu": "l40s"})
    pool = settings_from(None, {"pool": (f"both:1,machine={box},tp=2",), "gpu": "l40s"})
    box.unlink()
    again = recorded_settings({"settings": {"machine": made.machine, "link": made.link, "tp": 2}}, "a record")
    assert again["link"] == "16GB/s"
    assert pool.pool == ("both:1,link=16GB/s,tp=2",)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("link = 16\n", "box.toml: link: 16 has no unit"),
        ("bandwidth = '16GB/s'\n", "box.toml: bandwidth: no such key of a machine; there are gpu, link"),
        ("gpus_per_node = 'two'\n", "box.toml: gpus_per_node: 'two' is not int"),
        ("gpus_per_node = 0\n", "box.toml: gpus_per_node: 0 is less than 1"),
        ("link = '1GB/s'\nnode-link = '1GB/s'\nnode_link = '1GB/s'\n", "box.toml: node_link: given twice"),
        ("gpu = 5\n", "box.toml: gpu: 5 is not a name or a file"),
        ("[", "box.toml: "),
    ],
)
def test_a_bad_machine_is_refused_in_one_line_that_names_file_and_key(tmp_path, text, said):
    box = tmp_path / "box.toml"
    box.write_text(text)
    for flags in ({"machine": str(box)}, {"pool": (f"both:2,machine={box}",)}):
        with pytest.raises(ConfigError) as refused:
            settings_from(None, {"tp": 2, **flags})
        assert said in str(refused.value) and "\n" not in str(refused.value)


def test_a_gpu_beside_its_machines_file_is_found(tmp_path):
    (tmp_path / "mine.toml").write_text(FACTS + "link_bandwidth = 1e10\n")
    (tmp_path / "box.toml").write_text('gpu = "mine.toml"\n')
    assert settings_from(None, {"machine": str(tmp_path / "box.toml")}).gpu == str(tmp_path / "mine.toml")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"gpu": "l40s"}, []),
        ({"gpu": "h100", "tp": 2}, []),
        ({"gpu": "l40s", "tp": 2}, ["at 18.9GB/s and 5.31us, as on the machine", "every step of tp 2 waits for"]),
        ({"gpu": "l40s", "tp": 2, "link": "16GB/s"}, ["at 15us, which every step of tp 2 waits for"]),
        ({"gpu": "l40s", "tp": 2, "link": "16GB/s", "link_latency": "20us"}, []),
        ({"gpu": "l40s", "tp": 2, "nodes": 2}, ["over 2 nodes of 1 GPUs", "at 50GB/s and 10us each"]),
        ({"gpu": "h100", "tp": 8, "pp": 2}, ["tp 8, pp 2 spreads over 2 nodes of 8 GPUs", "at 50GB/s and 10us each"]),
        ({"gpu": "h100", "tp": 8, "pp": 2, "node_link": "90GB/s"}, ["at 10us each"]),
        (
            {"gpu": "l40s", "dp": 2, "ep": 2, "model": "Qwen/Qwen3-30B-A3B"},
            ["at 18.9GB/s and 5.31us, as on the machine", "every step of dp 2, ep 2 waits for"],
        ),
        ({"gpu": "l40s", "dp": 2}, []),
    ],
)
def test_what_is_assumed_of_links_is_noted_where_gpus_work_together(flags, said):
    recipe = resolved(**{"model": "Qwen/Qwen3-8B", **flags})[0]
    notes = [note for note in recipe.notes if note.startswith("links: ")]
    assert bool(notes) == bool(said)
    for words in said:
        assert words in " ".join(notes)


def test_the_note_on_links_is_on_the_terminal_and_on_the_page(tmp_path):
    out = tmp_path / "o"
    flags = ["--gpu", "l40s", "--tp", "2", "--requests", "5", "--out", str(out)]
    done = CliRunner().invoke(app, ["simulate", str(SAMPLE), *flags])
    assert done.exit_code == 0, done.output
    said = "without NVLink, at 18.9GB/s and 5.31us"
    assert said in " ".join(done.stdout.split()) and said in (out / "report.html").read_text()


def test_a_slower_link_makes_a_run_longer_and_units_are_asked_for(tmp_path):
    def run(*flags: str):
        words = ["simulate", str(SAMPLE), "--gpu", "l40s", "--tp", "2", "--requests", "10", "--json", *flags]
        return CliRunner().invoke(app, [*words, "--out", str(tmp_path / str(len(flags) + len("".join(flags))))])

    plain, slow = run(), run("--link", "5GB/s", "--link-latency", "50us")
    tpot = [json.loads(done.stdout)["runs"]["overlap"]["metrics"]["tpot_mean_s"] for done in (plain, slow)]
    assert tpot[1] > 1.1 * tpot[0]
    bad = run("--link", "16")
    assert bad.exit_code == 2 and bad.stderr == "error: link: '16' has no unit: 16GB/s or 400Gbit/s\n"
    idle = CliRunner().invoke(app, ["simulate", str(SAMPLE), "--link", "16GB/s", "--out", str(tmp_path / "i")])
    assert idle.exit_code == 2
    assert (
        idle.stderr == "error: link: has no effect here: it needs GPUs that work together: tp, pp or ep of 2 or more\n"
    )
