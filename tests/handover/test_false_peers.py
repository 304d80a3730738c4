"""Halves whose peer says what cannot be: the connection ends with one line, and so do its requests, with nothing left."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np
import pytest
import zmq

from tests.handover.halves import ROUTER, Half
from tests.handover.test_pairs import PARAMS, PROMPT, RUN, TEXT
from tests.patience import until
from workbench.handover.addresses import join_address
from workbench.handover.kv_shares import RanksKV
from workbench.handover.live_wire import LiveWire
from workbench.handover.wire_state import WireSettings
from workbench.scheduler.disaggregated.letters import (
    HandoverEnded,
    HandsShaken,
    KVArrived,
    KVSent,
    Letter,
    PagesSetAside,
    PeerGone,
    SendPages,
    Shake,
)
from workbench.scheduler.request import Finish
from workbench.serving.engine import peers
from workbench.settings.run_settings import RunSettings

KEY = "key of a test"
PAGES = -(-len(PROMPT) // 16)


class FalsePeer:
    """A peer that knows the key and all that there is to know, and has no scheduler: a test says what it posts."""

    def __init__(self, half: Half, of_half: LiveWire) -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        self.address = join_address(*listener.getsockname()[:2])
        role = {"prefill": "decode", "decode": "prefill"}[of_half.identity.role]
        identity = msgspec.structs.replace(of_half.identity, role=role, address=self.address, instance_id="false")
        memory = RanksKV(
            [(0, 1, 0, 1, 8)],
            4096,
            lambda rank, pages: np.zeros((1, 1, len(pages), 8), np.uint8),
            lambda *args: None,
        )
        self.wire = LiveWire(identity, memory, listener, lambda: None, WireSettings(KEY.encode()), lambda line: None)
        self.number = self.wire.number(half.ready.peer or "")
        self._came: list[Any] = []

    def waits_for(self, kind: type) -> Any:
        def found() -> list[Any]:
            self._came += [message for _, message in self.wire.take()]
            return [one for one in self._came if isinstance(one, kind)]

        until(lambda: bool(found()), f"{kind.__name__} comes")
        return found()[0]


@pytest.fixture
def halves(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Makes halves, each with a false peer; they are closed in the end."""
    context = zmq.Context()
    made: list[Half] = []
    wires: list[LiveWire] = []

    def wire(*args: Any) -> LiveWire:
        wires.append(LiveWire(*args))
        return wires[-1]

    monkeypatch.setattr(peers, "LiveWire", wire)

    def make(role: Any) -> tuple[Half, FalsePeer]:
        made.append(Half(context, RunSettings(**RUN), role, TEXT, backend="simulated", time_scale=0.0, peer_key=KEY))
        peer = FalsePeer(made[-1], wires[-1])
        wires.append(peer.wire)
        return made[-1], peer

    make.wires = wires  # type: ignore[attr-defined]
    yield make
    for one in wires:
        one.close()
    for half in made:
        half.close()
    context.destroy(linger=0)


@pytest.mark.parametrize(
    ("cached", "pages", "line"),
    [
        (0, PAGES - 1, f"it set {PAGES - 1} pages aside beyond 0 tokens for a prompt of {len(PROMPT)}"),
        (0, PAGES + 1, f"it set {PAGES + 1} pages aside beyond 0 tokens for a prompt of {len(PROMPT)}"),
        (7, PAGES, "beyond 7 tokens"),
        (PAGES * 16, 0, "it set 0 pages aside"),
    ],
)
@pytest.mark.parametrize("early", [False, True])
def test_a_prefill_half_is_not_taken_in_by_pages_that_cannot_be(
    halves: Any, capfd: Any, cached: int, pages: int, line: str, early: bool
) -> None:
    half, peer = halves("prefill")
    told = PagesSetAside(peer.wire.room(ROUTER, 1), "r", cached, np.arange(pages, dtype=np.int32))
    if early:
        peer.wire.post([Letter(peer.number, told)])
    number = half.submit(PROMPT, PARAMS, 1, peer=peer.address)
    if not early:
        peer.wire.post([Letter(peer.number, told)])
    (answer,) = half.read(number)
    assert (answer.kind, answer.detail) == ("aborted", "decode_gone")
    half.await_rest()
    assert [one for one in capfd.readouterr().err.splitlines() if line in one]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"target_pages": "other"}, "it sent pages that were not set aside for that handover"),
        ({"count": PAGES - 1}, f"it ended a handover of {PAGES} pages after {PAGES - 1}"),
        ({"count": PAGES + 1}, f"it sent {PAGES + 1} pages of a handover for which {PAGES} are set aside"),
        ({"token": 1 << 30}, "it sent a token that there is not"),
        ({"token": -1}, "it sent a token that there is not"),
    ],
)
def test_a_decode_half_is_not_taken_in_by_pages_that_cannot_be(
    halves: Any, capfd: Any, changes: dict[str, Any], line: str
) -> None:
    half, peer = halves("decode")
    number = half.submit(PROMPT, PARAMS, 1, peer=peer.address)
    told: PagesSetAside = peer.waits_for(PagesSetAside)
    count = changes.get("count", PAGES)
    target = np.resize(told.pages, count)
    if "target_pages" in changes:
        target = target[::-1].copy()
    source = np.arange(count, dtype=np.int32)
    token = changes.get("token", 40)
    peer.wire.post(
        [SendPages(told.room, "r", peer.number, source, target, True, True, len(PROMPT), token)],
    )
    (answer,) = half.read(number)
    assert (answer.kind, answer.detail) == ("aborted", "prefill_gone")
    half.await_rest()
    assert [one for one in capfd.readouterr().err.splitlines() if line in one]


