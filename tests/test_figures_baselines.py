"""The table in the paper's shape and the figures that compare methods, on numbers and slices that are known."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.image import AxesImage

from difr3ct_core.figures import baselines
from difr3ct_core.results import Result

TITLES = {"difr3ct": "DIFR3CT", "x2ctgan": "X2CT-GAN", "fbp": "FBP"}
ORIGIN = {
    "preset": "tiny",
    "seed": 7,
    "commit": "abc123",
    "device": "CPU test",
    "wall_s": 1.0,
    "finished": "2026-01-02",
}


def entry(psnr: float, ssim: float, sharpness: float) -> dict:
    spread = lambda mean: {"mean": mean, "std": 0.25, "patients": [mean + 0.5, mean - 0.5]}  # noqa: E731
    return {"value": psnr, "unit": "dB", "psnr": spread(psnr), "ssim": spread(ssim), "sharpness": spread(sharpness)}


@pytest.fixture
def result() -> Result:
    generator = np.random.default_rng(0)
    entries = {
        "lung/difr3ct/8view": entry(27.0, 0.80, 0.7),
        "lung/difr3ct/2view": entry(22.0, 0.71, 0.6),
        "lung/x2ctgan/2view": entry(23.0, 0.70, 0.4),
        "lung/fbp/8view": entry(15.0, 0.30, 3.0),
        "thoracic/fbp/8view": entry(99.0, 0.99, 1.0),
    }
    arrays = {"truth": np.zeros((3, 8, 8), dtype=np.int16) - 1000}
    arrays["truth"][1, 6, 2] = 500  # coronal: z = 6 of 8 is up, x = 2 is the patient's right, so on the left
    arrays["truth"][0, 1, 2] = 500  # axial: y = 1 is in front, so up
    for name in ("difr3ct_2view", "x2ctgan_2view", "fbp_8view"):
        arrays[name] = generator.integers(-1000, 500, (3, 8, 8)).astype(np.int16)
    return Result("tables", arrays, {"entries": entries, "cohort": "lung", "titles": TITLES}, ORIGIN)


def test_table_has_the_papers_shape_and_marks_the_best(result: Result) -> None:
    assert baselines.paper_table(result) == [
        ["method", "8 views", "2 views"],
        ["DIFR3CT", "**27.00 ± 0.25** / **0.800 ± 0.250**", "22.00 ± 0.25 / **0.710 ± 0.250**"],
        ["X2CT-GAN", "–", "**23.00 ± 0.25** / 0.700 ± 0.250"],
        ["FBP", "15.00 ± 0.25 / 0.300 ± 0.250", "–"],
    ]


def test_methods_stand_beside_the_truth_in_the_radiological_orientation(result: Result) -> None:
    figure = baselines.methods_side_by_side(result, "2view")
    panels = [ax for ax in figure.axes if any(isinstance(child, AxesImage) for child in ax.images)]
    assert [ax.get_title() for ax in panels[:3]] == ["truth", "DIFR3CT", "X2CT-GAN"]
    assert panels[4].get_xlabel() == "22.5 dB" and panels[5].get_xlabel() == "23.5 dB"  # of the patient shown
    coronal, axial = panels[0].images[0].get_array(), panels[3].images[0].get_array()
    assert np.argwhere(coronal == 500).tolist() == [[1, 2]]
    assert np.argwhere(axial == 500).tolist() == [[1, 2]]


def test_quality_and_sharpness_shows_every_entry_of_the_cohort(result: Result) -> None:
    figure = baselines.quality_and_sharpness(result)
    ax = figure.axes[0]
    points = {
        (float(line.get_xdata()[0]), float(line.get_ydata()[0])) for line in ax.lines if len(line.get_xdata()) == 1
    }
    assert points == {(0.7, 27.0), (0.6, 22.0), (0.4, 23.0), (3.0, 15.0)}
    labels = {text.get_text() for text in ax.get_legend().get_texts()}
    assert labels == {*TITLES.values(), "8 views", "2 views"}
