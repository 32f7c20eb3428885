"""Orientation, marks and messages of the figures, checked on volumes whose landmarks are known."""

from __future__ import annotations

import ast
from pathlib import Path

import numpy as np
import pytest
import torch

from difr3ct_core import figures
from difr3ct_core.drr import project
from difr3ct_core.figures import models, samples, style, uncertainty
from difr3ct_core.geometry import standard_views
from difr3ct_core.results import Result

ORIGIN = {
    "preset": "tiny",
    "seed": 7,
    "commit": "abc123",
    "device": "CPU test",
    "wall_s": 3.2,
    "finished": "2026-01-02",
}


def landmark(z: int, y: int, x: int, shape: tuple[int, int, int] = (12, 10, 14)) -> np.ndarray:
    volume = np.zeros(shape, dtype=np.float32)
    volume[z, y, x] = 1
    return volume


def where(picture: np.ndarray) -> tuple[str, str]:
    """Which half of the picture holds the bright spot, as (top or bottom, left or right)."""
    row, column = np.unravel_index(int(np.argmax(picture)), picture.shape)
    return "top" if row < picture.shape[0] / 2 else "bottom", "left" if column < picture.shape[1] / 2 else "right"


def test_slices_are_in_the_radiological_orientation() -> None:
    # +x is the patient's left, +y posterior, +z superior: small x is the right side, small y the front.
    right_front_low = landmark(2, 1, 3)
    assert where(style.plane_of(right_front_low, "axial", 2)) == ("top", "left")
    assert where(style.plane_of(right_front_low, "coronal", 1)) == ("bottom", "left")
    assert where(style.plane_of(right_front_low, "sagittal", 3)) == ("bottom", "left")
    left_back_high = landmark(10, 8, 11)
    assert where(style.plane_of(left_back_high, "axial", 10)) == ("bottom", "right")
    assert where(style.plane_of(left_back_high, "coronal", 8)) == ("top", "right")
    assert where(style.plane_of(left_back_high, "sagittal", 11)) == ("top", "right")


@pytest.mark.parametrize("mirror", [None, True, False])
@pytest.mark.parametrize("view", standard_views("8view", 16, 320.0), ids=lambda view: f"{view.angle_deg:g}")
def test_letters_of_an_xray_name_the_side_where_the_organ_is(view: object, mirror: bool | None) -> None:
    # A rod at the patient's right, one in front: whichever the letters speak of must be found beside its letter.
    rods = {"R": (slice(None), 8, 1), "L": (slice(None), 8, 14), "A": (slice(None), 1, 8), "P": (slice(None), 14, 8)}
    for letter, place in rods.items():
        mu = torch.zeros(1, 1, 16, 16, 16)
        mu[(0, 0, *place)] = 0.01
        xray = project(mu, [view], 20.0)[0, 0, 0].numpy()  # type: ignore[list-item]
        figure, axes = style.new_figure(2, 2)
        style.show_xray(axes[0, 0], xray, view.angle_deg, mirror=mirror)  # type: ignore[attr-defined]
        shown = np.asarray(axes[0, 0].images[0].get_array())
        letters = {text.get_text(): text.get_position()[0] for text in axes[0, 0].texts}
        assert len(letters) == 2 and set(letters) in ({"R", "L"}, {"A", "P"})
        if letter in letters:
            assert where(shown)[1] == ("left" if letters[letter] < 0.5 else "right")
        figure.clear()


def test_frontal_xray_lies_like_a_coronal_slice_and_superior_is_up() -> None:
    (frontal,) = standard_views("1view_frontal", 12, 320.0)
    mu = torch.zeros(1, 1, 12, 12, 12)
    mu[0, 0, 9, :, 2] = 0.01  # high on the patient's right
    _, axes = style.new_figure(2, 2)
    style.show_xray(axes[0, 0], project(mu, [frontal], 320 / 12)[0, 0, 0].numpy(), 90.0)
    assert where(np.asarray(axes[0, 0].images[0].get_array())) == ("top", "left")
    assert where(style.plane_of(mu[0, 0].numpy(), "coronal")) == ("top", "left")


def test_colour_limit_ignores_few_extreme_voxels() -> None:
    values = np.concatenate([np.linspace(0, 97, 10_000), [1e6]])
    assert 96 <= style.top(values) <= 98
    assert style.top(np.zeros(5)) == 1.0


def test_slice_grid_shares_a_bar_between_neighbours_of_one_scale() -> None:
    volume = landmark(2, 1, 3)
    other = style.Scale("error", 0, 1, "inferno")
    columns = [style.Column("a", volume), style.Column("b", volume), style.Column("c", volume, other)]
    figure, axes = style.slice_grid(columns)
    assert axes.shape == (2, 3) and len(figure.axes) == 6 + 2
    assert [axis.get_aspect() for axis in axes.ravel()] == [1.0] * 6


