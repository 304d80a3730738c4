"""What the HTTP process tells the scheduler about the requests of its clients."""

from __future__ import annotations

from pathlib import Path

import pytest
import zmq.asyncio

from tests.event_loop import in_a_loop
from tests.serving.test_life_and_death import Model
from workbench.scheduler.capacity import Capacity
from workbench.scheduler.request import SamplingParams
from workbench.serving.engine.engine_client import EngineClient
from workbench.serving.metrics import Metrics
from workbench.serving.refusals import Refusal
from workbench.serving.requests import ServiceRequest, Shared
from workbench.serving.wire import Addresses, Cancel, Ready, decode_to_scheduler, pull_socket

DRAINING = Refusal("draining", "the server is shutting down")


def client(tmp_path: Path) -> EngineClient:
    """The client of an engine that is ready."""
    engine = EngineClient(Addresses.within(tmp_path), Metrics("m"), 10)
    beat = Model().vitals().beat()
    engine.ready.set_result(
        Ready(Capacity(100, 1000), 1000, 8, 256, False, False, "simulated", "h100", "overlap", beat)
    )
    return engine


@pytest.mark.parametrize(
    ("end", "why"),
    [
        (lambda engine, call: call.disconnected(), "disconnected"),
        (lambda engine, call: call.too_slow(), "too_slow"),
        (lambda engine, call: engine.fail_all("shutdown", DRAINING), "shutdown"),
        (lambda engine, call: None, "request_failed"),
    ],
)
def test_each_sequence_that_is_ended_early_is_ended_once_and_for_what_happened(tmp_path, end, why):
    async def check() -> None:
        addresses = Addresses.within(tmp_path)
        context = zmq.asyncio.Context()
        scheduler = pull_socket(context, addresses.scheduler)
        engine = client(tmp_path)
        call = engine.submit(ServiceRequest([[1, 2], [3]], SamplingParams(max_new_tokens=4), n=2), "cmpl-")
        submitted = [decode_to_scheduler(await scheduler.recv()) for _ in range(4)]
        end(engine, call)
        call.close()  # what every answer ends with
        cancelled = [decode_to_scheduler(await scheduler.recv()) for _ in range(4)]
        assert cancelled == [Cancel(sequence.sequence_id, why) for sequence in submitted]
        engine.shut_down()
        assert not isinstance(decode_to_scheduler(await scheduler.recv()), Cancel), "none is told of twice"
        assert engine.idle.is_set()
        engine.destroy()
        context.destroy(linger=0)

    in_a_loop(check())


def test_a_request_that_cannot_be_sent_leaves_its_room_to_the_next(tmp_path):
    async def check() -> None:
        engine, shared = client(tmp_path), Shared("router", 512, "127.0.0.1:9")
        with pytest.raises(OverflowError):
            engine.submit(ServiceRequest([[1], [1 << 40]], SamplingParams(), shared=shared), "cmpl-")
        call = engine.submit(ServiceRequest([[1], [2]], SamplingParams(), shared=shared), "cmpl-")
        with pytest.raises(Refusal, match="x-workbench-room: 2 is being served already"):
            engine.submit(ServiceRequest([[3]], SamplingParams(), shared=shared), "cmpl-")
        call.close()
        engine.destroy()

    in_a_loop(check())
