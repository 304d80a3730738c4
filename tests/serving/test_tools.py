"""Tools and reasoning in chats: through the template, forced by a grammar, streamed, and refused."""

from __future__ import annotations

import json
from functools import reduce
from typing import Any

import jsonschema
import openai
import pytest

from tests.serving.server import MODEL, Server
from tests.serving.test_text_streams import TOKENIZERS

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "how it is there",
        "parameters": {
            "type": "object",
            "properties": {"city": {"$ref": "#/$defs/city"}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
            "required": ["city", "days"],
            "additionalProperties": False,
            "$defs": {"city": {"enum": ["Köln", "Rom"]}},
        },
    },
}
CLOCK: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "clock",
        "parameters": {"type": "object", "properties": {"zone": {"enum": ["UTC"]}}, "additionalProperties": False},
    },
}
DEEP: dict[str, Any] = {
    "type": "function",
    "function": {"name": "f", "parameters": reduce(lambda inner, _: {"items": inner}, range(400), {})},
}


def tool(name: str, parameters: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def properties(needed: dict[str, Any], **more: Any) -> dict[str, Any]:
    """The schema of an object that has these and nothing else."""
    return {
        "type": "object",
        "properties": needed,
        "required": list(needed),
        "additionalProperties": False,
        **more,
    }


ASKED: list[dict[str, Any]] = [{"role": "user", "content": "go"}]
SCHEMAS = {tool["function"]["name"]: tool["function"]["parameters"] for tool in (WEATHER, CLOCK)}


@pytest.fixture(scope="module")
def server():
    found = Server("--tool-parser", "hermes", "--reasoning-parser", "qwen3")
    yield found
    found.kill()


def chat(server: Server, **more: Any) -> dict[str, Any]:
    body = {"messages": ASKED, "max_tokens": 300, "tools": [WEATHER, CLOCK], **more}
    answer = server.http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]


def check(calls: Any) -> None:
    for call in calls:
        assert call["type"] == "function" and call["id"].startswith("call_")
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        jsonschema.validate(json.loads(arguments), SCHEMAS[name])
    assert len({call["id"] for call in calls}) == len(calls)


@pytest.mark.server
def test_a_named_tool_is_called_with_arguments_of_its_schema(server):
    choice = chat(server, tool_choice={"type": "function", "function": {"name": "weather"}})
    (call,) = choice["message"]["tool_calls"]
    check([call])
    assert call["function"]["name"] == "weather"
    assert choice["message"]["content"] is None and choice["finish_reason"] == "stop"


@pytest.mark.server
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("parallel", [True, False])
def test_required_calls_are_made_one_or_more(server, seed, parallel):
    choice = chat(server, tool_choice="required", seed=seed, parallel_tool_calls=parallel)
    calls = choice["message"]["tool_calls"]
    check(calls)
    assert choice["finish_reason"] == "tool_calls" and (parallel or len(calls) == 1)


@pytest.mark.server
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_streamed_arguments_are_together_those_of_the_whole_answer(server, choice):
    client = server.openai()
    asked: dict[str, Any] = {
        "model": MODEL,
        "messages": ASKED,
        "tools": [WEATHER, CLOCK],
        "tool_choice": choice,
        "max_tokens": 300,
    }
    whole = client.chat.completions.create(**asked).choices[0].message.tool_calls
    with client.chat.completions.stream(**asked) as stream:
        deltas = [event for event in stream if event.type == "tool_calls.function.arguments.delta"]
        final = stream.get_final_completion()
    streamed = final.choices[0].message.tool_calls
    assert [(c.function.name, c.function.arguments) for c in streamed] == [
        (c.function.name, c.function.arguments) for c in whole
    ]
    assert len(deltas) > 5, "arguments come as they are written"


@pytest.mark.server
@pytest.mark.parametrize(
    "parameters",
    [
        properties({"$schema": {"const": 1}, "$ref": {"const": 2}, "$id": {"const": 3}}),
        properties({"a": {"enum": [{"$ref": "#/x", "$schema": 1}]}}),
        properties({"a": {"$ref": "#b"}}, **{"$defs": {"x": {"$anchor": "b", "const": 1}}}),
        properties({"a": {"$ref": "#/$defs/x"}}, **{"$id": "https://example.org/same", "$defs": {"x": {"const": 1}}}),
        properties({"a": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}}),
        {},
        {"anyOf": [{"type": "integer"}, {"type": "object"}]},
        None,
    ],
    ids=["names-of-keywords", "values", "anchor", "id", "recursive", "any", "type-in-parts", "none"],
)
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "f"}}])
def test_arguments_are_an_object_of_the_tools_own_schema_whatever_is_in_it(server, parameters, choice):
    other = tool("g", properties({"a": {"const": "other"}}, **{"$id": "https://example.org/same"}))
    answer = chat(server, tools=[tool("f", parameters), other], tool_choice=choice, max_tokens=1000)
    for call in answer["message"]["tool_calls"]:
        arguments = json.loads(call["function"]["arguments"])
        assert isinstance(arguments, dict) and (
            parameters is not None or call["function"]["name"] == "g" or not arguments
        )
        schema = (parameters or {}) if call["function"]["name"] == "f" else other["function"]["parameters"]
        jsonschema.validate(arguments, schema, jsonschema.Draft202012Validator)


@pytest.mark.server
def test_a_model_that_calls_nothing_answers_with_content_and_none_calls_nothing(server):
    for choice in ("auto", "none", None):
        answer = chat(server, tool_choice=choice, max_tokens=20)
        assert len(answer["message"]["content"]) == 20 and "tool_calls" not in answer["message"]
        assert answer["finish_reason"] == "length"


