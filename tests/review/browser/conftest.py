"""A real Chromium that looks at a running ``probescore review``."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from made_run import made_run
from reviewed import Review

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """A browser; the test is skipped where there is none, or no playwright to drive it."""
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright in this environment")
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def review(chromium, tmp_path_factory) -> Iterator[Review]:
    """A review of two made runs; the module's tests share it."""
    folder = tmp_path_factory.mktemp("review")
    made_run(folder / "big", 4000, 20, activations=40)
    made_run(folder / "small", 320, 4, labels_per_step=16, seed=1)
    with Review(folder / "big", folder / "small", cache=folder / "cache") as running:
        yield running


class Window:
    """A page of the browser that shows a review, and what went wrong in it."""

    def __init__(self, page: Any, host: str) -> None:
        self.page = page
        self.host = host
        self.wrong: list[str] = []
        self.elsewhere: list[str] = []
        self.asked: list[str] = []
        page.on("pageerror", lambda error: self.wrong.append(f"error: {error}"))
        page.on("dialog", lambda dialog: (self.wrong.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("console", self._console)
        page.on("request", self._request)

    def _console(self, message: Any) -> None:
        # an answer that is an error (a server that was killed, a label that somebody else gave) is told to the user by the page
        if message.type in ("error", "warning") and not message.text.startswith("Failed to load resource"):
            self.wrong.append(f"console: {message.text}")

    def _request(self, request: Any) -> None:
        if not request.url.startswith((f"http://{self.host}/", "data:")):
            self.elsewhere.append(request.url)
        self.asked.append(request.url.removeprefix(f"http://{self.host}"))

    def open(self, address: str) -> Any:
        """Goes to a view, and waits until it is there."""
        self.page.goto("about:blank")
        self.page.goto(f"http://{self.host}/{address}")
        return self.settled()

    def settled(self) -> Any:
        self.page.wait_for_selector(".view:not([aria-busy])", timeout=60_000)
        self.until("!document.getElementById('content').textContent.includes('is being audited')", seconds=120)
        return self.page

    def until(self, expression: str, arg: Any = None, seconds: float = 30) -> None:
        """Waits until an expression is true in the page. (The page's policy forbids the evaluation that the driver's own wait does.)"""
        end = time.monotonic() + seconds
        while not self.page.evaluate(expression, arg):
            assert time.monotonic() < end, f"never true: {expression}; {arg!r}"
            self.page.wait_for_timeout(40)

    def press(self, *keys: str) -> None:
        for key in keys:
            self.page.keyboard.press(key)

    def overflow(self) -> int:
        """Returns by how many pixels the page is wider than its window."""
        return int(self.page.evaluate("document.documentElement.scrollWidth - innerWidth"))


@pytest.fixture
def window(chromium, review) -> Iterator[Callable[..., Window]]:
    """Opens windows, each with storage of its own; at the end nothing may have gone wrong in any, and none may have asked another host."""
    opened: list[tuple[Window, Any]] = []

    def make(width: int = 1280, height: int = 900, scheme: str = "light", host: str | None = None) -> Window:
        context = chromium.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        context.set_default_timeout(30_000)
        made = Window(context.new_page(), host or review.host)
        opened.append((made, context))
        return made

    yield make
    for _, context in opened:
        context.close()
    assert [each.wrong for each, _ in opened if each.wrong] == []
    assert [each.elsewhere for each, _ in opened if each.elsewhere] == []
