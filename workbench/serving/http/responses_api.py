"""/v1/responses: what a request says, as a chat, and its answer as items and events."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Iterator
from typing import Any, ClassVar

import msgspec

from workbench.serving.chunks import Chunk
from workbench.serving.http.chats import call_for_template, message_for_template, plain_text, tool_use
from workbench.serving.http.openai_api import Shape, call_id, encode_json
from workbench.serving.http.output_format import ResponseFormat, output_format_of
from workbench.serving.open_request import OpenRequest
from workbench.serving.outputs.parser import OutputParser
from workbench.serving.outputs.pieces import CallBegun, Content, Part, Reasoning
from workbench.serving.outputs.tools import ToolUse
from workbench.serving.refusals import bad_value
from workbench.serving.sampling_params import Sampling
from workbench.serving.structured.formats import OutputFormat


class ResponsesRequest(Sampling, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/responses."""

    where: ClassVar[str] = "responses"
    parts: ClassVar[dict[str, Any]] = {}
    input: Any
    model: str | None = None
    instructions: str | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    text: dict[str, Any] | None = None
    max_output_tokens: int | None = None
    stream: bool | None = None
    metadata: dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    priority: int | None = None
    request_id: str | None = None
    session_id: str | None = None
    cache_salt: str | None = None
    slo_ttft_s: float | None = None
    slo_tpot_s: float | None = None


def conversation(asked: ResponsesRequest) -> list[dict[str, Any]]:
    """Return instructions and input as messages for a chat template. Raises Refusal."""
    found: list[dict[str, Any]] = [{"role": "system", "content": asked.instructions}] if asked.instructions else []
    if isinstance(asked.input, str):
        return [*found, {"role": "user", "content": asked.input}]
    if not isinstance(asked.input, list) or not asked.input:
        raise bad_value("input", "must be text, or a list of items that is not empty", "invalid_type")
    thoughts = ""
    for i, item in enumerate(asked.input):
        where = f"input[{i}]"
        if not isinstance(item, dict):
            raise bad_value(where, "must be an object", "invalid_type")
        kind = item.get("type", "message")
        if kind == "reasoning":
            thoughts = _thoughts(item, where)
            continue
        message = _message(item, kind, where)
        if message["role"] == "assistant" and thoughts:
            message["reasoning_content"] = thoughts
        thoughts = ""
        last = found[-1] if found else {}
        if kind == "function_call" and last.get("role") == "assistant":
            # The calls of one answer, and what it said before them, are one message.
            last["tool_calls"] = [*last.get("tool_calls", ()), *message["tool_calls"]]
        else:
            found.append(message)
    return found


def _message(item: dict[str, Any], kind: Any, where: str) -> dict[str, Any]:
    if kind == "message":
        given = {name: value for name, value in item.items() if name not in ("type", "id", "status", "phase")}
        if isinstance(given.get("content"), list):
            given["content"] = [_text_part(part) for part in given["content"]]
        return message_for_template(given, where)
    if kind == "function_call":
        function = {"name": item.get("name"), "arguments": item.get("arguments", "{}")}
        call = call_for_template(item.get("call_id"), function, f"{where}.call_id", where)
        return {"role": "assistant", "content": "", "tool_calls": [call]}
    if kind == "function_call_output":
        output = item.get("output")
        content = [_text_part(part) for part in output] if isinstance(output, list) else output
        given = {"role": "tool", "tool_call_id": item.get("call_id"), "content": plain_text(content, f"{where}.output")}
        if not isinstance(given["tool_call_id"], str):
            raise bad_value(f"{where}.call_id", "must be text", "invalid_type")
        return given
    raise bad_value(f"{where}.type", f"{kind!r} is not supported by this server", "unsupported_parameter")


