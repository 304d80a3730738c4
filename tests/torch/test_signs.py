"""Signs of life of what computes: a thread's CPU seconds, and the ranks of a model."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable

import pytest

pytest.importorskip("torch")

from backends.torch.signs import cpu_clock
from backends.torch.workers import RunnerOptions, start_workers
from tests.torch.tiny import make


def until(true: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 120
    while not true():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.02)


def test_the_clock_of_a_thread_moves_while_it_computes_and_stands_while_it_waits():
    clocks: list[Callable[[], float]] = []
    rest, over = threading.Event(), threading.Event()

    def work() -> None:
        clocks.append(cpu_clock())
        while not rest.is_set():
            sum(range(1000))
        over.wait()

    thread = threading.Thread(target=work)
    thread.start()
    until(lambda: bool(clocks), "begun")
    first = clocks[0]()
    until(lambda: clocks[0]() > first, "the clock moves")
    rest.set()

    def stands() -> bool:
        before = clocks[0]()
        time.sleep(0.05)
        return clocks[0]() == before

    until(stands, "the clock stands")
    over.set()
    thread.join()


@pytest.mark.slow
def test_a_rank_that_is_frozen_is_silent_until_it_goes_on(tmp_path):
    make("LlamaForCausalLM", tmp_path)
    workers = start_workers(RunnerOptions(str(tmp_path), tp=2, rows=4, kv_tokens=64, dtype="float32"))
    try:
        silent_for_s = lambda: time.monotonic() - workers.heard_s()  # noqa: E731
        until(lambda: silent_for_s() < 2, "both are heard of")
        frozen = workers._processes[1].pid
        os.kill(frozen, signal.SIGSTOP)
        until(lambda: silent_for_s() > 3, "silent")
        os.kill(frozen, signal.SIGCONT)
        until(lambda: silent_for_s() < 2, "heard of again")
        assert workers.worked_s() > 0
    finally:
        workers.close()
