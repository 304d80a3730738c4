"""Fields that say what an output is to look like: OpenAI's, vLLM's and SGLang's names for it."""

from __future__ import annotations

from typing import Any

import msgspec

from workbench.serving.refusals import bad_value
from workbench.serving.structured.formats import ANY_OBJECT, OutputFormat, as_text

_KINDS = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
    "json_schema": "json",
    "regex": "regex",
    "ebnf": "grammar",
}
"""The names that are fields by themselves, and the kind of form that each asks for."""


class JsonSchema(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """``json_schema`` of a ``response_format``. Outputs are held to the schema whether it is strict or not."""

    name: str | None = None
    description: str | None = None
    schema: Any = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """``response_format``."""

    type: str
    json_schema: JsonSchema | None = None


class StructuredOutputs(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """``structured_outputs``: vLLM's later name for its ``guided_*``."""

    json: Any = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    whitespace_pattern: str | None = None


def output_format(asked: Any, prefix: str = "") -> OutputFormat | None:
    """Return the form that a body asks for by any of the names that it has; ``prefix`` goes before them. None: any.

    Raises Refusal for more than one, and for what is no such form.
    """
    found: list[OutputFormat] = []
    for name, kind in _KINDS.items():
        value = getattr(asked, name, None)
        if value is not None:
            value = as_text(value, prefix + name) if kind == "json" else value
            found.append(OutputFormat(kind, value, prefix + name))  # type: ignore[arg-type]
    given = getattr(asked, "response_format", None)
    if given is not None:
        found += output_format_of(given, "response_format", "response_format.json_schema.schema")
    whitespace, name = getattr(asked, "guided_whitespace_pattern", None), "guided_whitespace_pattern"
    outputs = getattr(asked, "structured_outputs", None)
    if outputs is not None:
        found += _of_structured_outputs(outputs)
        if whitespace is None:
            whitespace, name = outputs.whitespace_pattern, "structured_outputs.whitespace_pattern"
    if len(found) > 1:
        first, second = found[:2]
        raise bad_value(second.parameter, f"an output has one form, and {first.parameter} asks for another")
    one = found[0] if found else None
    if whitespace is None:
        return one
    if one is None or one.kind != "json":
        raise bad_value(name, "is for outputs in JSON, and none is asked for")
    return OutputFormat(one.kind, one.value, one.parameter, whitespace)


def output_format_of(given: ResponseFormat, name: str, schema: str) -> list[OutputFormat]:
    """Return the form that a ``response_format`` asks for, if any; ``name`` and ``schema`` are what the client calls it and
    its schema. Raises Refusal."""
    if given.type == "json_schema":
        if given.json_schema is None or given.json_schema.schema is None:
            missing = schema if given.json_schema is not None else f"{name}.json_schema"
            raise bad_value(missing, "is required", "missing_required_parameter")
        return [OutputFormat("json", given.json_schema.schema, schema)]
    if given.json_schema is not None:
        raise bad_value(f"{name}.json_schema", f"is for the type json_schema, not {given.type!r}")
    if given.type == "json_object":
        return [OutputFormat("json", ANY_OBJECT, name)]
    if given.type != "text":
        raise bad_value(f"{name}.type", f"{given.type!r} is not one of text, json_object, json_schema")
    return []


def _of_structured_outputs(given: StructuredOutputs) -> list[OutputFormat]:
    name = "structured_outputs"
    found = []
    if given.json is not None:
        found.append(OutputFormat("json", as_text(given.json, f"{name}.json"), f"{name}.json"))
    if given.json_object:
        found.append(OutputFormat("json", ANY_OBJECT, f"{name}.json_object"))
    for kind, value in (("regex", given.regex), ("choice", given.choice), ("grammar", given.grammar)):
        if value is not None:
            found.append(OutputFormat(kind, value, f"{name}.{kind}"))  # type: ignore[arg-type]
    if not found:
        raise bad_value(name, "give one of json, regex, choice, grammar and json_object")
    return found
