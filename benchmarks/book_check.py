"""Open every page of the built book in a browser, and write ``benchmarks/results/book.json``.

    python benchmarks/book_check.py [--html build/html] [--out benchmarks/results/book.json] [--engines itk,niivue]

Each page is opened from http and as a file: nothing may fail and nothing may leave the machine. Every slider must
change its picture, and every volume is shown in each of its 3D viewers and looked at. On a phone (390 pixels) no page
may be wider than the screen, and every picture needs words for those who do not see it. The exit code is 1 when
anything is amiss; the figures are written all the same. ``build_seconds`` is what `make book` noted for the pages.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from _browser import MOVED_SHARE as MOVED
from _browser import Watch, browser, chromium, drag, is_lively, moved_share, picture_of, served, start_viewer
from _results import update_results

from difr3ct_core.files import InputError, read_json

ROOT = Path(__file__).resolve().parents[1]
PHONE = 390  # pixels


def pages_of(html: Path) -> list[str]:
    """Addresses of the book's pages, relative to its folder.

    Raises:
        InputError: there is no book.
    """
    found = sorted(path.relative_to(html) for path in html.rglob("*.html"))
    pages = [path.as_posix() for path in found if path.parts[0] != "_static"]
    if "index.html" not in pages:
        raise InputError(f"{html}: holds no index.html, expected a built book; run `make book` first.")
    return pages


def _still(page: Any, frame: Any, patience_s: float = 20) -> Any:
    """The picture once it has stopped refining itself, so that what changes later is due to what was done to it."""
    before = picture_of(page, frame)
    for _ in range(round(patience_s)):
        page.wait_for_timeout(1000)
        after = picture_of(page, frame)
        if moved_share(before, after) < MOVED / 10:
            return after
        before = after
    return before


def _changes(page: Any, frame: Any, before: Any, patience_s: float = 20) -> bool:
    """Whether the picture moves within some seconds: without a GPU a volume is drawn slowly, which is no fault."""
    for _ in range(round(2 * patience_s)):
        if moved_share(before, picture_of(page, frame)) >= MOVED:
            return True
        page.wait_for_timeout(500)
    return False


def check_sliders(page: Any) -> tuple[int, list[str]]:
    """Move every slider by its keys; returns how many there are, and what is wrong."""
    amiss, sliders = [], page.locator("figure.frame-slider")
    for number in range(sliders.count()):
        slider = sliders.nth(number)
        image, knob = slider.locator("img"), slider.locator("input[type=range]")
        before = image.get_attribute("src")
        knob.press("Home" if knob.input_value() != knob.get_attribute("min") else "End")
        if image.get_attribute("src") == before:
            amiss.append(f"slider {number} does not move its picture")
    return sliders.count(), amiss


def check_layout(page: Any) -> list[str]:
    """What does not fit a phone, and pictures without alternative text; the width of the page is put back."""
    amiss, size = [], page.viewport_size
    page.set_viewport_size({"width": PHONE, "height": 844})
    width = page.evaluate("document.documentElement.scrollWidth")
    if width > PHONE:
        amiss.append(f"is {width} pixels wide on a phone of {PHONE}")
    page.set_viewport_size(size)
    silent = page.evaluate("[...document.images].filter(i => !i.alt.trim()).map(i => i.src.slice(0, 60))")
    return amiss + [f"a picture has no alternative text: {source}" for source in silent]


def check_viewers(page: Any, engines: list[str]) -> tuple[int, list[str]]:
    """Show every volume in every engine; returns how many were right, and what is wrong."""
    right, amiss, figures = 0, [], page.locator("figure.volume-figure")
    for number in range(figures.count()):
        figure = figures.nth(number)
        if not figure.locator("img").evaluate("image => image.complete && image.naturalWidth > 100"):
            amiss.append(f"volume {number} has no picture")
        for engine in engines:
            state = start_viewer(page, figure, engine)
            frame = figure.locator("iframe")
            if state != "ready" or frame.get_attribute("data-engine") != engine:
                words = figure.locator(".volume-status").inner_text()
                amiss.append(f"volume {number}: {engine} is {state} and says {words!r}")
                if state == "too slow":  # whatever it is busy with would slow the next one down
                    figure.locator("button[data-engine='']").click()
                continue
            before = _still(page, frame)
            drag(page, frame)
            if not is_lively(before):
                amiss.append(f"volume {number}: {engine} draws nothing")
            elif not _changes(page, frame, before):
                amiss.append(f"volume {number}: {engine} does not answer a drag")
            else:
                right += 1
            figure.locator("button[data-engine='']").click()
    return right, amiss


def check_book(html: Path, engines: list[str]) -> tuple[dict[str, int], list[str]]:
    """Counts over all pages from http and as files, and what is amiss, in words."""
    pages, amiss = pages_of(html), []
    counts = {"pages": len(pages), "external_requests": 0, "failed_requests": 0}
    counts |= {"script_errors": 0, "viewers_checked": 0, "sliders_checked": 0}
    with served(html) as address, browser() as running:
        for base in (address, html.resolve().as_uri() + "/"):
            for name in pages:
                watch, page = Watch(), running.new_page(viewport={"width": 1000, "height": 800})
                watch.attach(page, base)
                page.goto(base + name, wait_until="load", timeout=240_000)
                moved, wrong = check_sliders(page)
                wrong += check_layout(page)
                shown, faults = check_viewers(page, engines)
                page.close()
                counts["sliders_checked"] += moved
                counts["viewers_checked"] += shown
                for key, told in (
                    ("external_requests", watch.external),
                    ("failed_requests", watch.failed),
                    ("script_errors", watch.errors),
                ):
                    counts[key] += len(told)
                    wrong += [f"{key}: {what[:200]}" for what in told]
                amiss += [f"{base.split(':')[0]} {name}: {what}" for what in [*wrong, *faults]]
                print(f"{base.split(':')[0]:5} {name}: {len(wrong) + len(faults)} amiss", flush=True)
    return counts, amiss


def build_seconds(html: Path, preset: str = "small") -> dict[str, dict[str, Any]]:
    """What the last `make book` noted for building the pages, if the book lies where that puts it."""
    state = html.parent / "state.json"
    pages = read_json(state).get(preset, {}).get("parts", {}).get("pages") if state.exists() else None
    return {"build_seconds": {"value": pages["seconds"], "unit": "s"}} if pages else {}


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--html", type=Path, default=ROOT / "build" / "html")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "book.json")
    parser.add_argument("--engines", default="itk,niivue", help="3D viewers to try, with commas; empty for none")
    options = parser.parse_args(arguments)
    try:
        if chromium() is None:
            raise InputError("chromium: not found, expected Debian's browser; `apt-get install chromium`.")
        counts, amiss = check_book(options.html, [name for name in options.engines.split(",") if name])
        largest = max((options.html / name).stat().st_size for name in pages_of(options.html))
        figures: dict[str, dict[str, Any]] = {key: {"value": n, "unit": "1"} for key, n in counts.items()}
        figures |= build_seconds(options.html)
        figures["page_mb_max"] = {"value": round(largest / 1e6, 2), "unit": "MB"}
        update_results(options.out, figures, command="make book && python benchmarks/book_check.py")
    except InputError as error:
        print(f"book_check: {error}", file=sys.stderr)
        return 2
    for key, figure in figures.items():
        print(f"{key:18} {figure['value']:8} {figure['unit']}")
    for what in amiss:
        print(what)
    return 1 if amiss else 0


if __name__ == "__main__":
    sys.exit(main())
