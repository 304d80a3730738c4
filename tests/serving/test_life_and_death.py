"""Starting, draining, overload, and processes that die."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
from types import SimpleNamespace

import msgspec
import openai
import pytest

from tests.event_loop import in_a_loop
from tests.patience import PATIENCE_S, until
from tests.serving.server import MODEL, Server, answer, command, environment
from workbench.scheduler.config import SchedulerConfig
from workbench.scheduler.scheduler import Scheduler
from workbench.serving.engine import engine_client, vitals
from workbench.serving.engine.engine_client import EngineClient
from workbench.serving.engine.vitals import Vitals
from workbench.serving.metrics import Metrics
from workbench.serving.wire import Addresses


@pytest.fixture
def start():
    servers = []

    def run(*flags: str, **env: str) -> Server:
        servers.append(Server(*flags, **env))
        return servers[-1]

    yield run
    for server in servers:
        server.kill()


def in_thread(ask):
    """(thread, list that will hold the result or the exception)."""
    results = []

    def run() -> None:
        try:
            results.append(ask())
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, results


def complete(server, prompt: str, tokens: int):
    return server.openai(timeout=PATIENCE_S).completions.create(model=MODEL, prompt=prompt, max_tokens=tokens)


def read_all(server, prompt: str, tokens: int) -> str:
    stream = server.openai(timeout=PATIENCE_S).completions.create(
        model=MODEL, prompt=prompt, max_tokens=tokens, stream=True
    )
    return "".join(chunk.choices[0].text for chunk in stream)


def test_a_term_signal_lets_open_requests_finish_and_takes_no_new_ones(start):
    server = start("--time-scale", "5")
    thread, results = in_thread(lambda: read_all(server, "finish me", 100))
    server.await_metric("num_requests_running", lambda value: value == 1)
    server.signal(signal.SIGTERM)
    until(lambda: server.http.get("/health").status_code == 503, "draining")
    refused = server.http.post("/v1/completions", json={"prompt": "too late"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
    assert "retry-after" in refused.headers
    thread.join()
    assert results == [answer("finish me", 100)]
    assert server.wait() == (0, "")


def test_a_paused_server_drains_all_the_same(start):
    server = start()
    assert server.http.post("/pause").is_success
    thread, results = in_thread(lambda: read_all(server, "held", 5))
    server.await_metric("num_requests_waiting", lambda value: value == 1)
    assert server.stop() == (0, "")
    thread.join()
    assert results == [answer("held", 5)]


def test_a_second_signal_ends_the_server_at_once(start):
    server = start("--time-scale", "1000")
    thread, results = in_thread(lambda: read_all(server, "never", 100))
    server.await_metric("open_streams", lambda value: value == 1, process="http")
    children = server.children()
    server.signal(signal.SIGTERM)
    until(lambda: server.http.get("/health").status_code == 503, "draining")
    server.signal(signal.SIGINT)
    code, _ = server.wait()
    assert code == 128 + signal.SIGINT
    thread.join()
    assert isinstance(results[0], Exception)
    until(lambda: not any(alive(pid) for pid in children.values()), "children gone")


def test_requests_that_outlast_the_drain_timeout_get_an_error(start):
    server = start("--time-scale", "300", "--drain-timeout", "0.2")
    thread, results = in_thread(lambda: complete(server, "never", 100))
    server.await_metric("open_streams", lambda value: value == 1, process="http")
    server.signal(signal.SIGTERM)
    thread.join()
    assert isinstance(results[0], openai.InternalServerError)
    assert "shutting down" in str(results[0])
    code, errors = server.wait()
    assert (code, errors.count("\n")) == (0, 1), errors


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("name", ["scheduler", "detokenizer"])
def test_a_process_that_is_killed_is_an_error_for_every_client_and_the_server(start, name):
    server = start("--time-scale", "1")
    threads = [in_thread(lambda i=i: read_all(server, f"open {i}", 5000)) for i in range(5)]
    threads += [in_thread(lambda i=i: complete(server, f"whole {i}", 5000)) for i in range(5)]
    server.await_metric("num_requests_running", lambda value: value == 10)
    children = server.children()
    os.kill(children[name], signal.SIGKILL)
    for thread, _ in threads:
        thread.join(PATIENCE_S)
    for _, results in threads:
        assert isinstance(results[0], openai.APIError), results
        assert f"the {name} process was killed by signal 9" in str(results[0])
    code, errors = server.wait()
    assert (code, errors) == (1, f"error: the {name} process was killed by signal 9 (SIGKILL)\n")
    until(lambda: not any(alive(pid) for pid in children.values()), "children gone")


@pytest.mark.parametrize(("name", "limit"), [("scheduler", "SCHEDULER_END_S"), ("detokenizer", "DETOKENIZER_END_S")])
def test_a_process_that_does_not_end_is_killed_and_an_error(start, name, limit):
    server = start(before=f"from workbench.serving import supervisor; supervisor.{limit} = 0.5")
    children = server.children()
    os.kill(children[name], signal.SIGSTOP)
    assert server.stop() == (1, f"error: the {name} process did not end within 0.5 s and was killed\n")
    until(lambda: not any(alive(pid) for pid in children.values()), "children gone")


def test_children_do_not_outlive_a_server_that_is_killed(start):
    server = start()
    children = server.children()
    server.kill()
    until(lambda: not any(alive(pid) for pid in children.values()), "children gone")


def health(server: Server) -> str:
    """What is wrong with a server, as it says itself; empty for nothing."""
    return server.http.get("/health").json().get("error", {}).get("message", "")


def test_a_frozen_process_fails_the_health_check_and_recovers(start):
    server = start("--stuck-after", "1")
    for name, pid in server.children().items():
        until(lambda: server.http.get("/health").is_success, "healthy")
        os.kill(pid, signal.SIGSTOP)
        said = f"the {name} process has not been heard of for "
        # On a busy machine another may be late as well, for a while.
        until(lambda said=said: health(server).startswith(said), f"unhealthy: {said}")
        assert server.http.get("/health").status_code == 503
        os.kill(pid, signal.SIGCONT)
    until(lambda: server.http.get("/health").is_success, "healthy again")


NOW_S = 5000.0


@pytest.fixture
def still_clock(monkeypatch):
    """A clock that stands at NOW_S for those who judge how things are."""
    for module in (engine_client, vitals):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: NOW_S))


class Model:
    """Whatever computes, as a heartbeat sees it."""

    def __init__(self) -> None:
        self.worked_s = 0.0
        self.heard_s = NOW_S

    def vitals(self) -> Vitals:
        return Vitals(Scheduler(SchedulerConfig(100, 50)), lambda: self.worked_s, lambda: self.heard_s)


def test_progress_is_the_loops_or_that_of_the_batch_it_waits_for(still_clock):
    model = Model()
    heart = model.vitals()
    heart.progress_s = 5.0
    assert heart.beat().progress_s == 5.0, "nothing computes"
    model.worked_s = 1.0
    assert heart.beat().progress_s == NOW_S
    heart.progress_s = 5.0
    assert heart.beat().progress_s == 5.0, "what computed has ended, and the loop has not moved"
    heart.moved()
    assert heart.beat().progress_s == NOW_S and heart.beat().pending
    heart.progress_s = 5.0
    heart.resting()
    assert heart.beat().progress_s == NOW_S and not heart.beat().pending


def test_health_says_which_part_of_the_way_of_an_answer_is_silent(tmp_path, still_clock):
    async def check() -> None:
        engine = EngineClient(Addresses.within(tmp_path), Metrics("m"), 10)
        engine.beat, engine._pulse_s = Model().vitals().beat(), NOW_S
        assert engine.silence(1000.0) is None
        long_ago = NOW_S - 2000.0
        for field, said in (
            ("sent_s", "the scheduler process has not been heard of for 2000 s"),
            ("heard_s", "a process of the model has not been heard of for 2000 s"),
            ("progress_s", "the loop is stuck: no progress for 2000 s with work pending"),
        ):
            engine.beat = msgspec.structs.replace(Model().vitals().beat(), pending=True, **{field: long_ago})
            assert engine.silence(1000.0) == said
        engine.beat = msgspec.structs.replace(Model().vitals().beat(), pending=False, progress_s=long_ago)
        assert engine.silence(1000.0) is None, "at rest"
        engine._pulse_s = long_ago
        assert engine.silence(1000.0) == "the detokenizer process has not been heard of for 2000 s"
        engine.destroy()

    in_a_loop(check())


def test_overload_is_a_503_that_says_when_to_come_again(start):
    server = start("--max-queue", "2", "--max-running", "1")
    assert server.http.post("/pause").is_success
    threads = []
    for count in range(1, 4):
        threads.append(in_thread(lambda i=count: complete(server, f"queued {i}", 4)))
        server.await_metric("open_streams", lambda value, count=count: value == count, process="http")
    refused = server.http.post("/v1/completions", json={"prompt": "one too many"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
    assert int(refused.headers["retry-after"]) >= 1
    assert server.http.get("/health").is_success
    assert server.http.post("/resume").is_success
    for thread, results in threads:
        thread.join()
        assert results[0].usage.completion_tokens == 4
    assert complete(server, "now there is room", 1).usage.completion_tokens == 1


@pytest.mark.parametrize(
    "flags",
    [
        ("--loop", "normal"),
        ("--loop", "pipeline", "--pp", "2"),
        ("--batching", "mixed", "--page-size", "16"),
        ("--policy", "lpm", "--cache", "none", "--no-overlap-prefills"),
    ],
)
def test_every_loop_and_way_of_batching_serves_the_same_text(start, flags):
    server = start(*flags, "--kv-tokens", "2000", "--max-context", "300")
    threads = [in_thread(lambda i=i: read_all(server, f"any loop {i}", 150)) for i in range(30)]
    for i, (thread, results) in enumerate(threads):
        thread.join()
        assert results == [answer(f"any loop {i}", 150)]
    server.await_rest()


def test_answers_end_by_themselves_when_a_distribution_says_so(start):
    server = start("--simulated-output-tokens", "5-9")
    made = [complete(server, f"end {i}", 100) for i in range(20)]
    assert {choice.finish_reason for one in made for choice in one.choices} == {"stop"}
    lengths = {one.usage.completion_tokens for one in made}
    assert lengths <= set(range(5, 10)) and len(lengths) > 2
    assert all(len(one.choices[0].text) == one.usage.completion_tokens - 1 for one in made), "the end is no text"


def test_the_key_can_come_from_the_environment(start):
    server = start(WORKBENCH_API_KEY="hush")
    assert server.http.get("/v1/models").status_code == 401


def failed_start(*flags: str, model: str = MODEL) -> str:
    ran = subprocess.run(
        command(*flags, model=model), capture_output=True, text=True, env=environment(), timeout=PATIENCE_S
    )
    assert ran.returncode == 2, ran
    assert ran.stdout == ""
    assert ran.stderr.startswith("error: ") and ran.stderr.count("\n") == 1, ran.stderr
    return ran.stderr


def test_a_port_in_use_is_one_line(start):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in failed_start("--port", str(port))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--loop", "normal,overlap"), "one loop"),
        (("--backend", "tpu"), "backend"),
        (("--simulated-output-tokens", "many"), "simulated_output_tokens"),
        (("--time-scale", "-1"), "time_scale: -1.0 is negative or not finite"),
        (("--drain-timeout", "inf"), "drain_timeout: inf is negative or not finite"),
        (("--stuck-after", "inf"), "stuck_after: inf is not positive and finite"),
        (("--slo-ttft", "inf"), "slo_ttft: inf is not positive and finite"),
        (("--gpu", "abacus"), "abacus"),
        (("--tokenizer", "/nowhere"), "/nowhere"),
        (("--host", "no.such.host.invalid"), "cannot listen"),
        (("--kv-tokens", "0"), "kv_tokens"),
        (("--backend", "cpu", "--time-scale", "2"), "simulated"),
        (
            ("--backend", "cpu", "--load-format", "zip"),
            "load_format: 'zip' is not one of auto, safetensors, gguf, dummy",
        ),
        (("--backend", "cpu", "--gpu", "h100"), "gpu: has no effect"),
        (("--backend", "cpu", "--cost", "roofline"), "cost: has no effect"),
        (("--backend", "cpu", "--mem-fraction", "0.5"), "kv_tokens says how much KV"),
        (("--backend", "cpu", "--cuda-graphs"), "cuda_graphs: has no effect"),
        (("--backend", "cpu", "--kv-dtype", "fp8"), "kv_dtype: has no effect on a real cpu runner: KV is kept in"),
        (("--no-record-content",), "record_content"),
        (("--force",), "force"),
    ],
)
def test_settings_that_cannot_be_served_are_one_line(flags, said):
    assert said in failed_start(*flags)


def test_a_model_nobody_knows_is_one_line():
    assert "unknown model" in failed_start(model="no-such-model")
