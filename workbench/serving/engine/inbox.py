"""The scheduler process's inbox: what other processes say, as messages of the scheduler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import zmq

from workbench.backend import BackendDied, Wait
from workbench.scheduler.messages import (
    Abort,
    CloseSession,
    FlushCache,
    Generate,
    GetState,
    OpenSession,
    Pause,
    Profile,
    Resume,
    SetState,
    Stop,
    UpdateWeights,
)
from workbench.serving.backends.backend_control import BackendControl
from workbench.serving.engine.matchers import Matcher, Matchers
from workbench.serving.engine.outbox import LiveOutbox
from workbench.serving.engine.vitals import Vitals
from workbench.serving.wire import (
    Ask,
    Broken,
    Cancel,
    Change,
    Compiled,
    Control,
    Done,
    LoadWeights,
    SessionControl,
    Shutdown,
    StartProfile,
    StopFound,
    StopProfile,
    Submit,
    Vocabulary,
    decode_to_scheduler,
    encode,
)

_CONTROLS = {"flush_cache": FlushCache, "pause": Pause, "resume": Resume}


class Ending(Exception):
    """The end of the server: leaves the loop through its driver, with the ``messages`` that came before."""

    def __init__(self, messages: list[object]) -> None:
        super().__init__()
        self.messages = messages


class LiveInbox:
    """Messages of other processes, in the scheduler's words: nothing else turns the one into the other.

    ``socket`` is this process's PULL socket.
    """

    def __init__(
        self,
        socket: Any,
        outbox: LiveOutbox,
        http: Any,
        vitals: Vitals,
        control: BackendControl,
        epoch_s: float,
        slo_ttft_s: float | None = None,
        matchers: Matchers | None = None,
    ) -> None:
        """Times of the scheduler count from ``epoch_s`` of the monotonic clock. ``slo_ttft_s`` is the objective of requests
        that have none of their own. ``matchers`` are needed where a request has a grammar."""
        self._socket = socket
        self._outbox = outbox
        self._http = http
        self._vitals = vitals
        self._backend = control
        self._epoch_s = epoch_s
        self._slo_ttft_s = slo_ttft_s
        self._done: list[Done] = []
        self._matchers = matchers
        self._compiling: dict[str, tuple[Submit, list[object]]] = {}
        """Sequences whose grammars are not there yet, and what has come for them since."""

    def drain(self) -> list[object]:
        """Everything that has come. Raises :class:`Ending` when that includes a :class:`Shutdown`, and BackendDied when what
        runs batches has ended."""
        self._vitals.moved()
        self.confirm()
        found: list[object] = []
        while True:
            try:
                data = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return found
            message = decode_to_scheduler(data)
            if isinstance(message, Submit):
                if not message.grammar:
                    found.append(self._submit(message))
                elif self._matchers_for(message).begin(message.grammar, message.sequence_id):
                    found.append(self._constrained(message))
                else:
                    self._compiling[message.sequence_id] = message, []
            elif isinstance(message, Cancel):
                abort = Abort(message.sequence_id, message.why)
                (self._compiling[message.sequence_id][1] if message.sequence_id in self._compiling else found).append(
                    abort
                )
            elif isinstance(message, Compiled):
                submit, since = self._compiling.pop(message.sequence_id)
                found += [self._constrained(submit), *since]
            elif isinstance(message, Vocabulary):
                assert self._matchers is not None
                self._matchers.use(message.serialised)
            elif isinstance(message, StopFound):
                # First, for it may have come first: the socket takes turns among its senders, and the client that was
                # told of this end may have sent its session's next turn.
                found.insert(0, Stop(message.sequence_id, message.output_tokens))
            elif isinstance(message, Control):
                found.append(_CONTROLS[message.action]())
                self._done.append(Done(message.number))
            elif isinstance(message, Ask):
                found.append(self._ask(message.number))
            elif isinstance(message, Change):
                found.append(self._change(message))
            elif isinstance(message, SessionControl):
                found.append(self._session(message))
            elif isinstance(message, LoadWeights):
                found.append(self._load_weights(message))
            elif isinstance(message, StartProfile | StopProfile):
                found.append(self._profile(message))
            elif isinstance(message, Broken):
                raise BackendDied(message.line)
            else:
                assert isinstance(message, Shutdown)
                raise Ending(found)

    def _matchers_for(self, message: Submit) -> Matchers:
        assert self._matchers is not None, f"{message.sequence_id} has a grammar"
        return self._matchers

    def _constrained(self, message: Submit) -> Generate:
        """A request whose grammar is there. One that cannot be followed is a request that can never be served."""
        grammar = self._matchers_for(message).take(message.sequence_id)
        return self._submit(message, grammar)

    def _submit(self, message: Submit, grammar: Matcher | str | None = None) -> Generate:
        generate = Generate(
            message.sequence_id,
            np.frombuffer(message.prompt, np.int32),
            message.params,
            message.arrival_s - self._epoch_s,
            message.priority,
            # What is found in the prefix cache is not computed, and nothing is known of it.
            message.namespace if message.params.prompt_logprobs is None else f"prompt of {message.sequence_id}",
            self._slo_ttft_s if message.slo_ttft_s is None else message.slo_ttft_s,
            session=message.session,
            bos_tokens=message.bos_tokens,
            grammar=None if isinstance(grammar, str) else grammar,
            refused="grammar_too_complex" if isinstance(grammar, str) else "",
        )
        self._outbox.opened(message, generate)
        return generate

    def _session(self, message: SessionControl) -> OpenSession | CloseSession:
        asked = OpenSession if message.action == "open" else CloseSession
        return asked(message.session, self._teller(message.number))

    def _teller(self, number: int) -> Callable[[str | None], None]:
        """Return what notes the answer to the message with this number: why it was refused, or None."""
        return lambda refused: self._done.append(Done(number, refused=refused))

    def _ask(self, number: int) -> GetState:
        return GetState(lambda state: self._done.append(Done(number, state)))

    def _change(self, message: Change) -> SetState:
        def tell(refused: str | None) -> None:
            self._done.append(Done(message.number, refused=refused))
            if refused is None:
                self._outbox.changed(message.settings)

        return SetState(message.settings, tell)

    def _load_weights(self, message: LoadWeights) -> UpdateWeights:
        def check() -> None:
            self._vitals.resting()  # reading weights may take minutes, and is not being stuck
            self._backend.check_weights(message.folder)

        def tell(refused: str | None) -> None:
            self._vitals.moved()
            self._done.append(Done(message.number, refused=refused))
            if refused is None:
                self._outbox.weights_updated(message.folder)

        return UpdateWeights(check, self._backend.write_weights, tell)

    def _profile(self, message: StartProfile | StopProfile) -> Profile:
        files: list[str] = []

        def act() -> None:
            self._vitals.resting()  # writing a trace may take minutes, too
            try:
                if isinstance(message, StartProfile):
                    self._backend.start_profile(message.folder, message.steps)
                else:
                    files.extend(self._backend.stop_profile())
            finally:
                self._vitals.moved()

        return Profile(act, lambda refused: self._done.append(Done(message.number, {"files": files}, refused)))

    def arrival(self) -> Wait:
        self.confirm()
        return self._wait

    def confirm(self) -> None:
        """Answer the controls of the last drain: the scheduler has handled them by now."""
        for done in self._done:
            self._http.send(encode(done))
        self._done.clear()

    def _wait(self) -> None:
        self._vitals.resting()
        self._socket.poll()
        self._vitals.moved()
