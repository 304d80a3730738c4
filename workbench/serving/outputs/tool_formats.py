"""How models write calls of tools, each family in its own way."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from workbench.serving.outputs.reader import Reader, Reading, call_object

AUTO, NONE = "auto", "none"
"""Beside the formats, what ``--tool-parser`` may be: as the chat template shows, and none."""
Parser = Callable[[Reader, Collection[str]], Reading]
"""Parts of a reader's text; the names are those of the tools."""


@dataclass(frozen=True)
class ToolFormat:
    """One way to write calls."""

    parser: Parser
    marks: tuple[str, ...]
    """A chat template of models that write so has any of these in it."""
    id_characters: int = 24
    """Of the ids of calls: some templates refuse others."""
    special: bool = True
    """Its marks are special tokens, which text usually goes without."""


def hermes(reader: Reader, names: Collection[str]) -> Reading:
    """``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``, any number of them between text: Hermes, Qwen."""
    begin, end = "<tool_call>", "</tool_call>"
    while (yield from reader.until(begin, to=reader.content)):
        before = begin + (yield from reader.space())
        if reader.text[:1] != "{":
            reader.content(before)
            continue
        while reader.text[:1] == "{":
            no_call = yield from call_object(reader, ("arguments", "parameters"))
            if no_call is not None:
                reader.content(before + no_call)
                break
            before = yield from reader.space()
        else:
            rest: list[str] = []
            mark = yield from reader.until(end, begin, to=rest.append)
            if mark == end:  # a brace too many, say, is part of nothing
                yield from _space_before(reader, begin)
            else:
                reader.content(before + "".join(rest))
                reader.text = mark + reader.text


def llama3(reader: Reader, names: Collection[str]) -> Reading:
    """``{"name": ..., "parameters": {...}}``, several of them with ``;`` between, all of the answer, after
    ``<|python_tag|>`` or not: Llama 3."""
    before = yield from reader.space()
    while True:
        if (yield from reader.begins_with("<|python_tag|>")):
            reader.take(len("<|python_tag|>"))
            before += yield from reader.space()
        if reader.text[:1] != "{":
            break
        no_call = yield from call_object(reader, ("parameters", "arguments"), names.__contains__)
        if no_call is not None:
            reader.content(before + no_call)
            before = ""
            break
        before = yield from reader.space()
        if reader.text[:1] in (";", ","):
            before += reader.take(1)
            before += yield from reader.space()
    if reader.text or not reader.calls:
        reader.content(before)
    yield from reader.until("<|python_tag|>", to=reader.content)


def mistral(reader: Reader, names: Collection[str]) -> Reading:
    """``[TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]``, or since version 11 of its tokenizer
    ``[TOOL_CALLS]NAME[ARGS]{...}`` for each: Mistral."""
    begin = "[TOOL_CALLS]"
    while (yield from reader.until(begin, to=reader.content)):
        before = begin + (yield from reader.space())
        if reader.text[:1] in ("[", "{"):
            yield from _mistral_list(reader, before)
            continue
        if reader.closed and not reader.text:
            continue
        head: list[str] = []
        found = yield from reader.until("[ARGS]", "{", to=head.append)
        name = "".join(head).partition("[CALL_ID]")[0].strip()
        if not found or not name:
            reader.content(before + "".join(head) + found)
            continue
        if found == "{":
            reader.text = "{" + reader.text
        reader.begin(name)
        yield from reader.space()
        yield from reader.value(reader.arguments)


def _mistral_list(reader: Reader, before: str) -> Reading:
    """Read the calls of a list, or one that is in none."""
    if reader.text[:1] == "[":
        before += reader.take(1)
    while True:
        before += yield from reader.space()
        if reader.text[:1] == "{":
            no_call = yield from call_object(reader, ("arguments", "parameters"))
            if no_call is not None:
                reader.content(before + no_call)
                return
            before = ""
        elif reader.text[:1] == ",":
            reader.take(1)
        else:
            if reader.text[:1] == "]":
                reader.take(1)
            else:
                reader.content(before)
            return


