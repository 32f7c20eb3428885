"""Figures of the radiotherapy study (chapter 07).

Each function takes a saved result and returns a figure. The docstring names the arrays that it needs. Masks are stored
as ``mask_NAME`` (drawn by the rules) and ``label_NAME`` (true), booleans (z, y, x) on the CT's grid.
"""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ..results import Result
from .style import COLOURS, Scale, colour_bar, finish, new_figure, plane_of, show_slice, styled

#: One colour per structure.
STRUCTURES: dict[str, str] = {
    "lung_left": COLOURS["sky"],
    "lung_right": COLOURS["sky"],
    "heart": COLOURS["red"],
    "breast_left": COLOURS["green"],
    "breast_right": COLOURS["green"],
    "target": COLOURS["yellow"],
    "spine": COLOURS["purple"],
}
_SOFT = Scale("HU", -400, 300)


def _outline(ax: Axes, mask: np.ndarray, plane: str, index: int, colour: str, style: str = "-") -> None:
    picture = plane_of(mask, plane, index)
    if picture.any() and not picture.all():
        ax.contour(picture.astype(float), [0.5], colors=[colour], linewidths=1.3, linestyles=[style])


def _middle_of(mask: np.ndarray, axis: int) -> int:
    index = np.argwhere(mask)
    return int(np.median(index[:, axis])) if len(index) else mask.shape[axis] // 2


@styled
def contours(result: Result) -> Figure:
    """Contours drawn by the rules (lines) and true ones (dashes) in four slices.

    Arrays: ``hu``, ``mask_NAME``, ``label_NAME``; values ``dice`` (name → Dice), ``side``.
    """
    a, v = result.arrays, result.values
    # The true ones say where to look: a contour that the rules could not draw must not move the slices.
    breast, heart = a[f"label_breast_{v['side']}"], a["label_heart"]
    z = _middle_of(breast, 0)
    low = _middle_of(heart, 0)
    slices = (
        ("axial", z),
        ("axial", low),
        ("coronal", _middle_of(heart, 1)),
        ("sagittal", _middle_of(breast, 2)),
    )
    figure, axes = new_figure(11.5, 3.7, 1, 4)
    for ax, (plane, index) in zip(axes[0], slices, strict=True):
        show_slice(ax, a["hu"], plane, index, scale=_SOFT, marks=True)
        for name, colour in STRUCTURES.items():
            for kind, style in (("mask", "-"), ("label", "--")):
                if f"{kind}_{name}" in a:
                    _outline(ax, a[f"{kind}_{name}"], plane, index, colour, style)
        ax.set_title(plane, loc="left")
    shown = {"lungs": "lung_left", "heart": "heart", "breasts": f"breast_{v['side']}", "spine": "spine"}
    handles = [
        Line2D(
            [], [], color=STRUCTURES[name], label=f"{title}, Dice {v['dice'][name]:.2f}" if name in v["dice"] else title
        )
        for title, name in shown.items()
    ]
    handles += [
        Line2D([], [], color="black", label="by the rules"),
        Line2D([], [], color="black", ls="--", label="true"),
    ]
    figure.legend(handles=handles, loc="outside upper right", ncols=3)
    return finish(figure, result, "Contours from thresholds and shapes alone")


