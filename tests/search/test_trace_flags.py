"""A search reads its trace as the flags say, and says so in the commands that it names."""

from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner

from traces import open_trace, sample_path
from traces.in_memory import in_memory
from workbench.cli.app import app
from workbench.cli.trace_flags import words_of
from workbench.search.point import Base, Shared

READING = {
    "format": "auto",
    "tokenizer": None,
    "time_unit": "ms",
    "spread_ticks": "off",
    "block_tokens": None,
    "output": "lognormal:mean=5,sigma=1",
    "skip_bad_rows": True,
    "sort": False,
}


def test_the_command_of_a_point_has_the_flags_that_are_not_at_their_defaults() -> None:
    words = words_of(READING)
    assert words == "--time-unit ms --spread-ticks off --output lognormal:mean=5,sigma=1 --skip-bad-rows"
    shared = Shared(Base(None, {}), in_memory(open_trace(sample_path())), "", trace_flags=words)
    assert f"simulate {sample_path()} {words} --loop overlap" in shared.command_for({})


def test_a_sweep_over_concurrency_takes_rows_in_any_order_and_is_resumed_with_the_same_flags_only(
    tmp_path: Path,
) -> None:
    path = tmp_path / "t.csv"
    path.write_text("arrived_at,num_prefill_tokens,num_decode_tokens\n5,9,3\n5,9,0\n1,9,3\n")
    words = ["sweep", str(path), "--out", str(tmp_path / "o"), "--jobs", "1", "--vary"]
    refused = CliRunner().invoke(app, [*words, "max-running=1,2", "--skip-bad-rows"])
    assert refused.exit_code == 2 and refused.stderr.endswith(
        "arrivals go back: 1 s after 5 s on line 2; --sort orders by arrival\n"
    )
    done = CliRunner().invoke(app, [*words, "concurrency=1,2", "--skip-bad-rows", "--json"])
    assert done.exit_code == 0, done.output
    manifests = [json.loads(file.read_text()) for file in (tmp_path / "o").glob("*.json")]
    assert any(manifest.get("trace", {}).get("flags") == "--skip-bad-rows" for manifest in manifests)
    other = CliRunner().invoke(app, [*words, "concurrency=1,2", "--skip-bad-rows", "--sort", "--resume"])
    assert other.exit_code == 2 and "flags" in other.stderr
