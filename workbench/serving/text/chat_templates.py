"""Conversations as the text of a prompt: what clients may say about the template, and renderings within bounds."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from functools import cache
from typing import Any

from workbench.serving.bounded import Lane, WorkerEnded
from workbench.serving.refusals import Refusal, bad_value
from workbench.serving.text.chat_worker import Rendering, TemplateRefused, run_renderer, text_of
from workbench.serving.text.tokenizer import Tokenizer
from workbench.serving.threads import in_thread

QUICK_CPU_S = 0.1
"""Processor time that any rendering gets at once. What takes longer begins again among its like, and delays no other."""
CPU_S = 2.0
"""Processor time after which a rendering is given up."""
QUICK_WORKERS, SLOW_WORKERS = 2, 1
MAX_SLOW = 16
"""Slow renderings that may wait; the next is refused."""


@cache
def reserved_names() -> frozenset[str]:
    """Names in chat_template_kwargs that would reach the renderer or its environment, not the template alone."""
    import inspect

    from transformers.tokenization_utils_base import PreTrainedTokenizerBase
    from transformers.utils import chat_template_utils

    names = {"messages", *PreTrainedTokenizerBase.SPECIAL_TOKENS_ATTRIBUTES}
    for renderer in (PreTrainedTokenizerBase.apply_chat_template, chat_template_utils.render_jinja_template):
        names.update(inspect.signature(renderer).parameters)
    names.update(chat_template_utils._compile_jinja_template("").environment.globals)
    return frozenset(names)


@dataclass(frozen=True)
class Bounds:
    """Bounds of the rendering of one chat."""

    max_characters: int
    quick_cpu_s: float = QUICK_CPU_S
    cpu_s: float = CPU_S


class ChatTemplates:
    """Conversations as text, by the model's template, or by one that a request brings where that is trusted."""

    def __init__(self, tokenizer: Tokenizer, bounds: Bounds, trust_requests: bool) -> None:
        self._tokenizer = tokenizer
        self._bounds = bounds
        self._trust_requests = trust_requests
        rendered = tokenizer.chat_template is not None or trust_requests
        preload = (run_renderer.__module__, *(["transformers.utils.chat_template_utils"] if rendered else []))
        self._quick, self._slow = (
            Lane(size, run_renderer, "chat-template", preload) for size in (QUICK_WORKERS, SLOW_WORKERS)
        )

    async def warm(self) -> None:
        """Start what the first chat would otherwise wait for."""
        if self._tokenizer.chat_template is not None:
            await asyncio.gather(self._quick.warm(), in_thread(reserved_names))

    def close(self) -> None:
        """End all workers, whatever they do."""
        self._quick.close()
        self._slow.close()

    @property
    def slow_renderings(self) -> int:
        """Renderings that take long and have not ended."""
        return self._slow.waiting

    async def text(
        self,
        messages: list[dict[str, Any]],
        given: dict[str, Any],
        tools: list[dict[str, Any]] | None = None,
        parameter: str = "messages",
    ) -> str:
        """The text that the assistant is to continue. ``given``: chat_template_kwargs; ``tools``: those it may call;
        ``parameter``: what the client calls the messages.

        Raises Refusal for names that are not for clients to set, and for what cannot be rendered. When it is cancelled the
        rendering ends.
        """
        variables = dict(given)
        own = await self._own_template(variables)
        template = self._tokenizer.chat_template if own is None else own
        if template is None:
            text = self._tokenizer.plain_chat(messages, tools)
            if text is None:
                raise bad_value(
                    parameter,
                    f"{self._tokenizer.name} has no default chat template; use /v1/completions",
                    "chat_template",
                )
            return text
        if tools and "tools" not in template:
            raise bad_value("tools", "the chat template has no place for them", "unsupported_parameter")
        whose, param = ("the model's chat template", parameter)
        if own is not None:
            whose, param = ("the chat template", "chat_template_kwargs.chat_template")
        try:
            return await self._render(template, messages, variables, tools)
        except TemplateRefused as refusal:
            raise bad_value(param, f"{whose} {refusal}", "chat_template") from None

    async def _own_template(self, variables: dict[str, Any]) -> str | None:
        """Take the template that a request brings out of its variables, all of which are checked."""
        own = None
        if variables:
            reserved = await in_thread(reserved_names)
            if "chat_template" in variables and self._trust_requests:
                own = variables.pop("chat_template")
                if not isinstance(own, str):
                    raise bad_value("chat_template_kwargs.chat_template", "must be text", "invalid_type")
            for name in variables:
                if name == "chat_template":
                    what = "a request may not bring its own (--trust-request-chat-template, at the start, lets it)"
                elif name in reserved or name in self._tokenizer.special_tokens:
                    what = "is not a variable of a template but a name of its renderer's"
                else:
                    continue
                raise bad_value(f"chat_template_kwargs.{name}", what, "unsupported_parameter")
        return own

    async def _render(
        self,
        template: str,
        messages: list[dict[str, Any]],
        variables: dict[str, Any],
        tools: list[dict[str, Any]] | None,
    ) -> str:
        bounds = self._bounds
        special_tokens = dict(self._tokenizer.special_tokens)
        rendering = Rendering(template, messages, variables, special_tokens, bounds.max_characters, tools)
        try:
            answer = await self._quick.ask(rendering, bounds.quick_cpu_s)
            if answer is None:
                if self.slow_renderings >= MAX_SLOW:
                    raise Refusal(
                        "overloaded",
                        f"overloaded: {self.slow_renderings} chats whose templates take long are being rendered",
                        retry_after_s=5,
                    )
                answer = await self._slow.ask(rendering, bounds.cpu_s)
        except RecursionError:
            raise TemplateRefused("gets variables that are nested too deeply") from None
        except WorkerEnded:
            raise TemplateRefused("cannot be rendered") from None
        if answer is None:
            raise TemplateRefused(f"takes more than {bounds.cpu_s:g} s of processor time to render")
        return text_of(answer)
