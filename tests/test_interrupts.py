"""Ctrl-C at any moment of a simulated run leaves a whole record of what was simulated by then."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reports.record.run_record import RunRecord, read_record, write_record
from traces import open_trace
from workbench.cluster.interrupts import Interrupted, noted_interrupts, raised_interrupts
from workbench.cluster.simulate import simulate_loop
from workbench.settings.run_settings import RunSettings

SAMPLE = Path(__file__).resolve().parent.parent / "traces" / "samples" / "sample.jsonl"
WRITERS = (
    "recording/recorder.py",
    "cluster/skip_ahead.py",
    "cluster/simulated_world.py",
    "scheduler/decided.py",
    "record/iteration_log.py",
)
SETTINGS = RunSettings(model="Qwen/Qwen3-0.6B", requests=8, rate=40.0)


def simulate(loop: str) -> RunRecord:
    from traces.reshape import reshape

    trace = reshape(open_trace(SAMPLE), SETTINGS.rate, None, SETTINGS.requests)
    return simulate_loop(SETTINGS, loop, trace, trace_sha256="", command="test")


class CtrlC:
    """Counts calls in the code that writes down what happens, and presses Ctrl-C at one of them."""

    def __init__(self, at_call: int | None = None) -> None:
        self.calls, self.at_call = 0, at_call

    def __call__(self, frame: FrameType, event: str, _: object) -> None:
        if event in ("call", "c_call") and frame.f_code.co_filename.endswith(WRITERS):
            self.calls += 1
            if self.calls == self.at_call:
                signal.raise_signal(signal.SIGINT)

    def run(self, loop: str) -> RunRecord:
        before = sys.getprofile()
        sys.setprofile(self)
        try:
            return simulate(loop)
        finally:
            sys.setprofile(before)


@pytest.mark.parametrize("loop", ["normal", "overlap"])
@pytest.mark.slow
def test_ctrl_c_anywhere_in_a_run_keeps_a_record_of_all_that_came_before(loop: str) -> None:
    whole = simulate(loop)
    counted = CtrlC()
    counted.run(loop)

    @given(st.integers(1, counted.calls))
    @settings(max_examples=60, deadline=None)
    def holds(at_call: int) -> None:
        with noted_interrupts():  # as the command does, so that loading and recording are not cut in two either
            record = CtrlC(at_call).run(loop)
        if not record.requests["request_id"]:
            return  # before the first arrival: there is nothing to keep
        with TemporaryDirectory() as folder:
            write_record(record, Path(folder) / loop)
            kept = read_record(Path(folder) / loop)
        steps = len(kept.iterations["end_s"])
        assert record.meta["totals"]["iterations"] == steps
        if not record.meta["interrupted"]:  # the last request had ended
            assert steps == len(whole.iterations["end_s"])
        for name, values in kept.iterations.items():
            np.testing.assert_array_equal(values, whole.iterations[name][:steps], err_msg=name)
        assert record.itl[1].sum() <= whole.itl[1].sum()

    holds()


def test_a_second_ctrl_c_ends_at_once_and_the_handler_from_before_comes_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    with noted_interrupts() as interrupt:
        interrupt.check()
        signal.raise_signal(signal.SIGINT)
        assert interrupt.asked
        with noted_interrupts() as inner:
            assert inner is interrupt
        with pytest.raises(Interrupted):
            interrupt.check()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_long_wait_inside_is_broken_off_by_the_first_ctrl_c() -> None:
    with noted_interrupts() as interrupt:
        with pytest.raises(KeyboardInterrupt), raised_interrupts():
            signal.raise_signal(signal.SIGINT)
        assert not interrupt.asked


def test_where_the_signal_is_ignored_or_in_a_thread_nothing_is_changed() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with noted_interrupts() as interrupt:
            signal.raise_signal(signal.SIGINT)
            assert not interrupt.asked
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    found = []

    def elsewhere() -> None:
        with noted_interrupts():
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert found == [before]


def test_ctrl_c_while_the_commands_are_imported_ends_without_a_traceback() -> None:
    code = (
        "import signal, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name == 'workbench.cli.simulate':\n"
        "            signal.raise_signal(signal.SIGINT)\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "sys.meta_path.insert(0, Finder())\n"
        "from workbench.cli.main import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")
