"""GPUs of the catalogue and of a user's file: their fields, and what operators reach on them."""

from __future__ import annotations

import pytest

from backends.simulated.catalogue.gpu_specs import CatalogueError, load_gpu, renamed_in_gpu


def test_a_gpu_file_is_checked_by_field(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("memory_bytes = 1e10\nmemory_bandwidth = 1e12\nbf16_flops = 1e14\nlink_bandwidth = 1e10\n")
    assert load_gpu(str(path)).name == "mine"
    path.write_text("memory_bytes = 1e10\nmemory_bandwith = 1e12\n")
    with pytest.raises(CatalogueError, match=r"mine.toml: memory_bandwith: no such field"):
        load_gpu(str(path))
    path.write_text("memory_bytes = 1e10\n")
    with pytest.raises(CatalogueError, match=r"mine.toml: memory_bandwidth: missing"):
        load_gpu(str(path))


def test_a_gpu_as_efficient_as_another_takes_its_shares_and_keeps_its_own(tmp_path):
    mine = tmp_path / "mine.toml"
    facts = "memory_bytes = 1e9\nmemory_bandwidth = 1e12\nbf16_flops = 1e14\nlink_bandwidth = 1e10\n"
    mine.write_text(facts + 'efficiency_like = "h200"\nexpert_efficiency = 0.4\n')
    found, like = load_gpu(str(mine)), load_gpu("h200")
    assert (found.kv_efficiency, found.attention_overhead_s, found.link_latency_s) == (
        like.kv_efficiency,
        like.attention_overhead_s,
        like.link_latency_s,
    )
    assert found.expert_efficiency == 0.4 and found.memory_bandwidth == 1e12 and found.multiprocessors == 0
    for relative in ('"h201"', "7"):
        mine.write_text(facts + f"efficiency_like = {relative}\n")
        with pytest.raises(CatalogueError, match=r"mine\.toml: efficiency_like: .* is not a GPU of the catalogue"):
            load_gpu(str(mine))


def test_engines_whose_kernels_differ_have_numbers_of_their_own_on_a_gpu(tmp_path):
    h100 = load_gpu("h100")
    assert h100.under("vllm-0.33.0").w4_expert_efficiency != h100.w4_expert_efficiency
    assert h100.under("vllm-0.33.0").compute_efficiency == h100.compute_efficiency
    assert h100.under("mini-sglang-0.1") == h100.under("workbench") == h100
    mine = tmp_path / "mine.toml"
    facts = "memory_bytes = 1e9\nmemory_bandwidth = 1e12\nbf16_flops = 1e14\nlink_bandwidth = 1e10\nsource = 'x'\n"
    mine.write_text(facts + 'efficiency_like = "h100"\nw4_expert_efficiency = 0.4\n')
    found = load_gpu(str(mine)).under("vllm-0.33.0")
    assert found.w4_expert_efficiency == 0.4, "what a file says holds for every engine"
    assert found.w4_expert_memory_efficiency == h100.under("vllm-0.33.0").w4_expert_memory_efficiency
    mine.write_text(facts + "[engines.sglang]\nkv_efficiency = 0.5\n")
    assert load_gpu(str(mine)).under("sglang-0.5.9").kv_efficiency == 0.5
    for table, wrong in (
        ("[engines.vllm]\nmemory_bytes = 2e9\n", r"engines\.vllm\.memory_bytes: no field that engines differ in"),
        ("[engines.vllm]\nkv_efficiency = 1.5\n", r"engines\.vllm: kv_efficiency: 1\.5 is not between 0 and 1"),
        ("engines = 3\n", r"engines: give a table for each engine, as in \[engines\.vllm\]"),
    ):
        mine.write_text(facts + table)
        with pytest.raises(CatalogueError, match=rf"mine\.toml: {wrong}"):
            load_gpu(str(mine))


def test_fp8_by_block_has_rates_of_its_own_where_it_was_measured():
    h100, mi300x = load_gpu("h100"), load_gpu("mi300x")
    assert h100.product_rates("fp8", 1 + 4 / 128**2).flops > h100.product_rates("fp8", 1).flops
    assert mi300x.product_rates("fp8", 1 + 4 / 128**2) == mi300x.product_rates("fp8", 1)


def test_a_gpu_file_that_says_reaches_like_is_read_for_a_version_with_a_note(tmp_path):
    now, before = tmp_path / "now" / "mine.toml", tmp_path / "before" / "mine.toml"
    facts = "memory_bytes = 1e9\nmemory_bandwidth = 1e12\nbf16_flops = 1e14\nlink_bandwidth = 1e10\nsource = 'x'\n"
    for file, key in ((now, "efficiency_like"), (before, "reaches_like")):
        file.parent.mkdir()
        file.write_text(facts + f'{key} = "h200"\n')
    assert load_gpu(str(before)) == load_gpu(str(now))
    assert renamed_in_gpu(str(now)) == renamed_in_gpu("h100") == []
    note = f"{before}: reaches_like: is called efficiency_like now; the next version no longer knows it"
    assert renamed_in_gpu(str(before)) == [note]
    before.write_text(before.read_text() + 'efficiency_like = "h100"\n')
    with pytest.raises(CatalogueError, match=r"mine\.toml: reaches_like: given twice; it is called efficiency_like"):
        load_gpu(str(before))
