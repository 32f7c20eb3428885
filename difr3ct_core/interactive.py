"""Pictures that the reader moves: a slider that works in the static page, without a kernel and without a network.

All frames are embedded in the HTML as compressed pictures; a few lines of plain JavaScript show one of them. The
range input is the browser's own, so that arrow keys, touch and screen readers work. Without JavaScript the first
chosen frame stays, as an ordinary picture.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from .files import InputError

#: A page with a few sliders must stay light on a slow line.
LIMIT_BYTES = 1_000_000
_KINDS = {b"\x89PNG": "png", b"RIFF": "webp", b"\xff\xd8\xff": "jpeg"}
_COUNT = itertools.count()

# Colours follow the text of the page, so that the slider reads in light and dark mode alike.
_TEMPLATE = """<figure class="frame-slider" id="{id}" style="margin:0;max-width:{width}px">
<img class="dark-light" src="{src}" alt="{alt}" width="{width}" height="{height}" \
style="display:block;width:100%;height:auto;background:#fff;border-radius:4px">
<div style="display:flex;flex-wrap:wrap;gap:.3rem .8rem;align-items:center;padding:.4rem .1rem;color:inherit">
<label for="{id}-range" style="font-weight:600">{title}</label>
<input type="range" id="{id}-range" min="0" max="{last}" step="1" value="{start}" aria-valuetext="{label}" \
style="flex:1 1 9rem;min-width:7rem;height:1.8rem;accent-color:#0072B2">
<output for="{id}-range" style="min-width:{label_width}ch;font-variant-numeric:tabular-nums">{label}</output>
</div>
</figure>
<script>
(function () {{
  const root = document.getElementById("{id}");
  const frames = {frames}, labels = {labels}, alts = {alts};
  const image = root.querySelector("img"), range = root.querySelector("input");
  const output = root.querySelector("output");
  function show() {{
    const k = Number(range.value);
    image.src = frames[k];
    image.alt = alts[k];
    output.textContent = labels[k];
    range.setAttribute("aria-valuetext", labels[k]);
  }}
  range.addEventListener("input", show);
  show();
}})();
</script>"""


@dataclass(frozen=True)
class Interactive:
    """HTML that a notebook shows as it is."""

    html: str

    def _repr_html_(self) -> str:
        return self.html


def frame_slider(
    images: Sequence[bytes | np.ndarray],
    labels: Sequence[str],
    alt: str,
    title: str = "frame",
    start: int = 0,
    quality: int = 80,
    limit_bytes: int = LIMIT_BYTES,
) -> Interactive:
    """A picture and a slider that chooses which of the frames it shows.

    Args:
        images: frames of one size: files in PNG, WebP or JPEG, or arrays uint8 (row, column) or (row, column, 3),
            which are written as WebP. Frames with an ``origin`` (HTML) get it under the slider.
        labels: one per frame, shown beside the slider and read out ("45°").
        alt: text in place of the picture; "{label}" in it stands for the frame's label.
        title: what the slider changes ("angle").
        start: frame that is shown first.
        quality: of WebP, 1 to 100.
        limit_bytes: largest size of the HTML.

    Returns:
        an object that a notebook cell shows; ``.html`` is self-contained.

    Raises:
        InputError: no frame, frames of differing sizes, labels that do not match, or more bytes than the limit.
    """
    if not images or len(images) != len(labels):
        raise InputError(f"labels: found {len(labels)} for {len(images)} images, expected one label per image.")
    if not alt.strip():
        raise InputError("alt: found no text, expected what a reader who cannot see the picture must know.")
    if not 0 <= start < len(images):
        raise InputError(f"start: found {start}, expected a frame from 0 to {len(images) - 1}.")
    files = [image if isinstance(image, bytes) else _webp(image, quality) for image in images]
    frames = [_data_uri(file) for file in files]
    sizes = [Image.open(io.BytesIO(file)).size for file in files]
    if len(set(sizes)) > 1:
        raise InputError(f"images: found frames of {sorted(set(sizes))} pixels, expected one size for all.")
    alts = [alt.replace("{label}", label) for label in labels]
    digest = hashlib.sha256(b"".join(files) + title.encode()).hexdigest()[:10]
    text = _TEMPLATE.format(
        # The count tells two equal sliders on one page apart.
        id=f"frames-{digest}-{next(_COUNT)}",
        src=frames[start],
        alt=html.escape(alts[start], quote=True),
        width=sizes[0][0],
        height=sizes[0][1],
        title=html.escape(title),
        last=len(frames) - 1,
        start=start,
        label=html.escape(labels[start], quote=True),
        label_width=max(len(label) for label in labels),
        frames=_script_json(frames),
        labels=_script_json(list(labels)),
        alts=_script_json(alts),
    )
    if len(text) > limit_bytes:
        raise InputError(
            f"images: {len(files)} frames make {len(text)} bytes of HTML, expected at most {limit_bytes}; "
            "take fewer or smaller frames, or a lower quality."
        )
    return Interactive(text + getattr(images, "origin", ""))


def _webp(array: np.ndarray, quality: int) -> bytes:
    array = np.asarray(array)
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] != 3):
        raise InputError(
            f"images: found an array of {array.dtype} with shape {array.shape}, expected uint8 (row, column) or "
            "(row, column, 3)."
        )
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, format="WEBP", quality=quality, method=4)
    return stream.getvalue()


def _data_uri(file: bytes) -> str:
    for start, kind in _KINDS.items():
        if file.startswith(start):
            return f"data:image/{kind};base64,{base64.b64encode(file).decode()}"
    raise InputError(f"images: found bytes that begin with {file[:4]!r}, expected a PNG, WebP or JPEG file.")


def _script_json(value: list[str]) -> str:
    """JSON that cannot end the script element it stands in."""
    return json.dumps(value).replace("<", "\\u003c")
