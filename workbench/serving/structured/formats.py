"""The form that an output is to have, as clients ask for it, and as the text of a grammar."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from workbench.serving.refusals import bad_value

Kind = Literal["json", "regex", "choice", "grammar"]

ONE_SPACE = "[ ]?"
"""Between the parts of a document at most one space, as in ``json.dumps``: a model that may write spaces for ever sometimes
does."""
ANY_OBJECT: dict[str, Any] = {"type": "object"}
MAX_CHARACTERS = 256 << 10
"""Of a schema or a grammar."""
MAX_CHOICES = 10_000
MAX_DEPTH = 64
"""Of a schema."""


@dataclass(frozen=True)
class OutputFormat:
    """The form of an output. :func:`grammar_of` makes a grammar of it."""

    kind: Kind
    value: Any
    """A JSON schema, a regular expression, texts of which it is one, or a grammar in GBNF or Lark."""
    parameter: str
    """What the client calls it."""
    whitespace: str = ONE_SPACE
    """Regular expression for what may stand between the parts of a JSON document."""
    inner: tuple[str, ...] = ()
    """What the client calls the schemas that are ``$defs`` of a schema made for it, in order."""

    def named(self, path: Sequence[str | int]) -> tuple[str, str]:
        """Return what the client calls the schema that has a place, and the place itself."""
        name = self.parameter
        if self.inner and len(path) > 1 and path[0] == "$defs":
            name, path = self.inner[int(path[1])], path[2:]
        return name, name + "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)


def grammar_of(asked: OutputFormat) -> str:
    """Return the text of a grammar, as llguidance reads it; whether it is one is another question.

    Raises Refusal for what is too large, or of another shape.
    """
    from llguidance import LLMatcher, grammar_from

    value = asked.value
    if asked.kind == "json":
        return _json_grammar(asked)
    if asked.kind == "choice":
        # One terminal: as rules, a few thousand would be too many.
        return LLMatcher.grammar_from_lark("start: CHOICE\nCHOICE: " + " | ".join(_choices(asked)))
    _check_size(value, asked.parameter)
    if not value:
        raise bad_value(asked.parameter, "is empty")
    if asked.kind == "regex":
        return LLMatcher.grammar_from_regex(value)
    try:
        return grammar_from("ebnf", value)
    except Exception as error:  # whatever its reader of GBNF finds
        raise bad_value(asked.parameter, f"is no grammar in GBNF or Lark: {one_line(error)}") from error


def _choices(asked: OutputFormat) -> list[str]:
    value, name = asked.value, asked.parameter
    if not value:
        raise bad_value(name, "is empty")
    if len(value) > MAX_CHOICES:
        raise bad_value(name, f"{len(value)} choices are more than {MAX_CHOICES}")
    _check_size("".join(value), name)
    if not all(value):
        raise bad_value(name, "an empty text is no choice")
    return [json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f") for text in value]


def _json_grammar(asked: OutputFormat) -> str:
    from llguidance import LLMatcher

    schema = asked.value
    if schema is True:
        schema = {}
    if not isinstance(schema, dict):
        raise bad_value(asked.parameter, "a JSON schema is an object")
    text = json.dumps(schema, ensure_ascii=False)
    _check_size(text, asked.parameter)
    _check_size(asked.whitespace, asked.parameter)
    options = {"whitespace_flexible": True, "whitespace_pattern": asked.whitespace, "lenient": False}
    return LLMatcher.grammar_from_json_schema(text, overrides=options)  # type: ignore[arg-type]


def check_depth(schema: Any, parameter: str) -> None:
    """Raise Refusal for a schema that is nested too deeply."""
    if depth(schema) > MAX_DEPTH:
        raise bad_value(parameter, f"is nested more than {MAX_DEPTH} deep")


def depth(value: Any) -> int:
    """Return how deep lists and objects are nested in each other."""
    level, found = [value], 0
    while level:
        level = [
            each
            for part in level
            if isinstance(part, dict | list)
            for each in (part.values() if isinstance(part, dict) else part)
        ]
        found += 1
    return found


def _check_size(text: str, parameter: str) -> None:
    if len(text) > MAX_CHARACTERS:
        raise bad_value(parameter, f"{len(text)} characters are more than {MAX_CHARACTERS}")


def one_line(what: object) -> str:
    """Return what a library says of a fault as one line, without the picture that it draws."""
    lines = [line.strip() for line in str(what).splitlines()]
    said = " ".join(line for line in lines if line.strip("^ ") and " | " not in f" {line} "[:8])
    return said if len(said) <= 300 else said[:297] + "..."


def as_text(value: Any, parameter: str) -> Any:
    """Return a schema that may come as JSON text. Raises Refusal for text that is none."""
    if not isinstance(value, str):
        return value
    try:
        return msgspec.json.decode(value)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise bad_value(parameter, f"is not JSON: {one_line(error)}") from error
