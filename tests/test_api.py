"""The public face: loaded lazily, typed, and a simulation is what the command makes."""

from __future__ import annotations

import ast
import inspect
import json
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import workbench
from traces import TraceError, sample_path
from workbench.cli.app import app
from workbench.loops.normal import normal_loop
from workbench.scheduler.settings import ConfigError, settings_of
from workbench.settings.run_settings import RunSettings

STUB = Path(workbench.__file__).with_suffix(".pyi")
FEW = [workbench.TraceRequest(f"r{i}", i / 10, 200 + 10 * i, 20) for i in range(8)]


class Backwards(workbench.Policy):
    """Last come, first served."""

    def order(self, waiting, view):
        return waiting[::-1]


class Constant:
    """A hundredth of a second a step."""

    def __init__(self, want: workbench.CostRequest) -> None:
        assert want.model.layers > 0

    def forward(self, batch, stage=0):
        return 0.01

    def transfer_s(self, batch, stage=0):
        return 0.0


def own_loop(scheduler, backend, inbox, outbox):
    yield from normal_loop(scheduler, backend, inbox, outbox)


def columns(record: workbench.RunRecord) -> list:
    # As text, in which what is unknown is equal to itself.
    return [str(np.asarray(values).tolist()) for values in (*record.requests.values(), *record.iterations.values())]


def loaded_by(code: str) -> set[str]:
    """The modules that a fresh interpreter has loaded after ``code``."""
    say = "import sys, json; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{say}"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout))


def test_importing_the_package_loads_nothing_else():
    loaded = loaded_by("import workbench\nassert 'simulate' in dir(workbench) and workbench.__version__")
    ours = {name for name in loaded if name.split(".")[0] in ("workbench", "backends", "traces", "reports", "ground")}
    assert ours == {"workbench"} and not loaded & {"numpy", "simpy", "torch", "pandas", "pyarrow"}


def test_what_a_real_run_uses_of_it_loads_no_simulator():
    loaded = loaded_by("import workbench\nworkbench.Policy, workbench.Loop, workbench.Backend, workbench.ConfigError")
    assert {name for name in loaded if name.startswith(("backends", "simpy", "workbench.cluster"))} == set()
    assert {"torch", "pandas", "matplotlib"} & loaded == set()


def test_every_public_name_is_there_typed_and_documented():
    stub = ast.parse(STUB.read_text())
    (listed,) = [ast.literal_eval(node.value) for node in stub.body if isinstance(node, ast.Assign)]
    places = {
        alias.asname: node.module
        for node in stub.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname == alias.name
    }
    assert listed == sorted(listed, key=lambda name: (name.islower(), name)) == workbench.__all__
    assert places == workbench._PLACES
    for name in workbench.__all__:
        found = getattr(workbench, name)
        assert inspect.getdoc(found), name
        if inspect.isfunction(found):
            hints = inspect.signature(found)
            assert hints.return_annotation and all(p.annotation is not p.empty for p in hints.parameters.values())
    with pytest.raises(AttributeError, match="module 'workbench' has no attribute 'simulated'"):
        workbench.simulated  # noqa: B018


def test_a_simulation_is_what_the_command_makes(tmp_path):
    flags = ["--requests", "15", "--loop", "normal", "--policy", "lpm", "--chunk", "512", "--slo-ttft", "1"]
    done = CliRunner().invoke(app, ["simulate", str(sample_path()), *flags, "--out", str(tmp_path / "cli")])
    assert done.exit_code == 0, done.output
    asked = {"requests": 15, "loop": "normal", "policy": "lpm", "chunk": 512, "slo_ttft": 1}
    record = workbench.simulate(sample_path(), out=tmp_path / "api", **asked)
    for file in ("requests.csv", "iterations.csv", "itl.csv"):
        assert (tmp_path / "api" / file).read_bytes() == (tmp_path / "cli/normal" / file).read_bytes()
    ours, theirs = (json.loads((tmp_path / name / "meta.json").read_text()) for name in ("api", "cli/normal"))
    assert {**ours, "command": ""} == {**theirs, "command": ""}
    assert ours["command"].startswith(f"workbench.simulate('{sample_path()}', requests=15, loop='normal'")
    read = workbench.load_record(tmp_path / "api")
    assert columns(read) == columns(record) and read.meta == {**record.meta}


def test_requests_and_opened_traces_are_taken_as_files_are(tmp_path):
    from traces.write import write_trace

    write_trace(FEW, tmp_path / "few.jsonl")
    opened = workbench.open_trace(tmp_path / "few.jsonl")
    records = [workbench.simulate(trace) for trace in (str(tmp_path / "few.jsonl"), opened, FEW, iter(FEW))]
    assert len({json.dumps(columns(record)) for record in records}) == 1
    assert len({record.meta["trace"]["sha256"] for record in records}) == 1
    assert [request.arrival_s for request in FEW] == [i / 10 for i in range(8)]


