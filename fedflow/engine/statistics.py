"""Federated statistics as files: JSON, a long table (CSV, Parquet), and a page with histograms."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from fedflow.engine.export import write_file
from fedflow.engine.metrics import write_table
from fedflow.engine.results import write_result
from fedflow.errors import UserError, check_suffix
from fedflow.types import Result

__all__ = ["SUFFIXES", "as_html", "statistics_rows", "write_statistics"]

SUFFIXES = (".json", ".csv", ".parquet", ".html")
COLUMNS = ("dataset", "feature", "site", "statistic", "value")
FIGURES = ("count", "failures", "sum", "mean", "min", "max", "variance", "stddev")
SHOWN = ("count", "failures", "mean", "stddev", "min", "max")


def write_statistics(result: Result, out: Path, title: str) -> Path:
    """Write what a run of `statistics` found to a .json, .csv, .parquet or .html; whole or not at all; returns `out`.

    Raises UserError for another suffix, a result of something else, a place that cannot be written, or where pyarrow is needed.
    """
    if "datasets" not in result.values:
        raise UserError(f"{title}: found a result without statistics, expected a run of them; see `fedflow result`")
    check_suffix("--out", out, SUFFIXES)
    if out.suffix == ".json":
        return write_result(result, out)
    if out.suffix == ".html":
        page = as_html(result, title)
        write_file(out, lambda path: path.write_text(page, encoding="utf-8"), "--out")
        return out
    return write_table(COLUMNS, statistics_rows(result), out, _schema() if out.suffix == ".parquet" else None)


def _schema() -> Any:
    import pyarrow

    text = [(name, pyarrow.string()) for name in COLUMNS[:-1]]
    return pyarrow.schema([*text, ("value", pyarrow.float64())])


def _each(result: Result) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    for dataset, features in result.values["datasets"].items():
        for feature, found in features.items():
            yield dataset, feature, found


def statistics_rows(result: Result) -> Iterator[tuple[str, str, str, str, float | None]]:
    """One row a dataset, feature, site ("" for all together) and statistic; of a histogram one a bin, by its lower edge."""
    for dataset, feature, found in _each(result):
        for site, figures in {"": found["all"], **found["sites"]}.items():
            for name, value in _flat(figures):
                yield dataset, feature, site, name, None if value is None else float(value)


def _flat(figures: Mapping[str, Any]) -> Iterator[tuple[str, float | None]]:
    yield from ((name, figures[name]) for name in FIGURES)
    yield from ((f"quantile {q}", value) for q, value in figures.get("quantiles", {}).get("values", {}).items())
    if histogram := figures.get("histogram"):
        yield from ((f"bin from {e!r}", n) for e, n in zip(histogram["edges"][:-1], histogram["counts"], strict=True))


# -- the page ----------------------------------------------------------------------------------------------------------
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h2 { margin-top: 2.5rem; border-bottom: 1px solid #ddd; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .7rem; text-align: right; border-bottom: 1px solid #eee; }
th:first-child, td:first-child { text-align: left; }
svg { display: block; margin: .5rem 0 1rem; max-width: 100%; } rect { fill: #8fbcbb; } polyline { fill: none; stroke-width: 1.5; }
text { font-size: 11px; fill: #555; } .note { color: #666; }
"""
_LINES = ("#d62728", "#1f77b4", "#ff7f0e", "#9467bd", "#8c564b", "#e377c2", "#17becf", "#bcbd22")
_WIDTH, _HEIGHT = 640, 180


def as_html(result: Result, title: str) -> str:
    """A page that needs nothing else: per feature the histogram of all values, a line for each site, and the figures."""
    found = result.values
    parts = [
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style>',
        f"<h1>{escape(title)}</h1><p>{len(found['sites'])} sites: {escape(', '.join(found['sites']))}</p>",
    ]
    for dataset, feature, figures in _each(result):
        parts.append(f"<h2>{escape(dataset)} / {escape(feature)}</h2>")
        if histogram := figures["all"].get("histogram"):
            parts.append(_svg(histogram, {site: f.get("histogram") for site, f in figures["sites"].items()}))
        parts.append(_table(figures))
        if sites := found["differs"].get(dataset, {}).get(feature):
            parts.append(f'<p class="note">Only from {escape(", ".join(sites))}.</p>')
    for site, datasets in found["not_numeric"].items():
        for dataset, names in datasets.items():
            told = escape(f"{site}, {dataset}: not numeric: {', '.join(names)}")
            parts.append(f'<p class="note">{told}</p>')
    return "\n".join(parts) + "\n"


def _table(figures: Mapping[str, Any]) -> str:
    wanted = figures["all"].get("quantiles", {}).get("values", {})
    head = "".join(f"<th>{name}</th>" for name in ("", *SHOWN, *(f"q {q}" for q in wanted)))
    rows = []
    for site, one in {"all": figures["all"], **figures["sites"]}.items():
        quantiles = one.get("quantiles", {}).get("values", {})
        cells = [*(one[name] for name in SHOWN), *(quantiles.get(q) for q in wanted)]
        rows.append(f"<tr><td>{escape(site)}</td>{''.join(f'<td>{_number(v)}</td>' for v in cells)}</tr>")
    return f"<table><tr>{head}</tr>{''.join(rows)}</table>"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.6g}"


def _svg(histogram: Mapping[str, Any], sites: Mapping[str, Mapping[str, Any] | None]) -> str:
    """Bars of all values; a line a site, of its share in each bin, as far as colours go."""
    counts, edges = histogram["counts"], histogram["edges"]
    width = _WIDTH / len(counts)
    bars = _heights(counts)
    drawn = [
        f'<rect x="{i * width:.2f}" y="{_HEIGHT - h:.2f}" width="{max(width - 1, 0.5):.2f}" height="{h:.2f}">'
        f"<title>{_number(edges[i])} … {_number(edges[i + 1])}: {counts[i]}</title></rect>"
        for i, h in enumerate(bars)
    ]
    legend: list[str] = []
    lines = [(site, found) for site, found in sites.items() if found and sum(found["counts"])]
    for (site, found), colour in zip(lines, _LINES, strict=False):
        points = " ".join(f"{(i + 0.5) * width:.2f},{_HEIGHT - h:.2f}" for i, h in enumerate(_heights(found["counts"])))
        drawn.append(f'<polyline points="{points}" stroke="{colour}"><title>{escape(site)}</title></polyline>')
        legend.append(
            f'<text x="{4 + 90 * len(legend)}" y="{_HEIGHT + 30}" style="fill:{colour}">{escape(site[:14])}</text>'
        )
    ends = f'<text x="0" y="{_HEIGHT + 14}">{_number(edges[0])}</text>'
    ends += f'<text x="{_WIDTH}" y="{_HEIGHT + 14}" text-anchor="end">{_number(edges[-1])}</text>'
    size = f'width="{_WIDTH}" height="{_HEIGHT + 36}" viewBox="0 0 {_WIDTH} {_HEIGHT + 36}"'
    return f"<svg {size}>{''.join(drawn)}{ends}{''.join(legend)}</svg>"


def _heights(counts: Sequence[int]) -> list[float]:
    """Of bars whose highest fills the picture."""
    most = max(max(counts), 1)
    return [(_HEIGHT - 6) * n / most for n in counts]
