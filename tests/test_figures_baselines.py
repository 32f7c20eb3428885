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
    found = {"psnr": spread(psnr), "ssim": spread(ssim), "sharpness": spread(sharpness)}
    costs = {"train_minutes": spread(psnr / 2), "sample_seconds": spread(psnr / 10)}
    return {"value": psnr, "unit": "dB", "n": 2, **found, **costs}


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
    return Result("tables", arrays, {"entries": entries, "cohort": "lung", "titles": TITLES, "views": "2view"}, ORIGIN)


def test_table_has_the_papers_shape_and_marks_the_best(result: Result) -> None:
    assert baselines.paper_table(result) == [
        ["method", "8 views", "2 views"],
        ["DIFR3CT", "**27.00 ± 0.25** / **0.800 ± 0.250**", "22.00 ± 0.25 / **0.710 ± 0.250**"],
        ["X2CT-GAN", "–", "**23.00 ± 0.25** / 0.700 ± 0.250"],
        ["FBP", "15.00 ± 0.25 / 0.300 ± 0.250", "–"],
    ]


def test_budgets_are_listed_where_something_was_trained(result: Result) -> None:
    result.values["entries"]["lung/x2ctgan/2view"] |= {
        "patients_seen": {"mean": 900.0}, "train_peak_gb": {"mean": 1.26},
    }  # fmt: skip
    assert baselines.budget_table(result) == [
        ["method", "x-rays", "patients seen", "training, minutes", "peak memory, GB"],
        ["X2CT-GAN", "2 views", "900", "12", "1.3"],
    ]


def test_methods_stand_beside_the_truth_in_the_radiological_orientation(result: Result) -> None:
    figure = baselines.methods_side_by_side(result)
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


def points(ax) -> set[tuple[float, float]]:
    return {
        (float(x[0]), float(y[0])) for line in ax.lines if len(x := line.get_xdata()) == 1 for y in [line.get_ydata()]
    }


def test_costs_show_each_entry_where_its_cost_is_known(result: Result) -> None:
    minutes, gigabytes, seconds = baselines.costs(result).axes[:3]
    assert points(minutes) == {(13.5, 27.0), (11.0, 22.0), (11.5, 23.0), (7.5, 15.0)}
    assert points(gigabytes) == set()
    assert points(seconds) == {(2.7, 27.0), (2.2, 22.0), (2.3, 23.0), (1.5, 15.0)}


def test_overview_has_a_row_per_method_and_intervals_of_the_mean(result: Result) -> None:
    ax = baselines.overview(result).axes[0]
    assert [label.get_text() for label in ax.get_yticklabels()] == list(TITLES.values())
    bars = [c.get_children() for c in ax.containers]
    ends = {float(s[0, 0]) for group in bars for c in group[1:] for s in c.get_segments()}
    assert any(abs(end - (27.0 - 1.96 * 0.25 / 2**0.5)) < 1e-9 for end in ends)


def test_views_side_by_side_say_where_a_method_does_not_exist(result: Result) -> None:
    result.arrays["difr3ct_8view"] = result.arrays["difr3ct_2view"] - 1
    figure = baselines.views_side_by_side(result)
    assert [ax.get_title() for ax in figure.axes[:3]] == ["truth", "8 views", "2 views"]
    ours = figure.axes[1].images[0].get_array()
    assert (ours == result.arrays["difr3ct_8view"][1][::-1]).all()  # coronal, superior up
    words = {text.get_text() for ax in figure.axes for text in ax.texts}
    assert any("not for" in word for word in words)  # X2CT-GAN at eight views


def test_memory_has_a_line_per_method_and_leaves_out_what_was_not_measured(result: Result) -> None:
    values = {
        "gb": {"a": [1.0, 2.0], "b": [3.0, None]},
        "counts": [1, 8],
        "titles": {"a": "A", "b": "B"},
        "preset": "x",
    }
    ax = baselines.memory(Result("m", {}, values, ORIGIN)).axes[0]
    assert [line.get_xydata().tolist() for line in ax.lines] == [[[1.0, 1.0], [8.0, 2.0]], [[1.0, 3.0]]]


def test_a_table_becomes_markdown() -> None:
    assert baselines.markdown_table([["a", "b"], ["1", "–"]]) == "| a | b |\n| --- | --- |\n| 1 | – |"