@pytest.mark.server
def test_calls_and_their_results_go_through_the_template(server):
    calls = [{"id": "call_1", "type": "function", "function": {"name": "clock", "arguments": '{"zone": "UTC"}'}}]
    messages = [*ASKED, {"role": "assistant", "content": None, "tool_calls": calls}]
    messages.append({"role": "tool", "tool_call_id": "call_1", "content": "noon"})
    with_tools = server.http.post(
        "/v1/chat/completions", json={"messages": messages, "tools": [CLOCK], "max_tokens": 1}
    )
    without = server.http.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 1})
    text = "user: go\nassistant: "
    text += '<tool_call>{"name": "clock", "arguments": {"zone": "UTC"}}</tool_call>\ntool: noon\nassistant:'
    assert without.json()["usage"]["prompt_tokens"] == len(text)
    shown = f"tool: {json.dumps(CLOCK)}\n"
    assert with_tools.json()["usage"]["prompt_tokens"] == len(text) + len(shown)


@pytest.mark.server
@pytest.mark.parametrize(
    "asked, param, words",
    [
        ({"tools": [{"type": "web"}]}, "tools[0]", "must be a function"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name", "1 to 64 letters"),
        ({"tools": [CLOCK, CLOCK]}, "tools[1].function.name", "the name of another"),
        ({"tools": [CLOCK], "tool_choice": "always"}, "tool_choice", "must be"),
        (
            {"tools": [CLOCK], "tool_choice": {"type": "function", "function": {"name": "x"}}},
            "tool_choice",
            "none of the tools",
        ),
        ({"tool_choice": "required"}, "tool_choice", "there are no tools"),
        ({"tools": [CLOCK], "tool_choice": "required", "n": 10**9}, "n", "more than 256"),
        *(
            ({"tools": [tool("f", {"type": kind})]}, "tools[0].function.parameters", "is not 'object'")
            for kind in ("string", ["object", "null"])
        ),
        ({"tools": [CLOCK], "response_format": {"type": "json_object"}}, "tools", "do not go with response_format"),
        ({"tools": [CLOCK], "guided_regex": "a"}, "tools", "do not go with guided_regex"),
        (
            {
                "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "strng"}}}],
                "tool_choice": {"type": "function", "function": {"name": "f"}},
            },
            "tools[0].function.parameters",
            "tools[0].function.parameters.type: 'strng'",
        ),
        (
            {
                "tools": [CLOCK, {"type": "function", "function": {"name": "f", "parameters": {"type": "strng"}}}],
                "tool_choice": "required",
            },
            "tools[1].function.parameters",
            "tools[1].function.parameters.type: 'strng'",
        ),
        (
            {
                "tools": [{"type": "function", "function": {"name": "f", "parameters": {"$ref": "#/$defs/none"}}}],
                "tool_choice": "required",
            },
            "tools[0].function.parameters",
            "does not exist",
        ),
        *(
            ({"tools": [DEEP], "tool_choice": choice}, "tools[0].function.parameters", "more than 64 deep")
            for choice in ("required", {"type": "function", "function": {"name": "f"}})
        ),
        (
            {"messages": [{"role": "assistant", "content": "x", "tool_calls": {}}]},
            "messages[0].tool_calls",
            "must be a list",
        ),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", "is not one of"),
        (
            {"messages": [{"role": "user", "content": "x", "tool_calls": [1]}]},
            "messages[0].tool_calls",
            "not supported",
        ),
        ({"messages": [{"role": "assistant", "tool_calls": [1]}]}, "messages[0].tool_calls[0]", "must be a call"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
            "messages[0].tool_calls[0].function.arguments",
            "is not JSON",
        ),
        *(
            (
                {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": text}}]}]},
                "messages[0].tool_calls[0].function.arguments",
                "is not JSON",
            )
            for text in ('{"a": NaN}', '{"a": 1e999}', '{"a": "\\ud800"}')
        ),
        ({"functions": [{"name": "f"}]}, "functions", "not supported"),
    ],
)
def test_what_is_no_tool_or_no_call_is_refused_by_name(server, asked, param, words):
    answer = server.http.post("/v1/chat/completions", json={"messages": ASKED, **asked})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param) and words in error["message"], error


@pytest.mark.server
def test_a_model_whose_way_to_call_nobody_knows_may_be_made_to_call_and_not_left_to_it():
    found = Server()
    try:
        with pytest.raises(openai.BadRequestError, match="--tool-parser"):
            found.openai().chat.completions.create(model=MODEL, messages=ASKED, tools=[CLOCK])
        check(chat(found, tool_choice="required")["message"]["tool_calls"])
    finally:
        found.kill()


@pytest.mark.server
def test_a_template_shows_how_its_model_calls_and_gets_the_tools(tmp_path):
    TOKENIZERS["byte-level"].save(str(tmp_path / "tokenizer.json"))
    template = (
        "{% if tools %}{% for t in tools %}{{ t.function.name }} {% endfor %}<tool_call>{% endif %}"
        "{% for m in messages %}{{ m.content }}"
        "{% for c in m.tool_calls or [] %}{{ c.function.arguments.zone }}{% endfor %}{% endfor %}"
    )
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>", "chat_template": template}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    found = Server("--tokenizer", str(tmp_path))
    try:
        assert chat(found, max_tokens=4)["finish_reason"] == "length"
        check(chat(found, tool_choice="required")["message"]["tool_calls"])
        with_tools, without = (
            found.http.post("/v1/chat/completions", json={"messages": ASKED, "max_tokens": 1, "tools": tools}).json()
            for tools in ([WEATHER], [])
        )
        assert with_tools["usage"]["prompt_tokens"] > without["usage"]["prompt_tokens"]
    finally:
        found.kill()
