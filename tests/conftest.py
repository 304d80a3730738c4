"""What all tests share: one thread a process, one browser, marks by what a test starts, and what was skipped at the end."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# Before torch is imported: the threads of several test processes that share few cores spin while they wait for each
# other, and a test of seconds takes minutes.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# The same examples in every run, and none that fails for being slow: that is up to who else uses the machine.
settings.register_profile("workbench", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("workbench")


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """A process can drive only one browser at a time."""
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install playwright")
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        yield opened
        opened.close()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what starts a browser or a server; ``slow`` stands in the tests themselves."""
    for item in items:
        if "browser" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.browser)
        module = getattr(item, "module", None)
        if getattr(getattr(module, "Server", None), "__module__", None) == "tests.serving.server":
            item.add_marker(pytest.mark.server)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say at the end what was skipped and why; a reason names the command that brings what is missing, if one does."""
    reasons = Counter(
        str(report.longrepr[2]).removeprefix("Skipped: ") for report in terminalreporter.stats.get("skipped", ())
    )
    for reason, number in sorted(reasons.items(), key=lambda each: (-each[1], each[0])):
        terminalreporter.write_line(f"skipped {number}: {reason}")
