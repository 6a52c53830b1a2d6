"""Simulated time: when sites answer, and so who counts and when a round closes. Nothing is trained here.

The rules are the deployment's own functions, asked at simulated instants: `new_opening`, `may_close`, `is_quorate`, `next_attempt`.
What a trace says of a site decides the rest: an attempt takes what its transfers and steps take; one that fails is made
again as the recipe says; one whose site goes offline meanwhile is never heard of again in this opening.

The clock is an event queue of one kind of event, a site's work under way (`Flight`). Where a round's plan carries late updates,
flights outlive its closing, and count in a later round that accepts their base.
"""

from __future__ import annotations

import contextlib
import json
import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from fedflow.engine.rounds import (
    Step,
    Survey,
    gave_up,
    is_quorate,
    may_close,
    new_opening,
    next_attempt,
    no_update,
    quorum_lost,
)
from fedflow.errors import ObjectExists, ObjectMissing, RoundError, RunExists
from fedflow.recipe import Recipe
from fedflow.simulation.trace_files import parse_trace
from fedflow.simulation.traces import Period, Trace
from fedflow.store.journal import INITIAL, Journal
from fedflow.store.records import Contribution, Manifest, Opening
from fedflow.types import SiteId, canonical_json, derive_seed

__all__ = ["EPOCH", "Clock", "Flight", "Held", "Work", "note_flights", "noted_trace"]

EPOCH = datetime(2001, 1, 1, tzinfo=UTC)
"""Second 0 of every simulated run: midnight of a Monday."""


@dataclass(frozen=True)
class Work:
    """What a site is asked for. steps: None = as many as the recipe's epochs have; down, up: bytes of broadcast and update."""

    steps: int | None
    down: int
    up: int
    overrides: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Flight:
    """An attempt of a site.

    base:    the round whose broadcast it starts from
    attempt: which one it is in the opening that it is looked at in; 0: it began in an earlier one, or after an update that counts
    begins:  when; until: when its update is there, or when it is known to have failed; None = the site is not heard of again
    failed:  why there is no update then
    seconds: that it takes; overrides: of its task
    """

    base: int
    attempt: int
    begins: datetime
    until: datetime | None
    failed: str | None = None
    seconds: float = 0.0
    overrides: Mapping[str, Any] = field(default_factory=dict)

    def ended(self, at: datetime) -> bool:
        """Whether it is known at `at` what became of it."""
        return self.until is not None and self.until <= at


@dataclass(frozen=True)
class Held:
    """How a round went. answered: sites whose updates count, with their flights; missing: other site -> why it has none."""

    opened: datetime
    closed: datetime
    answered: Mapping[SiteId, Flight]
    missing: Mapping[SiteId, str]


