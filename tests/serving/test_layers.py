"""What in the server may know of what."""

from __future__ import annotations

import ast

import pytest

from tests.test_import_arrows import all_imports, modules, under
from workbench.serving.http.errors import MEANINGS
from workbench.serving.refusals import KINDS, refusal_of

SERVING = "workbench.serving"
HTTP = f"{SERVING}.http"
BELOW = sorted(name for name in modules() if under(name, SERVING) and not under(name, HTTP, f"{SERVING}.supervisor"))
"""All that does not speak HTTP; the supervisor puts the two together."""


def test_nothing_below_http_imports_it_or_what_it_is_made_with():
    assert [
        f"{i.importer} -> {i.target}"
        for i in all_imports()
        if i.importer in BELOW and under(i.target, HTTP, "starlette", "uvicorn", "h11", "http")
    ] == []


def test_http_reaches_the_engine_through_the_service_only():
    own = {
        f"{SERVING}.{name}" for name in ("service", "requests", "chunks", "refusals", "sampling_params", "open_request")
    }
    own |= {f"{SERVING}.structured.{name}" for name in ("formats", "compiler")}
    own |= {f"{SERVING}.outputs.{name}" for name in ("parser", "pieces", "tools")}
    own |= {
        f"{SERVING}.metrics",
        f"{SERVING}.serve_settings",
        f"{SERVING}.listen_settings",
        "workbench.scheduler.config",
    }
    assert [
        f"{i.importer} -> {i.target}"
        for i in all_imports()
        if under(i.importer, HTTP)
        and under(i.target, "workbench", "backends", "traces", "reports")
        and i.target not in own
        and not under(i.target, HTTP)
    ] == []


@pytest.mark.parametrize("name", BELOW)
def test_nothing_below_http_has_a_status(name):
    named = {
        getattr(node, "arg", None) or getattr(node, "attr", None) or getattr(node, "id", None)
        for node in ast.walk(ast.parse(modules()[name].read_text()))
    }
    assert {"status", "status_code"} & named == set()


def test_every_kind_of_refusal_has_a_status():
    assert set(MEANINGS) == KINDS


def test_every_word_with_which_the_scheduler_rejects_is_a_kind_of_refusal():
    words = {
        node.value
        for name, path in modules().items()
        if under(name, "workbench.scheduler")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in KINDS
    }
    assert {"prompt_exceeds_kv", "prompt_exceeds_context", "duplicate_id", "unknown_session", "kv_exhausted"} <= words
    rejections = words - {"kv_exhausted", "queue_timeout", "request_timeout"}
    assert all(refusal_of("rejected", word, "prompt").kind == word for word in rejections)


def test_one_place_compares_the_name_of_a_backend():
    compared = {
        name
        for name, path in modules().items()
        if under(name, SERVING, "workbench.cli.serve")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Compare)
        and any(isinstance(part, ast.Constant) and part.value == "simulated" for part in (node.left, *node.comparators))
    }
    assert compared == {f"{SERVING}.backends.backend_spec"}


def test_only_the_inbox_makes_messages_of_the_scheduler():
    messages = {
        node.name
        for node in ast.parse(modules()["workbench.scheduler.messages"].read_text()).body
        if isinstance(node, ast.ClassDef)
    }
    makers = {
        name
        for name, path in modules().items()
        if under(name, SERVING)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module == "workbench.scheduler.messages"
        for made in ast.walk(ast.parse(path.read_text()))
        if isinstance(made, ast.Call) and isinstance(made.func, ast.Name) and made.func.id in messages
    }
    assert makers == {f"{SERVING}.engine.inbox"}


def test_no_process_of_a_server_but_the_scheduler_works_out_what_ends_a_sequence():
    asked = {name for name, path in modules().items() if under(name, SERVING) and "eos_token_ids" in path.read_text()}
    says = {f"{SERVING}.backends.modelled_backend", f"{SERVING}.backends.real_backend"}
    ends_grammars = {f"{SERVING}.engine.scheduler_process", f"{SERVING}.engine.matchers"}  # of the scheduler's process
    assert asked == says | ends_grammars
