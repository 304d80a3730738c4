"""Tools that a request offers, and which of them an answer may or has to call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from workbench.serving.structured.formats import OutputFormat, check_depth

MAX_TOOLS = 128


@dataclass(frozen=True)
class Tool:
    """A function that the model may call."""

    name: str
    definition: dict[str, Any]
    """As the client has written it, for the chat template."""
    parameters: dict[str, Any]
    """JSON schema of its arguments, which are an object."""
    where: str
    """What the client calls the function."""


@dataclass(frozen=True)
class ToolUse:
    """What a request says of tools."""

    tools: tuple[Tool, ...]
    choice: Literal["auto", "required", "named"]
    named: str = ""
    parallel: bool = True
    """An answer may have more than one call."""

    @property
    def names(self) -> frozenset[str]:
        return frozenset(tool.name for tool in self.tools)

    def forced(self) -> OutputFormat | None:
        """Return the form of an output that has to call: the arguments of the named tool, or a list of calls. None where it
        may do something else. Raises Refusal for arguments that are nested too deeply."""
        if self.choice == "auto":
            return None
        if self.choice == "named":
            (one,) = (tool for tool in self.tools if tool.name == self.named)
            return OutputFormat("json", one.parameters, f"{one.where}.parameters")
        places = tuple(f"{tool.where}.parameters" for tool in self.tools)
        for tool, place in zip(self.tools, places, strict=True):
            check_depth(tool.parameters, place)
        calls = [
            {
                "type": "object",
                "properties": {"name": {"const": tool.name}, "arguments": {"$ref": f"#/$defs/{i}"}},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
            for i, tool in enumerate(self.tools)
        ]
        schema = {
            "type": "array",
            "minItems": 1,
            "items": {"anyOf": calls},
            "$defs": {str(i): _resource(tool.parameters, f"tool-{i}") for i, tool in enumerate(self.tools)},
        }
        return OutputFormat("json", schema if self.parallel else {**schema, "maxItems": 1}, "tools", inner=places)


def _resource(parameters: dict[str, Any], name: str) -> dict[str, Any]:
    """Return a schema as one of several in another, where what it refers to is in itself still."""
    return {**{key: value for key, value in parameters.items() if key != "$schema"}, "$id": name}
