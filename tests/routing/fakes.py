"""Workers that do as a test says, on sockets of the test's own loop, and a client of an ASGI application."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from typing import Any

import h11

from tests.event_loop import in_a_loop
from tests.patience import PATIENCE_S
from workbench.routing.clocks import Clocks
from workbench.routing.front import Front
from workbench.routing.route_settings import RouteSettings
from workbench.serving.http.request_ids import RequestIds

JSON = [("content-type", "application/json")]
EVENTS = [("content-type", "text/event-stream")]


@dataclass
class Call:
    """A request as a worker has it, and the ways to answer."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    _connection: h11.Connection
    _writer: asyncio.StreamWriter
    _reader: asyncio.StreamReader

    @property
    def asked(self) -> Any:
        return json.loads(self.body)

    async def begin(self, status: int = 200, headers: list[tuple[str, str]] = EVENTS) -> None:
        self._writer.write(self._connection.send(h11.Response(status_code=status, headers=headers)))
        await self._writer.drain()

    async def piece(self, data: bytes) -> None:
        self._writer.write(self._connection.send(h11.Data(data=data)))
        await self._writer.drain()

    async def end(self) -> None:
        self._writer.write(self._connection.send(h11.EndOfMessage()))
        await self._writer.drain()

    async def answer(self, value: Any = None, status: int = 200, headers: list[tuple[str, str]] | None = None) -> None:
        body = json.dumps(value).encode()
        await self.begin(status, [*JSON, ("content-length", str(len(body))), *(headers or [])])
        await self.piece(body)
        await self.end()

    async def raw(self, data: bytes) -> None:
        """Bytes that are no answer, or a part of one."""
        self._writer.write(data)
        await self._writer.drain()

    def die(self) -> None:
        """Close the connection as it is."""
        self._writer.transport.abort()

    def close(self) -> None:
        """Close it when all is written."""
        self._writer.close()

    def reset(self) -> None:
        """Close it so that the other side gets an error."""
        peer = self._writer.get_extra_info("socket")
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._writer.transport.abort()

    async def gone(self) -> None:
        """Until the router has closed the connection."""
        while await self._reader.read(1 << 16):
            pass


Handler = Callable[[Call], Awaitable[None]]


class FakeWorker:
    """A server whose answers to what is no look at its health are ``does``."""

    def __init__(self, does: Handler | None = None, models: tuple[str, ...] = ("m",)) -> None:
        self.does: Handler = does or (lambda call: call.answer({"by": self.name}))
        self.models = models
        self.name = ""
        self.ill: int | None = None
        """Status of /health, where it is not well."""
        self.hangs = False
        """Looks at its health get no answer."""
        self.info: dict[str, Any] | None = None
        self.info_status = 200
        self.calls: list[Call] = []
        self.looks = 0
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]
        self.name = self.name or str(self.port)

    async def stop(self) -> None:
        """As if it were killed: nothing listens any more, and every connection is cut."""
        if self._server is not None:
            self._server.close()
            self._server = None
        for writer in list(self._writers):
            writer.transport.abort()
        await asyncio.sleep(0)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        connection = h11.Connection(h11.SERVER)
        try:
            while (call := await self._next(connection, reader, writer)) is not None:
                await self._answer(call)
                if connection.our_state is not h11.DONE or connection.their_state is not h11.DONE:
                    break
                connection.start_next_cycle()
        except (ConnectionError, h11.RemoteProtocolError):
            pass
        finally:
            self._writers.discard(writer)
            writer.close()

    async def _next(self, connection: h11.Connection, reader: Any, writer: Any) -> Call | None:
        request, body = None, b""
        while True:
            event = connection.next_event()
            if event is h11.NEED_DATA:
                connection.receive_data(await reader.read(1 << 16))
            elif isinstance(event, h11.Request):
                request = event
            elif isinstance(event, h11.Data):
                body += event.data
            elif isinstance(event, h11.EndOfMessage):
                assert request is not None
                headers = {name.decode(): value.decode() for name, value in request.headers}
                return Call(request.method.decode(), request.target.decode(), headers, body, connection, writer, reader)
            else:
                return None

    async def _answer(self, call: Call) -> None:
        if call.path == "/health":
            self.looks += 1
            if self.hangs:
                await call.gone()
            await call.answer({}, self.ill or 200)
        elif call.path == "/v1/models" and call.method == "GET":
            await call.answer({"object": "list", "data": [{"id": m, "object": "model"} for m in self.models]})
        elif call.path == "/server_info":
            await call.answer(self.info or {}, self.info_status if self.info else 404)
        else:
            self.calls.append(call)
            await self.does(call)


@dataclass
class Clock:
    """Time that passes when a test says so; nobody who sleeps wakes up."""

    now: float = 1000.0
    _limits: list[tuple[float, asyncio.Timeout]] = field(default_factory=list)

    def clocks(self) -> Clocks:
        return Clocks(lambda: self.now, self._sleep, self._within)

    def _within(self, seconds: float) -> asyncio.Timeout:
        limit = asyncio.timeout(None)
        self._limits.append((self.now + seconds, limit))
        return limit

    def goes_on(self, seconds: float) -> None:
        """So much time passes: what has waited for too long is told."""
        self.now += seconds
        late = [limit for due, limit in self._limits if due <= self.now]
        self._limits = [(due, limit) for due, limit in self._limits if due > self.now]
        for limit in late:
            with suppress(RuntimeError):  # over already
                limit.reschedule(asyncio.get_running_loop().time())

    async def _sleep(self, seconds: float) -> None:
        await asyncio.Event().wait()