def test_nobody_speaks_of_a_handover_of_somebody_else(halves: Any, capfd: Any) -> None:
    half, peer = halves("prefill")
    number = half.submit(PROMPT, PARAMS, 1, peer="127.0.0.1:9")
    told = PagesSetAside(peer.wire.room(ROUTER, 1), "r", 0, np.arange(PAGES, dtype=np.int32))
    peer.wire.post([Letter(peer.number, told)])
    peer.waits_for(PeerGone)
    assert "it speaks of a handover that it has no part in" in capfd.readouterr().err
    half.cancel(number)
    assert half.read(number)[0].detail == "client"
    half.await_rest()


def test_pages_of_a_peer_that_has_gone_since_are_not_waited_for(halves: Any) -> None:
    half, peer = halves("prefill")
    told = PagesSetAside(peer.wire.room(ROUTER, 1), "r", 0, np.arange(PAGES, dtype=np.int32))
    peer.wire.post([Letter(peer.number, told), Shake(peer.number)])
    peer.waits_for(HandsShaken)
    peer.wire.close()
    there = halves.wires[0]._state.peers[0]
    until(lambda: there.gone and not there.untold, "the half hears that it is gone")
    number = half.submit(PROMPT, PARAMS, 1, peer=peer.address)
    until(lambda: half.beat().waiting, "it waits for pages")
    half.cancel(number)
    assert half.read(number)[0].detail == "client"
    half.await_rest()


def test_a_refusal_that_nobody_knows_ends_a_request_as_aborted(halves: Any) -> None:
    half, peer = halves("decode")
    number = half.submit(PROMPT, PARAMS, 1, peer=peer.address)
    told = peer.waits_for(PagesSetAside)
    peer.wire.post([Letter(peer.number, HandoverEnded(told.room, Finish("rejected", "no such thing")))])
    (answer,) = half.read(number)
    assert (answer.kind, answer.detail) == ("aborted", "no such thing")
    half.await_rest()


def test_a_peer_that_is_given_up_and_comes_back_is_served(halves: Any) -> None:
    half, peer = halves("decode")
    number = half.submit(PROMPT, PARAMS, 1, peer=peer.address)
    told = peer.waits_for(PagesSetAside)
    order = SendPages(told.room, "r", peer.number, told.pages, told.pages, True, True, len(PROMPT), 40)
    peer.wire.post([order._replace(target_pages=told.pages[::-1].copy())])
    assert half.read(number)[0].detail == "prefill_gone"
    peer._came.clear()
    number = half.submit(PROMPT, PARAMS, 2, peer=peer.address)
    told = peer.waits_for(PagesSetAside)
    peer.wire.post([Shake(peer.number)])
    peer.waits_for(HandsShaken)
    peer.wire.post([order._replace(room=told.room, pages=told.pages, target_pages=told.pages)])
    (answer,) = half.read(number)
    assert (answer.kind, len(answer.tokens)) == ("length", 6)
    peer.waits_for(KVSent)
    half.await_rest()
    assert not any(isinstance(one, KVArrived) for one in peer._came)


def test_pages_that_are_set_aside_twice_are_no_end_of_a_prefill_half(halves: Any, capfd: Any) -> None:
    half, peer = halves("prefill")
    number = half.submit(PROMPT, PARAMS, 1, peer=peer.address)
    until(lambda: half.beat().waiting, "it waits for pages")
    told = PagesSetAside(peer.wire.room(ROUTER, 1), "r", 0, np.arange(PAGES, dtype=np.int32))
    peer.wire.post([Letter(peer.number, told)] * 2)
    half.read(number)  # one way or the other, by which of both comes first
    half.await_rest()
    said = "it set pages aside for a handover twice"
    until(lambda: said in capfd.readouterr().err, "a line says so")
    half.await_rest()
