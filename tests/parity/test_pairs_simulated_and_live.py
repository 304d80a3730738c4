"""Simulated equals live for halves of pairs: what reached them on a real model, step by step, leaves the same decisions, and
the same orders to the wire, on a modelled GPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from backends.simulated.backend import SimulatedBackend
from backends.simulated.clock import Clock
from backends.simulated.copies import CopyEngine
from backends.simulated.host import HostModel
from backends.simulated.sampler import ScriptedSampler
from tests.handover.halves import Pair
from tests.torch.live import greedy
from tests.torch.tiny import make
from tests.world import LinearCost
from workbench.backend import Wait
from workbench.instance import Instance, Recipe, start
from workbench.recording.recorder import decision_lines
from workbench.scheduler.config import Role
from workbench.scheduler.disaggregated.letters import Letter, SendPages
from workbench.serving.engine import scheduler_process


class Notes:
    """What a half was told, a look into its inbox an entry, and what it decided."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.told: list[list[object]] = []
        self.decisions: list[str] = []
        self.orders: list[Any] = []


class NotingInbox:
    def __init__(self, inner: Any, notes: Notes) -> None:
        self._inner, self._notes = inner, notes
        self.arrival = inner.arrival

    def drain(self) -> list[object]:
        messages = self._inner.drain()
        self._notes.told.append(messages)
        return messages


class NotingOutbox:
    def __init__(self, inner: Any, notes: Notes) -> None:
        self._inner, self._notes = inner, notes

    def scheduled(self, batch: Any) -> None:
        self._notes.decisions += decision_lines(batch, (batch.worker.kv_used_tokens,), 0)
        if self._inner is not None:
            self._inner.scheduled(batch)

    def send(self, result: Any) -> None:
        if self._inner is not None:
            self._inner.send(result)


class NotingWire:
    def __init__(self, inner: Any, notes: Notes) -> None:
        self._inner, self._notes = inner, notes

    def post(self, orders: Any) -> None:
        self._notes.orders += map(plain, orders)
        if self._inner is not None:
            self._inner.post(orders)

    def wake_at(self, moment_s: float) -> None:
        if self._inner is not None:
            self._inner.wake_at(moment_s)


def plain(order: Any) -> Any:
    """An order with lists in the place of arrays, which compare, and without its token: who was cut off has told nobody."""
    if isinstance(order, SendPages):
        return order._replace(pages=order.pages.tolist(), target_pages=order.target_pages.tolist(), token=None)  # type: ignore[arg-type]
    if isinstance(order, Letter) and hasattr(order.message, "pages"):
        message: Any = order.message
        return order.to, message.room, message.cached_tokens, message.pages.tolist()
    return order


class ToldAgain:
    """Inbox that says again what was told, look by look."""

    def __init__(self, told: list[list[object]], now: Any) -> None:
        self._told, self._now = list(told), now
        self.over = False

    def drain(self) -> list[object]:
        if len(self._told) == 1:
            self.over = True
        return self._told.pop(0) if self._told else []

    def arrival(self) -> Wait:
        return self._now()


@pytest.fixture(scope="module")
def model(tmp_path_factory: Any) -> Path:
    folder = tmp_path_factory.mktemp("thin")
    make("LlamaForCausalLM", folder, hidden_size=32, intermediate_size=32, num_hidden_layers=1)
    return folder


def live(model: Path, loop: str, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[Role, Notes], dict[str, list[int]]]:
    """Run a scenario on a real model, and return what both halves noted, and what was written."""
    notes: dict[Role, Notes] = {}

    def noting(recipe: Recipe, backend: Any, mailboxes: Any, now_s: Any, wire: Any) -> Instance:
        noted = notes[recipe.role] = Notes(recipe)

        def wrapped(scheduler: Any) -> Any:
            inbox, outbox = mailboxes(scheduler)
            return NotingInbox(inbox, noted), NotingOutbox(outbox, noted)

        return start(recipe, backend, wrapped, None, NotingWire(wire, noted))

    monkeypatch.setattr(scheduler_process, "start", noting)
    run = {"model": str(model), "loop": loop, "kv_tokens": 320, "page_size": 8, "max_context": 200, "chunk": 32}
    tight = {"kv_tokens": 400, "reserved_decode_tokens": 4, "max_running": 6}
    pair = Pair(run, decode=tight)
    draw = np.random.default_rng(5)
    shared = draw.integers(3, 200, 24).tolist()
    try:
        numbers = []
        for i in range(16):
            prompt = draw.integers(3, 200, int(draw.integers(5, 60))).tolist()
            numbers.append(pair.submit(shared + prompt if i % 3 == 0 else prompt, greedy(int(draw.integers(60, 100)))))
            if i == 8:
                pair.decode.read(numbers[0][1])
                pair.decode.cancel(numbers[7][1])
        found = pair.decode.read(*(decode for _, decode in numbers))
        pair.prefill.read(*(prefill for prefill, _ in numbers))
    finally:
        pair.close()
    return notes, {f"r{decode}": answer.tokens for (_, decode), answer in zip(numbers, found, strict=True)}


def simulated(noted: Notes, written: dict[str, list[int]]) -> Notes:
    """Tell a half on a modelled GPU the same."""
    found, clock = Notes(noted.recipe), Clock()
    tokens = {rid: np.array([*output, *[7] * 120], np.int32) for rid, output in written.items()}
    inputs = {one.rid: len(one.prompt) for group in noted.told for one in group if hasattr(one, "prompt")}  # type: ignore[attr-defined]
    sampler = ScriptedSampler(lambda rid: (inputs[rid], tokens[rid]), noted.recipe.rows)
    copies = CopyEngine(1e6, 1e9, 1e9)
    backend = SimulatedBackend(clock, LinearCost(), HostModel(), sampler, lambda row: None, copies=copies)
    inbox = ToldAgain(noted.told, clock.now_s)
    instance = start(
        noted.recipe, backend, lambda scheduler: (inbox, NotingOutbox(None, found)), None, NotingWire(None, found)
    )

    def until_over() -> Iterator[Wait]:
        for wait in instance.loop:
            if inbox.over:
                return
            yield wait

    clock.run_loop(until_over())  # type: ignore[arg-type]
    clock.run()
    return found


@pytest.mark.parametrize("loop", ["normal", "overlap"])
def test_a_half_on_a_modelled_gpu_decides_as_it_did_on_a_real_model(
    model: Path, loop: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes, written = live(model, loop, monkeypatch)
    for noted in notes.values():
        again = simulated(noted, written)
        assert again.decisions == noted.decisions
        assert again.orders == noted.orders
    assert any('"retracted":["' in line or '"retracted": ["' in line for line in notes["decode"].decisions), (
        "nobody was retracted: the test shows less than it should"
    )
    assert len(notes["prefill"].decisions) > 8, "no chunks"
