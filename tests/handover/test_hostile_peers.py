"""Peers that mean harm, and strangers: nobody else is held up, nothing is written or read that is not theirs, one line says
what happened, and the instance goes on."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
from typing import Any

import msgspec
import numpy as np
import pytest

from tests.handover.test_wires import lies_to, pages_of, shaken, sides
from tests.handover.wires import block, identity
from tests.patience import PATIENCE_S, until
from workbench.handover import arrivals, handshake
from workbench.handover import peer_messages as said
from workbench.handover.addresses import join_address, split_address
from workbench.handover.handshake import HELLO, connect, introduce
from workbench.handover.peer_link import Link, LinkLost
from workbench.handover.shared_memory import ShmIncoming
from workbench.handover.wire_state import WireSettings
from workbench.scheduler.disaggregated.letters import (
    HandoverEnded,
    KVArrived,
    KVSent,
    Letter,
    PagesSetAside,
    PeerGone,
    Shake,
    StopSending,
)
from workbench.scheduler.request import Finish

__all__ = ["lies_to", "sides"]  # fixtures


# -- strangers -----------------------------------------------------------------------------------------------------------


def test_strangers_that_say_nothing_hold_up_nobody(sides: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrivals, "MOST_STRANGERS", 3)
    decode, prefill = sides("decode"), sides("prefill")
    strangers = [socket.create_connection(split_address(prefill.address)) for _ in range(7)]
    for stranger in strangers[::2]:
        stranger.sendall(struct.pack("!I", 60) + b"half a hello")
    try:
        shaken(prefill, decode)
        prefill.await_line("refused", "3 others came while it did not shake hands")
    finally:
        for stranger in strangers:
            stranger.close()


def test_a_stranger_that_says_a_little_now_and_then_has_as_long_as_any_other(
    sides: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handshake, "HANDSHAKE_S", 0.3)
    decode = sides("decode")
    with socket.create_connection(split_address(decode.address)) as stranger:
        stranger.sendall(struct.pack("!I", 1 << 15))

        def refused() -> bool:
            with contextlib.suppress(OSError):
                stranger.sendall(b"x")  # sooner than any wait for one piece would end
            return bool(decode.lines)

        until(refused, "it is refused")
    decode.await_line("refused: it did not answer in time")


@pytest.mark.parametrize("length", [1 << 17, 1 << 31, (1 << 32) - 1])
def test_a_stranger_makes_nobody_keep_much(sides: Any, length: int) -> None:
    decode = sides("decode")
    with socket.create_connection(split_address(decode.address)) as stranger:
        stranger.sendall(struct.pack("!I", length))
        decode.await_line("refused: it is no instance of workbench")


def _answer(link: Link, kind: Any) -> Any:
    return link.receive(msgspec.msgpack.Decoder(kind))


def test_neither_a_challenge_sent_back_nor_a_proof_of_before_lets_anybody_in(sides: Any) -> None:
    decode = sides("decode", settings=WireSettings(key=b"key"))
    own = identity("prefill")
    encode = msgspec.msgpack.encode

    def began() -> tuple[Link, bytes, Any]:
        link, nonce = connect(decode.address), os.urandom(32)
        link.send(encode(handshake._Begin(HELLO, nonce)))
        return link, nonce, _answer(link, handshake._Proof)

    # Its own proof, as if it were this side's.
    link, _, proof = began()
    link.send(encode(handshake._Introduction(own, "", {"tcp": b""}, proof.proof)))
    with pytest.raises(LinkLost):
        link.receive(msgspec.msgpack.Decoder(handshake._Introduction))
    # What somebody who has the key said on another connection.
    link, nonce, proof = began()
    said_once = handshake._Introduction(own, "", {"tcp": b""}, b"")
    said_once.proof = handshake._proof(b"key", b"connects", nonce + proof.nonce, handshake._content(said_once))
    again, _, _ = began()
    again.send(encode(said_once))
    with pytest.raises(LinkLost):
        again.receive(msgspec.msgpack.Decoder(handshake._Introduction))
    # And something else under the proof of it.
    said_once.identity = msgspec.structs.replace(own, address="127.0.0.1:10")
    link.send(encode(said_once))
    with pytest.raises(LinkLost):
        link.receive(msgspec.msgpack.Decoder(handshake._Introduction))
    until(lambda: "the peer keys differ" in str(decode.lines), "a line says so")
    assert not decode.take()


def test_an_instance_is_no_peer_of_its_own_however_its_words_come_back(sides: Any) -> None:
    """Who stands between two connections of an instance passes its challenges back and forth."""
    prefill = sides("prefill", settings=WireSettings(key=b"key"))
    between = socket.create_server(("127.0.0.1", 0))
    prefill.wire.post([Shake(prefill.wire.number(join_address(*between.getsockname())))])
    out, back = between.accept()[0], socket.create_connection(split_address(prefill.address))
    for _ in range(2):
        back.sendall(out.recv(1 << 16))
        out.sendall(back.recv(1 << 16))
    prefill.await_line("the role is prefill there and prefill here")
    assert not any(isinstance(one, PagesSetAside) for one in prefill.take())
    for each in (between, out, back):
        each.close()


# -- lies ------------------------------------------------------------------------------------------------------------------


def test_nobody_says_that_it_has_what_was_not_sent_to_its_end(sides: Any) -> None:
    """Else pages are given to others while they are being sent to it."""
    prefill, decode = sides("prefill"), sides("decode")
    shaken(prefill, decode)
    decode.set_aside(decode.number(prefill), [4, 8])
    prefill.await_(PagesSetAside)
    prefill.wire.post([pages_of(prefill, decode, [1], [4], last=False, token=None)])
    until(
        lambda: decode.memory.ranks[0] is not None and decode.wire._state.peers[0].incoming is not None,
        "they are connected",
    )
    link = decode.wire._state.peers[0].incoming
    link.send(said.encode(said.Received(("router", 7, 0))))
    prefill.await_(PeerGone)
    prefill.await_line("it says that it has a handover that was not sent to its end")
    assert not any(isinstance(one, KVSent) for one in prefill.take())


def test_a_block_of_all_pages_of_a_long_prompt_makes_nobody_keep_them(
    sides: Any, lies_to: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workbench.handover.rooms.BLOCK_BYTES", 1000)
    decode = sides("decode")
    liar = lies_to(decode)
    decode.set_aside(liar.number, [4, 8, 9])
    liar.say(block([4, 8, 9]))
    decode.await_line("more than the 1000 that a block may have")
    decode.await_(PeerGone)


@pytest.mark.parametrize("pages", [[-1, 8], [4, 64], [4, 1 << 30], [4, 4], [8, 8]])
def test_pages_that_there_are_not_and_pages_twice_are_not_written(sides: Any, lies_to: Any, pages: list[int]) -> None:
    decode = sides("decode")
    liar = lies_to(decode)
    decode.set_aside(liar.number, [4, 8])
    liar.say(block(pages))
    decode.await_(PeerGone)
    decode.await_line("pages that were not set aside for that handover")
    assert not any(held.any() for held in decode.memory.ranks)


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"\xc0",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.",  # a pickle that calls something
        msgspec.msgpack.encode(["unknown", 1]),
        msgspec.msgpack.encode(["block"]),
        msgspec.msgpack.encode(["sent", ["router", -1, 0], 5, 0]),
        msgspec.msgpack.encode(["again", ["r" * 1000, 1, 0]]),
        msgspec.msgpack.encode(["ended", ["router", 1, 0], "aborted", 7]),
        b"\x91" * 100_000,
    ],
)
def test_what_is_no_message_ends_its_connection(sides: Any, lies_to: Any, frame: bytes) -> None:
    decode = sides("decode")
    liar = lies_to(decode)
    liar.link.send(frame)
    decode.await_(PeerGone)
    assert len(decode.lines) == 1 and f"peer {liar.honest.address}: it" in decode.lines[0]
    prefill = sides("prefill")
    shaken(prefill, decode)  # it goes on with others


def test_a_line_about_a_peer_is_one_line_whatever_it_calls_itself(sides: Any, lies_to: Any) -> None:
    decode = sides("decode")
    liar = lies_to(decode)
    decode.wire.number(liar.honest.address)
    liar.say(said.Ended(("router", 7, 0), "one\nwarning: another\x1b[2J" + "x" * 5000, ""))
    decode.await_(PeerGone)
    (line,) = decode.lines
    assert line.isprintable() and len(line) <= 500


def test_who_comes_by_a_name_that_is_connected_takes_its_place_and_none_of_its_pages(sides: Any, lies_to: Any) -> None:
    decode = sides("decode")
    liar = lies_to(decode)
    decode.set_aside(liar.number, [4, 8])
    liar.honest.await_(PagesSetAside)
    other = connect(decode.address)
    introduce(other, b"", msgspec.structs.replace(liar.honest.wire.identity, instance_id="another"), {"tcp": b""})
    decode.await_(PeerGone)
    decode.await_line("it has begun anew")
    other.send(said.encode(block([4, 8])))
    decode.await_line("for which none are set aside")
    assert not any(held.any() for held in decode.memory.ranks)
    other.close()


def test_several_that_come_by_one_name_at_once_leave_one_connection(sides: Any) -> None:
    decode = sides("decode")
    honest = sides("prefill")
    links = []
    for number in range(8):
        link = connect(decode.address)
        introduce(
            link, b"", msgspec.structs.replace(honest.wire.identity, instance_id=f"instance-{number}"), {"tcp": b""}
        )
        links.append(link)

    decode.await_(PeerGone, 7)
    signs = []
    for link in links:
        with contextlib.suppress(LinkLost):
            signs.append(link.receive(said.answer_decoder))
        link.close()
    assert signs == [said.Pong()]


@pytest.mark.parametrize("address", ["x" * 70 + ".example:80", "nothing", ":::80", "192.0.2.1:99999"])
def test_what_is_no_address_is_a_peer_that_cannot_be_reached(sides: Any, address: str) -> None:
    decode, prefill = (
        sides("decode", settings=WireSettings(key=b"k")),
        sides("prefill", settings=WireSettings(key=b"k")),
    )
    number = decode.wire.number(address)
    for count in (1, 2):  # and again when it is asked for again
        decode.wire.post([Shake(number)])
        assert decode.await_(PeerGone, count)[-1].peer == number
    decode.await_line("cannot be reached")
    shaken(prefill, decode)


def test_memory_that_may_become_smaller_is_not_mapped() -> None:
    mark = bytes(64)
    descriptor = os.memfd_create("lie")
    try:
        os.write(descriptor, mark + bytes(64))
        offer = [os.getpid(), descriptor, 64, 1, mark]
        with pytest.raises((ValueError, OSError)):
            ShmIncoming(msgspec.msgpack.encode(offer))
    finally:
        os.close(descriptor)


def test_a_handover_that_is_stopped_twice_sends_nothing_of_what_came_between(sides: Any) -> None:
    """Its pages are somebody else's by the time that the wire comes to them."""
    prefill, decode = sides("prefill"), sides("decode")
    shaken(prefill, decode)
    decode.set_aside(decode.number(prefill), [4, 8])
    prefill.await_(PagesSetAside)
    prefill.memory.fill(1)
    room = prefill.wire.room("router", 7)
    held, goes_on = threading.Event(), threading.Event()
    read = prefill.memory.kv._read

    def slow(*what: Any) -> np.ndarray:
        held.set()
        assert goes_on.wait(PATIENCE_S)
        return read(*what)

    prefill.memory.kv._read = slow
    prefill.wire.post([pages_of(prefill, decode, [1], [4], last=False, token=None)])
    assert held.wait(PATIENCE_S)
    prefill.wire.post([StopSending(room), pages_of(prefill, decode, [1, 2], [4, 8]), StopSending(room)])
    finish = Finish("aborted", "client")
    prefill.wire.post([Letter(prefill.number(decode), HandoverEnded(room, finish))])
    goes_on.set()
    decode.await_(HandoverEnded)
    assert not any(isinstance(one, KVArrived) for one in decode.take())


