"""Volumes in a real browser, from http and as a file: judged by their pixels, offline, with the picture as the net.

The page is a small one of the test's own with the book's scripts and styles. An engine can report success and show
nothing, so what counts is what a screenshot holds, and that it changes when it is dragged.
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from build_html import fetch_assets

from difr3ct_core.interactive import frame_slider
from difr3ct_core.phantoms import ORGANS, make_phantom
from difr3ct_core.viewer import show_volume

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import _browser as tools  # noqa: E402
import book_check  # noqa: E402

# A processor that others use draws slowly.
pytestmark = pytest.mark.timeout(600)
SCHEMES = ("file", "http")
SIZE = {"width": 460, "height": 420}

BLANK = """
for (const kind of [WebGL2RenderingContext, WebGLRenderingContext])
  for (const call of Object.getOwnPropertyNames(kind.prototype).filter((name) => name.startsWith("draw")))
    if (typeof Object.getOwnPropertyDescriptor(kind.prototype, call).value === "function")
      kind.prototype[call] = function () {};
"""
NO_WEBGL = """
const real = HTMLCanvasElement.prototype.getContext;
HTMLCanvasElement.prototype.getContext = function (kind, ...rest) {
  return /webgl/.test(kind) ? null : real.call(this, kind, ...rest);
};
"""


@pytest.fixture(scope="module")
def running() -> Iterator[Any]:
    """The browser."""
    if tools.chromium() is None:
        pytest.skip("no chromium (apt-get install chromium)")
    if importlib.util.find_spec("playwright") is None:
        pytest.skip("no playwright (pip install playwright)")
    with tools.browser() as started:
        yield started


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the built book has it: a page with a volume and a slider, and _static beside it."""
    assets = fetch_assets(ROOT)
    if not assets:
        pytest.skip("the viewers' scripts are missing (npm had no network)")
    folder = tmp_path_factory.mktemp("site")
    shutil.copytree(ROOT / "book" / "static", folder / "_static")
    (folder / "_static" / "vendor").mkdir()
    for target, path in assets.items():
        shutil.copy(path, folder / "_static" / target)
    phantom = make_phantom(3, 24, fov_mm=320.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("JPY_SESSION_NAME", raising=False)
        figure = show_volume(phantom.hu, 320 / 24, phantom.labels, organs=ORGANS, title="A phantom")
    grey = [np.full((60, 90), 80 * k, np.uint8) for k in range(3)]
    slider = frame_slider(grey, ["0", "1", "2"], "grey {label}")
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>Volumes</title>'
        '<link rel="icon" href="data:,"><link rel="stylesheet" href="_static/book.css">'
        '<script src="_static/volume_figure.js"></script>'
    )
    page = f'<!doctype html><html lang="en" data-content_root="./"><head>{head}</head>'
    (folder / "index.html").write_text(f'{page}<body class="bd-content">{figure.html}{slider.html}</body></html>')
    return folder


@pytest.fixture(params=SCHEMES)
def base(request: pytest.FixtureRequest, site: Path) -> Iterator[str]:
    """Address of the site, with a slash at its end."""
    if request.param == "file":
        yield site.as_uri() + "/"
    else:
        with tools.served(site) as address:
            yield address


def open_page(running: Any, base: str, script: str = "", **options: Any) -> tuple[Any, Any, tools.Watch]:
    page = running.new_page(viewport=SIZE, **options)
    if script:
        page.add_init_script(script)
    watch = tools.Watch()
    watch.attach(page, base)
    page.goto(base + "index.html")
    return page, page.locator("figure.volume-figure"), watch


def assert_offline(watch: tools.Watch) -> None:
    assert watch.external == [] and watch.failed == [] and watch.errors == []


def poster_shows(page: Any, figure: Any) -> bool:
    """Whether the picture is on the screen, with pixels of its own."""
    image = figure.locator("img")
    return (
        image.is_visible() and figure.locator("iframe").count() == 0 and tools.is_lively(tools.picture_of(page, image))
    )


@pytest.mark.slow  # without a graphics card a 3D engine draws a picture in many seconds
@pytest.mark.parametrize("engine", ["niivue", "itk"])
def test_a_viewer_draws_and_answers_a_drag(running: Any, base: str, engine: str) -> None:
    page, figure, watch = open_page(running, base)
    assert poster_shows(page, figure)
    assert tools.start_viewer(page, figure, engine) == "ready", figure.locator(".volume-status").inner_text()
    frame = figure.locator("iframe")
    assert frame.get_attribute("data-engine") == engine, figure.locator(".volume-status").inner_text()
    before = tools.picture_of(page, frame)
    assert tools.is_lively(before), tools.liveliness(before)
    tools.drag(page, frame)
    after = tools.picture_of(page, frame)
    assert tools.moved_share(before, after) > tools.MOVED_SHARE
    figure.locator("button[data-engine='']").click()
    assert poster_shows(page, figure)
    assert_offline(watch)
    page.close()


