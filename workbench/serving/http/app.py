"""The HTTP endpoints."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from workbench.serving.engine.engine_client import Call, ClientGone, EngineClient
from workbench.serving.engine.wire import ControlAction
from workbench.serving.folders import profile_folder, weights_folder
from workbench.serving.http import protocol
from workbench.serving.http.native import GenerateRequest, GenerateShape, counts_of, with_request_id
from workbench.serving.http.openai_api import ChatShape, CompletionShape, Shape, error_event
from workbench.serving.http.prometheus import CONTENT_TYPE, Metrics
from workbench.serving.http.protocol import ApiError, Limits, Sampling, Sequences
from workbench.serving.http.request_headers import cache_salt, objective
from workbench.serving.http.request_ids import answered_as, checked, given_id
from workbench.serving.serve_settings import ServeSettings
from workbench.serving.sessions import CloseSessionRequest, OpenSessionRequest, check_name, check_turn, new_name
from workbench.serving.text.chat_templates import Bounds, ChatTemplates
from workbench.serving.text.prompts import Prompts
from workbench.serving.text.tokenizer import Tokenizer

Endpoint = Callable[[Request], Awaitable[Any]]
T = TypeVar("T")

MIN_CHAT_CHARACTERS = 1 << 20
"""A chat may become as long a text as a body may be, and this long at least, for templates add to it."""


class Answer:
    """The answer of a generation endpoint, as an ASGI application.

    Nothing is sent before the first event, so that a request which turns out not to be servable gets its status. Meanwhile
    the connection is watched: a client that goes takes its sequences with it.
    """

    def __init__(self, shape: Shape, stream: bool, metrics: Metrics) -> None:
        self._shape = shape
        self._stream = stream
        self._metrics = metrics
        self._begun = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        call = self._shape.call
        answered_as(scope, call.id)
        watcher = asyncio.create_task(_watch(call, receive))
        try:
            if self._stream:
                await self._send_events(send)
            else:
                await Response(await self._shape.whole(), media_type="application/json")(scope, receive, send)
        except ClientGone:
            pass
        except ApiError as error:
            self._metrics.refused(error.status)
            if self._begun:
                await send({"type": "http.response.body", "body": error_event(error)})
            else:
                await error_response(error)(scope, receive, send)
        finally:
            watcher.cancel()
            call.close()

    async def _send_events(self, send: Send) -> None:
        events = self._shape.stream()
        async for event in events:
            if not self._begun:
                self._begun = True
                headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
                await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


async def _watch(call: Call, receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    call.disconnected()


def json_response(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(value), status, headers, "application/json")


def error_response(error: ApiError) -> Response:
    headers = {} if error.retry_after_s is None else {"retry-after": str(error.retry_after_s)}
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return json_response(error.body, error.status, headers)


class Api:
    """The endpoints of one server."""

    def __init__(self, settings: ServeSettings, engine: EngineClient, tokenizer: Tokenizer, metrics: Metrics) -> None:
        self._settings = settings
        self._engine = engine
        self._tokenizer = tokenizer
        self._metrics = metrics
        self._created_s = int(time.time())
        self.chats = ChatTemplates(
            tokenizer, Bounds(max(settings.max_body_bytes, MIN_CHAT_CHARACTERS)), settings.trust_request_chat_template
        )
        ready = engine.ready.result()
        self._limits = Limits(
            ready.max_context,
            ready.kv_tokens,
            ready.vocab,
            ready.logprobs,
            ready.backend,
            settings.max_tokens,
            settings.run.ignore_eos,
        )
        self._prompts = Prompts(tokenizer, self._limits)

    def app(self) -> Starlette:
        """The application."""

        def route(path: str, method: str, endpoint: Endpoint, guarded: bool = True) -> Route:
            async def run(request: Request) -> Any:
                if guarded:
                    self._check_key(request)
                return await endpoint(request)

            return Route(path, run, methods=[method])

        routes = [
            route("/v1/models", "GET", self.models),
            route("/v1/models/{model:path}", "GET", self.model),
            route("/v1/completions", "POST", self.completions),
            route("/v1/chat/completions", "POST", self.chat),
            route("/generate", "POST", self.generate),
            route("/abort", "POST", self.abort),
            route("/health", "GET", self.health, guarded=False),
            route("/metrics", "GET", self.metrics, guarded=False),
            route("/state", "GET", self.state),
            route("/settings", "POST", self.change),
            route("/open_session", "POST", self.open_session),
            route("/close_session", "POST", self.close_session),
            route("/update_weights_from_disk", "POST", self.update_weights),
            route("/start_profile", "POST", self.start_profile),
            route("/stop_profile", "POST", self.stop_profile),
            *(route(f"/{name}", "POST", self._control(name)) for name in ("flush_cache", "pause", "resume")),
        ]
        handlers: Any = {
            ApiError: self._on_api_error,
            HTTPException: self._on_http_error,
            Exception: self._on_fault,
            ClientDisconnect: self._on_disconnect,
        }
        return Starlette(routes=routes, exception_handlers=handlers)

    # -- generation --------------------------------------------------------------------------------------------------

    async def completions(self, request: Request) -> Answer:
        asked: protocol.CompletionRequest = await self._parse(request, protocol.CompletionRequest)
        self._check_model(asked.model)
        logprobs = None if asked.logprobs is None else protocol.count(0, logprobs=asked.logprobs)
        counts = protocol.openai_counts(asked, protocol.COMPLETION_MAX_TOKENS, logprobs)
        given = self._prompts.listed(asked.prompt)
        n = protocol.choices(asked.n, len(given))
        prompts = await self._while_wanted(request, self._prompts.encoded(given, "prompt"))
        wanted = self._wanted(request, asked, asked, counts, prompts, n, given[0])
        return self._answer(asked, wanted, CompletionShape, "cmpl-")

    async def chat(self, request: Request) -> Answer:
        asked: protocol.ChatRequest = await self._parse(request, protocol.ChatRequest)
        self._check_model(asked.model)
        if asked.session_id is not None:
            raise ApiError(
                400,
                "session_id: a chat has its whole conversation in messages; /v1/completions and /generate "
                "continue sessions",
                param="session_id",
                code="unsupported_parameter",
            )
        messages = protocol.chat_messages(asked.messages)
        counts = protocol.openai_counts(asked, self._limits.default_max_tokens, protocol.chat_logprob_count(asked))

        async def prompt_of_chat() -> list[int]:
            return await self._prompts.chat(await self.chats.text(messages, asked.chat_template_kwargs or {}))

        prompt = await self._while_wanted(request, prompt_of_chat())
        n = protocol.choices(asked.n, 1)
        wanted = self._wanted(request, asked, asked, counts, [prompt], n)
        return self._answer(asked, wanted, ChatShape, "chatcmpl-")

    async def generate(self, request: Request) -> Answer:
        asked: GenerateRequest = await self._parse(request, GenerateRequest)
        asked = with_request_id(asked)
        sampling, counts = asked.sampling_params or Sampling(), counts_of(asked, self._limits.default_max_tokens)
        if (asked.input_ids is None) == (asked.text is None):
            raise ApiError(
                400, "input_ids: give exactly one of input_ids and text", param="input_ids", code="invalid_value"
            )
        given, param = (asked.input_ids or [], "input_ids") if asked.text is None else (asked.text, "text")
        (prompt,) = await self._while_wanted(request, self._prompts.encoded([given], param))
        wanted = self._wanted(request, asked, sampling, counts, [prompt], 1, asked.text)
        call = self._engine.submit(wanted, "gen-")
        return Answer(GenerateShape(call, self._settings.model_name, asked), bool(asked.stream), self._metrics)

    def _wanted(
        self,
        request: Request,
        asked: protocol.Asked,
        sampling: Sampling,
        counts: protocol.Counts,
        prompts: list[list[int]],
        n: int,
        given: str | list[int] | None = None,
    ) -> Sequences:
        """``given`` is the prompt as it was given, of requests that may continue a session."""
        wanted = Sequences(
            prompts,
            protocol.sampling_params(sampling, counts, self._limits),
            protocol.stop_strings(sampling.stop),
            n,
            protocol.check_priority(asked.priority),
            sampling.skip_special_tokens is not False,
            checked("request_id", asked.request_id),
            session="" if asked.session_id is None else check_name(asked.session_id),
            bos_tokens=self._tokenizer.bos_tokens if isinstance(given, str) else 0,
            cache_salt=cache_salt(asked),
            slo_ttft_s=objective("slo_ttft_s", asked, request.headers),
            slo_tpot_s=objective("slo_tpot_s", asked, request.headers),
            label=given_id(request.headers),
        )
        check_turn(wanted)
        return wanted

    def _answer(self, asked: protocol.OpenAISampling, wanted: Sequences, shape: type[Shape], prefix: str) -> Answer:
        if asked.stream_options is not None and not asked.stream:
            raise ApiError(
                400, "stream_options: only with stream set to true", param="stream_options", code="invalid_value"
            )
        options = asked.stream_options or protocol.StreamOptions()
        call = self._engine.submit(wanted, prefix)
        made = shape(
            call,
            self._settings.model_name,
            include_usage=bool(options.include_usage),
            continuous_usage=bool(options.continuous_usage_stats),
            tokens_as_ids=bool(asked.return_tokens_as_token_ids),
            logprobs=wanted.params.logprobs is not None,
        )
        return Answer(made, bool(asked.stream), self._metrics)

    async def _while_wanted(self, request: Request, work: Coroutine[Any, Any, T]) -> T:
        """Do ``work`` for a request whose body has been read. It ends when the client goes, or when the server takes no
        requests any more. Raises ClientDisconnect or ApiError then."""
        working = asyncio.ensure_future(work)
        gone, refusing = asyncio.ensure_future(request.receive()), asyncio.ensure_future(self._engine.refusing.wait())
        try:
            await asyncio.wait((working, gone, refusing), return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                return working.result()
            raise self._engine.refusal or ClientDisconnect()
        finally:
            for task in (working, gone, refusing):
                task.cancel()

    # -- the rest ----------------------------------------------------------------------------------------------------

    async def models(self, request: Request) -> Response:
        return json_response({"object": "list", "data": [self._model_card()]})

    async def model(self, request: Request) -> Response:
        self._check_model(request.path_params["model"])
        return json_response(self._model_card())

    def _model_card(self) -> dict[str, Any]:
        return {
            "id": self._settings.model_name,
            "object": "model",
            "created": self._created_s,
            "owned_by": "workbench",
            "max_model_len": self._limits.max_context,
        }

    async def health(self, request: Request) -> Response:
        refusal = self._engine.refusal
        if refusal is not None:
            return error_response(refusal)
        why = self._engine.silence(self._settings.stuck_after_s)
        if why is not None:
            return error_response(ApiError(503, why, kind="server_error", code="stuck"))
        return json_response({"status": "ok"})

    async def metrics(self, request: Request) -> Response:
        return Response(self._metrics.text(), headers={"content-type": CONTENT_TYPE})

    async def abort(self, request: Request) -> Response:
        asked: protocol.AbortRequest = await self._parse(request, protocol.AbortRequest)
        if (asked.request_id is None) != asked.all:
            raise protocol.bad_value("request_id", "give it, or all set to true")
        return json_response({"aborted": self._engine.abort_id(asked.request_id)})

    async def state(self, request: Request) -> Response:
        return json_response(await self._engine.state())

    async def change(self, request: Request) -> Response:
        await self._engine.change(protocol.parse_settings(await self._body(request)))
        return json_response(await self._engine.state())

    async def open_session(self, request: Request) -> Response:
        asked: OpenSessionRequest = await self._parse(request, OpenSessionRequest)
        name = new_name(asked.session_id)
        await self._engine.session(name, "open")
        return json_response({"session_id": name})

    async def close_session(self, request: Request) -> Response:
        asked: CloseSessionRequest = await self._parse(request, CloseSessionRequest)
        await self._engine.session(check_name(asked.session_id), "close")
        return json_response({"session_id": asked.session_id})

    async def update_weights(self, request: Request) -> Response:
        asked: protocol.UpdateWeightsRequest = await self._parse(request, protocol.UpdateWeightsRequest)
        await self._engine.load_weights(weights_folder(self._settings, asked.model_path))
        return json_response({"success": True, "message": f"serving the weights of {asked.model_path}"})

    async def start_profile(self, request: Request) -> Response:
        asked: protocol.StartProfileRequest = await self._parse(request, protocol.StartProfileRequest)
        steps = asked.num_steps
        if steps is not None and not 1 <= steps < 1 << 31:
            raise protocol.bad_value("num_steps", f"{steps} is {'less than 1' if steps < 1 else 'too large'}")
        await self._engine.start_profile(profile_folder(self._settings, asked.output_dir), steps)
        return json_response({"status": "ok"})

    async def stop_profile(self, request: Request) -> Response:
        return json_response({"status": "ok", "files": await self._engine.stop_profile()})

    def _control(self, action: ControlAction) -> Endpoint:
        async def run(request: Request) -> Response:
            await self._engine.control(action)
            return json_response({"status": "ok"})

        return run

    # -- checks ------------------------------------------------------------------------------------------------------

    def _check_key(self, request: Request) -> None:
        key = self._settings.api_key
        if key is None:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        right = hmac.compare_digest(given.strip().encode("latin-1"), key.encode())
        if scheme.lower() != "bearer" or not right:
            raise ApiError(401, "wrong or missing API key", code="invalid_api_key")

    def _check_model(self, name: str | None) -> None:
        if name is not None and name != self._settings.model_name:
            raise ApiError(
                404,
                f"the model {name!r} does not exist; this server has {self._settings.model_name!r}",
                param="model",
                code="model_not_found",
            )

    async def _parse(self, request: Request, kind: Any) -> Any:
        return protocol.parse(await self._body(request), kind)

    async def _body(self, request: Request) -> bytes:
        limit = self._settings.max_body_bytes
        too_large = ApiError(413, f"the body is larger than {limit} bytes", code="request_too_large")
        length = request.headers.get("content-length", "")
        if length.isdigit() and int(length) > limit:
            raise too_large
        body = bytearray()
        async for piece in request.stream():
            body += piece
            if len(body) > limit:
                raise too_large
        return bytes(body)

    # -- errors ------------------------------------------------------------------------------------------------------

    async def _on_api_error(self, request: Request, error: ApiError) -> Response:
        self._metrics.refused(error.status)
        return error_response(error)

    async def _on_http_error(self, request: Request, error: HTTPException) -> Response:
        self._metrics.refused(error.status_code)
        made = ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}")
        response = error_response(made)
        response.headers.update(error.headers or {})
        return response

    async def _on_fault(self, request: Request, error: Exception) -> Response:
        self._metrics.refused(500)
        return error_response(ApiError(500, "internal error", kind="server_error"))

    async def _on_disconnect(self, request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=499)
