"""Simulated equals live equals engine: a scenario by step, to the same loop on a modelled GPU and on a real model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from backends.simulated.backend import SimulatedBackend
from backends.simulated.clock import Clock
from backends.simulated.host import HostModel
from backends.simulated.sampler import ScriptedSampler
from tests.parity.test_recordings import RECORDINGS
from tests.torch.live import backend_of
from tests.torch.tiny import make
from tests.world import LinearCost
from workbench.backend import Wait
from workbench.instance import Instance, Recipe, start
from workbench.loops.drive import drive
from workbench.parity.recording import Scenario, read_recording
from workbench.parity.scenarios import CONTEXT_TOKENS, scenario
from workbench.parity.steps import Decision, DecisionOutbox, ScenarioTokens, StepInbox
from workbench.scheduler.batch import ModelWorkerBatch, StepOutput
from workbench.scheduler.scheduler import Scheduler

PLAYED = [
    ("vllm-0.33.0", "tight/sync/0"),
    ("vllm-0.33.0", "tight-burst/async/1"),
    ("vllm-0.33.0-more", "aborts/async/0"),
    ("vllm-0.14.0", "long-prefill/async/1"),
    ("mini-sglang-20fcd7f", "small-budget/16/overlap/0"),
    ("sglang-0.5.23", "tight/16/normal/2"),
    ("sglang-0.5.23-stops-c0.05", "tight/1/overlap/1"),
    ("sglang-0.5.23-more", "priority-rows/16/overlap/0"),
    ("sglang-0.5.23-more", "mixed/1/overlap/1"),
    ("sglang-0.5.10.post1", "few-rows/16/overlap/0"),
]
"""Recordings and scenarios."""


class Over(Exception):
    """The scenario is played."""


class SaysScenario:
    """A backend whose samples are replaced by a scenario's tokens, on the host alone: what it computes stays its own."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self._tokens = ScenarioTokens()

    def launch(self, batch: ModelWorkerBatch) -> _Says:
        return _Says(self._backend.launch(batch), self._tokens.of(batch))

    def done(self, forward: _Says) -> Wait:
        return self._backend.done(forward.own)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)


class _Says:
    def __init__(self, own: Any, tokens: np.ndarray) -> None:
        self.own, self.tokens, self.batch = own, tokens, own.batch

    def output(self) -> StepOutput:
        assert len(self.own.output().tokens) == len(self.tokens)
        return StepOutput(self.tokens)


def played(key: str, name: str) -> tuple[Scenario, list[Decision]]:
    recording = read_recording(next(path for path in RECORDINGS if path.name == f"{name}.json.gz"))
    return recording.scenario(key), recording.decisions[key]


def began(asked: Scenario, backend: Any, now: Any) -> tuple[Instance, DecisionOutbox]:
    inbox = StepInbox(scenario(asked.case_name, asked.seed), ignore_eos=asked.ignore_eos, now=now)
    outbox = DecisionOutbox()

    def mailboxes(scheduler: Scheduler) -> tuple[StepInbox, DecisionOutbox]:
        return inbox, outbox

    return start(Recipe(loop=asked.loop, scheduler=asked.config), SaysScenario(backend), mailboxes), outbox


@pytest.mark.parametrize(("name", "key"), PLAYED)
def test_a_modelled_gpu_leaves_the_recorded_decisions(name: str, key: str) -> None:
    asked, recorded = played(key, name)
    clock = Clock()
    host = HostModel()  # phases take time, so that loops wait
    rows = asked.config.rows
    sampler = ScriptedSampler(lambda request_id: (0, np.zeros(CONTEXT_TOKENS, np.int32)), rows)
    backend = SimulatedBackend(clock, LinearCost(), host, sampler, lambda row: None)
    instance, outbox = began(asked, backend, clock.now_s)

    def until_over() -> Iterator[Wait]:
        for wait in instance.loop:
            if instance.inbox.over:  # type: ignore[attr-defined]
                return
            yield wait

    clock.run_loop(until_over())  # type: ignore[arg-type]
    clock.run()
    assert clock.now_s() > 1, "simulated steps take time"
    assert outbox.decisions == recorded


@pytest.fixture(scope="module")
def model(tmp_path_factory: Any) -> Path:
    """A model of one thin layer that knows every token of a scenario."""
    folder = tmp_path_factory.mktemp("thin")
    make(
        "LlamaForCausalLM",
        folder,
        vocab_size=512,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=CONTEXT_TOKENS,
    )
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("name", "key"), PLAYED)
def test_a_real_model_on_a_cpu_leaves_the_recorded_decisions(model: Path, name: str, key: str) -> None:
    asked, recorded = played(key, name)
    config = asked.config
    backend = backend_of(
        str(model),
        rows=config.rows,
        kv_tokens=config.kv_tokens,
        page_size=config.page_size,
        max_context=config.max_context,
    )
    instance, outbox = began(asked, backend, lambda: None)

    def over() -> None:
        if instance.inbox.over:  # type: ignore[attr-defined]
            raise Over

    def waits() -> Iterator[Wait]:
        for wait in instance.loop:
            over()
            yield wait

    try:
        with contextlib.suppress(Over):
            drive(waits())  # type: ignore[arg-type]
    finally:
        backend.close()
    assert outbox.decisions == recorded
