"""Several runs in one picture: those that differ in nothing but the seed are one line with a band."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from fedflow.engine.summary import RoundSummary, RunSummary
from fedflow.errors import UserError, field_error
from fedflow.plot.figure import check_picture, panels_of, save, tidy
from fedflow.types import canonical_json

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D
    from numpy.typing import NDArray

__all__ = ["AXES", "Axis", "Group", "groups_of", "plot_runs", "short_names"]

Axis = Literal["round", "seconds", "bytes"]
AXES: tuple[Axis, ...] = get_args(Axis)

_LABELS = {"round": "round", "seconds": "seconds of training", "bytes": "received and sent by all sites"}
_PANELS = 3  # metrics that are drawn; the key metric is the first
_THIN = 12  # runs of a group up to which each is drawn too
_POINTS = 300  # of a line whose x is no round
_WIDE = 60  # characters of a label up to which two are beside each other
_SINGLE = 10  # groups up to which each has a colour of its own; more are shades of one scale

Curve = tuple["NDArray[np.float64]", "NDArray[np.float64]"]
"""x and y of one run's metric, where it has one."""


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but name and seed. label: what sets it apart from the other groups."""

    label: str
    runs: tuple[RunSummary, ...]


def groups_of(runs: Sequence[RunSummary]) -> list[Group]:
    """`runs` by recipe and number of sites, in the order in which they are given."""
    found: dict[bytes, list[RunSummary]] = {}
    for run in runs:
        found.setdefault(canonical_json(_settings(run)), []).append(run)
    settings = [dict(_flat(_settings(group[0]))) for group in found.values()]
    labels = _labels(settings)
    return [Group(label, tuple(group)) for label, group in zip(labels, found.values(), strict=True)]


def _settings(run: RunSummary) -> dict[str, Any]:
    recipe = run.recipe.model_dump(mode="json", exclude={"name", "seed"})
    return {**recipe, "sites": len(run.sites)}


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted path -> value, lists being one value."""
    if isinstance(value, Mapping) and value:
        for name, inner in value.items():
            yield from _flat(inner, f"{path}.{name}" if path else name)
    else:
        yield path, value


