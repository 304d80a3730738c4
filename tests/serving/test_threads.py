"""Work in threads keeps nobody waiting at the end, whatever it does."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from tests.event_loop import in_a_loop
from tests.patience import PATIENCE_S
from tests.serving.server import command, environment
from workbench.serving.threads import in_thread


def test_a_thread_answers_with_its_result_or_its_error():
    assert in_a_loop(in_thread(divmod, 7, 2)) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        in_a_loop(in_thread(divmod, 7, 0))


LEAVES = """
import asyncio, sys, threading
from workbench.serving.threads import end_process_if_busy, in_thread

async def leave():
    working = asyncio.ensure_future(in_thread(threading.Event().wait))
    await asyncio.sleep(0)
    working.cancel()

asyncio.run(leave())
print("left")
end_process_if_busy(7)
"""


def test_a_process_ends_while_a_thread_is_at_work():
    ran = subprocess.run(
        [sys.executable, "-c", LEAVES], capture_output=True, text=True, env=environment(), timeout=PATIENCE_S
    )
    assert (ran.returncode, ran.stdout, ran.stderr) == (7, "left\n", "")


LOADS_FOR_EVER = """
import threading
from workbench.cli.main import main
from workbench.serving import supervisor

def load_tokenizer(path):
    print("loading", flush=True)
    threading.Event().wait()

supervisor.load_tokenizer = load_tokenizer
main()
"""


def test_a_server_that_is_still_reading_its_tokenizer_ends_when_it_is_told_to():
    words = command()
    words[words.index("-c") + 1] = LOADS_FOR_EVER
    server = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())
    assert server.stdout is not None and server.stdout.readline() == "loading\n"
    server.send_signal(signal.SIGTERM)
    assert server.communicate(timeout=PATIENCE_S) == ("", "")
    assert server.returncode == 0
