"""A run as a picture: metrics over the rounds, for the server and for each site, and who took part."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedflow.engine.summary import RoundSummary, RunSummary
from fedflow.errors import UserError
from fedflow.plot.figure import check_picture, panels_of, save, tidy
from fedflow.types import SiteId

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_run"]

_PANELS = 4  # metrics that are drawn; the key metric is the first
_PALETTE = ("C0", "C1", "C2", "C4", "C5", "C6", "C8", "C9")  # the first sites'; red and grey mean something else
_OTHER = "#c0c4cc"  # further sites'
_DOTTED = 40  # rounds up to which each has a dot
_ROWS = 24  # sites in the participation chart
_SERVER, _MEAN, _BEST, _OUT, _IN, _IDLE = "#111111", "#555555", "#d62728", "#d62728", "#8fbcbb", "#eceff4"


def plot_run(summary: RunSummary, out: Path) -> Path:
    """Draw `summary` into `out`, a .png, .svg or .pdf, whose folder is made; returns `out`.

    Raises UserError for another suffix, a run without a committed round, a place that cannot be written, or where
    matplotlib is not installed.
    """
    check_picture(out)
    if not summary.rounds:
        raise UserError(f"{summary.run}: found no committed round, expected at least one to draw; resume the run")
    names = _metric_names(summary)[:_PANELS]
    rows = min(len(summary.sites), _ROWS)
    heights = [3.4] + [2.2] * (len(names) - 1) + [0.5 + 0.22 * rows]
    figure, [*panels, chart] = panels_of(heights)
    for name, axes in zip(names, panels, strict=True):
        _draw_metric(axes, summary, name)
    _mark_best(panels, summary)
    _draw_participation(chart, summary)
    _finish(figure, panels, summary)
    return save(figure, out)


def _metric_names(summary: RunSummary) -> list[str]:
    """The key metric, then the server's other metrics, then the sites'; only those that have a value."""
    first = summary.recipe.key_metric.name
    server = {name for r in summary.rounds for name, v in (r.evaluation or {}).items() if v is not None}
    sites = {name for r in summary.rounds for name, v in r.metrics.items() if v is not None}
    known = server | sites
    return sorted(known, key=lambda name: (name != first, name not in server, name)) or [first]


def _draw_metric(axes: Axes, summary: RunSummary, name: str) -> None:
    """Thin lines for the sites, a dashed one for their weighted mean, a thick one for the server's evaluation."""
    rounds = summary.rounds
    dots = "." if len(rounds) <= _DOTTED else None
    colours = _colours(summary.sites)
    for site in summary.sites:
        values = [r.sites[site].metrics.get(name) if site in r.sites else None for r in rounds]
        named = site in colours
        _draw(
            axes,
            values,
            color=colours.get(site, _OTHER),
            lw=1,
            alpha=0.8 if named else 0.4,
            marker=dots,
            zorder=2 + named,
        )
    _draw(axes, [r.metrics.get(name) for r in rounds], color=_MEAN, lw=1.6, ls="--", marker=dots, zorder=4)
    server = [(r.evaluation or {}).get(name) for r in rounds]
    _draw(axes, server, color=_SERVER, lw=2.4, marker=dots and "o", ms=4, zorder=5)
    tidy(axes, name)


def _draw(axes: Axes, values: Sequence[float | None], **style: Any) -> None:
    """One line over the rounds, with a gap where there is no value; nothing where there is none at all."""
    if any(value is not None for value in values):
        axes.plot(range(len(values)), [_number(value) for value in values], **style)


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _colours(sites: Sequence[SiteId]) -> dict[SiteId, str]:
    """A colour for each of the first sites."""
    return dict(zip(sites, _PALETTE, strict=False))


