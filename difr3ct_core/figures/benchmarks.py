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
        ]
        for mode, part in (table or {}).get("modes", {}).items()
        for tool, row in part["rows"].items()
    ]  # fmt: skip
    header = ["beam", "tool", "forward, ms", "and adjoint, ms", "error, smooth, %", "error, sharp, %"]
    return html_table(header, rows, text_columns=2) if rows else NOT_MEASURED


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
    figure.suptitle("Same error, less time: one small matrix serves every slice", x=0.01, ha="left", fontsize=12,
                    fontweight="bold")  # fmt: skip
    origin = table.get("provenance", {})
    said = " · ".join(str(origin[key]) for key in ("command", "commit", "device", "time") if key in origin)
    figure.supxlabel(said, x=0.01, ha="left", fontsize=7, color=COLOURS["grey"])
    return figure


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
