"""Node 0's side of the several machines that hold one model: it gathers the others, and hears when one is lost."""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, wait
from queue import Empty, SimpleQueue
from typing import Any

import torch.distributed as dist

from backends.node_place import NodePlace
from backends.torch.node_link import (
    TRY_EVERY_S,
    Beat,
    End,
    EndAsked,
    Hello,
    Lost,
    NodesFailed,
    RankHello,
    Refused,
    Serving,
    Tick,
    Welcome,
    accepted,
    addresses,
    cut,
    listen,
    listen_for_ranks,
    said,
)
from backends.torch.signs import SIGN_EVERY_S

CLOCK_BEATS = 25
"""How many of the last signs of life the difference of two clocks is taken from."""


@dataclass
class _Node:
    """Another node, as node 0 knows it."""

    rank: int
    control: Connection
    address: str
    ranks: dict[int, Connection] = field(default_factory=dict)
    heard_s: float = field(default_factory=time.monotonic)
    """When it was heard of, on our clock."""
    silent_s: float = 0.0
    worked_s: float = 0.0
    clocks: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=CLOCK_BEATS))
    """(round trip, its clock less ours) of its last signs of life."""

    @property
    def name(self) -> str:
        return f"node {self.rank} ({self.address})"

    @property
    def clock_s(self) -> float:
        """What its clock is ahead of ours; 0 where the two may be one, as on one machine."""
        trip_s, ahead_s = min(self.clocks, default=(0.0, 0.0))
        return 0.0 if abs(ahead_s) <= trip_s / 2 else ahead_s


