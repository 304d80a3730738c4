"""The life of a machine that holds a part of a model, beside node 0, which has everything else of a server."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from workbench.serving.serve_settings import ServeSettings


def serve_node(settings: ServeSettings) -> int:
    """Host the ranks of a node beside node 0 until the server ends; returns the exit code: 0 in order, 1 else.

    Raises ValueError, in one line, when this node cannot take part.
    """
    from backends.torch.node_host import host_ranks
    from backends.torch.node_link import NodesFailed

    told = False

    def on_signal(number: int, frame: object) -> None:
        nonlocal told
        if told:
            os._exit(128 + number)
        told = True

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    spec: Any = settings.spec
    options = spec.options(settings.run, settings.loop)
    first, last = options.ranks_here[0], options.ranks_here[-1]
    ranks = f"rank {first}" if first == last else f"ranks {first} to {last}"
    print(
        f"node {settings.node_rank} of {settings.nodes}: {ranks} of {settings.model_name}, for node 0 at "
        f"{options.place.where}",
        flush=True,
    )
    try:
        host_ranks(options, lambda: told, lambda line: print(f"note: {line}", file=sys.stderr))
    except NodesFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