@dataclass
class Clock:
    """Holds rounds in simulated time. A pure function of trace, recipe, and of `now` and `flights` at the last commit."""

    trace: Trace
    recipe: Recipe
    run: str
    now: datetime = EPOCH
    flights: dict[SiteId, Flight] = field(default_factory=dict)
    _periods: dict[SiteId, Period] = field(default_factory=dict)

    @property
    def _ends(self) -> datetime | None:
        timeout = self.recipe.timeouts.run_timeout
        return EPOCH + timeout if timeout else None

    @classmethod
    def of(cls, journal: Journal, recipe: Recipe, head: Manifest) -> Clock | None:
        """The clock of a run whose newest commit is `head`; None where the run has no trace."""
        trace = noted_trace(journal)
        if trace is None:
            return None
        if head.round == INITIAL:
            return cls(trace, recipe, journal.run)
        flights: dict[SiteId, Flight] = {}
        with contextlib.suppress(ObjectMissing):
            for site, fields in json.loads(journal.store.get(_flights(journal, head.round, head.phase))).items():
                instants = {name: fields[name] and datetime.fromisoformat(fields[name]) for name in _INSTANTS}
                flights[site] = Flight(**fields | instants)
        return cls(trace, recipe, journal.run, head.committed, flights)

    # -- who is there
    def offline(self, sites: Iterable[SiteId]) -> dict[SiteId, str]:
        """Those of `sites` that are not there now -> why."""
        at = _second(self.now)
        return {s: "offline in the trace" for s in sites if not self._period(s, at).online}

    def _period(self, site: SiteId, at: float) -> Period:
        """That of the trace; a site's last one is kept, for most looks are into the same."""
        found = self._periods.get(site)
        if found is None or not found.start <= at < found.end:
            found = self._periods[site] = self.trace.period(site, at)
        return found

    def wait(self, sites: Sequence[SiteId], since: datetime) -> bool:
        """Go on to when the next of `sites` comes; False where that is more than the recipe's wait_for_sites after `since`."""
        at = _second(self.now)
        comes = min((p.end for s in sites if not (p := self._period(s, at)).online), default=math.inf)
        if comes > _second(since + self.recipe.wait_for_sites):
            return False
        self.now = max(_instant(comes), self.now + timedelta.resolution)
        return True

    # -- a round
    def hold(
        self,
        step: Step,
        asked: Mapping[SiteId, Work],
        absent: Mapping[SiteId, str],
        *,
        quorum: int,
        bases: Sequence[int],
        carry: bool,
        again: bool = False,
    ) -> Held:
        """Open `step` now and hold it until it may close; `now` is then its closing.

        absent: site -> why it is not asked, which is passed on; quorum: the plan's; bases: rounds whose updates count;
        carry: whether work under way goes on after the closing; again: whether a site that answered is asked again before it
        Raises QuorumLost where the round cannot be committed, RoundError where the run's time is over.
        """
        if self._ends is not None and self.now >= self._ends:
            raise RoundError(
                f"run_timeout passed before round {step.round}; give the run longer and resume", run=self.run
            )
        opening = new_opening(self.recipe, quorum, at=self.now, ends=self._ends)
        courses = {site: self._course(site, step, work, opening, bases) for site, work in asked.items()}
        last = {site: course[-1] for site, course in courses.items()}
        closed = self._closing(last, opening, step.round)
        answered = {s: f for s, f in last.items() if f.ended(closed) and not f.failed}
        told = {s: self._why_missing(f, opening, closed) for s, f in last.items() if s not in answered}
        missing = {**absent, **told}
        if not is_quorate(opening, _seen(answered, step.round)):
            raise quorum_lost(len(answered), opening.quorum, opening.required, missing, run=self.run, round=step.round)
        courses = {site: [flight] for site, flight in self.flights.items()} | courses
        under_way = {s: f for s, course in courses.items() for f in course if _under_way(f, closed)}
        if again:
            under_way |= self._again(answered, step, asked, opening, closed)
        self.flights = {s: f for s, f in under_way.items() if carry and f.base in bases}
        self.now = closed
        return Held(opening.opened, closed, answered, missing)

    def _again(
        self,
        answered: Mapping[SiteId, Flight],
        step: Step,
        asked: Mapping[SiteId, Work],
        opening: Opening,
        closed: datetime,
    ) -> dict[SiteId, Flight]:
        """What sites begin whose update came before the closing: under way then, or done and not counted yet."""
        found = {}
        for site, flight in answered.items():
            assert flight.until
            at = max(flight.until, opening.opened)
            if at < closed:
                work = replace(asked[site], overrides={**asked[site].overrides, "again": 1})
                begun = self._attempt(site, step, work, opening, 0, at)
                if begun.begins <= closed and not (begun.failed and begun.ended(closed)):
                    found[site] = begun
        return found

    def _why_missing(self, last: Flight, opening: Opening, closed: datetime) -> str:
        failed = last.failed if last.ended(closed) else None
        return gave_up(failed, last.attempt, self.recipe) if failed else no_update(opening, at=closed)

    def _closing(self, last: Mapping[SiteId, Flight], opening: Opening, round: int) -> datetime:
        """When the round closes: the first instant, of those at which anything happens, at which it may."""
        ends = sorted((max(f.until, opening.opened), site) for site, f in last.items() if f.until)

        def until(at: datetime) -> tuple[Survey, list[SiteId]]:
            past = [site for ended, site in ends if ended <= at]
            return _seen([s for s in past if not last[s].failed], round), [s for s in past if last[s].failed]

        instants = [ended for ended, _ in ends if ended <= opening.deadline]
        first = bisect_left(instants, True, key=lambda at: is_quorate(opening, until(at)[0]))
        since = instants[first] if first < len(instants) else None
        grace = self.recipe.durations.quorum_grace
        assert grace is not None

        def may(at: datetime) -> bool:
            found, gone = until(at)
            why = may_close(last.keys(), opening, found, given_up=gone, quorum_since=since, grace=grace, at=at)
            return why is not None

        happens = sorted({*instants, opening.deadline, *([since + grace] if since else [])})
        return happens[bisect_left(happens, True, key=may)]

    # -- a site
    def _course(self, site: SiteId, step: Step, work: Work, opening: Opening, bases: Sequence[int]) -> list[Flight]:
        """The attempts of `site` in the opening: first the one that is under way, if its update would count."""
        known = self.flights.get(site)
        if known and known.base in bases:
            course = [replace(known, attempt=0)]
        else:
            course = [self._attempt(site, step, work, opening, 1, opening.opened)]
        while (last := course[-1]).failed and last.until:
            jitter = _uniform(self.recipe.seed, step.round, step.phase, site, last.attempt, "pause")
            ended = max(last.until, opening.opened)
            again = next_attempt(self.recipe, opening, last.attempt, at=ended, jitter=jitter)
            if again is None:
                break
            course.append(self._attempt(site, step, work, opening, last.attempt + 1, again))
        return course

    def _attempt(self, site: SiteId, step: Step, work: Work, opening: Opening, attempt: int, at: datetime) -> Flight:
        """How an attempt goes that `site` is asked for at `at`. One that nobody stops ends with its opening, a heartbeat later."""
        most, heartbeat = self.recipe.durations.train_timeout, self.recipe.durations.heartbeat
        assert most and heartbeat
        begins = self._next_online(site, _second(at))
        if begins is None or (begun := _instant(begins)) >= opening.deadline:
            return Flight(step.round, attempt, at, None)
        conditions = self.trace.conditions(site, begins)
        seconds, failed = conditions.duration(work.steps, work.down, work.up), None
        dropped, when = (_uniform(self.recipe.seed, step.round, step.phase, site, attempt, n) for n in ("drop", "when"))
        if dropped < conditions.drop:
            seconds, failed = seconds * when, "dropped out"
        until_deadline = opening.deadline - begun + heartbeat
        left, whose = min((most, "train_timeout"), (until_deadline, f"the deadline of opening {opening.number}"))
        if seconds > left.total_seconds():
            seconds = left.total_seconds()
            failed = f"killed after {left} ({whose})"
        if self._online_until(site, begins, begins + seconds) < begins + seconds:
            return Flight(step.round, attempt, begun, None)
        return Flight(step.round, attempt, begun, _instant(begins + seconds), failed, seconds, work.overrides)

    def _next_online(self, site: SiteId, at: float) -> float | None:
        """The first second from `at` on at which the site is there; None where it never comes."""
        while not (period := self._period(site, at)).online:
            if period.end == math.inf:
                return None
            at = period.end
        return at

    def _online_until(self, site: SiteId, at: float, enough: float) -> float:
        """The second until which the site, which is there at `at`, stays; some second from `enough` on where that is later."""
        while at < enough and (period := self.trace.period(site, at)).online:
            at = period.end
        return at


