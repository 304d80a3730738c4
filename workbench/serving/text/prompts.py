"""Prompts as clients send them, in token ids: checked, and encoded no further than they can be served."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from workbench.serving.refusals import bad_value
from workbench.serving.requests import MAX_SEQUENCES, Limits, check_length
from workbench.serving.text.tokenizer import Decoder, Tokenizer
from workbench.serving.threads import in_thread

LONG_TEXT = 4000
"""Characters from which on encoding leaves the event loop to others."""
ENCODERS = 4
"""Long texts that are encoded at a time."""


class Prompts:
    """Encoder of prompts that the engine can take."""

    def __init__(self, tokenizer: Tokenizer, limits: Limits) -> None:
        self._tokenizer = tokenizer
        self._limits = limits
        self._encoders = asyncio.Semaphore(ENCODERS)

    def listed(self, prompt: Any, max_new_tokens: int) -> list[str | list[int]]:
        """Return the four shapes of ``prompt`` as a list of texts and token lists. Raises Refusal."""
        if isinstance(prompt, list):
            for tokens in (prompt, *prompt[:MAX_SEQUENCES]):
                if isinstance(tokens, list) and tokens and isinstance(tokens[0], int):
                    check_length(len(tokens), self._limits, max_new_tokens, "prompt")
        return _shaped(prompt)

    async def encoded(self, given: list[str | list[int]], max_new_tokens: int, parameter: str) -> list[list[int]]:
        """Return token ids of each. Raises Refusal for one that is too long, if possible before any is encoded."""
        for one in given:
            if isinstance(one, str) and len(one) > LONG_TEXT:
                await in_thread(self._check_text, one, max_new_tokens, parameter)
        prompts = []
        for one in given:
            prompts.append(await self._encode(one, self._tokenizer.encode) if isinstance(one, str) else one)
            check_length(len(prompts[-1]), self._limits, max_new_tokens, parameter)
        return prompts

    async def chat(self, text: str, max_new_tokens: int, parameter: str) -> list[int]:
        """Return token ids of a conversation that has been rendered. Raises Refusal."""
        if len(text) > LONG_TEXT:
            await in_thread(self._check_text, text, max_new_tokens, parameter)
        return await self._encode(text, self._tokenizer.encode_chat)

    def _check_text(self, text: str, max_new_tokens: int, parameter: str) -> None:
        least = self._tokenizer.least_tokens(text, self._limits.capacity.longest_prompt(max_new_tokens) + 1)
        check_length(least, self._limits, max_new_tokens, parameter, at_least=True)

    async def _encode(self, text: str, encode: Callable[[str], list[int]]) -> list[int]:
        if len(text) <= LONG_TEXT:
            return encode(text)
        async with self._encoders:
            return await in_thread(encode, text)


def _shaped(prompt: Any) -> list[str | list[int]]:
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt, list) and prompt:
        if all(_is_token(item) for item in prompt):
            return [prompt]
        if all(isinstance(item, str) for item in prompt):
            return list(prompt)
        if all(isinstance(item, list) and item and all(_is_token(token) for token in item) for item in prompt):
            return list(prompt)
    raise bad_value(
        "prompt", "must be text, a list of texts, a list of token ids, or a list of such lists, and not empty"
    )


def _is_token(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True)
class SpelledPrompt:
    """A prompt as text."""

    text: str
    offsets: list[int]
    """Characters of the text before each token; see :meth:`TextStream.offset`."""
    first: tuple[str, bytes]
    """Its first token alone, as text and bytes."""


def spell(decoder: Decoder, prompt: list[int], bos_tokens: int) -> SpelledPrompt:
    """Return token ids as text, special tokens included but for ``bos_tokens`` at the beginning."""
    stream = decoder.stream(False)
    pieces: list[str] = []
    offsets = [0] * bos_tokens
    for token in prompt[bos_tokens:]:
        offsets.append(stream.offset(token))
        pieces.append(stream.push((token,)))
    return SpelledPrompt("".join(pieces) + stream.finish(), offsets, decoder.token(prompt[0]))
