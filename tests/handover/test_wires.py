"""The wire between live instances: what is refused, and that no page is written but by whom it was set aside for."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np
import pytest

from tests.handover.wires import HEADS, LAYERS, PAGE_BYTES, Liar, Side, block
from tests.patience import until
from workbench.handover import peer_messages as said
from workbench.handover.addresses import split_address
from workbench.handover.shared_memory import ShmIncoming, ShmOutgoing
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
    StopSending,
    TokenLogprobs,
    Withdrawn,
)
from workbench.scheduler.request import Finish

NOTHING = WireSettings(loopback_only=True)


@pytest.fixture
def sides() -> Iterator[Any]:
    """Makes wires, which are closed in the end."""
    made: list[Side] = []

    def make(kind: str, *args: Any, **more: Any) -> Side:
        made.append(Side(kind, *args, **more))
        return made[-1]

    yield make
    for side in made:
        side.wire.close()


@pytest.fixture
def lies_to() -> Iterator[Any]:
    """Makes peers that lie, which are closed in the end."""
    made: list[Liar] = []

    def make(*args: Any) -> Liar:
        made.append(Liar(*args))
        return made[-1]

    yield make
    for liar in made:
        liar.link.close()
        liar.honest.wire.close()


def shaken(prefill: Side, decode: Side) -> None:
    decode.wire.post([Shake(decode.number(prefill))])
    decode.await_(HandsShaken)


def pages_of(prefill: Side, decode: Side, source: list[int], target: list[int], **more: Any) -> SendPages:
    room = prefill.wire.room("router", 7)
    asked = {"first": True, "last": True, "tokens": 40, "token": 5, "cached_tokens": 0, **more}
    return SendPages(room, "r", prefill.number(decode), np.array(source, np.int32), np.array(target, np.int32), **asked)


def test_nothing_is_written_where_a_batch_in_flight_may_still_write(sides: Any) -> None:
    prefill, decode = sides("prefill"), sides("decode")
    prefill.memory.fill(1)
    shaken(prefill, decode)
    asked, landed = threading.Event(), threading.Event()

    def wait() -> None:
        asked.set()
        landed.wait()

    decode.memory.kv.landed = lambda: wait
    decode.set_aside(decode.number(prefill), [11, 3])
    decode.memory.kv.landed = lambda: asked.set  # of batches launched later
    prefill.await_(PagesSetAside)
    prefill.wire.post([pages_of(prefill, decode, [5, 9], [11, 3])])
    until(asked.is_set, "the block is there")
    assert not decode.memory.ranks[0].any() and not [one for one in decode.take() if isinstance(one, KVArrived)]
    landed.set()
    decode.await_(KVArrived)
    assert np.array_equal(decode.memory.whole(np.array([11, 3])), prefill.memory.whole(np.array([5, 9])))


@pytest.mark.parametrize(("prefill_tp", "decode_tp"), [(1, 1), (1, 2), (2, 1), (4, 2), (2, 4), (8, 2), (2, 8)])
@pytest.mark.parametrize("carrier", ["tcp", "shm"])
def test_pages_arrive_whole_however_heads_are_split_on_either_side(
    sides: Any, carrier: Any, prefill_tp: int, decode_tp: int
) -> None:
    settings = WireSettings(carrier=carrier, loopback_only=True)
    prefill, decode = sides("prefill", prefill_tp, settings), sides("decode", decode_tp, settings)
    prefill.memory.fill(1)
    shaken(prefill, decode)
    source, target = [5, 9, 2, 40], [11, 3, 60, 1]
    room = decode.set_aside(decode.number(prefill), target)
    (told,) = prefill.await_(PagesSetAside)
    assert told.pages.tolist() == target
    probabilities = TokenLogprobs(-0.5, (-0.5, -2.0), (5, 8))
    orders = [
        pages_of(prefill, decode, source[:1], target[:1], last=False, token=None),
        pages_of(prefill, decode, source[1:], target[1:], first=False, cached_tokens=3, logprobs=probabilities),
    ]
    prefill.wire.post(orders)
    (arrived,) = decode.await_(KVArrived)
    assert (arrived.room, arrived.token, arrived.cached_tokens, arrived.logprobs) == (room, 5, 3, probabilities)
    prefill.await_(KVSent)
    wanted = prefill.memory.whole(np.array(source))
    assert np.array_equal(decode.memory.whole(np.array(target)), wanted)
    for rank, held in enumerate(decode.memory.ranks):
        start = rank * HEADS // decode_tp
        assert np.array_equal(held[:, :, target], wanted[:, start : start + held.shape[1]])
        assert np.count_nonzero(held) == held[:, :, target].size, "a page was written that was not set aside"


def test_what_was_sent_before_a_request_lost_its_kv_is_sent_again(sides: Any) -> None:
    prefill, decode = sides("prefill"), sides("decode")
    shaken(prefill, decode)
    decode.set_aside(decode.number(prefill), [4, 8])
    prefill.await_(PagesSetAside)
    prefill.memory.fill(1)
    room = prefill.wire.room("router", 7)
    prefill.wire.post([pages_of(prefill, decode, [1], [4], last=False, token=None), StopSending(room)])
    prefill.memory.fill(2)
    prefill.wire.post([pages_of(prefill, decode, [6, 7], [4, 8])])
    decode.await_(KVArrived)
    assert np.array_equal(decode.memory.whole(np.array([4, 8])), prefill.memory.whole(np.array([6, 7])))


def test_letters_reach_the_other_side(sides: Any) -> None:
    prefill, decode = sides("prefill"), sides("decode")
    shaken(prefill, decode)
    room = decode.set_aside(decode.number(prefill), [4])
    decode.wire.post([Letter(decode.number(prefill), Withdrawn(room))])
    prefill.await_(Withdrawn)
    finish = Finish("aborted", "withdrawn")
    prefill.wire.post([Letter(prefill.number(decode), HandoverEnded(prefill.wire.room("router", 7), finish))])
    assert decode.await_(HandoverEnded)[0].finish == finish


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"page_size": 8}, "page_size is"),
        ({"kv_dtype": "fp32"}, "kv_dtype is"),
        ({"model": "other"}, "the model there and here differ"),
        ({"weights": "other"}, "the weights there and here differ"),
        ({"layers": 4}, "the number of layers is"),
        ({"version": 2}, "the protocol is"),
        ({"role": "decode"}, "the role is decode"),
    ],
)
def test_who_has_something_else_is_refused_in_one_line_on_both_sides(
    sides: Any, changes: dict[str, Any], line: str
) -> None:
    prefill, decode = sides("prefill", **changes), sides("decode")
    decode.wire.post([Shake(decode.number(prefill))])
    decode.await_(PeerGone)
    prefill.await_line("refused", line)
    decode.await_line(f"peer {prefill.address}", line)
    assert len(prefill.lines) == len(decode.lines) == 1
    assert not prefill.take()


@pytest.mark.parametrize("keys", [(b"one", b"other"), (b"one", b""), (b"", b"one")])
def test_a_wrong_key_is_refused_in_one_line_on_both_sides(sides: Any, keys: tuple[bytes, bytes]) -> None:
    prefill, decode = (
        sides(role, settings=WireSettings(key=key)) for role, key in zip(("prefill", "decode"), keys, strict=True)
    )
    decode.wire.post([Shake(decode.number(prefill))])
    decode.await_(PeerGone)
    decode.await_line("the peer keys differ")
    prefill.await_line("refused", "the peer keys may differ (--peer-key)")
    assert not prefill.take()
    assert len(prefill.lines) == len(decode.lines) == 1


def test_a_stranger_is_refused_in_one_line(sides: Any) -> None:
    decode = sides("decode")
    with socket.create_connection(split_address(decode.address)) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\nHost: here\r\n\r\n")
        decode.await_line("a connection from 127.0.0.1 was refused: it is no instance of workbench")
        assert stranger.recv(1) == b""
    assert len(decode.lines) == 1


def test_without_a_key_there_are_no_peers_elsewhere(sides: Any) -> None:
    decode = sides("decode")
    decode.wire.post([Shake(decode.wire.number("192.0.2.1:80"))])
    decode.await_(PeerGone)
    decode.await_line("peer 192.0.2.1:80: without --peer-key, peers are on this machine")


LIES: dict[str, tuple[said.Said, str]] = {
    "other pages": (block([4, 9]), "pages that were not set aside"),
    "pages in another order": (block([8, 4]), "pages that were not set aside"),
    "more pages": (block([4, 8, 9]), "sent 3 pages of a handover for which 2 are set aside"),
    "a later page first": (block([8], first=1), "sent page 1 of a handover where page 0 was to come"),
    "a room that nobody has": (block([4, 8], number=8), "for which none are set aside"),
    "too few bytes": (block([4, 8], size=10), "sent 10 bytes for 2 pages"),
    "too many bytes": (block([4, 8], size=1 << 40), f"sent {1 << 40} bytes for 2 pages"),
    "layers that there are not": (
        block([4, 8], box=(0, LAYERS + 1, 0, HEADS)),
        "layers and heads that the model has not",
    ),
    "heads that there are not": (block([4, 8], box=(0, LAYERS, -1, HEADS)), "layers and heads that the model has not"),
    "no pages": (block([], size=0), "a list of pages of 0 bytes"),
    "the end before the pages": (said.Sent(("router", 7, 0), 5, 0), "ended a handover of 2 pages after 0"),
    "the end of another room": (said.Sent(("router", 9, 0), 5, 0), "for which none are set aside"),
    "a letter of the other role": (
        said.Withdraw(("router", 7, 0)),
        "sent a Withdraw to an instance that is there to decode",
    ),
    "a room that cannot be": (said.Again(("", 7, 0)), "named a handover that cannot be"),
    "an end that is none": (said.Ended(("router", 7, 0), "finished", ""), "ended a handover as 'finished'"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lying_transfer_ends_its_connection_and_writes_nothing(sides: Any, lies_to: Any, lie: str) -> None:
    message, line = LIES[lie]
    decode = sides("decode")
    liar = lies_to(decode)
    decode.set_aside(liar.number, [4, 8])
    liar.say(message)
    assert [one.peer for one in decode.await_(PeerGone)] == [liar.number]
    decode.await_line(line)
    assert not any(held.any() for held in decode.memory.ranks)
    assert not any(isinstance(one, KVArrived) for one in decode.take())
    (fault,) = [liar.link.receive(said.answer_decoder)]
    assert line in fault.line


def test_a_part_that_is_sent_twice_and_one_that_is_never_sent_end_the_connection(sides: Any, lies_to: Any) -> None:
    half = block([4, 8], box=(0, LAYERS, 0, HEADS // 2))
    payload = bytes(half.size)
    for more, line in (
        (block([4, 8]), "layers or heads of a handover twice"),
        (said.Sent(("router", 7, 0), 5, 0), "ended a handover of 2 pages after 2"),
    ):
        decode = sides("decode")
        liar = lies_to(decode)
        decode.set_aside(liar.number, [4, 8])
        liar.say(half, payload)
        liar.say(more)
        decode.await_(PeerGone)
        decode.await_line(line)


@pytest.mark.parametrize("sent", [0, 1, 2 * LAYERS * HEADS * PAGE_BYTES - 1])
def test_a_transfer_that_breaks_off_writes_nothing(sides: Any, lies_to: Any, sent: int) -> None:
    decode = sides("decode")
    liar = lies_to(decode)
    decode.set_aside(liar.number, [4, 8])
    liar.say(block([4, 8]), bytes([255]) * sent)
    liar.link.close()
    decode.await_(PeerGone)
    decode.await_line(f"it ended in the middle of a transfer, {sent} of")
    assert not any(held.any() for held in decode.memory.ranks)


def test_a_place_in_shared_memory_that_there_is_not_writes_nothing(sides: Any, lies_to: Any) -> None:
    decode = sides("decode", settings=WireSettings(carrier="shm", loopback_only=True))
    memory = ShmOutgoing(64)
    try:
        liar = lies_to(decode, memory)
        decode.set_aside(liar.number, [4, 8])
        liar.say(block([4, 8], place=3))
        decode.await_(PeerGone)
        decode.await_line("a place that there is not")
    finally:
        memory.close()
    assert not any(held.any() for held in decode.memory.ranks)


def test_memory_of_another_machine_is_not_taken_for_ones_own(sides: Any) -> None:
    memory, other = ShmOutgoing(64), ShmOutgoing(64)
    try:
        offer, others = (msgspec.msgpack.decode(one.offer()) for one in (memory, other))
        ShmIncoming(memory.offer()).close()
        for place, value in ((0, 0), (0, 1 << 40), (1, others[1]), (1, 0), (1, 999999), (2, 128), (3, 3), (4, b"")):
            lie = [*offer[:place], value, *offer[place + 1 :]]
            with pytest.raises((ValueError, OSError)):
                ShmIncoming(msgspec.msgpack.encode(lie))
        with pytest.raises(ValueError):
            ShmIncoming(b"lie")
    finally:
        memory.close(), other.close()


def test_nothing_is_written_for_a_handover_that_has_ended(sides: Any, lies_to: Any) -> None:
    decode = sides("decode")
    liar = lies_to(decode)
    decode.set_aside(liar.number, [4, 8])
    liar.say(said.Ended(("router", 7, 0), "aborted", "withdrawn"))
    decode.await_(HandoverEnded)
    liar.say(block([4, 8]), bytes(block([4, 8]).size))
    decode.await_(PeerGone)
    decode.await_line("for which none are set aside")
    assert not any(held.any() for held in decode.memory.ranks)


def test_a_peer_cannot_write_what_was_set_aside_for_another(sides: Any, lies_to: Any) -> None:
    decode, prefill = sides("decode"), sides("prefill")
    shaken(prefill, decode)
    decode.set_aside(decode.number(prefill), [4, 8])
    liar = lies_to(decode)
    liar.say(block([4, 8]))
    assert [one.peer for one in decode.await_(PeerGone)] == [liar.number]
    assert not any(held.any() for held in decode.memory.ranks)
    prefill.memory.fill(1)
    prefill.await_(PagesSetAside)
    prefill.wire.post([pages_of(prefill, decode, [1, 2], [4, 8])])
    decode.await_(KVArrived)  # the other one is not concerned


def test_a_peer_that_goes_is_told_of_once_and_hands_are_shaken_anew(sides: Any) -> None:
    prefill, decode = sides("prefill"), sides("decode")
    shaken(prefill, decode)
    prefill.wire.close()
    assert [one.peer for one in decode.await_(PeerGone)] == [decode.number(prefill)]
    assert decode.lines == []  # it has taken leave
    decode.wire.post([Shake(decode.number(prefill))])
    decode.await_(PeerGone, 2)
    decode.await_line("cannot be reached")


def test_a_peer_that_is_silent_is_gone(sides: Any, lies_to: Any) -> None:
    decode = sides("decode", settings=WireSettings(timeout_s=0.2, loopback_only=True))
    liar = lies_to(decode)
    decode.set_aside(liar.number, [4, 8])
    decode.await_(PeerGone)
    decode.await_line("it has been silent for 0.2 s")


def test_peers_that_have_nothing_to_say_stay(sides: Any) -> None:
    prefill, decode = sides("prefill"), sides("decode")
    shaken(prefill, decode)
    link = decode.wire._state.peers[0].link
    assert link is not None
    heard_s = link.heard_s
    until(lambda: link.heard_s > heard_s, "a sign of life comes")
    assert not any(isinstance(one, PeerGone) for one in (*decode.take(), *prefill.take()))


def test_what_is_posted_to_a_peer_that_is_gone_is_dropped_until_hands_are_shaken(sides: Any, lies_to: Any) -> None:
    decode = sides("decode")
    liar = lies_to(decode)
    liar.link.close()
    until(lambda: decode.wire.has_mail, "it is seen")
    # The scheduler does not know yet, and sets pages aside: they are not for whoever comes by that name next.
    decode.set_aside(liar.number, [4, 8])
    decode.await_(PeerGone)
    again = lies_to(decode)
    again.say(block([4, 8]))
    decode.await_line("for which none are set aside")
