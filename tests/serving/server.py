"""A server in its own process, as a user starts it, and what tests ask of it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import openai

from backends.simulated.synthetic import content_key, synthetic_output
from tests.patience import PATIENCE_S, until
from workbench.serving.text.tokenizer import ByteTokenizer

ROOT = Path(__file__).resolve().parents[2]
MODEL = "llama-3.1-8b"
_MAIN = "from workbench.cli.main import main; main()"


def command(*flags: str, model: str = MODEL, backend: str = "simulated", before: str = "") -> list[str]:
    """``before``: Python that runs first in the HTTP process."""
    return [sys.executable, "-c", f"{before}\n{_MAIN}", "serve", model, "--backend", backend, "--port", "0", *flags]


def environment(**extra: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **extra}


class Server:
    """``workbench serve`` on a free port. Modelled time does not pass unless asked to. ``limits`` are commands of the shell
    that starts it, ``before`` is as in :func:`command`."""

    def __init__(
        self,
        *flags: str,
        model: str = MODEL,
        backend: str = "simulated",
        limits: str = "",
        before: str = "",
        **env: str,
    ) -> None:
        if "--time-scale" not in flags and backend == "simulated":
            flags = (*flags, "--time-scale", "0")
        self._start(command(*flags, model=model, backend=backend, before=before), limits, env)

    def _start(self, words: list[str], limits: str, env: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            ["sh", "-c", f'{limits}\nexec "$@"', "sh", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(**env),
        )
        assert self.process.stdout is not None and self.process.stderr is not None
        line = self.process.stdout.readline()
        found = re.search(r"on (http://\S+)", line)
        if found is None:
            raise AssertionError(f"the server did not start: {line}{self.process.communicate()[1]}")
        self.first_line = line
        self.url = found[1]
        self._errors: list[str] = []
        self._reader = threading.Thread(target=lambda: self._errors.extend(self.process.stderr), daemon=True)
        self._reader.start()
        self.http = httpx2.Client(base_url=self.url, timeout=PATIENCE_S)

    def openai(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", **{"api_key": "none", "max_retries": 0, **options})

    def async_openai(self, **options: Any) -> openai.AsyncOpenAI:
        client = httpx2.AsyncClient(limits=httpx2.Limits(max_connections=None), timeout=PATIENCE_S)
        return openai.AsyncOpenAI(
            base_url=f"{self.url}/v1", http_client=client, **{"api_key": "none", "max_retries": 0, **options}
        )

    def metric(self, name: str, **labels: str) -> float:
        """One value of /metrics."""
        for line in self.http.get("/metrics").text.splitlines():
            if line.startswith(f"workbench:{name}{{") and all(f'{k}="{v}"' in line for k, v in labels.items()):
                return float(line.rsplit(" ", 1)[1])
        raise KeyError(name)

    def await_metric(self, name: str, holds: Callable[[float], bool], **labels: str) -> None:
        until(lambda: holds(self.metric(name, **labels)), f"{name} {labels}")

    def await_rest(self) -> None:
        """Until nothing of any request is left anywhere."""
        for name in ("num_requests_running", "num_requests_waiting", "kv_used_tokens"):
            self.await_metric(name, lambda value: value == 0)
        for process in ("http", "detokenizer"):
            self.await_metric("open_streams", lambda value: value == 0, process=process)

    def children(self) -> dict[str, int]:
        """Process ids of the scheduler and the detokenizer: started in this order, in which the kernel lists them."""
        path = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        pids = [int(pid) for pid in path.read_text().split()]
        spawned = [pid for pid in pids if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        assert len(spawned) == 2, spawned
        return dict(zip(("scheduler", "detokenizer"), spawned, strict=True))

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def wait(self) -> tuple[int, str]:
        """(exit code, what it said on stderr)."""
        code = self.process.wait(PATIENCE_S)
        self._reader.join(PATIENCE_S)
        self.http.close()
        return code, "".join(self._errors)

    def stop(self) -> tuple[int, str]:
        self.signal(signal.SIGTERM)
        return self.wait()

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.wait()


class RouterServer(Server):
    """``workbench route`` on a free port."""

    def __init__(self, *flags: str, **env: str) -> None:
        self._start([sys.executable, "-c", _MAIN, "route", "--port", "0", *flags], "", env)


def answer(prompt: str | list[int], tokens: int, seed: int | None = None) -> str:
    """What the simulated model writes to a prompt."""
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    key = content_key(np.array(ids, np.int32), seed)
    return bytes(synthetic_output(key, 0, tokens, tokenizer.writable_ids()).tolist()).decode()
