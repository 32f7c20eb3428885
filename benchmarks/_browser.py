"""A browser that watches itself: every request of a page, and whether a picture on it is really there.

For ``tests/test_browser.py`` and ``book_check.py``: Debian's Chromium, driven by Playwright.
"""

from __future__ import annotations

import contextlib
import functools
import http.server
import io
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
)
#: Share of the central half that differs from its commonest colour, and how many colours, of a picture that is there.
LIVELY_SHARE, LIVELY_COLOURS = 0.05, 32
#: Share of pixels that a drag changes.
MOVED_SHARE = 0.005


def chromium() -> str | None:
    """Path of the browser, or None."""
    return shutil.which("chromium")


@contextlib.contextmanager
def browser() -> Iterator[Any]:
    """Chromium, headless."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=chromium(), args=list(FLAGS))
        try:
            yield running
        finally:
            running.close()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """The folder at an address of this machine."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@dataclass
class Watch:
    """What a page asked for: addresses that left the machine, requests that failed, errors of scripts."""

    external: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def attach(self, page: Any, base: str) -> None:
        """Begin to watch; ``base`` is where the book's own files are."""

        def on_request(request: Any) -> None:
            if not request.url.startswith((base, "data:", "blob:", "about:")):
                self.external.append(request.url)

        def on_response(response: Any) -> None:
            if response.status >= 400:
                self.failed.append(f"{response.status} {response.url}")

        page.on("request", on_request)
        page.on("response", on_response)
        # A blob is the page's own memory; a viewer that ends a worker breaks off reading it.
        page.on(
            "requestfailed",
            lambda request: request.url.startswith("blob:") or self.failed.append(f"{request.failure} {request.url}"),
        )
        page.on("pageerror", lambda error: self.errors.append(str(error)))


def pixels(png: bytes) -> np.ndarray:
    """(row, column, 3) uint8."""
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def liveliness(picture: np.ndarray) -> tuple[float, int]:
    """Share of the central half that is not of its commonest colour, and the number of its colours."""
    rows, columns = picture.shape[:2]
    centre = picture[rows // 4 : rows - rows // 4, columns // 4 : columns - columns // 4]
    centre = centre.reshape(-1, 3).astype(np.int64)
    _, counts = np.unique(centre @ np.array([65536, 256, 1]), return_counts=True)
    return 1 - counts.max() / counts.sum(), len(counts)


def is_lively(picture: np.ndarray) -> bool:
    """Whether something is drawn there, and not one flat colour or a message on it."""
    share, colours = liveliness(picture)
    return share > LIVELY_SHARE and colours > LIVELY_COLOURS


def moved_share(before: np.ndarray, after: np.ndarray) -> float:
    """Share of the pixels that differ."""
    return float((before != after).any(-1).mean())


def start_viewer(page: Any, figure: Any, engine: str, patience_s: float = 240) -> str:
    """Press the button of an engine; returns "ready", "failed", or "too slow" after ``patience_s``."""
    from playwright.sync_api import TimeoutError as TooSlow

    figure.locator(f"button[data-engine={engine}]").click()
    try:
        return wait_for_state(page, figure, patience_s)
    except TooSlow:
        return "too slow"


def wait_for_state(page: Any, figure: Any, patience_s: float = 240) -> str:
    """Wait until a volume figure is "ready" or "failed"; returns which."""
    page.wait_for_function(
        "id => ['ready', 'failed'].includes(document.getElementById(id).dataset.state)",
        arg=figure.get_attribute("id"),
        timeout=1000 * patience_s,
    )
    return figure.get_attribute("data-state")


def picture_of(page: Any, locator: Any, patience_s: float = 240) -> np.ndarray:
    """The pixels of an element as the reader sees them."""
    return pixels(locator.screenshot(timeout=1000 * patience_s))


def drag(page: Any, locator: Any) -> None:
    """Drag from a little above the middle of an element to the side and down."""
    box = locator.bounding_box()
    x, y = box["x"] + 0.3 * box["width"], box["y"] + 0.35 * box["height"]
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 0.15 * box["width"], y + 0.1 * box["height"], steps=4)
    page.mouse.up()
