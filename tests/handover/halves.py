"""Scheduler processes of servers as threads of the test's process, for instances that prefill or decode alone: everything of
theirs is real but HTTP and the text."""

from __future__ import annotations

import threading
import uuid
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import zmq

from tests.patience import PATIENCE_S, until
from workbench.scheduler.config import Role
from workbench.scheduler.request import SamplingParams
from workbench.serving.engine import scheduler_process
from workbench.serving.serve_settings import ServeSettings
from workbench.serving.wire import (
    Addresses,
    Ask,
    Beat,
    Cancel,
    Done,
    Failed,
    Opened,
    Pulse,
    Ready,
    Shutdown,
    Step,
    Submit,
    decode_to_detokenizer,
    decode_to_http,
    encode,
    pull_socket,
    push_socket,
)
from workbench.settings.run_settings import RunSettings

ROUTER = "router"


@dataclass
class Answer:
    """What came of a sequence."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[Any] = field(default_factory=list)
    cached_tokens: int = 0
    kind: str = ""
    detail: str = ""


class Half:
    """One instance. To be called from the test's thread alone."""

    def __init__(self, context: Any, run: RunSettings, role: Role, text: Any = None, **settings: Any) -> None:
        name = uuid.uuid4().hex
        self._addresses = Addresses(*(f"inproc://{name}-{part}" for part in ("scheduler", "detokenizer", "http")))
        self._out, self._http = (
            pull_socket(context, self._addresses.detokenizer),
            pull_socket(context, self._addresses.http),
        )
        asked = ServeSettings(run, role=role, **{"backend": "cpu", **settings})
        self._failure: BaseException | None = None

        def work() -> None:
            http = push_socket(context, self._addresses.http)
            try:
                scheduler_process._run(asked, self._addresses, text, context, http)
            except BaseException as error:
                self._failure = error
            finally:
                http.close()

        self.thread = threading.Thread(target=work, name=role)
        self.thread.start()
        self.answers: dict[int, Answer] = {}
        self.ready: Ready = self._await(Ready)
        self._in = push_socket(context, self._addresses.scheduler)
        self._numbers = 0

    def _await(self, kind: type) -> Any:
        while True:
            until(lambda: self._http.poll(100) or not self.thread.is_alive(), f"a {kind.__name__} comes")
            if not self._http.poll(0):
                raise RuntimeError(f"{self.thread.name} has ended") from self._failure
            message = decode_to_http(self._http.recv())
            if isinstance(message, Failed):
                raise RuntimeError(message.line)
            if isinstance(message, kind):
                return message
            assert isinstance(message, Beat | Pulse | Ready | Done)

    def submit(
        self, prompt: list[int], params: SamplingParams, room: int = -1, other: Half | None = None, peer: str = ""
    ) -> int:
        """Begin a sequence; returns its number."""
        number = self._numbers = self._numbers + 1
        self.answers[number] = Answer()
        self._in.send(
            encode(
                Submit(
                    number,
                    f"r{number}",
                    np.array(prompt, np.int32).tobytes(),
                    params,
                    0.0,
                    0,
                    (),
                    True,
                    router=ROUTER if room >= 0 else "",
                    room=max(room, 0),
                    peer=(other.ready.peer if other is not None else peer) or "",
                )
            )
        )
        return number

    def cancel(self, number: int) -> None:
        self._in.send(encode(Cancel(f"r{number}", "client")))

    def beat(self) -> Beat:
        """A sign of life that was made after this was asked for."""
        self.state()
        found = None
        while found is None or self._http.poll(0):
            found = self._await(Beat)
        return found

    def await_rest(self) -> None:
        """Until nothing of any request is left."""

        def rests() -> bool:
            beat = self._await(Beat)
            return not (beat.waiting or beat.running or beat.kv_used_tokens)

        until(rests, "the half comes to rest")

    def state(self) -> dict[str, Any]:
        """How the scheduler stands."""
        self._in.send(encode(Ask(1)))
        state = self._await(Done).state
        assert state is not None
        return state

    def read(self, *numbers: int) -> list[Answer]:
        """Take in what comes until these have ended."""
        while any(not self.answers[number].kind for number in numbers):
            self._take()
        return [self.answers[number] for number in numbers]

    def read_tokens(self, number: int, least: int) -> None:
        """Take in what comes until a sequence has so many tokens."""
        while len(self.answers[number].tokens) < least:
            self._take()

    def _take(self) -> None:
        assert self._out.poll(PATIENCE_S * 1000), f"nothing came: {self.answers}, {self._failure}"
        message = decode_to_detokenizer(self._out.recv())
        if not isinstance(message, Step):
            assert isinstance(message, Opened | Pulse | Shutdown)
            return
        numbers = np.frombuffer(message.sequences, np.int64).tolist()
        for number, token in zip(numbers, np.frombuffer(message.tokens, np.int32).tolist(), strict=True):
            assert not self.answers[number].kind, "a token came after the end"
            self.answers[number].tokens.append(token)
        for number, found in (message.logprobs or {}).items():
            self.answers[number].logprobs += found
        for number, _, cached in message.first:
            self.answers[number].cached_tokens = cached
        for end in message.ended:
            answer = self.answers[end.sequence]
            assert not answer.kind, "it ended twice"
            answer.kind, answer.detail = end.kind, end.detail

    def close(self) -> None:
        self._in.send(encode(Shutdown()))
        self.thread.join(PATIENCE_S)
        assert not self.thread.is_alive()
        for socket in (self._in, self._out, self._http):
            socket.close(0)
        if self._failure is not None:
            raise self._failure


class Pair:
    """A prefill and a decode instance, and a router that knows these two."""

    def __init__(
        self,
        run: dict[str, Any],
        text: Any = None,
        prefill: dict[str, Any] | None = None,
        decode: dict[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        """``run``: settings of both, ``prefill`` and ``decode`` those of one alone, ``settings`` those of their
        servers, or what makes one of them of a role."""
        self.context = zmq.Context()
        self.halves: list[Half] = []
        try:
            self.prefill = self._start("prefill", {**run, **(prefill or {})}, text, settings)
            self.decode = self._start("decode", {**run, **(decode or {})}, text, settings)
        except BaseException:
            self.close()
            raise
        self._rooms = 0

    def _start(self, role: Role, run: dict[str, Any], text: Any, settings: dict[str, Any]) -> Half:
        own = {name: value(role) if callable(value) else value for name, value in settings.items()}
        half = Half(self.context, RunSettings(**run), role, text, **own)
        self.halves.append(half)
        return half

    def submit(self, prompt: list[int], params: SamplingParams) -> tuple[int, int]:
        """Begin a sequence on both; returns its numbers there, prefill first."""
        self._rooms += 256
        return (
            self.prefill.submit(prompt, params, self._rooms, self.decode),
            self.decode.submit(prompt, params, self._rooms, self.prefill),
        )

    def close(self) -> None:
        for half in self.halves:
            half.close()
        self.context.destroy(linger=0)
