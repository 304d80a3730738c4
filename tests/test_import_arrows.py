"""Who may import whom, read from the sources: the arrows of the design, and no circles."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("ground", "workbench", "backends", "traces", "reports")


@dataclass(frozen=True)
class Import:
    """One name imported by a module."""

    importer: str
    target: str
    """The module that has to be loaded for it."""
    at_module_level: bool
    type_checking: bool


@cache
def modules() -> dict[str, Path]:
    """Every module of the project by its dotted name; a package's name is its ``__init__``."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def _tests_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def _statements(node: ast.AST, level: bool, typing: bool) -> Iterator[tuple[ast.AST, bool, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, level, typing
        inner_level = level and not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if _tests_type_checking(child):
            assert isinstance(child, ast.If)
            for statement in child.body:
                yield from _statements(ast.Module([statement], []), inner_level, True)
            for statement in child.orelse:
                yield from _statements(ast.Module([statement], []), inner_level, typing)
        else:
            yield from _statements(child, inner_level, typing)


def imports_in(source: str, name: str, is_package: bool, known: frozenset[str]) -> list[Import]:
    """Every import of a source text, as the modules it loads."""
    found = []
    for node, level, typing in _statements(ast.parse(source), True, False):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        else:
            assert isinstance(node, ast.ImportFrom)
            base = node.module or ""
            if node.level:
                parts = name.split(".")
                parts = parts[: len(parts) - node.level + (1 if is_package else 0)]
                base = ".".join([*parts, base] if base else parts)
            targets = [f"{base}.{a.name}" if f"{base}.{a.name}" in known else base for a in node.names]
        found += [Import(name, target, level, typing) for target in dict.fromkeys(targets)]
    return found


@cache
def all_imports() -> tuple[Import, ...]:
    known = frozenset(modules())
    found: list[Import] = []
    for name, path in modules().items():
        found += imports_in(path.read_text(), name, path.name == "__init__.py", known)
    return tuple(found)


