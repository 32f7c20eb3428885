"""Tables and figures of what ``benchmarks/`` measured: read from its results files, drawn without measuring again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ..files import read_json
from .style import COLOURS, new_figure, styled

NOT_MEASURED = "<p><em>Not measured yet: <code>python benchmarks/projector.py</code> writes what belongs here.</em></p>"

#: Key of benchmarks/results/projector.json → what it is.
_MEASURES = {
    "parallel_speedup": "parallel beam, forward: times faster than the fastest peer",
    "parallel_adjoint_speedup": "parallel beam, forward and adjoint: times faster",
    "cone_speedup": "cone beam, forward: times faster than the fastest peer",
    "cone_adjoint_speedup": "cone beam, forward and adjoint: times faster",
    "tv_psnr_8view": "total variation, real scan at 128³, 8 views",
    "tv_psnr_4view": "the same, 4 views",
    "tv_psnr_2view": "the same, 2 views",
    "tv_psnr_1view": "the same, 1 view",
    "tv_seconds": "time of such a reconstruction",
}


#: Key of benchmarks/results/models.json → what it is.
_MODEL_MEASURES = {
    "unet_time_ratio": "denoiser, forward and backward at 16³: time against MONAI's DiffusionModelUNet of equal size",
    "unet_memory_ratio": "the same: peak memory",
    "vqgan_time_to_quality_ratio": "VQGAN at 64³: time to the PSNR of MONAI's VQVAE of equal size after 300 steps",
    "sample_seconds": "one posterior sample at 64³ from eight x-rays, 20 steps, two cores",
    "mc100_time_ratio": "100 samples together: time against one at a time",
    "mc100_peak_gb": "the same: peak memory of the process",
    "dpm_vs_ddpm_db": "20 steps of DPM-Solver++ against 1000 ancestral ones: PSNR",
    "dpm_vs_ddpm_time_ratio": "the same: time",
    "paper_vqgan_step_gb": "preset paper, one VQGAN step at 128³, with discriminators: memory",
    "paper_ldm_step_gb": "preset paper, one LDM step at 128³: memory",
    "h200_ldm_volumes_per_s": "preset paper, LDM training on an H200",
}
_VIEW_NAMES = {
    "8view": "8 views", "4view": "4 views", "2view": "2 views", "1view_frontal": "1, frontal",
    "1view_lateral": "1, lateral",
}  # fmt: skip


def read_benchmark(folder: str | Path, name: str) -> dict[str, Any] | None:
    """A results file of the benchmarks, or None where it was not measured."""
    path = Path(folder) / f"{name}.json"
    return read_json(path) if path.exists() else None


def speed_table(measured: Mapping[str, Any] | None) -> str:
    """The projector's figures as an HTML table; a sentence where there are none.

    Args:
        measured: content of ``projector.json``.
    """
    rows = []
    for key, words in _MEASURES.items():
        if entry := (measured or {}).get(key):
            peer = f" ({entry['fastest_peer']})" if "fastest_peer" in entry else ""
            unit = entry.get("unit", "").replace("x", "×")
            rows.append([words + peer, f"{entry['value']:.3g} {unit}".strip()])
    return html_table(["measured", "value"], rows) if rows else NOT_MEASURED


def peers_table(table: Mapping[str, Any] | None) -> str:
    """Every tool's time and error as an HTML table; a sentence where there are none.

    Args:
        table: content of ``projector_table.json``: ``modes`` → beam → ``rows`` → tool → ``forward_ms``, ``both_ms``,
            ``blob_error``, ``ellipsoid_error`` (relative).
    """
    rows = [
        [
            mode, "<b>this book</b>" if tool == "ours" else tool, f"{row['forward_ms']:.1f}", f"{row['both_ms']:.1f}",
            f"{100 * row['blob_error']:.2f}", f"{100 * row['ellipsoid_error']:.2f}",
            f"{row['peak_mb']:.0f}" if row.get("peak_mb") is not None else "–",
        ]
        for mode, part in (table or {}).get("modes", {}).items()
        for tool, row in part["rows"].items()
    ]  # fmt: skip
    header = ["beam", "tool", "forward, ms", "and adjoint, ms", "error, smooth, %", "error, sharp, %", "memory, MB"]
    return html_table(header, rows, text_columns=2) if rows else NOT_MEASURED


def model_table(measured: Mapping[str, Any] | None) -> str:
    """What the networks and the sampler cost, as an HTML table; a line that was not measured says so.

    Args:
        measured: content of ``models.json``.
    """
    rows = []
    for key, words in _MODEL_MEASURES.items():
        entry = (measured or {}).get(key)
        value = f"{entry['value']:.3g} {entry['unit'].replace('x', '×')}" if entry else "not measured"
        rows.append([words, value])
    return html_table(["measured", "value"], rows)


def quality_table(measured: Mapping[str, Any] | None) -> str:
    """PSNR (peak = window) and SSIM of the shipped models on held-out phantoms and on the real scan, as HTML.

    Args:
        measured: content of ``quality_small.json``.
    """
    found = measured or {}

    def cell(prefix: str, view_set: str) -> str:
        decibels, likeness = (found.get(f"{metric}_{prefix}{view_set}") for metric in ("psnr", "ssim"))
        if decibels is None:
            return "–"
        return f"{decibels['value']:.1f}" + (f" / {likeness['value']:.3f}" if likeness else "")

    kinds = (
        ("own model, held-out phantoms", ""), ("its initial network alone", "initial_"),
        ("any-view model, held-out phantoms", "any_view_"), ("its initial network alone", "initial_any_view_"),
        ("total variation, held-out phantoms", "classical_"), ("own model, LIDC-IDRI-0001", "real_"),
        ("any-view model, LIDC-IDRI-0001", "real_any_view_"), ("total variation, LIDC-IDRI-0001", "real_classical_"),
    )  # fmt: skip
    rows = [[words, *(cell(prefix, view_set) for view_set in _VIEW_NAMES)] for words, prefix in kinds]
    return html_table(["PSNR in dB / SSIM", *_VIEW_NAMES.values()], rows) if found else NOT_MEASURED


def _curve(ax: Any, table: Mapping[str, Mapping[str, float]], key: str, label: str, colour: str) -> None:
    x = [int(number) for number in table]
    y = [row[key] for row in table.values()]
    ax.plot(x, y, "o-", color=COLOURS[colour], label=label)
    ax.set_xticks(x)


@styled
def projector_cost(table: Mapping[str, Any]) -> Figure:
    """Milliseconds of our projector against size and number of views; argument as for :func:`peers_table`."""
    figure, axes = new_figure(9.2, 3.2, 1, 2)
    for ax, (kind, label) in zip(
        axes[0], (("size", "voxels per edge, 8 views"), ("views", "views, 128³")), strict=True
    ):
        for mode, colour in (("parallel", "blue"), ("cone", "red")):
            _curve(ax, table["cost"][mode][kind], "forward_ms", f"{mode}, forward", colour)
            rows = table["cost"][mode][kind]
            ax.plot([int(n) for n in rows], [row["adjoint_ms"] for row in rows.values()], "s:", color=COLOURS[colour],
                    label=f"{mode}, adjoint")  # fmt: skip
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.xaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_major_formatter("{x:g}")
        ax.set_xlabel(label)
        ax.set_ylabel("ms, one core")
        ax.grid(True, linewidth=0.6)
    axes[0, 0].legend(fontsize=8.5)
    return _signed(figure, table.get("provenance", {}), "Cost grows with the voxels, and less than with the views")


@styled
def model_costs(table: Mapping[str, Any]) -> Figure:
    """Seconds and memory of training steps and of a sample against size; argument: content of ``models_table.json``."""
    rows = table["curves"]["size"]
    figure, axes = new_figure(9.2, 3.3, 1, 2)
    names = {"sample": ("one sample, 20 steps", "blue"), "vqgan_step": ("VQGAN training step", "orange"),
             "ldm_step": ("LDM training step", "green")}  # fmt: skip
    for ax, (key, label) in zip(axes[0], (("seconds", "s, one core"), ("peak_gb", "peak memory, GB")), strict=True):
        for name, (words, colour) in names.items():
            _curve(ax, {size: row[name] for size, row in rows.items()}, key, words, colour)
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.xaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_major_formatter("{x:g}")
        ax.set_xlabel("voxels per edge")
        ax.set_ylabel(label)
        ax.grid(True, linewidth=0.6)
    axes[0, 0].legend(fontsize=8.5)
    return _signed(figure, table["curves"].get("provenance", {}), "Networks of preset small: eight times the voxels, "
                   "about eight times the cost")  # fmt: skip


def _signed(figure: Figure, origin: Mapping[str, Any], title: str) -> Figure:
    """Add the message at the top and where the figures are from at the bottom."""
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    said = " · ".join(str(origin[key]) for key in ("command", "commit", "device", "time") if key in origin)
    figure.supxlabel(said, x=0.01, ha="left", fontsize=7, color=COLOURS["grey"])
    return figure


@styled
def projector_peers(table: Mapping[str, Any]) -> Figure:
    """Time of every tool for the same eight x-rays, with its error; argument as for :func:`peers_table`."""
    modes = table["modes"]
    count = max(len(part["rows"]) for part in modes.values())
    figure, axes = new_figure(9.2, 1.5 + 0.42 * count, 1, len(modes))
    for ax, (mode, part) in zip(axes[0], modes.items(), strict=True):
        rows = sorted(part["rows"].items(), key=lambda item: -item[1]["forward_ms"])
        for k, (tool, row) in enumerate(rows):
            colour = COLOURS["blue" if tool == "ours" else "grey"]
            ax.barh(k, row["forward_ms"], color=colour, height=0.62)
            words = f" {row['forward_ms']:,.0f} ms, error {100 * row['blob_error']:.2f} %"
            ax.text(row["forward_ms"], k, words, va="center", fontsize=9)
        ax.set_yticks(range(len(rows)), ["this book" if tool == "ours" else tool for tool, _ in rows])
        ax.set_xscale("log")
        ax.set_xlim(1, 60 * rows[0][1]["forward_ms"])
        ax.set_xticks([1, 10, 100, 1000], ["1", "10", "100", "1000"])
        ax.set_xlabel("ms for 8 views of 128³, one core")
        ax.set_title(f"{mode} beam")
    return _signed(figure, table.get("provenance", {}), "Same error, less time: one small matrix serves every slice")


def html_table(header: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int = 1) -> str:
    """A table in HTML: the first columns hold text, the others numbers, which stand to the right.

    Pages render Markdown in outputs without tables, so this is HTML, of the class that the theme styles.
    """

    def line(cells: Sequence[str], tag: str) -> str:
        sides = ["left" if k < text_columns else "right" for k in range(len(cells))]
        pairs = zip(cells, sides, strict=True)
        return (
            "<tr>"
            + "".join(f'<{tag} style="text-align:{side};padding:.25rem .6rem">{cell}</{tag}>' for cell, side in pairs)
            + "</tr>"
        )

    head, body = line(header, "th"), "".join(line(row, "td") for row in rows)
    table = f'<table class="dataframe"><thead>{head}</thead><tbody>{body}</tbody></table>'
    return f'<div style="overflow-x:auto;margin-bottom:1rem">{table}</div>'
