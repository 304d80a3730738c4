"""A node beside node 0: it has ranks of the model, and nothing else."""

from __future__ import annotations

import time
from collections.abc import Callable
from multiprocessing.connection import Connection, wait

from backends.torch.backend import check_device
from backends.torch.kv_ranks import KVRanks
from backends.torch.node_link import (
    Beat,
    End,
    EndAsked,
    Hello,
    Lost,
    NodesFailed,
    Refused,
    Serving,
    Tick,
    Welcome,
    addresses,
    connected,
    said,
)
from backends.torch.rank_process import RankProcesses
from backends.torch.signs import SIGN_EVERY_S
from backends.torch.workers import RunnerOptions


def host_ranks(
    options: RunnerOptions,
    told_to_end: Callable[[], bool] = lambda: False,
    tell: Callable[[str], None] = lambda line: None,
) -> None:
    """Host this node's ranks until node 0 ends the server. ``told_to_end`` is asked again and again; ``tell`` takes notes.

    Raises ValueError, in one line, when this node cannot take part, NodesFailed when the server ends out of order.
    """
    place = options.place
    assert place is not None and place.rank > 0
    check_device(options)
    control = connected(place)
    own, _ = addresses(control)
    control.send(Hello(place.rank, place.settings))
    welcome = _answer(control, place.where, told_to_end)
    if welcome is None:
        return
    if isinstance(welcome, Refused):
        raise ValueError(welcome.line)
    if isinstance(welcome, End):
        raise NodesFailed(f"node 0 has ended the server: {welcome.line}")
    assert isinstance(welcome, Welcome)
    ranks = RankProcesses(options, KVRanks(), own, welcome.store_port)
    patience_s = 0.0
    try:
        patience_s = _serve(control, ranks, options, told_to_end, tell)
    finally:
        ranks.close(patience_s)
        control.close()


def _answer(control: Connection, where: str, told_to_end: Callable[[], bool]) -> object | None:
    """Wait for what node 0 says once all nodes are there; None when told to end before."""
    while not control.poll(SIGN_EVERY_S):
        if told_to_end():
            return None
    try:
        return control.recv()
    except (EOFError, OSError):
        raise NodesFailed(f"node 0 ({where}) is gone") from None


def _serve(
    control: Connection,
    ranks: RankProcesses,
    options: RunnerOptions,
    told_to_end: Callable[[], bool],
    tell: Callable[[str], None],
) -> float:
    """Give signs of life until the end of the server; returns how long the ranks have to end."""
    place = options.place
    assert place is not None
    node_0 = f"node 0 ({place.where})"
    heard_s, serving, asked = time.monotonic(), False, False
    while True:
        for ready in wait([control, *ranks.sentinels], SIGN_EVERY_S):
            if ready is not control:
                number, code = ranks.ended(ready)
                if code:  # one that ends in order has said why
                    line = f"rank {number} of the model ended with exit code {code}"
                    said(control, Lost(line))
                    raise NodesFailed(line)
                continue
            try:
                message = control.recv()
            except (EOFError, OSError):
                raise NodesFailed(f"{node_0} is gone") from None
            heard_s = time.monotonic()
            if isinstance(message, Tick):
                silent_s = max(heard_s - ranks.signs.heard_s(), 0.0)
                said(control, Beat(message.sent_s, time.monotonic(), silent_s, ranks.signs.worked_s()))
            elif isinstance(message, Serving):
                serving = True
                tell("all nodes are ready")
            elif isinstance(message, End):
                if message.line is not None:
                    raise NodesFailed(f"node 0 has ended the server: {message.line}")
                return message.patience_s
        if time.monotonic() - heard_s > place.silent_s:
            raise NodesFailed(f"{node_0} has not been heard of for {place.silent_s:g} s")
        if told_to_end() and not asked:
            asked = True
            if not serving:
                said(control, Lost("it was told to end"))
                return 0.0
            said(control, EndAsked())
            tell(f"{node_0} ends the server; a second signal ends this node at once")