@styled
def tangents(result: Result) -> Figure:
    """The fields over an axial slice, and the view from each source.

    Arrays: ``hu``, ``mask_NAME`` with "target", ``isocentre`` (x, y, z mm), ``origin`` and ``spacing`` (x, y, z mm),
    ``gantry`` (2,), ``sources`` (2, 2, 2: field, edge, x y of the far end), ``start`` (2, 2: x y of the sources),
    per field ``leaves_K`` (row, 2), ``rows`` (row,), ``uv_K_NAME`` (n, 2) of target, lung and heart; value ``side``.
    """
    a, v = result.arrays, result.values
    figure, axes = new_figure(11.5, 4.2, 1, 3, width_ratios=[1.25, 1, 1])
    ax = axes[0, 0]
    z = round(float((a["isocentre"][2] - a["origin"][2]) / a["spacing"][2]))
    show_slice(ax, a["hu"], "axial", z, scale=_SOFT, marks=True)
    for name in ("lung_left", "lung_right", "heart", "target"):
        _outline(ax, a[f"mask_{name}"], "axial", z, STRUCTURES[name])
    limits = ax.get_xlim(), ax.get_ylim()
    for k, colour in enumerate((COLOURS["orange"], COLOURS["blue"])):
        start = (a["start"][k] - a["origin"][:2]) / a["spacing"][:2]
        for edge in a["sources"][k]:
            end = (edge - a["origin"][:2]) / a["spacing"][:2]
            ax.plot([start[0], end[0]], [start[1], end[1]], color=colour, linewidth=1.4)
    ax.set_xlim(*limits[0])
    ax.set_ylim(*limits[1])
    ax.set_title("field edges through the iso-centre", loc="left")
    lung = f"lung_{v['side']}"
    for k, (title, colour) in enumerate((("medial", COLOURS["orange"]), ("lateral", COLOURS["blue"]))):
        ax = axes[0, 1 + k]
        for name in (lung, "heart", "target"):
            points = a[f"uv_{k}_{name}"]
            shade = COLOURS["green"] if name == "target" else STRUCTURES[name]
            ax.plot(
                points[:, 0], points[:, 1], ".", color=shade, markersize=2.0, alpha=0.35, label=name.replace("_", " ")
            )
        height = float(a["rows"][1] - a["rows"][0])
        leaves = a[f"leaves_{k}"]
        opened = np.flatnonzero(leaves[:, 1] > leaves[:, 0])
        for end in (0, 1):
            ax.stairs(leaves[opened, end], np.append(a["rows"][opened], a["rows"][opened[-1]] + height),
                      orientation="horizontal", baseline=None, color=colour, linewidth=1.8)  # fmt: skip
        for row in (a["rows"][opened[0]], a["rows"][opened[-1]] + height):
            ends = leaves[opened[0] if row < 0 else opened[-1]]
            ax.plot(ends, [row, row], color=colour, linewidth=1.8)
        ax.set_aspect("equal")
        ax.set_xlabel("u, mm")
        ax.set_title(f"{title}: seen from gantry {a['gantry'][k]:.0f}°", loc="left")
    axes[0, 1].set_ylabel("v, mm (up is superior)")
    handles = [
        Line2D([], [], color=colour, marker="o", linestyle="", label=label)
        for label, colour in ((lung.replace("_", " "), STRUCTURES[lung]), ("heart", STRUCTURES["heart"]),
                              ("target", COLOURS["green"]))
    ]  # fmt: skip
    figure.legend(handles=handles, loc="outside lower right", ncols=3)
    return finish(figure, result, "Two opposed fields graze the chest wall")


@styled
def dose_slices(result: Result) -> Figure:
    """Dose over slices, as Fig. 9: planned on the truth, on the reconstruction, and the latter delivered to the truth.

    Arrays: ``hu_truth``, ``hu_reconstruction``, ``dose_truth``, ``dose_reconstruction``, ``dose_delivered`` (Gy),
    ``target_truth``, ``target_reconstruction`` (masks); values ``prescription_gy``, ``v90``, ``v20_lung`` (%).
    """
    a, v = result.arrays, result.values
    rows = (
        ("truth", "truth", "truth", "planned on the true CT"),
        ("reconstruction", "reconstruction", "reconstruction", "planned on the reconstruction\n(the paper's protocol)"),
        ("truth", "delivered", "truth", "that plan on the true CT\n(the honest protocol)"),
    )
    where = np.flatnonzero(a["target_truth"].any((1, 2)))
    levels = [int(np.quantile(where, q)) for q in (0.2, 0.5, 0.8)]
    figure, axes = new_figure(10.2, 9.4, 3, 4)
    wash = Scale("dose, Gy", 0.0, 1.1 * v["prescription_gy"], "turbo")
    for row, (hu, dose, target, title) in zip(axes, rows, strict=True):
        planes = [("axial", z) for z in levels] + [("sagittal", _middle_of(a["target_truth"], 2))]
        for ax, (plane, index) in zip(row, planes, strict=True):
            show_slice(ax, a[f"hu_{hu}"], plane, index, scale=_SOFT, marks=True)
            picture = plane_of(a[f"dose_{dose}"].astype(np.float32), plane, index)
            image = ax.imshow(
                np.ma.masked_less(picture, 0.1 * v["prescription_gy"]),
                cmap=wash.cmap,
                vmin=wash.low,
                vmax=wash.high,
                alpha=0.6,
            )
            _outline(ax, a[f"target_{target}"], plane, index, "white")
        row[0].set_ylabel(title, fontsize=9)
        row[3].set_xlabel(f"V90% {v['v90'][dose]:.1f} %, lung V20 {v['v20_lung'][dose]:.1f} %", fontsize=8.5)
    colour_bar(figure, image, axes.ravel().tolist(), f"{wash.label} (above 10 % of the prescription); white: target")
    return finish(figure, result, "Dose of two tangents")


