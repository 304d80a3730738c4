"""The process that checks forms: each becomes a grammar, or what is wrong with it, and where.

The compiler of grammars recurses as deep as a grammar does and grows as it likes: :mod:`workbench.serving.bounded` says how
that is held. What passes here is compiled once more where it is followed, with the model's tokens.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache
from multiprocessing.connection import Connection
from typing import Any, TypeGuard

import llguidance
import msgspec
import numpy as np
from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match
from jsonschema.validators import validator_for

from workbench.serving.bounded import run_worker
from workbench.serving.refusals import Refusal, bad_value
from workbench.serving.structured.byte_vocabulary import ByteVocabulary
from workbench.serving.structured.formats import OutputFormat, check_depth, grammar_of, one_line

MEMORY_BYTES = 128 << 20
"""Memory that a form may take to be compiled."""
HUGE = 1 << 63
"""The first whole number that does not fit 64 bits with a sign."""
VALUES = frozenset({"const", "enum", "default", "examples", "example"})
"""Keywords whose values are no schemas."""
NAMED = ("$defs", "definitions", "properties", "patternProperties")
"""Keywords whose values have schemas by names of the client's."""
MOST_LOOKS = 200
"""Parts of a schema that are tried to find which of them is wrong."""
_NOTHING = "NoExtensionBias"
"""How llguidance says that no output has the form."""


