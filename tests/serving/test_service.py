"""From a body to the scheduler and back, with every process's work done in this one."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx2
import pytest
import zmq.asyncio

from tests.event_loop import in_a_loop
from tests.serving.test_live_loop import World
from workbench.scheduler.capacity import Capacity
from workbench.serving.engine.engine_client import EngineClient
from workbench.serving.http.endpoints import Api
from workbench.serving.http.metrics_page import MetricsPage
from workbench.serving.metrics import Metrics
from workbench.serving.serve_settings import ServeSettings
from workbench.serving.service import Service
from workbench.serving.text.detokenizer import Detokenizer
from workbench.serving.text.tokenizer import ByteTokenizer
from workbench.serving.wire import Addresses, Opened, Ready, pull_socket
from workbench.settings.run_settings import RunSettings

Asked = tuple[str, dict[str, Any], dict[str, str]]
"""Path, body and headers."""


def answered(folder, world: World, asked: list[Asked]) -> list[httpx2.Response]:
    """The answers to requests that come in this order, all of them before the scheduler looks at the first."""

    async def check() -> list[httpx2.Response]:
        addresses, context = Addresses.within(folder), zmq.asyncio.Context()
        scheduler = pull_socket(context, addresses.scheduler)
        settings, metrics = ServeSettings(RunSettings(), backend="simulated"), Metrics("m")
        engine = EngineClient(addresses, metrics, 100)
        beat, config = world.vitals.beat(), world.config
        engine.ready.set_result(
            Ready(
                Capacity.of(config),
                config.kv_tokens,
                config.max_running,
                ByteTokenizer().eos_token_id + 1,
                False,
                False,
                "simulated",
                "h100",
                "normal",
                beat,
            )
        )
        service = Service(settings, engine, ByteTokenizer())
        app = Api(settings, service, MetricsPage(metrics)).app()
        transport = httpx2.ASGITransport(app=app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client:
            answers = []
            for path, body, headers in asked:
                answer = asyncio.ensure_future(client.post(path, json=body, headers=headers))
                answers.append(answer)
                submit = asyncio.ensure_future(scheduler.recv())
                await asyncio.wait((answer, submit), return_when=asyncio.FIRST_COMPLETED)
                if submit.done():
                    world.inbound.send(submit.result())
                else:
                    submit.cancel()
            world.run()
            detokenizer = Detokenizer(ByteTokenizer())
            for message in world.said:
                if isinstance(message, Opened):
                    detokenizer.open(message)
                else:
                    for chunk in detokenizer.step(message)[0]:
                        engine._deliver(chunk, 0.0)
            responses = await asyncio.gather(*answers)
        service.close()
        engine.destroy()
        context.destroy(linger=0)
        return responses

    return in_a_loop(check())


def test_edf_serves_the_request_with_the_nearest_deadline_first_however_it_is_said(tmp_path):
    world = World("normal", policy="edf", max_running=1)
    chat = {"messages": [{"role": "user", "content": "soon"}], "slo_ttft_s": 300.0, "max_tokens": 2}
    asked = [
        ("/v1/completions", {"prompt": "no objective", "max_tokens": 2}, {}),
        ("/v1/completions", {"prompt": "late", "max_tokens": 2, "slo_ttft_s": 900}, {}),
        ("/generate", {"text": "middle", "sampling_params": {"max_tokens": 2}}, {"x-slo-ttft-ms": "600000"}),
        ("/v1/chat/completions", chat, {}),
    ]
    assert [response.status_code for response in answered(tmp_path, world, asked)] == [200] * 4
    assert list(world.ended) == [4, 3, 2, 1]


def test_edf_goes_by_the_servers_objective_where_a_request_has_none(tmp_path):
    world = World("normal", policy="edf", max_running=1, slo_ttft_s=500.0)
    asked = [
        ("/generate", {"text": "its own", "slo_ttft_s": 900, "sampling_params": {"max_tokens": 2}}, {}),
        ("/generate", {"text": "the server's", "sampling_params": {"max_tokens": 2}}, {}),
    ]
    answered(tmp_path, world, asked)
    assert list(world.ended) == [2, 1]


def test_prefixes_are_found_by_requests_of_the_same_salt_only(tmp_path):
    world = World("normal", max_running=1)
    salts = [None, "mine", "mine", "yours", None]
    body = {"prompt": "the same text", "max_tokens": 2}
    asked = [("/v1/completions", {**body, "cache_salt": salt}, {}) for salt in salts]
    usages = [response.json()["usage"] for response in answered(tmp_path, world, asked)]
    found = [usage["prompt_tokens_details"]["cached_tokens"] for usage in usages]
    assert found == [0, 0, 12, 0, 12]


@pytest.mark.parametrize("config", [{}, {"page_size": 16, "kv_tokens": 90}])
@pytest.mark.parametrize("max_tokens", [0, 1, 2])
def test_the_longest_prompt_is_what_the_scheduler_says_and_one_token_more_is_a_400(tmp_path, config, max_tokens):
    world = World("normal", **{"max_context": 100, **config})
    capacity = Capacity.of(world.config)
    longest = capacity.longest_prompt(max_tokens)
    assert longest == ((80, 80, 79) if config else (99, 98, 98))[max_tokens]
    asked = [
        ("/generate", {"input_ids": [5] * tokens, "sampling_params": {"max_tokens": max_tokens}}, {})
        for tokens in (longest, longest + 1)
    ]
    fits, too_long = answered(tmp_path, world, asked)
    assert (fits.status_code, len(fits.json()["output_ids"])) == (200, capacity.output_bound(longest, max_tokens))
    error = too_long.json()["error"]
    assert (too_long.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", "input_ids")
    assert f"{longest + 1} tokens are more than the {longest} that fit" in error["message"]


def test_what_the_scheduler_rejects_is_named_by_its_own_word_and_the_clients_parameter(tmp_path):
    body = {"text": "x", "session_id": "nobody's", "sampling_params": {"max_tokens": 2}}
    (refused,) = answered(tmp_path, World("normal"), [("/generate", body, {})])
    assert refused.status_code == 400
    assert refused.json()["error"] == {
        "message": "session_id: no session of this name is open",
        "type": "invalid_request_error",
        "param": "session_id",
        "code": "unknown_session",
    }