def _mark_best(panels: Sequence[Axes], summary: RunSummary) -> None:
    """A star on the best round in the first panel, its value above, and a dotted line through all panels."""
    if summary.best is None:
        return
    best = summary.rounds[summary.best]
    value = _number(best.shown.get(summary.recipe.key_metric.name))
    for axes in panels:
        axes.axvline(best.round, color=_BEST, lw=1, ls=":", zorder=1)
    panels[0].plot([best.round], [value], marker="*", ms=15, color=_BEST, mec="white", zorder=6)
    panels[0].set_title(f"best {value:.4g} in round {best.round}", loc="right", color=_BEST, fontsize=10)


# -- who took part -----------------------------------------------------------------------------------------------------
def _draw_participation(axes: Axes, summary: RunSummary) -> None:
    """One row a site: a bar where it contributed, a cross where it was excluded, pale where it was not asked."""
    shown = _most_excluded(summary)
    for row, site in enumerate(shown):
        for colour, took_part in ((_IN, True), (_IDLE, False)):
            rounds = [r.round for r in summary.rounds if (site in r.sites) == took_part]
            axes.broken_barh([(r - 0.46, 0.92) for r in rounds], (row - 0.38, 0.76), color=colour)
        excluded = [r.round for r in summary.rounds if site in r.excluded]
        axes.plot(excluded, [row] * len(excluded), ls="", marker="x", color=_OUT, ms=6, mew=2)
    axes.set_yticks(range(len(shown)), shown, fontsize=8)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set_xlabel("round")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    hidden = len(summary.sites) - len(shown)
    axes.set_ylabel("sites" if not hidden else f"sites ({hidden} more)")


def _most_excluded(summary: RunSummary) -> list[SiteId]:
    """The sites that are drawn, in order: all, or where there are too many those that were excluded most often."""
    count = {site: sum(site in r.excluded for r in summary.rounds) for site in summary.sites}
    return sorted(sorted(summary.sites, key=lambda site: (-count[site], site))[:_ROWS])


# -- the whole ---------------------------------------------------------------------------------------------------------
def _finish(figure: Figure, panels: Sequence[Axes], summary: RunSummary) -> None:
    recipe = summary.recipe
    title = f"{summary.run}: {recipe.algorithm.kind}, {len(summary.sites)} sites, {len(summary.rounds)} of {recipe.rounds} rounds"
    panels[0].set_title(title, loc="left", fontweight="bold")
    _set_rounds(panels[0], summary.rounds)
    figure.legend(handles=_legend(summary), loc="outside right upper", frameon=False, fontsize=8)


def _set_rounds(axes: Axes, rounds: Sequence[RoundSummary]) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=15, min_n_ticks=1))
    axes.set_xlim(rounds[0].round - 0.6, rounds[-1].round + 0.6)


def _legend(summary: RunSummary) -> list[object]:
    """What each kind of line and mark means; only what occurs."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[object] = []
    if any(r.evaluation for r in summary.rounds):
        handles.append(Line2D([], [], color=_SERVER, lw=2.4, marker="o", ms=4, label="server's evaluation"))
    handles.append(Line2D([], [], color=_MEAN, lw=1.6, ls="--", marker=".", label="sites' weighted mean"))
    handles += [Line2D([], [], color=c, lw=1, marker=".", label=site) for site, c in _colours(summary.sites).items()]
    if len(summary.sites) > len(_PALETTE):
        handles.append(
            Line2D([], [], color=_OTHER, lw=1, marker=".", label=f"{len(summary.sites) - len(_PALETTE)} more sites")
        )
    if summary.best is not None:
        handles.append(Line2D([], [], color=_BEST, ls="", marker="*", ms=11, label="best round"))
    handles.append(Patch(color=_IN, label="contributed"))
    if any(site not in r.sites for r in summary.rounds for site in summary.sites):
        handles.append(Patch(color=_IDLE, label="no contribution"))
    if any(r.excluded for r in summary.rounds):
        handles.append(Line2D([], [], color=_OUT, ls="", marker="x", mew=2, label="excluded"))
    return handles
