"""Grammars of outputs: asked for, kept, and refused where they are wrong."""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict

from workbench.serving.bounded import Lane, WorkerEnded
from workbench.serving.refusals import Refusal, bad_value
from workbench.serving.structured.checking import grammar_in, run_checker
from workbench.serving.structured.formats import OutputFormat

MOST_KEPT = 1024
MOST_CHARACTERS_KEPT = 16 << 20
COMPILE_S = 10.0
"""Processor time that a form may take to be compiled."""
TURN_S = 10.0
"""How long one may wait for its turn."""
AT_ONCE = 2
"""Forms that are compiled at a time: each takes a core."""


class GrammarCompiler:
    """Maker of the grammars of a server's requests. The model's tokens play no part yet: those the scheduler process has."""

    def __init__(self) -> None:
        self._lane = Lane(AT_ONCE, run_checker, "grammar", [run_checker.__module__])
        self._kept: OrderedDict[bytes, str | Refusal] = OrderedDict()
        self._characters = 0
        """Of all that is kept."""
        self._making: dict[bytes, asyncio.Task[str | Refusal]] = {}

    @property
    def compiling(self) -> int:
        """Forms that are being compiled, or wait for their turn."""
        return len(self._making)

    async def grammar(self, asked: OutputFormat) -> str:
        """Return the grammar of an output. Raises Refusal that says where it is wrong, or what takes too much."""
        key = _key(asked)
        found = self._kept.get(key)
        if found is None:
            making = self._making.get(key)
            if making is None:
                making = self._making[key] = asyncio.ensure_future(self._made(key, asked))
                making.add_done_callback(lambda made: self._ended(key, made))
            found = await asyncio.shield(making)
        else:
            self._kept.move_to_end(key)
        if isinstance(found, Refusal):
            raise Refusal(found.kind, str(found), found.parameter)
        return found

    async def _made(self, key: bytes, asked: OutputFormat) -> str | Refusal:
        try:
            answer = await self._lane.ask(asked, COMPILE_S, TURN_S)
        except TimeoutError:
            raise Refusal("overloaded", "overloaded: other forms are being compiled", retry_after_s=5) from None
        except RecursionError:
            found: str | Refusal = bad_value(asked.parameter, "is nested too deeply")
        except WorkerEnded:
            found = bad_value(asked.parameter, "is nested too deeply, or needs too much memory, to be compiled")
        else:
            slow = bad_value(asked.parameter, f"takes more than {COMPILE_S:g} s to compile")
            found = slow if answer is None else grammar_in(answer)
        self._keep(key, found)
        return found

    def _keep(self, key: bytes, found: str | Refusal) -> None:
        self._kept[key] = found
        self._characters += len(str(found))
        while len(self._kept) > MOST_KEPT or self._characters > MOST_CHARACTERS_KEPT:
            self._characters -= len(str(self._kept.popitem(last=False)[1]))

    def _ended(self, key: bytes, made: asyncio.Task[str | Refusal]) -> None:
        del self._making[key]
        if not made.cancelled():
            made.exception()  # whoever waited has it; where nobody did, it is nobody's fault

    def close(self) -> None:
        """End what is being compiled."""
        self._lane.close()


def _key(asked: OutputFormat) -> bytes:
    """Return what tells a form from others, however large it is. Raises Refusal."""
    said = (asked.kind, asked.parameter, asked.inner, asked.whitespace, asked.value)
    try:
        return hashlib.blake2b(repr(said).encode()).digest()
    except RecursionError:
        raise bad_value(asked.parameter, "is nested too deeply") from None
