"""A run's rounds at the coordinator: start, plan, open, survey, close. Every function may run twice, in any process.

The truth about a round is in the store. Whoever comes second to a create-only write adopts what is there.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal

from fedflow import __version__
from fedflow.engine.aggregation import aggregate_round, commit_initial
from fedflow.engine.best import key_metrics, stops_early
from fedflow.engine.checkpoints import initial_models
from fedflow.engine.shares import Share, reduced_of, shares
from fedflow.engine.updates import Checks, told
from fedflow.errors import (
    FedflowError,
    QuorumLost,
    RoundAborted,
    RoundError,
    RunExists,
    StoreError,
    UpdateInvalid,
    UserError,
    field_error,
)
from fedflow.recipe import AMENDABLE, MAX_BACKOFF, NAME, Recipe, backoff
from fedflow.store.journal import INITIAL, Journal
from fedflow.store.objects import ObjectStore
from fedflow.store.records import (
    Amendment,
    Closing,
    Contribution,
    Manifest,
    Opening,
    Outcome,
    Plan,
    RunRecord,
    SiteRecord,
    TaskRecord,
    utc_now,
)
from fedflow.types import FederationView, RoundPlan, SiteId, SiteView

__all__ = [
    "Step",
    "Survey",
    "amend_run",
    "close_round",
    "commit_round",
    "delegate",
    "exclude",
    "gave_up",
    "is_finished",
    "is_quorate",
    "lateness",
    "may_close",
    "new_opening",
    "next_attempt",
    "next_step",
    "no_update",
    "open_round",
    "quorum_of",
    "record_abort",
    "recording_outcome",
    "start_run",
    "survey",
]


# -- the run -----------------------------------------------------------------------------------------------------------
def start_run(
    store: ObjectStore, run: str, recipe: Recipe, sites: Sequence[SiteId], keys: Mapping[SiteId, str] | None = None
) -> Journal:
    """Begin `run`, or find it begun: its record and its initial state, committed.

    keys: site -> public key of who must sign its updates; of a site that is not there any count

    Raises RunExists where the id belongs to a run with another recipe, and whatever is wrong with model and checkpoint,
    before anything is written.
    """
    if not re.fullmatch(NAME, run):
        raise UserError(field_error("run", run, f"a name that matches {NAME}", "choose another --run-id"))
    check_sites(recipe, sites)
    journal = Journal(store, run)
    if (begun := _begun(journal)) and begun.digest() == recipe.digest():
        return journal  # neither model nor checkpoint need be here any more
    model, others = initial_models(store, recipe)
    store.probe()
    wanted = RunRecord(
        fedflow=__version__,
        run=run,
        nonce=uuid.uuid4().hex,
        created=utc_now(),
        recipe=recipe.model_dump(mode="json"),
        sites=sorted(sites),
        coordinator=journal.keys.public,
        keys=dict(keys or {}),
    )
    record = journal.create(wanted)
    begun = Recipe.model_validate(record.recipe)
    if begun.digest() != recipe.digest():
        raise RunExists(
            f"run: found {run!r} with another recipe ({_differences(begun, recipe)}), expected the same; choose another --run-id"
        )
    commit_initial(journal, recipe.computation, model, others)
    return journal


def _begun(journal: Journal) -> Recipe | None:
    """The recipe of a run whose initial state is committed."""
    if journal.manifest(INITIAL, "initial") is None:
        return None
    return Recipe.model_validate(journal.record().recipe)


def check_sites(recipe: Recipe, sites: Sequence[SiteId]) -> None:
    """Raises UserError where the recipe asks for sites that are not there, or for more of them."""
    unknown = sorted({*recipe.overrides, *recipe.required_sites} - set(sites))
    if unknown:
        raise UserError(
            f"overrides, required_sites: found sites {unknown}, expected sites among {sorted(sites)}; correct the names"
        )
    if unknown := sorted(set(recipe.schedule.names) - set(sites)):
        raise UserError(field_error("schedule", unknown, f"sites among {sorted(sites)}", "correct the names"))
    invited = sorted(recipe.schedule.invited or sites)
    for field, site in recipe.algorithm.names.items():
        if site not in invited:
            raise UserError(field_error(f"algorithm.{field}", site, f"one of {invited}", "name a site that takes part"))
    if (most := recipe.computation.most_updates) is not None:
        asked = len(recipe.schedule.plan(0, {site: SiteView() for site in sites}, recipe.seed).tasks)
        least = recipe.computation.least_updates
        if not least <= asked <= most:
            expected = f"{least} to {most} with algorithm {recipe.algorithm.kind}"
            fix = "name them in schedule.sites"
            raise UserError(field_error("schedule", f"{asked} sites a round", expected, fix))
    if both := sorted(set(recipe.schedule.regional) & set(sites)):
        raise UserError(field_error("schedule.regions", both, "names that are no sites", "rename the regions"))
    counts = [("quorum", recipe.quorum), ("min_sites", recipe.min_sites), recipe.schedule.closing or ("schedule", None)]
    for name, wanted in counts:
        if wanted is not None and wanted > len(sites):
            expected = f"at most {len(sites)}, the sites of the federation"
            raise UserError(field_error(name, wanted, expected, f"lower {name}, or add sites"))


def amend_run(
    journal: Journal,
    recipe: Recipe | None = None,
    sites: Sequence[SiteId] = (),
    *,
    keys: Mapping[SiteId, str] | None = None,
    **changes: object,
) -> Recipe:
    """Write what a resume changes into the journal. recipe: the whole recipe as it should be now; changes: single fields.

    sites: that join; keys: site -> its public key, where it has one

    Raises RunExists where another field than those of `AMENDABLE` differs.
    """
    while True:  # another resume may take the next number first: what it left to be changed is changed after it
        current = journal.recipe()
        wanted = recipe or Recipe.model_validate({**current.model_dump(), **changes})
        if wanted.digest() != current.digest():
            raise RunExists(
                f"run: found {journal.run!r} with another recipe ({_differences(current, wanted)}), expected no change but in "
                f"{', '.join(sorted(AMENDABLE))}; take the others back, or start a new run"
            )
        done = len(journal.rounds(current.phases[-1]))
        if wanted.rounds < done:
            raise UserError(field_error("rounds", wanted.rounds, f"at least the {done} that are committed", "raise it"))
        check_sites(wanted, sorted({*journal.sites(), *sites}))
        before, after = current.model_dump(mode="json"), wanted.model_dump(mode="json")
        changed = {field: after[field] for field in sorted(AMENDABLE) if before[field] != after[field]}
        joined = sorted(set(sites) - set(journal.sites()))
        enrolled = {site: key for site, key in (keys or {}).items() if journal.pins.get(site) != key}
        if not changed and not joined and not enrolled:
            return current
        number = len(journal.amendments()) + 1
        journal.amend(Amendment(number=number, at=utc_now(), recipe=changed, sites=joined, keys=enrolled))


def _differences(old: Recipe, new: Recipe) -> str:
    a, b = old.model_dump(mode="json"), new.model_dump(mode="json")
    return "; ".join(f"{k}: {a[k]!r} there, {b[k]!r} here" for k in a if k not in AMENDABLE and a[k] != b[k])[:500]


def record_abort(journal: Journal, message: str) -> None:
    """Write into the journal that a person stopped this start of the run, whose process could not say so."""
    number = len(journal.outcomes()) + 1
    journal.put_outcome(Outcome(number=number, status="aborted", message=message, at=utc_now()))


@contextlib.contextmanager
def recording_outcome(journal: Journal) -> Iterator[None]:
    """Write into the journal how this start of the run ends; what is raised inside goes on, also where the store does not take this."""
    number = len(journal.outcomes()) + 1

    def put(status: Literal["finished", "failed", "aborted"], message: str = "") -> None:
        journal.put_outcome(Outcome(number=number, status=status, message=message, at=utc_now()))

    try:
        yield
    except Exception as error:
        with contextlib.suppress(StoreError):
            put(*_ended_by(error))
        raise
    put("finished")


def _ended_by(error: Exception) -> tuple[Literal["failed", "aborted"], str]:
    if isinstance(error, RoundAborted):
        return "aborted", error.reason
    return "failed", str(error) if isinstance(error, FedflowError) else f"unexpected {type(error).__name__}: {error}"


# -- where a run stands ------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Step:
    """One phase of one round."""

    round: int
    phase: str


def next_step(journal: Journal, recipe: Recipe) -> Step | None:
    """The first phase that is not committed, or None where the run is finished."""
    phases = recipe.phases
    head = journal.head(phases)
    assert head is not None
    if head.round >= 0 and head.phase != phases[-1]:
        return Step(head.round, phases[phases.index(head.phase) + 1])
    return None if is_finished(journal, recipe) else Step(head.round + 1, phases[0])


def is_finished(journal: Journal, recipe: Recipe) -> bool:
    """Whether all rounds are committed, or the early stop says so: a pure function of committed records."""
    if len(journal.rounds(recipe.phases[-1])) >= recipe.rounds:
        return True
    stop = recipe.early_stop
    return (stop.patience is not None or stop.target is not None) and stops_early(key_metrics(journal, recipe), recipe)


# -- plan and opening --------------------------------------------------------------------------------------------------
def federation_view(
    journal: Journal, head: Manifest, absent: Mapping[SiteId, str], at_work: Mapping[SiteId, int]
) -> FederationView:
    """What is known of every site. absent: site -> why it cannot be asked now; at_work: site -> base of what it still makes."""
    known = {site: head.sites.get(site, SiteRecord()) for site in journal.sites()}
    return {
        site: SiteView(site not in absent, at_work.get(site), r.last_round, r.seconds, r.failures, r.steps)
        for site, r in known.items()
    }


def open_round(
    journal: Journal,
    step: Step,
    *,
    absent: Mapping[SiteId, str] | None = None,
    at_work: Mapping[SiteId, int] | None = None,
    reopen: bool = False,
    why: str = "start",
    ends: datetime | None = None,
) -> tuple[Plan, Opening]:
    """The plan of `step`, and an opening of it: made, or found made.

    absent: site, or regional aggregator -> why it cannot be asked now (used for a new plan only)
    at_work: site -> base round of an update that it still makes (the same)
    reopen: start a new opening with a new deadline, as a resume does; the updates that are there stay. Without it an
            opening that is there is continued, its deadline not extended, unless it was closed below its quorum.
    ends:   when the run ends at the latest, and so the opening
    Raises QuorumLost where too few sites are there, or a required one is not.
    """
    recipe = journal.recipe()
    plan = journal.plan(step.round, step.phase) or journal.put_plan(
        _make_plan(journal, recipe, step, absent or {}, at_work or {})
    )
    openings = journal.openings(plan)
    if openings:
        closing = journal.closing(plan, openings[-1].number)
        if closing.quorate if closing else not reopen:
            return plan, openings[-1]  # to be continued; or nothing is left to collect, only to aggregate
    quorum = quorum_of(recipe, plan.phase, plan.quorum)
    opening = new_opening(recipe, quorum, at=utc_now(), ends=ends, number=len(openings) + 1, why=why)
    opening = opening.model_copy(update={"rejected": _rejected(journal, plan, openings)})
    return plan, journal.put_opening(plan, opening)


def new_opening(
    recipe: Recipe, quorum: int, *, at: datetime, ends: datetime | None = None, number: int = 1, why: str = "start"
) -> Opening:
    """The opening that begins at `at`. quorum: updates that close it; ends: when the run ends at the latest."""
    deadline = at + recipe.durations.round_deadline
    return Opening(
        number=number,
        opened=at,
        deadline=min(deadline, ends) if ends else deadline,
        why=why,
        quorum=quorum,
        required=recipe.required_sites,
    )


def quorum_of(recipe: Recipe, phase: str, planned: int) -> int:
    """How many updates close `phase`: as the recipe, which a resume may change, has it now; else `planned`."""
    if recipe.quorum is None:
        return planned
    return recipe.quorum if phase == recipe.phases[0] else recipe.computation.enough(phase, recipe.quorum)


def _rejected(journal: Journal, plan: Plan, openings: Sequence[Opening]) -> list[str]:
    """Manifests that did not count in earlier openings: their sites are asked again, and may send others."""
    if not openings:
        return []
    checks = Checks(journal, plan)
    refused = {key for site in plan.tasks for key in checks.keys(site) if isinstance(checks.judge(site, key), str)}
    for before, after in itertools.pairwise(journal.closings(plan)):
        if after.opening == before.opening:  # a revision: what failed in aggregation
            refused |= {c.key for c in before.contributors.values()} - {c.key for c in after.contributors.values()}
    return sorted({*openings[-1].rejected, *refused})


def _make_plan(
    journal: Journal, recipe: Recipe, step: Step, absent: Mapping[SiteId, str], at_work: Mapping[SiteId, int]
) -> Plan:
    algorithm = recipe.computation
    head = journal.head(algorithm.phases)
    assert head is not None
    absent = recipe.schedule.absences(absent)
    view = federation_view(journal, head, absent, at_work)
    if step.phase == algorithm.phases[0]:
        wanted = recipe.schedule.plan(step.round, view, recipe.seed)
        tasks = {s: TaskRecord(steps=t.steps, overrides=dict(t.overrides)) for s, t in wanted.tasks.items()}
        quorum = recipe.quorum if recipe.quorum is not None else wanted.quorum
        late, back = lateness(recipe, wanted)
        again = wanted.again and late == "carry" and back > 0
        aggregators, regions = wanted.aggregators, wanted.regions
        there = sum(site.online for site in view.values())
    else:
        first = journal.plan(step.round, algorithm.phases[0])
        assert first is not None
        tasks = {s: t for s, t in first.tasks.items() if s in head.contributors}
        quorum = min(algorithm.enough(step.phase, first.quorum), len(tasks))  # fewer, where those were enough before
        late, back, there = first.late, 0, len(tasks)
        again, aggregators, regions = False, first.aggregators, first.regions
    check_cohort(recipe, len(tasks), there, quorum, absent, run=journal.run, round=step.round)
    record = journal.record()
    return Plan(
        run=journal.run,
        nonce=record.nonce,
        round=step.round,
        phase=step.phase,
        parent=head.digest(),
        broadcast=head.broadcast,
        tasks={
            s: t.model_copy(update={"state_base": head.sites.get(s, SiteRecord()).accepted}) for s, t in tasks.items()
        },
        absent=dict(absent),
        quorum=quorum,
        accept_bases=[r for r in range(step.round - back, step.round + 1) if r >= 0],
        late=late,
        amendments=len(journal.amendments()),
        num_sites=len(journal.sites()),
        again=again,
        aggregators=list(aggregators),
        regions={region: list(sites) for region, sites in regions.items()},
    )


def lateness(recipe: Recipe, wanted: RoundPlan) -> tuple[Literal["drop", "carry"], int]:
    """What becomes of late updates, and how many rounds back an update may have started. Of several phases none is carried."""
    if len(recipe.computation.phases) > 1:
        return "drop", 0
    late = wanted.late or recipe.late
    return late, wanted.accept_bases if wanted.accept_bases is not None else int(late == "carry")


def check_cohort(
    recipe: Recipe, cohort: int, there: int, quorum: int, absent: Mapping[SiteId, str], *, run: str, round: int
) -> None:
    """Raises QuorumLost where too few sites can be asked, or a required one cannot.

    cohort: sites that are asked; there: that could be; absent: site -> why it could not
    """
    required = set(recipe.required_sites)
    if recipe.computation.needs_all:
        required |= set(recipe.schedule.invited or absent)
    if missing := sorted(required & absent.keys()):
        raise QuorumLost(
            f"required sites are absent: {_named(missing, absent)}; start their workers and resume",
            run=run,
            round=round,
        )
    least = recipe.computation.least_updates
    if quorum < least:
        raise QuorumLost(
            f"found a quorum of {quorum}, expected at least the {least} updates that the algorithm needs "
            f"(algorithm.reduction): {_named(sorted(absent), absent)}; start more sites, or choose a reduction that needs fewer",
            run=run,
            round=round,
        )
    for found, least, binding in ((there, recipe.min_sites, "min_sites"), (cohort, quorum, "quorum")):
        if found < least:
            raise QuorumLost(
                f"found {found} sites to ask, expected at least {least} ({binding}): {_named(sorted(absent), absent)}; start their workers and resume",
                run=run,
                round=round,
            )


def _named(sites: Sequence[SiteId], why: Mapping[SiteId, str]) -> str:
    return "; ".join(f"{site} ({why[site]})" for site in sites) or "none absent"


# -- survey ------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Survey:
    """What the sites of a plan have sent so far. rejected: site -> why its update cannot count."""

    accepted: Mapping[SiteId, Contribution]
    rejected: Mapping[SiteId, str]

    def answered(self) -> set[SiteId]:
        return {*self.accepted, *self.rejected}


def survey(journal: Journal, plan: Plan, sites: Sequence[SiteId] | None = None, before: Survey | None = None) -> Survey:
    """Look at the updates of `sites` (default: the plan's), header by header; what `before` has already is not read again."""
    accepted = dict(before.accepted) if before else {}
    rejected: dict[SiteId, str] = {}
    checks = Checks(journal, plan)
    for site in sorted(plan.tasks if sites is None else sites):
        if site in accepted:
            continue
        verdicts = [v for key in checks.keys(site) if (v := checks.judge(site, key)) is not None]
        good = [v for v in verdicts if isinstance(v, Contribution)]
        if good:
            accepted[site] = max(good, key=lambda c: (c.base_round, c.key))
        elif verdicts:
            rejected[site] = str(verdicts[-1])
    if before:
        rejected = {**{s: why for s, why in before.rejected.items() if s not in accepted}, **rejected}
    return Survey(accepted, rejected)


# -- closing -----------------------------------------------------------------------------------------------------------
def may_close(
    asked: Set[SiteId],
    opening: Opening,
    found: Survey,
    *,
    given_up: Collection[SiteId] = (),
    quorum_since: datetime | None,
    grace: timedelta,
    at: datetime,
) -> str | None:
    """Why the round may close at `at`, or None. The one rule, by the clock in deployment and in simulated time.

    asked: the cohort; given_up: sites of which nothing more is expected; quorum_since: when the quorum was first seen
    """
    if {*found.answered(), *given_up} >= asked:
        return "every site answered"
    if at >= opening.deadline:
        return "deadline"
    if quorum_since is not None and at >= quorum_since + grace and is_quorate(opening, found):
        return "quorum"
    return None


def next_attempt(recipe: Recipe, opening: Opening, attempt: int, *, at: datetime, jitter: float) -> datetime | None:
    """When a site whose `attempt` failed at `at` is asked again; None if it is not.

    Exponential backoff, capped at `MAX_BACKOFF`, of which half to all is waited: jitter, 0 … 1, says how much.
    """
    longest = max(backoff(recipe.attempts, recipe.timeouts.round_deadline), timedelta(seconds=0.1))
    pause = min(timedelta(seconds=2.0 ** (attempt - 1)), longest, MAX_BACKOFF) * (0.5 + jitter / 2)
    return None if attempt >= recipe.attempts or at + pause >= opening.deadline else at + pause


def gave_up(reason: str, attempt: int, recipe: Recipe) -> str:
    """Why a site whose last attempt failed does not count."""
    return f"{reason} (attempt {attempt} of {recipe.attempts})"


def no_update(opening: Opening, *, at: datetime) -> str:
    """Why a site from which nothing had come at the closing, at `at`, does not count."""
    return f"no update by {'the deadline' if at >= opening.deadline else 'the closing'}"


def is_quorate(terms: Opening | Closing, found: Survey) -> bool:
    """Whether so many and such updates are there that the round can be committed."""
    return len(found.accepted) >= terms.quorum and all(site in found.accepted for site in terms.required)


def close_round(
    journal: Journal,
    plan: Plan,
    opening: Opening,
    found: Survey,
    *,
    why: str,
    missing: Mapping[SiteId, str] | None = None,
) -> Closing:
    """Freeze what counts: the opening's closing, made or found made.

    missing: site -> why nothing came from it. Raises QuorumLost, after the closing is written, where the quorum is not met
    or a required site is missing; what is there stays for another opening.
    """
    reasons = {
        site: (missing or {}).get(site, "no update by the deadline")
        for site in plan.tasks
        if site not in found.accepted
    }
    closing = Closing(
        opening=opening.number,
        closed=utc_now(),
        why=why,
        quorum=opening.quorum,
        required=opening.required,
        quorate=is_quorate(opening, found),
        contributors=dict(sorted(found.accepted.items())),
        excluded={**plan.absent, **reasons, **{s: r for s, r in found.rejected.items() if s in reasons}},
    )
    return check_quorate(plan, journal.closing(plan, opening.number) or journal.put_closing(plan, closing))


def check_quorate(plan: Plan, closing: Closing) -> Closing:
    """`closing` if it can be committed; else QuorumLost saying which sites are missing and why."""
    if closing.quorate:
        return closing
    raise quorum_lost(
        len(closing.contributors), closing.quorum, closing.required, closing.excluded, run=plan.run, round=plan.round
    )


def quorum_lost(
    found: int, quorum: int, required: Sequence[SiteId], excluded: Mapping[SiteId, str], *, run: str, round: int
) -> QuorumLost:
    """What is raised where a phase cannot be committed. excluded: site -> why"""
    missing = "; ".join(f"{site}: {why}" for site, why in sorted(excluded.items()))
    including = f" including {', '.join(required)}" if required else ""
    return QuorumLost(
        f"found {found} valid updates, expected {quorum}{including}; missing: {missing}; what was committed is kept: "
        "resume when the sites are back",
        run=run,
        round=round,
    )


def exclude(journal: Journal, plan: Plan, closing: Closing, reasons: Mapping[SiteId, str]) -> Closing:
    """The next revision of `closing`, without the sites of `reasons`; made or found made."""
    left = {s: c for s, c in closing.contributors.items() if s not in reasons}
    revised = closing.model_copy(
        update={
            "revision": closing.revision + 1,
            "closed": utc_now(),
            "why": f"{', '.join(sorted(reasons))} excluded in aggregation",
            "contributors": left,
            "excluded": {**closing.excluded, **reasons},
            "quorate": is_quorate(closing, Survey(left, {})),
        }
    )
    return journal.put_closing(plan, revised)


def commit_round(journal: Journal, plan: Plan, closing: Closing) -> Manifest:
    """Aggregate and commit; updates that turn out unreadable or not finite are excluded in a new revision of the closing.

    Raises QuorumLost where too few are left.
    """
    while True:
        closing = check_quorate(plan, closing)
        try:
            return aggregate_round(journal, plan, closing)
        except UpdateInvalid as error:
            assert error.site is not None
            closing = exclude(journal, plan, closing, {error.site: error.reason})


def delegate(
    journal: Journal,
    plan: Plan,
    closing: Closing,
    have_done: Callable[[Closing, Sequence[Share]], Mapping[Share, str]],
) -> Closing:
    """Have done what of the aggregation of `closing` others than the coordinator do; the closing that can be committed then.

    have_done: (closing, shares) -> those that nobody did, and why; what was done is in the store. A region whose sum is not to be had
    is excluded with its updates, and so is an update that turns out unreadable or not finite. Raises QuorumLost where too few are left,
    RoundError where nobody aggregates the whole.
    """
    undone: Mapping[Share, str] = {}
    while True:
        closing = check_quorate(plan, closing)
        found = {share: reduced_of(journal, share) for share in shares(plan, closing)}
        reasons: dict[SiteId, str] = {}
        for share, reduced in found.items():
            if reduced is not None:
                reasons |= {site: told(why) for site, why in reduced.invalid.items()}
            elif share in undone and share.region is None:
                raise RoundError(f"nobody aggregated: {undone[share]}; resume the run", run=plan.run, round=plan.round)
            elif share in undone:
                reasons |= dict.fromkeys(share.sites, f"region {share.region}: {undone[share]}")
        missing = [share for share, reduced in found.items() if reduced is None]
        if reasons:
            closing = exclude(journal, plan, closing, reasons)
        elif not missing:
            return closing
        else:
            first = [share for share in missing if share.region is not None] or missing
            undone = have_done(closing, first)
