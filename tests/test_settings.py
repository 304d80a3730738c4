"""A setting is declared once: flags, help, files, checks, records and the running server follow from its field."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from backends.checkpoint.precision import BY_FLAG, DTYPE_BYTES
from tests.serving.server import Server, environment
from traces.trace import ReadAs
from workbench.cli.app import app
from workbench.cli.flags import SettingFlags, command_with, given
from workbench.cli.trace_flags import LENGTHS, TraceFlags
from workbench.loops import LOOPS
from workbench.scheduler.config import CHANGEABLE, ConfigError, SchedulerConfig, SchedulerSettings
from workbench.scheduler.policy import POLICIES
from workbench.scheduler.settings import GROUPS, Setting, check_settings, setting, settings_of
from workbench.search.space import NOT_VARIED, parse_vary
from workbench.serving.serve_settings import ServeSettings
from workbench.settings import idle, loading
from workbench.settings.engines import engine_names
from workbench.settings.loading import SETTINGS, read_settings_file, recorded_settings, settings_from
from workbench.settings.machine import FACTS
from workbench.settings.real import CPU_STEP_TOKENS, device_defaults
from workbench.settings.run_settings import LOOP_NAMES, RunSettings

ROOT = Path(__file__).resolve().parents[1]
SAMPLE = ROOT / "traces/samples/sample.jsonl"
LINE = '    warm_up: int = setting(3, least=0, live=True, help="Steps before the first. Default {default}.")\n'
ASK = """
import json, sys
from typer.testing import CliRunner
from workbench.cli.app import app
answers = []
for words in json.loads(sys.argv[1]):
    done = CliRunner().invoke(app, words, terminal_width=200)
    answers.append([done.exit_code, done.output])
