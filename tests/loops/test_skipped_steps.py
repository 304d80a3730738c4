"""Skipping decided steps leaves what going step by step leaves, through the recorder of real runs: the seeds are fixed, so
every run tests the same."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reports.record.run_record import RunRecord, write_record
from tests.loops.test_loop_properties import thorough
from traces import Trace, open_trace
from workbench.cluster import simulate as runs
from workbench.cluster.pools import resolve_pools
from workbench.settings.run_settings import RunSettings

CSVS = ("requests.csv", "iterations.csv", "events.csv", "itl.csv")


@st.composite
def some_requests(draw: st.DrawFn) -> list[dict[str, object]]:
    """Rows of a trace in which stretches of decode are cut by arrivals and by ends."""
    rows: list[dict[str, object]] = []
    at_s = 0.0
    for n in range(draw(st.integers(1, 10))):
        at_s += draw(st.sampled_from([0.0, 0.0, 0.01, 0.3, 2.0]))
        row: dict[str, object] = {
            "arrival_s": at_s,
            "input_length": draw(st.integers(1, 200)),
            "output_length": draw(st.sampled_from([1, 3, 40, 41, 150, 300])),
            "priority": draw(st.integers(0, 3)),
        }
        if draw(st.integers(0, 3)) == 0:
            row["max_tokens"] = draw(st.sampled_from([1, 30, 500]))
        if draw(st.integers(0, 3)) == 0:
            row["hash_ids"], row["block_size"], row["input_length"] = [0, n % 3], 64, 128
        rows.append(row)
    return rows


@st.composite
def some_settings(draw: st.DrawFn, loop: str) -> dict[str, object]:
    chosen: dict[str, object] = {
        "loop": loop,
        "model": draw(st.sampled_from(["Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B", "mistralai/Mistral-7B-v0.1"])),
        "batching": draw(st.sampled_from(["prefill-first", "mixed"])),
        "page_size": draw(st.sampled_from([1, 1, 4, 16])),
        "max_running": draw(st.sampled_from([1, 3, 8, 256])),
        "kv_tokens": draw(st.sampled_from([None, 500, 900, 4000])),
        "chunk": draw(st.sampled_from([64, 8192])),
        "policy": draw(st.sampled_from(["fcfs", "lpm", "priority", "random"])),
        "cache": draw(st.sampled_from(["radix", "none"])),
        "ignore_eos": draw(st.booleans()),
        "max_tokens": draw(st.sampled_from([None, 100])),
        "conservativeness": draw(st.sampled_from([1.0, 0.05])),
        "cuda_graphs": draw(st.booleans()),
        "dp": draw(st.sampled_from([1, 1, 1, 3])),
        "router": draw(st.sampled_from(["round_robin", "least_tokens", "cache_aware"])),
        "concurrency": draw(st.sampled_from([None, None, 2])),
        "request_timeout": draw(st.sampled_from([None, None, None, 1.0])),
    }
    if loop == "overlap":
        chosen["overlap_prefills"] = draw(st.booleans())
    if draw(st.sampled_from(["ours", "ours", "in turn"])) == "in turn":
        chosen |= {
            "batching": "mixed",
            "mixed_order": "admission",
            "cache": "blocks",
            "give_back": draw(st.sampled_from(["landed", "ended"])),
            "blank_pages": draw(st.sampled_from(["free", "queue"])),
            "admit_for": draw(st.sampled_from(["chunk", "prompt"])),
            "share_in_batch_tokens": None,
        }
    return chosen


def run(
    settings: RunSettings, trace: Trace, folder: Path, decisions: bool = True
) -> tuple[RunRecord, dict[str, bytes]]:
    """A run's record, and the bytes of its files."""
    file = folder / "decisions.jsonl" if decisions else None
    record = runs.simulate_loop(settings, settings.loops[0], trace, trace_sha256="", command="test", decisions=file)
    write_record(record, folder / "record")
    files = {name: (folder / "record" / name).read_bytes() for name in CSVS}
    if file is not None:
        files[file.name] = file.read_bytes()
    return record, files


def skipped_share(settings: RunSettings, trace: Trace) -> float:
    """How many of the iterations of such a run are skipped."""
    world = runs.SimulatedWorld(settings, resolve_pools(settings, settings.loops[0]), trace)
    world.run()
    return sum(ahead.steps for ahead in world.skips) / max(len(world.recorder.iterations), 1)


HOSTS = {
    "": (60, 20, {}),
    "gaps between steps": (20, 3, {"engine": "sglang-0.5.6"}),
    "a front end": (20, 3, {"front_end": "vllm"}),
    "both, by rank": (10, 1, {"engine": "vllm-0.19", "front_end": "sglang", "tp": 2}),
}
"""How many examples, more than how many of which skip steps, and what settings of the host are added to them."""


@pytest.mark.parametrize("loop", ["normal", "overlap"])
@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.slow
def test_a_run_that_skips_leaves_the_record_and_the_decisions_of_one_that_goes_step_by_step(
    loop: str, host: str
) -> None:
    shares = []
    examples, skipping_examples, more = HOSTS[host]

    @thorough(examples)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        rows, given_ = data.draw(some_requests()), data.draw(some_settings(loop)) | more
        with TemporaryDirectory() as name:
            folder = Path(name)
            path = folder / "trace.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            trace = open_trace(path)
            skipping, exact = RunSettings(**given_), RunSettings(**given_, exact=True)  # type: ignore[arg-type]
            for part in ("skipping", "exact", "undecided"):
                (folder / part).mkdir()
            one, one_files = run(skipping, trace, folder / "skipping")
            two, two_files = run(exact, trace, folder / "exact")
            _, undecided_files = run(skipping, trace, folder / "undecided", decisions=False)
            assert one_files == two_files
            assert undecided_files == {file: one_files[file] for file in CSVS}
            for file in ("requests", "iterations", "events"):
                columns, others = getattr(one, file), getattr(two, file)
                assert columns.keys() == others.keys()
                for column in columns:
                    np.testing.assert_array_equal(columns[column], others[column], err_msg=f"{file}: {column}")
            shares.append(skipped_share(skipping, trace))
            assert skipped_share(exact, trace) == 0

    check()
    assert sum(share > 0.3 for share in shares) > skipping_examples, "too few examples skip steps"
