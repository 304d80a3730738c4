"""The link between ranks of this machine: measured, fitted, and kept in a file that a simulation takes."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from backends.simulated.catalogue.gpu_specs import load_gpu
from backends.simulated.cost.models.communication import all_reduce_s
from ground.errors import InputError
from workbench.calibrate.link_fit import fit_link, write_machine
from workbench.cli.app import app
from workbench.cluster.pools import resolve_pools
from workbench.settings.loading import settings_from

SIZES = [2**k for k in range(12, 26, 2)]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.floats(1e9, 1e12), st.floats(1e-6, 1e-3), st.sampled_from([2, 4, 8]))
def test_a_link_is_found_again_from_the_all_reduces_that_it_makes(bandwidth, latency_s, ranks):
    gpu = load_gpu("h100").with_links(bandwidth, latency_s)
    fit = fit_link(ranks, [(size, all_reduce_s(size, ranks, gpu)) for size in SIZES])
    assert fit.link.bandwidth == pytest.approx(bandwidth, rel=1e-3)
    assert fit.link.latency_s == pytest.approx(latency_s, rel=1e-2, abs=1e-9)
    assert fit.mean_error < 1e-6


def test_times_that_do_not_grow_tell_no_bandwidth():
    with pytest.raises(InputError, match="larger messages took no longer"):
        fit_link(2, [(size, 1e-3 / size) for size in SIZES])


def test_what_is_written_is_what_a_simulation_takes(tmp_path):
    gpu = load_gpu("h100").with_links(16e9, 20e-6)
    fit = fit_link(2, [(size, all_reduce_s(size, 2, gpu)) for size in SIZES])
    file = tmp_path / "box.toml"
    write_machine(file, fit, 2, "cuda")
    assert file.read_text().startswith("# Measured over 2 GPUs with NCCL: all-reduces of 4,096 to 16,777,216 bytes")
    made = settings_from(None, {"machine": str(file), "gpu": "l40s", "tp": 2})
    recipe = resolve_pools(made, "overlap")[0].recipe
    assert recipe.gpu.link.bandwidth == pytest.approx(16e9) and recipe.gpu.link.latency_s == pytest.approx(20e-6)
    assert recipe.gpu.gpus_per_node == 2
    assert not [note for note in recipe.notes if note.startswith("links: ")]


def test_two_processes_on_this_machine_are_measured(tmp_path):
    file = tmp_path / "here.toml"
    done = CliRunner().invoke(app, ["calibrate", "--links", "--backend", "cpu", "--json", "--out", str(file)])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["ranks"] == 2 and found["device"] == "cpu" and found["bandwidth_bytes_per_s"] > 0
    assert [row["bytes"] for row in found["all_reduces"]] == [2**k for k in range(12, 25, 2)]
    assert all(row["seconds"] > 0 for row in found["all_reduces"])
    assert resolve_pools(settings_from(None, {"machine": str(file), "gpu": "cpu", "tp": 2}), "overlap")
    again = CliRunner().invoke(app, ["calibrate", "--links", "--backend", "cpu", "--out", str(file)])
    assert again.exit_code == 2 and again.stderr == f"error: {file}: exists; --force replaces it\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--links", "--out", "box"], "out: box: the link is kept in a machine's file; --out NAME.toml"),
        (["--ranks", "2", "--out", "b.toml"], "ranks: goes with --links alone"),
        (["--links", "model", "--out", "b.toml"], "links: measured alone, without MODEL"),
        (["--links", "--from", "record", "--out", "b.toml"], "links: measured alone, without --from"),
        (["--links", "--front-end", "--out", "b.toml"], "links: measured alone, without --front-end"),
        (["--links", "--load-format", "dummy", "--out", "b.toml"], "links: measured alone, without --load-format"),
        (["--links", "--tp", "2", "--out", "b.toml"], "links: measured alone, without --tp"),
    ],
)
def test_what_does_not_go_with_links_is_refused(words, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["calibrate", *words])
    assert done.exit_code == 2 and done.stderr.startswith(f"error: {said}") and done.stderr.count("\n") == 1