print(json.dumps(answers))
"""


HELPS = [[command, "--help"] for command in ("simulate", "serve", "replay", "sweep", "plan")]


@pytest.fixture(scope="module")
def one_line_more(tmp_path_factory) -> dict[str, str]:
    """The environment of a workbench whose scheduler has one setting more, declared in one line."""
    copy = tmp_path_factory.mktemp("copy")
    shutil.copytree(ROOT / "workbench", copy / "workbench", ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.iterdir():
        if path.is_dir() and (path / "__init__.py").is_file() and path.name not in ("workbench", "tests"):
            (copy / path.name).symlink_to(path)
    config = copy / "workbench/scheduler/config.py"
    before, place, after = config.read_text().partition("    page_size: int = setting(")
    config.write_text(before + LINE + place + after)
    return {"PYTHONPATH": str(copy), "PYTHONSAFEPATH": "1", "COLUMNS": "200"}


def ask(env: dict[str, str], *commands: list[object]) -> list[tuple[int, str]]:
    words = json.dumps([[str(word) for word in command] for command in commands])
    done = subprocess.run(
        [sys.executable, "-c", ASK, words], capture_output=True, text=True, env=environment(**env), check=True
    )
    return [(code, output) for code, output in json.loads(done.stdout)]


def test_a_setting_of_one_line_is_a_flag_a_name_in_files_and_in_records(one_line_more, tmp_path):
    file = tmp_path / "run.toml"
    file.write_text("warm-up = 7\n")
    run = ["simulate", SAMPLE, "--requests", 3, "--json"]
    out, like = tmp_path / "toml", tmp_path / "like"
    answers = ask(
        one_line_more,
        *HELPS,
        [*run, "--config", file, "--out", out],
        [*run, "--like", out / "overlap", "--out", like],
        [*run, "--warm-up", -1],
        [*run, "--warm-up", "soon"],
        ["sweep", SAMPLE, "--requests", 3, "--vary", "warm_up=1,2", "--jobs", 1, "--out", tmp_path / "s", "--json"],
    )
    for _, page in answers[: len(HELPS)]:
        panel = page.partition("─ Scheduler ─")[2].partition("─ Model and hardware ─")[0]
        assert re.search(r"--warm-up +<int> +Steps before the first\. Default 3\.", panel), page
    (toml, _), (liked, _), (bad, refused), (mistyped, said), (swept, _) = answers[len(HELPS) :]
    assert (toml, liked, swept) == (0, 0, 0)
    assert (bad, refused) == (2, "error: warm_up: -1 is less than 0\n")
    assert mistyped == 2 and "--warm-up" in said
    for folder in (out, like):
        assert json.loads((folder / "overlap/meta.json").read_text())["settings"]["warm_up"] == 7
    rows = (tmp_path / "s/results.csv").read_text().splitlines()
    column = rows[0].split(",").index("warm_up")
    assert [row.split(",")[column] for row in rows[1:]] == ["1", "2"]


@pytest.mark.server
def test_a_setting_of_one_line_changes_in_a_running_server(one_line_more):
    server = Server("--warm-up", "4", **one_line_more)
    try:
        assert server.http.get("/state").json()["settings"]["warm_up"] == 4
        assert server.http.post("/settings", json={"warm_up": 5}).json()["settings"]["warm_up"] == 5
        refused = server.http.post("/settings", json={"warm_up": -1})
        assert refused.status_code == 400 and "warm_up: -1 is less than 0" in refused.text
    finally:
        server.kill()


def page_of(command: str) -> dict[str, str]:
    """The panels of a help page, each as one line."""
    page = CliRunner().invoke(app, [command, "--help"], terminal_width=250, env={"COLUMNS": "250"}).output
    panels = re.findall(r"╭─ (.+?) ─+╮\n(.*?)╰", page, re.S)
    return {title: " ".join(text.replace("│", " ").split()) for title, text in panels}


@pytest.mark.parametrize(
    ("command", "without"),
    [
        ("simulate", set()),
        ("sweep", set()),
        ("plan", {"rate"}),  # its own: the rate to carry
        (
            "replay",
            {"dp", "pool", "ep", "router", "kv_dtype", "kv_windows", "cost", "expert_skew", "exact"}
            | {"front_end", "fail", "autoscale", "kv_link", "kv_link_latency", "kv_link_per"}
            | set(FACTS)
            | {"machine", "nodes", "expert_exchange"},
        ),
        (
            "serve",
            {"model", "exact", "requests", "rate", "speedup", "concurrency", "front_end", "fail", "autoscale"}
            | {"kv_link", "kv_link_latency", "kv_link_per"},
        ),
    ],
)
def test_a_help_page_has_every_setting_in_its_group_with_its_words(command, without):
    panels = page_of(command)
    shown = [title for title in panels if title in GROUPS]
    assert shown == list(GROUPS), "Run, Scheduler, Model and hardware, Trace, behind panels of the command's own"
    assert all(title in GROUPS for title in list(panels)[list(panels).index(GROUPS[0]) :])
    flags = set(re.findall(r"--[a-z-]+", " ".join(panels[group] for group in GROUPS)))
    for name, declared in SETTINGS.items():
        if name in without:
            continue
        words = " ".join(declared.described.split())
        assert declared.option in flags and words in panels[declared.group], (name, panels[declared.group])
        for other in set(panels) - {declared.group}:
            assert f"{declared.option} " not in panels[other].replace("--loop overlaps", "")
    first = [declared for declared in SETTINGS.values() if declared.first and declared.name not in without]
    assert all(panels[declared.group].startswith(declared.option) for declared in first)
    assert not {SETTINGS[name].option for name in without - {"model", "rate"}} & flags


def test_help_pages_wait_for_no_array():
    ran = subprocess.run(
        [
            sys.executable,
            "-c",
            ASK + "print('numpy' in sys.modules)",
            json.dumps([["--help"], ["route", "--help"], *HELPS]),
        ],
        capture_output=True,
        text=True,
        env=environment(),
        check=True,
    )
    pages, loaded = ran.stdout.splitlines()
    assert [code for code, _ in json.loads(pages)] == [0] * (2 + len(HELPS)) and loaded == "False"


def test_every_default_is_said_on_the_help_page_and_only_there_by_its_declaration():
    for name, declared in {**SETTINGS, **settings_of(SchedulerConfig)}.items():
        if declared.default not in (None, False):
            assert "{default}" in declared.help or name == "engine", name
        assert "{" not in declared.described


def test_no_word_of_a_help_text_is_cut_off_in_a_narrow_terminal():
    declared = [*SETTINGS.values(), *settings_of(ServeSettings).values()]
    words = {word for text in [LENGTHS, *(one.described for one in declared)] for word in text.split()}
    assert [word for word in words if len(word) > 26] == []


def test_what_help_pages_list_by_hand_is_what_there_is():
    assert SETTINGS["policy"].help.startswith(" | ".join([*POLICIES, "module:Class"]))
    assert " | ".join(engine_names()) in SETTINGS["engine"].help
    assert set(SETTINGS["dtype"].choices) == {"auto", *DTYPE_BYTES}
    assert set(SETTINGS["dtype"].choices) <= set(re.findall(r"\w+", SETTINGS["dtype"].help))
    assert set(SETTINGS["kv_dtype"].choices) < {"auto", *DTYPE_BYTES}
    assert set(LOOP_NAMES) == set(LOOPS)
    for name in device_defaults("cpu"):
        assert f"a real model on a CPU: {CPU_STEP_TOKENS}" in SETTINGS[name].help
    assert SETTINGS["dtype"].option == BY_FLAG  # how a record says who chose the weights' dtype


OTHER: dict[str, Any] = {
    "policy": "lpm",
    "engine": "vllm-0.19.0",
    "loop": "normal",
    "model": "llama-3.1-8b",
    "gpu": "a100",
    "front_end": "mine.toml",
    "cost": "fitted:costs.json",
    "mem_fraction": 0.5,
    "link": "16GB/s",
    "link_latency": "20us",
    "node_link": "400Gbit/s",
    "node_link_latency": "1.5ms",
    "pool": ("both:2",),
    "fail": ("both.0:at=3s",),
    "autoscale": ("both:max=3",),
    "kv_link": "16GB/s",
    "kv_link_latency": "5us",
}


def other_value(declared: Setting) -> Any:
    """A value that is not the default and that the bounds allow."""
    if declared.name in OTHER:
        return OTHER[declared.name]
    if declared.choices:
        return next(choice for choice in declared.choices if choice != declared.default)
    if declared.kind is bool:
        return not declared.default
    return declared.kind((declared.default or 0) + 2)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_value_means_the_same_as_a_flag_in_a_file_in_a_sweep_and_in_a_record(name, tmp_path):
    declared = SETTINGS[name]
    for value in [other_value(declared), *([None] if declared.zero_is_none else [])]:
        words = declared.written(value)
        assert words[0].startswith("--") and len(words) == (1 if declared.kind is bool else 2)
        text = words[-1] if declared.kind is not bool else str(value).lower()
        assert declared.parse(text) == value
        file = tmp_path / "run.toml"
        file.write_text(
            f"{name.replace('_', '-')} = {json.dumps(json.loads(text) if declared.kind in (int, float, bool) else text)}\n"
        )
        assert read_settings_file(file) == {name: value}
        if name not in NOT_VARIED:
            assert parse_vary([f"{name}={text}"])[0].grid() == (value,)
        meta = {"settings": {name: value}, "weights": {"said_by": "--dtype"}}
        assert recorded_settings(meta, "record") == {name: value}


def test_the_flags_of_a_trace_are_the_fields_of_what_reads_it():
    fields = {field.name: field.default for field in dataclasses.fields(ReadAs)}
    del fields["ordered"], fields["seed"]  # the run's: whether arrivals count, and its seed
    assert {name: default for name, (_, default) in TraceFlags().declared().items()} == fields


def test_nothing_but_its_declaration_names_a_setting_on_its_way_from_the_flag_to_the_record():
    """A setting's name stands in config.py; the flag, the settings of the run and the record are made by these three."""
    assert SETTINGS["chunk"] is settings_of(RunSettings)["chunk"]
    way = ("cli/flags.py", "settings/loading.py", "recording/meta_parts.py")
    for file in (*way, "cli/simulate.py", "cli/options.py", "settings/run_settings.py", "cluster/simulate.py"):
        assert not re.search(r"\bchunk\b", (ROOT / "workbench" / file).read_text()), file


