"""Opening pages for the tests that look at them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

Opened = Callable[..., Any]


@pytest.fixture
def open_page(browser: Any) -> Iterator[Opened]:
    """Opens a file, waits until everything is drawn, and holds it to have neither complained nor asked for anything."""
    pages = []

    def open_page(path: Path, width: int = 1280, scheme: str = "light") -> Any:
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        problems: list[str] = []
        asked: list[str] = []
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(path.as_uri())
        page.wait_for_selector("html[data-ready]", state="attached")
        pages.append((page, path, problems, asked))
        return page

    yield open_page
    for page, path, problems, asked in pages:
        page.close()
        assert problems == []
        assert [url for url in asked if not url.startswith("blob:")] == [path.as_uri()]
