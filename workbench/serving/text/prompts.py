"""Prompts as clients send them, in token ids: checked, and encoded no further than they can be served."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from workbench.serving.engine.threads import in_thread
from workbench.serving.http import protocol
from workbench.serving.http.protocol import Limits
from workbench.serving.text.tokenizer import Tokenizer

LONG_TEXT = 4000
"""Characters from which on encoding leaves the event loop to others."""
ENCODERS = 4
"""Long texts that are encoded at a time."""


class Prompts:
    """What the tokenizer makes of prompts that the engine can take."""

    def __init__(self, tokenizer: Tokenizer, limits: Limits) -> None:
        self._tokenizer = tokenizer
        self._limits = limits
        self._encoders = asyncio.Semaphore(ENCODERS)

    def listed(self, prompt: Any) -> list[str | list[int]]:
        """The four shapes of ``prompt`` as a list of texts and token lists. Raises ApiError."""
        if isinstance(prompt, list):
            for tokens in (prompt, *prompt[: protocol.MAX_SEQUENCES]):
                if isinstance(tokens, list) and tokens and isinstance(tokens[0], int):
                    protocol.check_length(len(tokens), self._limits, "prompt")
        return protocol.prompt_list(prompt)

    async def encoded(self, given: list[str | list[int]], param: str) -> list[list[int]]:
        """Token ids of each. Raises ApiError for one that can never be served, if possible before any is encoded."""
        for one in given:
            if not isinstance(one, str):
                protocol.check_prompt(one, self._limits, param)
            elif len(one) > LONG_TEXT:
                await in_thread(self._check_text, one, param)
        return [
            await self._encode(one, param, self._tokenizer.encode) if isinstance(one, str) else one for one in given
        ]

    async def chat(self, text: str) -> list[int]:
        """Token ids of a conversation that has been rendered. Raises ApiError."""
        if len(text) > LONG_TEXT:
            await in_thread(self._check_text, text, "messages")
        return await self._encode(text, "messages", self._tokenizer.encode_chat)

    def _check_text(self, text: str, param: str) -> None:
        least = self._tokenizer.least_tokens(text, self._limits.longest_prompt + 1)
        protocol.check_length(least, self._limits, param, at_least=True)

    async def _encode(self, text: str, param: str, encode: Callable[[str], list[int]]) -> list[int]:
        if len(text) <= LONG_TEXT:
            prompt = encode(text)
        else:
            async with self._encoders:
                prompt = await in_thread(encode, text)
        protocol.check_prompt(prompt, self._limits, param)
        return prompt
