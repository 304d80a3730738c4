"""The ways in which blocks of KV get from one instance to another, beside the connection that names them.

Who sends offers the ways that it has, who receives chooses one (:mod:`workbench.handover.handshake`). A way for RDMA or NIXL
is one more pair of these classes: its offer is a registered region, its ``place`` where in it a block lies.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from workbench.handover.peer_link import Link
from workbench.handover.peer_messages import Block, encode

BLOCK_BYTES = 4 << 20
"""How much is sent at a time, or a page, if that is more."""


class Outgoing(Protocol):
    """Carries blocks over one connection, on the side that sends them."""

    name: str

    def offer(self) -> bytes:
        """What the other side has to know to take them."""
        ...

    def begin(self) -> None:
        """It was chosen."""
        ...

    def send(self, link: Link, block: Block, data: np.ndarray) -> None:
        """Send a block with its bytes, uint8 and contiguous. Returns once they may be written again. Raises LinkLost."""
        ...

    def freed(self, place: int) -> None:
        """The other side has copied what was at a place. Raises LinkLost for a place that it did not have."""
        ...

    def close(self) -> None:
        """Let nobody wait any more, and keep nothing."""
        ...


class Incoming(Protocol):
    """Carries blocks over one connection, on the side that takes them."""

    answers: bool
    """Whether the sender has to be told that the bytes of a block were copied."""

    def take(self, link: Link, block: Block) -> np.ndarray:
        """Return the bytes of a block, uint8, which are good until the next is taken or the sender is told that they were
        copied. Raises LinkLost."""
        ...

    def close(self) -> None: ...


class TcpOutgoing:
    """Bytes behind the message that names them."""

    name = "tcp"

    def offer(self) -> bytes:
        return b""

    def begin(self) -> None:
        pass

    def send(self, link: Link, block: Block, data: np.ndarray) -> None:
        link.send(encode(block), data.reshape(-1).data)

    def freed(self, place: int) -> None:
        pass

    def close(self) -> None:
        pass


class TcpIncoming:
    """Bytes behind the message that names them: read whole before any of them is looked at."""

    answers = False

    def __init__(self) -> None:
        self._buffer = np.empty(0, np.uint8)

    def take(self, link: Link, block: Block) -> np.ndarray:
        if len(self._buffer) < block.size:
            self._buffer = np.empty(block.size, np.uint8)
        found = self._buffer[: block.size]
        link.receive_into(found.data)
        return found

    def close(self) -> None:
        pass
