"""Frames of the sliders over samples, views, guidance and slices: what each must show, read from its pixels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from difr3ct_core.figures import sliders
from difr3ct_core.files import InputError
from difr3ct_core.interactive import frame_slider
from difr3ct_core.results import Result

ORIGIN = {"preset": "tiny", "seed": 3, "commit": "abc123", "device": "CPU test", "wall_s": 1.0, "run": "r"}
N = 12


def result(arrays: dict[str, Any], **values: Any) -> Result:
    return Result("slider", {key: np.asarray(array) for key, array in arrays.items()}, values, ORIGIN)


def volumes(count: int, seed: int = 0) -> np.ndarray:
    """Smooth volumes (n z y x) in HU, nothing anatomical."""
    rng = np.random.default_rng(seed)
    z, y, x = np.meshgrid(*[np.linspace(-1, 1, N)] * 3, indexing="ij")
    weights = rng.normal(size=(count, 4))
    return np.stack([300 * (w[0] * z + w[1] * y + w[2] * x) + 100 * w[3] for w in weights])


def panel(frame: np.ndarray, number: int, of: int) -> np.ndarray:
    """The picture of one panel, without title and colour bar."""
    height, width = frame.shape[:2]
    edge = width // of
    top = height - edge - round(0.65 * sliders._DPI)
    return frame[top + 4 : top + edge - 8, number * edge + 6 : (number + 1) * edge - 6]


def grey_of(hu: float) -> int:
    """Grey of a HU in the fixed window from -1000 to 500."""
    return round(255 * np.clip((hu + 1000) / 1500, 0, 1))


def test_the_frame_of_n_samples_shows_their_mean_and_their_spread() -> None:
    levels = np.array([-800.0, -200.0, 400.0, -600.0])
    slices = np.ones((4, N, N)) * levels[:, None, None]
    frames = sliders.sample_count_frames(result({"truth": 0 * slices[0], "slices": slices, "shown": [1, 2, 4]}))
    assert frames.labels == ["1 sample", "2 samples", "4 samples"]
    for n, frame in zip((1, 2, 4), frames, strict=True):
        assert abs(int(np.median(panel(frame, 0, 4)[..., 0])) - grey_of(0)) <= 2
        assert abs(int(np.median(panel(frame, 1, 4)[..., 0])) - grey_of(levels[:n].mean())) <= 2
    dark, spread = panel(frames[0], 2, 4), panel(frames[1], 2, 4)
    assert np.median(dark.sum(-1)) < 20  # one sample has no spread
    assert np.median(spread.sum(-1)) > 400  # 300 HU, the top of the scale
    assert np.median(panel(frames[2], 3, 4).sum(-1)) > 400  # the mean of all is 300 HU off


def test_a_slice_stands_upright() -> None:
    slices = np.full((2, N, N), -1000.0)
    slices[:, 0] = 500.0  # the lowest row of the patient
    (frame,) = sliders.sample_count_frames(result({"truth": slices[0], "slices": slices, "shown": [2]}))
    for number in (0, 1):
        picture = panel(frame, number, 4)[..., 0]
        assert picture[-6:].mean() > 200 and picture[20 : len(picture) // 2].mean() < 40


@pytest.mark.parametrize("shown", [[0], [1, 5]])
def test_a_number_of_samples_that_is_not_there_is_refused(shown: list[int]) -> None:
    slices = np.zeros((4, N, N))
    with pytest.raises(InputError, match=r"slider.shown: found \d, expected numbers from 1 to 4 samples"):
        sliders.sample_count_frames(result({"truth": slices[0], "slices": slices, "shown": shown}))


def test_each_frame_of_the_views_shows_its_own_reconstruction_and_xray() -> None:
    mean = np.ones((3, N, N)) * np.array([-700.0, -100.0, 300.0])[:, None, None]
    xrays = np.zeros((3, N, N))
    xrays[1] = 1.0
    frames = sliders.view_count_frames(
        result(
            {"truth": 0 * mean[0], "mean": mean, "std": 0 * mean, "xrays": xrays},
            counts=[1, 2, 8],
            added_deg=[90.0, 0.0, 157.5],
            n_samples=4,
        )
    )
    assert frames.labels == ["1 view", "2 views", "8 views"]
    for k, frame in enumerate(frames):
        assert abs(int(np.median(panel(frame, 1, 5)[..., 0])) - grey_of(mean[k, 0, 0])) <= 2
        assert (np.median(panel(frame, 0, 5)) > 200) == (k == 1)


def test_guidance_frames_show_sample_mean_and_spread_of_their_scale() -> None:
    drawn = volumes(3)
    flat = np.ones((3, N, N)) * np.array([-500.0, 0.0, 250.0])[:, None, None]
    arrays = {
        "guidance": [0.0, 1.0, 4.0],
        "guided_picture": drawn,
        "guided_truth": 0 * flat[0],
        "guided_slice_mean": flat,
        "guided_slice_std": np.ones((3, N, N)) * np.array([300.0, 150.0, 0.0])[:, None, None],
    }
    frames = sliders.guidance_frames(result(arrays, per_patient=4))
    assert frames.labels == ["s = 0", "s = 1", "s = 4"]
    for k, frame in enumerate(frames):
        assert abs(int(np.median(panel(frame, 2, 4)[..., 0])) - grey_of(flat[k, 0, 0])) <= 2
    brightness = [float(np.median(panel(frame, 3, 4).sum(-1))) for frame in frames]
    assert brightness[0] > brightness[1] > brightness[2]


@pytest.mark.parametrize(("size", "count"), [(12, 12), (50, 17)])
def test_slices_go_from_the_lowest_to_the_highest(size: int, count: int) -> None:
    levels = np.linspace(-900, 400, size)
    volume = np.ones((size, 6, 6)) * levels[:, None, None]
    arrays = {"truth": volume, "mean": volume[::-1], "std": np.zeros_like(volume), "samples": np.zeros((2, 1, 1, 1))}
    frames = sliders.slice_frames(result(arrays, spacing_mm=4.0))
    assert len(frames) == count <= sliders.MOST_SLICES and len(frames.labels) == count
    heights = [float(label.split()[2]) for label in frames.labels]
    assert heights == sorted(heights) and heights[0] < -0.4 * 4 * size / 2 < 0.4 * 4 * size / 2 < heights[-1]
    greys = [int(np.median(panel(frame, 1, 5)[..., 0])) for frame in frames]
    assert greys == sorted(greys) and greys[-1] - greys[0] > 150
    turned = [int(np.median(panel(frame, 2, 5)[..., 0])) for frame in frames]
    assert turned == sorted(turned, reverse=True)


def test_the_line_in_the_coronal_slice_rises_with_the_slice() -> None:
    volume = np.full((N, N, N), -1000.0)
    arrays = {"truth": volume, "mean": volume, "std": 0 * volume, "samples": np.zeros((2, 1, 1, 1))}
    rows = []
    for frame in sliders.slice_frames(result(arrays, spacing_mm=4.0)):
        picture = panel(frame, 0, 5).astype(int)[20:]
        yellow = (picture[..., 0] > 150) & (picture[..., 2] < 120)
        rows.append(np.nonzero(yellow)[0].mean() if yellow.any() else np.nan)
    assert np.isfinite(rows[:-2]).all() and (np.diff(rows[:-2]) < 0).all()


def test_frames_fit_the_slider_and_carry_their_origin() -> None:
    slices = volumes(4)[:, :, N // 2]
    frames = sliders.sample_count_frames(result({"truth": slices[0], "slices": slices, "shown": [1, 4]}))
    assert len({frame.shape for frame in frames}) == 1 and frames[0].dtype == np.uint8
    html = frame_slider(frames, frames.labels, "Slices with {label}.", "samples").html
    assert "commit <code>abc123</code>" in html and 'alt="Slices with 1 sample."' in html
