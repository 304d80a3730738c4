"""`workbench trace` as a user meets it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from typer.testing import CliRunner

from traces import sample_path
from traces.requests.lengths import HELP
from workbench.cli.trace import app
from workbench.cli.trace_flags import LENGTHS


def run(*words: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(word) for word in words])
    return result.exit_code, result.stdout, result.stderr


def test_describe_prints_json_that_says_what_the_table_says() -> None:
    code, out, _ = run("describe", sample_path(), "--json")
    figures = json.loads(out)
    assert code == 0 and figures["requests"] == 400 and figures["sessions"] == 161 and figures["closed_loop"]
    code, out, _ = run("describe", sample_path())
    assert code == 0 and "400, 161 with an arrival of their own" in out


def test_convert_refuses_to_overwrite_unless_forced(tmp_path: Path) -> None:
    out = tmp_path / "t.jsonl.zst"
    assert run("convert", sample_path(), out, "--requests", 10)[0] == 0
    assert run("convert", sample_path(), out) == (2, "", f"error: {out}: exists; --force overwrites it\n")
    assert run("convert", sample_path(), out, "--force")[0] == 0
    assert json.loads(run("describe", out, "--json")[1])["requests"] == 400


def test_faults_are_one_line_and_exit_code_2(tmp_path: Path) -> None:
    assert run("describe", tmp_path / "no") == (2, "", f"error: {tmp_path / 'no'}: no such file\n")
    assert run("describe", sample_path(), "--rate", 1, "--speedup", 2) == (
        2,
        "",
        "error: a rate and a speedup cannot be given together\n",
    )
    assert run("generate", tmp_path / "t", "--arrivals", "often")[2].startswith(
        "error: unknown arrivals 'often'; known: "
    )
    assert run("generate", tmp_path / "t", "--input", "0")[2].startswith("error: '0' is not a length: give ")


def test_importing_the_commands_imports_nothing_heavy() -> None:
    heavy = ("numpy", "msgspec", "traces", "rich.progress")
    code = f"import sys, workbench.cli.trace; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_and_errors_write_lengths_alike() -> None:
    assert LENGTHS == HELP
