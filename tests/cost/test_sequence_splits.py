"""Where blocks stop sharing a decode's sequence: known from the kernel's rule, believed only if the tables show it."""

from __future__ import annotations

import numpy as np
import pytest

from backends.simulated.catalogue.gpu_specs import load_gpu
from backends.simulated.catalogue.model_specs import load_model
from backends.simulated.cost.models.operator_tables import AttentionTable, Grid
from backends.simulated.cost.models.profile import ProfileCost
from backends.simulated.cost.models.sequence_splits import cut_at, first_uncut
from backends.simulated.cost.tables.profiles import read_profile
from tests.cost.profiles import LLAMA, batch, needs_data

COUNTS, MEANS, UNEVENNESS = (16.0, 32.0, 64.0, 128.0), (512.0, 2048.0), (0.0, 0.5, 0.9)
TAIL_S = 30e-6


def table(excess_from: float = 64.0) -> AttentionTable:
    """Attention that takes a nanosecond a token, and from ``excess_from`` decodes on a tail where lengths are uneven."""
    decode = Grid((COUNTS, MEANS), np.array([[1e-9 * n * mean for mean in MEANS] for n in COUNTS]))
    shares = np.array(
        [
            [[u / 0.9 * (n >= excess_from) * TAIL_S / (1e-9 * n * mean) for mean in MEANS] for u in UNEVENNESS]
            for n in COUNTS
        ]
    )
    mixed = Grid(((16.0,), (0.0,), (0.0,), (1.0,)), np.zeros((1, 1, 1, 1)))
    return AttentionTable(decode, mixed, None, Grid((COUNTS, UNEVENNESS, MEANS), shares))


def seconds(table: AttentionTable, decodes: float, mean: float = 512.0) -> float:
    assert table.uneven_decode is not None
    return table.decode.at(decodes, mean) * (1 + table.uneven_decode.at(decodes, 0.9, mean))


def test_the_tail_is_all_there_from_the_first_decode_whose_sequences_are_not_cut():
    cut = cut_at(table(), 38)
    for decodes in (20, 32, 37):
        assert seconds(cut, decodes) == pytest.approx(1e-9 * decodes * 512)
    for decodes in (38, 64, 128):
        assert seconds(cut, decodes) == pytest.approx(1e-9 * decodes * 512 + TAIL_S)
    # Without it the tail grows in from the last measurement before.
    assert seconds(table(), 38) < 1e-9 * 38 * 512 + TAIL_S / 3


def test_what_was_measured_stays_as_it_was():
    before, after = table(), cut_at(table(), 38)
    for decodes in COUNTS:
        for mean in MEANS:
            assert seconds(after, decodes, mean) == pytest.approx(seconds(before, decodes, mean))


@pytest.mark.parametrize("first", [10, 20, 64, 100, 500])
def test_a_rule_that_the_measurements_contradict_changes_nothing(first):
    given = table()
    assert cut_at(given, first) is given
    flat = table(excess_from=1e9)
    assert cut_at(flat, 38) is flat


def test_a_graph_runs_the_kernel_of_its_size():
    # 0.8 of two blocks for each of 188 multiprocessors are 300.8: 37.6 sequences of 8 heads.
    assert first_uncut(188, 8) == 38
    assert first_uncut(188, 8, [1, 2, 4, 8, 16, 24, 32, 40, 48]) == 33
    assert first_uncut(188, 8, [16, 32]) == 38, "beyond the largest graph the kernel is chosen for the batch"
    assert first_uncut(188, 8, [64, 128]) == 1
    assert first_uncut(188, 4) == 76


@needs_data
@pytest.mark.parametrize("model", ["meta-llama/Llama-3.1-8B", "Qwen/Qwen3-32B", "Qwen/Qwen3-30B-A3B-Instruct-2507"])
@pytest.mark.parametrize("tp", [1, 2])
def test_the_public_tables_show_the_step_where_the_rule_has_it(model, tp):
    folder = LLAMA.parents[2] / model / "bf16"
    spec, gpu = load_model(model), load_gpu("rtx-pro-6000")
    tables = read_profile(folder, tp, spec, gpu)
    first = first_uncut(gpu.multiprocessors, spec.kv_heads / tp)
    assert cut_at(tables.attention, first) is not tables.attention
    uneven = [12_000] + [800] * (first - 1)
    cost = ProfileCost(tables, spec, gpu, tp=tp)
    step = cost.attention_s(batch(uneven)) - cost.attention_s(batch(uneven[:-1]))
    assert step > 0.1 * cost.attention_s(batch(uneven)), "one decode more, and nobody's sequence is cut"
    even = [1000] * first
    assert cost.attention_s(batch(even)) - cost.attention_s(batch(even[:-1])) < 0.1 * cost.attention_s(batch(even))
