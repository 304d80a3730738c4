"""Signs of life of what computes: a thread's CPU seconds, and the ranks of a model."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("torch")

from backends.torch.backend import start_workers
from backends.torch.signs import cpu_clock
from backends.torch.workers import RunnerOptions
from tests.patience import until
from tests.torch.tiny import make


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
        sum(range(1_000_000))  # what another thread computes does not count
        return clocks[0]() == before

    until(stands, "the clock stands")
    over.set()
    thread.join()


@pytest.mark.slow
def test_a_rank_that_is_frozen_is_silent_until_it_goes_on(tmp_path):
    make("LlamaForCausalLM", tmp_path)
    workers = start_workers(RunnerOptions(str(tmp_path), tp=2, rows=4, kv_tokens=64, dtype="float32"))
    signs = workers._ranks.signs
    try:

        def both_go_on() -> bool:
            before = list(signs._heard_s)
            until(lambda: all(now != then for now, then in zip(signs._heard_s, before, strict=True)), "two signs")
            return workers.heard_s() == min(signs._heard_s)

        until(both_go_on, "both are heard of")
        frozen = workers._ranks.processes[1].pid
        os.kill(frozen, signal.SIGSTOP)
        until(lambda: Path(f"/proc/{frozen}/stat").read_text().rpartition(")")[2].split()[0] == "T", "stopped")
        silent_since_s = signs._heard_s[1]
        for _ in range(3):
            before_s = signs._heard_s[0]
            until(lambda before_s=before_s: signs._heard_s[0] != before_s, "the other rank goes on")
        assert workers.heard_s() == signs._heard_s[1] == silent_since_s, "the rank that is silent longest"
        os.kill(frozen, signal.SIGCONT)
        until(lambda: workers.heard_s() != silent_since_s, "heard of again")
        assert workers.worked_s() > 0
    finally:
        workers.close()
