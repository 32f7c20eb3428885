"""Draw the picture of the README, ``book/static/teaser.png``, with the weights that ship.

python book/teaser.py [--data data]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from difr3ct_core.chapters import open_chapter
from difr3ct_core.ct import unit_to_hu
from difr3ct_core.reconstruct import posterior_samples

ROOT = Path(__file__).resolve().parents[1]
WINDOW, SPREAD, ERROR = (-1000, 400), (0, 150), (0, 300)  # HU
SAMPLES = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=ROOT / "data")
    parser.add_argument("--out", type=Path, default=ROOT / "book" / "static" / "teaser.png")
    options = parser.parse_args()
    chapter = open_chapter("teaser", "small", options.data)
    one = chapter.patients("test", "2view").take([0])
    drawn = posterior_samples(chapter.ldm("2view"), chapter.vqgan(), one.xrays, one.views, SAMPLES)[0]
    samples, truth = (unit_to_hu(part, one.volume).numpy() for part in (drawn, one.unit()[0, 0]))
    mean, middle = samples.mean(0), truth.shape[1] // 2
    lateral, frontal = one.xrays[0].numpy()

    def coronal(volume: np.ndarray) -> np.ndarray:
        return np.flipud(volume[:, middle])

    panels = [
        ("x-ray, lateral", np.flipud(lateral), "gray", (None, None)),
        ("x-ray, frontal", np.fliplr(np.flipud(frontal)), "gray", (None, None)),
        ("truth", coronal(truth), "gray", WINDOW),
        ("sample", coronal(samples[0]), "gray", WINDOW),
        ("another sample", coronal(samples[1]), "gray", WINDOW),
        (f"mean of {SAMPLES}", coronal(mean), "gray", WINDOW),
        ("standard deviation", coronal(samples.std(0)), "inferno", SPREAD),
        ("|mean − truth|", coronal(abs(mean - truth)), "inferno", ERROR),
    ]
    figure, axes = plt.subplots(1, len(panels), figsize=(14.54, 2.06), dpi=100)
    for ax, (name, image, colours, (low, high)) in zip(axes, panels, strict=True):
        ax.imshow(image, cmap=colours, vmin=low, vmax=high, interpolation="nearest")
        ax.set_title(name, fontsize=13, pad=4)
        ax.axis("off")
    for ax, sides in zip(axes[:2], (("A", "P"), ("R", "L")), strict=True):
        for x, side, align in zip((0.03, 0.97), sides, ("left", "right"), strict=True):
            ax.text(x, 0.97, side, color="w", transform=ax.transAxes, va="top", ha=align, fontsize=8)
    figure.subplots_adjust(0.004, 0.01, 0.996, 0.86, 0.04)
    figure.savefig(options.out, facecolor="white")


if __name__ == "__main__":
    main()