def run_checker(connection: Connection) -> None:
    """Run the process. Its tasks are OutputFormats, its answers what :func:`grammar_in` reads."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what a library says as it breaks is nobody's
    _bytes()
    run_worker(connection, _answer, MEMORY_BYTES)


def _answer(asked: OutputFormat) -> bytes:
    try:
        return msgspec.msgpack.encode((checked_grammar(asked), "", ""))
    except Refusal as refusal:
        return msgspec.msgpack.encode(("", str(refusal), refusal.parameter or ""))


def grammar_in(answer: bytes) -> str | Refusal:
    """Return what the process has answered: the grammar of a form, or what is wrong with it."""
    grammar, said, parameter = msgspec.msgpack.decode(answer, type=tuple[str, str, str])
    return grammar if not said else Refusal("invalid_value", said, parameter)


def checked_grammar(asked: OutputFormat) -> str:
    """Return the grammar of an output. Raises Refusal that says where it is wrong."""
    if asked.kind == "json" and isinstance(asked.value, dict):
        _check_schema(asked)
    grammar = grammar_of(asked)
    fault = _fault(grammar)
    if fault:
        is_schema = asked.kind == "json" and isinstance(asked.value, dict)
        name, where = asked.named(_path_of(asked, fault) if is_schema else ())
        raise Refusal("invalid_value", f"{where}: {one_line(fault)}", name)
    return grammar


def _check_schema(asked: OutputFormat) -> None:
    check_depth(asked.value, asked.parameter)
    named = isinstance(asked.value.get("$schema"), str)
    kind = validator_for(asked.value, default=Draft202012Validator) if named else Draft202012Validator
    try:
        error = best_match(kind(kind.META_SCHEMA).iter_errors(asked.value))
    except RecursionError:
        raise bad_value(asked.parameter, "is nested too deeply") from None
    if error is not None:
        name, where = asked.named(list(error.absolute_path))
        raise Refusal("invalid_value", f"{where}: {one_line(error.message)}", name)
    for path, fault in _not_held(asked.value):
        name, where = asked.named(path)
        raise Refusal("invalid_value", f"{where}: {fault}", name)


def _not_held(schema: dict[str, Any]) -> Iterator[tuple[list[str | int], str]]:
    """Yield what the compiler takes, and does not hold an output to: numbers of more than 64 bits, and a whole bound that no
    number may have, with another less than 1 above it."""
    for path, part in _all_parts(schema, []):
        for name in ("const", "enum"):
            if _has_huge(part.get(name)):
                yield [*path, name], "a number of more than 64 bits is not kept digit by digit"
        for name, sign in (("minimum", 1), ("exclusiveMinimum", 1), ("maximum", -1), ("exclusiveMaximum", -1)):
            bound = part.get(name)
            if _is_number(bound) and sign * bound >= HUGE:
                yield [*path, name], "a number of more than 64 bits is no bound"
        low = part.get("exclusiveMinimum")
        highs = [high for high in (part.get("maximum"), part.get("exclusiveMaximum")) if _is_number(high)]
        if _is_number(low) and int(low) == low and any(low < high < low + 1 for high in highs):
            yield [*path, "exclusiveMinimum"], "is not held where it is whole and the upper bound less than 1 above it"


def _all_parts(part: Any, path: list[str | int]) -> Iterator[tuple[list[str | int], dict[str, Any]]]:
    """Yield the schemas in a schema, itself among them, and where each is."""
    if isinstance(part, dict):
        yield path, part
        for name, value in part.items():
            if name in NAMED and isinstance(value, dict):
                for key, each in value.items():
                    yield from _all_parts(each, [*path, name, key])
            elif name not in VALUES:
                yield from _all_parts(value, [*path, name])
    elif isinstance(part, list):
        for i, value in enumerate(part):
            yield from _all_parts(value, [*path, i])


def _has_huge(value: Any) -> bool:
    if isinstance(value, dict | list):
        return any(map(_has_huge, value.values() if isinstance(value, dict) else value))
    return _is_number(value) and abs(value) >= HUGE


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _fault(grammar: str) -> str:
    """Return what is wrong with a grammar, nothing where it is right: read, and followed for one byte, which shows what is
    too complex and what nothing can be written by."""
    matcher = llguidance.LLMatcher(_bytes(), grammar, log_level=0)
    if not matcher.is_error():
        mask = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
        if matcher.get_error().startswith(_NOTHING):
            return "nothing can be written by it"
        matcher.consume_token(int(mask.argmax()))
        if not matcher.is_stopped():
            matcher.compute_bitmask()
    if not matcher.is_error():
        return ""
    fault = str(matcher.get_error()).partition("\n<state>")[0].removeprefix("Parser Error: ")
    if "coerce_one_of" in fault:
        return "two forms of oneOf may be the same, which is not held; anyOf takes them"
    return fault or "is no grammar"


@cache
def _bytes() -> Any:
    return llguidance.LLTokenizer(llguidance.TokenizerWrapper(ByteVocabulary()))


def _path_of(asked: OutputFormat, fault: str) -> list[str | int]:
    """Return the path of the smallest part of a schema that is wrong by itself, in the same way."""
    root = asked.value
    shared = _shared(root)
    path: list[str | int] = []
    part: Any = root
    looks = 0
    while True:
        for step, child in _parts(part):
            looks += 1
            if looks > MOST_LOOKS:
                return path
            own = "$id" in child  # what is referred to in it is in itself
            alone = OutputFormat("json", child if own else {**child, **shared}, asked.parameter)
            if _fault(grammar_of(alone)) == fault:
                path, part = [*path, *step], child
                shared = _shared(child) if own else shared
                break
        else:
            return path


def _shared(root: dict[str, Any]) -> dict[str, Any]:
    """Return what the parts of a schema refer to."""
    return {name: root[name] for name in ("$schema", "$defs", "definitions") if name in root}


def _parts(schema: dict[str, Any]) -> Iterator[tuple[list[str | int], dict[str, Any]]]:
    """Yield the schemas inside a schema, and where each is: first those that others refer to, as a fault is theirs."""
    for name, value in sorted(schema.items(), key=lambda item: item[0] not in ("$defs", "definitions")):
        if name in NAMED and isinstance(value, dict):
            for key, each in value.items():
                if isinstance(each, dict):
                    yield [name, key], each
        elif name in ("items", "additionalProperties") and isinstance(value, dict):
            yield [name], value
        elif name in ("anyOf", "oneOf", "allOf", "prefixItems") and isinstance(value, list):
            for i, each in enumerate(value):
                if isinstance(each, dict):
                    yield [name, i], each
