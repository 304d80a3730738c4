"""Measuring a runner: the file is one that simulate takes, and what was measured is not measured again."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from typer.testing import CliRunner

from tests.torch.tiny import make
from workbench.calibrate import measure, points
from workbench.calibrate.doubts import doubts
from workbench.cli.app import app


@pytest.mark.slow
def test_a_stopped_calibration_goes_on_and_simulate_takes_its_file(tmp_path, monkeypatch):
    model = tmp_path / "tiny-llama"
    make("LlamaForCausalLM", model)
    out = tmp_path / "costs.json"
    words = ["calibrate", str(model), "--backend", "cpu", "--out", str(out), "--max-running", "2", "--kv-tokens", "300"]
    real, ran = measure._run_point, []

    def counted(point, settings, loop, *rest):
        if len(ran) == 5:
            raise KeyboardInterrupt
        ran.append((point.name, loop))
        return real(point, settings, loop, *rest)

    monkeypatch.setattr(measure, "_run_point", counted)
    stopped = CliRunner().invoke(app, words)
    assert stopped.exit_code == 130, stopped.output
    assert "goes on from there" in stopped.stderr
    assert not out.exists()
    before = {file.name: file.read_bytes() for file in Path(f"{out}.points").glob("*.json")}
    assert len(before) == 1 + 4  # the conditions; the first point ran once more to warm up

    again: list[tuple[str, str]] = []

    def listed(point, settings, loop, *rest):
        again.append((point.name, loop))
        return real(point, settings, loop, *rest)

    monkeypatch.setattr(measure, "_run_point", listed)
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert not set(again) & set(ran)
    assert all(Path(f"{out}.points", name).read_bytes() == content for name, content in before.items())
    kinds = {name.partition("-")[0] for name, _ in ran + again}
    assert {"decode", "prefill", "cached", "churn", "mixed"} <= kinds
    mixed = json.loads(Path(f"{out}.points", "mixed-8x16.normal.json").read_text())["steps"]
    both = [p > 0 and d > 0 for p, d in zip(mixed["prefill_tokens"], mixed["decode_tokens"], strict=True)]
    assert any(both), "prompts and decodes in one step"
    found = json.loads(out.read_text())
    assert (found["gpu"], found["dtype"]) == ("cpu", "fp32")
    assert found["measured"]["max_running"] == 2

    trace = tmp_path / "t.jsonl"
    trace.write_text('{"request_id": "a", "arrival_s": 0.0, "input_length": 20, "output_length": 5}\n')
    flags = ["--model", str(model), "--kv-tokens", "300", "--out", str(tmp_path / "sim"), "--json"]
    simulated = CliRunner().invoke(app, ["simulate", str(trace), "--cost", f"fitted:{out}", *flags])
    assert simulated.exit_code == 0, simulated.output
    assert json.loads((tmp_path / "sim/overlap/meta.json").read_text())["settings"]["dtype"] == "fp32"

    # A real run's record holds all that a simulation of it needs, but the costs.
    real_run = [
        "--model",
        str(model),
        "--backend",
        "cpu",
        "--kv-tokens",
        "300",
        "--out",
        str(tmp_path / "real"),
        "--json",
    ]
    replayed = CliRunner().invoke(app, ["replay", str(trace), *real_run])
    assert replayed.exit_code == 0, replayed.output
    alike = ["--like", str(tmp_path / "real/overlap"), "--out", str(tmp_path / "alike"), "--json"]
    simulated = CliRunner().invoke(app, ["simulate", str(trace), "--cost", f"fitted:{out}", *alike])
    assert simulated.exit_code == 0, simulated.output
    settings = json.loads((tmp_path / "alike/overlap/meta.json").read_text())["settings"]
    assert (settings["dtype"], settings["kv_dtype"], settings["kv_tokens"]) == ("fp32", "fp32", 300)

    # The points alone, as they come from another machine, give the same costs.
    elsewhere = tmp_path / "elsewhere.json"
    fitted = CliRunner().invoke(app, ["calibrate", "--from", f"{out}.points", "--out", str(elsewhere)])
    assert fitted.exit_code == 0, fitted.output
    assert json.loads(elsewhere.read_text()) == found
    broken = tmp_path / "broken"
    broken.mkdir()
    for name in ("conditions.json", "decode-1x16.normal.json"):
        (broken / name).write_bytes(Path(f"{out}.points", name).read_bytes())
    (broken / "decode-1x16.overlap.json").write_text('{"steps": {"seconds": [1.0]}}')
    refused = CliRunner().invoke(app, ["calibrate", "--from", str(broken), "--out", str(tmp_path / "none.json")])
    assert (refused.exit_code, refused.stderr.count("\n")) == (2, 1), refused.output
    assert "decode-1x16.overlap.json: steps: not what a calibration writes" in refused.stderr

    conditions = broken / "conditions.json"
    conditions.write_text("{")
    for words_of in (["--from", str(broken)], [str(model), "--backend", "cpu", "--kv-tokens", "300"]):
        (tmp_path / "none.json.points").unlink(missing_ok=True)
        (tmp_path / "none.json.points").symlink_to(broken)
        refused = CliRunner().invoke(app, ["calibrate", *words_of, "--out", str(tmp_path / "none.json")])
        assert (refused.exit_code, refused.stderr.count("\n")) == (2, 1), refused.output
        assert "conditions.json: line 1, column 2: Expecting property name" in refused.stderr

    out.unlink()
    refused = CliRunner().invoke(app, [*words[:-1], "200"])
    assert (refused.exit_code, refused.stderr.count("\n")) == (2, 1), refused.output
    assert "measured with kv_tokens 300, now it is 200" in refused.stderr


def test_a_record_gives_costs_of_whole_steps_and_no_profile(tmp_path):
    trace = tmp_path / "t.jsonl"
    trace.write_text('{"request_id": "a", "arrival_s": 0.0, "input_length": 20, "output_length": 50}\n')
    simulated = CliRunner().invoke(app, ["simulate", str(trace), "--out", str(tmp_path / "sim"), "--json"])
    assert simulated.exit_code == 0, simulated.output
    words = ["calibrate", "--from", str(tmp_path / "sim/overlap"), "--out"]
    refused = CliRunner().invoke(app, [*words, str(tmp_path / "profile")])
    assert (refused.exit_code, refused.stderr.count("\n")) == (2, 1), refused.output
    assert "whole steps are fitted to a record; --out NAME.json" in refused.stderr
    assert not (tmp_path / "profile").exists()
    done = CliRunner().invoke(app, [*words, str(tmp_path / "costs.json")])
    assert done.exit_code == 0 and (tmp_path / "costs.json").is_file(), done.output
    phases = [line.split() for line in done.stdout.partition("CPU phase")[2].splitlines()[1:-1]]
    shown = [" ".join(words[:-1]) for words in phases if words[0] != "note:"]
    assert shown[:3] == ["receive step", "receive new request", "schedule step"], (
        "in their order, each with what it is of"
    )
    assert {"prepare request", "process sampled token", "process request that ends"} <= set(shown)
    nothing = CliRunner().invoke(app, ["calibrate", "--out", str(tmp_path / "x")])
    assert nothing.stderr == "error: say what: a MODEL to measure or --from FOLDER to fit; or --links, or --front-end\n"


def test_a_measurement_that_others_disturbed_or_that_fits_badly_says_so():
    assert doubts(0.02, 0.1) == [] == doubts(None, 0.1)
    (busy,) = doubts(0.4, 0.1)
    assert busy.startswith("others used this machine: 40% of its time a process waited for a core. Times are longer")
    (far,) = doubts(None, 1.1)
    assert far.startswith("off by 110% on average is far")
    assert doubts(0.4, 0.1, "CPU times hold")[0].endswith("CPU times hold") and len(doubts(0.4, 1.1)) == 2


@pytest.mark.slow
def test_two_ranks_are_measured_as_one_stage(tmp_path, monkeypatch):
    model = tmp_path / "tiny-llama"
    make("LlamaForCausalLM", model)
    monkeypatch.setattr(measure, "design", lambda *bounds: points.design(*bounds)[:2])
    out = tmp_path / "costs.json"
    words = ["calibrate", str(model), "--backend", "cpu", "--tp", "2", "--out", str(out), "--max-running", "2"]
    done = CliRunner().invoke(app, [*words, "--kv-tokens", "300"])
    assert done.exit_code == 0, done.output
    found = json.loads(out.read_text())
    assert (found["tp"], found["pp"], len(found["stages"])) == (2, 1, 1)


@pytest.mark.slow
def test_operators_become_a_profile_that_simulate_takes_and_a_stopped_one_goes_on(tmp_path, monkeypatch):
    model = tmp_path / "tiny-llama"
    make("LlamaForCausalLM", model)
    some = ("decode", "prefill", "mixed")
    monkeypatch.setattr(
        measure,
        "design",
        lambda *bounds: [next(point for point in points.design(*bounds) if point.kind == kind) for kind in some],
    )
    out, real, timed = tmp_path / "profile", measure.time_shape, []
    words = ["calibrate", str(model), "--backend", "cpu", "--out", str(out), "--max-running", "4", "--kv-tokens", "300"]

    def counted(run, shape, *bounds):
        if len(timed) == 7:
            raise KeyboardInterrupt
        timed.append(shape)
        return real(run, shape, *bounds)

    monkeypatch.setattr(measure, "time_shape", counted)
    stopped = CliRunner().invoke(app, words)
    assert stopped.exit_code == 130 and "goes on from there" in stopped.stderr, stopped.output
    assert not out.exists()
    before = set(Path(f"{out}.points").rglob("*.json"))
    again = []
    monkeypatch.setattr(
        measure, "time_shape", lambda run, shape, *bounds: (again.append(shape), real(run, shape, *bounds))[1]
    )
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    visits = Counter(timed + again)
    assert set(visits.values()) == {measure.VISITS} and before < set(Path(f"{out}.points").rglob("*.json"))
    assert f"simulate with: --cost profile:{out}" in done.stdout.replace("\n", "")
    said = json.loads((out / "profile.json").read_text())
    assert said["operators"]["steps"] == len(visits)
    assert (said["gpu"], said["dtype"], said["conditions"]["max_running"]) == ("cpu", "fp32", 4)

    shown = CliRunner().invoke(app, ["profile", "show", str(out)])
    assert shown.exit_code == 0 and "gate_up_proj" in shown.stdout and "beside" in shown.stdout, shown.output
    trace = tmp_path / "t.jsonl"
    trace.write_text('{"request_id": "a", "arrival_s": 0.0, "input_length": 20, "output_length": 5}\n')
    flags = ["--kv-tokens", "300", "--max-context", "200", "--out", str(tmp_path / "sim"), "--json"]
    simulated = CliRunner().invoke(app, ["simulate", str(trace), "--cost", f"profile:{out}", *flags])
    assert simulated.exit_code == 0, simulated.output
    settings = json.loads((tmp_path / "sim/overlap/meta.json").read_text())["settings"]
    assert (settings["model"], settings["gpu"], settings["dtype"]) == (str(model), "cpu", "fp32")

    elsewhere = tmp_path / "elsewhere"
    made = CliRunner().invoke(app, ["calibrate", "--from", f"{out}.points", "--out", str(elsewhere)])
    assert made.exit_code == 0, made.output
    for file in out.rglob("*.*"):
        assert (elsewhere / file.relative_to(out)).read_bytes() == file.read_bytes()


def test_what_a_profile_cannot_hold_is_refused_before_anything_is_measured(tmp_path):
    model, windowed = tmp_path / "tiny-llama", tmp_path / "tiny-mistral"
    make("LlamaForCausalLM", model)
    make("MistralForCausalLM", windowed, sliding_window=8)
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    for words, line in (
        ([str(model), "--tp", "2", "--out", str(tmp_path / "p")], "tp: operators are timed on one rank, not 2"),
        ([str(windowed), "--out", str(tmp_path / "p")], "attends over sliding windows, which no profile holds"),
        ([str(model), "--out", str(folder), "--force"], "mine: a folder that is no profile"),
    ):
        refused = CliRunner().invoke(app, ["calibrate", *words, "--backend", "cpu", "--kv-tokens", "300"])
        assert (refused.exit_code, refused.stderr.count("\n")) == (2, 1), refused.output
        assert line in refused.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "tiny-llama", "tiny-mistral"]
    assert (folder / "thesis.txt").read_text() == "years of work"
