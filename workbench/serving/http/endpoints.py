"""The HTTP endpoints."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from workbench.serving.http import bodies
from workbench.serving.http.chats import chat_messages, tool_use
from workbench.serving.http.doors import check_key, error_handlers, read_body
from workbench.serving.http.errors import api_error, error_event, error_response, json_response
from workbench.serving.http.half_answer import HandoverShape
from workbench.serving.http.metrics_page import CONTENT_TYPE, MetricsPage
from workbench.serving.http.native import GenerateRequest, GenerateShape, counts_of, with_request_id
from workbench.serving.http.openai_api import Apart, ChatShape, CompletionShape, Echo, Shape
from workbench.serving.http.output_format import output_format
from workbench.serving.http.request_headers import objective_of, shared_of
from workbench.serving.http.request_ids import answered_as, given_id
from workbench.serving.http.responses_api import (
    ResponseShape,
    ResponsesRequest,
    conversation,
    form_of,
    tools_of,
)
from workbench.serving.open_request import ClientGone, OpenRequest
from workbench.serving.refusals import Refusal, bad_value
from workbench.serving.requests import ControlAction, ServiceRequest, check_choices
from workbench.serving.sampling_params import Counts, Sampling, count, sampling_params, stop_strings
from workbench.serving.serve_settings import ServeSettings
from workbench.serving.service import Service
from workbench.serving.structured.formats import OutputFormat

Endpoint = Callable[[Request], Awaitable[Any]]
T = TypeVar("T")


class Answer:
    """The answer of a generation endpoint, as an ASGI application.

    Nothing is sent before the first event, so that a request which turns out not to be servable gets its status. Meanwhile
    the connection is watched: a client that goes takes its sequences with it.
    """

    def __init__(self, shape: Shape, stream: bool, page: MetricsPage) -> None:
        self._shape = shape
        self._stream = stream
        self._page = page
        self._begun = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = self._shape.request
        answered_as(scope, request.id)
        watcher = asyncio.create_task(_watch(request, receive))
        try:
            if self._stream:
                await self._send_events(send)
            else:
                await Response(await self._shape.whole(), media_type="application/json")(scope, receive, send)
        except ClientGone:
            pass
        except Refusal as refusal:
            error = api_error(refusal)
            self._page.refused(error.status)
            if self._begun:
                await send({"type": "http.response.body", "body": error_event(error)})
            else:
                await error_response(error)(scope, receive, send)
        finally:
            watcher.cancel()
            request.close()

    async def _send_events(self, send: Send) -> None:
        events = self._shape.stream()
        async for event in events:
            if not self._begun:
                self._begun = True
                headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
                await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


async def _watch(request: OpenRequest, receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    request.disconnected()


class Api:
    """The endpoints of one server."""

    def __init__(self, settings: ServeSettings, service: Service, page: MetricsPage) -> None:
        self._settings = settings
        self._service = service
        self._page = page
        self._created_s = int(time.time())

    def app(self) -> Starlette:
        """The application."""

        def route(path: str, method: str, endpoint: Endpoint, guarded: bool = True) -> Route:
            async def run(request: Request) -> Any:
                if guarded:
                    check_key(request.headers, self._settings.api_key)
                return await endpoint(request)

            return Route(path, run, methods=[method])

        routes = [
            route("/v1/models", "GET", self.models),
            route("/v1/models/{model:path}", "GET", self.model),
            route("/v1/completions", "POST", self.completions),
            route("/v1/chat/completions", "POST", self.chat),
            route("/v1/responses", "POST", self.responses),
            route("/generate", "POST", self.generate),
            route("/abort", "POST", self.abort),
            route("/health", "GET", self.health, guarded=False),
            route("/metrics", "GET", self.metrics, guarded=False),
            route("/server_info", "GET", self.server_info),
            route("/state", "GET", self.state),
            route("/settings", "POST", self.change),
            route("/open_session", "POST", self.open_session),
            route("/close_session", "POST", self.close_session),
            route("/update_weights_from_disk", "POST", self.update_weights),
            route("/start_profile", "POST", self.start_profile),
            route("/stop_profile", "POST", self.stop_profile),
            *(route(f"/{name}", "POST", self._control(name)) for name in ("flush_cache", "pause", "resume")),
        ]
        return Starlette(routes=routes, exception_handlers=error_handlers(self._page.refused))

    # -- generation --------------------------------------------------------------------------------------------------

    async def completions(self, request: Request) -> Answer:
        asked: bodies.CompletionRequest = await self._parse(request, bodies.CompletionRequest)
        self._service.check_model(asked.model)
        logprobs = None if asked.logprobs is None else count(0, logprobs=asked.logprobs)
        counts = bodies.openai_counts(asked, bodies.COMPLETION_MAX_TOKENS, logprobs)
        most = counts.max_tokens.tokens
        given = self._service.prompts.listed(asked.prompt, most)
        n = _choices(asked)
        check_choices(n, len(given))
        prompts = await self._while_wanted(request, self._service.prompts.encoded(given, most, "prompt"))
        bos_tokens = self._service.bos_tokens if isinstance(given[0], str) else 0
        form = output_format(asked)
        wanted = await self._wanted(request, asked, asked, counts, prompts, n, "prompt", form, bos_tokens)
        if not asked.echo:
            return self._answer(asked, wanted, CompletionShape, "cmpl-")
        for name, value in (("stream", asked.stream), ("session_id", asked.session_id)):
            if value:
                raise bad_value("echo", f"does not go with {name}")
        wanted = dataclasses.replace(
            wanted, params=dataclasses.replace(wanted.params, prompt_logprobs=wanted.params.logprobs)
        )
        wanted.check(self._service.limits)
        spelled = await self._while_wanted(request, self._service.spelled(prompts, bos_tokens))
        echoes = [
            Echo(one if isinstance(one, str) else told.text, told.offsets, prompt[0], *told.first)
            for one, prompt, told in zip(given, prompts, spelled, strict=True)
        ]
        return self._answer(asked, wanted, partial(CompletionShape, echoes=echoes), "cmpl-")

    async def chat(self, request: Request) -> Answer:
        asked: bodies.ChatRequest = await self._parse(request, bodies.ChatRequest)
        self._service.check_model(asked.model)
        if asked.session_id is not None:
            raise bad_value(
                "session_id",
                "a chat has its whole conversation in messages; /v1/completions and /generate continue sessions",
                "unsupported_parameter",
            )
        n = _choices(asked)
        check_choices(n, 1)
        messages = chat_messages(asked.messages)
        use, form = tool_use(asked.tools, asked.tool_choice, asked.parallel_tool_calls), output_format(asked)
        if use is not None and form is not None:
            raise bad_value("tools", f"do not go with {form.parameter}: an answer of that form calls none of them")
        counts = bodies.openai_counts(asked, self._service.limits.default_max_tokens, bodies.chat_logprob_count(asked))
        prompt, end = await self._while_wanted(
            request,
            self._service.chat_prompt(
                messages, asked.chat_template_kwargs or {}, counts.max_tokens.tokens, use, "messages"
            ),
        )
        writing = self._service.writing
        reads = writing.reads(use, asked.separate_reasoning is not False, form is not None)
        form = form or (use.forced() if use is not None else None)
        wanted = await self._wanted(request, asked, asked, counts, [prompt], n, "messages", form)
        apart = None
        if reads.parser is not None:
            called = "stop" if use is not None and use.choice == "named" else "tool_calls"
            parsers = [reads.parser_for(use, end) for _ in range(n)]
            apart = Apart(
                [parser for parser in parsers if parser is not None],
                writing.id_characters,
                asked.include_reasoning is not False,
                called,
            )
            if reads.special:
                wanted = dataclasses.replace(wanted, skip_special_tokens=False)
        return self._answer(asked, wanted, partial(ChatShape, apart=apart), "chatcmpl-")

    async def responses(self, request: Request) -> Answer:
        asked: ResponsesRequest = await self._parse(request, ResponsesRequest)
        self._service.check_model(asked.model)
        if asked.session_id is not None:
            raise bad_value("session_id", "a response has its whole conversation in input", "unsupported_parameter")
        messages, use, form = conversation(asked), tools_of(asked), form_of(asked)
        if use is not None and form is not None:
            raise bad_value("tools", f"do not go with {form.parameter}: an answer of that form calls none of them")
        given = {"max_output_tokens": asked.max_output_tokens, "max_tokens": asked.max_tokens}
        most = count(self._service.limits.default_max_tokens, **given)
        counts = Counts(most, count(0, min_tokens=asked.min_tokens), None)
        prompt, end = await self._while_wanted(
            request, self._service.chat_prompt(messages, asked.chat_template_kwargs or {}, most.tokens, use, "input")
        )
        writing = self._service.writing
        reads = writing.reads(use, True, form is not None)
        form = form or (use.forced() if use is not None else None)
        wanted = await self._wanted(request, asked, asked, counts, [prompt], 1, "input", form)
        if reads.special:
            wanted = dataclasses.replace(wanted, skip_special_tokens=False)
        params = wanted.params
        sampling = {
            "temperature": params.temperature,
            "top_p": params.top_p,
            "max_output_tokens": asked.max_output_tokens,
        }
        parser = reads.parser_for(use, end)
        opened = self._service.submit(wanted, "resp_")
        shape = ResponseShape(opened, self._service.model_name, asked, parser, writing.id_characters, sampling)
        return self._answering(shape, asked.stream)

    async def generate(self, request: Request) -> Answer:
        asked: GenerateRequest = await self._parse(request, GenerateRequest)
        asked = with_request_id(asked)
        sampling = asked.sampling_params or Sampling()
        counts = counts_of(asked, self._service.limits.default_max_tokens)
        if (asked.input_ids is None) == (asked.text is None):
            raise bad_value("input_ids", "give exactly one of input_ids and text")
        given: str | list[int]
        given, parameter = (asked.input_ids or [], "input_ids") if asked.text is None else (asked.text, "text")
        (prompt,) = await self._while_wanted(
            request, self._service.prompts.encoded([given], counts.max_tokens.tokens, parameter)
        )
        bos_tokens = self._service.bos_tokens if asked.text is not None else 0
        form = output_format(sampling, "sampling_params.")
        wanted = await self._wanted(request, asked, sampling, counts, [prompt], 1, parameter, form, bos_tokens)
        opened = self._service.submit(wanted, "gen-")
        return self._answering(GenerateShape(opened, self._service.model_name, asked), asked.stream)

    async def _wanted(
        self,
        request: Request,
        asked: bodies.Asked,
        sampling: Sampling,
        counts: Counts,
        prompts: list[list[int]],
        n: int,
        prompt_parameter: str,
        form: OutputFormat | None,
        bos_tokens: int = 0,
    ) -> ServiceRequest:
        """Return what the service is asked for. ``bos_tokens`` of the prompt are left out where it continues a session;
        ``form`` is that of the output, None: any."""
        shared = shared_of(self._service.role, request.headers)
        params = sampling_params(sampling, counts, self._service.limits)
        grammar = ""
        if form is not None:
            for name, value in (("ignore_eos", sampling.ignore_eos), counts.min_tokens):
                if value:
                    raise bad_value(name, f"does not go with {form.parameter}, which says where an output ends")
            params = dataclasses.replace(params, ignore_eos=False)
            grammar = await self._while_wanted(request, self._service.grammar(form))
        return ServiceRequest(
            prompts,
            params,
            stop_strings(sampling.stop),
            n,
            asked.priority or 0,
            sampling.skip_special_tokens is not False,
            asked.request_id,
            given_id(request.headers),
            asked.session_id,
            bos_tokens,
            asked.cache_salt,
            objective_of("slo_ttft_s", asked, request.headers),
            objective_of("slo_tpot_s", asked, request.headers),
            prompt_parameter,
            grammar,
            bool(getattr(sampling, "include_stop_str_in_output", None) or getattr(sampling, "no_stop_trim", None)),
            shared,
        )

    def _answer(
        self, asked: bodies.OpenAISampling, wanted: ServiceRequest, shape: Callable[..., Shape], prefix: str
    ) -> Answer:
        if asked.stream_options is not None and not asked.stream:
            raise bad_value("stream_options", "only with stream set to true")
        options = asked.stream_options or bodies.StreamOptions()
        made = shape(
            self._service.submit(wanted, prefix),
            self._service.model_name,
            include_usage=bool(options.include_usage),
            continuous_usage=bool(options.continuous_usage_stats),
            tokens_as_ids=bool(asked.return_tokens_as_token_ids),
            logprobs=wanted.params.logprobs is not None,
            prompt_ids=wanted.prompts if asked.return_token_ids else None,
        )
        return self._answering(made, asked.stream)

    def _answering(self, shape: Shape, stream: bool | None) -> Answer:
        if self._service.role == "prefill":
            shape, stream = HandoverShape(shape.request, self._service.model_name), False
        return Answer(shape, bool(stream), self._page)

    async def _while_wanted(self, request: Request, work: Coroutine[Any, Any, T]) -> T:
        """Do ``work`` for a request whose body has been read. It ends when the client goes, or when the server takes no
        requests any more. Raises ClientDisconnect or Refusal then."""
        working = asyncio.ensure_future(work)
        gone, refusing = asyncio.ensure_future(request.receive()), asyncio.ensure_future(self._service.taken_no_more())
        try:
            await asyncio.wait((working, gone, refusing), return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                return working.result()
            raise refusing.result() if refusing.done() else ClientDisconnect()
        finally:
            for task in (working, gone, refusing):
                task.cancel()

    # -- the rest ----------------------------------------------------------------------------------------------------

    async def models(self, request: Request) -> Response:
        return json_response({"object": "list", "data": [self._model_card()]})

    async def model(self, request: Request) -> Response:
        self._service.check_model(request.path_params["model"])
        return json_response(self._model_card())

    def _model_card(self) -> dict[str, Any]:
        return {
            "id": self._service.model_name,
            "object": "model",
            "created": self._created_s,
            "owned_by": "workbench",
            "max_model_len": self._service.limits.capacity.max_context,
        }

    async def health(self, request: Request) -> Response:
        try:
            self._service.check_health()
        except Refusal as refusal:  # an answer to a question, not to be counted as a request refused
            return error_response(api_error(refusal))
        return json_response({"status": "ok"})

    async def metrics(self, request: Request) -> Response:
        return Response(self._page.text(), headers={"content-type": CONTENT_TYPE})

    async def abort(self, request: Request) -> Response:
        asked: bodies.AbortRequest = await self._parse(request, bodies.AbortRequest)
        if (asked.request_id is None) != asked.all:
            raise bad_value("request_id", "give it, or all set to true")
        return json_response({"aborted": self._service.abort(asked.request_id)})

    async def server_info(self, request: Request) -> Response:
        return json_response(self._service.info())

    async def state(self, request: Request) -> Response:
        return json_response(await self._service.state())

    async def change(self, request: Request) -> Response:
        return json_response(await self._service.change(bodies.parse_settings(await self._body(request))))

    async def open_session(self, request: Request) -> Response:
        asked: bodies.OpenSessionRequest = await self._parse(request, bodies.OpenSessionRequest)
        return json_response({"session_id": await self._service.open_session(asked.session_id)})

    async def close_session(self, request: Request) -> Response:
        asked: bodies.CloseSessionRequest = await self._parse(request, bodies.CloseSessionRequest)
        await self._service.close_session(asked.session_id)
        return json_response({"session_id": asked.session_id})

    async def update_weights(self, request: Request) -> Response:
        asked: bodies.UpdateWeightsRequest = await self._parse(request, bodies.UpdateWeightsRequest)
        await self._service.load_weights(asked.model_path)
        return json_response({"success": True, "message": f"serving the weights of {asked.model_path}"})

    async def start_profile(self, request: Request) -> Response:
        asked: bodies.StartProfileRequest = await self._parse(request, bodies.StartProfileRequest)
        await self._service.start_profile(asked.output_dir, asked.num_steps)
        return json_response({"status": "ok"})

    async def stop_profile(self, request: Request) -> Response:
        return json_response({"status": "ok", "files": await self._service.stop_profile()})

    def _control(self, action: ControlAction) -> Endpoint:
        async def run(request: Request) -> Response:
            await self._service.control(action)
            return json_response({"status": "ok"})

        return run

    # -- checks ------------------------------------------------------------------------------------------------------

    async def _parse(self, request: Request, kind: Any) -> Any:
        return bodies.parse(await self._body(request), kind)

    async def _body(self, request: Request) -> bytes:
        return await read_body(request, self._settings.max_body_bytes)


def _choices(asked: bodies.OpenAISampling) -> int:
    return 1 if asked.n is None else asked.n
