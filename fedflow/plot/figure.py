"""What every picture shares: matplotlib where it is there, the kinds of file, saving."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedflow.errors import UserError, check_suffix, field_error

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["SUFFIXES", "check_picture", "panels_of", "save", "tidy"]

SUFFIXES = (".png", ".svg", ".pdf")


def check_picture(out: Path, field: str = "OUT") -> None:
    """Raises UserError for a name that says no kind of picture, or where matplotlib is not installed."""
    check_suffix(field, out, SUFFIXES)
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise UserError("plots: found no matplotlib, expected it; pip install 'fedflow[plot]'") from error


def panels_of(heights: Sequence[float], *, besides: float = 0.6) -> tuple[Figure, list[Axes]]:
    """A figure with one panel below the other, over one x-axis. heights, besides: of panels, and of titles and legend; inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, sum(heights) + besides), layout="constrained")
    ratios = {"height_ratios": heights}
    panels = figure.subplots(len(heights), 1, sharex=True, gridspec_kw=ratios, squeeze=False).flatten()
    return figure, list(panels)


def tidy(axes: Axes, label: str) -> None:
    """The look of a panel with curves."""
    axes.set_ylabel(label)
    axes.grid(alpha=0.25)
    axes.margins(y=0.1)
    axes.spines[["top", "right"]].set_visible(False)


def save(figure: Figure, out: Path) -> Path:
    """Write the figure; its folder is made. Raises UserError where it cannot be."""
    from matplotlib import rc_context

    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with rc_context({"svg.fonttype": "none"}):  # text stays text
            figure.savefig(out, dpi=130)
    except OSError as error:
        raise UserError(field_error("OUT", str(out), "a place that can be written", f"{error.strerror}")) from error
    return out