def deepseek(reader: Reader, names: Collection[str]) -> Reading:
    """``<｜tool▁call▁begin｜>NAME<｜tool▁sep｜>{...}<｜tool▁call▁end｜>`` since V3.1, before it with a type first and the
    arguments fenced: DeepSeek."""
    begin, end, last = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>"
    while (yield from reader.until("<｜tool▁calls▁begin｜>", to=reader.content)):
        while True:
            between: list[str] = []
            mark = yield from reader.until(begin, last, to=between.append)
            if "".join(between).strip():
                reader.content("".join(between))
            if mark != begin:
                break
            head: list[str] = []
            mark = yield from reader.until("<｜tool▁sep｜>", end, last, to=head.append)
            if mark != "<｜tool▁sep｜>":
                reader.content(begin + "".join(head) + mark)
                continue
            yield from _deepseek_call(reader, "".join(head).strip(), (end, begin, last))


def _deepseek_call(reader: Reader, first: str, ends: tuple[str, ...]) -> Reading:
    """Read a call after its first words, which are its name or, before V3.1, the type of it."""
    yield from reader.space()
    name = first
    if not (yield from reader.begins_with("{", "```", *ends)):
        named: list[str] = []
        mark = yield from reader.until("\n", "{", "```", *ends, to=named.append)
        reader.text = mark.strip() + reader.text
        name = "".join(named).strip() or first
        yield from reader.space()
    if (yield from reader.begins_with("```")):
        reader.take(3)
        if (yield from reader.begins_with("json")):
            reader.take(len("json"))
        yield from reader.space()
    reader.begin(name)
    if reader.text[:1] == "{":
        yield from reader.value(reader.arguments)
    elif reader.text:
        reader.arguments("{}")
    mark = yield from reader.until(*ends, to=_nothing)
    if mark != ends[0]:
        reader.text = mark + reader.text


def harmony(reader: Reader, names: Collection[str]) -> Reading:
    """Messages with channels: ``analysis`` is reasoning, ``commentary to=functions.NAME`` a call, all else content:
    gpt-oss."""
    while True:
        head: list[str] = []
        mark = yield from reader.until("<|message|>", to=head.append)
        if not mark:
            # An answer under a grammar has no channels.
            reader.content("" if "<|channel|>" in "".join(head) else "".join(head))
            return
        header = "".join(head)
        channel = header.partition("<|channel|>")[2].strip()
        called = header.partition("to=functions.")[2].partition("<")[0].split()
        if called:
            reader.begin(called[0])
            to = reader.arguments
        elif channel.startswith("analysis"):
            to = reader.reasoning
        else:
            to = reader.content
        if not (yield from reader.until("<|end|>", "<|call|>", "<|return|>", to=to)):
            return


def one_call(name: str) -> Parser:
    """Arguments of this tool, and nothing else: what the grammar of a named call lets a model write."""

    def parse(reader: Reader, names: Collection[str]) -> Reading:
        reader.begin(name)
        yield from reader.until("\0", to=reader.arguments)

    return parse


def listed_calls(reader: Reader, names: Collection[str]) -> Reading:
    """``[{"name": ..., "arguments": {...}}, ...]``: what the grammar of required calls lets a model write."""
    while True:
        yield from reader.space()
        if not reader.text:
            return
        if reader.text[:1] != "{":
            reader.take(1)
        elif (yield from call_object(reader, ("arguments",))) is not None:
            return


def no_tools(reader: Reader, names: Collection[str]) -> Reading:
    """Text."""
    while True:
        reader.content(reader.take(len(reader.text)))
        if reader.closed:
            return
        yield


def _nothing(text: str) -> None:
    """Leave text out."""


def _space_before(reader: Reader, marker: str) -> Reading:
    """Leave white space out if a marker or the end follows it."""
    space = yield from reader.space()
    if reader.text and not (yield from reader.begins_with(marker)):
        reader.content(space)


FORMATS: dict[str, ToolFormat] = {
    "hermes": ToolFormat(hermes, ("<tool_call>",), special=False),
    "qwen": ToolFormat(hermes, (), special=False),
    "llama3": ToolFormat(llama3, ("<|python_tag|>", '"parameters": dictionary of argument')),
    "mistral": ToolFormat(mistral, ("[TOOL_CALLS]",), id_characters=9),
    "deepseek": ToolFormat(deepseek, ("<｜tool▁calls▁begin｜>",)),
    "gpt-oss": ToolFormat(harmony, ("<|channel|>",)),
}
"""By the names that ``--tool-parser`` has for them."""


def format_of_template(template: str | None) -> str | None:
    """Return the name of the format in which a chat template writes calls; None where it shows none."""
    for name, found in FORMATS.items():
        if template is not None and any(mark in template for mark in found.marks):
            return name
    return None
