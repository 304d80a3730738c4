"""Rooms of a decode instance: pages that were set aside for a handover, and the checks before anything is written there."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from workbench.handover.carriers import BLOCK_BYTES
from workbench.handover.kv_shares import Box, KVMemory, Landed
from workbench.handover.peer_link import LinkLost
from workbench.handover.peer_messages import Block
from workbench.scheduler.disaggregated.letters import Room


@dataclass(slots=True)
class _Aside:
    peer: int
    pages: np.ndarray
    """int32, in the order of the prompt."""
    landed: Landed
    """For the batches before: whoever had these pages may be in one that still writes them, or saves them."""
    written: dict[Box, int] = field(default_factory=dict)
    """By part of the model, how many of them, from the first on."""


class Rooms:
    """Pages that may be written, by room. Its methods are called under a lock of the peer that is concerned; what a peer
    does that it may not raises LinkLost, with nothing written."""

    def __init__(self, memory: KVMemory) -> None:
        self._memory = memory
        self._asides: dict[Room, _Aside] = {}

    def open(self, room: Room, peer: int, pages: np.ndarray) -> None:
        """Let a peer write these pages, and nobody else, once the batches launched by now have run."""
        self._asides[room] = _Aside(peer, np.array(pages, np.int32), self._memory.landed())

    def await_turn(self, room: Room, peer: int) -> None:
        """Wait until no batch touches the pages of a room any more. Under no lock: batches land while their loop goes on."""
        self._of(room, peer).landed()

    def close(self, room: Room, peer: int) -> None:
        """Let a peer write nothing more there, if it might."""
        aside = self._asides.get(room)
        if aside is not None and aside.peer == peer:
            del self._asides[room]

    def close_all(self, peer: int) -> None:
        """Let a peer write nothing more."""
        for room, aside in list(self._asides.items()):
            if aside.peer == peer:
                del self._asides[room]

    def begin_again(self, room: Room, peer: int) -> None:
        """What was written there is void."""
        self._of(room, peer).written.clear()

    def check(self, room: Room, peer: int, block: Block) -> tuple[Box, np.ndarray]:
        """Return what a block is of, and the pages that it is for."""
        aside, shape = self._of(room, peer), self._memory.shape
        box = Box(*block.box)
        if box.overlap(shape.whole) != box:
            raise LinkLost(f"it sent layers and heads that the model has not: {list(box)}")
        if len(block.pages) % 4 or not block.pages:
            raise LinkLost(f"it sent a list of pages of {len(block.pages)} bytes")
        pages = np.frombuffer(block.pages, np.int32)
        begun = aside.written.get(box, 0)
        if block.first != begun:
            raise LinkLost(f"it sent page {block.first} of a handover where page {begun} was to come")
        if begun + len(pages) > len(aside.pages):
            raise LinkLost(
                f"it sent {begun + len(pages)} pages of a handover for which {len(aside.pages)} are set aside"
            )
        if not np.array_equal(pages, aside.pages[begun : begun + len(pages)]):
            raise LinkLost("it sent pages that were not set aside for that handover")
        if block.size != shape.block_bytes(box, len(pages)):
            raise LinkLost(
                f"it sent {block.size} bytes for {len(pages)} pages, which have {shape.block_bytes(box, len(pages))}"
            )
        if block.size > BLOCK_BYTES and len(pages) > 1:
            raise LinkLost(f"it sent {block.size} bytes at a time, more than the {BLOCK_BYTES} that a block may have")
        if not begun and any(box.overlap(other) is not None for other in aside.written):
            raise LinkLost("it sent layers or heads of a handover twice")
        return box, pages

    def write(self, room: Room, peer: int, block: Block, data: np.ndarray) -> None:
        """Write a block whose bytes are there."""
        box, pages = self.check(room, peer, block)
        self._memory.write(box, pages, data.reshape(self._memory.shape.block(box, len(pages))))
        aside = self._asides[room]
        aside.written[box] = block.first + len(pages)

    def complete(self, room: Room, peer: int) -> None:
        """All was sent, says a peer: see that it was, and close the room."""
        aside, shape = self._of(room, peer), self._memory.shape
        if len(aside.pages):
            whole = shape.layers * shape.heads
            if sum(box.layers * box.heads for box in aside.written) != whole or any(
                count != len(aside.pages) for count in aside.written.values()
            ):
                least = min(aside.written.values(), default=0)
                raise LinkLost(f"it ended a handover of {len(aside.pages)} pages after {least}")
        del self._asides[room]

    def _of(self, room: Room, peer: int) -> _Aside:
        aside = self._asides.get(room)
        if aside is None or aside.peer != peer:
            raise LinkLost("it sent pages of a handover for which none are set aside")
        return aside
