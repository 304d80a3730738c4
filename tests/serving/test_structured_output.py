"""Outputs that have a form: asked for by every name there is for it, and what is refused."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable
from multiprocessing.connection import Connection
from typing import Any, Literal

import jsonschema
import msgspec
import pydantic
import pytest

from tests.event_loop import in_a_loop
from tests.serving.server import Server
from workbench.serving.bounded import run_worker
from workbench.serving.refusals import Refusal
from workbench.serving.structured import compiler
from workbench.serving.structured.formats import MAX_CHOICES, OutputFormat

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "n": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "n"],
    "additionalProperties": False,
}
GBNF = 'root ::= "x" [a-c]+ "y"'
LARK = 'start: "x" /[a-c]+/ "y"'


@pytest.fixture(scope="module")
def server():
    found = Server("--loop", "overlap")
    yield found
    found.kill()


def written(server: Server, path: str = "/v1/completions", **body: Any) -> str:
    """The text of an answer that came to its end by itself."""
    prompt = {"messages": [{"role": "user", "content": "go"}]} if "chat" in path else {"prompt": "go"}
    answer = server.http.post(path, json={**prompt, "max_tokens": 200, **body})
    assert answer.status_code == 200, answer.text
    (choice,) = answer.json()["choices"]
    assert choice["finish_reason"] == "stop"
    return choice["message"]["content"] if "chat" in path else choice["text"]


def response_format(schema: Any, **more: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "it", "schema": schema, **more}}


@pytest.mark.server
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize(
    "asked",
    [
        {"guided_json": SCHEMA},
        {"guided_json": json.dumps(SCHEMA)},
        {"json_schema": json.dumps(SCHEMA)},
        {"response_format": response_format(SCHEMA, strict=True, description="what it is")},
        {"structured_outputs": {"json": SCHEMA}},
    ],
    ids=lambda asked: next(iter(asked)),
)
def test_a_schema_holds_by_every_name_and_at_every_endpoint(server, path, asked):
    jsonschema.validate(json.loads(written(server, path, **asked)), SCHEMA)


@pytest.mark.server
@pytest.mark.parametrize(
    "asked, form",
    [
        ({"guided_regex": "[ab]{2,5}c"}, "[ab]{2,5}c"),
        ({"regex": "[ab]{2,5}c"}, "[ab]{2,5}c"),
        ({"structured_outputs": {"regex": "é{3}|日本"}}, "é{3}|日本"),
        ({"guided_choice": ["yes", 'a "quoted" one', "日本\n"]}, 'yes|a "quoted" one|日本\n'),
        ({"guided_grammar": LARK}, "x[a-c]+y"),
        ({"ebnf": GBNF}, "x[a-c]+y"),
        ({"guided_json": {"const": 5}, "guided_whitespace_pattern": ""}, "5"),
    ],
    ids=lambda asked: next(iter(asked)) if isinstance(asked, dict) else "",
)
def test_other_forms_hold(server, asked, form):
    for seed in range(3):
        assert re.fullmatch(form, written(server, seed=seed, **asked))


@pytest.mark.server
def test_as_many_choices_as_are_taken_hold_and_any_text_is_one(server):
    many = [str(number) for number in range(MAX_CHOICES)]
    assert {written(server, guided_choice=many, seed=seed) in many for seed in range(3)} == {True}
    for odd in ("\x7f", "\x85\u2028\x00", "\\n"):
        assert written(server, guided_choice=[odd]) == odd


@pytest.mark.server
def test_an_object_of_any_form_is_one(server):
    assert isinstance(
        json.loads(written(server, "/v1/chat/completions", response_format={"type": "json_object"})), dict
    )


@pytest.mark.server
def test_generate_takes_sglangs_names(server):
    for name, value, form in (("regex", "[ab]{3}", "[ab]{3}"), ("ebnf", GBNF, "x[a-c]+y"), ("json_schema", "{}", ".*")):
        params = {"max_new_tokens": 200, name: value}
        answer = server.http.post("/generate", json={"text": "go", "sampling_params": params}).json()
        assert re.fullmatch(form, answer["text"]), answer
        assert answer["meta_info"]["finish_reason"]["type"] == "stop"


class Step(pydantic.BaseModel):
    kind: Literal["think", "act"]
    size: int = pydantic.Field(ge=0, le=99)


class Plan(pydantic.BaseModel):
    steps: list[Step] = pydantic.Field(min_length=1, max_length=2)


@pytest.mark.server
def test_the_openai_client_parses_what_it_asked_for(server):
    messages = [{"role": "user", "content": "plan"}]
    answer = server.openai().chat.completions.parse(
        model="llama-3.1-8b", messages=messages, response_format=Plan, max_tokens=300
    )
    plan = answer.choices[0].message.parsed
    assert isinstance(plan, Plan) and 1 <= len(plan.steps) <= 2


@pytest.mark.server
@pytest.mark.parametrize(
    "path, asked, param, words",
    [
        ("", {"guided_json": {"type": "strng"}}, "guided_json", "guided_json.type: 'strng'"),
        (
            "",
            {"response_format": response_format({"properties": {"a": {"items": {"not": {}}}}})},
            "response_format.json_schema.schema",
            'response_format.json_schema.schema.properties.a.items: Unimplemented keys: ["not"]',
        ),
        ("", {"guided_json": "{"}, "guided_json", "is not JSON"),
        ("", {"guided_json": [1]}, "guided_json", "a JSON schema is an object"),
        ("", {"guided_json": {"$ref": "#/$defs/none"}}, "guided_json", "'/$defs/none' does not exist"),
        ("", {"guided_json": {"$ref": "https://example.org/x"}}, "guided_json", "does not fetch"),
        ("", {"guided_json": {"description": "x" * 300_000}}, "guided_json", "are more than 262144"),
        ("", {"guided_json": '{"const": NaN}'}, "guided_json", "is not JSON"),
        ("", {"guided_json": '{"const": "\\ud800"}'}, "guided_json", "is not JSON"),
        ("", {"guided_json": '{"const": 1e999}'}, "guided_json", "is not JSON"),
        ("", {"guided_json": {"$schema": 5}}, "guided_json", "guided_json.$schema: 5 is not of type"),
        ("", {"guided_json": {"$schema": ["x"]}}, "guided_json", "guided_json.$schema: ['x'] is not of type"),
        ("", {"guided_json": {"$ref": "#"}}, "guided_json", "nothing can be written by it"),
        ("", {"guided_json": {"const": 1 << 63}}, "guided_json", "guided_json.const: a number of more than 64 bits"),
        (
            "",
            {"guided_json": {"items": {"enum": [{"a": [1e30]}]}}},
            "guided_json",
            "guided_json.items.enum: a number of",
        ),
        (
            "",
            {"guided_json": {"type": "integer", "minimum": 10**30}},
            "guided_json",
            "guided_json.minimum: a number of",
        ),
        (
            "",
            {"guided_json": {"properties": {"default": {"exclusiveMinimum": 2, "maximum": 2.5}}}},
            "guided_json",
            "guided_json.properties.default.exclusiveMinimum: is not held",
        ),
        ("", {"guided_json": {"oneOf": [{"type": "integer"}, {"type": "number"}]}}, "guided_json", "anyOf takes them"),
        ("", {"guided_regex": "a?" * 2000}, "guided_regex", "too many expressions"),
        ("", {"guided_regex": "(a"}, "guided_regex", "unclosed group"),
        ("", {"guided_regex": r"[^\s\S]"}, "guided_regex", "nothing can be written by it"),
        ("", {"guided_regex": "a{1000000}"}, "guided_regex", "too many expressions"),
        ("", {"guided_regex": ""}, "guided_regex", "is empty"),
        ("", {"guided_regex": 5}, "guided_regex", "expected `str | null`"),
        ("", {"guided_choice": []}, "guided_choice", "is empty"),
        ("", {"guided_choice": ["a", ""]}, "guided_choice", "an empty text is no choice"),
        ("", {"guided_grammar": "start: nothing"}, "guided_grammar", 'unknown name: "nothing"'),
        ("", {"guided_grammar": "start: start"}, "guided_grammar", "nothing can be written by it"),
        ("", {"guided_grammar": 'start: "a" start'}, "guided_grammar", "Too many items"),
        ("", {"guided_whitespace_pattern": ""}, "guided_whitespace_pattern", "is for outputs in JSON"),
        (
            "",
            {"structured_outputs": {"regex": "a", "whitespace_pattern": ""}},
            "structured_outputs.whitespace_pattern",
            "is for outputs in JSON",
        ),
        ("", {"ebnf": "root ::= ["}, "ebnf", "no grammar in GBNF"),
        ("", {"guided_regex": "a", "guided_choice": ["b"]}, "guided_choice", "guided_regex asks for another"),
        ("", {"response_format": {"type": "xml"}}, "response_format.type", "'xml' is not one of"),
        ("", {"response_format": {"type": "json_schema"}}, "response_format.json_schema", "is required"),
        ("", {"structured_outputs": {}}, "structured_outputs", "give one of"),
        ("", {"guided_regex": "a", "min_tokens": 3}, "min_tokens", "does not go with guided_regex"),
        ("", {"guided_regex": "a", "ignore_eos": True}, "ignore_eos", "does not go with guided_regex"),
        ("/generate", {"regex": "(a"}, "sampling_params.regex", "unclosed group"),
    ],
)
def test_what_is_no_form_is_refused_and_where_it_is_wrong_is_said(server, path, asked, param, words):
    if path:
        body = {"text": "go", "sampling_params": asked}
    else:
        path, body = "/v1/chat/completions", {"messages": [{"role": "user", "content": "go"}], **asked}
    answer = server.http.post(path, json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param), error
    assert words in error["message"] and "\n" not in error["message"]


@pytest.mark.server
def test_many_streams_with_forms_and_without_some_given_up_leave_nothing_and_cross_nothing(server):
    before = server.metric("grammar_tokens_total")
    forms = [None, {"guided_json": SCHEMA}, {"guided_regex": "[ab]{5}"}, {"guided_choice": ["one", "three"]}]
    tool = {"type": "function", "function": {"name": "note", "parameters": SCHEMA}}

    async def call(client: Any, i: int) -> None:
        stream = await client.chat.completions.create(
            model="llama-3.1-8b",
            messages=[{"role": "user", "content": f"prompt {i}"}],
            tools=[tool],
            tool_choice="required" if i % 2 else {"type": "function", "function": {"name": "note"}},
            max_tokens=300,
            stream=True,
        )
        written: dict[int, str] = {}
        async for piece in stream:
            for delta in piece.choices[0].delta.tool_calls or ():
                written[delta.index] = written.get(delta.index, "") + delta.function.arguments
            if i % 7 == 0 and written:
                await stream.close()
                return
        assert written
        for arguments in written.values():
            jsonschema.validate(json.loads(arguments), SCHEMA)

    async def one(client: Any, i: int) -> None:
        if i % 5 == 4:
            await call(client, i)
            return
        form = forms[i % 4]
        stream = await client.completions.create(
            model="llama-3.1-8b", prompt=f"prompt {i}", max_tokens=120, stream=True, extra_body=form or {}
        )
        text = ""
        async for piece in stream:
            text += piece.choices[0].text
            if i % 6 == 0:
                await stream.close()
                return
        if form is None:
            assert len(text) == 120
        elif "guided_json" in form:
            jsonschema.validate(json.loads(text), SCHEMA)
        else:
            assert re.fullmatch(form.get("guided_regex", "one|three"), text)

    async def all_of_them() -> None:
        client = server.async_openai()
        await asyncio.gather(*(one(client, i) for i in range(200)))
        await client.close()

    in_a_loop(all_of_them())
    server.await_rest()
    assert server.metric("grammar_tokens_total") > before
    assert server.metric("grammar_seconds_total") > 0
    assert server.metric("grammars_compiled_total") > 0


@pytest.mark.server
@pytest.mark.parametrize("loop", ["normal", "pipeline"])
def test_forms_hold_in_the_other_loops(loop):
    found = Server("--loop", loop, *(["--pp", "2"] if loop == "pipeline" else []))
    try:
        jsonschema.validate(json.loads(written(found, guided_json=SCHEMA)), SCHEMA)
    finally:
        found.kill()


def too_slow(connection: Connection) -> None:
    """Run the checker of forms on forms that say how long they take: ``for ever``, or not at all."""

    def do(asked: OutputFormat) -> bytes:
        while asked.value == "for ever":
            pass
        return msgspec.msgpack.encode((f"grammar {asked.value}", "", ""))

    run_worker(connection, do, 1 << 30)


def regex(value: str) -> OutputFormat:
    return OutputFormat("regex", value, "regex")


def compiled(scenario: Callable[[compiler.GrammarCompiler], Awaitable[Any]]) -> Any:
    async def whole() -> Any:
        made = compiler.GrammarCompiler()
        try:
            return await scenario(made)
        finally:
            made.close()

    return in_a_loop(whole())


def test_a_form_that_takes_too_long_is_ended_and_others_are_compiled(monkeypatch):
    monkeypatch.setattr(compiler, "run_checker", too_slow)
    monkeypatch.setattr(compiler, "COMPILE_S", 0.2)

    async def ask(made: compiler.GrammarCompiler) -> Any:
        found = await asyncio.gather(*(made.grammar(regex("for ever")) for _ in range(4)), return_exceptions=True)
        return {str(refusal) for refusal in found}, await made.grammar(regex("quick"))

    said, grammar = compiled(ask)
    assert said == {"regex: takes more than 0.2 s to compile"} and grammar == "grammar quick"


def test_those_who_wait_too_long_for_their_turn_are_told_to_come_again(monkeypatch):
    monkeypatch.setattr(compiler, "run_checker", too_slow)
    monkeypatch.setattr(compiler, "COMPILE_S", 0.2)
    monkeypatch.setattr(compiler, "AT_ONCE", 1)
    monkeypatch.setattr(compiler, "TURN_S", 0.05)

    async def ask(made: compiler.GrammarCompiler) -> Refusal:
        working = asyncio.ensure_future(made.grammar(regex("for ever")))
        await asyncio.sleep(0)  # it has the turn
        with pytest.raises(Refusal) as caught:
            await made.grammar(regex("quick"))
        await asyncio.wait((working,))
        return caught.value

    refused = compiled(ask)
    assert (refused.kind, str(refused)) == ("overloaded", "overloaded: other forms are being compiled")


def test_a_form_that_many_ask_for_at_once_is_compiled_once(monkeypatch):
    monkeypatch.setattr(compiler, "run_checker", too_slow)

    async def ask(made: compiler.GrammarCompiler) -> tuple[set[str], int]:
        asked = [asyncio.ensure_future(made.grammar(regex("same"))) for _ in range(50)]
        await asyncio.sleep(0)
        waiting = made.compiling
        asked[0].cancel()
        return set(await asyncio.gather(*asked[1:])), waiting

    assert compiled(ask) == ({"grammar same"}, 1)


@pytest.mark.server
@pytest.mark.parametrize(
    "asked",
    [
        {"guided_grammar": "start: a0\n" + "".join(f"a{i}: a{i + 1}\n" for i in range(9000)) + 'a9000: "x"'},
        {"guided_grammar": "start: A0\n" + "".join(f'A{i}: A{i + 1} "y"\n' for i in range(9000)) + 'A9000: "x"'},
        {"guided_regex": "a?" * 100_000},
        {"guided_json": {"$ref": "#/$defs/0", "$defs": {str(i): {"$ref": f"#/$defs/{i + 1}"} for i in range(5000)}}},
    ],
    ids=["rules", "terminals", "regex", "references"],
)
def test_what_would_take_all_stack_or_memory_is_refused_and_the_server_goes_on(server, asked):
    answer = server.http.post("/v1/completions", json={"prompt": "go", **asked})
    (name,) = asked
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, name) and len(error["message"]) < 400, error
    assert written(server, guided_regex="ab") == "ab"


@pytest.mark.server
def test_a_form_as_deep_as_any_that_is_taken_is_followed(server):
    deep = "start: a0\n" + "".join(f'a{i}: "y" a{i + 1} | "x"\n' for i in range(1200)) + 'a1200: "x"'
    answer = server.http.post("/v1/completions", json={"prompt": "go", "guided_grammar": deep, "n": 3, "max_tokens": 9})
    assert [re.fullmatch("y*x?", choice["text"]) is not None for choice in answer.json()["choices"]] == [True] * 3