def test_provenance_is_under_the_figure_and_style_does_not_leak() -> None:
    import matplotlib as mpl

    mpl.get_backend()  # chosen on first use
    before = mpl.rcParams.copy()
    steps = np.arange(1, 11)
    result = Result(
        "vqgan_training",
        {
            "step": steps,
            "l1": 100.0 / steps,
            "commitment": 1.0 / steps,
            "perplexity": 3.0 * steps,
            "val_step": [10],
            "val_psnr": [30.0],
            "decoder_step": [5, 10],
            "decoder_psnr": [31.0, 32.0],
        },
        {"codebook_size": 64},
        ORIGIN,
    )
    figure = models.autoencoder_training(result)
    last = {line.get_label(): line.get_xydata().tolist() for line in figure.axes[-1].lines}
    assert last["decoder alone, whole volumes"] == [[10, 30.0], [15, 31.0], [20, 32.0]]  # goes on where the other ends
    line = figure.get_supxlabel()
    for part in ("vqgan_training", "preset tiny", "seed 7", "commit abc123", "CPU test", "3 s", "2026-01-02"):
        assert part in line
    assert mpl.rcParams == before


@pytest.mark.parametrize(("ancestral", "words"), [(25.2, "do as well as"), (27.0, "beside")])
def test_title_of_the_solver_comparison_follows_the_numbers(ancestral: float, words: str) -> None:
    arrays = {
        f"{key}_{solver}": np.array([1.0, 2.0])
        for solver in samples.SOLVERS
        for key in ("steps", "mean", "sample", "seconds")
    }
    values = {"psnr_dpm20": 25.0, "psnr_ddpm1000": ancestral, "steps_fast": 20, "steps_slow": 1000}
    figure = samples.steps_and_quality(Result("steps_and_quality", arrays, values, ORIGIN))
    assert words in figure.get_suptitle()


@pytest.mark.parametrize(("factor", "too_sure"), [(0.6, True), (1.0, False)])
def test_title_of_the_calibration_follows_the_numbers(factor: float, too_sure: bool) -> None:
    expected = np.array([0.85, 0.5, 0.1])
    falling = np.linspace(100, 20, 5)
    arrays = {"left_out": np.linspace(0, 0.9, 5), "expected": expected}
    for views in uncertainty.PAIR:
        arrays |= {f"left_by_{key}_{views}": falling for key in ("std", "error")}
        arrays[f"observed_{views}"] = factor * expected
    values = {f"spearman_{views}": 0.5 for views in uncertainty.PAIR}
    figure = uncertainty.calibration(Result("calibration", arrays, values, ORIGIN))
    assert ("smaller than they are" in figure.get_suptitle()) == too_sure


@pytest.mark.parametrize(("real", "rows"), [(0.3, 4), (None, 3)])
def test_detection_shows_every_case_and_names_best_and_worst(real: float | None, rows: int) -> None:
    normal, altered = np.linspace(0.02, 0.05, 12), np.linspace(0.03, 0.2, 8)
    arrays = {"residual_normal": normal, "residual_altered": altered}
    for name in uncertainty.DETECTORS:
        arrays |= {f"{kind}_{name}": np.array([0, 0.5, 1.0]) for kind in ("false", "true")}
    values = {
        "findings": ["metal"] * 3 + ["missing_lung"] * 5,
        "auc": dict(zip(uncertainty.DETECTORS, (0.9, 0.8, 0.7, 0.65, 0.6, 0.5, 0.4), strict=True)),
        "auc_finding": {"metal": 0.5, "missing_lung": 1.0},
        "threshold": 0.048,
        "real": real,
    }
    figure = uncertainty.detection(Result("detection", arrays, values, ORIGIN))
    axes = figure.axes[1]
    assert [label.get_text() for label in axes.get_yticklabels()][:3] == ["normal", "metal: 0.50", "missing lung: 1.00"]
    assert len(axes.get_yticks()) == rows
    shown = np.concatenate([line.get_xdata() for line in axes.lines if line.get_marker() == "o"])
    assert sorted(shown) == pytest.approx(sorted([*100 * normal, *100 * altered, *([30.0] if real else [])]))
    assert "missing lung best, metal least" in figure.get_suptitle()


def test_no_figure_can_call_a_model() -> None:
    folder = Path(figures.__file__).parent
    allowed = {"results", "presets", "geometry", "views", "files", "phantoms"}
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level == 1:
                assert (folder / f"{node.module}.py").exists()
            elif isinstance(node, ast.ImportFrom) and node.level:
                assert (node.module or "").split(".")[0] in allowed, f"{path.name} imports {node.module}"
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
                assert not any(name.startswith(("torch", "difr3ct_core")) for name in names), path.name


@pytest.mark.parametrize(("trained", "words"), [(32.0, "a model that has met them is 3.0 dB better"), (28.0, "cost")])
def test_detectors_show_every_condition_and_say_who_is_better(trained: float, words: str) -> None:
    from difr3ct_core.figures import beyond

    arrays = {f"psnr_{key}": np.array([30.0, 29.0]) for key in ("solver", "exact_none", "exact_tv", "trained_tv")}
    result = Result(
        "detectors", {**arrays, "psnr_trained_none": np.array([30.0, trained])}, {"names": ["ideal", "few"]}, ORIGIN
    )
    figure = beyond.detectors(result)
    assert words in figure.get_suptitle()
    assert [tick.get_text() for tick in figure.axes[0].get_yticklabels()] == ["ideal", "few"]
    assert len(figure.axes[0].lines) == 5
