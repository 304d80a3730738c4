"""Capturing decode steps, as far as it can be seen without a GPU."""

from __future__ import annotations

import contextlib
import gc
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from backends.torch.cuda_graphs import DecodeGraphs, without_collection  # noqa: E402


class Stream:
    def __init__(self, device: Any = None) -> None: ...

    def wait_stream(self, other: Any) -> None: ...


@pytest.mark.parametrize("collects", [True, False])
def test_nothing_is_collected_while_a_step_is_captured(monkeypatch: Any, collects: bool) -> None:
    capturing: list[bool] = []

    @contextlib.contextmanager
    def graph(*args: Any, **more: Any) -> Any:
        capturing.append(True)
        yield
        capturing.pop()

    for name, fake in {
        "synchronize": lambda device: None,
        "mem_get_info": lambda device: (0, 0),
        "graph_pool_handle": lambda: None,
        "empty_cache": lambda: None,
        "current_stream": lambda device: Stream(),
        "stream": lambda stream: contextlib.nullcontext(),
        "Stream": Stream,
        "CUDAGraph": object,
        "graph": graph,
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    seen: list[tuple[int, bool, bool]] = []

    def step(rows: Any, seq_lens: Any, logits: Any) -> None:
        seen.append((len(rows), bool(capturing), gc.isenabled()))

    before = gc.isenabled()
    (gc.enable if collects else gc.disable)()
    try:
        graphs = DecodeGraphs(step, 8, 5, torch.float32, torch.device("cpu"), [1, 4])
        assert gc.isenabled() == collects
    finally:
        (gc.enable if before else gc.disable)()
    assert graphs.sizes == [1, 4]
    assert [(size, captured) for size, captured, _ in seen] == [(4, False), (4, True), (1, False), (1, True)]
    assert not any(enabled for _, captured, enabled in seen if captured)


def test_a_capture_that_fails_leaves_collection_as_it_was() -> None:
    assert gc.isenabled()
    with pytest.raises(RuntimeError), without_collection():
        raise RuntimeError("an operation that cannot be captured")
    assert gc.isenabled()
