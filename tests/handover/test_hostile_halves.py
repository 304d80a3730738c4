"""Peers that mean harm to whole instances: what cannot be leaves schedulers, pages and requests as they were."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np
import pytest

from tests.handover.halves import ROUTER, Pair
from tests.handover.test_pairs import PARAMS, PROMPT, RUN, TEXT, written
from tests.handover.wires import Side
from tests.patience import until
from workbench.handover import peer_messages as said
from workbench.handover.handshake import connect, introduce
from workbench.handover.identity import SAID
from workbench.handover.live_wire import LiveWire
from workbench.handover.peer_link import LinkLost
from workbench.scheduler.disaggregated.letters import (
    PagesSetAside,
)
from workbench.scheduler.request import SamplingParams
from workbench.serving.engine import scheduler_process


class Impostor:
    """A peer of a scheduler that has the key, by the name that it likes."""

    def __init__(self, wire: LiveWire, address: str = "127.0.0.1:9") -> None:
        other = {"prefill": "decode", "decode": "prefill"}[wire.identity.role]
        self.address = address
        own = msgspec.structs.replace(wire.identity, role=other, address=address, instance_id="impostor")
        self.link = connect(wire.address)
        introduce(self.link, wire._state.settings.key, own, {"tcp": b""})

    def say(self, message: Any, payload: bytes = b"") -> None:
        with contextlib.suppress(LinkLost):  # it has been turned out already
            self.link.send(said.encode(message), memoryview(payload) if payload else None)

    def await_fault(self) -> None:
        """Until it is turned out."""
        with pytest.raises(LinkLost):
            while True:
                self.link.receive(said.answer_decoder)


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A pair on modelled GPUs, and by role the wires of its halves."""
    wires: dict[str, LiveWire] = {}
    make = scheduler_process.wire_of

    def kept(*args: Any) -> LiveWire:
        wire = make(*args)
        wires[wire.identity.role] = wire
        return wire

    monkeypatch.setattr(scheduler_process, "wire_of", kept)
    made = Pair(RUN, TEXT, backend="simulated", time_scale=0.0)
    made.wires = wires  # type: ignore[attr-defined]
    yield made
    made.close()


def aside(room: int, pages: int, cached: int = 0) -> said.SetAside:
    return said.SetAside((ROUTER, room, 0), "r", cached, np.arange(pages, dtype=np.int32).tobytes())


def still_serves(pair: Pair) -> None:
    prefill, decode = pair.submit(PROMPT, PARAMS)
    (answer,) = pair.decode.read(decode)
    assert (answer.kind, answer.tokens) == ("length", written(PROMPT, PARAMS.max_new_tokens))
    assert pair.prefill.read(prefill)[0].kind == "handed_over"
    for half in pair.halves:
        half.await_rest()


@pytest.mark.parametrize(
    "lies",
    [
        [aside(9, 4), aside(9, 4)],
        [aside(9, 4), said.Withdraw((ROUTER, 9, 0)), aside(9, 4)],
        [aside(9, 3)],
        [aside(9, 5)],
        [aside(9, 4, cached=16)],
        [aside(9, 3, cached=15)],
        [aside(9, 4, cached=1 << 62)],
        [aside(9, 0, cached=64)],
        [aside(9, 4), said.Ping(), said.Bye()],
        [said.Block((ROUTER, 9, 0), (0, 1, 0, 1), 0, b"1234", 4)],
        [said.Sent((ROUTER, 9, 0), 5, 0)],
    ],
    ids=range(11),
)
@pytest.mark.parametrize("early", [False, True])
def test_what_a_decode_peer_says_that_cannot_be_leaves_a_prefill_instance_as_it_was(
    pair: Any, lies: list[Any], early: bool
) -> None:
    impostor = Impostor(pair.wires["prefill"])
    number = None if early else pair.prefill.submit(PROMPT, PARAMS, 9, peer=impostor.address)
    if not early:
        until(lambda: pair.prefill.beat().waiting, "it waits for pages")
    for lie in lies:
        impostor.say(lie)
    if number is None:
        impostor.say(said.Ping())
        number = pair.prefill.submit(PROMPT, PARAMS, 9, peer=impostor.address)
        impostor.link.close()
    pair.prefill.cancel(number)
    pair.prefill.read(number)
    impostor.link.close()
    still_serves(pair)


