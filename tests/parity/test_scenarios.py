"""Scenarios are what recordings were made from, to the token; recordings are of them, and add up."""

from __future__ import annotations

import gzip
import hashlib
import json
import subprocess
import sys
from dataclasses import astuple
from pathlib import Path

import pytest

from workbench.parity.scenarios import CASES, Request, scenario, token

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks" / "recordings"
RECORDINGS = sorted(FOLDER.glob("*.json.gz"))

DIGESTS = {
    "roomy": ("a51fa2482a80a21e", "05482caf4748ca42"),
    "small-budget": ("df1f7cf6a8bc2b40", "0c22a1a5212819b2"),
    "tight": ("952769b3284f79f0", "7032a425627100f9"),
    "tight-burst": ("161c9f1fdf014465", "95701d7d3f1028e6"),
    "few-rows": ("f5aaa62d41edecaf", "2c6a91dfc5c5a05b"),
    "priority": ("db67917bae443dd8", "541ef76de306325b"),
    "priority-rows": ("5b844097d394f2ba", "8b0ae9ff4ea5b370"),
    "aborts": ("a585581cf92015d4", "d05422ba26528ae6"),
    "long-prompts": ("4a24e74b5b183b4e", "0e2d77ac3b04ecf1"),
    "conversations": ("039e7331966dadd1", "8c3d1f2c90fd4af0"),
    "long-prefill": ("33da43cd7c3b685d", "2dd2b671869ecea9"),
    "mixed": ("e91c948a01ecfc75", "1723ddc3dcd18bfd"),
    "lpm": ("63d580806c11d14f", "4268df1368ef1bbf"),
}
"""Of the requests of each case under seeds 0 and 1. What changes one makes recordings of that case worthless."""


def digest(requests: list[Request]) -> str:
    return hashlib.sha256(json.dumps([astuple(request) for request in requests]).encode()).hexdigest()[:16]


@pytest.mark.parametrize("case", CASES)
def test_the_requests_of_a_case_and_seed_never_change(case):
    assert tuple(digest(scenario(case, seed)) for seed in (0, 1)) == DIGESTS[case]


def test_the_tokens_that_requests_write_never_change():
    written = [token(f"r{number:03d}", position) for number in (0, 7, 59) for position in (0, 1, 118)]
    assert written == [2, 444, 424, 370, 315, 294, 120, 64, 44]
    assert all(2 <= token(f"r{number:03d}", position) < 500 for number in range(60) for position in range(120))


def test_what_an_engines_environment_imports_needs_the_standard_library_alone():
    code = "import sys; sys.path[:0] = sys.argv[1:]; import recording; print(len(recording.scenario('tight', 0)))"
    command = [sys.executable, "-I", "-S", "-c", code, str(ROOT), str(FOLDER)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "60\n"


STEP_TOO_MANY = ("sglang-0.5.10.post1",)
"""Engines that learn of an end by length a step late under overlap, and run the row once more."""


def read(path: Path) -> tuple[str, dict[str, list[dict[str, int]]]]:
    """The engine's name without its version and what was asked of it, and the steps by key."""
    record = json.loads(gzip.decompress(path.read_bytes()))
    record.pop("recorder", None)
    return record.pop("engine").split()[0], record


def by_name(path: Path) -> str:
    return path.name.removesuffix(".json.gz")


@pytest.mark.parametrize("path", RECORDINGS, ids=by_name)
def test_a_recording_is_of_cases_that_its_engine_has_and_small(path):
    engine, scenarios = read(path)
    assert path.stat().st_size < 150_000
    for key in scenarios:
        case, *pages, mode, seed = key.split("/")
        assert engine in CASES[case].engines
        if engine == "vllm":
            assert (pages, mode in ("sync", "async")) == ([], True)
        else:
            assert (pages in (["1"], ["16"]), mode in ("normal", "overlap")) == (True, True)
        assert seed.isdecimal()


@pytest.mark.parametrize("path", RECORDINGS, ids=by_name)
def test_a_recording_computes_each_request_to_its_end_and_holds_no_more_than_its_case(path):
    engine, scenarios = read(path)
    for key, steps in scenarios.items():
        name, *pages, mode, seed = key.split("/")
        late = mode == "overlap" and path.name.startswith(STEP_TOO_MANY)
        case, page = CASES[name], int(pages[0]) if pages else 16
        requests = {request.id: request for request in scenario(name, int(seed))}
        # What each computed since it came or last lost its KV: nothing, if its last token was on its way then.
        computed = dict.fromkeys(requests, 0)
        before_loss = dict(computed)
        for number, step in enumerate(steps):
            rows = {id: tokens for id, tokens in step.items() if id != "!"}
            assert 0 < len(rows) <= case.running, (key, number)
            assert min(rows.values()) >= 1, (key, number)
            if engine == "vllm":
                assert sum(rows.values()) <= case.budget, (key, number)
            for id in step.get("!", ()):
                assert computed[id], (key, number, id, "lost what it had not")
                before_loss[id], computed[id] = computed[id], 0
            for id, tokens in rows.items():
                computed[id] += tokens
        for id, request in requests.items():
            whole = len(request.prompt) + request.output - 1  # The last token that it writes is never computed.
            cached = whole - (computed[id] or before_loss[id])
            if request.abort_step is not None:
                assert cached >= -late, (key, id)
            else:
                # What was found in the cache is whole pages, and never all of a prompt.
                assert -late <= cached < whole, (key, id)
                assert cached % page == 0 or (late and (cached + 1) % page == 0), (key, id)


def test_aborts_and_losses_are_recorded_where_a_case_is_about_them():
    for path in RECORDINGS:
        _, scenarios = read(path)
        for key, steps in scenarios.items():
            name, *_, seed = key.split("/")
            if name == "aborts":
                requests = scenario(name, int(seed))
                computed = {q.id: sum(step.get(q.id, 0) for step in steps) for q in requests}
                cut = [q for q in requests if q.abort_step is not None and computed[q.id] < q.output]
                assert cut, (path.name, key)
            if name in ("tight", "priority") and path.name.startswith("vllm"):
                assert any("!" in step for step in steps), (path.name, key)
