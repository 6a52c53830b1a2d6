"""A matrix of models and sites as a heat map."""

from __future__ import annotations

import math
from pathlib import Path

from fedflow.algorithms.matrix import Matrix
from fedflow.plot.figure import check_picture, save

__all__ = ["plot_matrix"]

_ABSENT = "#eceff4"


def plot_matrix(matrix: Matrix, out: Path) -> Path:
    """Draw `matrix` into `out`, a .png, .svg or .pdf, whose folder is made; returns `out`. Absent cells are grey and crossed.

    Raises UserError for another suffix, a place that cannot be written, or where matplotlib is not installed.
    """
    check_picture(out, "--out")
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    height, width = 0.42 * len(matrix.rows), 0.75 * len(matrix.columns)
    figure = Figure(figsize=(max(4.0, 2.5 + width), max(2.5, 1.6 + height)), layout="constrained")
    axes = figure.subplots()
    values = [[math.nan if v is None else v for v in row] for row in matrix.cells]
    colours = colormaps["viridis"].with_extremes(bad=_ABSENT)
    image = axes.imshow(values, aspect="auto", cmap=colours)
    known = [v for row in matrix.cells for v in row if v is not None]
    bright = min(known) + 0.6 * (max(known) - min(known)) if known else 0.0
    for y, row in enumerate(matrix.cells):
        for x, value in enumerate(row):
            dark = value is not None and value < bright
            axes.text(
                x,
                y,
                "×" if value is None else f"{value:.3g}",
                ha="center",
                va="center",
                fontsize=8,
                color="white" if dark else "black",
            )
    axes.set_xticks(range(len(matrix.columns)), matrix.columns, rotation=45, ha="right")
    axes.set_yticks(range(len(matrix.rows)), matrix.rows)
    axes.set_xlabel("on the data of")
    axes.set_ylabel("model of")
    axes.set_title(matrix.metric)
    figure.colorbar(image, ax=axes)
    return save(figure, out)