def _second(at: datetime) -> float:
    """Of the run."""
    return (at - EPOCH).total_seconds()


def _instant(second: float) -> datetime:
    """The first instant, of whole microseconds, that is not before that second of the run."""
    return EPOCH + timedelta(microseconds=math.ceil(second * 1e6))


def _under_way(flight: Flight, at: datetime) -> bool:
    """Whether the attempt has begun and nobody knows what becomes of it."""
    return flight.begins <= at and not flight.ended(at)


def _uniform(*parts: str | int) -> float:
    """In [0, 1), from the parts alone."""
    return (derive_seed("clock", *parts) >> 10) / 2**53


def _seen(sites: Iterable[SiteId], round: int) -> Survey:
    return Survey(dict.fromkeys(sites, Contribution(key="", update="", base_round=round)), {})


# -- what is written down ----------------------------------------------------------------------------------------------
def noted_trace(journal: Journal, trace: Trace | None = None) -> Trace | None:
    """The trace of a run, which is written down at its start; None where it has none. trace: what it is to be.

    Raises RunExists where it is another one.
    """
    key = f"{journal.server}/trace.json"
    if trace is not None and not journal.committed():
        with contextlib.suppress(ObjectExists):
            journal.store.put(key, canonical_json(trace.model_dump(mode="json")))
    try:
        known = parse_trace(json.loads(journal.store.get(key)))
    except ObjectMissing:
        known = None
    if trace is None or (known is not None and known.model_dump(mode="json") == trace.model_dump(mode="json")):
        return known
    found = "without a trace" if known is None else "with another trace"
    raise RunExists(f"trace: found run {journal.run!r} {found}, expected this one; leave it out, or start a new run")


def note_flights(journal: Journal, step: Step, flights: Mapping[SiteId, Flight]) -> None:
    """Write down what is under way at a commit, before it."""
    if flights:
        told = {site: asdict(flight) for site, flight in flights.items()}
        for fields in told.values():
            fields |= {name: fields[name] and fields[name].isoformat() for name in _INSTANTS}
        with contextlib.suppress(ObjectExists):
            journal.store.put(_flights(journal, step.round, step.phase), canonical_json(told))


_INSTANTS = ("begins", "until")


def _flights(journal: Journal, round: int, phase: str) -> str:
    return f"{journal.server}/rounds/{round:05d}/{phase}/flights.json"
