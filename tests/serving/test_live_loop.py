"""The live inbox and outbox around a real loop, step by step and without processes."""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import zmq

from backends.simulated.realtime import RealtimeBackend
from backends.simulated.synthetic import SyntheticSampler, content_key, synthetic_output
from workbench.instance import LoopSpec, Recipe, start
from workbench.loops import LOOPS
from workbench.scheduler.batch import Logprobs, StepOutput
from workbench.scheduler.config import SchedulerConfig
from workbench.scheduler.request import SamplingParams
from workbench.scheduler.scheduler import Scheduler, StepResult
from workbench.serving.backends.modelled_backend import ModelledControl
from workbench.serving.engine.inbox import Ending, LiveInbox
from workbench.serving.engine.outbox import LiveOutbox
from workbench.serving.engine.vitals import Vitals
from workbench.serving.wire import (
    Cancel,
    Control,
    Done,
    Ended,
    Opened,
    SessionControl,
    Shutdown,
    Step,
    StopFound,
    Submit,
    decode_to_detokenizer,
    decode_to_http,
    encode,
)

EOS = 99
VOCABULARY = np.arange(10, 50, dtype=np.int32)
LOOP_NAMES = sorted(LOOPS)


class Wire:
    """A socket whose other end is the test."""

    def __init__(self) -> None:
        self.queue: deque[bytes] = deque()

    def send(self, data: bytes) -> None:
        self.queue.append(data)

    def recv(self, flags: int = 0) -> bytes:
        if not self.queue:
            raise zmq.Again
        return self.queue.popleft()

    def poll(self) -> None:
        assert self.queue, "the loop would wait for ever"


class World:
    """A loop with the modelled GPU of a server, whose batches take 10 ms of a clock that the test owns."""

    def __init__(
        self,
        loop: str = "overlap",
        logprobs: bool = False,
        lengths=lambda key: None,
        slo_ttft_s: float | None = None,
        **config,
    ) -> None:
        self._slo_ttft_s = slo_ttft_s
        slots = 2 if loop == "pipeline" else 1
        settings = {"kv_tokens": 4000, "max_context": 1000, "max_running": 16, **config}
        self.config = SchedulerConfig(slots=slots, **settings)
        self.now_s = 0.0
        self.rows: list[tuple] = []
        cost = SimpleNamespace(forward=lambda batch, stage: 0.01, transfer_s=lambda batch, stage: 0.001)
        sampler = SyntheticSampler(VOCABULARY, EOS, self.config.max_running_per_slot * slots, lengths)
        self.backend = RealtimeBackend(cost, sampler, self.rows.append, lambda: self.now_s, stages=slots)
        if logprobs:
            self.backend = WithLogprobs(self.backend)
        self.inbound, self.outbound, self.http = Wire(), Wire(), Wire()
        recipe = Recipe(loop=LoopSpec(loop), scheduler=self.config, eos_token_ids=(EOS,), stages=slots)
        instance = start(recipe, self.backend, self._mailboxes, lambda: self.now_s)
        self.scheduler, self._loop = instance.scheduler, instance.loop
        self.tokens: dict[int, list[int]] = {}
        self.ended: dict[int, Ended] = {}
        self.steps: list[Step] = []
        self.said: list[Opened | Step] = []
        """All that the detokenizer was told."""

    def _mailboxes(self, scheduler: Scheduler) -> tuple[LiveInbox, LiveOutbox]:
        self.vitals = Vitals(scheduler)
        self.outbox = LiveOutbox(scheduler, self.outbound, self.vitals, None)
        self._inbox = LiveInbox(
            self.inbound, self.outbox, self.http, self.vitals, ModelledControl(), 0.0, self._slo_ttft_s
        )
        return self._inbox, self.outbox

    def tell(self, *said) -> None:
        for message in said:
            self.inbound.send(encode(message))

    def ask(
        self,
        stream: int,
        prompt: list[int],
        session: str = "",
        bos_tokens: int = 0,
        namespace: str = "",
        slo_ttft_s: float | None = None,
        **params,
    ) -> None:
        tokens = np.array(prompt, np.int32).tobytes()
        sampling = SamplingParams(**params)
        self.tell(
            Submit(stream, f"r{stream}", tokens, sampling, 0.0, 0, (), True, session, bos_tokens, namespace, slo_ttft_s)
        )

    def run(self, steps: int = 1_000_000) -> None:
        """Send the loop on until it rests or has made so many steps."""
        for _ in range(steps):
            wait = next(self._loop)
            self._listen()
            if getattr(wait, "__self__", None) is self._inbox and not self.inbound.queue:
                return
            self.now_s += 0.02
            if wait is not None:
                wait()

    def _listen(self) -> None:
        while self.outbound.queue:
            message = decode_to_detokenizer(self.outbound.queue.popleft())
            self.said.append(message)
            if isinstance(message, Opened):
                self.tokens[message.sequence] = []
                continue
            assert isinstance(message, Step)
            self.steps.append(message)
            pairs = zip(
                np.frombuffer(message.sequences, np.int64), np.frombuffer(message.tokens, np.int32), strict=True
            )
            for stream, token in pairs:
                assert int(stream) not in self.ended, "a token after the end"
                self.tokens[int(stream)].append(int(token))
            for end in message.ended:
                self.ended[end.sequence] = end


