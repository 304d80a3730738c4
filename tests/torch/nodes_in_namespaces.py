"""One of two nodes, each in a network namespace of its own: ``python -m ... FOLDER RANK``. Node 0 prints its tokens."""

from __future__ import annotations

import sys

from backends.node_place import NodePlace
from backends.torch.backend import make_backend
from backends.torch.node_host import host_ranks
from backends.torch.workers import RunnerOptions
from tests.patience import PATIENCE_S
from tests.torch.live import greedy, messages, serve
from tests.torch.tiny import prompts


def main(folder: str, rank: int) -> None:
    place = NodePlace(2, rank, "10.231.77.1", 29500, b"hush", PATIENCE_S, PATIENCE_S)
    options = RunnerOptions(folder, rows=8, kv_tokens=512, max_context=200, tp=2, place=place)
    if rank:
        host_ranks(options)
        return
    backend = make_backend(options, lambda row: None)
    asked = prompts((21, 5, 34))
    run = serve(backend, [[message] for message in messages(asked, greedy(8))], "overlap", max_running=8)
    backend.close()
    print([run.outputs[f"r{i}"] for i in range(len(asked))])


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
