"""What well-known clients send, as recorded, and what of it is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_type_hints

import pytest

from tests.serving.server import MODEL, Server, answer
from workbench.serving.http import bodies
from workbench.serving.http.bodies import ChatRequest, CompletionRequest
from workbench.serving.http.errors import api_error
from workbench.serving.http.fields import TABLE, as_markdown
from workbench.serving.http.native import GenerateRequest, GenerateSampling
from workbench.serving.http.output_format import StructuredOutputs
from workbench.serving.http.responses_api import ResponsesRequest
from workbench.serving.refusals import Refusal

DOCS = Path(__file__).resolve().parents[2] / "docs" / "serving.md"
KINDS = {
    "completions": CompletionRequest,
    "chat": ChatRequest,
    "generate": GenerateRequest,
    "responses": ResponsesRequest,
}
HI = [{"role": "user", "content": "hi"}]
LEAST = {
    "completions": {"prompt": "hi"},
    "chat": {"messages": HI},
    "generate": {"text": "hi"},
    "responses": {"input": "hi"},
}

RECORDED = {
    "guidellm": (
        "/v1/completions",
        {
            "prompt": "hi",
            "model": MODEL,
            "stream": True,
            "max_tokens": 4,
            "stop": None,
            "ignore_eos": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        },
    ),
    "guidellm chat": (
        "/v1/chat/completions",
        {
            "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
            "model": MODEL,
            "stream": True,
            "max_completion_tokens": 4,
            "stop": None,
            "ignore_eos": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        },
    ),
    "guidellm, older": (
        "/v1/completions",
        {"prompt": "hi", "max_tokens": 4, "max_completion_tokens": 4, "stream": True},
    ),
    "aiperf": (
        "/v1/chat/completions",
        {
            "messages": [{"role": "user", "name": None, "content": "hi"}],
            "model": MODEL,
            "stream": True,
            "max_completion_tokens": 4,
            "stream_options": {"include_usage": True},
        },
    ),
    "SGLang's bench": (
        "/generate",
        {
            "text": "hi",
            "sampling_params": {"temperature": 0.0, "max_new_tokens": 4, "ignore_eos": True},
            "stream": True,
            "lora_path": None,
            "return_logprob": False,
            "logprob_start_len": -1,
        },
    ),
    "SGLang's bench, openai": (
        "/v1/completions",
        {
            "model": MODEL,
            "prompt": "hi",
            "temperature": 0.0,
            "best_of": 1,
            "max_tokens": 4,
            "stream": True,
            "ignore_eos": True,
        },
    ),
    "vLLM's bench": (
        "/v1/completions",
        {
            "model": MODEL,
            "prompt": "hi",
            "repetition_penalty": 1.0,
            "max_tokens": 4,
            "logprobs": None,
            "stream": True,
            "stream_options": {"include_usage": True},
            "ignore_eos": True,
            "use_beam_search": False,
            "length_penalty": 1.0,
        },
    ),
    "lm-eval": (
        "/v1/completions",
        {
            "prompt": ["hi"],
            "model": MODEL,
            "max_tokens": 4,
            "temperature": 0,
            "seed": 1234,
            "stop": ["\n\n", "Question:"],
        },
    ),
    "everything null": (
        "/v1/chat/completions",
        {
            "messages": HI,
            "max_tokens": 4,
            "seed": None,
            "tools": None,
            "audio": None,
            "prediction": None,
            "functions": [],
            "logit_bias": {},
            "user": "me",
            "store": False,
            "n": 1,
            "metadata": {"a": "b"},
            "service_tier": "auto",
            "parallel_tool_calls": True,
            "tool_choice": "auto",
            "response_format": {"type": "text"},
            "modalities": ["text"],
            "top_logprobs": 0,
            "stream": None,
            "prompt_cache_key": "k",
            "safety_identifier": "s",
            "stream_options": None,
        },
    ),
    "whole numbers as floats": (
        "/v1/completions",
        {
            "prompt": [104.0, 105.0],
            "max_tokens": 4.0,
            "seed": 8.0,
            "top_k": 5.0,
            "n": 1.0,
            "logit_bias": {"5.0": 1},
            "stop_token_ids": [7.0],
            "priority": 1e0,
        },
    ),
}


@pytest.fixture(scope="module")
def server():
    server = Server("--max-tokens", "40", "--api-key", "sesame")
    server.http.headers["authorization"] = "bearer sesame"
    yield server
    server.kill()


@pytest.mark.parametrize("client", RECORDED)
def test_what_a_client_sends_is_answered(server, client):
    path, body = RECORDED[client]
    response = server.http.post(path, json=body)
    assert response.status_code == 200, response.text
    if body.get("stream"):
        assert response.text.endswith("data: [DONE]\n\n")
    else:
        assert response.json()["usage"]["completion_tokens"] == 4


def fields():
    for row in TABLE:
        for where in row.where:
            for name in row.names:
                yield where, name, row


def body_of(where: str, name: str, value: object) -> tuple[dict, type]:
    if where == "sampling_params":
        return {**LEAST["generate"], "sampling_params": {name: value}}, GenerateRequest
    if where == "stream_options":
        return {**LEAST["chat"], "stream": True, "stream_options": {name: value}}, ChatRequest
    if where == "structured_outputs":
        return {**LEAST["chat"], "structured_outputs": {"regex": "a", name: value}}, ChatRequest
    return {**LEAST[where], name: value}, KINDS[where]


@pytest.mark.parametrize(("where", "name", "row"), list(fields()), ids=lambda value: str(value)[:30])
def test_a_field_of_the_table_is_taken_where_it_asks_for_nothing_and_refused_by_name_elsewhere(where, name, row):
    values = ["anything", 7, {"a": [1]}] if row.at("anything", 1) else list(row.values)
    for value in [None, *values]:
        bodies.parse(*encoded(*body_of(where, name, value)))
    if row.at("anything", 1):
        return
    with pytest.raises(Refusal) as caught:
        bodies.parse(*encoded(*body_of(where, name, "something else")))
    error = api_error(caught.value)
    param = error.body["error"]["param"]
    assert error.status == 400 and param is not None and param.endswith(name) and name in str(caught.value)


def encoded(body: dict, kind: type) -> tuple[bytes, type]:
    return json.dumps(body).encode(), kind


def test_the_table_says_each_field_once_and_names_nothing_that_a_request_has():
    names = [(where, name) for where, name, _ in fields()]
    assert len(names) == len(set(names))
    own = {where: set(kind.__struct_fields__) for where, kind in KINDS.items()}
    own |= {"sampling_params": set(GenerateSampling.__struct_fields__), "stream_options": set()}
    own["structured_outputs"] = set(StructuredOutputs.__struct_fields__)
    assert {(where, name) for where, name in names if name in own[where]} == {
        ("completions", "logprobs"),
        ("sampling_params", "logprobs"),
    }, "false for a number"


@pytest.mark.parametrize(
    ("reasoning", "taken"),
    [
        ({"effort": None}, True),
        ({"effort": "medium", "summary": None, "generate_summary": None}, True),
        ({"effort": None, "summary": "auto"}, False),
    ],
)
def test_null_asks_for_nothing_in_an_object_as_well(reasoning, taken):
    body = json.dumps({"input": "hi", "reasoning": reasoning}).encode()
    if taken:
        bodies.parse(body, ResponsesRequest)
        return
    with pytest.raises(Refusal, match="reasoning: not supported"):
        bodies.parse(body, ResponsesRequest)


def test_the_docs_have_the_table():
    assert as_markdown() in DOCS.read_text()


@pytest.mark.parametrize(("n", "best_of", "taken"), [(None, 1, True), (2, 2, True), (2, 1, False), (None, 3, False)])
def test_the_best_of_as_many_as_are_returned_are_all_of_them(n, best_of, taken):
    body = json.dumps({"prompt": "hi", "n": n, "best_of": best_of}).encode()
    if taken:
        bodies.parse(body, CompletionRequest)
    else:
        with pytest.raises(Refusal, match="best_of: not supported"):
            bodies.parse(body, CompletionRequest)


def test_usage_is_in_every_event_where_that_is_asked_for(server):
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {"prompt": ["hello", "you"], "max_tokens": 5, "stream": True, "stream_options": options}
    text = server.http.post("/v1/completions", json=body).text
    *pieces, last = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    written = {0: 0, 1: 0}
    for piece in pieces:
        index = piece["choices"][0]["index"]
        written[index] += 1
        assert piece["usage"]["completion_tokens"] == written[index]
        assert piece["usage"]["prompt_tokens"] == (5, 3)[index]
    assert (last["choices"], last["usage"]["completion_tokens"], last["usage"]["prompt_tokens"]) == ([], 10, 8)
    body = {"messages": HI, "max_tokens": 2, "stream": True, "stream_options": {"continuous_usage_stats": True}}
    text = server.http.post("/v1/chat/completions", json=body).text
    pieces = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    assert [piece["usage"]["completion_tokens"] for piece in pieces] == [0, 1, 2]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("more", [{}, {"n": 3}, {"stop": ["x"]}, {"min_tokens": 0}, {"seed": 3}])
def test_no_output_asked_for_is_a_prompt_computed_and_an_empty_answer(server, stream, more):
    made = server.http.post(
        "/v1/completions",
        json={
            "prompt": "hello",
            "max_tokens": 0,
            "stream": stream,
            **more,
            **({"stream_options": {"include_usage": True}} if stream else {}),
        },
    )
    assert made.status_code == 200, made.text
    if stream:
        *pieces, last = [json.loads(line[6:]) for line in made.text.splitlines() if line.startswith("data: {")]
        choices, usage = [choice for piece in pieces for choice in piece["choices"]], last["usage"]
    else:
        choices, usage = made.json()["choices"], made.json()["usage"]
    assert [(choice["text"], choice["finish_reason"]) for choice in choices] == [("", "length")] * more.get("n", 1)
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (5, 0)


def test_a_prompt_computed_for_no_output_is_found_in_the_cache(server):
    prompt = "a prompt to be remembered by this one server, " * 3
    for path, body in (
        ("/generate", {"text": prompt, "sampling_params": {"max_new_tokens": 0}}),
        ("/generate", {"text": prompt, "sampling_params": {"max_new_tokens": 0}}),
    ):
        made = server.http.post(path, json=body).json()
        assert made["meta_info"]["finish_reason"] == {"type": "length", "length": 0} and made["output_ids"] == []
    assert made["meta_info"]["cached_tokens"] == len(prompt) - 1
    chat = server.http.post("/v1/chat/completions", json={"messages": HI, "max_tokens": 0}).json()
    assert chat["choices"][0]["message"]["content"] == "" and chat["usage"]["completion_tokens"] == 0
    server.await_rest()


def test_a_byte_order_mark_is_no_part_of_a_body(server):
    body = b"\xef\xbb\xbf" + json.dumps({"prompt": "hi", "max_tokens": 2}).encode()
    made = server.http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert made.json()["choices"][0]["text"] == answer("hi", 2)


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_the_scheme_of_a_key_is_in_any_case(server, scheme):
    assert server.http.get("/v1/models", headers={"authorization": f"{scheme} sesame"}).status_code == 200
    assert server.http.get("/v1/models", headers={"authorization": f"{scheme} Sesame"}).status_code == 401


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_id_comes_back_as_it_was_given_and_one_is_made_where_none_is(server, stream):
    body = {"prompt": "hi", "max_tokens": 2, "stream": stream}
    given = server.http.post("/v1/completions", json=body, headers={"x-request-id": "trace-7"})
    assert given.headers.get_list("x-request-id") == ["trace-7"]
    made = server.http.post("/v1/completions", json=body)
    assert made.headers["x-request-id"] in made.text, "it is the id in the answer, which /abort takes"
    wrong = server.http.post("/v1/completions", json={"prompt": 5}, headers={"x-request-id": "trace-8"})
    assert (wrong.status_code, wrong.headers["x-request-id"]) == (400, "trace-8")
    for path in ("/health", "/nothing", "/v1/models"):
        assert len(server.http.get(path).headers["x-request-id"]) > 10
    locked = server.http.get("/v1/models", headers={"authorization": "no", "x-request-id": "trace-9"})
    assert (locked.status_code, locked.headers["x-request-id"]) == (401, "trace-9")
    odd = server.http.post("/v1/completions", json=body, headers={"x-request-id": "a" * 201})
    assert odd.status_code == 400 and odd.json()["error"]["param"] == "x-request-id"


def test_sglangs_names_are_streamed_as_sglang_does(server):
    body = {"text": "hello", "sampling_params": {"max_new_tokens": 6}, "stream": True, "rid": "mine"}
    text = server.http.post("/generate", json=body).text
    pieces = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    whole = answer("hello", 6)
    assert [piece["text"] for piece in pieces] == [whole[: i + 1] for i in range(6)]
    assert [len(piece["output_ids"]) for piece in pieces] == [1, 2, 3, 4, 5, 6]
    assert [piece["meta_info"]["completion_tokens"] for piece in pieces] == [1, 2, 3, 4, 5, 6]
    assert all(piece["meta_info"]["prompt_tokens"] == 5 and piece["meta_info"]["id"] == "mine" for piece in pieces)
    assert [piece["meta_info"]["finish_reason"] for piece in pieces] == [None] * 5 + [{"type": "length", "length": 6}]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"sampling_params": {"max_new_tokens": 3, "max_tokens": 4}}, "max_tokens"),
        ({"sampling_params": {"min_new_tokens": 3, "max_new_tokens": 2}}, "min_new_tokens"),
        ({"sampling_params": {"min_new_tokens": -1}}, "min_new_tokens"),
        ({"return_logprob": True}, "return_logprob"),
        ({"return_logprob": True, "top_logprobs_num": 21}, "top_logprobs_num"),
        ({"return_logprob": True, "top_logprobs_num": 2, "sampling_params": {"logprobs": 1}}, "logprobs"),
        ({"top_logprobs_num": 2}, "top_logprobs_num"),
        ({"lora_path": "x"}, "lora_path"),
        ({"return_logprob": True, "logprob_start_len": 0}, "logprob_start_len"),
        ({"rid": "a", "request_id": "b"}, "rid"),
        ({"rid": "a\nb"}, "rid"),
        ({"sampling_params": {"max_new_tokns": 3}}, "sampling_params.max_new_tokns"),
    ],
)
def test_what_sglang_has_and_this_server_lacks_is_refused_by_name(server, body, param):
    refused = server.http.post("/generate", json={"text": "x", **body})
    assert refused.status_code == 400, refused.text
    assert refused.json()["error"]["param"] == param
    assert refused.json()["error"]["message"].startswith(f"{param}: ")


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_requests_of_every_endpoint_have_the_fields_beside_prompt_and_sampling(kind):
    assert get_type_hints(bodies.Asked).items() <= get_type_hints(kind).items()