class Nodes:
    """The other nodes. A thread hears them; the first that is lost ends all, and its line is in :attr:`failure`."""

    def __init__(self, place: NodePlace, ranks: int) -> None:
        """Wait for the other nodes, on each of which there will be as many ranks of a model of ``ranks``.

        Raises ValueError for an address that cannot be had, NodesFailed when a node does not come.
        """
        self.place = place
        self.failure: str | None = None
        self.end_asked: str | None = None
        """Who asked for the end of the server, in words."""
        self._per_node = ranks // place.count
        self._nodes: dict[int, _Node] = {}
        self._come: SimpleQueue[tuple[Connection, Any]] = SimpleQueue()
        self._over = threading.Event()
        self._door = listen(place)
        self.address = self._door.getsockname()[0]
        self._lost = threading.Condition()
        try:
            meeting = listen_for_ranks(self.address)
            self.store_port: int = meeting.getsockname()[1]
            self._store = dist.TCPStore(
                self.address,
                self.store_port,
                is_master=True,
                wait_for_workers=False,
                master_listen_fd=meeting.detach(),
            )
            threading.Thread(target=self._let_in, name="nodes-door", daemon=True).start()
            self._gather()
        except BaseException:
            self.close(line="node 0 did not get all nodes together")
            raise
        threading.Thread(target=self._hear, name="nodes", daemon=True).start()

    # -- coming together ---------------------------------------------------------------------------------------------

    def _let_in(self) -> None:
        """Greet whoever comes; one that takes its time holds up nobody else."""
        while not self._over.is_set():
            try:
                incoming, (where, *_) = self._door.accept()
            except OSError:
                if self._over.is_set() or self._door.fileno() < 0:
                    return
                time.sleep(TRY_EVERY_S)  # there was no room for one more
                continue
            threading.Thread(target=self._greet, args=(incoming, where), name="nodes-greet", daemon=True).start()

    def _greet(self, incoming: socket.socket, where: str) -> None:
        try:
            connection = accepted(incoming, self.place.key)
            self._come.put((connection, connection.recv()))
        except AuthenticationError:
            _note(f"somebody at {where} has another key (--peer-key) and was turned away")
        except (OSError, EOFError):
            _note(f"somebody at {where} came to {self.place.where} and did not show a key")

    def _gather(self) -> None:
        until_s = time.monotonic() + self.place.wait_s
        _note(f"waiting at {self.place.where} for {_listed([*range(1, self.place.count)])}")
        while missing := [rank for rank in range(1, self.place.count) if rank not in self._nodes]:
            connection, hello = self._next(until_s, missing)
            if not isinstance(hello, Hello):
                connection.close()
                continue
            address = addresses(connection)[1]
            if line := self._refusal(hello):
                _note(f"node {hello.node} ({address}) was turned away: {line}")
                said(connection, Refused(line))
                connection.close()
                continue
            self._nodes[hello.node] = _Node(hello.node, connection, address)
        for node in self._nodes.values():
            node.heard_s = time.monotonic()
            said(node.control, Welcome(self.store_port))

    def _next(self, until_s: float, missing: list[int]) -> tuple[Connection, Any]:
        """Return who comes next."""
        while True:
            for node in list(self._nodes.values()):
                if node.control.poll():  # it says nothing before it is told something
                    _note(f"{node.name} has gone again")
                    node.control.close()
                    del self._nodes[node.rank]
                    missing.append(node.rank)
            with contextlib.suppress(Empty):
                return self._come.get(timeout=SIGN_EVERY_S)
            if time.monotonic() > until_s:
                raise NodesFailed(
                    f"{_listed(sorted(missing))} did not come to {self.place.where} within {self.place.wait_s:g} s"
                )

    def _refusal(self, hello: Hello) -> str | None:
        """Return why a node cannot take part, as it is told."""
        ours, theirs = dict(self.place.settings), dict(hello.settings)
        for name in {**ours, **theirs}:
            if ours.get(name) != theirs.get(name):
                return (
                    f"{name}: {_shown(theirs.get(name))}, but {_shown(ours.get(name))} on node 0; the nodes of a model "
                    "have the same settings"
                )
        if not 0 < hello.node < self.place.count:
            return f"node_rank: {hello.node} is none of nodes 1 to {self.place.count - 1}"
        if hello.node in self._nodes:
            return f"node_rank: node {hello.node} is there already, at {self._nodes[hello.node].address}"
        return None

    def connections(self) -> dict[int, Connection]:
        """Wait for the ranks on other nodes and return what they are spoken to over. Raises NodesFailed."""
        until_s = time.monotonic() + self.place.wait_s
        found: dict[int, Connection] = {}
        wanted = range(self._per_node, self._per_node * self.place.count)
        while len(found) < len(wanted):
            if self.failure is not None:
                raise NodesFailed(self.failure)
            if time.monotonic() > until_s:
                missing = sorted({self.node_of(rank) for rank in wanted if rank not in found})
                raise NodesFailed(f"the ranks of {_listed(missing)} did not come within {self.place.wait_s:g} s")
            with contextlib.suppress(Empty):
                connection, hello = self._come.get(timeout=SIGN_EVERY_S)
                if isinstance(hello, RankHello) and hello.rank in wanted and hello.rank not in found:
                    found[hello.rank] = self._nodes[self.node_of(hello.rank)].ranks[hello.rank] = connection
                else:
                    said(connection, Refused(f"the nodes of the model at {self.place.where} are together already"))
                    connection.close()
        return found

    def serving(self) -> None:
        """Tell the other nodes that all ranks are ready. Nobody is let in any more."""
        self._door.close()
        for node in self._nodes.values():
            said(node.control, Serving())

    # -- how they are ------------------------------------------------------------------------------------------------

    def node_of(self, rank: int) -> int:
        return rank // self._per_node

    def name_of(self, rank: int) -> str | None:
        """The node of a rank in words; None for our own."""
        node = self._nodes.get(self.node_of(rank))
        return None if node is None else node.name

    def heard_s(self) -> float:
        """When the rank on another node that is silent longest was heard of, on our clock."""
        return min(node.heard_s - node.silent_s for node in self._nodes.values())

    def worked_s(self) -> float:
        """CPU seconds of all ranks on other nodes."""
        return sum(node.worked_s for node in self._nodes.values())

    def on_our_clock(self, rank: int, span: tuple[float, float]) -> tuple[float, float]:
        """Two moments of the node of a rank on the clock of this one."""
        node = self._nodes.get(self.node_of(rank))
        ahead_s = 0.0 if node is None else node.clock_s
        return span[0] - ahead_s, span[1] - ahead_s

    def cause(self, within_s: float = 2.0) -> str | None:
        """Return which node was lost, if one was: ranks that lose a peer may be the first to say so."""
        with self._lost:
            self._lost.wait_for(lambda: self.failure is not None, within_s)
        return self.failure

    def _hear(self) -> None:
        """Ask for signs of life, and hear them, until the end."""
        asked_s = 0.0
        while not self._over.is_set() and self.failure is None:
            now_s = time.monotonic()
            if now_s - asked_s >= SIGN_EVERY_S:
                asked_s = now_s
                for node in self._nodes.values():
                    said(node.control, Tick(time.monotonic()))
            by_control = {node.control: node for node in self._nodes.values()}
            try:
                for control in wait(list(by_control), SIGN_EVERY_S):
                    self._take(by_control[control])  # type: ignore[index]
            except OSError:
                return  # they were closed under us: it is over
            for node in self._nodes.values():
                silent_s = time.monotonic() - node.heard_s
                if silent_s > self.place.silent_s:
                    self._lose(f"{node.name} has not been heard of for {silent_s:.0f} s")

    def _take(self, node: _Node) -> None:
        try:
            message = node.control.recv()
        except (EOFError, OSError):
            self._lose(f"{node.name} is gone")
            return
        now_s = node.heard_s = time.monotonic()
        if isinstance(message, Beat):
            trip_s = now_s - message.tick_s
            node.clocks.append((trip_s, message.now_s - (message.tick_s + trip_s / 2)))
            node.silent_s, node.worked_s = message.silent_s, message.worked_s
        elif isinstance(message, EndAsked):
            self.end_asked = f"{node.name} was told to end"
        elif isinstance(message, Lost):
            self._lose(f"{node.name}: {message.line}")

    def _lose(self, line: str) -> None:
        """A node is lost: whoever waits for a rank on another node waits no longer."""
        if self._over.is_set():
            return
        with self._lost:
            self.failure = self.failure or line
            self._lost.notify_all()
        for node in self._nodes.values():
            said(node.control, End(self.failure, 0.0))
            for connection in node.ranks.values():
                cut(connection)

    def close(self, patience_s: float = 5.0, line: str | None = None) -> None:
        """Tell the other nodes that it is over, and why if it is not in order."""
        self._over.set()
        with contextlib.suppress(OSError):
            self._door.shutdown(socket.SHUT_RDWR)  # wakes who waits for somebody to come
        self._door.close()
        for node in self._nodes.values():
            said(node.control, End(self.failure or line, patience_s))
            node.control.close()
            for connection in node.ranks.values():
                connection.close()


def _listed(nodes: list[int]) -> str:
    return f"node {nodes[0]}" if len(nodes) == 1 else f"nodes {', '.join(map(str, nodes))}"


def _shown(value: object) -> str:
    return "none" if value is None else str(value)


def _note(line: str) -> None:
    print(f"note: {line}", file=sys.stderr)
