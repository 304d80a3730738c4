"""The service's side of the engine: sequences out, chunks back, and how the other processes stand."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import zmq
import zmq.asyncio

from workbench.serving.chunks import Chunk
from workbench.serving.metrics import Metrics
from workbench.serving.open_request import OpenRequest, OpenSequence
from workbench.serving.refusals import Refusal, bad_value
from workbench.serving.requests import ROOM_BITS, ControlAction, ServiceRequest, SessionAction, Shared
from workbench.serving.wire import (
    Addresses,
    Ask,
    Beat,
    Cancel,
    Change,
    Chunks,
    Control,
    Done,
    EndAsked,
    Failed,
    LoadWeights,
    Pulse,
    Ready,
    SessionControl,
    Shutdown,
    StartProfile,
    StopProfile,
    Submit,
    Vocabulary,
    decode_to_http,
    encode,
    pull_socket,
    push_socket,
)

MAX_UNREAD_BYTES = 256 << 20
"""What may wait, over all requests, for clients that read more slowly than their tokens come."""

ANSWER_S = 30.0
"""How long the scheduler may take to answer what it does between two batches."""


class EngineClient:
    """The sockets of the process that serves clients, and who waits for what comes by them."""

    def __init__(self, addresses: Addresses, metrics: Metrics, max_queue: int) -> None:
        self._context: Any = zmq.asyncio.Context()
        self._inbox = pull_socket(self._context, addresses.http)
        plain: Any = zmq.Context.shadow(self._context.underlying)
        self._scheduler = push_socket(plain, addresses.scheduler)
        self._metrics = metrics
        self._max_queue = max_queue
        self._numbers = itertools.count(1)
        self._sequences: dict[int, OpenSequence] = {}
        self._left: dict[int, OpenSequence] = {}
        """Sequences whose clients are not there any more and whose end has not come yet: it is counted when it does."""
        self.unread_bytes = 0
        self._requests: dict[str, OpenRequest] = {}
        self._controls: dict[int, asyncio.Future[Done]] = {}
        self._without_token = 0
        self._rooms: set[tuple[str, int]] = set()
        """Of sequences that have not ended and have another half elsewhere."""
        self.serialised: str | None = None
        """The tokenizer, as ``Tokenizer.serialised`` has it: grammars are over its tokens."""
        self._vocabulary_sent = False
        self.ready: asyncio.Future[Ready] = asyncio.get_running_loop().create_future()
        """Every process an answer passes is there."""
        self.idle = asyncio.Event()
        self.idle.set()
        self.beat: Beat | None = None
        """The last heartbeat; there from the moment the engine is ready."""
        self._pulse_s = 0.0
        """When the scheduler process sent the last pulse that came through the detokenizer."""
        self.failure: Failed | None = None
        """What the scheduler process said before it ended."""
        self.failed = asyncio.Event()
        self.end_asked: Callable[[str], None] = lambda who: None
        """Called when somebody else was told to end the server."""
        self._refusal: Refusal | None = None
        self.refusing = asyncio.Event()
        """Set from when no request is taken any more."""

    async def run(self) -> None:
        """Take in what the other processes say, for ever."""
        while True:
            message = decode_to_http(await self._inbox.recv())
            if isinstance(message, Chunks):
                now = time.monotonic()
                self._metrics.detokenizer_sequences = message.open_sequences
                for chunk in message.chunks:
                    self._deliver(chunk, now)
            elif isinstance(message, Beat):
                self.beat = self._metrics.beat = message
            elif isinstance(message, Pulse):
                self._pulse_s = message.sent_s
                self._metrics.child_cpu_s = {
                    "scheduler": message.scheduler_cpu_s,
                    "detokenizer": message.detokenizer_cpu_s,
                }
                if self._metrics.ready is not None and not self.ready.done():
                    self.ready.set_result(self._metrics.ready)
            elif isinstance(message, Done):
                waiter = self._controls.pop(message.number, None)
                if waiter is not None and not waiter.done():
                    waiter.set_result(message)
            elif isinstance(message, Ready):
                self._metrics.ready = message
                self.beat = self._metrics.beat = message.beat
            elif isinstance(message, EndAsked):
                self.end_asked(message.who)
            else:
                self.failure = message
                self.failed.set()

    # -- requests ----------------------------------------------------------------------------------------------------

    def submit(self, asked: ServiceRequest, prefix: str) -> OpenRequest:
        """Start the sequences of a request, whose id begins with ``prefix`` if it brings none.

        Raises Refusal when the server cannot take it now.
        """
        count = len(asked.prompts) * asked.n
        self._admit(count)
        request_id = asked.request_id or f"{prefix}{uuid.uuid4().hex}"
        if request_id in self._requests:
            raise bad_value("request_id", f"{request_id!r} is being served already")
        shared = asked.shared
        named = asked.request_id or asked.label
        rooms = [] if shared is None else self._rooms_of(shared, named or request_id, count)
        request = OpenRequest(self, request_id, asked)
        submits: list[tuple[OpenSequence, bytes]] = []
        for index in range(count):
            number = next(self._numbers)
            # The number makes it the scheduler's only one, also when a client uses an id again.
            sequence_id = f"{named or request_id}-{number}" if named or count > 1 else request_id
            if shared is not None:  # the same on both instances
                sequence_id = f"{named or request_id}-{shared.room + index}"
            params = asked.params
            if params.seed is not None and index % asked.n:
                params = dataclasses.replace(params, seed=params.seed + index % asked.n)
            submit = Submit(
                number,
                sequence_id,
                np.array(asked.prompts[index // asked.n], np.int32).tobytes(),
                params,
                request.arrival_s,
                asked.priority,
                asked.stop,
                asked.skip_special_tokens,
                asked.session or "",
                asked.bos_tokens,
                asked.cache_salt or "",
                asked.slo_ttft_s,
                asked.slo_tpot_s,
                asked.grammar,
                asked.include_stop,
                *(() if shared is None else (shared.router, shared.room + index, shared.peer)),
            )
            sequence = OpenSequence(request, index, number, sequence_id)
            if shared is not None:
                sequence.rooms = rooms[index]
            submits.append((sequence, encode(submit)))
        if asked.grammar and not self._vocabulary_sent:
            self._vocabulary_sent = True
            self._scheduler.send(encode(Vocabulary(self.serialised)))
        # Nothing is noted before all of it can be sent: what is never sent never ends.
        self._requests[request_id] = request
        self.idle.clear()
        for sequence, message in submits:
            request.open[sequence.number] = self._sequences[sequence.number] = sequence
            self._rooms.update(sequence.rooms)
            self._without_token += 1
            self._scheduler.send(message)
        self._metrics.open_sequences = len(self._sequences)
        return request

    def _rooms_of(self, shared: Shared, name: str, count: int) -> list[list[tuple[str, int]]]:
        """Return what each of so many sequences has to have alone: its room, by its router's name and by its request's,
        which is a part of its own. Raises Refusal where another sequence has one of them."""
        numbers = range(shared.room, shared.room + count)
        rooms = [[(f"router {shared.router}", number), (name, number)] for number in numbers]
        if any(not self._rooms.isdisjoint(of_sequence) for of_sequence in rooms):
            raise Refusal(
                "duplicate_room",
                f"x-workbench-room: {shared.room >> ROOM_BITS} is being served already",
                "x-workbench-room",
            )
        return rooms

    def _admit(self, count: int) -> None:
        if self._refusal is not None:
            raise self._refusal
        ready = self.ready.result()
        waiting = self._without_token
        running = len(self._sequences) - waiting
        # Those the scheduler can admit at once do not queue; when KV has run out, it can admit none.
        room = 0 if self.beat is not None and self.beat.kv_full else max(ready.max_running - running, 0)
        if waiting + count > self._max_queue + room:
            raise Refusal(
                "overloaded",
                f"overloaded: {waiting} sequences wait for their first token (--max-queue {self._max_queue})",
                retry_after_s=1,
            )

    def abort(self, request: OpenRequest, why: str) -> None:
        """Ask the scheduler to end every open sequence of a request."""
        for sequence in request.open.values():
            self._scheduler.send(encode(Cancel(sequence.sequence_id, why)))

    def abort_id(self, request_id: str | None) -> int:
        """Abort requests by their id or label, or all (None); returns how many that were."""
        found = [request for request in self._requests.values() if request_id in (None, request.id, request.label)]
        for request in found:
            self.abort(request, "client")
        return len(found)

    def close(self, request: OpenRequest, why: str) -> None:
        """Forget a request that has been answered, or cannot be. What is open of it is aborted, and records have ``why``."""
        if self._requests.get(request.id) is not request:
            return
        del self._requests[request.id]
        self.abort(request, why)
        for number in request.open:
            self._left[number] = self._sequences.pop(number)
            self._forget(self._left[number])
        request.open.clear()
        self._metrics.open_sequences = len(self._sequences)
        if not self._requests:
            self.idle.set()

    def _forget(self, sequence: OpenSequence) -> None:
        if not sequence.tokens:
            self._without_token -= 1

    def _deliver(self, chunk: Chunk, now: float) -> None:
        sequence = self._sequences.get(chunk.sequence)
        if sequence is None:
            self._deliver_to_nobody(chunk, now)
            return
        metrics, request = self._metrics, sequence.request
        for _ in chunk.token_ids:
            if sequence.tokens:
                metrics.itl_s.observe(now - sequence.last_s)
            else:
                metrics.ttft_s.observe(now - request.arrival_s)
                self._without_token -= 1
            sequence.tokens += 1
            sequence.last_s = now
        if chunk.kind:
            del self._sequences[chunk.sequence], request.open[chunk.sequence]
            self._forget(sequence)
            metrics.open_sequences = len(self._sequences)
            self._ended(sequence, chunk, now)
        request.put((sequence.index, chunk))
        if self.unread_bytes > MAX_UNREAD_BYTES:
            max(self._requests.values(), key=lambda waiting: waiting.unread_bytes).too_slow()

    def _deliver_to_nobody(self, chunk: Chunk, now: float) -> None:
        """Count what comes after its request was closed."""
        sequence = self._left.get(chunk.sequence)
        if sequence is not None:
            sequence.tokens += len(chunk.token_ids)
            if chunk.kind:
                del self._left[chunk.sequence]
                self._ended(sequence, chunk, now)

    def _ended(self, sequence: OpenSequence, end: Chunk, now: float) -> None:
        self._rooms.difference_update(sequence.rooms)
        metrics = self._metrics
        metrics.finished(end.kind)
        metrics.e2e_s.observe(now - sequence.request.arrival_s)
        metrics.prompt_tokens.observe(end.prompt_tokens)
        metrics.output_tokens.observe(sequence.tokens)

    # -- the whole ---------------------------------------------------------------------------------------------------

    @property
    def refusal(self) -> Refusal | None:
        """Why no request is taken any more, if so."""
        return self._refusal

    def silence(self, limit_s: float) -> str | None:
        """Return why no answer can be expected, in one line, or None: a process that answers pass has not been heard of for
        ``limit_s`` seconds, or the loop has something to do and has not moved for so long, nor the batch it waits for."""
        beat, now = self.beat, time.monotonic()
        assert beat is not None, "the engine is ready"
        for name, heard_s in (
            ("the scheduler process", beat.sent_s),
            ("a process of the model", beat.heard_s),
            ("the detokenizer process", self._pulse_s),
        ):
            if now - heard_s > limit_s:
                return f"{name} has not been heard of for {now - heard_s:.0f} s"
        if beat.pending and now - beat.progress_s > limit_s:
            return f"the loop is stuck: no progress for {now - beat.progress_s:.0f} s with work pending"
        return None

    async def control(self, action: ControlAction) -> None:
        """Have the scheduler do something. Raises Refusal when it does not answer."""
        await self._told(lambda number: Control(number, action))

    async def state(self) -> dict[str, Any]:
        """Return how the scheduler stands. Raises Refusal when it does not answer."""
        state = (await self._told(Ask)).state
        assert state is not None
        return state

    async def change(self, settings: dict[str, Any]) -> None:
        """Have the scheduler go on with other settings. Raises Refusal with why it does not, or when it does not
        answer."""
        await self._done(lambda number: Change(number, settings), {name: f"{name}:" for name in settings})

    async def session(self, name: str, action: SessionAction) -> None:
        """Have the scheduler open or close a session. Raises Refusal with why it does not, or when it does not
        answer."""
        await self._done(lambda number: SessionControl(number, name, action), {"session_id": f"session {name!r}"})

    async def load_weights(self, folder: str) -> None:
        """Have the model go on with the weights in a folder, which takes as long as reading them does. Raises Refusal
        with why it does not."""
        about = {"model_path": str(Path(folder))}
        await self._done(lambda number: LoadWeights(number, folder), about, timeout_s=None)

    async def start_profile(self, folder: str, steps: int | None) -> None:
        """Have the batches to come profiled. Raises Refusal with why they are not."""
        about = {"output_dir": "output_dir:"}
        await self._done(lambda number: StartProfile(number, folder, steps), about, timeout_s=None)

    async def stop_profile(self) -> list[str]:
        """Have the profile written, and return its files. Raises Refusal with why it is not."""
        state = (await self._done(StopProfile, {}, timeout_s=None)).state
        assert state is not None
        return state["files"]

    async def _done(
        self, message: Callable[[int], Any], about: Mapping[str, str], timeout_s: float | None = ANSWER_S
    ) -> Done:
        """Have something done. Raises Refusal with why it is not; ``about`` has, for each field of the request, how a
        line begins that finds fault with it."""
        done = await self._told(message, timeout_s)
        if done.refused is not None:
            parameter = next((name for name, beginning in about.items() if done.refused.startswith(beginning)), None)
            raise Refusal("invalid_value", done.refused, parameter)
        return done

    async def _told(self, message: Callable[[int], Any], timeout_s: float | None = ANSWER_S) -> Done:
        if self._refusal is not None:
            raise self._refusal
        number = next(self._numbers)
        waiter: asyncio.Future[Done] = asyncio.get_running_loop().create_future()
        self._controls[number] = waiter
        self._scheduler.send(encode(message(number)))
        try:
            return await asyncio.wait_for(waiter, timeout_s)
        except TimeoutError:
            raise Refusal("no_answer", f"the scheduler has not answered within {timeout_s:g} s") from None
        finally:
            self._controls.pop(number, None)

    def refuse_new(self, why: Refusal) -> None:
        """Refuse every new request from now on, for this reason."""
        self._refusal = why
        self.refusing.set()

    def resume_for_drain(self) -> None:
        """Resume: a paused scheduler would never finish."""
        self._scheduler.send(encode(Control(next(self._numbers), "resume")))

    def fail_all(self, why: str, error: Refusal) -> None:
        """End every request with ``error``, for the server ends before they do; records have ``why``."""
        self.refuse_new(error)
        for request in list(self._requests.values()):
            request.fail(why, error)
        for waiter in self._controls.values():
            if not waiter.done():
                waiter.set_exception(error)

    def shut_down(self) -> None:
        """Tell the scheduler to end; it tells the detokenizer."""
        self._scheduler.send(encode(Shutdown()))

    def destroy(self) -> None:
        """Close the sockets; what has not left by now is not sent."""
        self._scheduler.close(0)
        self._context.destroy(linger=0)
