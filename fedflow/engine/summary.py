"""What people want to know of a run, read from its journal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from fedflow.engine.best import best_round
from fedflow.engine.rounds import is_finished, next_step
from fedflow.recipe import Recipe
from fedflow.store.journal import Journal
from fedflow.store.records import ContributorSummary, Outcome
from fedflow.transforms.evaluated import VALIDATE
from fedflow.types import SiteId

__all__ = [
    "Current",
    "Glance",
    "RoundSummary",
    "RunSummary",
    "Status",
    "current",
    "current_in",
    "glance",
    "status_of",
    "summarize",
]

Status = Literal["running", "finished", "failed", "aborted", "interrupted"]
"""interrupted: neither finished nor known to be running; it can be resumed, as failed and aborted runs can."""


class _Committed:
    """What follows from the figures of a committed round."""

    opened: datetime | None
    committed: datetime
    metrics: Mapping[str, float | None]
    evaluation: Mapping[str, float | None] | None

    @property
    def seconds(self) -> float:
        """From the first opening to the commit."""
        return (self.committed - self.opened).total_seconds() if self.opened else 0.0

    @property
    def shown(self) -> Mapping[str, float | None]:
        """The metrics that the key metric is looked up in."""
        return self.evaluation if self.evaluation is not None else self.metrics


@dataclass(frozen=True)
class RoundSummary(_Committed):
    """One committed round. metrics: the sites' weighted means; evaluation: of the model, by the server or the sites; None without."""

    round: int
    model_digest: str
    opened: datetime | None
    committed: datetime
    metrics: Mapping[str, float | None]
    evaluation: Mapping[str, float | None] | None
    sites: Mapping[SiteId, ContributorSummary]
    excluded: Mapping[SiteId, str]
    partial: Mapping[str, list[SiteId]]


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
        return _status(self.finished, self.last)

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
    rounds = [summarize_round(journal, recipe, round) for round in journal.rounds(recipe.phases[-1])]
    finished, last = _ended(journal, recipe)
    return RunSummary(
        run=journal.run,
        nonce=record.nonce,
        recipe=recipe,
        sites=journal.sites(),
        created=record.created,
        rounds=rounds,
        finished=finished,
        best=best_round([r.shown.get(recipe.key_metric.name) for r in rounds], recipe),
        last=last,
    )


def status_of(journal: Journal) -> tuple[Status, bool]:
    """`RunSummary.status`, and whether nothing is left to be done, without reading every round. Raises RunMissing."""
    finished, last = _ended(journal, journal.recipe())
    return _status(finished, last), finished and last is not None and last.status == "finished"


def _status(finished: bool, last: Outcome | None) -> Status:
    if finished:
        return "finished"
    return last.status if last and last.status != "finished" else "interrupted"


def _ended(journal: Journal, recipe: Recipe) -> tuple[bool, Outcome | None]:
    """Whether every round is committed, and how the last start ended."""
    begun = journal.head(recipe.phases) is not None
    last = max(journal.outcomes(), key=lambda outcome: outcome.number, default=None)
    return begun and is_finished(journal, recipe), last


def summarize_round(journal: Journal, recipe: Recipe, round: int) -> RoundSummary:
    """One committed round: its sites' training, and the model's evaluation by the server, or else by the sites."""
    manifest, evaluation = journal.manifest(round, recipe.algorithm.phases[-1]), journal.evaluation(round)
    assert manifest is not None
    by_sites = journal.manifest(round, VALIDATE) if recipe.federated_evaluation else None
    shown = evaluation or by_sites
    return RoundSummary(
        round=round,
        model_digest=manifest.model_digest,
        opened=manifest.opened,
        committed=manifest.committed,
        metrics=manifest.metrics,
        evaluation=shown.metrics if shown else None,
        sites=manifest.contributors,
        excluded={**manifest.excluded, **(by_sites.excluded if by_sites else {})},
        partial=manifest.partial,
    )


# -- while it goes on --------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Glance(_Committed):
    """What a display shows of a committed round: not verified, and so cheap to read. sites: how many count."""

    round: int
    opened: datetime | None
    committed: datetime
    metrics: Mapping[str, float | None]
    evaluation: Mapping[str, float | None] | None
    sites: int
    excluded: Mapping[SiteId, str]


def glance(journal: Journal, recipe: Recipe, round: int, *, last: bool = False) -> Glance | None:
    """That round, if it is committed and evaluated as the recipe asks. last: no evaluation will come any more."""
    fields = journal.glance(round, recipe.algorithm.phases[-1])
    by_sites = journal.glance(round, VALIDATE) if recipe.federated_evaluation else None
    if fields is None or (recipe.federated_evaluation and by_sites is None):
        return None
    evaluation = journal.evaluation(round) if recipe.evaluation is not None else None
    if evaluation is None and recipe.evaluation is not None and not last:
        return None
    opened = fields["opened"]
    return Glance(
        round=round,
        opened=datetime.fromisoformat(opened) if opened else None,
        committed=datetime.fromisoformat(fields["committed"]),
        metrics=fields["metrics"],
        evaluation=evaluation.metrics if evaluation else by_sites["metrics"] if by_sites else None,
        sites=len(fields["contributors"]),
        excluded=fields["excluded"],
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
    step = next_step(journal, recipe) if journal.head(recipe.phases) else None
    return _standing(journal, step.round, step.phase) if step else None


def current_in(journal: Journal, recipe: Recipe, round: int) -> Current | None:
    """The same of a run whose first uncommitted round is known: a request or two where nobody was asked."""
    for phase in recipe.phases:
        if not journal.is_committed(round, phase):
            return _standing(journal, round, phase)
    return None


def _standing(journal: Journal, round: int, phase: str) -> Current | None:
    plan = journal.plan(round, phase)
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
