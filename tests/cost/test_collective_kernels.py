"""Collectives inside a node by the kernel that engines choose, where these were measured."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backends.simulated.catalogue.gpu_specs import CatalogueError, load_gpu
from backends.simulated.cost.models.collective_kernels import Ring, Shots
from backends.simulated.cost.models.communication import all_gather_s, all_reduce_s, reached_link
from ground.link import Link

KIB, MIB = 2**10, 2**20
ROUND = replace(
    load_gpu("h100"),
    link_bandwidth=100e9,
    pair_efficiency=0.5,
    one_shot_efficiency=0.8,
    two_shot_efficiency=0.4,
    one_shot_overhead_s=4e-6,
    two_shot_overhead_s=9e-6,
    peer_overhead_s=0.1e-6,
    one_shot_most_bytes=256.0 * KIB,
    shots_most_bytes=16.0 * MIB,
    ring_efficiency=0.5,
    ring4_efficiency=0.4,
    ring8_efficiency=0.2,
    ring_small_efficiency=0.5,
    ring_overhead_s=5e-6,
    ring_large_overhead_s=20e-6,
    ring_hop_overhead_s=1e-6,
)
FACTS = "memory_bytes = 8e10\nmemory_bandwidth = 1e12\nbf16_flops = 1e14\nsource = 'x'\n"


def test_small_messages_are_read_from_all_others_at_once():
    assert all_reduce_s(64 * KIB, 8, ROUND) == pytest.approx(4e-6 + 7 * (0.1e-6 + 64 * KIB / 80e9))
    assert all_reduce_s(400 * KIB, 4, ROUND) == pytest.approx(4e-6 + 3 * (0.1e-6 + 400 * KIB / 80e9))


def test_two_gpus_read_each_others_message_whatever_its_size():
    for message in (KIB, 8 * MIB):
        assert all_reduce_s(message, 2, ROUND) == pytest.approx(4e-6 + 0.1e-6 + message / 50e9)


def test_larger_messages_are_added_up_in_parts_and_gathered():
    for message, gpus in ((256 * KIB, 8), (512 * KIB, 4), (8 * MIB, 8)):
        parts = 2 * (gpus - 1) / gpus * message / 40e9
        assert all_reduce_s(message, gpus, ROUND) == pytest.approx(9e-6 + (gpus - 1) * 0.1e-6 + parts)


def test_the_largest_and_those_of_many_gpus_over_pcie_go_round_the_ring():
    large = 2 * 7 / 8 * 64 * MIB / 20e9
    assert all_reduce_s(64 * MIB, 8, ROUND) == pytest.approx(20e-6 + 14e-6 + large)
    pcie = replace(ROUND, pcie_link=True)
    assert all_reduce_s(KIB, 8, pcie) == pytest.approx(5e-6 + 14e-6 + 2 * 7 / 8 * KIB / 10e9)
    assert all_reduce_s(KIB, 2, pcie) == all_reduce_s(KIB, 2, ROUND)


def test_gathers_take_half_the_hops_and_half_the_bytes_of_the_ring():
    assert all_gather_s(64 * MIB, 4, ROUND) == pytest.approx(20e-6 + 3e-6 + 3 / 4 * 64 * MIB / 40e9)
    assert all_gather_s(KIB, 4, ROUND) == pytest.approx(5e-6 + 3e-6 + 3 / 4 * KIB / 20e9)


def test_a_link_that_was_said_is_one_latency_and_the_rings_volume():
    said = ROUND.with_links(16e9, 20e-6)
    assert said.under("vllm-0.24.0").kernels_known is False
    assert all_reduce_s(MIB, 8, said) == pytest.approx(20e-6 + 2 * 7 / 8 * MIB / 16e9)
    one = ROUND.with_links(link=16e9)
    assert all_reduce_s(MIB, 8, one) == pytest.approx(ROUND.link_latency_s + 2 * 7 / 8 * MIB / 16e9)
    assert reached_link(8, said) == Link(16e9, 20e-6)
    assert ROUND.with_links(node_link=1e9, gpus_per_node=4).kernels_known


def test_a_file_that_says_its_link_has_no_kernels_of_a_relative(tmp_path):
    path = tmp_path / "mine.toml"
    like = 'link_bandwidth = 2e11\nefficiency_like = "h100"\n'
    path.write_text(FACTS + like)
    h100, found = load_gpu("h100"), load_gpu(str(path))
    assert found.kernels_known and found.two_shot_efficiency == h100.two_shot_efficiency
    for said in (
        'link = "1GB/s"\n',
        'link_bandwidth = 2e11\nlink_latency = "9us"\n',
        "link_bandwidth = 2e11\nlink_efficiency = 0.5\n",
    ):
        path.write_text(FACTS + said + 'efficiency_like = "h100"\n')
        assert not load_gpu(str(path)).kernels_known
        assert not load_gpu(str(path)).under("sglang-0.5.9").kernels_known
    path.write_text(FACTS + 'link_bandwidth = 2e11\nefficiency_like = "l4"\n')
    assert not load_gpu(str(path)).kernels_known, "a relative's link that was said holds, too"
    path.write_text(FACTS + like + "plain_links = 1\n")
    with pytest.raises(CatalogueError, match="plain_links: 1 is not true or false"):
        load_gpu(str(path))


def test_a_file_may_know_the_ring_alone(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(FACTS + "link_bandwidth = 1e11\nring_efficiency = 0.5\nshots_most_bytes = 1e6\n")
    gpu = load_gpu(str(path))
    for gpus in (2, 4, 8):
        assert all_reduce_s(MIB / 4, gpus, gpu) == pytest.approx(2 * (gpus - 1) / gpus * MIB / 4 / 50e9)


def test_nodes_that_nvlink_joins_reduce_at_once_unless_their_link_was_said(tmp_path):
    joined = replace(ROUND, gpus_per_node=4, far_efficiency=0.5, far_overhead_s=15e-6)
    assert all_reduce_s(MIB, 8, joined) == pytest.approx(15e-6 + 2 * 7 / 8 * MIB / 50e9)
    apart = replace(joined, far_efficiency=0.0)
    inside = 2 * (20e-6 + 3e-6 + 3 / 4 * MIB / 40e9)
    between = apart.node_link.seconds(2 * 1 / 2 * MIB / 4)
    assert all_reduce_s(MIB, 8, apart) == pytest.approx(inside + between), (
        "the ring in each node, the link between them"
    )
    said = joined.with_links(node_link=10e9)
    assert all_reduce_s(MIB, 8, said) == pytest.approx(inside + said.node_link.seconds(MIB / 4))
    assert all_reduce_s(MIB, 16, joined) > all_reduce_s(MIB, 8, joined), "of more GPUs nobody knows"
    path = tmp_path / "mine.toml"
    for own, known in (("", True), ('node_link = "50GB/s"\n', False)):
        path.write_text(FACTS + 'link_bandwidth = 9e11\nefficiency_like = "gb300"\n' + own)
        assert (load_gpu(str(path)).under("vllm-0.24.0").far_efficiency > 0) is known


@pytest.mark.parametrize(
    ("gpu", "engine", "gpus", "microseconds"),
    [
        ("h100", "vllm-0.24.0", 8, {256: 4.7, 64 * KIB: 6.4, 256 * KIB: 10.8, MIB: 15.0, 4 * MIB: 30.8, 64 * MIB: 344}),
        (
            "h100",
            "sglang-0.5.14",
            4,
            {256: 2.8, 64 * KIB: 3.5, 256 * KIB: 5.5, MIB: 11.1, 4 * MIB: 25.6, 64 * MIB: 328},
        ),
        ("b200", "vllm-0.24.0", 8, {256: 7.4, 64 * KIB: 8.6, MIB: 17.2, 4 * MIB: 26.3, 16 * MIB: 63.2, 64 * MIB: 223}),
        ("a100", "vllm-0.14.0", 2, {256: 4.9, 64 * KIB: 5.5, 256 * KIB: 6.6, MIB: 10.7, 4 * MIB: 25.2, 64 * MIB: 389}),
        ("rtx-pro-6000", "vllm-0.24.0", 8, {256: 23.6, 64 * KIB: 31.2, 256 * KIB: 84.3, MIB: 133.5, 4 * MIB: 346.9}),
        ("rtx-pro-6000", "sglang-0.5.14", 2, {256: 4.5, 64 * KIB: 6.2, 256 * KIB: 11.1, MIB: 30.2, 4 * MIB: 106}),
        (
            "gb300",
            "vllm-0.27.0",
            8,
            {256: 13.2, 64 * KIB: 14.0, 256 * KIB: 14.8, MIB: 17.2, 4 * MIB: 26.6, 64 * MIB: 226},
        ),
        ("gb300", "sglang-0.5.14", 8, {256: 26.9, 64 * KIB: 30.1, MIB: 30.5, 4 * MIB: 46.5, 64 * MIB: 252}),
        ("l40s", "vllm-0.22.0", 4, {256: 13.3, 64 * KIB: 36.9, 256 * KIB: 116, MIB: 361, 4 * MIB: 1649}),
    ],
)
def test_all_reduces_take_about_what_was_measured_in_captured_graphs(gpu, engine, gpus, microseconds):
    found = [all_reduce_s(message, gpus, load_gpu(gpu).under(engine)) * 1e6 for message in microseconds]
    errors = np.array(found) / np.array(list(microseconds.values())) - 1
    assert np.abs(errors).max() < 0.26 and np.abs(errors).mean() < 0.13


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.sampled_from(["a100", "h100", "b200", "gb300", "l40s", "rtx-pro-6000"]), st.sampled_from([2, 3, 4, 6, 8]))
def test_arrays_of_messages_take_what_each_does(name, gpus):
    gpu = load_gpu(name)
    messages = 2.0 ** np.arange(8, 28)
    several = Ring.of(gpu).seconds(messages, 2 * (gpus - 1), np.full(len(messages), gpus))
    assert several == pytest.approx([float(Ring.of(gpu).seconds(each, 2 * (gpus - 1), gpus)) for each in messages])
    assert (np.diff(several) > 0).all()
    shots = Shots.of(gpu).seconds(messages, gpus)
    assert shots == pytest.approx([float(Shots.of(gpu).seconds(each, gpus)) for each in messages])
