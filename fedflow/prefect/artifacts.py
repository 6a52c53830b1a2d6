"""What people look at in the Prefect UI: a table a round, the run's progress, its report."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from prefect import get_run_logger
from prefect.artifacts import (
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)

from fedflow.engine.summary import Glance, RoundSummary, RunSummary
from fedflow.recipe import Recipe

__all__ = [
    "Progress",
    "artifact_key",
    "publish_report",
    "publish_result",
    "publish_round",
    "publish_rounds",
    "shown_if_possible",
]

SHOWN = 200
"""Rounds that a report lists; of more the last ones. Blocks of a curve; of more values some are left out."""
MOST_TEXT = 100_000
"""Characters of a result that are shown."""
COLUMNS = ("site", "counts", "weight", "steps", "seconds", "bytes", "attempt", "excluded because")


def artifact_key(*parts: str) -> str:
    """A key as Prefect wants it: lower-case letters, digits and dashes."""
    return "-".join(re.sub(r"[^a-z0-9]+", "-", part.lower()).strip("-") for part in parts)


def publish_round(run: str, recipe: Recipe, summary: RoundSummary, asked: int) -> None:
    """One row a site: weight, steps, metrics, seconds, bytes; or why it does not count."""
    rows: list[dict[str, Any]] = []
    for site, c in summary.sites.items():
        metrics = {_column(name): _number(value) for name, value in c.metrics.items()}
        rows.append(
            {
                "site": site,
                "counts": "yes",
                "weight": _number(c.weight),
                "steps": c.steps,
                **metrics,
                "seconds": round(c.seconds, 2),
                "bytes": c.bytes,
                "attempt": c.attempt,
                "excluded because": "",
            }
        )
    columns = list(dict.fromkeys(name for row in rows for name in row)) or ["site", "counts", "excluded because"]
    for site, why in summary.excluded.items():
        rows.append({**dict.fromkeys(columns, ""), "site": site, "counts": "no", "excluded because": why})
    described = ", ".join(f"{name} **{_number(value)}**" for name, value in summary.shown.items())
    create_table_artifact(
        table=rows,
        key=artifact_key(run, "round"),
        description=f"Round {summary.round}, {summary.round + 1} of {recipe.rounds}: {len(summary.sites)} of {asked} sites count, {summary.seconds:.1f} s. {described}\n\nmodel `{summary.model_digest}`",
    )


def publish_result(run: str, round: int, page: str, outline: Mapping[str, object]) -> None:
    """What a round found that is no model: for people, then its values and the shapes of its arrays."""
    text = json.dumps(outline, indent=1)
    if len(text) > MOST_TEXT:
        text = f"{text[:MOST_TEXT]}\n…"
    create_markdown_artifact(
        markdown=f"# {run}, round {round}\n\n{page}\n\n```json\n{text}\n```\n\nAll of it: `fedflow result {run} --out FILE`",
        key=artifact_key(run, "result"),
        description=f"What {run} found in round {round}",
    )


def publish_rounds(run: str, rounds: Sequence[Glance]) -> None:
    """One row a round: metrics, sites, seconds, who was excluded."""
    own = ("round", "sites", "seconds", "excluded")
    names = dict.fromkeys(name for round in rounds for name in round.shown)
    rows = [
        {
            "round": r.round,
            **{f"metric {name}" if name in own else name: _number(r.shown.get(name)) for name in names},
            "sites": r.sites,
            "seconds": round(r.seconds, 2),
            "excluded": ", ".join(r.excluded),
        }
        for r in rounds
    ]
    create_table_artifact(
        table=rows, key=artifact_key(run, "rounds"), description=f"{run}: the {len(rounds)} rounds so far"
    )


def _column(metric: str) -> str:
    """A metric's name as a column, told apart from the table's own."""
    return f"metric {metric}" if metric in COLUMNS else metric


@contextlib.contextmanager
def shown_if_possible() -> Iterator[None]:
    """What is only looked at fails no round: an API that refuses it is a warning in the log."""
    try:
        yield
    except Exception as error:
        get_run_logger().warning("the UI cannot be told: %r", error)


class Progress:
    """A run's progress bar in the UI."""

    def __init__(self, run: str) -> None:
        self.run = run
        self._artifact: Any | None = None

    def show(self, recipe: Recipe, done: int) -> None:
        """`done` rounds of the recipe's are committed."""
        with shown_if_possible():
            self.update(recipe, done)

    def update(self, recipe: Recipe, done: int) -> None:
        """The same; raises where the API does not take it."""
        percent = 100.0 * done / recipe.rounds
        if self._artifact is not None:
            update_progress_artifact(artifact_id=self._artifact, progress=percent)
            return
        self._artifact = create_progress_artifact(
            progress=percent,
            key=artifact_key(self.run, "progress"),
            description=f"{self.run}: rounds committed, of {recipe.rounds}",
        )


def publish_report(summary: RunSummary) -> None:
    """The whole run as Markdown: the curve, the rounds, the models."""
    create_markdown_artifact(
        markdown=report(summary), key=artifact_key(summary.run, "report"), description=f"Report of {summary.run}"
    )


def report(summary: RunSummary) -> str:
    """The run's report: each metric's curve, the key metric first; a table of the rounds; exclusions, digests."""
    name = summary.recipe.key_metric.name
    values = [r.shown.get(name) for r in summary.rounds]
    lines = [
        f"# {summary.run}",
        "",
        f"{len(summary.rounds)} of {summary.recipe.rounds} rounds, {len(summary.sites)} sites, {summary.recipe.algorithm.kind}.",
    ]
    for metric in dict.fromkeys([name, *(n for r in summary.rounds for n in r.shown)]):
        curve = [r.shown.get(metric) for r in summary.rounds]
        if any(v is not None for v in curve):
            lines += ["", f"`{sparkline(curve)}` {metric}, round by round"]
    if summary.best is not None:
        lines += ["", f"Best {name}: **{_number(values[summary.best])}** in round {summary.best}."]
    lines += ["", f"| round | {name} | other metrics | sites | seconds | excluded |", "|---|---|---|---|---|---|"]
    for r, value in list(zip(summary.rounds, values, strict=True))[-SHOWN:]:
        others = _cell(", ".join(f"{n} {_number(v)}" for n, v in r.shown.items() if n != name))
        why = _cell("; ".join(f"{site}: {reason}" for site, reason in r.excluded.items()))
        lines.append(f"| {r.round} | {_number(value)} | {others} | {len(r.sites)} | {r.seconds:.1f} | {why} |")
    if len(summary.rounds) > SHOWN:
        lines += ["", f"The last {SHOWN} rounds; `fedflow metrics {summary.run}` has all of them."]
    return "\n".join([*lines, "", f"Model of the last round: `{summary.model_digest}`"])


def _cell(text: str) -> str:
    """Text as one cell of a Markdown table."""
    return text.replace("|", "\\|").replace("\n", " ")


def sparkline(values: list[float | None]) -> str:
    """One block character a value, between the smallest and the largest; a dot where there is none."""
    if len(values) > SHOWN:
        values = [values[at * (len(values) - 1) // (SHOWN - 1)] for at in range(SHOWN)]
    known = [v for v in values if v is not None]
    low, high = (min(known), max(known)) if known else (0.0, 0.0)
    scale = 7 / (high - low) if high > low else 0.0
    return "".join("·" if v is None else "▁▂▃▄▅▆▇█"[round((v - low) * scale)] for v in values)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def flat(metrics: Mapping[str, float | None]) -> str:
    """Metrics as one line of a log."""
    return ", ".join(f"{name} {_number(value)}" for name, value in metrics.items()) or "no metrics"