def under(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def of_project(name: str) -> bool:
    return under(name, *PACKAGES)


def offending(importer: str, allowed: tuple[str, ...]) -> list[str]:
    """Imports of project modules, from under ``importer``, that are not under ``allowed``.

    ``workbench`` itself holds the version and nothing else; it is loaded by every import below it.
    """
    return [
        f"{i.importer} -> {i.target}"
        for i in all_imports()
        if under(i.importer, importer)
        and of_project(i.target)
        and not under(i.target, *allowed)
        and i.target != "workbench"
    ]


CONTRACT = ("workbench.backend", "workbench.phase_log")
BESIDE = ("ground", "backends", "traces", "reports")
RUN = tuple(f"workbench.{name}" for name in ("settings", "clients", "recording", "cluster", "calibrate"))
"""What puts the pieces of a run together, in order: each may import those before it."""
BATCH = "workbench.scheduler.batch"
SIMULATOR = "backends.simulated"
MODELLED = ("backends.checkpoint", "backends.capture_sizes", BATCH)
UNDER_RUN = ("workbench.scheduler", *CONTRACT, "workbench.loops", "workbench.roles", "workbench.instance", *BESIDE)
INSIDE = {
    "reports.record": (),
    "reports.imported": ("reports.record",),
    "reports.metrics": ("reports.record",),
    "reports.timeline": ("reports.metrics", "reports.record"),
    "reports.verdict": ("reports.metrics", "reports.record"),
    "reports.compare": ("reports.metrics", "reports.record"),
    "reports.terminal": ("reports.metrics", "reports.record"),
    "reports.exports": ("reports.verdict", "reports.timeline", "reports.metrics", "reports.record"),
    "traces.files": (),
    "traces.requests": ("traces.files",),
    "traces.formats": ("traces.requests", "traces.files"),
    "backends.checkpoint": (),
    f"{SIMULATOR}.catalogue": ("backends.checkpoint",),
    f"{SIMULATOR}.cost": (f"{SIMULATOR}.catalogue", *MODELLED),
    f"{SIMULATOR}.cost.models": (
        f"{SIMULATOR}.cost.cost_request",
        f"{SIMULATOR}.catalogue",
        *MODELLED,
    ),
}
"""What the packages inside of others may import beside themselves and the ground."""
ARROWS = {
    "ground": ("ground",),
    "workbench.scheduler": ("workbench.scheduler",),
    "workbench.backend": ("workbench.scheduler.batch",),
    "workbench.phase_log": ("workbench.backend", "workbench.scheduler.batch"),
    "workbench.roles": ("workbench.scheduler",),
    "workbench.instance": (
        "workbench.instance",
        "workbench.roles",
        "workbench.scheduler",
        "workbench.backend",
        "workbench.loops",
    ),
    "workbench.loops": ("workbench.loops", "workbench.scheduler", "workbench.backend"),
    "workbench.handover": ("workbench.handover", "workbench.scheduler"),
    "backends": ("backends", "ground", *CONTRACT, "workbench.scheduler.batch"),
    "traces": ("traces", "ground"),
    "reports": ("reports", "ground"),
    **{package: (package, "ground", *allowed) for package, allowed in INSIDE.items()},
    **{package: (*RUN[: place + 1], *UNDER_RUN) for place, package in enumerate(RUN)},
    "workbench.parity": (
        "workbench.parity",
        "workbench.settings",
        "workbench.scheduler",
        "workbench.loops",
        "workbench.instance",
        *CONTRACT,
        "ground",
    ),
    "workbench.api": ("workbench.api", *RUN, *UNDER_RUN),
    "workbench.routing": (
        *(
            f"workbench.{name}"
            for name in ("routing", "serving", "handover", "cluster", "clients", "settings", "scheduler")
        ),
        "ground",
    ),
    "workbench.fleet": (
        *(f"workbench.{name}" for name in ("fleet", "routing", "serving", "recording", "settings", "scheduler")),
        "reports",
    ),
    "workbench.search": ("workbench.search", *RUN, "ground", "traces", "reports"),
}


@pytest.mark.parametrize("package", ARROWS)
def test_a_package_imports_only_what_its_arrows_allow(package):
    assert offending(package, ARROWS[package]) == []


def test_every_arrow_starts_at_a_package_that_exists():
    assert [package for package in ARROWS if package not in modules()] == []


def test_the_scheduler_needs_numpy_and_the_standard_library_only():
    outside = {
        f"{i.importer} -> {i.target}"
        for i in all_imports()
        if under(i.importer, "workbench.scheduler")
        and not under(i.target, "workbench.scheduler", "numpy")
        and i.target.partition(".")[0] not in sys.stdlib_module_names
    }
    assert outside == set()


def test_loops_and_the_contract_need_nothing_beyond_numpy_and_the_standard_library():
    outside = {
        f"{i.importer} -> {i.target}"
        for i in all_imports()
        if under(i.importer, "workbench.loops", *CONTRACT)
        and not under(i.target, "workbench", "numpy")
        and i.target.partition(".")[0] not in sys.stdlib_module_names
    }
    assert outside == set()


def test_only_the_command_line_the_server_and_the_run_put_pieces_together():
    # To put together is to import two of: the deciding side, the executing side, the traces, the reports.
    sides = (("workbench.scheduler", "workbench.loops"), ("backends",), ("traces",), ("reports",))
    builders = set()
    for name in modules():
        mine = [i.target for i in all_imports() if i.importer == name and not i.type_checking]
        home = [side for side in sides if under(name, *side)]
        # A backend may know the batch it runs: that is the contract, not a piece.
        reached = [
            side
            for side in sides
            if side not in home and any(under(t, *side) and t != "workbench.scheduler.batch" for t in mine)
        ]
        if len(home) + len(reached) > 1:
            builders.add(name)
    assert [
        name
        for name in sorted(builders)
        if not under(
            name, "workbench.cli", "workbench.api", "workbench.serving", "workbench.fleet", "workbench.search", *RUN
        )
    ] == []
    assert builders, "nothing puts the pieces together: this test looks at the wrong names"


def _cycle(graph: dict[str, set[str]]) -> list[str]:
    done: set[str] = set()
    path: list[str] = []

    def visit(name: str) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        path.append(name)
        for target in sorted(graph.get(name, ())):
            if found := visit(target):
                return found
        path.pop()
        done.add(name)
        return []

    for name in sorted(graph):
        if found := visit(name):
            return found
    return []


def _graph(imports: tuple[Import, ...] | list[Import], known: frozenset[str]) -> dict[str, set[str]]:
    """Edges between modules, those that only type checkers see included: a circle is one there, too.

    Loading a module loads the packages above it, except those the importer is in.
    """
    graph: dict[str, set[str]] = {}
    for i in imports:
        if not i.at_module_level or not of_project(i.target):
            continue
        parts = i.target.split(".")
        for depth in range(1, len(parts) + 1):
            loaded = ".".join(parts[:depth])
            ancestor = depth < len(parts) and under(i.importer, loaded)
            if loaded in known and not ancestor and loaded != i.importer:
                graph.setdefault(i.importer, set()).add(loaded)
    return graph


def test_no_module_imports_itself_by_a_detour():
    assert _cycle(_graph(all_imports(), frozenset(modules()))) == []


def package_of(name: str) -> str:
    """The package that a module is of, if it has modules only; a module beside packages stands for itself."""
    package = name if modules()[name].name == "__init__.py" else name.rpartition(".")[0]
    holds_packages = any(
        path.name == "__init__.py" and other.rpartition(".")[0] == package for other, path in modules().items()
    )
    return name if holds_packages else package


def test_no_package_imports_itself_by_a_detour_not_even_inside_functions():
    graph: dict[str, set[str]] = {}
    for i in all_imports():
        if i.target in modules():
            one, other = package_of(i.importer), package_of(i.target)
            if one != other:
                graph.setdefault(one, set()).add(other)
    assert _cycle(graph) == []
    assert "reports.record" in graph["reports.metrics"], "the graph has no arrows: this test looks at the wrong names"


SAME_KIND = {
    "__init__": "a package",
    "backend": "the contract and the two that keep it",
    "errors": "the errors of a package",
    "llmservingsim": "a reader of LLMServingSim's files",
    "messages": "messages to the scheduler, and what makes them of a trace",
    "sampler": "how a backend chooses tokens",
    "sessions": "sessions: as clients play them, as the server keeps them, as the scheduler continues them",
}
"""Names that several modules have because they are the same thing in several places."""


def test_no_two_modules_of_one_name_mean_different_things():
    # A module of the command line is called what its command is, like the module that does it.
    places: dict[str, list[str]] = {}
    for name, path in modules().items():
        if not under(name, "workbench.cli"):
            places.setdefault(path.stem, []).append(name)
    assert {stem: names for stem, names in places.items() if len(names) > 1 and stem not in SAME_KIND} == {}
    assert [stem for stem in SAME_KIND if len(places.get(stem, [])) < 2] == []


def test_the_search_for_circles_finds_one():
    assert _cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert _cycle({"a": {"b", "c"}, "b": {"c"}}) == []


def test_imports_for_type_checkers_and_inside_functions_are_told_apart():
    source = (
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from traces import trace\n"
        "else:\n    import numpy\n"
        "def f():\n    import torch\n"
        "class C:\n    from . import files\n"
        "try:\n    import zstandard\nexcept ImportError:\n    pass\n"
    )
    found = imports_in(source, "traces.x", False, frozenset({"traces.trace", "traces.files"}))
    assert [(i.target, i.at_module_level, i.type_checking) for i in found] == [
        ("typing", True, False),
        ("traces.trace", True, True),
        ("numpy", True, False),
        ("torch", False, False),
        ("traces.files", True, False),
        ("zstandard", True, False),
    ]


def test_the_torch_backend_is_imported_nowhere_at_module_level():
    assert [
        f"{i.importer} -> {i.target}"
        for i in all_imports()
        if i.at_module_level
        and not i.type_checking
        and under(i.target, "backends.torch")
        and not under(i.importer, "backends.torch")
    ] == []


REAL_RUNS = {
    "replay": ("workbench.cli.replay", "workbench.cli.runs", "workbench.cli.waits", "workbench.cluster.replay"),
    "serve": ("workbench.cli.serve", "workbench.serving.supervisor", "workbench.serving.engine.scheduler_process"),
    "observe": ("workbench.cli.observe", "workbench.clients.observe"),
}
"""What the commands of runs on something real import, and what their functions do."""
CHECKS = (
    "workbench.cluster.device",
    "workbench.settings.real",
    "workbench.settings.run_settings",
    "workbench.settings.idle",
    "backends.torch.backend",
)


@pytest.mark.parametrize("command", REAL_RUNS)
def test_a_run_on_something_real_does_not_load_the_simulator(command):
    pytest.importorskip("torch")
    names = [*REAL_RUNS[command], *CHECKS]
    source = (
        f"import importlib, sys\nfor name in {names}: importlib.import_module(name)\n"
        f"print(*sorted(name for name in sys.modules if name.startswith({SIMULATOR!r})))"
    )
    ran = subprocess.run([sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout.split() == []


def test_torch_and_transformers_are_imported_at_module_level_by_the_torch_backend_only():
    assert [
        f"{i.importer} -> {i.target}"
        for i in all_imports()
        if i.at_module_level
        and not i.type_checking
        and under(i.target, "torch", "transformers")
        and not under(i.importer, "backends.torch")
    ] == []


def test_every_import_of_the_project_names_a_module_that_exists():
    known = modules()
    missing = [f"{i.importer} -> {i.target}" for i in all_imports() if of_project(i.target) and i.target not in known]
    assert missing == []


def test_the_top_package_imports_nothing_before_something_of_it_is_asked_for():
    mine = [i for i in all_imports() if i.importer == "workbench" and i.target != "__future__"]
    assert [i.target for i in mine if i.at_module_level or i.type_checking] == []
    assert {i.target for i in mine} <= {"importlib"}, "and then by name, so that nobody depends on all of it"


def test_files_of_values_are_read_and_written_in_one_place():
    # The server reads the bodies of requests and what tokenizers say of themselves: texts, not files.
    assert [
        f"{i.importer} -> {i.target}"
        for i in all_imports()
        if under(i.target, "json", "tomllib", "yaml") and not under(i.importer, "ground", "workbench.serving")
    ] == []
