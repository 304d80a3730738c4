"""What chats say beside their sampling: messages, and tools that an answer may call."""

from __future__ import annotations

import json
import re
from typing import Any

from workbench.serving.outputs.tools import MAX_TOOLS, Tool, ToolUse
from workbench.serving.refusals import Refusal, bad_value

_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}")
_ROLES = ("system", "developer", "user", "assistant", "tool")
_FIELDS = {
    "assistant": ("tool_calls", "reasoning_content", "reasoning"),
    "tool": ("tool_call_id",),
}
"""Fields of a message beside role, content and name."""
_UNSUPPORTED = ("tool_calls", "tool_call_id", "function_call", "audio", "refusal", "annotations")


def chat_messages(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return messages for a chat template: their content as plain text, and the arguments of calls as objects."""
    if not messages:
        raise bad_value("messages", "is empty")
    return [message_for_template(message, f"messages[{i}]") for i, message in enumerate(messages)]


def message_for_template(message: dict[str, Any], where: str) -> dict[str, Any]:
    """Return one message for a chat template; ``where`` is what the client calls it. Raises Refusal."""
    role = message.get("role")
    own = _FIELDS.get(role, ()) if isinstance(role, str) else ()
    for name, value in message.items():
        if name not in ("role", "content", "name", *own) and value not in (None, []):
            param = f"{where}.{name}"
            if name in _UNSUPPORTED:
                raise bad_value(param, "not supported by this server", "unsupported_parameter")
            raise bad_value(param, "unknown field", "unknown_parameter")
    if role not in _ROLES:
        raise bad_value(f"{where}.role", f"{role!r} is not one of {', '.join(_ROLES)}")
    made: dict[str, Any] = {"role": role}
    calls = message.get("tool_calls") if role == "assistant" else None
    content = message.get("content")
    made["content"] = "" if calls and content in (None, []) else plain_text(content, f"{where}.content")
    if calls not in (None, []):
        made["tool_calls"] = assistant_calls(calls, f"{where}.tool_calls")
    thoughts = (message.get("reasoning_content") or message.get("reasoning")) if role == "assistant" else None
    if thoughts:
        if not isinstance(thoughts, str):
            raise bad_value(f"{where}.reasoning_content", "must be text", "invalid_type")
        made["reasoning_content"] = thoughts
    for name in ("name", "tool_call_id"):
        if role == "tool" and message.get(name) is not None:
            if not isinstance(message[name], str):
                raise bad_value(f"{where}.{name}", "must be text", "invalid_type")
            made[name] = message[name]
    return made


def assistant_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Return calls with their arguments as objects. Raises Refusal."""
    if not isinstance(calls, list):
        raise bad_value(where, "must be a list of calls", "invalid_type")
    made = []
    for i, call in enumerate(calls):
        at = f"{where}[{i}]"
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or call.get("type", "function") != "function":
            raise bad_value(at, "must be a call of a function")
        made.append(call_for_template(call.get("id"), function, f"{at}.id", f"{at}.function"))
    return made


def call_for_template(call_id: Any, function: dict[str, Any], id_where: str, where: str) -> dict[str, Any]:
    """Return one call, its arguments as an object; ``id_where`` and ``where`` are what the client calls its id and its
    function. Raises Refusal."""
    if not isinstance(function.get("name"), str):
        raise bad_value(f"{where}.name", "must be text", "invalid_type")
    if call_id is not None and not isinstance(call_id, str):
        raise bad_value(id_where, "must be text", "invalid_type")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
            json.dumps(arguments, ensure_ascii=False, allow_nan=False).encode()  # a template writes them as text
        except (ValueError, RecursionError):
            raise bad_value(f"{where}.arguments", "is not JSON") from None
    if not isinstance(arguments, dict):
        raise bad_value(f"{where}.arguments", "must be an object, as JSON text")
    return {
        "id": call_id or "",
        "type": "function",
        "function": {"name": function["name"], "arguments": arguments},
    }


def plain_text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list) and content:
        texts = []
        for part in content:
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise bad_value(where, "only parts of type text are supported")
            texts.append(part["text"])
        return "\n".join(texts)
    raise bad_value(where, "must be text or a list of text parts")


def tool_use(tools: list[Any] | None, choice: Any, parallel: bool | None, inside: str = ".function") -> ToolUse | None:
    """Return what a chat says of tools: None where it has none, or may call none. ``inside`` is where in a tool the client
    has its function. Raises Refusal."""
    if not tools:
        if choice not in (None, "none", "auto"):
            raise bad_value("tool_choice", "there are no tools")
        return None
    if len(tools) > MAX_TOOLS:
        raise bad_value("tools", f"{len(tools)} are more than {MAX_TOOLS}")
    found = tuple(_tool(tool, f"tools[{i}]", f"tools[{i}]{inside}") for i, tool in enumerate(tools))
    names = [tool.name for tool in found]
    for i, name in enumerate(names):
        if name in names[:i]:
            raise bad_value(f"{found[i].where}.name", f"{name!r} is the name of another tool, too")
    if choice == "none":
        return None
    parallel = parallel is not False
    if choice in (None, "auto", "required"):
        return ToolUse(found, "required" if choice == "required" else "auto", parallel=parallel)
    if isinstance(choice, dict) and choice.get("type") == "function":
        function = choice.get("function")
        named = function.get("name") if isinstance(function, dict) else choice.get("name")
        if named not in names:
            raise bad_value("tool_choice", f"{named!r} is none of the tools")
        return ToolUse(found, "named", str(named), parallel)
    raise bad_value(
        "tool_choice", 'must be "none", "auto", "required" or {"type": "function", "function": {"name": ...}}'
    )


def _tool(tool: Any, where: str, inside: str) -> Tool:
    function = tool.get("function") if isinstance(tool, dict) else None
    if not isinstance(tool, dict) or tool.get("type") != "function" or not isinstance(function, dict):
        raise bad_value(where, 'must be a function: {"type": "function", "function": {...}}')
    name = function.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise bad_value(f"{inside}.name", "must have 1 to 64 letters, digits, dots, dashes and underscores")
    if function.get("description") is not None and not isinstance(function["description"], str):
        raise bad_value(f"{inside}.description", "must be text", "invalid_type")
    parameters = function.get("parameters")
    if parameters is None:
        parameters = {"additionalProperties": False}
    if not isinstance(parameters, dict):
        raise bad_value(f"{inside}.parameters", "must be a JSON schema", "invalid_type")
    if parameters.get("type", "object") != "object":
        where = f"{inside}.parameters"
        raise Refusal(
            "invalid_value", f"{where}.type: {parameters['type']!r} is not 'object', which arguments are", where
        )
    return Tool(name, tool, {"type": "object", **parameters}, inside)