def _labels(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Of each what differs: "fedprox, mu 0.1"; a field that others do not have only where it differs among those that have it."""
    known = dict.fromkeys(path for one in settings for path in one)
    differing = [p for p in known if len({json.dumps(one[p], sort_keys=True) for one in settings if p in one}) > 1]
    kinds = [path for path in differing if path.rpartition(".")[2] in ("kind", "path")]
    order = [*kinds, *(path for path in differing if path not in kinds)]
    names = short_names(order)
    return [", ".join(_said(path, names[path], one[path]) for path in order if path in one) for one in settings]


def short_names(paths: Sequence[str]) -> dict[str, str]:
    """Of each dotted path its last word, or all of it where two end in the same."""
    last = [path.rpartition(".")[2] for path in paths]
    return {path: word if last.count(word) == 1 else path for path, word in zip(paths, last, strict=True)}


def _said(path: str, name: str, value: Any) -> str:
    text = value if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else json.dumps(value)
    if path == "sites":
        return f"{text} sites"
    return text if path.rpartition(".")[2] in ("kind", "path") else f"{name} {text}"


# -- the picture -------------------------------------------------------------------------------------------------------
def plot_runs(runs: Sequence[RunSummary], out: Path, *, x: Axis = "round") -> Path:
    """Draw the metrics of `runs` over `x` into `out`, a .png, .svg or .pdf, whose folder is made; returns `out`.

    Of each group (see `groups_of`): the median of its runs, a band from the smallest to the largest, and, where they are few,
    a thin line for each run. Median and band end where the first of the runs ends.
    x: "round"; "seconds": of training, without pauses between starts; "bytes": received and sent by all sites so far
    Raises UserError for another suffix, runs without a committed round, a place that cannot be written, or where matplotlib is
    not installed.
    """
    check_picture(out, "--out")
    if x not in AXES:
        raise UserError(field_error("--x", x, f"one of {', '.join(AXES)}", "choose one of them"))
    if empty := [run.run for run in runs if not run.rounds]:
        raise UserError(field_error("RUN", ", ".join(empty), "runs with a committed round", "resume them"))
    groups = groups_of(runs)
    names = _metric_names(runs)
    labels = [_legend(group, names[0]) for group in groups]
    columns = 1 if max(map(len, labels)) > _WIDE else 2
    rows = -(-len(labels) // columns)
    figure, panels = panels_of([3.6] + [2.2] * (len(names) - 1), besides=1.0 + 0.19 * rows)
    colours = _colours(len(groups))
    for name, axes in zip(names, panels, strict=True):
        for group, colour in zip(groups, colours, strict=True):
            _draw(axes, [_curve(run, name, x) for run in group.runs], x, colour)
        tidy(axes, name if _is_evaluated(runs, name) else f"{name} (sites' mean)")
    title = f"{names[0]}, {_counted(len(runs), 'run')}"
    _finish(panels, title, x, spread=any(len(group.runs) > 1 for group in groups))
    handles = [_line(colour, label) for colour, label in zip(colours, labels, strict=True)]
    figure.legend(
        handles=handles,
        title=f"{names[0]} at the end",
        loc="outside lower left",
        ncols=columns,
        frameon=False,
        fontsize=8.5,
        title_fontsize=8.5,
        alignment="left",
    )
    return save(figure, out)


def _metric_names(runs: Sequence[RunSummary]) -> list[str]:
    """The first run's key metric, then what else the server evaluates, then the sites; only what has a value."""
    first = runs[0].recipe.key_metric.name
    known = {name for run in runs for round in run.rounds for name, v in _values(round).items() if v is not None}
    ordered = sorted(known, key=lambda name: (name != first, not _is_evaluated(runs, name), name))
    return ordered[:_PANELS] or [first]


def _is_evaluated(runs: Sequence[RunSummary], name: str) -> bool:
    return any(name in (round.evaluation or {}) for run in runs for round in run.rounds)


def _values(round: RoundSummary) -> Mapping[str, float | None]:
    return {**round.metrics, **(round.evaluation or {})}


# -- curves ------------------------------------------------------------------------------------------------------------
def _curve(run: RunSummary, name: str, x: Axis) -> Curve:
    points = zip(_POSITIONS[x](run.rounds), (_values(round).get(name) for round in run.rounds), strict=True)
    known = [(at, value) for at, value in points if value is not None]
    return np.array([at for at, _ in known], dtype=float), np.array([value for _, value in known], dtype=float)


def _rounds(rounds: Sequence[RoundSummary]) -> Iterator[float]:
    return (float(round.round) for round in rounds)


def _seconds(rounds: Sequence[RoundSummary]) -> Iterator[float]:
    """Up to each commit: neither pauses between rounds nor what a round has in common with the one before count."""
    before = [None, *(round.committed for round in rounds)]
    spans = (
        (round.committed - max(filter(None, (last, round.opened)), default=round.committed)).total_seconds()
        for round, last in zip(rounds, before, strict=False)
    )
    return accumulate(spans)


def _bytes(rounds: Sequence[RoundSummary]) -> Iterator[float]:
    return accumulate(float(sum(c.bytes + c.received for c in round.sites.values())) for round in rounds)


_POSITIONS: Mapping[Axis, Callable[[Sequence[RoundSummary]], Iterator[float]]] = {
    "round": _rounds,
    "seconds": _seconds,
    "bytes": _bytes,
}


def _spread(curves: Sequence[Curve], x: Axis) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    """Where every run has a value: x, and (3, x) smallest, median, largest. None where they have nothing in common."""
    first, last = max(xs[0] for xs, _ in curves), min(xs[-1] for xs, _ in curves)
    if first > last:
        return None
    at = np.arange(first, last + 1) if x == "round" else np.linspace(first, last, _POINTS)
    values = np.stack([np.interp(at, xs, ys) for xs, ys in curves])
    return at, np.stack([values.min(axis=0), np.median(values, axis=0), values.max(axis=0)])


def _draw(axes: Axes, curves: Sequence[Curve], x: Axis, colour: Any) -> None:
    curves = [curve for curve in curves if len(curve[0])]
    if len(curves) > 1 and len(curves) <= _THIN:
        for xs, ys in curves:
            axes.plot(xs, ys, color=colour, lw=0.7, alpha=0.45, zorder=2)
    if curves and (spread := _spread(curves, x)):
        at, (low, middle, high) = spread
        if len(curves) > 1:
            axes.fill_between(at, low, high, color=colour, alpha=0.16, lw=0, zorder=1)
        axes.plot(at, middle, color=colour, lw=2, marker="o" if len(at) == 1 else None, ms=4, zorder=3)


def _colours(count: int) -> list[Any]:
    from matplotlib import colormaps

    if count <= _SINGLE:
        return [f"C{number}" for number in range(count)]
    return [colormaps["viridis"](number / (count - 1)) for number in range(count)]


# -- the whole ---------------------------------------------------------------------------------------------------------
def _finish(panels: Sequence[Axes], title: str, x: Axis, *, spread: bool) -> None:
    from matplotlib.ticker import EngFormatter, MaxNLocator

    panels[0].set_title(title, loc="left", fontweight="bold")
    if spread:
        panels[0].set_title("median, and smallest to largest", loc="right", fontsize=9, color="#555555")
    panels[-1].set_xlabel(_LABELS[x])
    if x == "bytes":
        panels[-1].xaxis.set_major_formatter(EngFormatter(unit="B"))
    else:
        panels[-1].xaxis.set_major_locator(MaxNLocator(integer=x == "round", nbins=15, min_n_ticks=1))


def _line(colour: Any, label: str) -> Line2D:
    from matplotlib.lines import Line2D

    return Line2D([], [], color=colour, lw=2, label=label)


def _legend(group: Group, key: str) -> str:
    """ "mu 0.01: 0.912 (0.905–0.921), 3 seeds": the last values."""
    last = [
        next((v for r in reversed(run.rounds) if (v := _values(r).get(key)) is not None), None) for run in group.runs
    ]
    known = [value for value in last if value is not None]
    seeds = len({run.recipe.seed for run in group.runs})
    parts = []
    if known:
        spread = f" ({min(known):.4g}–{max(known):.4g})" if len(known) > 1 else ""
        parts.append(f"{float(np.median(known)):.4g}{spread}")
    if len(group.runs) > 1:
        parts.append(_counted(seeds, "seed") if seeds == len(group.runs) else _counted(len(group.runs), "run"))
    if unfinished := sum(not run.finished for run in group.runs):
        parts.append(f"{unfinished} unfinished")
    name = group.label or group.runs[0].run if len(group.runs) == 1 else group.label or group.runs[0].recipe.name
    return f"{name}: {', '.join(parts)}" if parts else name


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" + ("" if count == 1 else "s")
