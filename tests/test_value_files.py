"""Files of settings, prices, GPUs, models and profiles: whatever is wrong with one is said in one line that names it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from backends.simulated.catalogue.gpu_specs import load_gpu
from backends.simulated.catalogue.model_specs import load_model
from backends.simulated.cost.tables.llmservingsim import read_meta
from reports.record.run_record import write_record
from tests.reports.records import record_of, request_row
from workbench.cli.app import app
from workbench.search.prices import read_prices
from workbench.settings.loading import read_settings_file

DEEP = b"[" * 100_000
READERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "settings": ("run.toml", read_settings_file),
    "prices": ("prices.toml", read_prices),
    "GPU": ("mine.toml", lambda path: load_gpu(str(path))),
    "model": ("config.json", lambda path: load_model(str(path))),
    "LLMServingSim profile": ("meta.yaml", lambda path: read_meta(path.parent)),
}
BROKEN = {"cut off": b'{"a": [1, 2', "no text": b"\xff\xfe\x00 = 1", "nested": DEEP, "a folder": None}


@pytest.mark.parametrize(
    ("kind", "broken"),
    [(kind, broken) for kind in READERS for broken in BROKEN if (kind, broken) != ("model", "a folder")],  # it is one
)
def test_a_file_that_cannot_be_read_is_named_in_one_line(kind, broken, tmp_path):
    name, read = READERS[kind]
    path, content = tmp_path / name, BROKEN[broken]
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        read(path)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", READERS)
def test_a_file_that_is_not_there_is_named_in_one_line(kind, tmp_path):
    name, read = READERS[kind]
    with pytest.raises(ValueError) as error:
        read(tmp_path / name)
    assert str(error.value) == f"{tmp_path / name}: No such file or directory"


def test_files_may_begin_with_the_mark_of_utf_8(tmp_path):
    mark = b"\xef\xbb\xbf"
    (tmp_path / "run.toml").write_bytes(mark + b"max-running = 8\n")
    (tmp_path / "prices.toml").write_bytes(mark + 'source = "Preisliste für März"\n[gpu_hour]\nh100 = 2\n'.encode())
    (tmp_path / "meta.yaml").write_bytes(mark + b"model: a/b\nhardware: H100\n")
    assert read_settings_file(tmp_path / "run.toml") == {"max_running": 8}
    assert read_prices(tmp_path / "prices.toml").per_gpu_hour == {"h100": 2}
    assert read_meta(tmp_path) == {"model": "a/b", "hardware": "H100"}


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("meta.json", "report RECORD"),
        ("meta.json", "diff-config RECORD RECORD"),
        ("meta.json", "simulate TRACE --like RECORD"),
        ("meta.json", "simulate TRACE --out RECORD"),
        ("meta.json", "import RECORD --out OUT"),
        ("decisions.jsonl", "compare RECORD RECORD"),
        ("plan.json", "plan TRACE --slo ttft_p99=1s --out RECORD"),
    ],
)
def test_a_file_of_a_record_that_is_nested_too_deeply_is_said_in_one_line(file, words, tmp_path):
    record, trace = tmp_path / "r", tmp_path / "t.jsonl"
    write_record(record_of([request_row(request_id="a", arrival_s=0.0, first_token_s=1.0, finish_s=2.0)]), record)
    (record / "requests.jsonl").write_text("")
    (record / file).write_bytes(DEEP)
    trace.write_text("".join(f'{{"arrival_s": {n}, "input_length": 9, "output_length": 2}}\n' for n in range(3)))
    named = {"RECORD": record, "TRACE": trace, "OUT": tmp_path / "o"}
    done = CliRunner().invoke(app, [str(named.get(word, word)) for word in words.split()])
    assert done.exit_code == 2 and isinstance(done.exception, SystemExit), done.output
    assert done.output.startswith(f"error: {record}") and done.output.count("\n") == 1