@pytest.mark.parametrize("side", ["prefill", "decode"])
def test_kv_memory_that_fails_ends_what_is_shared_with_a_peer_in_one_line(sides: Any, side: str) -> None:
    prefill, decode = sides("prefill"), sides("decode")
    shaken(prefill, decode)
    decode.set_aside(decode.number(prefill), [4])
    prefill.await_(PagesSetAside)

    def fail(*what: Any) -> Any:
        raise RuntimeError("out of order")

    failing, other = (prefill, decode) if side == "prefill" else (decode, prefill)
    failing.memory.kv._read = failing.memory.kv._write = fail
    prefill.wire.post([pages_of(prefill, decode, [1], [4])])
    failing.await_(PeerGone), other.await_(PeerGone)
    failing.await_line(f"peer {other.address}", "RuntimeError: out of order")
    shaken(prefill, decode)


def test_a_peer_that_does_not_read_keeps_nobody_from_seeing_that_another_is_silent(sides: Any) -> None:
    """Signs of life are sent by the thread that looks at all peers."""
    ours, theirs = socket.socketpair()
    link = Link(ours)
    ours.setblocking(False)
    with pytest.raises(BlockingIOError):
        while True:
            ours.send(b"x" * 4096)
    ours.setblocking(True)
    link.send_if_free(said.encode(said.Ping()))  # does not wait
    link.close(), theirs.close()
