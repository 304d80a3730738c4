"""The HTTP process's side of the engine: sequences out, chunks back, and how the other processes stand."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import zmq
import zmq.asyncio

from workbench.serving.engine.wire import (
    Addresses,
    Ask,
    Beat,
    Cancel,
    Change,
    Chunk,
    Chunks,
    Control,
    ControlAction,
    Done,
    Failed,
    LoadWeights,
    Pulse,
    Ready,
    SessionAction,
    SessionControl,
    Shutdown,
    StartProfile,
    StopProfile,
    Submit,
    decode_to_http,
    encode,
    pull_socket,
    push_socket,
)
from workbench.serving.http.prometheus import Metrics
from workbench.serving.http.protocol import ApiError, Sequences

MAX_UNREAD_BYTES = 256 << 20
"""What may wait, over all requests, for clients that read more slowly than their tokens come."""

ANSWER_S = 30.0
"""How long the scheduler may take to answer what it does between two batches."""


class ClientGone(Exception):
    """Whoever asked has disconnected."""


class _Sequence:
    """One sequence of a call."""

    __slots__ = ("call", "index", "last_s", "request_id", "stream", "tokens")

    def __init__(self, call: Call, index: int, stream: int, request_id: str) -> None:
        self.call = call
        self.index = index
        self.stream = stream
        self.request_id = request_id
        self.tokens = 0
        self.last_s = 0.0


class Call:
    """One request of a client: its sequences, and what has come for them. Ends with :meth:`close`."""

    def __init__(self, engine: EngineClient, request_id: str, prompts: int, n: int, label: str | None = None) -> None:
        self._engine = engine
        self.id = request_id
        self.label = label
        self.prompts = prompts
        self.n = n
        self.created_s = int(time.time())
        self.arrival_s = time.monotonic()
        self.open: dict[int, _Sequence] = {}
        """Sequences that have not ended, by stream."""
        self._queue: asyncio.Queue[tuple[int, Chunk] | Exception] = asyncio.Queue()
        self.unread_bytes = 0

    async def events(self) -> AsyncIterator[tuple[int, Chunk]]:
        """(index of the choice, what is new) until every sequence has ended.

        Raises ClientGone, or ApiError for what no answer can be given after.
        """
        left = self.prompts * self.n
        while left:
            event = await self._queue.get()
            self._count(event, -1)
            if isinstance(event, Exception):
                raise event
            left -= bool(event[1].kind)
            yield event

    def put(self, event: tuple[int, Chunk] | Exception) -> None:
        self._count(event, 1)
        self._queue.put_nowait(event)

    def _count(self, event: tuple[int, Chunk] | Exception, sign: int) -> None:
        if not isinstance(event, Exception):
            held_bytes = sign * _held_bytes(event[1])
            self.unread_bytes += held_bytes
            self._engine.unread_bytes += held_bytes

    def drop_unread(self) -> None:
        """Forget what nobody will read."""
        while not self._queue.empty():
            self._count(self._queue.get_nowait(), -1)

    def too_slow(self) -> None:
        """End it: too much of it waits to be read."""
        self.drop_unread()
        self.fail("too_slow", ApiError(503, "the answer was read too slowly", kind="server_error", code="too_slow"))

    def disconnected(self) -> None:
        """The client has gone: nobody needs what is still to come."""
        self.drop_unread()
        self.fail("disconnected", ClientGone())

    def fail(self, why: str, error: Exception) -> None:
        """End it early: records have ``why``, and the client, after what waits to be read, ``error``."""
        self._engine.close(self, why)
        self.put(error)

    def close(self) -> None:
        """Forget the call. What has not ended by now is aborted: the answer failed before it was whole."""
        self._engine.close(self, "request_failed")
        self.drop_unread()


def _held_bytes(chunk: Chunk) -> int:
    """About how much memory a chunk takes while it waits."""
    return 400 + 2 * len(chunk.text) + sum(300 * (1 + len(item.top)) for item in chunk.logprobs or ())


class EngineClient:
    """Owns the sockets of the HTTP process."""

    def __init__(self, addresses: Addresses, metrics: Metrics, max_queue: int) -> None:
        self._context: Any = zmq.asyncio.Context()
        self._inbox = pull_socket(self._context, addresses.http)
        plain: Any = zmq.Context.shadow(self._context.underlying)
        self._scheduler = push_socket(plain, addresses.scheduler)
        self._metrics = metrics
        self._max_queue = max_queue
        self._numbers = itertools.count(1)
        self._sequences: dict[int, _Sequence] = {}
        self._left: dict[int, _Sequence] = {}
        """Sequences whose clients are not there any more and whose end has not come yet: it is counted when it does."""
        self.unread_bytes = 0
        self._calls: dict[str, Call] = {}
        self._controls: dict[int, asyncio.Future[Done]] = {}
        self._without_token = 0
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
        self._refusal: ApiError | None = None
        self.refusing = asyncio.Event()
        """Set from when no request is taken any more."""

    async def run(self) -> None:
        """Take in what the other processes say, for ever."""
        while True:
            message = decode_to_http(await self._inbox.recv())
            if isinstance(message, Chunks):
                now = time.monotonic()
                self._metrics.detokenizer_streams = message.open_streams
                for chunk in message.chunks:
                    self._deliver(chunk, now)
            elif isinstance(message, Beat):
                self.beat = self._metrics.beat = message
            elif isinstance(message, Pulse):
                self._pulse_s = message.sent_s
                if self._metrics.ready is not None and not self.ready.done():
                    self.ready.set_result(self._metrics.ready)
            elif isinstance(message, Done):
                waiter = self._controls.pop(message.number, None)
                if waiter is not None and not waiter.done():
                    waiter.set_result(message)
            elif isinstance(message, Ready):
                self._metrics.ready = message
                self.beat = self._metrics.beat = message.beat
            else:
                self.failure = message
                self.failed.set()

    # -- requests ----------------------------------------------------------------------------------------------------

    def submit(self, wanted: Sequences, prefix: str) -> Call:
        """Start the sequences of a request. Raises ApiError when the server cannot take it now."""
        count = len(wanted.prompts) * wanted.n
        self._admit(count)
        request_id = wanted.request_id or f"{prefix}{uuid.uuid4().hex}"
        if request_id in self._calls:
            raise ApiError(
                400, f"request_id: {request_id!r} is being served already", param="request_id", code="invalid_value"
            )
        call = Call(self, request_id, len(wanted.prompts), wanted.n, wanted.label)
        asked: list[tuple[_Sequence, bytes]] = []
        for index in range(count):
            stream = next(self._numbers)
            # The number makes it the scheduler's only one, also when a client uses an id again.
            named = wanted.request_id or wanted.label
            name = f"{named or request_id}-{stream}" if named or count > 1 else request_id
            prompt = wanted.prompts[index // wanted.n]
            params = wanted.params
            if params.seed is not None and index % wanted.n:
                params = dataclasses.replace(params, seed=params.seed + index % wanted.n)
            asked.append(
                (
                    _Sequence(call, index, stream, name),
                    encode(
                        Submit(
                            stream,
                            name,
                            np.array(prompt, np.int32).tobytes(),
                            params,
                            call.arrival_s,
                            wanted.priority,
                            wanted.stop,
                            wanted.skip_special_tokens,
                            wanted.session,
                            wanted.bos_tokens,
                            wanted.cache_salt,
                            wanted.slo_ttft_s,
                            wanted.slo_tpot_s,
                        )
                    ),
                )
            )
        # Nothing is noted before all of it can be sent: what is never sent never ends.
        self._calls[request_id] = call
        self.idle.clear()
        for sequence, message in asked:
            call.open[sequence.stream] = self._sequences[sequence.stream] = sequence
            self._without_token += 1
            self._scheduler.send(message)
        self._metrics.open_streams = len(self._sequences)
        return call

    def _admit(self, count: int) -> None:
        if self._refusal is not None:
            raise self._refusal
        ready = self.ready.result()
        waiting = self._without_token
        running = len(self._sequences) - waiting
        # Those the scheduler can admit at once do not queue; when KV has run out, it can admit none.
        room = 0 if self.beat is not None and self.beat.kv_full else max(ready.max_running - running, 0)
        if waiting + count > self._max_queue + room:
            raise ApiError(
                503,
                f"overloaded: {waiting} sequences wait for their first token (--max-queue {self._max_queue})",
                kind="overloaded_error",
                code="overloaded",
                retry_after_s=1,
            )

    def abort(self, call: Call, why: str) -> None:
        """Ask the scheduler to end every open sequence of a call."""
        for sequence in call.open.values():
            self._scheduler.send(encode(Cancel(sequence.request_id, why)))

    def abort_id(self, request_id: str | None) -> int:
        """Abort calls by their id or label, or all (None); returns how many that were."""
        calls = [call for call in self._calls.values() if request_id in (None, call.id, call.label)]
        for call in calls:
            self.abort(call, "client")
        return len(calls)

    def close(self, call: Call, why: str) -> None:
        """The call has been answered, or cannot be: what is open of it is aborted, and ``why`` is in records."""
        if self._calls.get(call.id) is not call:
            return
        del self._calls[call.id]
        self.abort(call, why)
        for stream in call.open:
            self._left[stream] = self._sequences.pop(stream)
            self._forget(self._left[stream])
        call.open.clear()
        self._metrics.open_streams = len(self._sequences)
        if not self._calls:
            self.idle.set()

    def _forget(self, sequence: _Sequence) -> None:
        if not sequence.tokens:
            self._without_token -= 1

    def _deliver(self, chunk: Chunk, now: float) -> None:
        sequence = self._sequences.get(chunk.stream)
        if sequence is None:
            self._deliver_to_nobody(chunk, now)
            return
        metrics, call = self._metrics, sequence.call
        for _ in chunk.token_ids:
            if sequence.tokens:
                metrics.itl_s.observe(now - sequence.last_s)
            else:
                metrics.ttft_s.observe(now - call.arrival_s)
                self._without_token -= 1
            sequence.tokens += 1
            sequence.last_s = now
        if chunk.kind:
            del self._sequences[chunk.stream], call.open[chunk.stream]
            self._forget(sequence)
            metrics.open_streams = len(self._sequences)
            self._ended(sequence, chunk, now)
        call.put((sequence.index, chunk))
        if self.unread_bytes > MAX_UNREAD_BYTES:
            max(self._calls.values(), key=lambda waiting: waiting.unread_bytes).too_slow()

    def _deliver_to_nobody(self, chunk: Chunk, now: float) -> None:
        """What comes after its call was closed."""
        sequence = self._left.get(chunk.stream)
        if sequence is not None:
            sequence.tokens += len(chunk.token_ids)
            if chunk.kind:
                del self._left[chunk.stream]
                self._ended(sequence, chunk, now)

    def _ended(self, sequence: _Sequence, end: Chunk, now: float) -> None:
        metrics = self._metrics
        metrics.finished(end.kind)
        metrics.e2e_s.observe(now - sequence.call.arrival_s)
        metrics.prompt_tokens.observe(end.prompt_tokens)
        metrics.output_tokens.observe(sequence.tokens)

    # -- the whole ---------------------------------------------------------------------------------------------------

    @property
    def refusal(self) -> ApiError | None:
        """Why no request is taken any more, if so."""
        return self._refusal

    def silence(self, limit_s: float) -> str | None:
        """Why no answer can be expected, in one line, or None: a process that answers pass has not been heard of for
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
        """Have the scheduler do something. Raises ApiError 503 when it does not answer."""
        await self._told(lambda number: Control(number, action))

    async def state(self) -> dict[str, Any]:
        """How the scheduler stands. Raises ApiError 503 when it does not answer."""
        state = (await self._told(Ask)).state
        assert state is not None
        return state

    async def change(self, settings: dict[str, Any]) -> None:
        """Have the scheduler go on with other settings. Raises ApiError 400 with why it does not, 503 when it does not
        answer."""
        await self._done(lambda number: Change(number, settings), {name: f"{name}:" for name in settings})

    async def session(self, name: str, action: SessionAction) -> None:
        """Have the scheduler open or close a session. Raises ApiError 400 with why it does not, 503 when it does not
        answer."""
        await self._done(lambda number: SessionControl(number, name, action), {"session_id": f"session {name!r}"})

    async def load_weights(self, folder: str) -> None:
        """Have the model go on with the weights in a folder, which takes as long as reading them does. Raises ApiError 400
        with why it does not."""
        about = {"model_path": str(Path(folder))}
        await self._done(lambda number: LoadWeights(number, folder), about, timeout_s=None)

    async def start_profile(self, folder: str, steps: int | None) -> None:
        """Have the batches to come profiled. Raises ApiError 400 with why they are not."""
        about = {"output_dir": "output_dir:"}
        await self._done(lambda number: StartProfile(number, folder, steps), about, timeout_s=None)

    async def stop_profile(self) -> list[str]:
        """Have the profile written, and return its files. Raises ApiError 400 with why it is not."""
        state = (await self._done(StopProfile, {}, timeout_s=None)).state
        assert state is not None
        return state["files"]

    async def _done(
        self, message: Callable[[int], Any], about: Mapping[str, str], timeout_s: float | None = ANSWER_S
    ) -> Done:
        """Have something done. Raises ApiError 400 with why it is not; ``about`` has, for each field of the request, how a
        line begins that finds fault with it."""
        done = await self._told(message, timeout_s)
        if done.refused is not None:
            param = next((name for name, beginning in about.items() if done.refused.startswith(beginning)), None)
            raise ApiError(400, done.refused, param=param, code="invalid_value")
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
            raise ApiError(503, f"the scheduler has not answered within {timeout_s:g} s", kind="server_error") from None
        finally:
            self._controls.pop(number, None)

    def refuse_new(self, why: ApiError) -> None:
        """From now on every new request gets this error."""
        self._refusal = why
        self.refusing.set()

    def resume_for_drain(self) -> None:
        """A paused scheduler would never finish."""
        self._scheduler.send(encode(Control(next(self._numbers), "resume")))

    def fail_all(self, why: str, error: ApiError) -> None:
        """The server ends before its requests do: every one gets ``error``, and records have ``why``."""
        self.refuse_new(error)
        for call in list(self._calls.values()):
            call.fail(why, error)
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
