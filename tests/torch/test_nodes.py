"""Several machines that hold one model: each is a thread or a process here, and they meet on the loopback."""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing import Pipe
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from backends.node_place import NodePlace  # noqa: E402
from backends.torch import node_host, node_link  # noqa: E402
from backends.torch.backend import make_backend, start_workers  # noqa: E402
from backends.torch.node_host import host_ranks  # noqa: E402
from backends.torch.node_link import (  # noqa: E402
    Beat,
    End,
    Hello,
    Lost,
    NodesFailed,
    Refused,
    Tick,
    Welcome,
    connected,
)
from backends.torch.nodes import Nodes, _Node  # noqa: E402
from backends.torch.workers import RunnerOptions, WorkerDied  # noqa: E402
from tests.patience import PATIENCE_S, until  # noqa: E402
from tests.torch.live import backend_of, greedy, messages, serve  # noqa: E402
from tests.torch.test_vocabulary_masks import batch  # noqa: E402
from tests.torch.tiny import make, prompts, reference  # noqa: E402

NEW = 8
PROMPTS = prompts((21, 5, 34))
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: Any) -> tuple[str, list[list[int]]]:
    folder = tmp_path_factory.mktemp("llama")
    model = make("LlamaForCausalLM", folder)
    return str(folder), [reference(model, prompt, NEW)[0] for prompt in PROMPTS]


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def place(rank: int, port: int, **more: Any) -> NodePlace:
    given: dict[str, Any] = {"count": 2, "host": "127.0.0.1", "key": b"hush", "wait_s": PATIENCE_S, **more}
    return NodePlace(rank=rank, port=port, silent_s=given.pop("silent_s", PATIENCE_S), **given)


class Beside:
    """A node beside node 0, in a thread; its ranks are processes. ``ended`` is what it ended with."""

    def __init__(self, options: RunnerOptions) -> None:
        self.told = threading.Event()
        self.ended: list[Exception | None] = []

        def run() -> None:
            try:
                host_ranks(options, self.told.is_set)
                self.ended.append(None)
            except Exception as error:
                self.ended.append(error)

        self.thread = threading.Thread(target=run, daemon=True)
        self.thread.start()

    def end(self) -> Exception | None:
        self.thread.join(PATIENCE_S)
        return self.ended[0]


def options_of(model: str, at: NodePlace, **more: Any) -> RunnerOptions:
    given = {"rows": 8, "kv_tokens": 512, "max_context": 200, "tp": 2, "place": at, **more}
    return RunnerOptions(model, **given)


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "nodes"), [({"tp": 2}, 2), ({"tp": 1, "pp": 2}, 2)])
def test_tokens_are_those_of_one_machine_and_node_0_ends_the_others_when_it_is_asked_to(
    llama: Any, layout: dict[str, int], nodes: int
) -> None:
    folder, expected = llama
    port = free_port()
    beside = [Beside(options_of(folder, place(rank, port, count=nodes), **layout)) for rank in range(1, nodes)]
    backend = make_backend(options_of(folder, place(0, port, count=nodes), **layout), lambda row: None)
    groups = [[message] for message in messages(PROMPTS, greedy(NEW))]
    run = serve(backend, groups, "pipeline" if layout.get("pp") else "overlap", max_running=8)
    assert [run.outputs[f"r{i}"] for i in range(len(PROMPTS))] == expected
    stages = {(row.iteration, row.stage): row for row in run.rows}
    for (iteration, stage), row in stages.items():  # on one clock, for all nodes are on this machine
        assert stage == 0 or row.start_s >= stages[iteration, stage - 1].start_s
    assert len(stages) == len(run.batches) * layout.get("pp", 1)
    workers = backend.workers
    until(lambda: workers.heard_s() > 0 and workers.worked_s() > 0, "signs of all ranks")
    assert (workers.failure(), workers.end_asked()) == (None, None)
    beside[0].told.set()
    until(lambda: workers.end_asked() == "node 1 (127.0.0.1) was told to end", "asked")
    assert workers.failure() is None, "it goes on until node 0 ends it"
    backend.close()
    assert [node.end() for node in beside] == [None] * (nodes - 1)


@pytest.mark.slow
def test_a_rank_of_another_node_that_dies_is_named_with_its_node(llama: Any) -> None:
    port = free_port()
    beside = Beside(options_of(llama[0], place(1, port)))
    backend = make_backend(options_of(llama[0], place(0, port)), lambda row: None)
    workers: Any = backend.workers
    backend.done(backend.launch(batch()))()
    backend.workers.everywhere(_kill_rank_1)  # in its next step
    said = "node 1 (127.0.0.1): rank 1 of the model ended with exit code -9"
    with pytest.raises(WorkerDied) as caught:
        backend.done(backend.launch(batch()))()
    assert str(caught.value) == said
    with pytest.raises(WorkerDied, match="the ranks of the model have ended: node 1"):
        backend.launch(batch())
    assert str(beside.end()) == "rank 1 of the model ended with exit code -9"
    backend.close()
    assert all(not process.is_alive() for process in workers._ranks.processes)


