"""Starts the processes of a server, watches them, drains and ends them. Runs in the HTTP process."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import tempfile
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from reports.record.run_record import prepare_out
from workbench.handover.addresses import join_address
from workbench.scheduler.config import ConfigError
from workbench.serving.backends.live_backend import SyntheticText
from workbench.serving.child import how_it_ended
from workbench.serving.engine.engine_client import EngineClient
from workbench.serving.engine.scheduler_process import run_engine
from workbench.serving.folders import with_folders
from workbench.serving.http.connections import FLUSH_S, Crowded, Server, connection_room, raise_open_files
from workbench.serving.http.endpoints import Api
from workbench.serving.http.metrics_page import MetricsPage
from workbench.serving.http.origins import Access, guarded
from workbench.serving.http.request_ids import RequestIds
from workbench.serving.listening import listen
from workbench.serving.metrics import Metrics
from workbench.serving.node import serve_node
from workbench.serving.refusals import Refusal
from workbench.serving.serve_settings import ServeSettings
from workbench.serving.service import Service
from workbench.serving.text.detokenizer import run_detokenizer
from workbench.serving.text.tokenizer import Tokenizer, closing_ids, load_tokenizer
from workbench.serving.threads import end_process_if_busy, in_thread
from workbench.serving.wire import Addresses, Ready
from workbench.settings.run_settings import RunSettings

LAST_WORDS_S = 1.0
"""How long answers may take to leave when the time to drain is over."""
SCHEDULER_END_S = 60.0
"""How long the scheduler process may take to end in order: it may be inside a long step, or have a long record to write."""
DETOKENIZER_END_S = 10.0
"""How long the detokenizer process may take once the scheduler, which tells it to, has ended."""


class ServerFailed(Exception):
    """The end of a process by itself, in one line."""


def serve(settings: ServeSettings, force: bool = False, listener: socket.socket | None = None) -> int:
    """Run a server to its end and return the exit code: 0 drained, 1 a process died or would not end. On a node beside
    node 0, run its share of one. ``listener`` takes the place of the address in the settings.

    Raises ValueError, RecordError or OSError for settings that cannot be served.
    """
    if settings.node_rank > 0:
        return serve_node(settings)
    raise_open_files()
    listener = listener or listen(settings.host, settings.port)
    access = Access.of(settings, listener.getsockname()[0])
    settings = with_folders(settings)
    if settings.record is not None:
        prepare_out(settings.record, force)
    folder = Path(tempfile.mkdtemp(prefix="workbench-"))
    try:
        code = asyncio.run(_Supervisor(settings, listener, folder, access).run())
    except ServerFailed as error:
        print(f"error: {error}", file=sys.stderr)
        code = 1
    finally:
        listener.close()
        shutil.rmtree(folder, ignore_errors=True)
    end_process_if_busy(code)
    return code


class _Supervisor:
    """One server's life."""

    def __init__(self, settings: ServeSettings, listener: socket.socket, folder: Path, access: Access) -> None:
        self._settings = settings
        self._access = access
        self._tokenizer: Tokenizer
        self._listener = listener
        self._addresses = Addresses.within(folder)
        self._children: list[BaseProcess] = []
        self._told = False
        """This process itself was told to end."""
        self._signalled = asyncio.Event()
        self._said: asyncio.Task[None]
        self._ending = False
        self._closing = contextlib.ExitStack()

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)
        metrics = Metrics(self._settings.model_name)
        engine = EngineClient(self._addresses, metrics, self._settings.max_queue)
        engine.end_asked = self._on_end_asked
        reader = asyncio.create_task(engine.run())
        try:
            starting = asyncio.create_task(self._start_children(engine))
            await self._unless_signalled(starting)
            if not starting.done():
                starting.cancel()
                return 0
            death = starting.result()
            ready = await self._started(engine, death)
            if ready is None:
                return 0
            return await self._serve(engine, metrics, ready, death)
        finally:
            if engine.failure is not None and self._settings.record is not None:
                await self._ends(self._children[0], SCHEDULER_END_S)  # what was recorded is still being written
            self._closing.close()
            for child in self._children:
                child.kill()
            for child in self._children:
                child.join()
            self._said.cancel()
            reader.cancel()
            await asyncio.gather(reader, self._said, return_exceptions=True)
            engine.destroy()

    def _on_signal(self, number: int) -> None:
        if self._told:
            for child in self._children:
                child.kill()
            shutil.rmtree(Path(self._addresses.http.removeprefix("ipc://")).parent, ignore_errors=True)
            os._exit(128 + number)
        self._told = True
        self._signalled.set()

    def _on_end_asked(self, who: str) -> None:
        print(f"note: {who}, and the server with it", file=sys.stderr)
        self._signalled.set()

    async def _start_children(self, engine: EngineClient) -> asyncio.Future[BaseProcess | None]:
        """Start both; the future is the first that ends by itself, or None when one says that it must.

        A real model loads while the tokenizer does.
        """
        loop = asyncio.get_running_loop()
        spawn = multiprocessing.get_context("spawn")
        death: asyncio.Future[BaseProcess | None] = loop.create_future()

        def ended(child: BaseProcess) -> None:
            loop.remove_reader(child.sentinel)
            if not death.done() and not self._ending:
                death.set_result(child)

        async def said() -> None:
            await engine.failed.wait()
            if not death.done() and not self._ending:
                death.set_result(None)

        self._said = asyncio.create_task(said())

        def start(child: BaseProcess) -> None:
            child.start()
            self._children.append(child)
            loop.add_reader(child.sentinel, ended, child)

        def start_scheduler(text: SyntheticText | None) -> None:
            start(spawn.Process(target=run_engine, args=(self._settings, self._addresses, text), name="scheduler"))

        spec = self._settings.spec
        if not spec.needs_text:
            start_scheduler(None)
        named = self._settings.tokenizer
        if named is None:
            named = spec.tokenizer(self._settings.run.model)
        self._tokenizer = await in_thread(load_tokenizer, named)
        if spec.needs_text:
            written = self._tokenizer
            start_scheduler(SyntheticText(written.writable_ids(), written.eos_token_id, closing_ids(written)))
        start(
            spawn.Process(
                target=run_detokenizer, args=(self._addresses, self._tokenizer.serialised()), name="detokenizer"
            )
        )
        return death

    async def _unless_signalled(self, *waiting: asyncio.Future[Any]) -> None:
        """Wait for any of these, or for a signal."""
        signalled = asyncio.create_task(self._signalled.wait())
        await asyncio.wait((*waiting, signalled), return_when=asyncio.FIRST_COMPLETED)
        signalled.cancel()

    async def _started(self, engine: EngineClient, death: asyncio.Future[BaseProcess | None]) -> Ready | None:
        """Wait until the scheduler process can take requests; None when told to end before."""
        await self._unless_signalled(engine.ready, death)
        if death.done():
            line = await self._why(engine, death.result())
            if engine.failure is not None and engine.failure.bad_input:
                raise ConfigError(line)
            raise ServerFailed(line)
        return engine.ready.result() if engine.ready.done() else None

    async def _serve(
        self, engine: EngineClient, metrics: Metrics, ready: Ready, death: asyncio.Future[BaseProcess | None]
    ) -> int:
        service = Service(self._settings, engine, self._tokenizer)
        self._closing.callback(service.close)
        warming = asyncio.create_task(service.warm())
        page = MetricsPage(metrics)
        app = guarded(Api(self._settings, service, page).app(), self._access, page.refused)
        crowded = Crowded(app, page.refused)
        room = connection_room()
        server = Server(self._listener, RequestIds(app), RequestIds(crowded), room)
        serving = asyncio.create_task(server.serve())
        while not server.started and not serving.done():
            await asyncio.sleep(0.01)
        self._announce(ready)
        admitted = self._settings.max_queue + ready.max_running
        if room < admitted:
            print(
                f"note: the limit of open files lets {room:,} clients connect at a time, fewer than --max-queue and "
                f"--max-running admit ({admitted:,}); more are answered 503",
                file=sys.stderr,
            )
        signalled = asyncio.create_task(self._signalled.wait())
        await asyncio.wait((death, signalled, serving), return_when=asyncio.FIRST_COMPLETED)
        line = None
        server.flush_s = FLUSH_S
        if not death.done():
            server.flush_s = await self._drain(engine, death, server)
        if death.done():
            line = await self._why(engine, death.result())
            engine.fail_all("server_failed", Refusal("engine_dead", line))
            server.cut_stalled()
        self._ending = True
        server.should_exit = True
        await serving
        signalled.cancel()
        warming.cancel()
        if line is None:
            engine.shut_down()
            for child, limit_s in zip(self._children, (SCHEDULER_END_S, DETOKENIZER_END_S), strict=True):
                if not await self._ends(child, limit_s):
                    raise ServerFailed(f"the {child.name} process did not end within {limit_s:g} s and was killed")
                if child.exitcode:
                    raise ServerFailed(await self._why(engine, child))
            return 0
        if self._settings.record is not None and engine.failure is None:
            engine.shut_down()  # another process has died: the scheduler's record is whole
            await self._ends(self._children[0], SCHEDULER_END_S)
        raise ServerFailed(line)

    async def _drain(self, engine: EngineClient, death: asyncio.Future[BaseProcess | None], server: Server) -> float:
        """Take nothing new and let what there is finish, within the time that may take; returns how many seconds are left
        for what was answered to be read."""
        clock = asyncio.get_running_loop().time
        deadline = clock() + self._settings.drain_timeout_s
        draining = Refusal("draining", "the server is shutting down", retry_after_s=1)
        engine.refuse_new(draining)
        engine.resume_for_drain()
        idle = asyncio.create_task(engine.idle.wait())
        await asyncio.wait((idle, death), timeout=self._settings.drain_timeout_s, return_when=asyncio.FIRST_COMPLETED)
        idle.cancel()
        if not engine.idle.is_set() and not death.done():
            print("warning: some requests were cut off at the end of --drain-timeout", file=sys.stderr)
            engine.fail_all("shutdown", draining)
            server.cut_stalled()
        return min(max(deadline - clock(), LAST_WORDS_S), FLUSH_S)

    async def _ends(self, child: BaseProcess, within_s: float) -> bool:
        """Tell whether a process ends by itself within so many seconds."""
        clock = asyncio.get_running_loop().time
        deadline = clock() + within_s
        while child.is_alive() and clock() < deadline:
            await asyncio.sleep(0.02)
        return not child.is_alive()

    async def _why(self, engine: EngineClient, child: BaseProcess | None) -> str:
        """One line about a process that has ended; what it said last may still be on its way."""
        for _ in range(20):
            if engine.failure is not None:
                return engine.failure.line
            await asyncio.sleep(0.01)
        assert child is not None
        child.join()
        return f"the {child.name} process {how_it_ended(child.exitcode)}"

    def _announce(self, ready: Ready) -> None:
        address = join_address(*self._listener.getsockname()[:2])
        print(
            f"serving {self._settings.model_name} on http://{address} ({ready.backend} {ready.device}, "
            f"{ready.loop} loop, {_prefill(self._settings.run)}, {ready.kv_tokens:,} KV tokens, "
            f"tokenizer: {self._tokenizer.name})",
            flush=True,
        )
        for note in self._access.notes():
            print(f"note: {note}", file=sys.stderr)


def _prefill(run: RunSettings) -> str:
    """Return how prompts are cut, in a few words."""
    if run.batching == "mixed":
        return f"steps of {run.max_batch_tokens} tokens"
    return "prompts whole" if run.chunk is None else f"chunk {run.chunk}"
