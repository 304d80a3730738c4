"""Recorded decisions of engines against this scheduler's: all that are committed, by what compares them."""

from __future__ import annotations

import gzip
import json
import runpy
from dataclasses import asdict
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from ground.json_file import read_json
from workbench.parity.decide import replay
from workbench.parity.explain import difference, explained
from workbench.parity.recording import RecordingError, read_recording
from workbench.parity.scenarios import scenario, token
from workbench.parity.score import Score
from workbench.settings.parity import COUNTS

RECORDINGS = sorted((Path(__file__).parents[2] / "benchmarks/recordings").glob("*.json.gz"))


@pytest.mark.parametrize("path", RECORDINGS, ids=lambda path: path.name.partition(".json")[0])
def test_the_counts_beside_the_presets_are_those_of_the_recordings(path):
    recording = read_recording(path)
    score = Score()
    for key in recording.decisions:
        score.add(replay(recording, key))
    assert read_json(COUNTS)[recording.preset][path.name] == asdict(score), "run benchmarks/parity.py --write"


def test_every_recorded_batch_is_decided_alike():
    for preset, counts in read_json(COUNTS).items():
        for name, of in counts.items():
            assert (of["equal"], of["equal_steps"]) == (of["scenarios"], of["steps"]), f"{preset}: {name}"


def test_every_count_beside_the_presets_is_of_a_recording_that_is_there():
    kept = {name for of in read_json(COUNTS).values() for name in of}
    assert kept == {path.name for path in RECORDINGS}


def test_a_replay_computes_every_prompt_and_every_token_once_where_nothing_is_retracted():
    recording = read_recording(next(path for path in RECORDINGS if path.name == "mini-sglang-20fcd7f.json.gz"))
    ours = replay(recording, "roomy/16/overlap/1").ours
    for request in scenario("roomy", 1):
        rows = [step[request.id] for step in ours if request.id in step]
        # A chunk can be a token long; what was cached is not computed.
        assert 1 <= sum(rows) <= len(request.prompt) + request.output - 1
        assert rows[-1] == 1 or request.output == 1


def test_the_same_scenario_is_decided_the_same_way_again():
    recording = read_recording(next(path for path in RECORDINGS if path.name.startswith("vllm-0.33.0")))
    key = next(iter(recording.decisions))
    assert replay(recording, key).ours == replay(recording, key).ours


def written(tmp_path: Path, values: object) -> Path:
    path = tmp_path / "record.json.gz"
    path.write_bytes(gzip.compress(json.dumps(values).encode()))
    return path


def test_the_first_difference_is_shown_with_both_batches_and_the_state_before(tmp_path):
    source = read_recording(next(path for path in RECORDINGS if path.name.startswith("mini-sglang")))
    key = "roomy/1/normal/0"
    ours = replay(source, key).ours
    changed = [dict(step) for step in ours]
    changed[7] = {**changed[7], "r059": 3}
    recording = read_recording(written(tmp_path, {"engine": source.engine, key: changed}))
    replayed = replay(recording, key)
    assert (replayed.equal, replayed.equal_steps) == (False, 7)
    first, *rest = explained(recording, replayed, whole=True)
    assert first.startswith(f"{key}: differs in batch 7 of {len(ours)} (step ")
    assert first.endswith("only the engine runs r059 (3)")
    assert any(line.startswith("    engine  ") and "r059:3" in line for line in rest)
    assert any("free pages and" in line for line in rest)


def test_a_score_is_never_a_hundred_percent_while_a_step_differs():
    assert "(99.9 %)" in str(Score(2, 1, 100_000, 99_999))
    assert str(Score(2, 2, 10, 10)) == "2 of 2 scenarios equal; 10 of 10 steps before the first difference (100 %)"


def test_differences_are_said_by_request():
    assert difference({"r1": 5, "r2": 1}, {"r1": 4, "!": ["r2"]}) == (
        "only ours retracts r2; only the engine runs r2 (1); r1 computes 5 there and 4 here"
    )
    assert difference(None, {"r1": 1}) == "the engine has no further batch"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"roomy/sync/0": []}, "engine: None is not the name and version of whose decisions these are"),
        ({"engine": "orca 1.0", "roomy/sync/0": []}, "engine: engine: 'orca-1.0' is not known"),
        ({"engine": "vllm 0.33.0", "roomy/sync/0": 3}, "roomy/sync/0: is no list of batches"),
        ({"engine": "vllm 0.33.0"}, "holds no scenario"),
        (
            {"engine": "vllm 0.33.0", "roomy/sync/0": [{"r000": "7"}]},
            "roomy/sync/0: batch 0: r000: '7' is not a number of",
        ),
        ({"engine": "vllm 0.33.0", "roomy/sync/0": [{}, {"!": 3}]}, "roomy/sync/0: batch 1: !: 3 is not a list of ids"),
        ({"engine": "vllm 0.33.0", "roomy/sync/0": [{"!": [1]}]}, "roomy/sync/0: batch 0: !: [1] is not a list of ids"),
        ({"engine": "vllm 0.33.0", "crowded/sync/0": []}, "'crowded/sync/0' is no case/page/loop/seed"),
        ({"engine": "vllm 0.33.0", "roomy": []}, "'roomy' is no case/page/loop/seed"),
        ({"engine": "vllm 0.33.0", "roomy/sync": []}, "'roomy/sync' is no case/page/loop/seed"),
        ({"engine": "vllm 0.33.0", "roomy/x/sync/0": []}, "'roomy/x/sync/0' is no case/page/loop/seed"),
        (
            {"engine": "sglang 0.5.23,, conservativeness x", "roomy/1/normal/0": []},
            "engine: conservativeness 'x' is not a number",
        ),
    ],
)
def test_a_recording_that_cannot_be_replayed_is_refused_in_one_line(tmp_path, values, said):
    path = written(tmp_path, values)
    with pytest.raises(RecordingError) as refused:
        recording = read_recording(path)
        for key in recording.decisions:
            replay(recording, key)
    assert str(refused.value).startswith(f"{path}: {said}")


def test_a_file_that_is_no_recording_is_refused_in_one_line(tmp_path):
    path = tmp_path / "record.json.gz"
    path.write_bytes(b"no gzip")
    with pytest.raises(RecordingError, match="is no whole gzip file"):
        read_recording(path)
    with pytest.raises(RecordingError, match="No such file"):
        read_recording(tmp_path / "none.json")


def test_of_several_recordings_those_without_the_case_are_passed_over_and_none_with_it_is_an_error(tmp_path):
    app = typer.Typer()
    app.command()(runpy.run_path(str(RECORDINGS[0].parents[1] / "parity.py"))["main"])
    first, second = (str(path) for path in RECORDINGS if path.name.startswith(("mini-sglang", "vllm-0.33.0-again")))
    key = "tight/16/overlap/0"
    some = CliRunner().invoke(app, [second, first, "--case", key])
    assert some.exit_code == 0
    passed_over, *_, counts = some.stdout.splitlines()
    assert passed_over.startswith(
        f"vllm-0.33.0-again.json.gz: no scenario has {key!r} in its key; there are small-budget/"
    )
    assert counts.startswith("1 of 1 scenarios equal; ")
    none = CliRunner().invoke(app, [second, "--case", key])
    assert none.exit_code == 2
    assert none.stderr == f"error: --case: no scenario of {second} has {key!r} in its key\n"


def test_tokens_depend_on_request_and_position_alone():
    assert [token("r007", position) for position in range(3)] == [token("r007", position) for position in range(3)]
    assert len({token("r007", position) for position in range(50)}) > 40
