"""Figures of what the spread of posterior samples says (chapter 06).

Each function takes a saved result and returns a figure. The docstring names the arrays that it needs.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure

from ..results import Result
from .style import COLOURS, VIEW_COLOURS, VIEW_NAMES, Scale, colour_bar, finish, new_figure, show_slice, styled, top

PAIR = ("2view", "8view")
MARKERS = {"2view": "o", "4view": "D", "8view": "s"}


def _sets(prefix: str, found: Mapping[str, object]) -> list[str]:
    """The sets of views that a result has, few views first: two or three."""
    return [views for views in MARKERS if f"{prefix}_{views}" in found]


@styled
def bias_variance(result: Result) -> Figure:
    """Maps of error², bias² and variance for few and many views, as Fig. 8 of the paper.

    Arrays: ``truth``, and per set of views ``mean_VIEWS``, ``error_VIEWS``, ``bias_VIEWS``, ``variance_VIEWS`` (z y x;
    HU, and HU² for the last three); values ``n_samples``, and ``rms_bias_VIEWS``, ``rms_variance_VIEWS`` (HU).
    """
    a, v = result.arrays, result.values
    columns = (
        ("mean", f"mean of {v['n_samples']}"),
        ("error", "mean error²"),
        ("bias", "= bias²"),
        ("variance", "+ variance"),
    )
    sets = _sets("mean", a)
    figure, axes = new_figure(9.8, 3.6 * len(sets) + 0.7, 2 * len(sets), 5)
    # Root of the mean squares: the same picture, in HU, which a reader can judge.
    scale = Scale("square root, HU", 0, top(np.sqrt(a["error_2view"]), 0.995), "inferno")
    for k, views in enumerate(sets):
        for i, plane in enumerate(("coronal", "axial")):
            row = axes[2 * k + i]
            ct = show_slice(row[0], a["truth"], plane, marks=True)
            for ax, (key, title) in zip(row[1:], columns, strict=True):
                volume = a[f"{key}_{views}"].astype(np.float32)
                if key == "mean":
                    show_slice(ax, volume, plane)
                else:
                    image = show_slice(ax, np.sqrt(volume), plane, scale=scale)
                if k + i == 0:
                    ax.set_title(title)
            row[0].set_ylabel(f"{VIEW_NAMES[views]}\n{plane}", fontsize=9)
    axes[0, 0].set_title("truth")
    colour_bar(figure, ct, axes[:, :2].ravel().tolist(), "HU")
    colour_bar(figure, image, axes[:, 2:].ravel().tolist(), scale.label)
    both = all(v[f"rms_{key}_8view"] < v[f"rms_{key}_2view"] for key in ("bias", "variance"))
    return finish(figure, result, f"Error² = bias² + variance{': more views shrink both' if both else ''}")


@styled
def sample_count(result: Result) -> Figure:
    """How many samples a mean and a spread need.

    Arrays: ``count`` (n,), and per set of views ``rmse_VIEWS`` (of the mean), ``std_VIEWS`` (HU); ``predicted_VIEWS``
    (root of bias² + variance/N from the largest N).
    """
    a = result.arrays
    figure, axes = new_figure(8.8, 3.5, 1, 2)
    for views in _sets("rmse", a):
        colour = VIEW_COLOURS[views]
        axes[0, 0].plot(a["count"], a[f"rmse_{views}"], "o", color=colour, label=VIEW_NAMES[views])
        axes[0, 0].plot(a["count"], a[f"predicted_{views}"], "-", color=colour, linewidth=1)
        axes[0, 1].plot(a["count"][1:], a[f"std_{views}"][1:], "o-", color=colour, label=VIEW_NAMES[views])
    axes[0, 0].set_ylabel("RMS error of the mean, HU")
    axes[0, 0].set_title("dots: measured; lines: √(bias² + variance/N)", loc="left")
    axes[0, 1].set_ylabel("RMS standard deviation, HU")
    axes[0, 1].set_title("population standard deviation of N samples", loc="left")
    for ax in axes[0]:
        ax.set_xscale("log", base=2)
        ax.set_xticks(a["count"], [f"{n:g}" for n in a["count"]])
        ax.set_xlabel("samples N")
        ax.grid(True, linewidth=0.6)
        ax.legend()
    return finish(figure, result, "A few samples give the mean, the spread needs more")


@styled
def organs(result: Result) -> Figure:
    """Spread of the samples per organ, with few and many views, beside the error of the mean.

    Values: ``organs`` (names), per set of views ``organ_std_VIEWS``, ``organ_error_VIEWS`` (HU, one per organ);
    ``narrower`` (organs with less spread with 8 views).
    """
    v = result.values
    order = np.argsort(v["organ_std_2view"])
    names = [v["organs"][i].replace("_", " ") for i in order]
    figure, axes = new_figure(9.6, 0.3 * len(names) + 1.6, 1, 2, sharey="row")
    y = np.arange(len(names))
    panels = (("organ_std", "standard deviation of the samples, HU"), ("organ_error", "RMS error of the mean, HU"))
    for ax, (key, label) in zip(axes[0], panels, strict=True):
        of_sets = {views: np.asarray(v[f"{key}_{views}"])[order] for views in _sets(key, v)}
        table = np.stack(list(of_sets.values()))
        ax.hlines(y, table.min(0), table.max(0), color="#bbbbbb", linewidth=2)
        for views, values in of_sets.items():
            ax.plot(values, y, MARKERS[views], color=VIEW_COLOURS[views], label=VIEW_NAMES[views], markersize=6)
        ax.set_xlabel(label)
        ax.grid(True, axis="x", linewidth=0.6)
        ax.set_xlim(0, 1.08 * table.max())  # its own axis: a few organs' errors dwarf every spread
    axes[0, 0].set_yticks(y, names)
    axes[0, 0].tick_params(axis="y", length=0)
    axes[0, 0].legend(loc="lower right")
    which = "every tissue" if v["narrower"] == len(names) else f"{v['narrower']} of {len(names)} tissues"
    return finish(figure, result, f"Six more x-rays narrow {which}")


@styled
def calibration(result: Result) -> Figure:
    """Does the spread find the error, and is it wide enough?

    Arrays: ``left_out`` (share of voxels set aside), per set of views ``left_by_std_VIEWS``, ``left_by_error_VIEWS``
    (RMS error of the rest, HU); ``expected``, ``observed_VIEWS`` (coverage of central intervals); values
    ``spearman_VIEWS``.
    """
    a, v = result.arrays, result.values
    figure, axes = new_figure(9.6, 4.1, 1, 2)
    ax = axes[0, 0]
    for views in PAIR:
        colour = VIEW_COLOURS[views]
        label = f"{VIEW_NAMES[views]}: by the spread"
        ax.plot(100 * a["left_out"], a[f"left_by_std_{views}"], color=colour, label=label)
        ideal = a[f"left_by_error_{views}"]
        ax.plot(100 * a["left_out"], ideal, color=colour, linestyle=":", label="by the error itself")
    ax.set_xlabel("most uncertain voxels set aside, %")
    ax.set_ylabel("RMS error of the others, HU")
    ax.set_ylim(bottom=0)
    ax.legend(loc="upper right", fontsize=8.5)
    words = ", ".join(f"{v[f'spearman_{views}']:.2f} ({VIEW_NAMES[views]})" for views in PAIR)
    ax.set_title(f"Does the spread find the error?\nrank correlation {words}", loc="left")
    ax = axes[0, 1]
    ax.plot([0, 100], [0, 100], color=COLOURS["grey"], linestyle="--", linewidth=1)
    ax.text(60, 65, "calibrated", fontsize=9, rotation=42, color=COLOURS["grey"], ha="center")
    for views, marker in zip(PAIR, ("o", "s"), strict=True):
        label = VIEW_NAMES[views]
        ax.plot(100 * a["expected"], 100 * a[f"observed_{views}"], marker + "-", color=VIEW_COLOURS[views], label=label)
    ax.set_xlabel("expected coverage, %")
    ax.set_ylabel("voxels inside the interval, %")
    ax.set_xlim(0, 100)
    ax.set_ylim(0, 100)
    ax.set_aspect("equal")
    ax.set_title("Below the line: too sure", loc="left")
    ax.legend(loc="upper left")
    for ax in axes[0]:
        ax.grid(True, linewidth=0.6)
    sure = all(np.mean(a[f"observed_{views}"] - a["expected"]) < -0.02 for views in PAIR)
    return finish(figure, result, f"The spread points to the errors{' and is smaller than they are' if sure else ''}")


@styled
def conformal(result: Result) -> Figure:
    """Share of voxels inside calibrated 90 % intervals, organ by organ.

    Values: ``organs``; per set of views ``held_organs_VIEWS`` (per cent, one an organ), ``held_VIEWS``, ``raw_VIEWS``
    (per cent of the body, calibrated and not), ``width_VIEWS`` (HU).
    """
    v = result.values
    order = np.argsort(v["held_organs_2view"])
    names = [v["organs"][i].replace("_", " ") for i in order]
    figure, axes = new_figure(7.4, 0.28 * len(names) + 2.0, 1, 1)
    ax, y = axes[0, 0], np.arange(len(names))
    ax.axvline(90, color=COLOURS["grey"], linestyle="--", linewidth=1)
    for views, marker in zip(PAIR, ("o", "s"), strict=True):
        label = f"{VIEW_NAMES[views]}: body {v[f'held_{views}']:.0f} %, ±{v[f'width_{views}']:.0f} HU"
        held = np.asarray(v[f"held_organs_{views}"])[order]
        ax.plot(held, y, marker, color=VIEW_COLOURS[views], markersize=6, label=label)
        ax.plot(v[f"raw_{views}"], -1.2, "x", color=VIEW_COLOURS[views], markersize=7)
    ax.text(min(v[f"raw_{views}"] for views in PAIR), -0.9, "body, uncalibrated", fontsize=8.5, va="bottom")
    ax.set_yticks(y, names)
    ax.tick_params(axis="y", length=0)
    ax.set_ylim(-2, len(names))
    ax.set_xlim(right=101)
    ax.set_xlabel("voxels inside the 90 % interval, %")
    ax.grid(True, axis="x", linewidth=0.6)
    ax.legend(loc="upper left")
    good = all(abs(v[f"held_{views}"] - 90) <= 2 for views in PAIR)
    words = "hold what they promise in the body as a whole" if good else "come closer to what they promise"
    return finish(figure, result, f"Calibrated error bars {words}, not in every organ")


@styled
def phantom_and_real(result: Result) -> Figure:
    """The same model on a phantom and on the real scan: error and spread.

    Arrays: ``truth_WHO``, ``mean_WHO``, ``std_WHO`` (z y x, HU) for WHO in ``phantom``, ``real``; values
    ``rms_std_WHO``, ``rms_error_WHO`` (HU), ``names``.
    """
    a, v = result.arrays, result.values
    figure, axes = new_figure(7.6, 4.6, 2, 4)
    scale = Scale("HU", 0, top(a["std_phantom"], 0.999) * 2, "inferno")
    for row, who, name in zip(axes, ("phantom", "real"), v["names"], strict=True):
        truth, mean, std = (a[f"{key}_{who}"].astype(np.float32) for key in ("truth", "mean", "std"))
        ct = show_slice(row[0], truth, "coronal", marks=True)
        show_slice(row[1], mean, "coronal")
        show_slice(row[2], std, "coronal", scale=scale)
        image = show_slice(row[3], np.abs(mean - truth), "coronal", scale=scale)
        row[0].set_ylabel(name, fontsize=9)
        row[2].set_xlabel(f"RMS {v[f'rms_std_{who}']:.0f} HU", fontsize=9)
        row[3].set_xlabel(f"RMS {v[f'rms_error_{who}']:.0f} HU", fontsize=9)
    for ax, title in zip(axes[0], ("truth", "mean", "standard deviation", "|mean − truth|"), strict=True):
        ax.set_title(title)
    colour_bar(figure, ct, axes[:, :2].ravel().tolist(), "HU")
    colour_bar(figure, image, axes[:, 2:].ravel().tolist(), "HU")
    growth = {key: v[f"rms_{key}_real"] / v[f"rms_{key}_phantom"] for key in ("error", "std")}
    message = "the error grows more than the spread" if growth["error"] > growth["std"] else "error and spread grow"
    return finish(figure, result, f"On a real scan {message}")


DETECTORS = {
    "residual": ("re-projection residual", "red"),
    "standardised": ("misfit against the usual", "orange"),
    "guess": ("misfit of the first guess", "black"),
    "peak": ("largest misfit of a spot", "purple"),
    "xray_alone": ("x-ray alone, no model", "green"),
    "spread": ("mean spread in the body", "blue"),
    "spread_95": ("95th percentile of the spread", "sky"),
}


@styled
def detection(result: Result) -> Figure:
    """Do scores that need no truth tell chests apart that training never had?

    Arrays: for each of DETECTORS ``false_NAME``, ``true_NAME`` (ROC curve, shares); ``residual_normal``,
    ``residual_altered`` (shares, one a case). Values: ``findings`` (of each altered case), ``auc`` (NAME -> area),
    ``auc_finding`` (finding -> area by the residual), ``threshold``; ``real``, residual of the real scan, or None.
    """
    a, v = result.arrays, result.values
    figure, axes = new_figure(10.0, 5.8, 1, 2, width_ratios=(1, 1.35))
    ax = axes[0, 0]
    ax.plot([0, 100], [0, 100], "--", color=COLOURS["grey"], linewidth=1)
    for name, (words, colour) in DETECTORS.items():
        label = f"{words}: {v['auc'][name]:.2f}"
        ax.step(100 * a[f"false_{name}"], 100 * a[f"true_{name}"], where="post", color=COLOURS[colour], label=label)
    ax.set_xlabel("normal chests flagged, %")
    ax.set_ylabel("altered chests flagged, %")
    ax.set_aspect("equal")
    ax.legend(  # below: seven curves leave no corner free
        loc="upper center", bbox_to_anchor=(0.4, -0.15), ncol=2, fontsize=8, title="area under the curve",
        title_fontsize=8.5, columnspacing=1.0,
    )  # fmt: skip
    ax = axes[0, 1]
    kinds = sorted(v["auc_finding"], key=lambda name: v["auc_finding"][name])
    findings = np.asarray(v["findings"])
    rows = [("normal", a["residual_normal"], "grey")]
    for name in kinds:
        words = f"{name.replace('_', ' ')}: {v['auc_finding'][name]:.2f}"
        rows.append((words, a["residual_altered"][findings == name], "red"))
    if v["real"] is not None:
        rows.append(("real scan", np.array([v["real"]]), "black"))
    for y, (_, scores, colour) in enumerate(rows):
        # Spread over the height of the row, by rank, so that dots do not hide each other.
        shift = (np.argsort(np.argsort(scores)) % 5 - 2) * 0.09 if len(scores) > 1 else 0
        ax.plot(100 * scores, y + shift, "o", color=COLOURS[colour], markersize=4.5, alpha=0.75)
    ax.axvline(100 * v["threshold"], color=COLOURS["grey"], linestyle="--", linewidth=1)
    ax.set_yticks(range(len(rows)), [name for name, _, _ in rows])
    ax.tick_params(axis="y", length=0)
    ax.set_xlim(left=0)
    ax.set_xlabel("residual, % (dashed: 95th percentile of normal)")
    ax.set_title("One dot a chest; area under the curve of the residual", loc="left")
    for ax in axes[0]:
        ax.grid(True, axis="both" if ax is axes[0, 0] else "x", linewidth=0.6)
    best, worst = (kinds[k].replace("_", " ") for k in (-1, 0))
    return finish(figure, result, f"The residual tells {best} best, {worst} least")
