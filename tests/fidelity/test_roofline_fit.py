"""The roofline's numbers are those that come nearest to published operators."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from backends.simulated.catalogue.gpu_specs import GPU, load_gpu
from benchmarks.board.silicon import find_rows
from benchmarks.roofline_fit import (
    ENGINES,
    SYSTEMS,
    Fit,
    Tables,
    decodes,
    experts,
    latent_decodes,
    latent_prompts,
    products,
    prompts,
)

WAYS: dict[str, tuple[Callable[[Tables, GPU], Fit | None], float]] = {
    "products": (lambda t, g: products(t, g, "bf16", ("bfloat16",), ENGINES), 0.08),
    "experts": (lambda t, g: experts(t, g, "fp8", ("fp8", "fp8_block")), 0.10),
    "decodes of grouped queries": (lambda t, g: decodes(t, g, True, "bfloat16"), 0.08),
    "decodes of a KV head a head": (lambda t, g: decodes(t, g, False, "bfloat16"), 0.08),
    "prompts of a KV head a head": (lambda t, g: prompts(t, g, False), 0.16),
    "latent decodes": (latent_decodes, 0.10),
    "latent prompts": (latent_prompts, 0.10),
}
"""How a kind of operator is fitted, and the error that it may have on the other half."""


@pytest.fixture(scope="module")
def tables() -> Tables:
    rows = find_rows()
    if rows is None:
        pytest.skip("aiconfigurator-core is not installed")
    return Tables(Path(rows).parent / "data" / SYSTEMS["h100"])


@pytest.mark.parametrize("kind", WAYS)
def test_the_catalogue_has_the_numbers_that_the_tables_give(tables, kind):
    way, most = WAYS[kind]
    gpu = load_gpu("h100")
    found = way(tables, gpu)
    assert found is not None and found.error < most
    assert found.values == pytest.approx({name: getattr(gpu, name) for name in found.values}, rel=0.05, abs=2e-9)
    assert abs(found.fitted - found.scored) < 0.1 * (found.fitted + found.scored)