def _thoughts(item: dict[str, Any], where: str) -> str:
    """Return the text of a reasoning item, of which clients send what they were sent: its content, or a summary of it."""
    name = "content" if item.get("content") else "summary"
    parts = item.get(name) or []
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        raise bad_value(f"{where}.{name}", "must be a list of parts with text", "invalid_type")
    texts = [part.get("text", "") for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise bad_value(f"{where}.{name}", "must be a list of parts with text", "invalid_type")
    return "\n".join(texts)


def _text_part(part: Any) -> Any:
    if isinstance(part, dict) and part.get("type") in ("input_text", "output_text"):
        return {"type": "text", "text": part.get("text")}
    return part


def tools_of(asked: ResponsesRequest) -> ToolUse | None:
    """Return what a request says of tools, whose functions lie flat. Raises Refusal."""
    tools = None
    if asked.tools:
        tools = []
        for i, tool in enumerate(asked.tools):
            if not isinstance(tool, dict) or tool.get("type") != "function":
                said = tool.get("type") if isinstance(tool, dict) else tool
                raise bad_value(f"tools[{i}]", f"{said!r} is no function, and this server has no tools of its own")
            function = {name: value for name, value in tool.items() if name != "type" and value is not None}
            tools.append({"type": "function", "function": function})
    return tool_use(tools, asked.tool_choice, asked.parallel_tool_calls, inside="")


def form_of(asked: ResponsesRequest) -> OutputFormat | None:
    """Return the form that ``text`` asks for, None for any. Raises Refusal."""
    given = asked.text or {}
    for name in given:
        if name not in ("format", "verbosity"):
            raise bad_value(f"text.{name}", "unknown field", "unknown_parameter")
    if given.get("verbosity") not in (None, "medium"):
        raise bad_value("text.verbosity", "not supported by this server", "unsupported_parameter")
    form = given.get("format")
    if form is None:
        return None
    if not isinstance(form, dict) or not isinstance(form.get("type"), str):
        raise bad_value("text.format", "must be an object with a type", "invalid_type")
    kind = form["type"]
    rest = {name: value for name, value in form.items() if name != "type"}
    made = {"type": kind, "json_schema": rest} if kind == "json_schema" else form
    try:
        found = msgspec.convert(made, ResponseFormat)
    except msgspec.ValidationError as error:
        raise bad_value("text.format", str(error), "invalid_type") from error
    forms = output_format_of(found, "text.format", "text.format.schema")
    return forms[0] if forms else None


class ResponseShape(Shape):
    """One response: its items grow with what comes, and each change is an event."""

    def __init__(
        self,
        request: OpenRequest,
        model: str,
        asked: ResponsesRequest,
        parser: OutputParser | None,
        id_characters: int,
        sampling: dict[str, Any],
    ) -> None:
        """``sampling``: ``temperature``, ``top_p`` and ``max_output_tokens``, as they are."""
        super().__init__(request, model)
        self._asked, self._parser, self._id_characters, self._sampling = asked, parser, id_characters, sampling
        self._items: list[dict[str, Any]] = []
        self._events = 0
        self._reasoning_tokens = 0
        self._thinking = False

    async def whole(self) -> bytes:
        """Return the response in one piece."""
        end: Chunk | None = None
        async for _, chunk in self.events():
            for _ in self._grow(chunk):
                pass
            end = chunk
        return encode_json(self._response(end))

    async def stream(self) -> AsyncIterator[bytes]:
        """Yield server-sent events."""
        begun = False
        async for _, chunk in self.events():
            if not begun:
                begun = True
                for kind in ("response.created", "response.in_progress"):
                    yield self._event(kind, response=self._response(None))
            for kind, fields in self._grow(chunk):
                yield self._event(kind, **fields)
            if chunk.kind:
                response = self._response(chunk)
                yield self._event(f"response.{response['status']}", response=response)

    def _event(self, kind: str, **fields: Any) -> bytes:
        made = {"type": kind, "sequence_number": self._events, **fields}
        self._events += 1
        return b"event: " + kind.encode() + b"\ndata: " + encode_json(made) + b"\n\n"

    # -- items -------------------------------------------------------------------------------------------------------

    def _grow(self, chunk: Chunk) -> Iterator[tuple[str, dict[str, Any]]]:
        """Take in what is new; yield what that changes, as kinds and fields of events."""
        if self._parser is None:
            parts: list[Part] = [Content(chunk.text)] if chunk.text else []
        else:
            parts = self._parser.push(chunk.text) + (self._parser.finish() if chunk.kind else [])
        if parts:
            self._thinking = isinstance(parts[0], Reasoning)
        self._reasoning_tokens += len(chunk.token_ids) if self._thinking else 0
        for part in parts:
            if isinstance(part, CallBegun):
                yield from self._close("completed")
                made = {
                    "type": "function_call",
                    "call_id": call_id(self._id_characters),
                    "name": part.name,
                    "arguments": "",
                }
                yield self._open("fc", made)
            elif isinstance(part, Content | Reasoning):
                yield from self._add_text(part)
            else:
                self._items[-1]["arguments"] += part.text
                yield "response.function_call_arguments.delta", {**self._at(), "delta": part.text}
        if chunk.kind:
            yield from self._close("completed" if chunk.kind == "stop" else "incomplete")

    def _add_text(self, part: Content | Reasoning) -> Iterator[tuple[str, dict[str, Any]]]:
        kind, name = ("message", "output_text") if isinstance(part, Content) else ("reasoning", "reasoning_text")
        if not self._items or self._items[-1]["type"] != kind or self._items[-1]["status"] != "in_progress":
            if kind == "message" and not part.text.strip() and self._items:
                return  # white space between calls
            yield from self._close("completed")
            head: dict[str, Any] = {"role": "assistant"} if kind == "message" else {"summary": []}
            yield self._open("msg" if kind == "message" else "rs", {"type": kind, **head, "content": []})
            more: dict[str, Any] = {"annotations": [], "logprobs": []} if kind == "message" else {}
            self._items[-1]["content"].append({"type": name, "text": "", **more})
            yield "response.content_part.added", {**self._in_part(), "part": dict(self._items[-1]["content"][0])}
        self._items[-1]["content"][0]["text"] += part.text
        yield f"response.{name}.delta", {**self._in_part(), "delta": part.text, **_logprobs(name)}

    def _open(self, prefix: str, item: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        self._items.append({"id": f"{prefix}_{uuid.uuid4().hex}", **item, "status": "in_progress"})
        return "response.output_item.added", {"output_index": len(self._items) - 1, "item": _copied(self._items[-1])}

    def _close(self, status: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """End the item that is open, if one is."""
        if not self._items or self._items[-1]["status"] != "in_progress":
            return
        item = self._items[-1]
        item["status"] = status
        if item["type"] == "function_call":
            done = {"name": item["name"], "arguments": item["arguments"]}
            yield "response.function_call_arguments.done", {**self._at(), **done}
        else:
            part = item["content"][0]
            name = part["type"]
            yield f"response.{name}.done", {**self._in_part(), "text": part["text"], **_logprobs(name)}
            yield "response.content_part.done", {**self._in_part(), "part": dict(part)}
        yield "response.output_item.done", {"output_index": len(self._items) - 1, "item": _copied(item)}

    def _at(self) -> dict[str, Any]:
        return {"item_id": self._items[-1]["id"], "output_index": len(self._items) - 1}

    def _in_part(self) -> dict[str, Any]:
        return {**self._at(), "content_index": 0}

    def _response(self, end: Chunk | None) -> dict[str, Any]:
        """Return the response as it stands; ``end`` is its last chunk, None while it goes on."""
        asked = self._asked
        status, why = "in_progress", None
        if end is not None:
            status = "completed" if end.kind == "stop" else "incomplete"
            why = None if end.kind == "stop" else {"reason": "max_output_tokens" if end.kind == "length" else end.kind}
        return {
            "id": self.request.id,
            "object": "response",
            "created_at": self.request.created_s,
            "status": status,
            "error": None,
            "incomplete_details": why,
            "instructions": asked.instructions,
            "model": self.model,
            "output": [_copied(item) for item in self._items],
            "parallel_tool_calls": asked.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "text": asked.text or {"format": {"type": "text"}},
            "tool_choice": asked.tool_choice or "auto",
            "tools": asked.tools or [],
            "truncation": "disabled",
            "metadata": asked.metadata or {},
            "user": None,
            **self._sampling,
            "usage": None if end is None else self._usage(),
        }

    def _usage(self) -> dict[str, Any]:
        usage = self.usage
        return {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {"cached_tokens": usage.cached_tokens},
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": self._reasoning_tokens},
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        }


def _logprobs(name: str) -> dict[str, Any]:
    return {"logprobs": []} if name == "output_text" else {}


def _copied(item: dict[str, Any]) -> dict[str, Any]:
    return {**item, "content": [dict(part) for part in item["content"]]} if "content" in item else dict(item)
