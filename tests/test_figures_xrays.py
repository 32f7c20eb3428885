"""Figures of x-rays and of fusion: landmarks stand where anatomy and geometry say, tables say what was saved."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from difr3ct_core.drr import project
from difr3ct_core.figures import benchmarks, fusion_geometry, xrays
from difr3ct_core.geometry import View, standard_views, world_to_detector
from difr3ct_core.presets import VIEW_SETS
from difr3ct_core.results import Result

N, EDGE = 32, 320.0
SPACING = EDGE / N
ORIGIN = {"preset": "tiny", "seed": 0, "commit": "abc", "device": "CPU", "wall_s": 1.0, "finished": "2026-01-01"}
#: One voxel to the patient's left, in front, and high: no symmetry maps it onto itself.
SPOT = torch.tensor([85.0, -45.0, 65.0])


def result(name: str, arrays: dict[str, Any], values: dict[str, Any]) -> Result:
    return Result(name, {key: np.asarray(value) for key, value in arrays.items()}, values, ORIGIN)


def spot_volume() -> torch.Tensor:
    """(z, y, x), zero but for the voxel at SPOT."""
    volume = torch.zeros(N, N, N)
    x, y, z = ((SPOT / SPACING) + (N - 1) / 2).round().long().tolist()
    volume[z, y, x] = 1.0
    return volume


def brightest(ax: Axes, which: int = 0) -> tuple[float, float]:
    """Data coordinates of the brightest pixel of a picture."""
    image = ax.images[which]
    array = np.asarray(image.get_array())
    row, column = np.unravel_index(array.argmax(), array.shape)
    left, right, bottom, top = image.get_extent()  # origin "upper": row 0 lies at `top`
    return (
        left + (column + 0.5) / array.shape[1] * (right - left),
        top + (row + 0.5) / array.shape[0] * (bottom - top),
    )


def draw(figure: Figure) -> None:
    """Render it, which is where matplotlib finds many mistakes."""
    assert figure._repr_png_().startswith(b"\x89PNG")  # type: ignore[attr-defined]


def letters(ax: Axes) -> dict[str, float]:
    """Letter of a side → its horizontal place in the picture, 0 to 1."""
    return {text.get_text(): text.get_position()[0] for text in ax.texts if text.get_text() in "RLAP"}


def test_axial_slice_in_mm_has_left_at_the_right_and_anterior_up() -> None:
    figure = Figure()
    ax = figure.subplots()
    z = int((SPOT[2] / SPACING + (N - 1) / 2).round())
    xrays.axial_in_mm(ax, spot_volume()[z].numpy() * 2000, EDGE)
    x, y = brightest(ax)
    assert (x, y) == (pytest.approx(float(SPOT[0])), pytest.approx(float(SPOT[1])))
    low, high = ax.get_ylim()
    assert low > high  # posterior (+y) is below
    sides = letters(ax)
    assert sides["R"] < 0 < sides["L"]


@pytest.mark.parametrize("angle", VIEW_SETS["8view"])
def test_drawn_rays_run_from_source_to_detector(angle: float) -> None:
    ax = Figure().subplots()
    xrays.parallel_rays(ax, angle, 150.0, 100.0, 3)
    n = View(angle, (1, 1), (1.0, 1.0)).to_source[:2].numpy()
    for text in ax.texts:  # annotations: the arrow runs from xyann to xy
        run = np.asarray(text.xy) - np.asarray(text.xyann)  # type: ignore[attr-defined]
        assert run @ n == pytest.approx(-np.linalg.norm(run))
    detector = np.stack(ax.lines[0].get_data(), 1)
    assert detector @ n == pytest.approx(np.full(2, -150.0))


def test_every_view_letters_the_side_on_which_the_landmark_is_seen() -> None:
    angles = list(VIEW_SETS["8view"])
    views = standard_views("8view", N, EDGE)
    images = project(spot_volume()[None, None], views, SPACING)[:, 0]
    figure = xrays.views_of_patients(
        result(
            "views",
            {"axial": np.zeros((N, N)), "xrays": images},
            {"names": ["phantom"], "angles_deg": angles, "edge_mm": EDGE},
        )
    )
    draw(figure)
    pictures = [ax for ax in figure.axes if ax.images][len(angles) : 2 * len(angles)]
    seen = 0
    for ax, view in zip(pictures, views, strict=True):
        column, row = brightest(ax)
        assert row < N / 2 - 0.5  # superior is up
        sides = letters(ax)
        # The patient's left, and the front, projected on the detector: where the landmark must be.
        letter = "L" if "L" in sides else "A"
        axis = torch.tensor([1.0, 0, 0] if letter == "L" else [0, -1.0, 0])
        other = next(place for name, place in sides.items() if name != letter)
        towards = np.sign(sides[letter] - other)
        # The column at which a point 85 mm to that side lies, drawn from the mirrored detector.
        u = N - 1 - float(world_to_detector(85 * axis, view)[1])
        assert np.sign(u - (N - 1) / 2) == towards, f"{letter} is on the wrong side at {view.angle_deg}°"
        expected = N - 1 - float(world_to_detector(SPOT, view)[1])
        assert abs(column - expected) <= 0.75
        seen += 1
    assert seen == 8


def test_markers_lie_on_their_images_in_both_beams() -> None:
    arrays: dict[str, Any] = {"depth_mm": [0.0]}
    values: dict[str, Any] = {"patient": "spot", "dso_mm": 1000.0, "dsd_mm": 1500.0}
    for mode in ("parallel", "cone"):
        (view,) = standard_views([90.0], 64, EDGE, mode=mode)
        place = (world_to_detector(SPOT, view) - 31.5) * view.pixel_mm[0]
        arrays[mode] = project(spot_volume()[None, None], [view], SPACING)[0, 0, 0]
        arrays[f"markers_{mode}"] = torch.stack([place, place])[None]
        arrays[f"measured_{mode}"] = [1.0]
        values[f"edge_{mode}_mm"] = view.pixel_mm[0] * 64
    figure = xrays.beams(result("beams", arrays, values))
    draw(figure)
    for ax, mode in zip(figure.axes[:2], ("parallel", "cone"), strict=True):
        pixel = values[f"edge_{mode}_mm"] / 64
        marker = np.stack(ax.lines[0].get_data(), 1)[0]
        assert np.abs(np.array(brightest(ax)) - marker).max() <= 1.1 * pixel
        left, right = ax.get_xlim()
        assert left > right  # u, which grows towards the patient's right at 90°, grows to the left
        assert marker[0] < 0  # the spot is on the patient's left ...
        assert next(t for t in ax.texts if t.get_text() == "L").get_position()[0] < 0  # ... and so is the letter


def test_rotation_frames_are_pictures_of_one_size() -> None:
    angles = [0.0, 30.0]
    images = project(spot_volume()[None, None], standard_views(angles, N, EDGE), SPACING)[0, 0]
    frames = xrays.rotation_frames(
        result("turn", {"axial": np.zeros((N, N)), "xrays": images}, {"angles_deg": angles, "edge_mm": EDGE}), 320
    )
    assert [frame.dtype for frame in frames] == [np.uint8] * 2
    assert frames[0].shape == frames[1].shape == (frames[0].shape[0], 320, 3)
    assert (frames[0] != frames[1]).mean() > 0.01


def test_beer_lambert_counts_photons_from_the_source_on() -> None:
    mu = np.zeros(N)
    mu[20:24] = 0.02  # 40 mm of water on the patient's left
    figure = xrays.beer_lambert(
        result(
            "ray",
            {"axial": np.zeros((N, N)), "mu": mu},
            {"spacing_mm": SPACING, "y_mm": 5.0, "patient": "p", "line_integral": 0.8},
        )
    )
    draw(figure)
    x, left = figure.axes[2].lines[0].get_data()
    assert left[np.asarray(x) > 90] == pytest.approx(100.0)
    assert left[0] == pytest.approx(100 * np.exp(-0.8))


def test_dose_curves_are_those_that_were_saved() -> None:
    generator = np.random.default_rng(0)
    predicted = np.array([[0, 0, 0], [0.1, 0.2, 0.3], [0.3, 0.6, 0.9]])
    arrays = {
        "xrays": generator.random((3, 8, 8)), "noise_measured": predicted * 1.1, "noise_predicted": predicted,
        "bin_centres": [1.0, 2.0, 3.0],
    }  # fmt: skip
    figure = xrays.doses(result("dose", arrays, {"photons": [0, 10_000, 1_000], "angle_deg": 90.0, "patient": "p"}))
    draw(figure)
    plot = next(ax for ax in figure.axes if ax.lines)
    drawn = [np.asarray(line.get_ydata()) for line in plot.lines]
    for k in (1, 2):
        assert any(np.allclose(line, predicted[k]) for line in drawn)
        assert any(np.allclose(line, 1.1 * predicted[k]) for line in drawn)
    assert len(drawn) == 4  # the ideal image has no noise to draw


def test_two_ways_and_convergence_and_solvers_draw() -> None:
    generator = np.random.default_rng(1)
    image = generator.random((8, 8))
    draw(
        xrays.two_ways(
            result(
                "a",
                {"fast": image, "others": [image + 0.01]},
                {"names": ["other"], "percent": [1.0], "angle_deg": 67.5, "mode": "cone"},
            )
        )
    )
    draw(
        xrays.convergence(
            result(
                "b",
                {"size": np.array([16, 32]), "parallel": np.array([2.0, 0.5]), "cone": np.array([4.0, 1.0])},
                {"slope_parallel": 2.0, "slope_cone": 2.0},
            )
        )
    )


def solvers() -> Result:
    sets = ["8view", "1view_frontal"]
    volume = np.random.default_rng(2).normal(size=(8, 8, 8))
    score = {
        "sirt": {"8view": 24.84, "1view_frontal": 15.1},
        "tv": {"8view": 27.3, "1view_frontal": 15.0},
        "tv_body": {"1view_frontal": 18.0},
    }
    arrays = {"truth": volume} | {f"{m}-{s}": volume for m, row in score.items() for s in row}
    values = {
        "patient": "p", "view_sets": sets, "view_names": ["8 views", "1 view"], "psnr": score,
        "shown": [["sirt", "sirt"], ["tv", "tv_body"]], "row_names": ["SIRT", "total variation"],
    }  # fmt: skip
    return result("solvers", arrays, values)


def test_solver_figure_prints_the_saved_scores() -> None:
    figure = xrays.without_learning(solvers())
    draw(figure)
    notes = [ax.get_xlabel() for ax in figure.axes if ax.get_xlabel()]
    assert notes == ["24.8 dB", "15.1 dB", "27.3 dB", "18.0 dB"]


def test_solver_table_marks_the_best_of_each_column_and_leaves_gaps() -> None:
    table = xrays.solver_table(solvers())
    rows = [row.split("<td")[1:] for row in table.split("<tr>")[2:]]
    cells = [
        [
            cell.split(">", 1)[1]
            .removesuffix("</tr></tbody></table></div>")
            .removesuffix("</tr>")
            .removesuffix("</td>")
            for cell in row
        ]
        for row in rows
    ]
    assert cells == [
        ["SIRT", "24.8", "15.1"],
        ["total variation", "<b>27.3</b>", "15.0"],
        ["total variation + body outline", "–", "<b>18.0</b>"],
    ]


def test_benchmark_tables_say_what_was_measured_or_that_nothing_was() -> None:
    assert benchmarks.peers_table(None) == benchmarks.speed_table(None) == benchmarks.NOT_MEASURED
    speed = benchmarks.speed_table({"cone_speedup": {"value": 5.93, "unit": "x", "fastest_peer": "RTK"}})
    assert "5.93 ×" in speed and "(RTK)" in speed and "parallel beam" not in speed
    row = {"forward_ms": 4.65, "both_ms": 9.1, "blob_error": 0.00061, "ellipsoid_error": 0.0104}
    slow = row | {"forward_ms": 98.7}
    table = {"modes": {"parallel": {"rows": {"ours": row, "ASTRA": slow}}}, "provenance": {"commit": "abc"}}
    assert "0.06" in benchmarks.peers_table(table) and "98.7" in benchmarks.peers_table(table)
    figure = benchmarks.projector_peers(table)
    draw(figure)
    widths = {
        label.get_text(): bar.get_width()
        for label, bar in zip(figure.axes[0].get_yticklabels(), figure.axes[0].patches, strict=True)
    }
    assert widths == {"ASTRA": 98.7, "this book": 4.65}


def test_pictures_in_space_are_not_flipped() -> None:
    """A bright pixel (row, column) must lie between the corners of its row end and column end."""
    corners = np.array([[[0.0, 0, 0], [0, 8, 0]], [[0, 0, 4], [0, 8, 4]]])  # columns along +y, rows along +z
    grey = np.zeros((4, 8))
    grey[3, 1] = 1.0
    drawn: dict[str, Any] = {}

    class Recorder:
        def plot_surface(self, x: np.ndarray, y: np.ndarray, z: np.ndarray, **more: Any) -> None:
            drawn.update(points=np.stack([x, y, z], -1), **more)

    fusion_geometry._textured(Recorder(), corners, grey, zorder=1)
    points, colours = drawn["points"], drawn["facecolors"]
    assert points.shape == (5, 9, 3) and colours.shape == (4, 8, 4)
    r, c = np.unravel_index(colours[..., 0].argmax(), grey.shape)
    assert points[r : r + 2, c : c + 2].mean((0, 1)) == pytest.approx([0, 1.5, 3.5])


def test_point_trace_circles_lie_on_the_images_of_the_point() -> None:
    views = standard_views("4view", N, EDGE)
    images = project(spot_volume()[None, None], views, SPACING)[0, 0]
    hits = torch.stack([world_to_detector(SPOT, view) for view in views])
    strips = torch.stack([image[int(hit[0].round())] for image, hit in zip(images, hits, strict=True)])
    index = [int(i) for i in (spot_volume() > 0).nonzero()[0]]
    arrays = {
        "volume": spot_volume(),
        "strips-parallel": strips,
        "hits-parallel": hits[:, 1],
        "fused-parallel": spot_volume(),
    }
    values = {
        "modes": ["parallel"],
        "point_index": index,
        "angles_deg": VIEW_SETS["4view"],
        "error_mm": {"parallel": 0.0},
    }
    figure = fusion_geometry.point_trace(result("trace", arrays, values))
    draw(figure)
    ax = figure.axes[1]
    u, row = ax.lines[0].get_data()
    shown = np.asarray(ax.images[0].get_array())
    assert np.abs(shown.argmax(1) - u).max() <= 0.75
    assert list(row) == list(range(4))
    axial, coronal = figure.axes[2], figure.axes[3]
    assert brightest(axial) == (index[2], index[1])
    assert brightest(coronal) == (index[2], N - 1 - index[0])  # superior is up


def test_rays_in_plane_end_on_their_detectors() -> None:
    point = np.array([40.0, -30.0])
    ends = np.array([[[200.0, -30.0], [-250.0, -30.0]], [[40.0, 200.0], [40.0, -250.0]]])
    detectors = np.array([[[-250.0, -60.0], [-250.0, 10.0]], [[10.0, -250.0], [70.0, -250.0]]])
    arrays = {"axial": np.zeros((N, N)), "ends-parallel": ends, "detectors-parallel": detectors}
    values = {"modes": ["parallel"], "point_mm": [*point, 0.0], "edge_mm": EDGE, "angles_deg": [0.0, 90.0]}
    figure = fusion_geometry.rays_in_plane(result("plane", arrays, values))
    draw(figure)
    drawn = [np.stack(line.get_data(), 1) for line in figure.axes[0].lines]
    assert any(np.allclose(line, [point]) for line in drawn)
    assert sum(len(line) == 1 for line in drawn) == 3  # two hits and the point


def test_remaining_fusion_figures_draw() -> None:
    generator = np.random.default_rng(3)
    flat = generator.random((2, N, N))
    corner = np.array([[[[-250.0, -160, -160], [-250, 160, -160]], [[-250, -160, 160], [-250, 160, 160]]]])
    space = {
        "axial": flat[0],
        "xrays-cone": flat[:1],
        "corners-cone": corner,
        "hits-cone": [[-250.0, 0, 0]],
        "towards_source-cone": [[300.0, 0, 0]],
    }
    values = {"modes": ["cone"], "point_mm": [0.0, 0.0, 0.0], "edge_mm": EDGE, "angles_deg": [0.0], "dso_mm": 800.0}
    draw(fusion_geometry.rays_in_space(result("space", space, values)))
    draw(
        fusion_geometry.back_projection(
            result(
                "adjoint",
                {"truth": flat[0], "fused-cone": flat[0], "adjoint-cone": flat[1]},
                {"modes": ["cone"], "percent": {"cone": 0.5}},
            )
        )
    )
    draw(
        fusion_geometry.ramp_filter(
            result(
                "ramp",
                {"truth": flat[0], "plain": flat, "filtered": flat},
                {"counts": [8, 64], "row": 4, "spacing_mm": SPACING},
            )
        )
    )
    draw(
        fusion_geometry.mistakes(
            result(
                "mistakes",
                {"fused": flat},
                {
                    "names": ["right", "wrong"],
                    "error_mm": [0.0, 10.0],
                    "peak_percent": [100.0, 50.0],
                    "point_index": [4, 4],
                },
            )
        )
    )
    frames = fusion_geometry.views_frames(
        result("views", {"fused": np.stack([flat, flat * 0.5 + 0.1])}, {"counts": [1, 2]}), 320
    )
    assert len(frames) == 2 and frames[0].shape == frames[1].shape
