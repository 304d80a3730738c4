"""The service between a protocol and the engine: neutral requests in, results or refusals out.

What speaks a protocol (``http/``) turns bodies into a :class:`ServiceRequest`, and what comes back into its own shapes.
Nothing here knows of status codes, headers or JSON.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

from workbench.scheduler.config import Role
from workbench.serving.engine.engine_client import EngineClient
from workbench.serving.folders import profile_folder, weights_folder
from workbench.serving.open_request import OpenRequest
from workbench.serving.outputs.tools import ToolUse
from workbench.serving.outputs.writing import Writing
from workbench.serving.refusals import Refusal, bad_value
from workbench.serving.requests import (
    PAIRS_HAVE_NONE,
    ControlAction,
    Limits,
    ServiceRequest,
    check_session,
    new_session,
)
from workbench.serving.serve_settings import ServeSettings
from workbench.serving.structured.compiler import GrammarCompiler
from workbench.serving.structured.formats import OutputFormat
from workbench.serving.text.chat_templates import Bounds, ChatTemplates
from workbench.serving.text.prompts import Prompts, SpelledPrompt, spell
from workbench.serving.text.tokenizer import Decoder, Tokenizer, load_decoder
from workbench.serving.threads import in_thread

PROMPT_END = 100
"""Characters of a conversation that tell whether its answer goes on with reasoning."""
MIN_CHAT_CHARACTERS = 1 << 20
"""A chat may become as long a text as a body may be, and this long at least, for templates add to it."""


class Service:
    """One model behind one scheduler. The engine has to be ready. Whatever cannot be done raises Refusal."""

    def __init__(self, settings: ServeSettings, engine: EngineClient, tokenizer: Tokenizer) -> None:
        self._settings = settings
        self._engine = engine
        self._ready = ready = engine.ready.result()
        self.model_name = settings.model_name
        self.limits = Limits(
            ready.capacity,
            ready.vocab,
            ready.logprobs,
            ready.backend,
            settings.max_tokens,
            settings.run.ignore_eos,
            ready.role,
        )
        self.bos_tokens = tokenizer.bos_tokens
        engine.serialised = self._serialised = tokenizer.serialised()
        self._grammars = GrammarCompiler()
        self.writing = Writing.of(settings.tool_parser, settings.reasoning_parser, tokenizer.chat_template)
        """Leading tokens that the text of a prompt gets: its :attr:`ServiceRequest.bos_tokens`."""
        self.prompts = Prompts(tokenizer, self.limits)
        self.chats = ChatTemplates(
            tokenizer, Bounds(max(settings.max_body_bytes, MIN_CHAT_CHARACTERS)), settings.trust_request_chat_template
        )

    # -- generation --------------------------------------------------------------------------------------------------

    def check_model(self, name: str | None) -> None:
        """Raise Refusal for a request that names another model."""
        if name is not None and name != self.model_name:
            raise Refusal(
                "model_not_found", f"the model {name!r} does not exist; this server has {self.model_name!r}", "model"
            )

    async def spelled(self, prompts: list[list[int]], bos_tokens: int) -> list[SpelledPrompt]:
        """Return prompts as text. ``bos_tokens`` at the beginning of each are not part of it."""
        return await in_thread(lambda: [spell(self._decoder, prompt, bos_tokens) for prompt in prompts])

    @cached_property
    def _decoder(self) -> Decoder:
        return load_decoder(self._serialised)

    async def chat_prompt(
        self,
        messages: list[dict[str, Any]],
        template_variables: dict[str, Any],
        max_new_tokens: int,
        use: ToolUse | None,
        parameter: str,
    ) -> tuple[list[int], str]:
        """Return a conversation that the assistant is to continue: its token ids, and the end of its text. ``parameter`` is
        what the client calls it. Raises Refusal."""
        if use is not None and use.choice == "auto" and self.writing.tools is None:
            raise bad_value(
                "tools",
                "the chat template does not show how the model writes calls; --tool-parser, at the start, says so",
                "unsupported_parameter",
            )
        tools = None if use is None else [tool.definition for tool in use.tools]
        text = await self.chats.text(messages, template_variables, tools, parameter)
        return await self.prompts.chat(text, max_new_tokens, parameter), text[-PROMPT_END:]

    async def grammar(self, asked: OutputFormat) -> str:
        """Return the grammar of an output, which is compiled in a process of its own. Raises Refusal that says where it is
        wrong."""
        if self._ready.no_grammars:
            raise bad_value(asked.parameter, self._ready.no_grammars, "unsupported_parameter")
        return await self._grammars.grammar(asked)

    def submit(self, asked: ServiceRequest, prefix: str) -> OpenRequest:
        """Begin to answer a request, whose id begins with ``prefix`` if it brings none."""
        asked.check(self.limits)
        return self._engine.submit(asked, prefix)

    def abort(self, request_id: str | None) -> int:
        """Abort requests by their id or label, or all (None); returns how many that were."""
        return self._engine.abort_id(request_id)

    async def taken_no_more(self) -> Refusal:
        """Wait until the server takes no requests any more, and return why."""
        await self._engine.refusing.wait()
        refusal = self._engine.refusal
        assert refusal is not None
        return refusal

    # -- the whole ---------------------------------------------------------------------------------------------------

    def check_health(self) -> None:
        """Raise Refusal while no answer can be expected."""
        if self._engine.refusal is not None:
            raise self._engine.refusal
        why = self._engine.silence(self._settings.stuck_after_s)
        if why is not None:
            raise Refusal("stuck", why)

    async def control(self, action: ControlAction) -> None:
        """Flush the prefix cache, pause or resume."""
        await self._engine.control(action)

    @property
    def role(self) -> Role:
        """What the instance is there for."""
        return self._ready.role

    def info(self) -> dict[str, Any]:
        """Return what a router has to know of this server, which does not change while it runs."""
        ready = self._ready
        return {
            "role": ready.role,
            "peer": ready.peer,
            "model": self.model_name,
            "page_size": ready.page_size,
            "kv_dtype": ready.kv_dtype,
            "max_running": ready.max_running,
            "kv_tokens": ready.kv_tokens,
            "max_context": ready.capacity.max_context,
            "instance_id": ready.instance_id,
        }

    async def state(self) -> dict[str, Any]:
        """Return how the scheduler stands."""
        return await self._engine.state()

    async def change(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Go on with other settings of the scheduler, all of them or none; returns how it stands then."""
        await self._engine.change(settings)
        return await self._engine.state()

    async def open_session(self, name: str | None) -> str:
        """Begin a session and return its name, which is made up where none is asked for."""
        if self._ready.role != "both":
            raise bad_value("session_id", PAIRS_HAVE_NONE, "unsupported_parameter")
        session = new_session(name)
        await self._engine.session(session, "open")
        return session

    async def close_session(self, name: str) -> None:
        """Forget a session, while a request of it goes on."""
        await self._engine.session(check_session(name), "close")

    async def load_weights(self, path: str) -> None:
        """Go on with the weights in the folder that a client calls ``path``."""
        if self._ready.role != "both":
            raise bad_value(
                "model_path",
                f"an instance of role {self._ready.role} shares KV with others, which have the weights that it was started "
                "with; start it anew",
                "unsupported_parameter",
            )
        await self._engine.load_weights(weights_folder(self._settings.weights_dir, path))

    async def start_profile(self, path: str, steps: int | None) -> None:
        """Profile the batches to come into the folder that a client calls ``path``; ``steps`` None: until it is stopped."""
        if steps is not None and not 1 <= steps < 1 << 31:
            raise bad_value("num_steps", f"{steps} is {'less than 1' if steps < 1 else 'too large'}")
        if self._ready.profiles:
            path = profile_folder(self._settings.profile_dir, path)
        await self._engine.start_profile(path, steps)

    async def stop_profile(self) -> list[str]:
        """Write the profile and return its files."""
        return await self._engine.stop_profile()

    async def warm(self) -> None:
        """Start what the first request would otherwise wait for."""
        await self.chats.warm()

    def close(self) -> None:
        """End what would outlive the server."""
        self.chats.close()
        self._grammars.close()
