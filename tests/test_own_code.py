"""Policies, cost models, loops, routers and trace formats of one's own: named by module:Name, looked at before they run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from backends.simulated.cost.cost_request import CostRequest
from tests.scheduler.by_hand import scheduler
from tests.world import LinearCost
from traces import TraceRequest, sample_path
from workbench.cli.app import app
from workbench.loops import LOOPS, find_loop
from workbench.loops.drive import drive
from workbench.loops.normal import normal_loop
from workbench.loops.pipeline import pipeline_loop
from workbench.scheduler.messages import SetState
from workbench.scheduler.policy import Policy
from workbench.scheduler.settings import ConfigError
from workbench.settings.run_settings import LOOP_NAMES, RunSettings

HERE = __name__


class OwnCost(LinearCost):
    """A hundredth of a second a step, whatever is in it."""

    def __init__(self, want: CostRequest) -> None:
        super().__init__(prefill_token_s=0.0)
        self.want = want


class FastCost(OwnCost):
    """The same, many steps at once."""

    def decodes(self, batch, steps):
        return [self.forward(batch)] * steps


class GroupCost(OwnCost):
    """Steps that instances take together last two hundredths."""

    def group_forward(self, batches):
        assert len(batches) == 2 and any(batch is not None for batch in batches)
        return 0.02


class OtherGroup(OwnCost):
    def group_forward(self):
        return 0.02


class WithoutTransfers:
    def __init__(self, want):
        pass

    def forward(self, batch, stage=0):
        return 0.01


class OtherForward(OwnCost):
    def forward(self, batch):
        return 0.01


class Backwards(OwnCost):
    def forward(self, batch, stage=0):
        return -0.01


class Undefined(OwnCost):
    def forward(self, batch, stage=0):
        return None


class ShortDecodes(OwnCost):
    def decodes(self, batch, steps):
        return [0.01]


class MadeOfNothing:
    def __init__(self):
        pass


def own_normal(scheduler, backend, inbox, outbox):
    """As the normal loop does it."""
    yield from normal_loop(scheduler, backend, inbox, outbox)


def own_pipeline(scheduler, backend, inbox, outbox):
    yield from pipeline_loop(scheduler, backend, inbox, outbox)


def no_generator(scheduler, backend, inbox, outbox):
    return None


def of_two(scheduler, backend):
    yield


class NewestFirst(Policy):
    def order(self, waiting, view):
        return waiting[::-1]


class LastOnly:
    """Everything to the last instance."""

    def __init__(self, instances):
        self.instances = instances

    def choose(self, prompt, namespace=""):
        assert prompt.dtype == np.int32 and isinstance(namespace, str)
        return self.instances - 1

    def ended(self, instance, prompt_tokens):
        assert instance == self.instances - 1 and prompt_tokens > 0


class Elsewhere(LastOnly):
    def choose(self, prompt, namespace=""):
        return self.instances


class Columns:
    """Lines of `seconds prompt output`."""

    time_unit = "s"
    notes = ("lines of three numbers",)

    def read(self, reading):
        for number, line in reading.source.lines():
            arrival, prompt, output = line.split()
            yield TraceRequest(f"c{number}", float(arrival), int(prompt), int(output), line=number)


class Strings(Columns):
    def read(self, reading):
        return ["a request"]


class Empty(Columns):
    def read(self, reading):
        yield TraceRequest("a", 0.0, 0, 3)


class Unreadable:
    pass


class NoRouter:
    def __init__(self, instances):
        pass


def simulate(out: Path, *words: str, code: int = 0) -> str:
    """What the command prints; its records are in ``out``."""
    done = CliRunner().invoke(app, ["simulate", str(sample_path()), "--requests", "12", "--out", str(out), *words])
    assert done.exit_code == code, done.output
    return done.output


def tables(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.csv")}


def meta(folder: Path) -> dict:
    return json.loads((folder / "meta.json").read_text())


@pytest.mark.parametrize("name", ["OwnCost", "FastCost"])
def test_a_cost_model_of_ones_own_gives_the_times_of_a_run(tmp_path, name):
    simulate(tmp_path, "--cost", f"{HERE}:{name}")
    rows = np.genfromtxt(tmp_path / "overlap/iterations.csv", delimiter=",", names=True, dtype=None, encoding=None)
    assert np.allclose(rows["end_s"] - rows["start_s"], 0.01)
    assert meta(tmp_path / "overlap")["settings"]["cost"] == f"{HERE}:{name}"


TOGETHER = ("--model", "Qwen/Qwen3-30B-A3B", "--dp", "2", "--ep", "2")
"""Two instances that share their experts."""


def test_a_cost_model_of_ones_own_gives_the_times_of_steps_taken_together(tmp_path):
    simulate(tmp_path, "--cost", f"{HERE}:GroupCost", *TOGETHER)
    rows = np.genfromtxt(tmp_path / "overlap/iterations.csv", delimiter=",", names=True, dtype=None, encoding=None)
    assert np.allclose(rows["end_s"] - rows["start_s"], 0.02) and set(rows["instance"]) == {0, 1}


@pytest.mark.parametrize(
    "name, why",
    [
        ("OwnCost", "'{}' has no times of steps that instances take together (ep 2)"),
        ("OtherGroup", "'{}' has a group_forward that does not take (batches)"),
    ],
)
def test_a_cost_model_without_times_of_steps_taken_together_is_refused_for_them(tmp_path, name, why):
    said = simulate(tmp_path, "--cost", f"{HERE}:{name}", *TOGETHER, code=2)
    assert said == f"error: cost: {why.format(f'{HERE}:{name}')}\n"


def test_a_loop_of_ones_own_runs_beside_the_others_and_is_called_what_it_is(tmp_path):
    simulate(tmp_path, "--loop", f"normal,{HERE}:own_normal")
    mine = tmp_path / f"{HERE}.own_normal"
    assert tables(mine) == tables(tmp_path / "normal")
    assert meta(mine)["name"] == meta(mine)["settings"]["loop"] == f"{HERE}:own_normal"
    assert CliRunner().invoke(app, ["report", str(tmp_path)]).exit_code == 0


def test_a_loop_of_ones_own_may_run_several_stages(tmp_path):
    simulate(tmp_path, "--pp", "2", "--micro-batches", "3", "--loop", f"pipeline,{HERE}:own_pipeline", "--decisions")
    assert tables(tmp_path / f"{HERE}.own_pipeline") == tables(tmp_path / "pipeline")
    assert meta(tmp_path / f"{HERE}.own_pipeline")["settings"]["pp"] == 2


def test_a_router_of_ones_own_chooses_the_instances(tmp_path):
    simulate(tmp_path, "--dp", "3", "--router", f"{HERE}:LastOnly")
    rows = np.genfromtxt(tmp_path / "overlap/requests.csv", delimiter=",", names=True, dtype=None, encoding=None)
    assert set(rows["instance"]) == {2}
    assert meta(tmp_path / "overlap")["settings"]["router"] == f"{HERE}:LastOnly"


def test_a_trace_format_of_ones_own_is_read_by_every_command(tmp_path):
    (tmp_path / "mine.txt").write_text("10 100 5\n10.5 200 3\n12 50 9\n")
    run = lambda *words: CliRunner().invoke(app, [*words])  # noqa: E731
    mine = ("--format", f"{HERE}:Columns")
    told = run("trace", "describe", str(tmp_path / "mine.txt"), *mine, "--json")
    assert json.loads(told.output)["requests"] == 3, told.output
    assert run("simulate", str(tmp_path / "mine.txt"), *mine, "--out", str(tmp_path / "run")).exit_code == 0
    rows = np.genfromtxt(tmp_path / "run/overlap/requests.csv", delimiter=",", names=True, dtype=None, encoding=None)
    assert rows["arrival_s"].tolist() == [0.0, 0.5, 2.0] and rows["output_tokens"].tolist() == [5, 3, 9]
    said = meta(tmp_path / "run/overlap")["trace"]
    assert said["format"] == f"{HERE}:Columns" and "lines of three numbers" in said["notes"]
    swept = run(
        *("sweep", str(tmp_path / "mine.txt"), *mine, "--vary", "chunk=16,32", "--jobs", "1"),
        *("--out", str(tmp_path / "sweep")),
    )
    assert swept.exit_code == 0, swept.output


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Missing", "format: cannot load '{}': module"),
        ("Unreadable", "format: '{}' has no read(reading)"),
        ("Strings", "{file}, [0]: is 'a request' of type str, not a TraceRequest"),
        ("Empty", "{file}, [0].input_length: is 0; a request has at least 1 token"),
        ("Columns", "{file}, line 2: arrivals go back: 1 s after 10 s on line 1; --sort orders by arrival"),
    ],
)
def test_a_format_that_cannot_be_read_is_one_line(tmp_path, name, message):
    file = tmp_path / "mine.txt"
    file.write_text("10 100 5\n1 200 3\n")
    out = tmp_path / "out"
    done = CliRunner().invoke(app, ["simulate", str(file), "--format", f"{HERE}:{name}", "--out", str(out)])
    assert done.exit_code == 2 and not out.exists()
    assert f"error: {message.format(f'{HERE}:{name}', file=file)}" in done.output


def test_a_settings_file_and_a_record_name_own_code_as_flags_do(tmp_path):
    config = tmp_path / "run.toml"
    config.write_text(f'cost = "{HERE}:OwnCost"\nloop = "{HERE}:own_normal"\n')
    simulate(tmp_path / "a", "--config", str(config))
    simulate(tmp_path / "b", "--like", str(tmp_path / f"a/{HERE}.own_normal"))
    assert tables(tmp_path / f"a/{HERE}.own_normal") == tables(tmp_path / f"b/{HERE}.own_normal")


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("cost", "roofline:x", "roofline takes nothing after it, not 'x'; a file is profile:PATH or fitted:PATH"),
        ("cost", "measured:x", "measured takes nothing after it, not 'x'; a file is profile:PATH or fitted:PATH"),
        ("cost", "roof", "'roof' is not one of roofline, measured, profile:PATH, fitted:PATH, module:Class"),
        ("cost", "no.such:C", "cannot load 'no.such:C': No module named 'no'"),
        ("cost", f"{HERE}:Missing", f"cannot load '{HERE}:Missing': module '{HERE}' has no attribute 'Missing'"),
        ("cost", f"{HERE}:simulate", f"'{HERE}:simulate' is no class"),
        ("cost", f"{HERE}:MadeOfNothing", f"'{HERE}:MadeOfNothing' cannot be made: it has to take (want)"),
        ("cost", f"{HERE}:WithoutTransfers", f"'{HERE}:WithoutTransfers' has no transfer_s(batch, stage)"),
        ("cost", f"{HERE}:OtherForward", f"'{HERE}:OtherForward' has a forward that does not take (batch, stage)"),
        ("cost", f"{HERE}:Backwards", f"{HERE}:Backwards.forward returned -0.01, which is no number of seconds"),
        ("cost", f"{HERE}:Undefined", f"{HERE}:Undefined.forward returned None, which is no number of seconds"),
        ("cost", f"{HERE}:ShortDecodes", f"{HERE}:ShortDecodes.decodes returned 1 times for "),
        ("loop", "nromal", "'nromal' is not one of normal, overlap, pipeline, nor module:function"),
        ("loop", "no_such_module:f", "cannot load 'no_such_module:f': No module named 'no_such_module'"),
        ("loop", f"{HERE}:no_generator", f"'{HERE}:no_generator' is no generator function: a loop yields"),
        ("loop", f"{HERE}:of_two", f"'{HERE}:of_two' has to take (scheduler, backend, inbox, outbox)"),
        (
            "router",
            "sticky",
            "'sticky' is not one of round_robin, least_requests, least_tokens, cache_aware, expected_ttft, nor module",
        ),
        ("router", f"{HERE}:NoRouter", f"'{HERE}:NoRouter' has no choose(prompt, namespace)"),
        ("router", f"{HERE}:Elsewhere", f"{HERE}:Elsewhere.choose returned 2, which is none of the instances 0 to 1"),
        ("policy", f"{HERE}:LastOnly", f"'{HERE}:LastOnly' is not a subclass of workbench.scheduler.policy.Policy"),
    ],
)
def test_what_is_of_no_use_is_refused_in_one_line(tmp_path, flag, value, message):
    more = ["--dp", "2"] if flag == "router" else []
    said = simulate(tmp_path / "out", f"--{flag}", value, *more, code=2)
    (line,) = [line for line in said.splitlines() if line.startswith("error:")]
    assert line.startswith(f"error: {flag}: {message}"), line
    assert not (tmp_path / "out").exists()


def test_an_error_inside_a_module_is_said_with_its_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, text, said in (
        ("own_broken", "import json\n\nLIMIT = undefined_name\n", "NameError: name 'undefined_name' is not defined"),
        ("own_misspelt", "x = 1\ndef f(:\n", "invalid syntax"),
        ("own_leaves", "import sys\nsys.exit('bye')\n", "SystemExit: bye"),
        ("own_imports", "\nimport no_such_package\n", "No module named 'no_such_package'"),
    ):
        Path(f"{name}.py").write_text(text)
        with pytest.raises(ConfigError) as error:
            find_loop(f"{name}:f")
        line = str(error.value)
        assert line.startswith(f"loop: cannot load '{name}:f': ") and said in line and "\n" not in line
        assert f"{name}.py, line " in line


def test_modules_of_the_current_folder_are_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("own_here.py").write_text("def loop(scheduler, backend, inbox, outbox):\n    yield\n")
    assert find_loop("own_here:loop").__name__ == "loop"


def test_names_of_loops_are_those_that_settings_know():
    assert tuple(LOOPS) == LOOP_NAMES


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loop": f"{HERE}:of_two"}, f"loop: '{HERE}:of_two' has to take"),
        ({"policy": f"{HERE}:LastOnly"}, f"policy: '{HERE}:LastOnly' is not a subclass"),
    ],
)
def test_a_real_runner_refuses_code_that_is_of_no_use_before_it_loads_a_model(settings, message):
    pytest.importorskip("torch")
    from workbench.cluster.device import runner_options

    run = RunSettings(model="no such folder", **settings)
    with pytest.raises(ConfigError, match="^" + message):
        runner_options(run, run.loops[0], "cpu")


def test_a_message_to_a_running_scheduler_names_no_code():
    running = scheduler(policy=f"{HERE}:NewestFirst")
    for settings, said in (
        ({"policy": f"{HERE}:Other"}, f"policy: '{HERE}:Other' is not one of fcfs"),
        ({"policy": "os:system"}, "policy: 'os:system' is not one of fcfs"),
        ({"cost": f"{HERE}:OwnCost"}, "cost: cannot be changed while the scheduler runs"),
        ({"loop": f"{HERE}:own_normal"}, "loop: cannot be changed while the scheduler runs"),
        ({"policy": "lpm"}, None),
        ({"policy": f"{HERE}:NewestFirst"}, None),  # which whoever started it has named
    ):
        told: list[str | None] = []
        running.receive([SetState(settings, told.append)])
        assert len(told) == 1
        assert told[0] is None if said is None else str(told[0]).startswith(said), told


class NoOrder(Policy):
    def order(self, waiting, view):
        return None


class FailingOrder(Policy):
    def order(self, waiting, view):
        raise KeyError("deep")


class FailingRouter:
    def __init__(self, instances):
        pass

    def choose(self, prompt, namespace=""):
        raise ZeroDivisionError("deeper")

    def ended(self, instance, prompt_tokens):
        pass


class Failing(Columns):
    def read(self, reading):
        raise IndexError("deepest")


class NoRequests(Columns):
    def read(self, reading):
        return 3


def yields_no_wait(scheduler, backend, inbox, outbox):
    yield 5


def ends(scheduler, backend, inbox, outbox):
    yield inbox.arrival()


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("policy", "NoOrder", r"policy: NoOrder\.order did not return a permutation of the waiting queue"),
        ("policy", "FailingOrder", r"KeyError: 'deep' \(.*test_own_code\.py, line \d+\)"),
        ("router", "FailingRouter", r"ZeroDivisionError: deeper \(.*test_own_code\.py, line \d+\)"),
        ("format", "Failing", r"IndexError: deepest \(.*test_own_code\.py, line \d+\)"),
        ("format", "NoRequests", r".*sample\.jsonl: is read as '3', which is no requests"),
        ("loop", "yields_no_wait", r"TypeError: 5 is nothing to wait for .*\(.*test_own_code\.py, line \d+\)"),
        ("loop", "ends", rf"loop: '{HERE}:ends' ended; a loop goes on for ever"),
    ],
)
def test_what_fails_in_the_middle_of_a_run_is_one_line_too(tmp_path, flag, value, message):
    words = ["--dp", "2"] if flag == "router" else []
    said = simulate(tmp_path / "out", f"--{flag}", f"{HERE}:{value}", *words, code=2)
    (line,) = [line for line in said.splitlines() if line.startswith("error:")]
    assert re.fullmatch(f"error: {message}", line), line
    assert "Traceback" not in said and not (tmp_path / "out").exists()


def test_a_real_run_says_in_its_loop_what_is_no_wait():
    loop = yields_no_wait(None, None, None, None)
    with pytest.raises(TypeError, match="5 is nothing to wait for") as caught:
        drive(loop)
    assert caught.traceback[-1].name == "yields_no_wait"


def test_a_trace_is_opened_in_a_format_of_ones_own_by_its_class_or_its_name(tmp_path):
    import workbench

    file = tmp_path / "mine.txt"
    file.write_text("0.0 50 5\n0.5 60 6\n")
    for format in (Columns, f"{HERE}:Columns"):
        opened = workbench.open_trace(file, format=format)
        assert [request.input_length for request in opened] == [50, 60]
        assert opened.info.format == f"{HERE}:Columns"