def _kill_rank_1(rank: Any) -> None:
    if rank.number == 1:
        rank.runner.model.layers[0].mlp.forward = lambda *args: os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_a_local_rank_that_dies_at_rest_is_a_failure_too(llama: Any) -> None:
    backend = backend_of(llama[0], tp=2)
    workers: Any = backend.workers
    assert workers.failure() is None
    workers._ranks.processes[1].kill()
    until(lambda: workers.failure() == "rank 1 of the model ended with exit code -9", "named")
    backend.close()


@pytest.mark.slow
def test_a_model_that_only_one_node_lacks_is_said_with_the_nodes_name(llama: Any) -> None:
    port = free_port()
    beside = Beside(options_of("/nowhere/at/all", place(1, port)))
    with pytest.raises(ValueError, match=r"^node 1 \(127.0.0.1\): .*/nowhere/at/all"):
        start_workers(options_of(llama[0], place(0, port)))
    assert "node 0 has ended the server: " in str(beside.end())


# -- coming together: no model is loaded, and the other node is a few words on a socket ----------------------------------


@pytest.fixture
def gather() -> Iterator[Callable[..., Any]]:
    """Starts node 0's side in a thread; returns (port, list that will hold the nodes or the error)."""
    made: list[Any] = []

    def begin(**more: Any) -> tuple[int, list[Any]]:
        port, found = free_port(), []

        def run() -> None:
            try:
                found.append(Nodes(place(0, port, **more), ranks=2))
                made.append(found[0])
            except Exception as error:
                found.append(error)

        threading.Thread(target=run, daemon=True).start()
        return port, found

    yield begin
    for nodes in made:
        nodes.close()


def test_a_node_that_does_not_come_is_named_when_the_time_is_over() -> None:
    port = free_port()
    with pytest.raises(NodesFailed, match=rf"^node 1 did not come to 127.0.0.1:{port} within 0.1 s$"):
        Nodes(place(0, port, wait_s=0.1), ranks=2)
    with pytest.raises(NodesFailed, match=rf"^nodes 1, 2 did not come to 127.0.0.1:{port} within 0.1 s$"):
        Nodes(place(0, port, wait_s=0.1, count=3), ranks=3)
    with pytest.raises(NodesFailed, match=rf"^node 0 was not at 127.0.0.1:{port} within 0.1 s: Connection refused$"):
        connected(place(1, port, wait_s=0.1))


def test_an_address_that_is_not_this_machines_is_one_line() -> None:
    with pytest.raises(ValueError, match=r"^rendezvous: cannot listen on 192.0.2.1:29500: Cannot assign"):
        Nodes(place(0, 29500, host="192.0.2.1"), ranks=2)


def test_whoever_has_another_key_or_none_is_turned_away_and_the_others_are_let_in(gather: Any, capfd: Any) -> None:
    port, found = gather()
    until(lambda: _open(port), "listening")
    with socket.create_connection(("127.0.0.1", port)) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" * 30)
        silent = socket.create_connection(("127.0.0.1", port))  # and says nothing for as long as the test runs
        with pytest.raises(ValueError, match=rf"^peer_key: node 0 at 127.0.0.1:{port} has another key$"):
            connected(place(1, port, key=b"wrong"))
        mine = connected(place(1, port))
        mine.send(Hello(1, ()))
        assert isinstance(mine.recv(), Welcome)
        until(lambda: bool(found), "together")
        silent.close()
    assert isinstance(found[0], Nodes)
    assert "has another key (--peer-key) and was turned away" in capfd.readouterr().err


def test_a_stranger_that_dribbles_has_its_time_in_all_and_no_more(monkeypatch: Any, gather: Any, capfd: Any) -> None:
    monkeypatch.setattr(node_link, "HANDSHAKE_S", 0.3)
    port, _ = gather()
    until(lambda: _open(port), "listening")
    with socket.create_connection(("127.0.0.1", port)) as stranger:

        def cut_off() -> bool:
            with suppress(OSError):
                stranger.sendall(b"\0")  # the length of a message that never comes
                return False
            return True

        until(cut_off, "cut off")
    until(lambda: "did not show a key" in capfd.readouterr().err, "noted")


