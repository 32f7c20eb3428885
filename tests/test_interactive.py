"""The slider: self-contained HTML that shows the right frame, escapes what it is given, and refuses bad input."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from difr3ct_core.files import InputError
from difr3ct_core.interactive import frame_slider


def flat_frames(count: int = 3, size: tuple[int, int] = (40, 60)) -> list[np.ndarray]:
    """Frames of one grey value each: 0, 60, 120, ..."""
    return [np.full(size, 60 * k, dtype=np.uint8) for k in range(count)]


def script_arrays(html: str) -> dict[str, list[str]]:
    """The arrays frames, labels and alts as the browser would read them."""
    found = re.search(r"const frames = (\[.*?\]), labels = (\[.*?\]), alts = (\[.*?\]);", html)
    assert found, "the script holds no arrays"
    return {name: json.loads(text) for name, text in zip(("frames", "labels", "alts"), found.groups(), strict=True)}


def pixels(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1]))).convert("L"))


class _Elements(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def one(self, tag: str) -> dict[str, str | None]:
        matches = [attributes for name, attributes in self.found if name == tag]
        assert len(matches) == 1, f"{len(matches)} elements <{tag}>"
        return matches[0]


def elements(html: str) -> _Elements:
    parser = _Elements()
    parser.feed(html)
    return parser


def test_every_frame_arrives_in_order() -> None:
    html = frame_slider(flat_frames(4), ["a", "b", "c", "d"], "grey {label}", start=2).html
    arrays = script_arrays(html)
    assert arrays["labels"] == ["a", "b", "c", "d"]
    assert arrays["alts"] == ["grey a", "grey b", "grey c", "grey d"]
    for k, uri in enumerate(arrays["frames"]):
        picture = pixels(uri)
        assert picture.shape == (40, 60)
        assert abs(float(picture.mean()) - 60 * k) < 3  # WebP is lossy


def test_without_javascript_the_start_frame_and_its_text_stand_there() -> None:
    parser = elements(frame_slider(flat_frames(3), ["0°", "45°", "90°"], "view at {label}", "angle", start=1).html)
    image, box = parser.one("img"), parser.one("input")
    assert abs(float(pixels(str(image["src"])).mean()) - 60) < 3
    assert image["alt"] == "view at 45°"
    assert (box["type"], box["min"], box["max"], box["value"], box["aria-valuetext"]) == ("range", "0", "2", "1", "45°")
    assert parser.one("label")["for"] == box["id"]  # a screen reader names the slider


def test_nothing_is_loaded_from_elsewhere() -> None:
    html = frame_slider(flat_frames(), ["1", "2", "3"], "grey").html
    assert not re.search(r"(?i)(?:https?:)?//[a-z0-9.-]+\.[a-z]{2,}", re.sub(r"data:image[^\"]*", "", html))
    assert all(uri.startswith("data:image/webp;base64,") for uri in script_arrays(html)["frames"])


def test_text_cannot_break_out() -> None:
    nasty = '</script><b id="x">&"'
    html = frame_slider(flat_frames(2), [nasty, "b"], "alt " + nasty, title=nasty).html
    parser = elements(html)
    assert [name for name, _ in parser.found].count("b") == 0
    assert html.count("</script>") == 1
    assert script_arrays(html)["labels"][0] == nasty
    assert parser.one("img")["alt"] == "alt " + nasty


def test_two_equal_sliders_do_not_share_an_id() -> None:
    first, second = (frame_slider(flat_frames(), ["1", "2", "3"], "grey").html for _ in range(2))
    assert elements(first).one("figure")["id"] != elements(second).one("figure")["id"]


def test_files_are_embedded_unchanged() -> None:
    stream = io.BytesIO()
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(stream, format="PNG")
    html = frame_slider([stream.getvalue()] * 2, ["1", "2"], "ramp").html
    uri = script_arrays(html)["frames"][0]
    assert uri.startswith("data:image/png")
    assert base64.b64decode(uri.split(",")[1]) == stream.getvalue()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": ["1"]}, r"labels: found 1 for 3 images"),
        ({"images": []}, r"labels: found 3 for 0 images"),
        ({"alt": " "}, r"alt: found no text"),
        ({"start": 3}, r"start: found 3, expected a frame from 0 to 2"),
        ({"images": [*flat_frames(2), np.zeros((5, 5), np.uint8)]}, r"images: found frames of .* one size for all"),
        ({"images": [np.zeros((4, 4))] * 3}, r"images: found an array of float64"),
        ({"images": [b"GIF89a"] * 3}, r"images: found bytes that begin with"),
        ({"limit_bytes": 900}, r"3 frames make \d+ bytes of HTML, expected at most 900"),
    ],
)
def test_bad_input(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {"images": flat_frames(), "labels": ["1", "2", "3"], "alt": "grey", **change}
    with pytest.raises(InputError, match=message):
        frame_slider(**arguments)  # type: ignore[arg-type]


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node to run the slider's script")
def test_the_script_shows_the_chosen_frame(tmp_path: Path) -> None:
    """The page's own script, run against a few lines that stand for the browser's document."""
    html = frame_slider(flat_frames(3), ["one", "two", "three"], "grey {label}").html
    script = html.split("<script>")[1].split("</script>")[0]
    program = f"""
    const image = {{}}, output = {{}};
    const range = {{value: "0", set: {{}}, setAttribute(k, v) {{ this.set[k] = v; }},
                    addEventListener(kind, action) {{ this.kind = kind; this.action = action; }}}};
    const root = {{querySelector: (tag) => ({{img: image, input: range, output: output}})[tag]}};
    const document = {{getElementById: () => root}};
    {script}
    const first = image.src;
    range.value = "2"; range.action();
    const told = {{kind: range.kind, text: output.textContent, alt: image.alt, moved: image.src !== first,
                   spoken: range.set["aria-valuetext"]}};
    console.log(JSON.stringify(told));
    """
    path = tmp_path / "slider.js"
    path.write_text(program)
    done = subprocess.run(["node", str(path)], capture_output=True, text=True, check=True, timeout=60)
    told = json.loads(done.stdout)
    assert told == {"kind": "input", "text": "three", "alt": "grey three", "moved": True, "spoken": "three"}
