"""/v1/responses with the official client: whole, streamed, with tools, forms and reasoning."""

from __future__ import annotations

import json
from typing import Any, Literal

import jsonschema
import pydantic
import pytest

from tests.serving.server import MODEL, Server, answer
from tests.serving.test_tools import WEATHER

TOOL: dict[str, Any] = {"type": "function", **WEATHER["function"]}
NAMED = {"type": "function", "name": "weather"}


@pytest.fixture(scope="module")
def server():
    found = Server("--tool-parser", "hermes")
    yield found
    found.kill()


class Colour(pydantic.BaseModel):
    name: Literal["red", "blue"]
    share: int = pydantic.Field(ge=0, le=9)


@pytest.mark.server
def test_a_text_is_answered_and_a_cut_one_says_so(server):
    response = server.openai().responses.create(
        model=MODEL, input="hi", instructions="be brief", max_output_tokens=12, metadata={"a": "b"}
    )
    assert response.output_text == answer("system: be brief\nuser: hi\nassistant:", 12)
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert (response.usage.output_tokens, response.metadata) == (12, {"a": "b"})


@pytest.mark.server
def test_events_are_numbered_and_make_up_the_response(server):
    client = server.openai()
    events = list(client.responses.create(model=MODEL, input="hi", max_output_tokens=12, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events[:4]] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == answer("user: hi\nassistant:", 12) == events[-1].response.output_text
    assert events[-1].type == "response.incomplete"


@pytest.mark.server
def test_the_client_parses_a_form(server):
    response = server.openai().responses.parse(model=MODEL, input="a colour", text_format=Colour, max_output_tokens=200)
    assert isinstance(response.output_parsed, Colour) and response.status == "completed"


@pytest.mark.server
def test_a_tool_is_called_its_result_goes_back_and_arguments_are_streamed(server):
    client = server.openai()
    asked: dict[str, Any] = {"model": MODEL, "tools": [TOOL], "max_output_tokens": 200}
    response = client.responses.create(input="rain?", tool_choice={"type": "function", "name": "weather"}, **asked)
    (call,) = response.output
    jsonschema.validate(json.loads(call.arguments), TOOL["parameters"])
    with client.responses.stream(input="rain?", tool_choice="required", **asked) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert kinds.count("response.function_call_arguments.delta") > 3
    assert kinds.count("response.function_call_arguments.done") == len(final.output)
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "wet"}
    again: list[Any] = [{"role": "user", "content": "rain?"}, call.model_dump(), result]
    told = client.responses.create(input=again, model=MODEL, max_output_tokens=5)
    function = json.dumps({"name": "weather", "arguments": json.loads(call.arguments)}, ensure_ascii=False)
    prompt = f"user: rain?\nassistant: <tool_call>{function}</tool_call>\ntool: wet\nassistant:"
    assert told.output_text == answer(prompt, 5)


@pytest.mark.server
@pytest.mark.parametrize(
    "asked, param",
    [
        ({"input": []}, "input"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role"),
        ({"input": [{"type": "computer_call"}]}, "input[0].type"),
        ({"tools": [{"type": "web_search"}]}, "tools[0]"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"store": True}, "store"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
        ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "strng"}}}}, "text.format.schema"),
        ({"input": [{"type": "reasoning", "summary": 5}]}, "input[0].summary"),
        ({"input": [{"type": "reasoning", "content": [5]}]}, "input[0].content"),
        ({"input": [{"type": "reasoning", "summary": [{"text": 5}]}]}, "input[0].summary"),
        ({"input": [{"type": "function_call"}]}, "input[0].name"),
        ({"input": [{"type": "function_call", "name": "f", "arguments": "{"}]}, "input[0].arguments"),
        ({"input": [{"type": "function_call", "name": "f", "call_id": 5}]}, "input[0].call_id"),
        ({"input": [{"type": "function_call_output", "call_id": "a", "output": 5}]}, "input[0].output"),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "input[0].call_id"),
        ({"input": "x" * 1_000_000}, "input"),
        ({"tools": [{"type": "function", "name": "a b"}]}, "tools[0].name"),
        ({"tools": [{"type": "function", "name": "f", "parameters": 5}]}, "tools[0].parameters"),
        ({"tools": [{**TOOL, "parameters": {"type": "strng"}}], "tool_choice": "required"}, "tools[0].parameters"),
        ({"tools": [{**TOOL, "parameters": {"type": "strng"}}], "tool_choice": NAMED}, "tools[0].parameters"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "x"}}, "tool_choice"),
        ({"text": {"format": {"type": "json_object"}}, "min_tokens": 2}, "min_tokens"),
        ({"max_output_tokens": -1}, "max_output_tokens"),
        ({"nonsense": 1}, "nonsense"),
    ],
)
def test_what_cannot_be_is_refused_by_name(server, asked, param):
    refused = server.http.post("/v1/responses", json={"input": "hi", **asked})
    error = refused.json()["error"]
    assert (refused.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param), refused.text
    assert "\n" not in error["message"] and len(error["message"]) < 400