@pytest.mark.parametrize(
    ("trace", "line"),
    [
        (None, "trace: is 'None', which is no file, no trace and no requests"),
        (3, "trace: is '3', which is no file, no trace and no requests"),
        ([1, 2], "requests, [0]: is '1' of type int, not a TraceRequest"),
        ([{"input_length": 3}], "requests, [0]: is "),
        ([], "requests: holds no requests"),
    ],
)
def test_what_is_no_trace_is_said_in_one_line(trace, line):
    with pytest.raises(TraceError) as caught:
        workbench.simulate(trace)
    assert str(caught.value).startswith(line) and "\n" not in str(caught.value)


def test_code_of_ones_own_is_given_as_it_is():
    record = workbench.simulate(FEW, policy=Backwards, cost=Constant, loop=own_loop, max_running=1)
    said = record.meta["settings"]
    assert (said["policy"], said["cost"], said["loop"]) == tuple(
        f"{__name__}:{x}" for x in ("Backwards", "Constant", "own_loop")
    )
    assert np.allclose(record.iterations["end_s"] - record.iterations["start_s"], 0.01)
    assert columns(record) == columns(
        workbench.simulate(FEW, policy=said["policy"], cost=said["cost"], loop="normal", max_running=1)
    )


def test_pools_are_given_as_the_flag_takes_them_or_as_mappings():
    pools = [{"name": "fast", "gpu": "h100", "policy": Backwards}, {"count": np.int64(2), "gpu": "l40s"}]
    record = workbench.simulate(FEW, pool=pools, router="round_robin")
    texts = ("fast=both:1,gpu=h100", "both:2,gpu=l40s")
    assert record.meta["settings"]["pool"] == (f"{texts[0]},policy={__name__}:Backwards", texts[1])
    assert set(record.requests["instance"].tolist()) == {0, 1, 2}
    assert columns(workbench.simulate(FEW, pool=texts)) == columns(record)
    with pytest.raises(ConfigError, match=r"^pool both: cost: cannot load 'nope:C': No module named 'nope'$"):
        workbench.simulate(FEW, pool="both:2,cost=nope:C")


def test_numbers_of_numpy_and_paths_are_settings(tmp_path):
    one = workbench.simulate(FEW, chunk=np.int64(64), slo_ttft=np.float64(0.5), seed=np.int32(3))
    assert one.meta["settings"]["chunk"] == 64 and type(one.meta["settings"]["chunk"]) is int
    whole = workbench.simulate(FEW, chunk=None)
    assert whole.meta["settings"]["chunk"] is None


def test_what_the_command_would_note_is_a_warning(tmp_path):
    with pytest.warns(UserWarning, match="1 of 9 requests can never be served: long with 900 input tokens"):
        workbench.simulate([*FEW, workbench.TraceRequest("long", 1.0, 900, 2)], kv_tokens=800)
    mine = tmp_path / "mine.toml"
    figures = "memory_bytes = 8e10\nmemory_bandwidth = 2e12\nbf16_flops = 3e14\nlink_bandwidth = 3e11\n"
    mine.write_text(figures + "reaches_like = 'h100'\n")
    with pytest.warns(UserWarning, match="reaches_like: is called efficiency_like now"):
        workbench.simulate(FEW, gpu=str(mine))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        workbench.simulate(FEW)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"chunks": 3}, "chunks: no such setting; nearest: chunk"),
        ({"tp": "2"}, "tp: '2' is not int"),
        ({"tp": 0}, "tp: 0 is less than 1"),
        ({"seed": None}, "seed: None is not int"),
        ({"loop": "normal,overlap"}, "loop: 'normal,overlap' names several; a run has one"),
        ({"router": "least_tokens"}, "router: has no effect here: it needs dp of 2 or more"),
        ({"model": "nobody/nothing"}, "unknown model 'nobody/nothing'"),
        ({"cost": Backwards}, f"cost: '{__name__}:Backwards' cannot be made: it has to take (want)"),
        ({"policy": lambda waiting, view: waiting}, "policy: <function <lambda>"),
    ],
)
def test_what_cannot_be_is_one_line(tmp_path, settings, message):
    with pytest.raises(ValueError, match=r"\A[^\n]*\Z") as error:
        workbench.simulate(FEW, out=tmp_path / "out", **settings)
    assert str(error.value).startswith(message)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_something_is_kept(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(ValueError, match="exists and is not empty") as error:
        workbench.simulate(FEW, out=tmp_path)
    assert str(error.value).endswith("(give a new folder, or remove what is in it)"), "a function has no flags"
    with pytest.raises(ValueError, match="arrivals go back"):
        workbench.simulate(FEW[::-1], out=tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"], "a run that fails leaves nothing"
    with pytest.raises(ValueError, match=r"not a run: it holds no meta.json"):
        workbench.load_record(tmp_path)


def test_every_setting_of_the_command_can_be_given():
    for name, declared in settings_of(RunSettings).items():
        try:
            workbench.simulate([], **{name: declared.default})
        except ConfigError as error:  # of those that would have no effect, never of the name
            assert "no such setting" not in str(error), name
        except ValueError as error:
            assert "holds no requests" in str(error), (name, error)
