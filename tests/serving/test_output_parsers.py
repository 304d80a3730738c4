"""Content, reasoning and calls of tools told apart, however the text is cut."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.serving.outputs.parser import OutputParser
from workbench.serving.outputs.pieces import Arguments, CallBegun, Content, Reasoning
from workbench.serving.outputs.reasoning import REASONING, thinking
from workbench.serving.outputs.tool_formats import FORMATS, format_of_template, listed_calls, no_tools, one_call
from workbench.serving.outputs.tools import Tool, ToolUse
from workbench.serving.outputs.writing import Writing

NAMES = {"weather", "search"}
ARGS = '{"city": "Köln \\"}] 🙂", "n": [1, {"a": null}]}'
CALL = [("weather", ARGS)]
TWO = [("weather", ARGS), ("search", "{}")]
CASES = {
    "hermes-two": (
        "hermes",
        f'Well.\n<tool_call>\n{{"name": "weather", "arguments": {ARGS}}}\n</tool_call>\n<tool_call>'
        '{"name": "search", "arguments": {}}</tool_call>',
        "Well.\n",
        "",
        TWO,
    ),
    "hermes-late-name": ("hermes", f'<tool_call>{{"arguments": {ARGS}, "name": "weather"}}</tool_call>', "", "", CALL),
    "hermes-no-arguments": ("hermes", '<tool_call>{"name": "search"}</tool_call>', "", "", [("search", "{}")]),
    "hermes-text": ("hermes", "a < b <tool> and <tool_call> here", "a < b <tool> and <tool_call> here", "", []),
    "hermes-no-call": ("hermes", '<tool_call>{"x": 1}</tool_call>', '<tool_call>{"x": 1}</tool_call>', "", []),
    "llama3": ("llama3", f'{{"name": "weather", "parameters": {ARGS}}}', "", "", CALL),
    "llama3-tag": (
        "llama3",
        f'<|python_tag|>{{"name": "weather", "parameters": {ARGS}}}; {{"name": "search", "parameters": {{}}}}',
        "",
        "",
        TWO,
    ),
    "llama3-json": ("llama3", '{"name": "Ada", "age": 3}', '{"name": "Ada", "age": 3}', "", []),
    "llama3-text": ("llama3", "It is {fine}.", "It is {fine}.", "", []),
    "mistral": (
        "mistral",
        f'[TOOL_CALLS][{{"name": "weather", "arguments": {ARGS}}}, {{"name": "search", "arguments": {{}}}}]',
        "",
        "",
        TWO,
    ),
    "mistral-v11": ("mistral", f"Hm.[TOOL_CALLS]weather[ARGS]{ARGS}[TOOL_CALLS]search[ARGS]{{}}", "Hm.", "", TWO),
    "mistral-id": ("mistral", f"[TOOL_CALLS]weather[CALL_ID]abc[ARGS]{ARGS}", "", "", CALL),
    "mistral-plain": ("mistral", f"[TOOL_CALLS]weather{ARGS}", "", "", CALL),
    "deepseek": (
        "deepseek",
        "Ok<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n"
        + ARGS
        + "\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>search\n```json\n{}\n```<｜tool▁call▁end｜>"
        "<｜tool▁calls▁end｜>",
        "Ok",
        "",
        TWO,
    ),
    "deepseek-v3.1": (
        "deepseek",
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>"
        + ARGS
        + "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        "",
        "",
        CALL,
    ),
    "hermes-no-end": (
        "hermes",
        f'<tool_call>{{"name": "weather", "arguments": {ARGS}}}<tool_call>{{"name": "search", "arguments": {{}}}} so.',
        " so.",
        "",
        TWO,
    ),
    "hermes-two-in-one": (
        "hermes",
        f'<tool_call>{{"name": "weather", "arguments": {ARGS}}}\n{{"name": "search"}}}}</tool_call>so.',
        "so.",
        "",
        TWO,
    ),
    "hermes-null": (
        "hermes",
        '<tool_call>{"name": "search", "arguments": null}</tool_call>',
        "",
        "",
        [("search", "{}")],
    ),
    "llama3-comma": (
        "llama3",
        f'{{"name": "weather", "parameters": {ARGS}}}, {{"name": "search", "parameters": {{}}}}',
        "",
        "",
        TWO,
    ),
    "llama3-tags": (
        "llama3",
        f'<|python_tag|>{{"name": "weather", "parameters": {ARGS}}}<|python_tag|>{{"name": "search"}}',
        "",
        "",
        TWO,
    ),
    "llama3-rest": ("llama3", f'{{"name": "weather", "parameters": {ARGS}}}, {{it', ", {it", "", CALL),
    "mistral-object": ("mistral", f'[TOOL_CALLS]{{"name": "weather", "arguments": {ARGS}}}', "", "", CALL),
    "mistral-no-call": ("mistral", '[TOOL_CALLS][{"x": 1}]', '[TOOL_CALLS][{"x": 1}]', "", []),
    "mistral-no-name": ("mistral", "[TOOL_CALLS] [ARGS]{}", "[TOOL_CALLS] [ARGS]{}", "", []),
    "deepseek-no-end": (
        "deepseek",
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>"
        + ARGS
        + "<｜tool▁call▁begin｜>search<｜tool▁sep｜><｜tool▁calls▁end｜>so.",
        "so.",
        "",
        TWO,
    ),
    "deepseek-again": (
        "deepseek",
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>```json\n"
        + ARGS
        + "\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>so.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>search<｜tool▁sep｜>{}",
        "so.",
        "",
        TWO,
    ),
    "deepseek-no-call": (
        "deepseek",
        "<｜tool▁calls▁begin｜>no.<｜tool▁call▁begin｜>weath",
        "no.<｜tool▁call▁begin｜>weath",
        "",
        [],
    ),
    "gpt-oss": (
        "gpt-oss",
        "<|channel|>analysis<|message|>think<|end|><|start|>assistant<|channel|>commentary to=functions.weather "
        "<|constrain|>json<|message|>" + ARGS,
        "",
        "think",
        CALL,
    ),
    "gpt-oss-recipient": (
        "gpt-oss",
        " to=functions.weather<|channel|>commentary json<|message|>" + ARGS + "<|call|>",
        "",
        "",
        CALL,
    ),
    "gpt-oss-final": (
        "gpt-oss",
        "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>b",
        "b",
        "a",
        [],
    ),
}


def parts(parser: OutputParser, pieces: list[str]):
    """(content, reasoning, calls) of text that comes so."""
    found = [part for piece in pieces for part in parser.push(piece)] + parser.finish()
    calls: list[list[str]] = []
    content = reasoning = ""
    for part in found:
        match part:
            case Content(text):
                content += text
            case Reasoning(text):
                reasoning += text
            case CallBegun(index, name):
                assert index == len(calls)
                calls.append([name, ""])
            case Arguments(index, text):
                assert text
                calls[index][1] += text
    assert parser.calls == len(calls)
    return content, reasoning, [tuple(call) for call in calls]


def cut(text: str, at: list[int]) -> list[str]:
    places = sorted({0, len(text), *(place % (len(text) + 1) for place in at)})
    return [text[a:b] for a, b in pairwise(places)]


@pytest.mark.parametrize("case", CASES)
@settings(max_examples=40, derandomize=True, deadline=None)
@given(at=st.lists(st.integers(0, 10_000), max_size=30))
def test_calls_are_found_wherever_the_text_is_cut(case, at):
    form, text, content, reasoning, calls = CASES[case]
    whole = parts(OutputParser(FORMATS[form].parser, NAMES), [text])
    assert whole == (content, reasoning, calls)
    assert parts(OutputParser(FORMATS[form].parser, NAMES), list(text)) == whole
    assert parts(OutputParser(FORMATS[form].parser, NAMES), cut(text, at)) == whole


MARKS = {
    "hermes": ["<tool_call>", "</tool_call>"],
    "llama3": ["<|python_tag|>", ";"],
    "mistral": ["[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "[", "]", "weather"],
    "deepseek": [
        *(
            "<｜tool▁calls▁begin｜>",
            "<｜tool▁call▁begin｜>",
            "<｜tool▁sep｜>",
            "<｜tool▁call▁end｜>",
            "<｜tool▁calls▁end｜>",
        ),
        *("function", "weather", "```json\n", "\n```", "```"),
    ],
    "gpt-oss": [
        *("<|channel|>", "<|message|>", "<|end|>", "<|call|>", "<|start|>assistant", "analysis", "commentary", "final"),
        " to=functions.weather",
    ],
}
BITS = [
    *('{"name": "weather", "arguments": {"a": 1}}', '{"name": "x", "parameters": {}}', '{"name": "weather"}'),
    *(
        '{"arguments": {"x": "}"}, "name": "search"}',
        '{"name": "weather", "arguments": "{}"}',
        '{"name": "weather", "a',
    ),
    *("{", "}", " ", "\n", "text", '"', "\\", '{"a": ["é🙂"]}', ",", ":", "<", "[", "<think>", "</think>"),
]


@pytest.mark.parametrize("form", MARKS)
@settings(max_examples=300, derandomize=True, deadline=None)
@given(data=st.data())
def test_whatever_a_model_writes_is_read_the_same_wherever_it_is_cut(form, data):
    text = "".join(data.draw(st.lists(st.sampled_from(MARKS[form] * 2 + BITS), max_size=8)))
    at = data.draw(st.lists(st.integers(0, 10_000), max_size=8))
    parser = FORMATS[form].parser
    if data.draw(st.booleans()):
        parser = thinking(REASONING["qwen3"], False, parser)
    whole = parts(OutputParser(parser, NAMES), [text])
    assert parts(OutputParser(parser, NAMES), list(text)) == whole
    assert parts(OutputParser(parser, NAMES), cut(text, at)) == whole
    assert all(name and "｜" not in name and "`" not in name for name, _ in whole[2])


@pytest.mark.parametrize("form", ["hermes", "llama3", "mistral", "deepseek"])
def test_arguments_go_on_as_they_come_and_a_cut_call_keeps_what_it_has(form):
    _, text, _, _, _ = CASES[form if form in CASES else f"{form}-two"]
    text = text[: text.index('"n"')]
    parser = OutputParser(FORMATS[form].parser, NAMES)
    early = [part for character in text for part in parser.push(character)]
    assert any(isinstance(part, CallBegun) for part in early)
    told = "".join(part.text for part in early if isinstance(part, Arguments))
    assert ARGS.startswith(told) and len(told) > 20
    assert not any(isinstance(part, Content) for part in parser.finish())


@pytest.mark.parametrize("name", ['"\\ud800"', "[" * 60_000 + "]" * 60_000, "5", "null"])
@pytest.mark.parametrize("form", ["hermes", "llama3", "mistral"])
def test_what_names_no_tool_as_text_is_content(form, name):
    begin = {"hermes": "<tool_call>", "llama3": "", "mistral": "[TOOL_CALLS]["}[form]
    text = f'{{"name": {name}, "arguments": {{}}}}'
    content, _, calls = parts(OutputParser(FORMATS[form].parser, NAMES), [begin + text])
    assert text in content and calls == []


def test_a_message_of_harmony_to_no_function_is_content():
    text = "<|channel|>commentary to=functions.<|message|>{}<|call|>"
    assert parts(OutputParser(FORMATS["gpt-oss"].parser, NAMES), list(text)) == ("{}", "", [])


@pytest.mark.parametrize("wanted", [True, False])
def test_reasoning_that_is_not_to_be_apart_is_content_beside_calls_too(wanted):
    tool = Tool("weather", {}, {}, "tools[0].function")
    use = ToolUse((tool,), "auto")
    parser = Writing.of("gpt-oss", "gpt-oss", None).reads(use, wanted, False).parser_for(use, "")
    text = CASES["gpt-oss"][1]
    assert parts(parser, list(text)) == (("", "think", CALL) if wanted else ("think", "", CALL))


@pytest.mark.parametrize("name", ["deepseek-r1", "qwen3", "mistral"])
@settings(max_examples=30, derandomize=True, deadline=None)
@given(at=st.lists(st.integers(0, 10_000), max_size=20))
def test_reasoning_is_apart_with_its_first_mark_in_the_answer_or_in_the_prompt(name, at):
    form = REASONING[name]
    text = f"\nwhy {form.begin[:3]} not\n{form.end}\n\nbecause"
    for answer, prompt in ((form.begin + text, "user: hi"), (text, f"user: hi\n{form.begin}\n")):
        parser = OutputParser(thinking(form, form.begun(prompt), no_tools))
        assert parts(parser, cut(answer, at)) == ("because", f"why {form.begin[:3]} not", [])


def test_an_answer_that_does_not_think_is_content():
    form = REASONING["qwen3"]
    assert not form.begun("x<think>\n\n</think>\n\n")
    assert parts(OutputParser(thinking(form, False, no_tools)), [" pl", "ain"]) == (" plain", "", [])
    assumed = REASONING["deepseek-r1"]
    assert assumed.begun("x") and not assumed.begun("x<think>\n\n</think>\n\n")
    assert parts(OutputParser(thinking(assumed, True, no_tools)), ["a", "b</think>c"]) == ("c", "ab", [])


def test_calls_after_reasoning_are_calls():
    form = REASONING["qwen3"]
    text = f'<think>hm</think>\n<tool_call>{{"name": "weather", "arguments": {ARGS}}}</tool_call>'
    assert parts(OutputParser(thinking(form, False, FORMATS["hermes"].parser), NAMES), list(text)) == ("", "hm", CALL)


def test_what_a_grammar_forces_is_a_call_or_a_list_of_them():
    assert parts(OutputParser(one_call("weather")), list(ARGS)) == ("", "", CALL)
    text = json.dumps([{"name": name, "arguments": json.loads(args)} for name, args in TWO], ensure_ascii=False)
    content, _, calls = parts(OutputParser(listed_calls), list(text))
    assert (content, [(name, json.loads(args)) for name, args in calls]) == ("", [(n, json.loads(a)) for n, a in TWO])


def test_the_template_tells_the_format():
    assert format_of_template("{% for t in tools %}<tool_call>") == "hermes"
    assert format_of_template("... [TOOL_CALLS] ...") == "mistral"
    assert format_of_template("<｜tool▁calls▁begin｜>") == "deepseek"
    assert format_of_template("{{ messages }}") is None and format_of_template(None) is None