class WithLogprobs:
    """Gives every forward made-up log probabilities, as a real backend does."""

    def __init__(self, backend: RealtimeBackend) -> None:
        self._backend = backend

    def __getattr__(self, name):
        return getattr(self._backend, name)

    def launch(self, batch):
        forward = self._backend.launch(batch)
        n = len(batch.rows)
        rows = batch.rows.astype(np.float32)
        made_up = Logprobs(-rows - 0.5, np.tile([-0.5, -1.5, -2.5], (n, 1)), np.tile([1, 2, 3], (n, 1)))
        return ForwardWithLogprobs(forward, made_up)

    def done(self, forward):
        return self._backend.done(forward.inner)


class ForwardWithLogprobs:
    def __init__(self, inner, logprobs: Logprobs) -> None:
        self.inner, self.batch, self._logprobs = inner, inner.batch, logprobs

    def output(self) -> StepOutput:
        return replace(self.inner.output(), logprobs=self._logprobs)


def expected(prompt: list[int], count: int, seed: int | None = None) -> list[int]:
    return synthetic_output(content_key(np.array(prompt, np.int32), seed), 0, count, VOCABULARY).tolist()


@pytest.mark.parametrize("loop", LOOP_NAMES)
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"kv_tokens": 400, "page_size": 4, "conservativeness": 0.05},
        {"chunk": 16},
        {"batching": "mixed", "max_batch_tokens": 32},
    ],
)
def test_every_sequence_gets_its_own_tokens(loop, config):
    world = World(loop, **config)
    prompts = {stream: list(range(stream, stream + 20 + stream)) for stream in range(1, 13)}
    for stream, prompt in prompts.items():
        world.ask(stream, prompt, max_new_tokens=40 + stream)
    world.run()
    assert world.tokens == {stream: expected(prompt, 40 + stream) for stream, prompt in prompts.items()}
    assert {end.kind for end in world.ended.values()} == {"length"}
    assert len(world.ended) == 12
    if config.get("kv_tokens"):
        assert world.vitals.retractions > 0, "this test wants retractions"
    assert world.vitals.generated_tokens == sum(len(tokens) for tokens in world.tokens.values())
    assert world.vitals.prompt_tokens == sum(len(prompt) for prompt in prompts.values())


@pytest.mark.parametrize("loop", LOOP_NAMES)
def test_sequences_that_end_themselves_end_with_the_end_token(loop):
    world = World(loop, lengths=lambda key: 3 + key % 5)
    prompts = {stream: [stream] * 5 for stream in range(1, 9)}
    for stream, prompt in prompts.items():
        world.ask(stream, prompt, max_new_tokens=50)
    world.run()
    for stream, prompt in prompts.items():
        length = 3 + content_key(np.array(prompt, np.int32), None) % 5
        assert world.tokens[stream] == [*expected(prompt, length - 1), EOS]
        assert world.ended[stream].kind == "stop"


