"""Wires of instances without an instance behind them: their KV is an array, and a test is their scheduler."""

from __future__ import annotations

import socket
from typing import Any

import msgspec
import numpy as np

from tests.patience import until
from workbench.handover import peer_messages as said
from workbench.handover.addresses import join_address
from workbench.handover.handshake import connect, introduce
from workbench.handover.identity import VERSION, Identity
from workbench.handover.kv_shares import RanksKV
from workbench.handover.live_wire import LiveWire
from workbench.handover.peer_link import Link
from workbench.handover.wire_state import WireSettings
from workbench.scheduler.disaggregated.letters import Letter, PagesSetAside, Room

HERE = WireSettings(loopback_only=True)
PAGES, LAYERS, HEADS, PAGE_BYTES = 64, 3, 4, 32


def identity(kind: str, **changes: Any) -> Identity:
    own = Identity(VERSION, kind, "127.0.0.1:9", f"{kind}-1", "model", "weights", 16, "bf16", LAYERS, HEADS, 64)
    return msgspec.structs.replace(own, **changes)


class Memory:
    """The KV of ranks of one stage, each with its heads: uint8[rank][layers, heads, pages, bytes]."""

    def __init__(self, tp: int = 1) -> None:
        share = max(HEADS // tp, 1)
        starts = [rank * HEADS // tp for rank in range(tp)]
        self.ranks = [np.zeros((LAYERS, share, PAGES, PAGE_BYTES), np.uint8) for _ in starts]
        shares = [(0, LAYERS, start, start + share, PAGE_BYTES) for start in starts]
        self.kv = RanksKV(shares, PAGES, self._read, self._write)

    def fill(self, seed: int) -> None:
        """Put something in it, the same in all that hold the same heads."""
        whole = np.random.default_rng(seed).integers(1, 256, (LAYERS, HEADS, PAGES, PAGE_BYTES), np.uint8)
        tp = len(self.ranks)
        for rank, held in enumerate(self.ranks):
            start = rank * HEADS // tp
            held[:] = whole[:, start : start + held.shape[1]]

    def whole(self, pages: np.ndarray) -> np.ndarray:
        """Pages of all heads, each from whoever holds it first."""
        held = {}
        for rank, own in enumerate(self.ranks):
            for index in range(own.shape[1]):
                held.setdefault(rank * HEADS // len(self.ranks) + index, own[:, index, pages])
        return np.stack([held[head] for head in range(HEADS)], axis=1)

    def _read(self, rank: int, pages: np.ndarray) -> np.ndarray:
        return self.ranks[rank][:, :, pages]

    def _write(self, rank: int, layers: slice, heads: slice, pages: np.ndarray, block: np.ndarray) -> None:
        self.ranks[rank][layers, heads, pages] = block


class Side:
    """One wire and what came by it."""

    def __init__(self, kind: str, tp: int = 1, settings: WireSettings = HERE, **changes: Any) -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        address = join_address(*listener.getsockname()[:2])
        self.memory = Memory(tp)
        self.lines: list[str] = []
        own = identity(kind, **{"address": address, **changes})
        self.wire = LiveWire(own, self.memory.kv, listener, lambda: None, settings, self.lines.append)
        self.came: list[Any] = []
        self.address = address

    def number(self, other: Side) -> int:
        return self.wire.number(other.address)

    def set_aside(self, peer: int, pages: list[int], number: int = 7) -> Room:
        """Have a peer told of pages for a handover."""
        room = self.wire.room("router", number)
        self.wire.post([Letter(peer, PagesSetAside(room, "r", 0, np.array(pages, np.int32)))])
        return room

    def take(self) -> list[Any]:
        self.came += [message for _, message in self.wire.take()]
        return self.came

    def await_(self, kind: type, count: int = 1) -> list[Any]:
        """Wait until so many messages of a kind have come; returns those."""

        def found() -> list[Any]:
            return [one for one in self.take() if isinstance(one, kind)]

        until(lambda: len(found()) >= count, f"{kind.__name__} comes: {self.came} {self.lines}")
        return found()

    def await_line(self, *parts: str) -> None:
        until(lambda: any(all(part in line for part in parts) for line in self.lines), f"{parts} in {self.lines}")


class Liar:
    """A prefill instance that has shaken hands in order, and then says what a test has it say."""

    def __init__(self, to: Side, carrier: Any = None) -> None:
        self.honest = Side("prefill")
        """Takes what is said to it."""
        self.link: Link = connect(to.address)
        offers = {"tcp": b""} if carrier is None else {carrier.name: carrier.offer()}
        introduce(self.link, b"", self.honest.wire.identity, offers)
        self.number = to.number(self.honest)

    def say(self, message: Any, payload: bytes = b"") -> None:
        self.link.send(said.encode(message), memoryview(payload) if payload else None)


def block(pages: list[int], first: int = 0, number: int = 7, **changes: Any) -> said.Block:
    """A block as it should be, or with changes."""
    box = changes.pop("box", (0, LAYERS, 0, HEADS))
    size = (box[1] - box[0]) * (box[3] - box[2]) * len(pages) * PAGE_BYTES
    asked = {"pages": np.array(pages, np.int32).tobytes(), "size": size, **changes}
    return said.Block(("router", number, 0), box, first, **asked)
