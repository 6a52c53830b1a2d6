"""What an evaluation found, as a matrix of models and sites."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedflow.types import Result, SiteId

__all__ = ["LAST", "Matrix", "metrics_of"]

LAST = "server:last"
"""The recipe's model. No site can be called so."""


def metrics_of(result: Result) -> list[str]:
    """The metrics that there are."""
    return sorted({name for model in result.values.get("models", {}).values() for name in model["metrics"]})


@dataclass(frozen=True)
class Matrix:
    """One metric of every model on every site.

    rows:    models, the server's first; columns: every site of the federation
    cells:   row by row; None: that model or that site was not there, or has no such metric
    means:   of each row, over the held-out examples of all sites; digests: of each row's model
    absent:  site -> why it did not take part
    """

    metric: str
    rows: list[str]
    columns: list[SiteId]
    cells: list[list[float | None]]
    means: list[float | None]
    digests: list[str | None]
    examples: list[int | None]
    absent: Mapping[SiteId, str]

    @classmethod
    def of(cls, result: Result, metric: str, sites: Sequence[SiteId], excluded: Mapping[SiteId, str]) -> Matrix:
        """That of `result`. sites: all of the federation; excluded: site -> why it did not take part"""
        models: Mapping[str, Any] = result.values["models"]
        servers = sorted((name for name in models if name not in sites), key=lambda name: (name != LAST, name))
        rows = [*servers, *(sites if len(models) > len(servers) else ())]

        def cell(row: str, site: SiteId) -> float | None:
            value: float | None = models.get(row, {}).get("sites", {}).get(site, {}).get(metric)
            return value

        return cls(
            metric=metric,
            rows=rows,
            columns=list(sites),
            cells=[[cell(row, site) for site in sites] for row in rows],
            means=[models.get(row, {}).get("metrics", {}).get(metric) for row in rows],
            digests=[models.get(row, {}).get("digest") for row in rows],
            examples=[result.values["examples"].get(site) for site in sites],
            absent=dict(sorted(excluded.items())),
        )

    def as_markdown(self) -> str:
        """A table for people: the better a cell among all, the fuller its block; a dash where there is nothing."""
        known = [v for row in self.cells for v in row if v is not None]
        low, high = (min(known), max(known)) if known else (0.0, 0.0)
        scale = 7 / (high - low) if high > low else 0.0

        def shown(value: float | None) -> str:
            return "–" if value is None else f"{'▁▂▃▄▅▆▇█'[round((value - low) * scale)]} {value:.4g}"

        lines = [
            f"| {self.metric} of | {' | '.join(self.columns)} | all examples |",
            "|---" * (len(self.columns) + 2) + "|",
        ]
        for name, row, mean in zip(self.rows, self.cells, self.means, strict=True):
            lines.append(f"| {name} | {' | '.join(map(shown, row))} | {'–' if mean is None else f'**{mean:.6g}**'} |")
        lines += [f"| examples | {' | '.join('–' if n is None else str(n) for n in self.examples)} | |"]
        for site, why in self.absent.items():
            lines += ["", f"{site} is not there: {' '.join(why.split())}"]
        return "\n".join(lines)
