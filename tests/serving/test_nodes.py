"""One server over two nodes, both on this machine, and the settings of such a server."""

from __future__ import annotations

import signal
import socket
import subprocess

import pytest

torch = pytest.importorskip("torch")

from reports.record.run_record import read_record  # noqa: E402
from tests.patience import PATIENCE_S  # noqa: E402
from tests.serving.server import Server, command, environment  # noqa: E402
from tests.torch.tiny import make  # noqa: E402
from workbench.scheduler.config import ConfigError  # noqa: E402
from workbench.serving.peer_keys import shared_key  # noqa: E402
from workbench.serving.serve_settings import ServeSettings  # noqa: E402
from workbench.settings.run_settings import RunSettings  # noqa: E402


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from tests.serving.test_text_streams import TOKENIZERS

    folder = tmp_path_factory.mktemp("model")
    make("LlamaForCausalLM", folder, vocab_size=TOKENIZERS["byte-level"].get_vocab_size())
    TOKENIZERS["byte-level"].save(str(folder / "tokenizer.json"))
    return str(folder)


@pytest.fixture
def start(model, tmp_path):
    """Starts (the server of node 0, the process of node 1)."""
    started = []

    def run(*flags: str, node_1: tuple[str, ...] = ()) -> tuple[Server, subprocess.Popen[str]]:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            port = taken.getsockname()[1]
        both = ("--dtype", "fp32", "--tp", "2", "--nodes", "2", "--kv-tokens", "2000")
        both += ("--rendezvous", f"127.0.0.1:{port}")
        env = {"XDG_RUNTIME_DIR": str(tmp_path)}
        node = subprocess.Popen(
            command(*both, "--node-rank", "1", *node_1, model=model, backend="cpu"),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(**env),
        )
        started.append(node)
        started.append(Server(*both, *flags, model=model, backend="cpu", **env))
        return started[-1], node

    yield run
    for one in started:
        one.kill()


@pytest.mark.slow
def test_a_node_that_is_told_to_end_has_the_whole_server_drain_with_its_record_written(start, tmp_path):
    server, node = start("--record", str(tmp_path / "record"))
    answer = server.http.post("/v1/completions", json={"prompt": "hello", "max_tokens": 6, "ignore_eos": True})
    assert answer.json()["usage"]["completion_tokens"] == 6
    node.send_signal(signal.SIGTERM)
    code, said = server.wait()
    assert code == 0 and "note: node 1 (127.0.0.1) was told to end, and the server with it" in said
    out, errors = node.communicate(timeout=PATIENCE_S)
    assert (node.returncode, out.splitlines()[0].startswith("node 1 of 2: rank 1 of ")) == (0, True), errors
    meta = read_record(tmp_path / "record" / "overlap").meta
    assert (meta["hardware"]["gpus"], meta["settings"]["nodes"], meta["totals"]["requests"]) == (2, 2, 1)


@pytest.mark.slow
def test_a_node_that_is_killed_ends_the_server_with_one_line_that_names_it(start, tmp_path):
    server, node = start("--record", str(tmp_path / "record"))
    assert server.http.post("/v1/completions", json={"prompt": "hello", "max_tokens": 2}).is_success
    server.await_rest()
    node.kill()
    code, said = server.wait()
    assert code == 1 and "record: " in said
    assert read_record(tmp_path / "record" / "overlap").requests["status"] == ["finished"]
    assert [line for line in said.splitlines() if not line.startswith(("note: ", "record: "))] == [
        "error: node 1 (127.0.0.1) is gone"
    ]


def settings(nodes=None, **given):
    return ServeSettings(RunSettings(tp=4, nodes=nodes), backend="cpu", **given)


@pytest.mark.parametrize(
    ("nodes", "given", "says"),
    [
        (2, {}, "rendezvous: 2 nodes have to meet somewhere; say HOST:PORT of node 0"),
        (2, {"rendezvous": "here"}, "rendezvous: 'here' is not HOST:PORT"),
        (2, {"rendezvous": "here:0"}, "rendezvous: 'here:0' is not HOST:PORT"),
        (
            2,
            {"rendezvous": "::1:29500"},
            "rendezvous: '::1:29500': an IPv6 address stands in brackets, as in [::1]:29500",
        ),
        (2, {"rendezvous": "10.0.0.1:29500"}, "peer_key: 10.0.0.1 is not this machine alone, so say a key"),
        (2, {"rendezvous": "10.0.0.1:29500", "peer_key": ""}, "peer_key: is empty"),
        (2, {"rendezvous": "[::1]:29500", "node_rank": 2}, "node_rank: 2; 2 nodes are 0 to 1"),
        (None, {"rendezvous": "[::1]:29500"}, "rendezvous: is of several machines; --nodes says how many"),
        (1, {"node_rank": 1}, "node_rank: is of several machines; --nodes says how many"),
        (None, {"node_wait_s": 2.0}, "node_wait: is of several machines; --nodes says how many"),
        (2, {"rendezvous": "[::1]:29500", "node_wait_s": 0.0}, "node_wait: 0.0 is not positive and finite"),
    ],
)
def test_settings_of_nodes_that_cannot_work_are_refused_by_name(nodes, given, says):
    with pytest.raises(ConfigError) as caught:
        settings(nodes, **given)
    assert str(caught.value).startswith(says)


def test_a_modelled_gpu_has_its_nodes_modelled_and_nowhere_to_meet():
    run = RunSettings(tp=4, nodes=2)
    assert ServeSettings(run, backend="simulated").nodes == 1
    with pytest.raises(ConfigError, match=r"^rendezvous: is of machines that hold a real model"):
        ServeSettings(run, backend="simulated", rendezvous="127.0.0.1:1")


def test_nodes_compare_every_setting_of_the_run_and_know_where_they_stand(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    place = settings(2, rendezvous="[::1]:29500", node_rank=1, node_wait_s=5.0, stuck_after_s=7.0).spec.place
    assert (place.count, place.rank, place.host, place.port, place.where) == (2, 1, "::1", 29500, "[::1]:29500")
    assert (place.wait_s, place.silent_s) == (5.0, 7.0)
    assert {"tp": 4, "nodes": 2, "backend": "cpu", "load_format": "auto", "chunk": 8192}.items() <= dict(
        place.settings
    ).items()
    assert place.key == settings(2, rendezvous="127.0.0.1:1").spec.place.key, "the user's own"
    assert settings(2, rendezvous="10.0.0.1:1", peer_key="hush").spec.place.key == b"hush"


def test_the_key_of_the_loopback_is_made_once_and_is_the_users_alone(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    key = shared_key(None, "localhost")
    assert len(key) == 64 and shared_key(None, "127.0.0.1") == shared_key(None, "::1") == key
    (file,) = (tmp_path / "workbench").iterdir()
    assert file.stat().st_mode & 0o777 == 0o600
    file.chmod(0o644)
    with pytest.raises(ConfigError, match="is not this user's alone; say one with --peer-key"):
        shared_key(None, "127.0.0.1")
    assert shared_key("said", "127.0.0.1") == b"said"
