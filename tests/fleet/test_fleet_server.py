"""Several servers and a router, started by one command."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from contextlib import suppress
from pathlib import Path

import httpx2
import numpy as np
import pytest
from typer.testing import CliRunner

from reports.record.run_record import read_record
from tests.meta_form import check_meta
from tests.patience import PATIENCE_S, until
from tests.serving.server import MODEL, Server, answer, command, environment
from workbench.cli.app import app


def instances(server: Server) -> list[int]:
    """Process ids of the instances, in their order."""
    path = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children")
    pids = [int(pid) for pid in path.read_text().split()]
    return [pid for pid in pids if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def below(pids: list[int]) -> list[int]:
    """These processes and all that are in their groups."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if os.getpgid(int(entry.name)) in pids:
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def gone(pids: list[int]) -> bool:
    for pid in pids:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                return False
        except OSError:
            continue
    return True


def complete(server: Server, prompt: str) -> str:
    asked = {"model": MODEL, "prompt": prompt, "max_tokens": 6}
    found = server.http.post("/v1/completions", json=asked, headers={"x-request-id": "same"})
    assert found.status_code == 200, found.text
    return found.json()["choices"][0]["text"]


@pytest.fixture
def start():
    servers = []

    def run(*flags: str) -> Server:
        servers.append(Server(*flags))
        return servers[-1]

    yield run
    for server in servers:
        server.kill()


@pytest.mark.slow
def test_a_fleet_goes_on_without_an_instance_and_leaves_one_record_of_all(start, tmp_path):
    out = tmp_path / "record"
    server = start("--pool", "both:1", "--pool", "small=both:2,gpu=l40s,chunk=512", "--record", str(out))
    assert "routing on http://127.0.0.1:" in server.first_line and "3 workers; 3 well" in server.first_line
    for i in range(6):
        assert complete(server, f"number {i}") == answer(f"number {i}", 6)
    first, *others = instances(server)
    everything = below([first, *others])
    os.kill(others[1], signal.SIGKILL)
    until(lambda: len(server.http.get("/workers").json()["workers"]) == 2, "the router has dropped it")
    for i in range(4):
        assert complete(server, f"number {i}") == answer(f"number {i}", 6)
    code, said = server.stop()
    assert code == 0, said
    assert "warning: small.1: was killed by signal 9 (SIGKILL); both.0, small.0 go on\n" in said
    until(lambda: gone(everything), "nothing is left running")

    assert sorted(path.name for path in out.iterdir()) == ["overlap", "report.html", "trace.jsonl"]
    record = read_record(out / "overlap")
    check_meta(record.meta, "served")
    assert record.requests["instance"].tolist().count(2) == 0 and len(record.requests["request_id"]) == 8
    assert len(set(record.requests["request_id"])) == 8 == record.meta["totals"]["traced"]
    assert [(pool["name"], pool["count"], pool["first_instance"]) for pool in record.meta["pools"]] == [
        ("both", 1, 0),
        ("small", 2, 1),
    ]
    assert record.meta["pools"][1]["settings"] == {"gpu": "l40s", "chunk": 512}
    assert record.meta["hardware"] == {"gpu": "GPUs (1 h100, 2 l40s)", "gpus": 3, "simulated": True}
    (note,) = [line for line in record.meta["trace"]["notes"] if "small.1" in line]
    assert note == "small.1 was lost (was killed by signal 9 (SIGKILL)) and left no part: its requests are missing"
    lost = [span for span in record.meta["fleet"] if span["instance"] == 2]
    assert len(lost) == 1 and lost[0]["end_s"] < record.meta["totals"]["wall_s"]

    ran = CliRunner().invoke(
        app, ["simulate", str(out / "trace.jsonl"), "--like", str(out), "--out", str(tmp_path / "again")]
    )
    assert ran.exit_code == 0, ran.output
    again = read_record(tmp_path / "again" / "overlap")
    assert [pool["name"] for pool in again.meta["pools"]] == ["both", "small"]
    assert again.meta["totals"]["ended"] == 8
    assert CliRunner().invoke(app, ["report", str(out), "--out", str(tmp_path / "page.html")]).exit_code == 0