@styled
def dvh(result: Result) -> Figure:
    """DVHs of target, lung and heart: what was meant, what arrives, and the band over samples.

    Arrays: ``gy`` (k,), per structure NAME ``truth_NAME``, ``delivered_NAME`` (k,) and ``band_NAME`` (3, k); values
    ``names``, ``n_samples``, ``prescription_gy``, ``goals`` (goal → share of samples).
    """
    a, v = result.arrays, result.values
    figure, axes = new_figure(10.2, 4.1, 1, 2, width_ratios=[1.8, 1])
    ax = axes[0, 0]
    for name in v["names"]:
        colour = COLOURS["green"] if name == "target" else STRUCTURES[name]
        low, _, high = a[f"band_{name}"]
        ax.fill_between(a["gy"], low, high, color=colour, alpha=0.28, linewidth=0)
        ax.plot(a["gy"], a[f"truth_{name}"], color=colour)
        ax.plot(a["gy"], a[f"delivered_{name}"], color=colour, linestyle="--")
        middle = np.argmin(np.abs(a[f"truth_{name}"] - (60 if name == "target" else 22)))
        ax.annotate(name.replace("_", " "), (a["gy"][middle], a[f"truth_{name}"][middle]), (4, 6),
                    textcoords="offset points", color=colour)  # fmt: skip
    ax.axvline(0.9 * v["prescription_gy"], color=COLOURS["grey"], linewidth=0.8, linestyle=":")
    ax.text(0.9 * v["prescription_gy"], 101, "90 %", ha="center", va="bottom", fontsize=8, color=COLOURS["grey"])
    ax.set(xlabel="dose, Gy", ylabel="volume, %", xlim=(0, float(a["gy"][-1])), ylim=(0, 100.5))
    ax.grid(True, linewidth=0.6)
    handles = [
        Line2D([], [], color="black", label="planned on the truth"),
        Line2D([], [], color="black", linestyle="--", label="plan of the reconstruction, on the truth"),
        Line2D([], [], color="black", alpha=0.28, linewidth=7, label=f"90 % band over {v['n_samples']} samples"),
    ]
    ax.legend(handles=handles, loc="center left", bbox_to_anchor=(0.12, 0.62))
    ax = axes[0, 1]
    goals = list(v["goals"])
    shares = [100 * v["goals"][goal] for goal in goals]
    ax.barh(range(len(goals)), shares, color=COLOURS["blue"], height=0.55)
    for k, share in enumerate(shares):
        ax.text(
            min(share, 80) + 2, k, f"{share:.0f} %", va="center", fontsize=9, color="white" if share > 80 else "black"
        )
    ax.set_yticks(range(len(goals)), [_goal(goal) for goal in goals])
    ax.invert_yaxis()
    ax.set(xlabel="samples in which the goal is met, %", xlim=(0, 100))
    return finish(figure, result, "What the posterior says about a plan before anyone is treated")


def _goal(text: str) -> str:
    metric, sense, limit = text.split()
    words = {"v90": "V90% target", "v95": "V95% target", "v20_lung": "V20Gy lung", "mean_heart": "mean heart"}
    unit = "Gy" if metric.startswith("mean") else "%"
    return f"{words.get(metric, metric)} {'≥' if sense == '>=' else '≤'} {limit} {unit}"


@styled
def protocols(result: Result) -> Figure:
    """Errors of V90% and lung V20Gy by the two protocols, one row a patient.

    Arrays: ``v90_own``, ``v90_true``, ``v20_lung_own``, ``v20_lung_true`` (patient,), NaN where not plannable; values
    ``patients``, ``reasons`` (patient → why not), ``v90_error_median_own``, ``..._true`` (or None).
    """
    a, v = result.arrays, result.values
    figure, axes = new_figure(9.4, 1.5 + 0.42 * len(v["patients"]), 1, 2, sharey=True)
    for ax, (metric, title) in zip(
        axes[0], (("v90", "V90% of the target"), ("v20_lung", "V20Gy of the lung")), strict=True
    ):
        for offset, (key, colour, label) in zip(
            (-0.12, 0.12),
            (("own", COLOURS["orange"], "own contours and plan (the paper's)"),
             ("true", COLOURS["blue"], "delivered to the true patient")),
            strict=True,
        ):  # fmt: skip
            ax.plot(a[f"{metric}_{key}"], np.arange(len(v["patients"])) + offset, "o", color=colour, label=label)
        ax.axvline(0, color=COLOURS["grey"], linewidth=0.8)
        ax.set_xlabel("error, percentage points")
        ax.set_title(title, loc="left")
        ax.grid(True, axis="x", linewidth=0.6)
        reach = max(1.0, 1.15 * float(np.nanmax(np.abs([*a[f"{metric}_own"], *a[f"{metric}_true"], 0.0]))))
        ax.set_xlim(-reach, reach)
        for row, name in enumerate(v["patients"]):
            if name in v["reasons"]:
                ax.text(0, row, "not plannable", ha="center", va="center", fontsize=8.5, color=COLOURS["grey"])
    axes[0, 0].set_yticks(range(len(v["patients"])), v["patients"])
    axes[0, 0].set_ylim(len(v["patients"]) - 0.5, -0.5)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower right", ncols=1)
    own, true = (v[f"v90_error_median_{key}"] for key in ("own", "true"))
    flatters = own is not None and own < true
    message = "Scored on itself, a reconstruction flatters itself" if flatters else "Two ways to score one plan"
    return finish(figure, result, message)
