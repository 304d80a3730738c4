"""The record's gaps between tokens: one for every token of a request after its first, whatever happened in between."""

from __future__ import annotations

import json
import random
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from traces import open_trace
from workbench.cluster.simulate import simulate_loop
from workbench.settings.run_settings import RunSettings


@pytest.mark.parametrize("loop", ["normal", "overlap"])
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1000),
    kv_tokens=st.sampled_from([1500, 2500, 4000]),
    chunk=st.sampled_from([64, 256, None]),
    batching=st.sampled_from(["mixed", "prefill-first"]),
    page_size=st.sampled_from([1, 16]),
)
# An unfinished prompt gives its pages back here, in a row whose last owner had written tokens.
@example(seed=8, kv_tokens=2500, chunk=None, batching="mixed", page_size=1)
def test_every_token_but_a_request_s_first_has_one_gap_through_chunks_and_retractions(
    loop: str, seed: int, kv_tokens: int, chunk: int | None, batching: str, page_size: int
) -> None:
    draw = random.Random(seed)
    run = RunSettings(
        model="Qwen/Qwen3-8B",
        kv_tokens=kv_tokens,
        chunk=chunk,
        batching=batching,
        page_size=page_size,
        max_tokens=200,
        conservativeness=draw.choice([0.1, 1.0]),
    )
    with TemporaryDirectory() as folder:
        path = Path(folder) / "trace.jsonl"
        path.write_text(
            "".join(
                json.dumps(
                    {
                        "request_id": f"r{i}",
                        "arrival_s": i * 0.004,
                        "input_length": draw.randint(5, 900),
                        "output_length": draw.randint(1, 200),
                    }
                )
                + "\n"
                for i in range(30)
            )
        )
        record = simulate_loop(run, loop, open_trace(path), trace_sha256="", command="test")
    gaps_s, counts = record.itl
    written = np.asarray(record.requests["output_tokens"])
    assert set(record.requests["status"]) == {"finished"}
    assert counts.sum() == (written - 1).sum()
    assert (gaps_s > 0).all()