@pytest.mark.parametrize("loop", LOOP_NAMES)
def test_a_cancelled_sequence_has_freed_its_kv_one_step_later(loop):
    world = World(loop)
    world.ask(1, list(range(100)), max_new_tokens=800)
    world.ask(2, list(range(200, 240)), max_new_tokens=800)
    world.run(steps=30)
    held = world.scheduler.kv.used_tokens
    batches = world.scheduler.assembly.step
    world.tell(Cancel("r1", "disconnected"))
    while 1 not in world.ended or world.scheduler.kv.used_tokens > held - 100:
        world.run(steps=1)
    assert world.scheduler.assembly.step - batches <= 2, "the batch in flight, and the one formed while it is"
    assert (world.ended[1].kind, world.ended[1].detail) == ("aborted", "disconnected")
    world.tell(Cancel("r2", "client"))
    world.run()
    assert world.scheduler.kv.used_tokens == 0


@pytest.mark.parametrize("loop", LOOP_NAMES)
def test_a_stop_string_ends_a_sequence_as_finished(loop):
    world = World(loop)
    world.ask(1, [1, 2, 3], max_new_tokens=800)
    world.run(steps=30)
    world.tell(StopFound("r1", 3), StopFound("nobody", 1))
    world.run()
    assert world.ended[1].kind == "stop"
    assert world.tokens[1] == expected([1, 2, 3], len(world.tokens[1]))


def test_the_next_turn_of_a_session_may_overtake_the_stop_of_the_one_before():
    world = World()
    world.tell(SessionControl(1, "chat", "open"))
    world.ask(1, [1, 2, 3], session="chat", max_new_tokens=800)
    world.run(steps=30)
    # The client has the end of its answer from the detokenizer; the socket takes turns among its senders.
    world.ask(2, [4, 5], session="chat", max_new_tokens=6)
    world.tell(StopFound("r1", 4))
    world.run()
    assert [(world.ended[stream].kind, world.ended[stream].prompt_tokens) for stream in (1, 2)] == [
        ("stop", 3),
        ("length", 9),
    ]
    assert len(world.tokens[1]) > 4, "the scheduler was told late"
    assert world.tokens[2] == expected([1, 2, 3, *world.tokens[1][:4], 4, 5], 6)


def test_seeds_make_answers_differ_and_are_part_of_the_content():
    world = World()
    world.ask(1, [5] * 8, max_new_tokens=6, seed=1)
    world.ask(2, [5] * 8, max_new_tokens=6, seed=2)
    world.run()
    assert world.tokens == {1: expected([5] * 8, 6, 1), 2: expected([5] * 8, 6, 2)}
    assert world.tokens[1] != world.tokens[2]


def test_no_stop_token_comes_before_the_least_length():
    world = World(lengths=lambda key: 2)
    stops = tuple(expected([7] * 8, 10))
    world.ask(1, [7] * 8, max_new_tokens=20, min_new_tokens=6, stop_token_ids=stops)
    world.run()
    tokens = world.tokens[1]
    assert len(tokens) == 7
    assert not set(tokens[:6]) & {*stops, EOS}


@pytest.mark.parametrize("loop", LOOP_NAMES)
def test_log_probabilities_go_to_those_who_asked(loop):
    world = World(loop, logprobs=True, chunk=8)
    world.ask(1, list(range(20)), max_new_tokens=4, logprobs=2)
    world.ask(2, list(range(30, 50)), max_new_tokens=4)
    world.ask(3, list(range(60, 80)), max_new_tokens=4, logprobs=0)
    world.run()
    found: dict[int, list] = {1: [], 3: []}
    for step in world.steps:
        for stream, items in (step.logprobs or {}).items():
            found[stream] += items
    assert [len(found[1]), len(found[3])] == [4, 4]
    assert all((item.top_ids, item.top_logprobs) == ([1, 2], [-0.5, -1.5]) for item in found[1])
    assert all((item.top_ids, item.logprob % 1) == ([], 0.5) for item in found[3])