def test_a_peer_ends_and_begins_no_handover_of_another(pair: Any) -> None:
    prefill = pair.prefill.submit(PROMPT, PARAMS, 9, pair.decode)
    until(lambda: pair.prefill.beat().waiting, "it waits for pages")
    for lie in (aside(9, 4), said.Withdraw((ROUTER, 9, 0))):
        impostor = Impostor(pair.wires["prefill"])
        impostor.say(lie)
        impostor.await_fault()
    decode = pair.decode.submit(PROMPT, PARAMS, 9, pair.prefill)
    assert pair.decode.read(decode)[0].tokens == written(PROMPT, 6)
    assert pair.prefill.read(prefill)[0].kind == "handed_over"
    # And on the other side, where its pages would be given to somebody else while they are still written.
    decode = pair.decode.submit(PROMPT, PARAMS, 10, pair.prefill)
    until(lambda: pair.decode.state()["kv_used_tokens"], "pages are set aside")
    for lie in (said.Ended((ROUTER, 10, 0), "aborted", "client"), said.Sent((ROUTER, 10, 0), 5, 0)):
        impostor = Impostor(pair.wires["decode"])
        impostor.say(lie)
        impostor.await_fault()
    prefill = pair.prefill.submit(PROMPT, PARAMS, 10, pair.decode)
    assert pair.decode.read(decode)[0].tokens == written(PROMPT, 6)
    assert pair.prefill.read(prefill)[0].kind == "handed_over"
    still_serves(pair)


@pytest.mark.parametrize("early", [False, True])
def test_pages_that_a_peer_set_aside_before_it_went_are_not_waited_for(pair: Any, early: bool) -> None:
    """Nobody would ever say that what is sent there has arrived."""
    impostor = Impostor(pair.wires["prefill"])
    number = None if early else pair.prefill.submit(PROMPT, PARAMS, 9, peer=impostor.address)
    impostor.say(aside(9, 4))
    impostor.say(said.Ping())
    with contextlib.suppress(LinkLost):  # it may be gone already, for nobody listens at its address
        impostor.link.receive(said.answer_decoder)
    impostor.link.close()
    peer = pair.wires["prefill"]._state.peer(impostor.address)
    until(lambda: peer.gone and not peer.untold, "the scheduler is told")
    if number is None:
        number = pair.prefill.submit(PROMPT, PARAMS, 9, peer=impostor.address)
        until(lambda: pair.prefill.beat().waiting, "it waits for pages")
        pair.prefill.cancel(number)
    assert pair.prefill.read(number)[0].kind == "aborted"
    still_serves(pair)


THERE_IS_NOT = "a token that there is not"


@pytest.mark.parametrize(
    ("token", "logprobs", "fault"),
    [
        (-1, None, THERE_IS_NOT),
        (1 << 40, None, THERE_IS_NOT),
        (5, (-0.5, (-0.5, -1.0), (5, 1 << 30)), THERE_IS_NOT),
        (5, (-0.5, (-0.5, -1.0), (5, -1)), THERE_IS_NOT),
        (5, (-0.5, (-0.5,), (5, 6)), "without the log probabilities that were asked for"),
        (5, (-0.5, (-0.5,) * 9, (5,) * 9), "without the log probabilities that were asked for"),
        (5, None, "without the log probabilities that were asked for"),
        (5, (float("nan"), (), ()), "what are no log probabilities"),
        (5, (-0.5, (float("inf"), -1.0), (5, 6)), "what are no log probabilities"),
    ],
)
def test_a_token_that_cannot_be_is_not_taken(pair: Any, capfd: Any, token: int, logprobs: Any, fault: str) -> None:
    wire = pair.wires["decode"]
    alike = {name: getattr(wire.identity, name) for name in SAID if name != "role"}
    hears = Side("prefill", 1, wire._state.settings, instance_id="impostor", **alike)
    try:
        asked = SamplingParams(6, ignore_eos=True, logprobs=None if fault == THERE_IS_NOT and not logprobs else 2)
        decode = pair.decode.submit(PROMPT, asked, 9, peer=hears.address)
        (told,) = hears.await_(PagesSetAside)
        impostor, whole = Impostor(wire, hears.address), wire._state.memory.shape.whole
        size = wire._state.memory.shape.block_bytes(whole, 1)
        for at, page in enumerate(told.pages):
            impostor.say(said.Block((ROUTER, 9, 0), (*whole,), at, page.tobytes(), size), bytes(size))
        impostor.say(said.Sent((ROUTER, 9, 0), token, 0, logprobs))
        (answer,) = pair.decode.read(decode)
        assert (answer.kind, answer.detail) == ("aborted", "prefill_gone")
        assert fault in capfd.readouterr().err
    finally:
        hears.wire.close()
    still_serves(pair)
