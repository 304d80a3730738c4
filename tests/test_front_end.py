"""The process between clients and an instance: what it takes, that it saturates, and what records say of it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import workbench
from backends.simulated.front_end import FrontEnd, FrontEndModel
from reports.metrics.labels import front_end_label
from reports.record.run_record import RunRecord
from traces import TraceRequest
from workbench.cli.app import app
from workbench.settings import engines
from workbench.settings.engines import load_engine

SAMPLE = Path(__file__).parents[1] / "traces" / "samples" / "sample.jsonl"
ENGINES = ("vllm", "sglang", "workbench")


def together(count: int, inputs: int = 64, outputs: int = 200) -> list[TraceRequest]:
    return [TraceRequest(f"r{n}", 0.0, inputs, outputs) for n in range(count)]


def run(requests: list[TraceRequest], **settings: Any) -> RunRecord:
    return workbench.simulate(requests, **{"ignore_eos": True, "max_context": 2048, **settings})


def ttft_s(record: RunRecord) -> np.ndarray:
    return np.asarray(record.requests["first_token_s"]) - np.asarray(record.requests["arrival_s"])


@pytest.fixture
def front_end(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Gives the front end of ``workbench`` these numbers, and 0 for the others."""

    def given(**numbers: float) -> None:
        presets = {**engines._presets()}
        presets["workbench"] = {**presets["workbench"], "front_end": numbers}
        monkeypatch.setattr(engines, "_presets", lambda: presets)

    return given


def test_things_wait_for_what_the_process_has_begun_and_come_out_in_their_order():
    process = FrontEnd(FrontEndModel(request_s=0.002, prompt_token_s=1e-5, chunk_s=0.001))
    assert process.request(1.0, 100) == pytest.approx(1.003)
    assert process.result(1.001, 2) == pytest.approx(1.005)  # two chunks, behind the request
    assert process.request(2.0, 0) == pytest.approx(2.002)  # it had nothing to do by then
    assert process.results([2.0, 2.001, 3.0], 1) == pytest.approx([2.003, 2.004, 3.001])


def test_a_latency_before_the_process_comes_once_with_each_request_and_slows_no_token(front_end):
    front_end(latency_s=0.010)
    before, behind = run(together(3)), run(together(3), front_end="workbench")
    np.testing.assert_allclose(ttft_s(behind), ttft_s(before) + 0.010, atol=2e-9)
    np.testing.assert_allclose(
        np.asarray(behind.requests["finish_s"]) - np.asarray(behind.requests["first_token_s"]),
        np.asarray(before.requests["finish_s"]) - np.asarray(before.requests["first_token_s"]),
        atol=1e-8,
    )
    np.testing.assert_allclose(np.asarray(behind.requests["queued_s"]), 0.010)


def test_requests_that_come_at_once_are_handled_one_by_one_by_the_length_of_their_prompts(front_end):
    front_end(request_s=0.001, prompt_token_s=2e-5)
    record = run(
        [TraceRequest(f"r{n}", 0.0, length, 4) for n, length in enumerate((50, 100, 200))], front_end="workbench"
    )
    queued = np.asarray(record.requests["queued_s"])
    assert queued[0] >= 0.002 and queued[1] >= 0.005 and queued[2] >= 0.010
    assert queued[0] < 0.005, "the first does not wait for the others"


def test_a_front_end_bounds_the_tokens_a_second_whatever_the_gpus_can_do(front_end):
    front_end(chunk_s=100e-6)
    for running in (8, 256):
        frames = [run(together(running), front_end=kind).requests for kind in ("none", "workbench")]
        spans = [float(max(frame["finish_s"]) - min(frame["first_token_s"])) for frame in frames]
        before, behind = (running * 200 / span for span in spans)
        if running == 8:
            assert before < 8000 and behind == pytest.approx(before, rel=0.02)
        else:
            assert before > 20_000 and 9_600 < behind <= 10_000


def test_in_a_closed_loop_a_client_asks_again_when_it_has_seen_the_end(front_end):
    front_end(latency_s=0.005, chunk_s=0.001)
    frame = run(together(6, outputs=5), front_end="workbench", concurrency=1).requests
    arrivals, ends = np.asarray(frame["arrival_s"]), np.asarray(frame["finish_s"])
    np.testing.assert_allclose(arrivals[1:], ends[:-1], atol=2e-9)


@pytest.mark.parametrize("more", [{}, {"dp": 3, "router": "least_requests"}, {"concurrency": 5}, {"loop": "normal"}])
def test_skipping_decided_steps_leaves_the_same_behind_a_front_end(more, front_end):
    front_end(request_s=0.0007, prompt_token_s=3e-6, chunk_s=60e-6, latency_s=0.003)
    requests = [TraceRequest(f"r{n}", n * 0.05, 40 + 37 * (n % 5), 20 + 61 * (n % 7)) for n in range(40)]
    plain, exact = (run(requests, front_end="workbench", exact=exact, **more) for exact in (False, True))
    for table in ("requests", "iterations"):
        for name, column in getattr(plain, table).items():
            np.testing.assert_array_equal(column, getattr(exact, table)[name], err_msg=f"{table}: {name}")
    for one, two in zip(plain.itl, exact.itl, strict=True):
        np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("kind", ENGINES)