@dataclass
class Answer:
    """What a client gets, while it comes."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    pieces: list[bytes] = field(default_factory=list)
    whole: bool = False
    task: asyncio.Task[None] | None = None
    _changed: asyncio.Event = field(default_factory=asyncio.Event)
    _leaves: asyncio.Event = field(default_factory=asyncio.Event)
    _reads: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def body(self) -> bytes:
        return b"".join(self.pieces)

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> Any:
        return self.json["error"]

    async def until(self, holds: Callable[[], bool]) -> None:
        while not holds():
            self._changed.clear()
            await asyncio.wait_for(self._changed.wait(), PATIENCE_S)

    async def end(self) -> Answer:
        assert self.task is not None
        await asyncio.wait_for(self.task, PATIENCE_S)
        return self

    def leave(self) -> None:
        """The client goes."""
        self._leaves.set()

    def stall(self) -> None:
        """It reads no more."""
        self._reads.clear()

    def read_on(self) -> None:
        self._reads.set()


class Client:
    """A client of a router that asks its application, without a server between them."""

    def __init__(self, front: Front, workers: list[FakeWorker], clock: Clock, said: list[str]) -> None:
        self.front = front
        self.workers = workers
        self.clock = clock
        self.said = said
        self._app = RequestIds(front.app)

    def ask(
        self, path: str = "/v1/completions", body: Any = None, method: str = "POST", reads: bool = True, **headers: str
    ) -> Answer:
        answer = Answer()
        if reads:
            answer.read_on()
        data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        path, _, query = path.partition("?")
        given = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": query.encode(),
            "root_path": "",
            "headers": [
                (b"host", b"localhost"),
                (b"content-type", b"application/json"),
                (b"content-length", str(len(data)).encode()),
                *given,
            ],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 2),
        }
        sent = False

        async def receive() -> Any:
            nonlocal sent
            if not sent:
                sent = True
                return {"type": "http.request", "body": data, "more_body": False}
            await answer._leaves.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            await answer._reads.wait()
            if message["type"] == "http.response.start":
                answer.status = message["status"]
                answer.headers = {name.decode(): value.decode() for name, value in message["headers"]}
            elif message["type"] == "http.response.body":
                if message.get("body"):
                    answer.pieces.append(message["body"])
                answer.whole = not message.get("more_body", False)
            answer._changed.set()

        answer.task = asyncio.create_task(self._app(scope, receive, send))
        return answer

    async def get(self, path: str, **headers: str) -> Answer:
        return await self.ask(path, method="GET", **headers).end()

    async def post(self, path: str = "/v1/completions", body: Any = None, **headers: str) -> Answer:
        return await self.ask(path, {"prompt": "hello"} if body is None else body, **headers).end()

    async def metric(self, name: str, worker: FakeWorker | None = None, **labels: str) -> float:
        """One value of /metrics, 0 where it is not there."""
        wanted = {**({"worker": worker.url} if worker else {}), **labels}
        for line in (await self.get("/metrics")).body.decode().splitlines():
            if line.split("{")[0].split(" ")[0] == f"workbench:router_{name}" and all(
                f'{key}="{value}"' in line for key, value in wanted.items()
            ):
                return float(line.rsplit(" ", 1)[1])
        return 0.0

    async def state_of(self, worker: FakeWorker) -> dict[str, Any]:
        listed = (await self.get("/workers")).json["workers"]
        return next(each for each in listed if each["url"] == worker.url)

    async def look(self) -> None:
        """Look at every worker's health once."""
        await self.front.health.first_looks()


def routed(
    test: Callable[[Client], Coroutine[Any, Any, None]],
    *workers: FakeWorker,
    down: tuple[int, ...] = (),
    prefills: int = 0,
    **settings: Any,
) -> None:
    """Run a test with a client of a router before these workers; those of ``down`` are stopped before it starts. The first
    ``prefills`` are of role prefill, and the others then of role decode."""

    async def run() -> None:
        clock, said = Clock(), []
        async with AsyncExitStack() as stack:
            for worker in workers:
                await worker.start()
                stack.push_async_callback(worker.stop)
            urls = tuple(worker.url for worker in workers)
            roles = {"prefill": urls[:prefills], "decode": urls[prefills:]} if prefills else {"worker": urls}
            given = {**roles, **settings}
            given.setdefault("connect_timeout_s", PATIENCE_S)
            for number in down:
                await workers[number].stop()
            front = Front(RouteSettings(**given), clocks=clock.clocks(), say=said.append)
            stack.push_async_callback(front.close)
            await front.start()
            await asyncio.wait_for(test(Client(front, list(workers), clock, said)), PATIENCE_S)

    in_a_loop(run())
