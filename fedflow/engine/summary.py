"""What people want to know of a run, read from its journal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from fedflow.engine.rounds import best_round, is_finished, key_metrics, next_step
from fedflow.recipe import Recipe
from fedflow.store.journal import Journal
from fedflow.store.records import ContributorSummary, Outcome
from fedflow.types import SiteId

__all__ = ["Current", "RoundSummary", "RunSummary", "Status", "current", "summarize"]

Status = Literal["running", "finished", "failed", "aborted", "interrupted"]
"""interrupted: neither finished nor known to be running; it can be resumed, as failed and aborted runs can."""


@dataclass(frozen=True)
class RoundSummary:
    """One committed round. metrics: the sites' weighted means; evaluation: the server's, None without one."""

    round: int
    model_digest: str
    opened: datetime | None
    committed: datetime
    metrics: Mapping[str, float | None]
    evaluation: Mapping[str, float | None] | None
    sites: Mapping[SiteId, ContributorSummary]
    excluded: Mapping[SiteId, str]
    partial: Mapping[str, list[SiteId]]

    @property
    def seconds(self) -> float:
        """From the first opening to the commit."""
        return (self.committed - self.opened).total_seconds() if self.opened else 0.0

    @property
    def shown(self) -> Mapping[str, float | None]:
        """The metrics that the key metric is looked up in."""
        return self.evaluation if self.evaluation is not None else self.metrics


@dataclass(frozen=True)
class RunSummary:
    """A run as far as its store knows it. best: the round with the best key metric; last: how its last start ended."""

    run: str
    nonce: str
    recipe: Recipe
    sites: list[SiteId]
    created: datetime
    rounds: list[RoundSummary]
    finished: bool
    best: int | None
    last: Outcome | None

    @property
    def status(self) -> Status:
        """From the store alone, so never "running"."""
        if self.finished:
            return "finished"
        return self.last.status if self.last and self.last.status != "finished" else "interrupted"

    @property
    def model_digest(self) -> str | None:
        """Digest of the newest committed model; None before the first round."""
        return self.rounds[-1].model_digest if self.rounds else None

    @property
    def metrics(self) -> Mapping[str, float | None]:
        """Of the newest round."""
        return self.rounds[-1].shown if self.rounds else {}

    def as_json(self) -> dict[str, object]:
        """The object that `--json` prints."""
        return {
            "run_id": self.run,
            "status": self.status,
            "rounds": len(self.rounds),
            "model_digest": self.model_digest,
            "metrics": dict(self.metrics),
            "best_round": self.best,
            "message": self.last.message if self.last else "",
        }


def summarize(journal: Journal) -> RunSummary:
    """Everything committed of a run. Raises RunMissing."""
    record, recipe = journal.record(), journal.recipe()
    outcomes = sorted(journal.outcomes(), key=lambda o: o.number)
    begun = journal.head(recipe.algorithm.phases) is not None
    return RunSummary(
        run=journal.run,
        nonce=record.nonce,
        recipe=recipe,
        sites=journal.sites(),
        created=record.created,
        rounds=[summarize_round(journal, round, phase) for round, phase in _rounds(journal, recipe)],
        finished=begun and is_finished(journal, recipe),
        best=best_round(key_metrics(journal, recipe), recipe),
        last=outcomes[-1] if outcomes else None,
    )


def _rounds(journal: Journal, recipe: Recipe) -> list[tuple[int, str]]:
    return [step for step in journal.committed() if step[1] == recipe.algorithm.phases[-1]]


def summarize_round(journal: Journal, round: int, phase: str) -> RoundSummary:
    """One committed round."""
    manifest, evaluation = journal.manifest(round, phase), journal.evaluation(round)
    assert manifest is not None
    return RoundSummary(
        round=round,
        model_digest=manifest.model_digest,
        opened=manifest.opened,
        committed=manifest.committed,
        metrics=manifest.metrics,
        evaluation=evaluation.metrics if evaluation else None,
        sites=manifest.contributors,
        excluded=manifest.excluded,
        partial=manifest.partial,
    )


@dataclass(frozen=True)
class Current:
    """The round that is being held now. answered: sites whose updates are there; opening: which attempt this is."""

    round: int
    phase: str
    opening: int
    deadline: datetime
    asked: list[SiteId]
    answered: list[SiteId]
    absent: Mapping[SiteId, str]


def current(journal: Journal) -> Current | None:
    """Where an unfinished run stands inside its round: cheap enough to be asked every second. None between rounds."""
    recipe = journal.recipe()
    step = next_step(journal, recipe) if journal.head(recipe.algorithm.phases) else None
    plan = journal.plan(step.round, step.phase) if step else None
    openings = journal.openings(plan) if plan else []
    if plan is None or not openings:
        return None
    answered = [
        s
        for s in sorted(plan.tasks)
        if any(k.endswith(".json") for k in journal.store.list(journal.inbox(s, plan.round, plan.phase)))
    ]
    return Current(
        plan.round, plan.phase, openings[-1].number, openings[-1].deadline, sorted(plan.tasks), answered, plan.absent
    )