def test_strangers_that_are_gone_before_they_are_greeted_are_a_line_each(gather: Any, capfd: Any) -> None:
    port, _ = gather()
    until(lambda: _open(port), "listening")
    for _ in range(20):
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            stranger.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # it is reset, not closed
    said = []

    def noted() -> bool:
        said.append(capfd.readouterr().err)
        return "".join(said).count("did not show a key") >= 20

    until(noted, "a line for each")


def test_a_moment_without_room_for_one_more_shuts_nobody_out(monkeypatch: Any, gather: Any) -> None:
    class Full(socket.socket):
        full = True

        def accept(self) -> Any:
            if Full.full:
                Full.full = False
                raise OSError(errno.EMFILE, "Too many open files")
            return super().accept()

    monkeypatch.setattr("backends.torch.nodes.listen", lambda at: Full(fileno=node_link.listen(at).detach()))
    port, found = gather()
    mine = connected(place(1, port))
    mine.send(Hello(1, ()))
    assert isinstance(mine.recv(), Welcome)
    until(lambda: bool(found), "together")
    assert not Full.full


def _open(port: int) -> bool:
    with socket.socket() as trying:
        return trying.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.parametrize(
    ("node", "settings", "says"),
    [
        (
            1,
            {"chunk": 512, "tp": 2},
            "chunk: 512, but none on node 0; the nodes of a model have the same settings",
        ),
        (1, {"chunk": None}, "tp: none, but 2 on node 0; the nodes of a model have the same settings"),
        (3, {"chunk": None, "tp": 2}, "node_rank: 3 is none of nodes 1 to 2"),
    ],
)
def test_a_setting_that_differs_is_refused_by_name_and_node_0_waits_on(
    gather: Any, node: int, settings: dict[str, Any], says: str
) -> None:
    ours = (("chunk", None), ("tp", 2))
    port, found = gather(settings=ours, count=3)
    other = connected(place(node, port))
    other.send(Hello(node, tuple(settings.items())))
    assert other.recv() == Refused(says)
    first = connected(place(1, port))
    first.send(Hello(1, ours))
    twin = connected(place(1, port))
    twin.send(Hello(1, ours))
    assert twin.recv() == Refused("node_rank: node 1 is there already, at 127.0.0.1")
    second = connected(place(2, port))
    second.send(Hello(2, ours))
    assert isinstance(first.recv(), Welcome) and isinstance(second.recv(), Welcome)
    until(lambda: bool(found), "together")
    assert isinstance(found[0], Nodes)


def test_a_node_that_is_silent_or_hangs_up_is_lost_and_the_others_are_told(gather: Any) -> None:
    port, found = gather(silent_s=0.5, count=2)
    mine = connected(place(1, port))
    mine.send(Hello(1, ()))
    assert isinstance(mine.recv(), Welcome)
    until(lambda: bool(found), "together")
    until(lambda: found[0].failure is not None, "lost")
    assert found[0].failure.startswith("node 1 (127.0.0.1) has not been heard of for ")
    port, found = gather()
    mine = connected(place(1, port))
    mine.send(Hello(1, ()))
    assert isinstance(mine.recv(), Welcome) and isinstance(mine.recv(), Tick)
    mine.close()
    until(lambda: bool(found) and found[0].failure is not None, "lost")
    assert found[0].failure == "node 1 (127.0.0.1) is gone"


class Ranks:
    """Ranks of a node, as far as it watches them."""

    def __init__(self) -> None:
        self.signs = SimpleNamespace(heard_s=time.monotonic, worked_s=lambda: 4.0)
        self.sentinels: list[Any] = []

    def ended(self, sentinel: Any) -> tuple[int, int]:
        return 1, -9


def hosting(silent_s: float = PATIENCE_S, ranks: Any = None, told: bool = False) -> tuple[Any, list[Any]]:
    """(node 0's end of a node's connection, what that node has ended with)."""
    ours, theirs = Pipe()
    ended: list[Any] = []
    options = RunnerOptions("m", tp=2, place=place(1, 29500, silent_s=silent_s))

    def run() -> None:
        try:
            ended.append(node_host._serve(theirs, ranks or Ranks(), options, lambda: told, lambda line: None))
        except NodesFailed as error:
            ended.append(str(error))

    threading.Thread(target=run, daemon=True).start()
    return ours, ended


