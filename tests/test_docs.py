"""Every command line of docs/*.md is one that the command line takes, and those that need little are run."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import typer.main
from typer.testing import CliRunner

import workbench
from tests.cost.profiles import MODEL, linear_profile
from tests.reports.results_of_tools import vllm, written
from tests.serving.server import Server
from workbench.cli.app import app

ROOT = Path(__file__).resolve().parents[1]
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NOT_RUN = {
    "workbench replay TRACE --model FOLDER --backend cpu|cuda --loop normal,overlap": "a real model: tests/live",
    "workbench serve MODEL --backend auto|cpu|cuda|simulated": "a server for good: tests/serving",
    "workbench serve llama-3.1-8b --backend simulated --gpu h100 --port 8000": "the server of the tests below",
    "workbench serve llama-3.1-8b --backend simulated --record runs/monday --no-record-content": "tests/serving",
    "workbench serve llama-3.1-8b --backend simulated --engine vllm-0.24 --policy priority": "tests/search",
    "workbench serve --like runs/found/overlap --backend simulated": "tests/search/test_both_ends.py",
    "workbench simulate runs/monday/trace.jsonl --loop normal,overlap": "tests/serving/test_record.py",
    "workbench serve llama-3.1-8b --backend simulated --port 8001": "before a router: tests/routing/test_route_command.py",
    "workbench serve llama-3.1-8b --backend simulated --port 8002": "the same",
    "workbench route --worker http://127.0.0.1:8001 --worker http://127.0.0.1:8002 --router cache_aware": "the same",
    "workbench serve llama-3.1-8b --backend simulated --role prefill --port 8003": "the same",
    "workbench serve llama-3.1-8b --backend simulated --role decode --port 8004": "the same",
    "workbench route --prefill http://127.0.0.1:8003 --decode http://127.0.0.1:8004 --router cache_aware "
    "--decode-router least_requests": "the same",
    "workbench route --worker URL --worker URL --router cache_aware": "the same",
    "workbench serve MODEL --tool-parser hermes --reasoning-parser qwen3": "tests/serving/test_tools.py",
    "workbench serve MODEL --tp 8 --pp 2 --nodes 2 --node-rank 0 --rendezvous 10.0.0.1:29500": "two machines: "
    "tests/serving/test_nodes.py",
    "workbench serve MODEL --tp 8 --pp 2 --nodes 2 --node-rank 1 --rendezvous 10.0.0.1:29500": "two machines: "
    "tests/serving/test_nodes.py",
    "workbench serve llama-3.1-8b --backend simulated --pool both:1 --pool small=both:2,gpu=l40s --router least_requests "
    "--record runs/fleet": "several servers: tests/fleet/test_fleet_server.py",
    "workbench serve MODEL-FP8": "a checkpoint in FP8: tests/torch/test_fp8.py",
    "workbench serve MODEL --dtype fp8": "a real model: tests/torch/test_fp8.py",
    "workbench calibrate --links --backend cpu|cuda --out here.toml [--ranks N]": "tests/live/test_calibrate_links.py",
    "workbench calibrate --front-end --out here.toml [--tokenizer FOLDER]": "tests/live/test_calibrate_front_end.py",
    "workbench calibrate MODEL --backend cpu|cuda --out FOLDER": "minutes: tests/live/test_calibrate.py",
    "workbench calibrate MODEL --backend cpu|cuda --out costs.json [--tp N]": "minutes: tests/live/test_calibrate.py",
    "workbench replay trace.jsonl --model FOLDER --backend cpu --loop normal,overlap "
    "--decisions": "a real model: tests/live/test_replay_command.py",
    "workbench observe http://127.0.0.1:8000 --trace TRACE --out observed [--model NAME] "
    "[--concurrency N | --rate R | --speedup X]": "a server: tests/live/test_observe.py",
    "workbench compare observed sim/overlap": "what observe has left: tests/live/test_observe.py",
    "workbench calibrate --from runs/gpu/calibration.points --out h200": "tests/torch/test_gpu_script.py",
    "workbench simulate runs/gpu/fidelity/trace-80.jsonl --like runs/gpu/fidelity/80-overlap-1 "
    "--cost profile:h200 --out sim": "tests/torch/test_gpu_script.py",
    "workbench compare runs/gpu/fidelity/80-overlap-1 sim/overlap": "tests/torch/test_gpu_script.py",
}
"""Lines that are only parsed, and why."""
ELSEWHERE = {"sweep", "plan"}
"""Run from the text of docs/sweep-and-plan.md by tests/search/test_pages.py."""
PLACES = {
    "PATH": "profile",
    "FOLDER": "profile",
    "RECORD": "runs/a/overlap",
    "TRACE": "trace.jsonl",
    "MODEL": "model",
    "FILE": "trace.jsonl",
    "MEASURED": "measured",
    "RESULT": "vllm.json",
    "N": "4096",
    "R": "2",
    "X": "2",
}


def python_blocks(document: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", document.read_text(), re.M | re.S)


def lines(document: Path) -> list[str]:
    """The commands of a page, as written but for what explains them behind three spaces or more."""
    found = re.findall(r"^ *(?:\$ )?(workbench .*)$", document.read_text().replace("\\\n", " "), re.M)
    # Of a paragraph, a line may begin with the name of the project: a command is indented or fenced.
    found = [
        line
        for line in found
        if re.search(rf"^(?: {{4,}}|\$ ){re.escape(line)}$", document.read_text(), re.M)
        or f"\n{line}\n" in "".join(re.findall(r"```\w*(\n.*?\n)```", document.read_text(), re.S))
    ]
    return [" ".join(re.sub(r" {3,}(?=[^ \[]).*", "", line).split()) for line in found]


def written_out(line: str) -> list[str]:
    """The commands that a line stands for: without what is in brackets, and with each of it; each of ``a|b``."""
    line = line.removesuffix(" ...")
    bare = re.sub(r" ?\[[^]]*\]", "", line)
    found = [bare]
    for options in re.finditer(r"( ?)\[([^]]*)\]", line):
        for option in options[2].split("|"):
            ahead = re.sub(r" ?\[[^]]*\]", "", line[: options.start()])
            behind = re.sub(r" ?\[[^]]*\]", "", line[options.end() :])
            found.append(f"{ahead}{options[1]}{option.strip()}{behind}")
    commands = []
    for each in found:
        choices = re.search(r" ([^ \[]+\|\S+)", each)
        commands += [each.replace(choices[1], choice) for choice in choices[1].split("|")] if choices else [each]
    return commands


def filled_in(command: str) -> list[str]:
    """Its words, with real names for what stands in capitals."""
    return [
        re.sub(r"(?<![\w.-])[A-Z]+(?![\w.-])", lambda name: PLACES.get(name[0], name[0]), word)
        for word in shlex.split(command)[1:]
    ]


def parse(words: list[str]) -> None:
    """Have the command line read them, and run nothing. Raises what a user would see."""
    command, parent = typer.main.get_command(app), None
    name = "workbench"
    while True:
        parent = command.make_context(name, list(words), parent=parent)
        if not hasattr(command, "resolve_command"):
            return
        name, command, words = command.resolve_command(parent, [*parent._protected_args, *parent.args])


ALL = [(document.name, line) for document in DOCS for line in lines(document)]


@pytest.mark.parametrize(("page", "line"), ALL)
def test_every_command_of_the_documentation_is_one_that_there_is(page, line):
    for command in written_out(line):
        parse(filled_in(command))


def test_a_command_that_there_is_not_would_be_noticed():
    for wrong in (
        "simulat x",
        "simulate x --chunks 3",
        "simulate x --chunk many",
        "compare a",
        "trace describe a --rats 3",
    ):
        with pytest.raises(Exception, match=r"(?i)no such|valid|missing"):
            parse(wrong.split())


def test_inline_commands_name_flags_that_there_are():
    known = {
        "catalogue": "catalogue",
        "catalogue h100": "catalogue h100",
        "catalogue FOLDER": "catalogue f",
        "report": "report x",
        "replay": "replay x --model m",
        "observe": "observe u --trace t --out o",
        "route": "route",
        "serve MODEL": "serve m",
        "serve --like RECORD": "serve --like r",
        "calibrate MODEL --out PATH": "calibrate m --out p",
        "calibrate --front-end": "calibrate --front-end --out f.toml",
        "calibrate --from FOLDER.points --out OTHER": "calibrate --from f.points --out o",
        "diff-config A B": "diff-config a b",
        "import": "import m --out p",
        "replay ... --pp N": "replay x --model m --pp 2",
        "serve --backend cpu|cuda": "serve m --backend cpu",
    }
    format_name = "run"
    texts = [" ".join(document.read_text().split()) for document in DOCS]
    found = {name for text in texts for name in re.findall(r"`workbench ([^`]*)`", text)}
    assert found - {format_name} == set(known)
    for command in known.values():
        parse(command.split())


def test_what_is_not_run_still_stands_in_the_documentation():
    assert set(NOT_RUN) <= {line for _, line in ALL}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a reader of the documentation has: traces, runs, a profile, a measured run."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "traces").symlink_to(ROOT / "traces")
    (folder / "docs").symlink_to(ROOT / "docs")
    rows = [{"request_id": f"b{i}", "arrival_s": i / 4, "input_length": 100 + i, "output_length": 9} for i in range(20)]
    (folder / "trace.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    linear_profile(folder / "profile")
    (own_policy,) = python_blocks(ROOT / "docs/scheduler.md")
    (folder / "mypolicies.py").write_text(own_policy)
    for page, name in (("links.md", "box.toml"), ("loops.md", "here.toml")):
        (file,) = re.findall(rf"^```toml\n# {name}\n(.*?)^```", (ROOT / "docs" / page).read_text(), re.M | re.S)
        (folder / name).write_text(file)
    (folder / "measured").mkdir()
    (folder / "measured/meta.json").write_text(
        json.dumps(
            {
                "model": MODEL,
                "vllm_version": "0.19.0",
                "engine_kwargs": {
                    "tensor_parallel_size": 1,
                    "max_num_seqs": 128,
                    "max_num_batched_tokens": 2048,
                    "dtype": "bfloat16",
                },
            }
        )
    )
    times = [
        {
            "request_id": row["request_id"],
            "input_toks": row["input_length"],
            "output_toks": 9,
            "arrival_time": 1e9 + i / 4,
            "queued_ts": 50 + i / 4,
            "scheduled_ts": 50.001 + i / 4,
            "first_token_ts": 50.02 + i / 4,
            "last_token_ts": 50.1 + i / 4,
        }
        for i, row in enumerate(rows)
    ]
    (folder / "measured/requests.jsonl").write_text("".join(json.dumps(row) + "\n" for row in times))
    written(folder / "vllm.json", vllm())
    for name, flags in (("sample", ["--loop", "normal,overlap"]), ("a", []), ("b", ["--chunk", "256"])):
        made = ["simulate", str(folder / "trace.jsonl"), "--model", MODEL, "--out", str(folder / "runs" / name), *flags]
        done = CliRunner().invoke(app, made)
        assert done.exit_code == 0, done.output
    return folder


@pytest.mark.parametrize("page", sorted({page for page, _ in ALL}))
def test_the_commands_of_a_page_run_one_after_the_other(page, world, monkeypatch):
    monkeypatch.chdir(world)
    for number, line in enumerate(line for name, line in ALL if name == page):
        if line in NOT_RUN or line.split()[1] in ELSEWHERE:
            continue
        # With everything in brackets left away: each of it is parsed above.
        words = filled_in(written_out(line)[0])
        if words[0] == "simulate" and "--out" not in words:
            words += ["--out", f"out-{page}-{number}"]
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, (line, done.output)


@pytest.mark.parametrize("page", [document.name for document in DOCS if python_blocks(document)])
def test_the_python_of_a_page_runs_from_its_first_line_to_its_last(page, world, monkeypatch, tmp_path):
    (tmp_path / "trace.jsonl").write_bytes((world / "trace.jsonl").read_bytes())
    monkeypatch.chdir(tmp_path)
    # A module, because code of one's own is known by the name of its module.
    module = ModuleType(f"page_{Path(page).stem}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for block in python_blocks(ROOT / "docs" / page):
        exec(compile(block, page, "exec"), vars(module))


def test_the_line_that_the_documentation_of_python_says_is_the_one_that_is_said():
    (said,) = re.findall(r"print\(error\)  # (.*)", (ROOT / "docs/api.md").read_text())
    with pytest.raises(ValueError, match=re.escape(said)):
        workbench.simulate([], chunk=-1)


@pytest.mark.parametrize("words", [["catalogue"], ["catalogue", "h100"]])
def test_the_catalogue_of_the_documentation_is_shown(words):
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0 and "h100" in done.output


def curls() -> list[str]:
    text = (ROOT / "docs/serving.md").read_text().replace("\\\n", " ")
    return re.findall(r"^ {4,}(curl .*)$", text, re.M) + re.findall(r"`(curl [^`]*localhost[^`]*)`", text)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """The server that docs/serving.md starts first, on a free port."""
    first = next(line for line in lines(ROOT / "docs/serving.md") if line.startswith("workbench serve"))
    _, _, model, _, backend, *flags = first.split()
    port = flags.index("--port")
    started = Server(*flags[:port], *flags[port + 2 :], model=model, backend=backend)
    yield started
    started.kill()


@pytest.mark.parametrize("line", curls())
def test_every_curl_of_the_documentation_is_answered(line, server):
    words = shlex.split(line)[1:]
    method, headers, body, path = None, {}, None, None
    while words:
        word = words.pop(0)
        if word == "-H":
            name, value = words.pop(0).split(":", 1)
            headers[name] = value.strip()
        elif word == "-d":
            body = words.pop(0)
            headers.setdefault("Content-Type", "application/x-www-form-urlencoded")
        elif word == "-X":
            method = words.pop(0)
        else:
            assert word.startswith("localhost:8000/"), word
            path = word.removeprefix("localhost:8000")
    answer = server.http.request(method or ("GET" if body is None else "POST"), path, headers=headers, content=body)
    assert answer.status_code == 200, answer.text
    if body is not None and json.loads(body).get("stream"):
        assert answer.text.rstrip().endswith("data: [DONE]")


def test_both_forms_of_curl_are_found():
    assert len(curls()) >= 2