def test_without_webgl_the_picture_stays(running: Any, base: str) -> None:
    page, figure, watch = open_page(running, base, NO_WEBGL)
    assert tools.start_viewer(page, figure, "itk") == "failed"
    assert "no WebGL" in figure.locator(".volume-status").inner_text()
    assert poster_shows(page, figure)
    assert_offline(watch)
    page.close()


@pytest.mark.slow
def test_a_viewer_that_draws_nothing_is_not_believed(running: Any, site: Path) -> None:
    """The negative control: draw calls that do nothing. The engines notice nothing; the figure must."""
    page, figure, _ = open_page(running, site.as_uri() + "/", BLANK)
    assert tools.start_viewer(page, figure, "niivue") == "failed"
    assert "nothing was drawn" in figure.locator(".volume-status").inner_text()
    assert poster_shows(page, figure)
    page.close()


def test_without_javascript_there_is_a_picture_and_no_button(running: Any, site: Path) -> None:
    page, figure, watch = open_page(running, site.as_uri() + "/", java_script_enabled=False)
    assert figure.locator("img").is_visible()
    assert figure.locator("button:visible").count() == 0
    assert "lungs" in figure.locator("img").get_attribute("alt")
    assert_offline(watch)
    page.close()


def test_on_a_phone_nothing_is_wider_than_the_screen(running: Any, site: Path) -> None:
    page, figure, _ = open_page(running, site.as_uri() + "/")
    page.set_viewport_size({"width": 340, "height": 700})
    assert page.evaluate("document.documentElement.scrollWidth") <= 340
    for button in figure.locator("button:visible").all():
        assert button.bounding_box()["height"] >= 32
    page.close()


@pytest.mark.slow
def test_the_book_check_counts_and_complains(running: Any, site: Path) -> None:
    """Sliders move; a page that asks another machine, and one that lacks a file, are told."""
    page, _, _ = open_page(running, site.as_uri() + "/")
    assert book_check.check_sliders(page) == (1, [])
    # The same slider without what listens to it.
    page.locator(".frame-slider input").evaluate("knob => knob.replaceWith(knob.cloneNode())")
    assert book_check.check_sliders(page)[1] == ["slider 0 does not move its picture"]
    page.close()
    watch, page = tools.Watch(), running.new_page()
    base = site.as_uri() + "/"
    watch.attach(page, base)
    page.route("http://192.0.2.1/**", lambda route: route.abort())
    (site / "bad.html").write_text('<img src="http://192.0.2.1/a.png"><script src="gone.js"></script>')
    page.goto(base + "bad.html")
    (site / "bad.html").unlink()
    assert watch.external == ["http://192.0.2.1/a.png"]
    assert any("gone.js" in what for what in watch.failed)
    page.close()


def test_the_book_check_measures_a_phone_and_looks_for_words(running: Any, site: Path) -> None:
    page, _, _ = open_page(running, site.as_uri() + "/")
    size = page.viewport_size
    assert book_check.check_layout(page) == []
    assert page.viewport_size == size
    page.evaluate("document.querySelector('img').alt = ' '")
    page.evaluate("document.body.insertAdjacentHTML('beforeend', '<div style=\"width: 700px\">wide</div>')")
    wide, silent = book_check.check_layout(page)
    assert "pixels wide on a phone of 390" in wide
    assert silent.startswith("a picture has no alternative text")
    page.close()


def test_a_viewer_that_is_not_ready_in_time_is_told_and_the_check_goes_on(running: Any, site: Path) -> None:
    page, figure, _ = open_page(running, site.as_uri() + "/")
    assert tools.start_viewer(page, figure, "niivue", patience_s=0.001) == "too slow"
    assert tools.wait_for_state(page, figure) == "ready"  # the page itself was not broken by it
    page.close()


def test_liveliness_knows_a_blank_picture() -> None:
    grey = np.full((80, 80, 3), 128, np.uint8)
    assert tools.liveliness(grey) == (0.0, 1) and not tools.is_lively(grey)
    noise = np.random.default_rng(0).integers(0, 255, (80, 80, 3), dtype=np.uint8)
    assert tools.is_lively(noise)
    message = grey.copy()
    message[38:42, 30:50] = 255  # two colours only
    assert not tools.is_lively(message)
    assert tools.moved_share(grey, grey) == 0 and tools.moved_share(grey, noise) > 0.9
