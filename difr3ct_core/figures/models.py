"""Figures of the autoencoder (chapter 02) and of the diffusion model's training (chapter 04).

Each function takes a saved result and returns a figure. The docstring names the arrays that it needs.
"""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..results import Result
from .style import (
    COLOURS,
    VIEW_COLOURS,
    VIEW_NAMES,
    Column,
    Scale,
    colour_bar,
    finish,
    new_figure,
    show_slice,
    slice_grid,
    styled,
)

ERROR = Scale("difference, HU", -400, 400, "RdBu_r")
LATENT = Scale("scaled latent", -1.25, 1.25, "PuOr_r")
VIEW_ORDER = ("8view", "2view", "1view_frontal")


def _smooth(values: np.ndarray, width: int) -> np.ndarray:
    """Running mean whose window shrinks at the ends."""
    total = np.cumsum(np.concatenate([[0.0], values]))
    i = np.arange(len(values))
    low, high = np.maximum(i - width // 2, 0), np.minimum(i + width // 2 + 1, len(values))
    return (total[high] - total[low]) / (high - low)


def _grid(ax: Axes) -> None:
    ax.grid(True, linewidth=0.6)
    ax.set_axisbelow(True)


@styled
def autoencoder_training(result: Result) -> Figure:
    """Terms of Eq. 11, the use of the codebook during training, and what held-out patients reach.

    Arrays: ``step``, ``l1`` (HU), ``commitment``, ``perplexity``, ``val_step``, ``val_psnr`` (dB); value
    ``codebook_size``. Of a short training on the reader's machine, where the weights shipped, also ``own_step``,
    ``own_l1``, ... (drawn as dots). Of the decoder's own training, where there was one, ``decoder_step``,
    ``decoder_psnr``.
    """
    a = result.arrays
    figure, axes = new_figure(9.6, 6.2, 2, 2)
    width = max(len(a["step"]) // 25, 1)
    panels = (
        ("l1", "mean absolute error, HU", "blue"),
        ("commitment", "commitment ‖z − e‖²", "red"),
        ("perplexity", "perplexity, codes", "green"),
    )
    for ax, (key, label, colour) in zip(axes.flat, panels, strict=False):
        ax.plot(a["step"], a[key], color=COLOURS[colour], alpha=0.25, linewidth=1)
        ax.plot(a["step"], _smooth(a[key], width), color=COLOURS[colour])
        if "own_step" in a:
            ax.plot(a["own_step"], a[f"own_{key}"], "o", color=COLOURS["black"], markersize=3, label="begun here")
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter("")
        ax.set_ylabel(label)
        ax.set_xlabel("training step")
        _grid(ax)
    if "own_step" in a:
        axes[0, 0].legend()
    size = result.values["codebook_size"]
    axes[1, 0].axhline(size, color=COLOURS["grey"], linestyle="--", linewidth=1)
    axes[1, 0].text(a["step"][-1], size * 0.97, f"all {size} codes", ha="right", va="top", fontsize=8.5)
    axes[1, 0].set_ylim(top=size * 1.15)
    ax = axes[1, 1]
    ax.plot(a["val_step"], a["val_psnr"], "o-", color=COLOURS["orange"], markersize=4, label="autoencoder, by crops")
    if "decoder_step" in a:
        # It goes on where the other ends, which is its first point.
        steps = np.concatenate([[0], a["decoder_step"]]) + a["val_step"][-1]
        reached = np.concatenate([a["val_psnr"][-1:], a["decoder_psnr"]])
        ax.plot(steps, reached, "s-", color=COLOURS["purple"], markersize=4, label="decoder alone, whole volumes")
        ax.legend(loc="lower right")
    ax.set_ylabel("PSNR of held-out patients, dB")
    ax.set_xlabel("training step")
    _grid(ax)
    in_use = float(np.mean(a["perplexity"][-5:])) / size
    message = "its codebook stays in use" if in_use > 0.15 else "with a small part of its codebook"
    return finish(figure, result, f"The autoencoder learns, {'and ' if in_use > 0.15 else ''}{message}")


@styled
def autoencoding(result: Result) -> Figure:
    """CT, what the autoencoder makes of it, and the difference.

    Arrays: ``truth``, ``decoded`` (patient z y x, HU); values ``names``, ``psnr`` (dB, one per patient).
    """
    columns = []
    for i, name in enumerate(result.values["names"]):
        truth, decoded = (result.arrays[key][i].astype(np.float32) for key in ("truth", "decoded"))
        columns += [
            Column(name, truth),
            Column("decoded", decoded, note=f"PSNR {result.values['psnr'][i]:.1f} dB"),
            Column("difference", decoded - truth, ERROR),
        ]
    figure, _ = slice_grid(columns, panel=1.75 if len(columns) > 3 else 2.2)
    return finish(figure, result, "The autoencoder keeps the anatomy and loses the fine texture")


@styled
def judges(result: Result) -> Figure:
    """One autoencoder trained on with more and more of the losses of Eq. 11-14.

    Arrays: ``truth`` (z y x, HU), ``decoded`` (loss z y x, HU); values ``names``, ``psnr`` (dB), ``lpips``,
    ``sharpness`` (share of the truth's gradient energy), each with one entry a loss; ``lpips`` may be None.
    """
    v = result.values
    columns = [Column("CT", result.arrays["truth"].astype(np.float32))]
    for i, name in enumerate(v["names"]):
        lpips = "" if v["lpips"] is None else f"LPIPS {v['lpips'][i]:.3f}\n"
        note = f"PSNR {v['psnr'][i]:.2f} dB\n{lpips}sharpness {v['sharpness'][i]:.2f}"
        columns.append(Column(name, result.arrays["decoded"][i].astype(np.float32), note=note))
    figure, _ = slice_grid(columns, panel=2.0)
    if v["sharpness"][-1] > v["sharpness"][0]:
        cost = "cost no PSNR" if v["psnr"][-1] >= v["psnr"][0] else "cost some PSNR"
        return finish(figure, result, f"The judges sharpen the picture and {cost}")
    return finish(figure, result, "In so few steps the judges sharpen nothing yet")


@styled
def quantisation(result: Result) -> Figure:
    """Latent vectors and codes in a plane, how often each code is used, and what fewer codes would cost.

    Arrays: ``latent_plane`` (n, 2), ``codes_plane`` (size, 2), ``use`` (share of tokens per code, falling), ``kept``
    and ``psnr_kept`` (dB with the most used codes only); values ``perplexity_test``, ``psnr_unquantised``,
    ``codes_used_percent``, ``codebook_size``.
    """
    a, v = result.arrays, result.values
    figure, axes = new_figure(10.2, 3.6, 1, 3)
    ax = axes[0, 0]
    ax.scatter(*a["latent_plane"].T, s=3, color=COLOURS["sky"], alpha=0.45, linewidths=0, label="latent vectors")
    ax.scatter(*a["codes_plane"].T, s=7, color=COLOURS["red"], linewidths=0, label="codes")
    ax.set_xlabel("first principal axis")
    ax.set_ylabel("second principal axis")
    ax.set_title("Each vector becomes its nearest code", loc="left")
    ax.legend(markerscale=2, loc="best")

    ax = axes[0, 1]
    ax.fill_between(np.arange(1, len(a["use"]) + 1), 100 * a["use"], step="mid", color=COLOURS["blue"], alpha=0.85)
    ax.axhline(100 / v["codebook_size"], color=COLOURS["grey"], linestyle="--", linewidth=1)
    ax.text(v["codebook_size"], 100 / v["codebook_size"], "even use", ha="right", va="bottom", fontsize=8.5)
    ax.set_yscale("log")
    ax.set_ylim(bottom=max(100 * float(a["use"][a["use"] > 0].min()) / 2, 1e-4))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.set_xlabel("code, from most to least used")
    ax.set_ylabel("share of tokens, %")
    ax.set_title(
        f"{v['codes_used_percent']:.0f} % of the codes used,\nperplexity {v['perplexity_test']:.0f}", loc="left"
    )

    ax = axes[0, 2]
    ax.axhline(v["psnr_unquantised"], color=COLOURS["grey"], linestyle="--", linewidth=1)
    ax.text(a["kept"][0], v["psnr_unquantised"], "no quantisation", va="bottom", fontsize=8.5)
    ax.plot(a["kept"], a["psnr_kept"], "o-", color=COLOURS["blue"])
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter("{x:g}")
    ax.set_xlabel("codes kept, the most used first")
    ax.set_ylabel("PSNR, dB")
    ax.margins(y=0.12)
    ax.set_title("What the codebook costs", loc="left")
    for ax in axes[0, 1:]:
        _grid(ax)
    return finish(figure, result, "Quantisation: a CT becomes a list of codes")


@styled
def latent_channels(result: Result) -> Figure:
    """A CT and the channels of its latent.

    Arrays: ``ct`` (z y x, HU), ``latent`` (channel z y x, scaled).
    """
    ct, latent = result.arrays["ct"], result.arrays["latent"]
    half = (len(latent) + 1) // 2
    figure, axes = new_figure(1.75 * (half + 1) + 0.3, 4.6, 2, half + 1)
    for ax, plane in zip(axes[:, 0], ("coronal", "axial"), strict=True):
        image = show_slice(ax, ct, plane, marks=True)
        ax.set_ylabel(plane, fontsize=9)
    axes[0, 0].set_title("CT")
    colour_bar(figure, image, axes[:, 0].tolist(), "HU")
    for i, ax in enumerate(axes[:, 1:].ravel()):
        if i < len(latent):
            image = show_slice(ax, latent[i], "coronal", scale=LATENT)
            ax.set_title(f"channel {i}")
        else:
            ax.set_axis_off()
    colour_bar(figure, image, axes[:, 1:].ravel().tolist(), LATENT.label)
    shape = " × ".join(str(n) for n in latent.shape[1:])
    return finish(figure, result, f"The latent is a small picture with {len(latent)} channels of {shape}")


@styled
def schedules(result: Result) -> Figure:
    """The two schedules called linear, and what an error of the prediction does to ẑ_0.

    Arrays: ``gamma_chen``, ``gamma_ddpm`` (one value per step).
    """
    a = result.arrays
    steps = len(a["gamma_chen"])
    t = np.arange(steps)
    figure, axes = new_figure(10.2, 3.4, 1, 3)
    kinds = (
        ("gamma_chen", "chen_linear: γ = 1 − t", "blue", "-"),
        ("gamma_ddpm", "ddpm_linear: β linear", "red", "--"),
    )
    for key, label, colour, line in kinds:
        gamma = a[key]
        axes[0, 0].plot(t, gamma, color=COLOURS[colour], linestyle=line, label=label)
        axes[0, 1].plot(t, 0.5 * np.log(gamma / (1 - gamma)), color=COLOURS[colour], linestyle=line, label=label)
    axes[0, 0].set_ylabel("share of signal power γ")
    axes[0, 0].legend(loc="upper right")
    axes[0, 1].set_ylabel("λ = log(signal / noise)")
    axes[0, 1].axhline(0, color=COLOURS["grey"], linewidth=0.8)
    for ax in axes[0, :2]:
        ax.set_xlabel("step t")
    gamma = np.linspace(0.02, 0.999, 300)
    ax = axes[0, 2]
    ax.plot(gamma, np.sqrt((1 - gamma) / gamma), color=COLOURS["orange"], linestyle="--", label="ε-prediction")
    ax.plot(gamma, np.sqrt(1 - gamma), color=COLOURS["green"], label="v-prediction")
    ax.set_ylabel("error of ẑ₀ / error of prediction")
    ax.set_xlabel("share of signal power γ")
    ax.legend(loc="upper right")
    for ax in axes[0]:
        _grid(ax)
    return finish(figure, result, "Two schedules are called linear; they spend their steps at different noise")


@styled
def noising(result: Result) -> Figure:
    """A latent at several steps of both schedules, decoded.

    Arrays: ``shown_t`` (n,), ``chen``, ``ddpm`` (n z y x, HU), ``chen_gamma``, ``ddpm_gamma`` (n,).
    """
    a = result.arrays
    shown = a["shown_t"]
    figure, axes = new_figure(1.6 * len(shown) + 0.4, 4.15, 2, len(shown))
    for i, key in enumerate(("chen", "ddpm")):
        for j, t in enumerate(shown):
            image = show_slice(axes[i, j], a[key][j], "coronal", marks=j == 0)
            if i == 0:
                axes[i, j].set_title(f"t = {int(t)}")
            axes[i, j].set_xlabel(f"γ = {a[key + '_gamma'][j]:.3f}", fontsize=9)
        axes[i, 0].set_ylabel(f"{key}_linear", fontsize=9)
    colour_bar(figure, image, axes.ravel().tolist(), "HU", "right")
    return finish(figure, result, "The forward process: the same t means more noise in one schedule than in the other")


@styled
def variations(result: Result) -> Figure:
    """A phantom, variations of it, and the real scan where it was fetched.

    Arrays: ``volumes`` (chest z y x, HU); values ``names``, one each.
    """
    pairs = zip(result.values["names"], result.arrays["volumes"], strict=True)
    figure, _ = slice_grid([Column(name, volume.astype(np.float32)) for name, volume in pairs], panel=1.7)
    real = ", and the real chest that none of them is" if "LIDC-IDRI-0001" in result.values["names"] else ""
    return finish(figure, result, f"One phantom, its variations{real}")


@styled
def diffusion_training(result: Result) -> Figure:
    """Training loss of each set of views, and the loss at each noise level with and without the right x-rays.

    Arrays: ``step_VIEWS``, ``loss_VIEWS`` for each set of views, "any" among them where the any-view model serves;
    ``t``, ``loss_right``, ``loss_none``, ``loss_wrong``; ``own_step``, ``own_loss`` of a training begun on the
    reader's machine, if there was one.
    """
    a = result.arrays
    figure, axes = new_figure(9.6, 3.6, 1, 2)
    ax = axes[0, 0]
    colours, names = {**VIEW_COLOURS, "any": COLOURS["sky"]}, {**VIEW_NAMES, "any": "any views"}
    for views in (*VIEW_ORDER, "any"):
        if f"step_{views}" not in a:
            continue
        step, loss = a[f"step_{views}"], a[f"loss_{views}"]
        ax.plot(step, loss, color=colours[views], alpha=0.18, linewidth=1)
        ax.plot(step, _smooth(loss, max(len(loss) // 15, 1)), color=colours[views], label=names[views])
    if "own_step" in a:
        ax.plot(a["own_step"], a["own_loss"], "o", color=COLOURS["black"], markersize=3, label="8 views, begun here")
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter("")
    ax.set_xlabel("training step")
    ax.set_ylabel("loss of Eq. 15")
    ax.set_title("Training", loc="left")
    ax.legend()
    ax = axes[0, 1]
    lines = (
        ("loss_none", "no x-rays (null condition)", "grey", ":"),
        ("loss_wrong", "x-rays of another patient", "red", "--"),
        ("loss_right", "the right x-rays", "blue", "-"),
    )
    for key, label, colour, line in lines:
        ax.plot(a["t"], a[key], color=COLOURS[colour], linestyle=line, marker="o", markersize=3.5, label=label)
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter("")
    ax.set_xlabel("step t (noise grows to the right)")
    ax.set_ylabel("loss on validation patients")
    ax.set_title("What the 8 x-rays are worth, by noise level", loc="left")
    ax.legend()
    for ax in axes[0]:
        _grid(ax)
    return finish(figure, result, "More x-rays, lower loss; where noise hides the latent, only the x-rays help")


@styled
def end_to_end(result: Result) -> Figure:
    """PSNR of every held-out patient, by method and number of views.

    Arrays: ``psnr_mean_volume``, and for each set of views ``model_VIEWS``, ``sample_VIEWS``, ``classical_VIEWS``;
    ``wrong_8view`` (dB, one per patient); value ``classical_name`` (set of views -> name of the method).
    """
    a = result.arrays
    rows: list[tuple[str, np.ndarray, str]] = []
    breaks = []
    for views in VIEW_ORDER:
        rows += [
            (f"{VIEW_NAMES[views]}: mean of the samples", a[f"model_{views}"], COLOURS["blue"]),
            ("one sample", a[f"sample_{views}"], COLOURS["sky"]),
            (f"best classical ({result.values['classical_name'][views]})", a[f"classical_{views}"], COLOURS["orange"]),
        ]
        if views == "8view":
            rows.append(("another patient's x-rays", a["wrong_8view"], COLOURS["red"]))
        breaks.append(len(rows))
    figure, axes = new_figure(9.0, 0.36 * len(rows) + 1.5)
    ax = axes[0, 0]
    spread = np.random.default_rng(0)
    for y, (_, values, colour) in enumerate(rows):
        ax.scatter(values, y + spread.uniform(-0.18, 0.18, len(values)), s=11, color=colour, alpha=0.4, linewidths=0)
        mean = float(values.mean())
        ax.plot([mean, mean], [y - 0.36, y + 0.36], color=colour, linewidth=3)
        ax.annotate(f"{mean:.1f}", (1.01, y), xycoords=("axes fraction", "data"), va="center", color="black")
    for y in breaks[:-1]:
        ax.axhline(y - 0.5, color="#bbbbbb", linewidth=0.8)
    mean = float(a["psnr_mean_volume"].mean())
    ax.axvline(mean, color=COLOURS["grey"], linestyle="--", linewidth=1.2)
    ax.text(
        mean,
        -0.75,
        f"mean training volume: {mean:.1f} dB",
        fontsize=9,
        ha="center",
        color="#555555",
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5},
    )
    ax.annotate("mean", (1.01, -0.75), xycoords=("axes fraction", "data"), va="center", fontsize=9)
    ax.set_yticks(range(len(rows)), [label for label, _, _ in rows])
    ax.tick_params(axis="y", length=0)
    ax.set_ylim(len(rows) - 0.4, -1.1)
    ax.set_xlabel("PSNR, dB (peak = HU window); a dot is a held-out patient")
    ax.grid(True, axis="x", linewidth=0.6)
    return finish(figure, result, "With few x-rays, what the model learnt about chests is worth most")


@styled
def end_to_end_gallery(result: Result) -> Figure:
    """One held-out patient from 8, 2 and 1 x-rays: the model beside the best classical method.

    Arrays: ``truth``, and ``mean_VIEWS``, ``best_classical_VIEWS`` for each set of views (z y x, HU); values
    ``classical_name``, ``gallery_psnr`` ({"model" | "classical": {VIEWS: dB}}).
    """
    a, v = result.arrays, result.values
    columns = [Column("truth", a["truth"])]
    for views in VIEW_ORDER:
        short = VIEW_NAMES[views].split(" (")[0]
        columns += [
            Column(f"model\n{short}", a[f"mean_{views}"], note=f"{v['gallery_psnr']['model'][views]:.1f} dB"),
            Column(
                f"{v['classical_name'][views]}\n{short}",
                a[f"best_classical_{views}"],
                note=f"{v['gallery_psnr']['classical'][views]:.1f} dB",
            ),
        ]
    figure, _ = slice_grid(columns, panel=1.5)
    return finish(figure, result, "The same patient from 8, 2 and 1 x-rays")