def test_a_node_ends_with_node_0_and_says_why() -> None:
    ours, ended = hosting()
    ours.send(Tick(1.0))
    beat = ours.recv()
    assert (beat.tick_s, beat.worked_s) == (1.0, 4.0)
    ours.send(End(None, 3.0))
    until(lambda: bool(ended), "ended")
    assert ended == [3.0], "in order, with so much time for its ranks"
    ours, ended = hosting()
    ours.send(End("node 2 (10.0.0.3) is gone", 0.0))
    until(lambda: bool(ended), "ended")
    assert ended == ["node 0 has ended the server: node 2 (10.0.0.3) is gone"]
    ours, ended = hosting()
    ours.close()
    until(lambda: bool(ended), "ended")
    assert ended == ["node 0 (127.0.0.1:29500) is gone"]
    ours, ended = hosting(silent_s=0.3)
    until(lambda: bool(ended), "ended")
    assert ended == ["node 0 (127.0.0.1:29500) has not been heard of for 0.3 s"]


def test_a_node_says_when_a_rank_of_it_has_died_or_it_is_told_to_end() -> None:
    ranks = Ranks()
    dead, other = Pipe()
    other.close()
    ranks.sentinels = [dead]
    ours, ended = hosting(ranks=ranks)
    assert ours.recv() == Lost("rank 1 of the model ended with exit code -9")
    until(lambda: ended == ["rank 1 of the model ended with exit code -9"], "ended")
    ours, ended = hosting(told=True)
    assert ours.recv() == Lost("it was told to end"), "nobody is served yet"
    until(lambda: ended == [0.0], "ended")


def test_the_clock_of_another_machine_is_told_from_its_signs_of_life(gather: Any) -> None:
    port, found = gather()
    mine = connected(place(1, port))
    mine.send(Hello(1, ()))
    assert isinstance(mine.recv(), Welcome)
    until(lambda: bool(found), "together")
    tick = mine.recv()
    mine.send(Beat(tick.sent_s, tick.sent_s + 1e6, 3.0, 7.0))
    until(lambda: bool(found[0]._nodes[1].clocks), "taken in")
    ((trip_s, _),) = found[0]._nodes[1].clocks
    start, end = found[0].on_our_clock(1, (1e6 + 5.0, 1e6 + 6.0))
    assert trip_s > 0 and (start, end) == pytest.approx((5.0 + trip_s / 2, 6.0 + trip_s / 2), abs=1e-6)
    assert found[0].on_our_clock(0, (5.0, 6.0)) == (5.0, 6.0)
    assert found[0].worked_s() == 7.0


def test_clocks_that_may_be_one_are_taken_for_one() -> None:
    node = _Node(1, None, "")  # type: ignore[arg-type]
    assert node.clock_s == 0.0
    node.clocks += [(0.4, 0.3), (0.002, 0.0009)]
    assert node.clock_s == 0.0, "less than half of the shortest way there and back"
    node.clocks.append((0.001, 5.0))
    assert node.clock_s == 5.0


def test_nodes_that_cannot_share_the_ranks_evenly_are_refused() -> None:
    from workbench.cluster.device import runner_options
    from workbench.scheduler.config import ConfigError
    from workbench.settings.run_settings import RunSettings

    at = dataclasses.replace(place(0, 1), count=3)
    with pytest.raises(ConfigError, match=r"^nodes: 3 nodes, and tp 2 x pp 2 does not spread evenly over them$"):
        runner_options(RunSettings(tp=2, pp=2, nodes=3), "pipeline", "cpu", place=at)


# -- two network namespaces ----------------------------------------------------------------------------------------------


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=PATIENCE_S)


@pytest.fixture
def namespaces() -> Iterator[tuple[str, str]]:
    """Two network namespaces with a cable between them: 10.231.77.1 and 10.231.77.2."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces take root and iproute2")
    names = tuple(f"wb{os.getpid()}{side}" for side in "ab")
    try:
        for name in names:
            _ip("netns", "add", name)
        _ip("link", "add", "veth0", "netns", names[0], "type", "veth", "peer", "name", "veth0", "netns", names[1])
        for number, name in enumerate(names, 1):
            _ip("-n", name, "addr", "add", f"10.231.77.{number}/24", "dev", "veth0")
            for device in ("lo", "veth0"):
                _ip("-n", name, "link", "set", device, "up")
    except subprocess.CalledProcessError as error:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
        pytest.skip(f"network namespaces are not to be had here: {error.stderr.decode().strip()}")
    yield names[0], names[1]
    for name in names:
        subprocess.run(["ip", "netns", "del", name], capture_output=True)


@pytest.mark.slow
def test_across_two_network_namespaces_tokens_are_those_of_one_machine(llama: Any, namespaces: Any) -> None:
    folder, expected = llama

    program = [sys.executable, "-m", "tests.torch.nodes_in_namespaces"]

    def start(rank: int) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["ip", "netns", "exec", namespaces[rank], *program, folder, str(rank)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )

    running = [start(rank) for rank in (0, 1)]
    try:
        said = [process.communicate(timeout=PATIENCE_S)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], said
    assert said[0].splitlines()[-1] == str(expected)