@pytest.mark.slow
def test_pairs_leave_one_line_a_request_with_the_moments_of_both_halves(start, tmp_path):
    out = tmp_path / "record"
    server = start("--pool", "prefill:2", "--pool", "decode:1,max-running=4", "--chunk", "32", "--record", str(out))
    assert "2 prefill workers, 1 decode worker; 3 well" in server.first_line
    texts = [f"number {i}, and a prompt that takes several chunks of its own" * 2 for i in range(4)]
    for text in texts:
        assert complete(server, text) == answer(text, 6)
    os.kill(instances(server)[0], signal.SIGKILL)
    until(lambda: len(server.http.get("/workers").json()["workers"]) == 2, "the router has dropped it")
    for text in texts:
        assert complete(server, text) == answer(text, 6)
    code, said = server.stop()
    assert code == 0 and "warning: prefill.0: was killed by signal 9 (SIGKILL); prefill.1 goes on\n" in said, said

    record = read_record(out / "overlap")
    check_meta(record.meta, "served")
    columns = record.requests
    assert sorted(columns["request_id"]) == [f"same-{i}" for i in range(1, 9)]
    assert set(columns["instance"].tolist()) == {2} and set(columns["decode_instance"].tolist()) == {2.0}
    known = columns["prefill_instance"] == 1
    assert known.sum() == 6, "two were prefilled by the one that was killed"
    stages = ("arrival_s", "bootstrap_s", "prefill_start_s", "prefill_end_s", "decode_admission_s", "finish_s")
    moments = np.array([columns[name][known] for name in stages])
    assert (np.diff(moments, axis=0) >= 0).all(), moments
    assert (columns["transfer_start_s"][known] <= columns["transfer_end_s"][known]).all()
    assert set(record.iterations["instance"].tolist()) == {1, 2}
    assert [(pool["name"], pool["role"], pool["count"]) for pool in record.meta["pools"]] == [
        ("prefill", "prefill", 2),
        ("decode", "decode", 1),
    ]
    said = ["simulate", str(out / "trace.jsonl"), "--like", str(out), "--out", str(tmp_path / "again")]
    ran = CliRunner().invoke(app, said)
    assert ran.exit_code == 0, ran.output
    assert read_record(tmp_path / "again" / "overlap").meta["totals"]["ended"] == 8


@pytest.mark.slow
def test_a_fleet_without_anybody_ends_and_a_second_signal_ends_one_at_once(start):
    server = start("--dp", "2")
    pids = instances(server)
    os.kill(pids[0], signal.SIGKILL)
    until(lambda: len(server.http.get("/workers").json()["workers"]) == 1, "dropped")
    os.kill(pids[1], signal.SIGKILL)
    code, said = server.wait()
    last = "error: both.1: was killed by signal 9 (SIGKILL); there is nobody left of role both\n"
    assert code == 1 and said.endswith(last), said

    server = start("--dp", "2", "--time-scale", "1000")

    def ask() -> None:
        with suppress(httpx2.HTTPError):
            server.http.post("/v1/completions", json={"prompt": "x", "max_tokens": 99})

    asking = threading.Thread(target=ask)
    asking.start()
    until(lambda: any(each["running"] for each in server.http.get("/workers").json()["workers"]), "under way")
    everything = below(instances(server))
    server.signal(signal.SIGTERM)
    until(lambda: server.http.get("/health").status_code == 503, "draining")
    server.signal(signal.SIGINT)
    assert server.wait()[0] == 128 + signal.SIGINT
    until(lambda: gone(everything), "nothing is left running")
    asking.join(PATIENCE_S)


@pytest.mark.slow
def test_instances_that_cannot_start_are_one_line_of_the_first_that_says_so(tmp_path):
    missing = ("--dp", "2", "--tokenizer", str(tmp_path / "none"), "--record", str(tmp_path / "record"))
    ran = subprocess.run(command(*missing), capture_output=True, text=True, env=environment(), timeout=PATIENCE_S)
    assert (ran.returncode, ran.stdout) == (2, ""), ran
    assert ran.stderr.startswith("error: both.") and ran.stderr.count("\n") == 1 and "none" in ran.stderr, ran.stderr
    assert list((tmp_path / "record").iterdir()) == []


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (("--pool", "both:2", "--pool", "bad=both:1,kv-tokens=0"), "error: pool bad: kv_tokens: 0 "),
        (("--dp", "2", "--role", "decode"), "error: role: is of one server, and this starts 2 behind a router"),
        (("--router", "least_tokens"), "error: router: has no effect here"),
        (("--dp", "2", "--pool", "both:2"), "error: dp: is short for --pool both:N"),
        (("--pool", "prefill:2"), "error: pool prefill: role prefill needs a pool of role decode beside it"),
        (("--pool", "both:2", "--kv-link", "1GB/s"), "No such option: --kv-link"),
        (("--dp", "2", "--port", "70000"), "error: port: 70000 is not between 0 and 65535"),
        (("--dp", "2", "--port", "0", "--allow-origin", "x"), "error: allow_origin: 'x' is not an origin"),
        (("--dp", "2", "--port", "0", "--allow-host", "a/b"), "error: allow_host: 'a/b' is not a name"),
        (("--dp", "2", "--peer-timeout", "3"), "error: peer_timeout: has no effect here"),
        (("--pool", "both:2", "--kv-transfer", "tcp"), "error: kv_transfer: has no effect here"),
        (("--dp", "2", "--backend", "cpu", "--load-format", "zip"), "error: load_format: 'zip' is not one of"),
    ],
)
def test_settings_of_a_fleet_that_cannot_work_are_one_line(given, says):
    backend = () if "--backend" in given else ("--backend", "simulated")
    ran = CliRunner().invoke(app, ["serve", MODEL, *backend, *given])
    assert ran.exit_code == 2 and says in ran.stderr, ran.output
    assert says.startswith("No such") or ran.stderr.count("\n") == 1


def test_one_server_says_that_it_has_nothing_behind_an_admin_key():
    said = ("--backend", "simulated", "--port", "0", "--admin-key", "k", "--allow-origin", "x")
    ran = CliRunner().invoke(app, ["serve", MODEL, *said])
    note, error = ran.stderr.splitlines()
    assert note == "note: admin_key: has no effect here: one server has no /workers"
    assert ran.exit_code == 2 and error.startswith("error: allow_origin: 'x'")
