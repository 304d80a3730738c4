"""Whole steps out of operator tables: what is counted, what is withheld, what is said."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pyarrow
import pytest
import typer
from pyarrow import parquet
from typer.testing import CliRunner

from backends.simulated.catalogue.gpu_specs import load_gpu
from backends.simulated.cost.tables.published_package import find_tables
from benchmarks import whole_steps
from benchmarks.board.halves import rows_score, shape_scores
from benchmarks.board.steps import Case, Step, cases, fits, steps_of
from tests.cost.published import (
    DECODES,
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    decode_ms,
    product_ms,
    prompt_ms,
    rows_of,
    write_package,
    write_table,
)

SMALL = Case("h100", "vllm-0.33.0", "Qwen/Qwen3-0.6B", "bf16", 1)
LAYERS = 28
CONTEXTS = (16, *range(512, 4097, 512))


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of tables in place of whatever is installed."""
    monkeypatch.syspath_prepend(write_package(tmp_path))
    kind = "generation_attention"
    rows = [
        {**row, "batch_size": requests, "step": context - 1, "latency": decode_ms(requests, context)}
        for row in rows_of(kind)[:1]
        for requests in DECODES
        for context in CONTEXTS
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), write_table(tmp_path, kind))
    return tmp_path


@pytest.fixture
def steps(package) -> list[Step]:
    found = steps_of(SMALL)
    assert not isinstance(found, str)
    return found


def products_ms(tokens: int) -> float:
    """Of a layer of the small model: 1,024 wide, 16 heads on 8 of 128, an MLP of 3,072."""
    return sum(product_ms(tokens, n, k) for n, k in ((4096, 1024), (1024, 2048), (6144, 1024), (1024, 3072)))


def test_a_step_is_the_sum_of_its_measured_operators(steps):
    for step in steps:
        tokens = step.context if step.prompt else step.requests
        attention = prompt_ms(step.context) if step.prompt else decode_ms(step.requests, step.context)
        if tokens in (1, 64, 256, 2048):
            assert step.truth_s == pytest.approx(LAYERS * (products_ms(tokens) + attention) * 1e-3)


def test_steps_are_at_the_sizes_that_were_measured_and_fit(steps):
    decodes = {(step.requests, step.context) for step in steps if not step.prompt}
    # A token is 112 KiB of KV, of 80 GiB; contexts of 16 are too short to count.
    assert decodes == {(n, context) for n in DECODES for context in CONTEXTS[1:] if n * context < 700_000}
    assert {step.context for step in steps if step.prompt} == {2048}, "products were measured at no other length"


def test_a_step_scores_where_the_rows_of_its_attention_and_most_of_its_products_do(steps):
    """All products of the small model are of measured weights."""
    products = {(4096, 1024): 4, (1024, 2048): 2, (6144, 1024): 6, (1024, 3072): 3}
    heads = {"num_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM, "window_size": 0}
    for step in steps:
        kind = "context_attention" if step.prompt else "generation_attention"
        sizes = {"isl": step.context, "step": 0} if step.prompt else {"isl": 1, "step": step.context - 1}
        tokens = step.context if step.prompt else step.requests
        weights = sum(part for (n, k), part in products.items() if shape_scores("gemm", {"m": tokens, "n": n, "k": k}))
        attention = shape_scores(kind, {"batch_size": step.requests, **sizes, **heads})
        assert step.scores is (attention and weights >= sum(products.values()) / 2)
    assert {step.scores for step in steps} == {True, False}


@pytest.mark.parametrize("kind", ["gemm", "generation_attention", "moe"])
def test_predictions_know_no_row_that_scores(package, kind):
    every, half = (find_tables(load_gpu("h100"), "vllm-0.33.0", keep) for keep in (None, fits))
    scores = rows_score(kind, pd.read_parquet(every.file_of(kind)))
    assert 0 < scores.sum() < len(scores)
    every, half = (tables.table(kind)["latency"] for tables in (every, half))
    assert half.tolist() == every[~scores].tolist()


def test_a_step_that_scores_is_not_looked_up_where_it_was_measured(package):
    kind = "generation_attention"
    file = find_tables(load_gpu("h100"), "vllm-0.33.0").file_of(kind)
    rows = pd.read_parquet(file)
    # Attention of rows that score takes twice as long as what the others tell.
    rows.loc[rows_score(kind, rows), "latency"] *= 2
    rows.to_parquet(file)
    found = steps_of(SMALL)
    assert not isinstance(found, str)
    scoring = [step for step in found if step.scores and not step.prompt]
    assert scoring
    for step in scoring:
        assert step.truth_s > step.measured_s + 0.9 * LAYERS * decode_ms(step.requests, step.context) * 1e-3


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tp": 4}, "not measured: all-reduces over 4 GPUs"),
        ({"tp": 3}, "tp 3 does not divide its 16 attention heads"),
        ({"model": "deepseek-ai/DeepSeek-V2-Lite"}, "not measured: "),
        ({"dtype": "fp8"}, "not measured: products around attention in fp8"),
    ],
)
def test_a_model_with_an_operator_that_nobody_measured_is_left_out_with_the_reason(package, changes, said):
    found = steps_of(Case(**{**SMALL.__dict__, **changes}))
    assert isinstance(found, str) and found.startswith(said)


def test_every_gpu_and_engine_with_tables_is_asked(package):
    assert {(case.gpu, case.engine.split("-")[0]) for case in cases()} == {("h100", "vllm")}


def a_step(kind: str, truth_s: float, measured_s: float, roofline_s: float) -> Step:
    return Step(SMALL, kind, 8, 1024, False, True, truth_s, measured_s, roofline_s)


def test_errors_of_a_kind_are_means_of_absolute_and_of_signed_ones():
    steps = [a_step("dense", 1.0, 1.1, 0.8), a_step("dense", 2.0, 1.8, 2.0), a_step("experts", 1.0, 1.0, 1.5)]
    text = "\n".join(whole_steps.tables(steps))
    assert "| dense | 2 | 10.0% | +0.0% | 10.0% | -10.0% | 0 |  |  |  |  |" in text
    assert "| experts | 1 | 0.0% | +0.0% | 50.0% | +50.0% | 0 |  |  |  |  |" in text
    worst = [line for line in text.splitlines() if "decodes at 1,024" in line]
    assert worst[3].endswith("| 1000.00 ms | +50% |") and len(worst) == 6


def test_a_part_does_not_take_the_place_of_everything_on_the_page(package):
    app = typer.Typer()
    app.command()(whole_steps.main)
    ran = CliRunner().invoke(app, ["--model", "Qwen3-0.6B", "--write"])
    assert ran.exit_code == 2 and "--write: the page is of all engines and models" in ran.stderr
    ran = CliRunner().invoke(app, ["--gpu", "a100"])
    assert ran.exit_code == 2 and "no tables" in ran.stderr


def test_look_ups_need_only_half_of_what_was_measured(steps):
    """Times that grow as the tables' readers expect between points: what is left of them is enough."""
    errors = np.array([step.error("measured") for step in steps])
    assert np.isfinite(errors).all()