def test_controls_are_answered_after_they_are_done_and_shutdown_ends_the_loop():
    world = World()
    world.ask(1, [1] * 50, max_new_tokens=2)
    world.run()
    assert world.scheduler.kv.cache.counts.evictable_pages > 0
    world.tell(Control(7, "flush_cache"))
    world.run(steps=2)
    assert [decode_to_http(data) for data in world.http.queue] == [Done(7)]
    assert world.scheduler.kv.cache.counts.evictable_pages == 0
    world.tell(Control(8, "pause"))
    world.ask(2, [1], max_new_tokens=2)
    world.run(steps=5)
    assert world.tokens[2] == []
    world.tell(Control(9, "resume"))
    world.run()
    assert len(world.tokens[2]) == 2
    world.tell(Shutdown())
    with pytest.raises(Ending):
        world.run()


def test_a_prompt_that_can_never_be_served_is_told_so():
    world = World()
    world.ask(1, [1] * 2000, max_new_tokens=2)
    world.run()
    assert (world.ended[1].kind, world.ended[1].detail) == ("rejected", "prompt_exceeds_context")


def test_iterations_are_logged_with_modelled_gpu_time_and_measured_cpu_time():
    world = World("pipeline")
    world.ask(1, [1] * 10, max_new_tokens=5)
    world.run()
    steps = {row[0] for row in world.rows}
    assert len(world.rows) == 2 * len(steps), "one row a stage"
    for row in world.rows:
        launch_s, start_s, end_s = row[4:7]
        assert launch_s <= start_s
        assert end_s - start_s == pytest.approx(0.01)
        assert all(phase > 0 for phase in row[-4:]) == (row[2] == 0)
    assert world.vitals.progress_s > 0


def test_edf_serves_live_requests_by_their_deadlines():
    world = World("normal", policy="edf", max_running=1)
    for stream, slo_ttft_s in enumerate([None, 9.0, 3.0, 6.0]):
        world.ask(stream, [1, 2, 3 + stream], slo_ttft_s=slo_ttft_s, max_new_tokens=2)
    world.run()
    assert list(world.ended) == [2, 3, 1, 0]


def test_prefixes_are_shared_within_a_namespace_only():
    world = World("normal")
    cached = {}
    for stream, namespace in enumerate(["", "mine", "mine", ""]):
        world.ask(stream, list(range(50)), namespace=namespace, max_new_tokens=2)
        world.run()
        cached |= {number: found for step in world.steps for number, _, found in step.first}
    assert cached == {0: 0, 1: 0, 2: 49, 3: 49}


@pytest.mark.parametrize("loop", LOOP_NAMES)
def test_a_modelled_step_counts_as_work_while_it_lasts_and_no_longer(loop):
    world = World(loop)
    world.ask(0, list(range(50)), max_new_tokens=1)
    while not world.backend.phases.pending:
        next(world._loop)
    end_s = world.backend.phases.pending[-1].end_s
    seen = []
    for at_s in (end_s - 0.004, end_s - 0.002, end_s, end_s + 1.0, end_s + 1000.0):
        world.now_s = at_s
        seen.append(world.backend.worked_s())
    assert seen == [end_s - 0.004, end_s - 0.002, end_s, end_s, end_s]


def test_a_step_with_counts_gives_each_sequence_its_run_of_tokens():
    world = World("normal", logprobs=True)
    world.ask(7, [1, 2, 3], max_new_tokens=50, logprobs=1)
    world.ask(8, [4, 5, 6], max_new_tokens=50)
    while 8 not in world.tokens or not world.tokens[8]:
        world.run(steps=1)
    batch = world.scheduler.next_batch()
    world.steps.clear()
    likely = Logprobs(np.array([-1.0, -2.0, -3.0]), np.zeros((3, 1)), np.array([[11], [12], [13]]))
    world.outbox.send(StepResult(batch, StepOutput(np.array([11, 12, 13]), np.array([2, 1]), likely)))
    world._listen()
    (step,) = world.steps
    assert [np.frombuffer(step.sequences, np.int64).tolist(), np.frombuffer(step.tokens, np.int32).tolist()] == [
        [7, 7, 8],
        [11, 12, 13],
    ]
    assert [item.logprob for item in step.logprobs[7]] == [-1.0, -2.0] and list(step.logprobs) == [7]