def test_the_record_says_whose_front_end_it_was_and_what_that_took(kind):
    meta = run(together(2), front_end=kind, engine="vllm-0.14").meta
    found = meta["front_end"]
    assert found.pop("engine") == ("vllm-0.14.0" if kind == "vllm" else load_engine(kind).name)
    assert FrontEndModel(**found).chunk_s > 0 and meta["settings"]["front_end"] == kind
    assert front_end_label(meta).startswith("as clients see them, behind the front end of")


def test_without_one_latencies_are_the_engines_own_and_the_run_says_so(tmp_path):
    command = ["simulate", str(SAMPLE), "--requests", "5", "--out", str(tmp_path / "run")]
    shown = CliRunner().invoke(app, command).stdout
    said = "the engine's own, with no front end before it"
    assert f"latencies: {said}" in shown
    meta = json.loads((tmp_path / "run/overlap/meta.json").read_text())
    assert meta["settings"]["front_end"] == "none" and "front_end" not in meta
    assert "no front end before it" in (tmp_path / "run/report.html").read_text()
    behind = CliRunner().invoke(app, [*command[:-1], str(tmp_path / "behind"), "--front-end", "sglang"]).stdout
    assert "latencies: as clients see them, behind the front end of sglang-" in behind


def test_every_engine_with_a_front_end_has_one_in_every_version():
    for name in engines.engine_names():
        if name.partition("-")[0] in ENGINES:
            model = FrontEndModel(**load_engine(name).front_end)
            assert min(model.request_s, model.prompt_token_s, model.chunk_s, model.latency_s) > 0, name


GOOD = "request_s = 1e-3\nprompt_token_s = 0\nchunk_s = 2e-5\nlatency_s = 5e-3\n"


def test_a_file_says_the_front_end_wherever_the_setting_is_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.toml").write_text(GOOD)
    Path("run.toml").write_text('front-end = "mine.toml"\n')
    for words in (["--front-end", "mine.toml"], ["--config", "run.toml"]):
        out = tmp_path / words[0][2:]
        shown = CliRunner().invoke(app, ["simulate", str(SAMPLE), "--requests", "5", *words, "--out", str(out)])
        assert shown.exit_code == 0, shown.output
        assert "latencies: as clients see them, behind the front end of mine.toml" in shown.stdout
        meta = json.loads((out / "overlap/meta.json").read_text())
        assert meta["front_end"] == {"engine": "mine.toml", **asdict(FrontEndModel(1e-3, 0.0, 2e-5, 5e-3))}
    again = [
        "simulate",
        str(SAMPLE),
        "--requests",
        "5",
        "--like",
        str(out / "overlap"),
        "--out",
        str(tmp_path / "again"),
    ]
    assert CliRunner().invoke(app, again).exit_code == 0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "mine.toml: No such file or directory"),
        (GOOD.replace("chunk_s", "chunks_s"), "mine.toml: chunks_s: no such key of a front end; there are request_s, "),
        (GOOD.replace("2e-5", '"2e-5"'), "mine.toml: chunk_s: '2e-5' is not a number of seconds"),
        (GOOD.replace("2e-5", "-1"), "mine.toml: chunk_s: -1 is not a number of seconds"),
        (GOOD.replace("2e-5", "nan"), "mine.toml: chunk_s: nan is not a number of seconds"),
        (GOOD.replace("2e-5", "true"), "mine.toml: chunk_s: True is not a number of seconds"),
        (GOOD.replace("chunk_s = 2e-5\n", ""), "mine.toml: chunk_s: is missing; a front end has request_s, "),
        ("=", "mine.toml: "),
    ],
)
def test_a_file_that_is_no_front_end_is_refused_in_one_line(text, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if text is not None:
        Path("mine.toml").write_text(text)
    done = CliRunner().invoke(app, ["simulate", str(SAMPLE), "--front-end", "mine.toml", "--out", "out"])
    assert done.exit_code == 2 and done.stderr.startswith(f"error: {said}") and done.stderr.count("\n") == 1
    assert not Path("out").exists()


def test_a_front_end_that_is_neither_a_name_nor_a_file_is_refused():
    done = CliRunner().invoke(app, ["simulate", str(SAMPLE), "--front-end", "trtllm"])
    assert done.stderr == "error: front_end: 'trtllm' is not one of none, vllm, sglang, workbench, nor a FILE.toml\n"