def test_nothing_is_out_of_reach_of_a_flag():
    for name, declared in SETTINGS.items():
        if declared.optional and declared.default is not None:
            assert declared.zero_is_none, f"{name}: no flag says that there is none"
    assert settings_from(None, {"max_passed_over": 0}).max_passed_over is None
    assert settings_from(None, {"chunk": 0, "engine": "vllm-0.19"}).chunk is None


def test_the_scheduler_and_a_run_share_their_fields_and_their_checks():
    shared = {field.name for field in dataclasses.fields(SchedulerSettings)}
    assert shared == set(settings_of(SchedulerSettings)) < set(SETTINGS)
    settings = RunSettings(chunk=512, policy="lpm", queue_timeout=2.0)
    config = settings.scheduler(kv_tokens=1000, max_context=5000, slots=1)
    assert {name: getattr(config, name) for name in shared} == {name: getattr(settings, name) for name in shared}
    assert (config.kv_tokens, config.max_context) == (1000, 1001)
    with pytest.raises(ConfigError, match=r"^queue_timeout: -1 is not positive and finite$"):
        RunSettings(queue_timeout=-1)
    assert {name for name, declared in settings_of(SchedulerConfig).items() if declared.live} == set(CHANGEABLE)


@dataclasses.dataclass(frozen=True)
class Renamed:
    """Settings of which two had other names."""

    step_tokens: int | None = setting(8, least=1, zero_is_none=True, aliases=("chunk_tokens",), help="Tokens.")
    eager: bool = setting(True, aliases=("hasty",), help="Eager.")
    share: float = setting(0.5, above=0, most=1, help="Share.")

    def __post_init__(self) -> None:
        check_settings(self)


