"""Grammars of outputs: checked beside the event loop, kept, and refused where they are wrong."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Iterator
from functools import cache
from typing import Any

import llguidance
import msgspec
import numpy as np
from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match
from jsonschema.validators import validator_for

from workbench.serving.refusals import Refusal, bad_value
from workbench.serving.structured.byte_vocabulary import ByteVocabulary
from workbench.serving.structured.formats import OutputFormat, check_depth, grammar_of, one_line
from workbench.serving.threads import in_thread

MOST_KEPT = 1024
COMPILE_S = 10.0
"""How long a schema may take to be compiled."""
AT_ONCE = 2
"""Schemas that are compiled at a time: each takes a core."""
_NOTHING = "NoExtensionBias"
"""How llguidance says that no output has the form."""
MOST_LOOKS = 200
"""Parts of a schema that are tried to find which of them is wrong."""


class GrammarCompiler:
    """Maker of the grammars of a server's requests. The model's tokens play no part yet: those the scheduler process has."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, str | Refusal] = OrderedDict()
        self._turns = asyncio.Semaphore(AT_ONCE)

    async def grammar(self, asked: OutputFormat) -> str:
        """Return the grammar of an output. Raises Refusal that says where it is wrong, that it takes too long, or that
        others do."""
        key = repr((asked.kind, asked.parameter, asked.inner, asked.whitespace, asked.value))
        found = self._kept.get(key)
        if found is None:
            found = await self._made(asked)
            self._kept[key] = found
            while len(self._kept) > MOST_KEPT:
                self._kept.popitem(last=False)
        else:
            self._kept.move_to_end(key)
        if isinstance(found, Refusal):
            raise Refusal(found.kind, str(found), found.parameter)
        return found

    async def _made(self, asked: OutputFormat) -> str | Refusal:
        try:
            await asyncio.wait_for(self._turns.acquire(), COMPILE_S)
        except TimeoutError:
            raise Refusal("overloaded", "overloaded: other forms are being compiled", retry_after_s=5) from None
        working = asyncio.ensure_future(in_thread(checked_grammar, asked))
        working.add_done_callback(self._ended)
        try:
            return await asyncio.wait_for(asyncio.shield(working), COMPILE_S)
        except Refusal as refusal:
            return refusal
        except TimeoutError:
            return bad_value(asked.parameter, f"takes more than {COMPILE_S:g} s to compile")

    def _ended(self, working: asyncio.Future[str]) -> None:
        """Give the turn on: a thread keeps its core, and so its turn, when nobody waits for it any more."""
        self._turns.release()
        if not working.cancelled():
            working.exception()  # whoever waited has it; where nobody did, it is nobody's fault


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


def _fault(grammar: str) -> str:
    """Return what is wrong with a grammar, nothing where it is right: read, and followed for one byte, which shows what is
    too complex and what nothing can be written by."""
    matcher = llguidance.LLMatcher(_bytes(), grammar, log_level=0)
    if not matcher.is_error():
        mask = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
        if matcher.get_error().startswith(_NOTHING):
            return "nothing can be written by it"
        matcher.consume_token(int(mask.argmax()))
    if not matcher.is_error():
        return ""
    fault = str(matcher.get_error()).partition("\n<state>")[0].removeprefix("Parser Error: ")
    return fault or "is no grammar"


@cache
def _bytes() -> Any:
    return llguidance.LLTokenizer(llguidance.TokenizerWrapper(ByteVocabulary()))


def _path_of(asked: OutputFormat, fault: str) -> list[str | int]:
    """Return the path of the smallest part of a schema that is wrong by itself, in the same way."""
    root = asked.value
    shared = {name: root[name] for name in ("$schema", "$defs", "definitions") if name in root}
    path: list[str | int] = []
    part: Any = root
    looks = 0
    while True:
        for step, child in _parts(part):
            looks += 1
            if looks > MOST_LOOKS:
                return path
            alone = OutputFormat("json", {**child, **shared}, asked.parameter)
            if _fault(grammar_of(alone)) == fault:
                path, part = [*path, *step], child
                break
        else:
            return path


def _parts(schema: dict[str, Any]) -> Iterator[tuple[list[str | int], dict[str, Any]]]:
    """Yield the schemas inside a schema, and where each is: first those that others refer to, as a fault is theirs."""
    for name, value in sorted(schema.items(), key=lambda item: item[0] not in ("$defs", "definitions")):
        if name in ("properties", "patternProperties", "$defs", "definitions") and isinstance(value, dict):
            for key, each in value.items():
                if isinstance(each, dict):
                    yield [name, key], each
        elif name in ("items", "additionalProperties") and isinstance(value, dict):
            yield [name], value
        elif name in ("anyOf", "oneOf", "allOf", "prefixItems") and isinstance(value, list):
            for i, each in enumerate(value):
                if isinstance(each, dict):
                    yield [name, i], each


def as_text(value: Any, parameter: str) -> Any:
    """Return a schema that may come as JSON text. Raises Refusal for text that is none."""
    if not isinstance(value, str):
        return value
    try:
        return msgspec.json.decode(value)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise bad_value(parameter, f"is not JSON: {one_line(error)}") from error