def test_a_flag_that_was_renamed_goes_on_working_with_a_note():
    found: list[dict[str, Any]] = []
    renamed = typer.Typer()

    @renamed.command(cls=command_with(SettingFlags("tests.test_settings:Renamed")))
    def command(ctx: typer.Context) -> None:
        found.append(given(ctx, "settings"))

    def run(*words: str) -> tuple[int, str]:
        done = CliRunner().invoke(renamed, words)
        return done.exit_code, done.output

    assert run("--chunk-tokens", "16") == (
        0,
        "note: --chunk-tokens is called --step-tokens now; the next version no longer knows it\n",
    )
    assert run("--no-hasty")[1] == "note: --hasty is called --eager now; the next version no longer knows it\n"
    assert run("--step-tokens", "4") == (0, "")
    assert found == [
        {"step_tokens": 16, "eager": None, "share": None},
        {"step_tokens": None, "eager": False, "share": None},
        {"step_tokens": 4, "eager": None, "share": None},
    ]
    code, said = run("--chunk-tokens", "16", "--step-tokens", "4")
    assert code == 2 and "--chunk-tokens is what --step-tokens was: give one" in said
    assert "--chunk-tokens" not in run("--help")[1]


def test_a_name_in_a_file_a_sweep_or_a_record_that_was_renamed_goes_on_working_with_a_note(tmp_path, monkeypatch):
    monkeypatch.setitem(loading.FORMER, "chunk_tokens", "chunk")
    file = tmp_path / "run.toml"
    file.write_text("chunk-tokens = 0\n")
    assert settings_from(file, {}).chunk is None
    assert idle.check_effects(settings_from(file, {}), {}, file) == [
        f"{file}: chunk_tokens: is called chunk now; the next version no longer knows it"
    ]
    assert recorded_settings({"settings": {"chunk_tokens": 64}}, "record") == {"chunk": 64}
    assert parse_vary(["chunk_tokens=64,128"])[0].name == "chunk"
    words = ["sweep", SAMPLE, "--vary", "chunk-tokens=64", "--requests", 2, "--config", file, "--out", tmp_path / "s"]
    done = CliRunner().invoke(app, [*map(str, words), "--jobs", "1", "--json"])
    assert (done.exit_code, done.stderr.splitlines()) == (
        0,
        [
            f"note: {file}: chunk_tokens: is called chunk now; the next version no longer knows it",
            "note: vary: chunk_tokens: is called chunk now; the next version no longer knows it",
        ],
    )
    file.write_text("chunk-tokens = 64\nchunk = 32\n")
    with pytest.raises(ConfigError, match="given twice"):
        read_settings_file(file)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"share": 0}, "share: 0 is not between 0 and 1"),
        ({"share": float("nan")}, "share: nan is not between 0 and 1"),
        ({"step_tokens": 0}, "step_tokens: 0 is less than 1"),
    ],
)
def test_a_value_out_of_bounds_is_refused_in_one_line_that_names_it(settings, line):
    with pytest.raises(ConfigError) as caught:
        Renamed(**settings)
    assert str(caught.value) == line


@pytest.mark.parametrize(
    "text", ["chunk = -1", "mem-fraction = nan", "slo_ttft = 0", 'router = "foo"', "max-running = 0"]
)
def test_a_value_out_of_bounds_names_the_file_that_it_stands_in(tmp_path, text):
    file = tmp_path / "run.toml"
    file.write_text(text)
    name = text.split()[0].replace("-", "_")
    with pytest.raises(ConfigError, match=f"^{re.escape(str(file))}: {name}: "):
        settings_from(file, {})


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--kv-tokens", 3 * 10**9], f"kv_tokens: {3 * 10**9} are more than 2147483647 pages"),
        (["--kv-tokens", 10**30], f"kv_tokens: {10**30} are more than 2147483647 pages"),
        (
            ["--pp", 2, "--micro-batches", 10**10],
            f"micro_batches: {10**10} is more than the 256 requests that may run (max_running)",
        ),
    ],
)
def test_a_number_that_nothing_can_hold_is_refused_by_its_name(tmp_path, monkeypatch, words, line):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["simulate", str(SAMPLE), *map(str, words)])
    assert (done.exit_code, done.stderr) == (2, f"error: {line}\n")
    assert not any(tmp_path.iterdir())


def test_more_requests_than_any_trace_has_are_all_of_them(tmp_path):
    trace = tmp_path / "t.jsonl"
    trace.write_text("".join(SAMPLE.read_text().splitlines(keepends=True)[:5]))
    done = CliRunner().invoke(
        app, ["simulate", str(trace), "--requests", str(10**30), "--json", "--out", str(tmp_path / "o")]
    )
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["runs"]["overlap"]["metrics"]["requests_finished"] == 5


def test_no_command_looks_into_its_own_frame_or_rewrites_a_signature():
    for path in (ROOT / "workbench/cli").rglob("*.py"):
        assert not re.search(r"\blocals\(\)|__signature__|\bimport inspect\b", path.read_text()), path
