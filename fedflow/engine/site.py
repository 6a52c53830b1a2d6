"""A site's step: train, write the update, then its manifest. May run twice, or be killed anywhere."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import resource
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from functools import partial
from typing import Any, cast

from torch import nn

from fedflow import __version__
from fedflow.algorithm import Algorithm
from fedflow.engine.audit import audited
from fedflow.engine.locks import held
from fedflow.engine.review import check_allowed
from fedflow.errors import (
    FedflowError,
    KeyEscapesRoot,
    ObjectCorrupt,
    ObjectExists,
    ObjectMissing,
    OpeningClosed,
    RecipeRefused,
    SignatureInvalid,
    SiteError,
    SiteStateLost,
    TrainingInvalid,
    UserError,
    field_error,
)
from fedflow.local.model import build_model
from fedflow.local.own import Registry, work_of
from fedflow.local.state import Memory, TrainingState
from fedflow.local.workload import Setup
from fedflow.memory import tidy_after
from fedflow.recipe import NAME, Recipe, SiteConfig
from fedflow.registry import call, resolve
from fedflow.store.journal import Journal
from fedflow.store.objects import ObjectStore
from fedflow.store.records import (
    Failure,
    Opening,
    Plan,
    SiteStateRecord,
    StateRecord,
    TaskRecord,
    UpdateManifest,
    finite,
    utc_now,
)
from fedflow.store.signing import Keys
from fedflow.store.state import read_state, write_state
from fedflow.store.tensors import StoredTensors, read_tensors, write_tensors
from fedflow.tensors import LazyGroups
from fedflow.types import RoundContext, SiteTask, Update

__all__ = [
    "PhaseWork",
    "SiteWork",
    "check_pinned",
    "failure_of",
    "hard_deadline",
    "killed_after",
    "site_journal",
    "site_step",
    "time_allowed",
]

_log = logging.getLogger(__name__)

Progress = Callable[[int, int | None], None]


@dataclass(frozen=True)
class PhaseWork:
    """What is asked of whom in one phase, as it is sent to them: names only, no URL, no path and no code.

    Raises UserError where it is something else: whoever may start flow runs may send what he likes.
    """

    run: str
    round: int
    phase: str

    def __post_init__(self) -> None:
        _check_sent("run", self.run, NAME)
        _check_sent("phase", self.phase, NAME)


@dataclass(frozen=True)
class SiteWork(PhaseWork):
    """One site's part in one phase.

    opening, attempt: which try this is; they decide no bit of the update
    after:   digest of the site's update that counted in this round: another one is asked for, from the same broadcast, that goes on from it
    """

    opening: int = 1
    attempt: int = 1
    after: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.after is not None:
            _check_sent("after", self.after, r"blake3:[0-9a-f]{64}")

    def task(self, plan: Plan, site: str) -> TaskRecord:
        """What is asked of `site`."""
        task = plan.tasks[site]
        if self.after is None:
            return task
        return task.model_copy(update={"state_base": self.after, "overrides": {**task.overrides, "again": 1}})


def _check_sent(field: str, found: str, pattern: str) -> None:
    if not re.fullmatch(pattern, found):
        raise UserError(field_error(field, found, f"what matches {pattern}", "start trainings with `fedflow run`"))


def site_step(
    work: SiteWork,
    config: SiteConfig,
    *,
    workload: Any = None,
    model: Callable[[], nn.Module] | None = None,
    progress: Progress = lambda done, planned: None,
    store: ObjectStore | None = None,
    unhurried: bool = False,
) -> UpdateManifest:
    """Do `work` at the site of `config`; the update is in the store when this returns.

    If it is there already, nothing is trained. Killed anywhere, a second call gives the same bytes. The site's state is
    written before the update's manifest, and under its digest, so that it counts if and only if the update does.

    workload, model: used in place of what the recipe names (for simulations in one process)
    progress: called after every optimizer step with (steps done, steps planned or None)
    unhurried: whether deadlines are of no matter here: no clock decides what a simulation's result is
    Raises OpeningClosed where the round went on meanwhile, SiteStateLost, ResolveError, SignatureInvalid where the coordinator
    did not sign the round, RecipeRefused where the site's owner did not approve it or it takes more steps than the site's limits
    allow, and whatever the training raises.
    """
    journal = site_journal(config, work, store)
    recipe = journal.recipe(config.context)
    check_allowed(recipe, config, work.run)
    assert recipe.durations.transfer_timeout
    root = journal.store.patient(recipe.durations.transfer_timeout)
    journal = Journal(root, work.run, journal.keys)
    check_pinned(journal, config)
    plan, opening = _plan_of(journal, work)
    if config.name not in plan.tasks:
        raise SiteError("this site is not in the round's cohort", run=work.run, round=work.round, site=config.name)
    states, task = _States(ObjectStore(config.state), plan), work.task(plan, config.name)
    with states.lock(config.name):
        found = _sent(journal, plan, opening, config.name, task)
        if found is not None:
            return found
        closes = None if unhurried else _ClosingWatch(journal, plan, opening, recipe.durations.heartbeat)
        if closes:
            closes.check()
        started = time.monotonic()

        def build() -> nn.Module:
            return build_model(recipe.model.path, recipe.model.args, seed=recipe.seed, allowed=config.allowed_imports)

        def on_step(done: int, planned: int | None) -> None:
            config.limits.check_steps(max(done, planned or 0))
            progress(done, planned)
            if closes:
                closes.step()

        memory = Memory(lambda: states.read_training(task.state_base))
        setup = Setup(model or build, recipe.training_at(config.name), recipe.numerics, on_step, memory)
        training = work_of(
            recipe.algorithm,
            _workload(recipe, config, journal) if workload is None else workload,
            setup,
            _tasks(config),
            config,
        )
        broadcast = _received(root, plan, recipe.memory_budget)
        update, state = _run_algorithm(recipe, broadcast, plan, config.name, task, states, training)
        config.limits.check_steps(update.steps)  # of code that tells of no step, or went on all the same
        update = replace(update, attempt=work.attempt)
        received = sum(plan.broadcast[group].size for group in broadcast.made)
        spent = {"seconds": time.monotonic() - started, "received": received}
        manifest = _send(journal, plan, opening, work, update, state, memory, states, spent)
    del training, setup, memory, broadcast, update, state
    tidy_after(plan.round, recipe.training_at(config.name).tidy_every)
    return manifest


def site_journal(config: SiteConfig, work: PhaseWork, store: ObjectStore | None = None) -> Journal:
    """The journal of a run as the site of `config` reads it, signs it, and remembers what it sends."""
    root = store or ObjectStore(config.store, config.store_options)
    return Journal(audited(root, config, work.run, work.round, work.phase), work.run, Keys.at(config))


def check_pinned(journal: Journal, config: SiteConfig) -> None:
    """Raises UserError where the run asks for the signature of another key than this site has."""
    pinned = journal.pins.get(config.name)
    if pinned is not None and pinned != journal.keys.public:
        expected = f"{pinned}, which the federation pins for {config.name}"
        fix = "have the coordinator pin this site's key (`fedflow site enroll` prints it), or restore the old one"
        raise UserError(field_error("key", journal.keys.public, expected, fix))


def _plan_of(journal: Journal, work: SiteWork) -> tuple[Plan, Opening]:
    plan = journal.plan(work.round, work.phase)
    opening = next((o for o in journal.openings(plan) if o.number == work.opening), None) if plan else None
    if plan is None or opening is None:
        raise SiteError(
            f"found no plan with opening {work.opening} of phase {work.phase!r}, expected the coordinator to have written it",
            run=work.run,
            round=work.round,
        )
    return plan, opening


def _workload(recipe: Recipe, config: SiteConfig, journal: Journal) -> Any:
    """The workload that the recipe names, as this site resolves it."""
    found = resolve(
        "workloads", recipe.workload.path, field="workload", aliases=config.workloads, allowed=config.allowed_imports
    )
    args = {**recipe.workload_args_at(config.name), **config.workload_args}
    return call(found, args, field="workload.args", site=config.name, sites=journal.sites())


def _tasks(config: SiteConfig) -> Registry:
    """The functions that this site offers to tasks."""
    return partial(resolve, "tasks", field="algorithm.function", aliases=config.tasks, allowed=config.allowed_imports)


def _sent(journal: Journal, plan: Plan, opening: Opening, site: str, task: TaskRecord) -> UpdateManifest | None:
    """This site's update for this task of the plan, if it was sent before and was not rejected."""
    for key in journal.store.list(journal.inbox(site, plan.round, plan.phase)):
        if key.endswith(".json") and key not in opening.rejected:
            with contextlib.suppress(ValueError, ObjectMissing, SignatureInvalid):
                manifest = journal.update(key)
                if manifest.plan == plan.digest() and manifest.state_base == task.state_base:
                    return manifest
    return None


def _run_algorithm(
    recipe: Recipe, broadcast: LazyGroups, plan: Plan, site: str, task: TaskRecord, states: _States, training: Any
) -> tuple[Update, Any]:
    algorithm = recipe.computation
    settings = SiteTask(task.steps, task.overrides).settings
    context = RoundContext.at(recipe.seed, plan.run, plan.round, plan.phase, site, plan.num_sites, settings)
    before = states.read(algorithm, task.state_base, site)
    state = algorithm.init_site(broadcast, training, context) if before is None else before
    update, after = algorithm.site_update(broadcast, state, training, context)
    return replace(update, state_base=task.state_base), after


def _received(root: ObjectStore, plan: Plan, budget: int) -> LazyGroups:
    """The broadcast, each group read when it is asked for; where all are larger than the budget, tensor by tensor out of the
    store, whenever one is asked for."""
    refs = plan.broadcast
    read = read_tensors if sum(ref.size for ref in refs.values()) <= budget else StoredTensors
    return LazyGroups(refs, lambda group: read(root, refs[group]))


def _send(
    journal: Journal,
    plan: Plan,
    opening: Opening,
    work: SiteWork,
    update: Update,
    state: Any,
    memory: Memory,
    states: _States,
    spent: Mapping[str, Any],
) -> UpdateManifest:
    """Objects, site state, manifest: in this order. What was rejected before is sent under another key, to be judged anew."""
    prefix = journal.inbox(update.site, plan.round, plan.phase)
    again = any(key.startswith(f"{prefix}/") for key in opening.rejected)
    kept = states.write_objects(state, memory.after)
    if not update.steps and memory.after is None:  # nothing was trained: what training remembers stays
        kept = states.continued(kept, update.state_base)
    manifest = UpdateManifest(
        run=plan.run,
        nonce=plan.nonce,
        site=update.site,
        round=plan.round,
        phase=plan.phase,
        plan=plan.digest(),
        state_base=update.state_base,
        examples=update.examples,
        steps=update.steps,
        lr_sum=update.lr_sum,
        groups={g: write_tensors(journal.store, prefix, t, heal=again) for g, t in update.tensors.items()},
        scalars=dict(update.scalars),
        metrics=finite(update.metrics),
        state=None if kept is None else kept.state_digest(),
        training_state=memory.note,
        opening=work.opening,
        attempt=work.attempt,
        **spent,
        peak_rss=max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        * 1024,
        numerics=dict(update.numerics),
        fedflow=__version__,
    )
    digest = manifest.update_digest()
    if kept is not None:
        states.write(kept.model_copy(update={"update": digest}))
    key = f"{prefix}/{digest.partition(':')[2]}.json"
    if key in opening.rejected:
        key = f"{key.removesuffix('.json')}-{opening.number}.json"
    with contextlib.suppress(ObjectExists):  # a zombie of this very attempt was quicker: its bytes are the same
        journal.put_update(key, manifest)
    states.prune()
    return manifest


class _States:
    """The site's own states of a run, by the digest of the update that they go with."""

    def __init__(self, store: ObjectStore, plan: Plan) -> None:
        self.store, self.plan = store, plan
        self.prefix = f"{plan.run}-{plan.nonce[:12]}"

    def read(self, algorithm: Algorithm, base: str | None, site: str) -> Any:
        """The state that goes with the accepted update `base`; None where there was none, or the algorithm keeps none, or lets
        a site that lost it begin anew."""
        if base is None or not algorithm.SiteState.__dataclass_fields__:
            return None
        key = self._key(base)
        try:
            record = SiteStateRecord.from_bytes(self.store.get(key))
            return read_state(self.store, algorithm.SiteState, record.state)
        except (ObjectMissing, ObjectCorrupt, ValueError) as error:
            lost = f"site state lost: expected the one written with update {base} in {self.store.url}/{key}, found: {error}"
            if algorithm.renewable:
                _log.warning("%s; the site begins anew", lost)
                return None
            raise SiteStateLost(
                f"{lost}; restore it from a copy", run=self.plan.run, round=self.plan.round, site=site
            ) from error

    def read_training(self, base: str | None) -> TrainingState | None:
        """What training kept with the accepted update `base`; None where there was none. Raises SiteError if it is lost."""
        if base is None:
            return None
        try:
            record = SiteStateRecord.from_bytes(self.store.get(self._key(base)))
            found = record.training
            return None if found is None else cast(TrainingState, read_state(self.store, TrainingState, found))
        except (ObjectMissing, ObjectCorrupt, ValueError, TypeError) as error:
            raise SiteError(f"training state lost: expected the one written with update {base}: {error}") from error

    def write_objects(self, state: Any, training: TrainingState | None) -> SiteStateRecord | None:
        """Write what the algorithm and the training remember; the record that will name it, or None if both have nothing."""
        prefix = f"{self.prefix}/objects"
        record = write_state(self.store, prefix, state)
        kept = None if training is None else write_state(self.store, prefix, training)
        if kept is None and not (record.tensors or record.scalars):
            return None
        return SiteStateRecord(update="", round=self.plan.round, phase=self.plan.phase, state=record, training=kept)

    def continued(self, record: SiteStateRecord | None, base: str | None) -> SiteStateRecord | None:
        """`record` with what training kept with the accepted update `base`, if it kept anything."""
        training = None
        if base is not None:
            with contextlib.suppress(ObjectMissing, ValueError):
                training = SiteStateRecord.from_bytes(self.store.get(self._key(base))).training
        if training is None:
            return record
        fresh = SiteStateRecord(update="", round=self.plan.round, phase=self.plan.phase, state=StateRecord())
        return (record or fresh).model_copy(update={"training": training})

    def write(self, record: SiteStateRecord) -> None:
        with contextlib.suppress(ObjectExists):
            self.store.put(self._key(record.update), record.to_bytes())

    def prune(self) -> None:
        """Delete states that the plan has made old: of earlier rounds than the one whose update it names."""
        named = {task.state_base for task in self.plan.tasks.values()}
        records = {}
        for key in self.store.list(f"{self.prefix}/state"):
            with contextlib.suppress(ValueError, ObjectMissing):
                records[key] = SiteStateRecord.from_bytes(self.store.get(key))
        oldest = min((r.round for r in records.values() if r.update in named), default=None)
        if oldest is None:
            return
        kept = {key: r for key, r in records.items() if r.round >= oldest}
        objects = {ref.key for r in kept.values() for ref in r.objects()}
        for key, record in records.items():
            if key not in kept:
                self.store.delete(key)
                for ref in record.objects():
                    if ref.key not in objects:
                        self.store.delete(ref.key)

    def _key(self, update: str) -> str:
        return f"{self.prefix}/state/{update.partition(':')[2]}.json"

    @contextlib.contextmanager
    def lock(self, site: str) -> Iterator[None]:
        """One trainer a (run, site): a second one on this machine waits; a killed one's lock is free at once."""
        name = hashlib.blake2b(f"{self.store.url} {self.prefix} {site}".encode(), digest_size=12).hexdigest()
        with held(name):
            yield


@dataclass
class _ClosingWatch:
    """Looks every `every` seconds whether the opening's deadline passed, or it closed and no late update counts, and then stops
    the training."""

    journal: Journal
    plan: Plan
    opening: Opening
    every: timedelta | None
    looked: float = field(default_factory=time.monotonic)

    def step(self) -> None:
        assert self.every is not None  # durations are resolved
        if time.monotonic() - self.looked >= self.every.total_seconds():
            self.looked = time.monotonic()
            self.check()

    def check(self, at: datetime | None = None) -> None:
        place = {"run": self.plan.run, "round": self.plan.round}
        if (at or utc_now()) >= self.opening.deadline:
            raise OpeningClosed(f"the deadline of opening {self.opening.number} passed", **place)  # type: ignore[arg-type]
        if self.plan.late == "drop" and self.journal.is_closed(self.plan, self.opening.number):
            raise OpeningClosed(f"opening {self.opening.number} was closed without this site", **place)  # type: ignore[arg-type]


# -- when it fails -----------------------------------------------------------------------------------------------------
def failure_of(work: SiteWork, site: str, error: BaseException) -> Failure:
    """`error` as the site tells the coordinator: its reason, its traceback where fedflow did not foresee it."""
    foreseen = isinstance(error, FedflowError)
    return Failure(
        site=site,
        round=work.round,
        phase=work.phase,
        opening=work.opening,
        attempt=work.attempt,
        reason=(error.reason if isinstance(error, FedflowError) else f"{type(error).__name__}: {error}")[:2000],
        traceback="" if foreseen else "".join(traceback.format_exception(error))[-20_000:],
        heals=not isinstance(
            error,
            (UserError, SiteStateLost, TrainingInvalid, OpeningClosed, KeyEscapesRoot, SignatureInvalid, RecipeRefused),
        ),
    )


@contextlib.contextmanager
def hard_deadline(work: SiteWork, config: SiteConfig) -> Iterator[None]:
    """Kill this process, after saying why in the store, if the body outlives train_timeout, the site's own limit or the opening's deadline.

    A thread with a timer, and SIGKILL; should that thread not get to run, the kernel's alarm clock a little later. No
    handler in the training code keeps it alive.
    """
    journal = site_journal(config, work)
    _, opening = _plan_of(journal, work)
    recipe = journal.recipe(config.context)
    assert recipe.durations.heartbeat
    allowed, whose = time_allowed(recipe, config)
    until_deadline = opening.deadline - utc_now() + recipe.durations.heartbeat
    left, whose = min((allowed, whose), (until_deadline, f"the deadline of opening {work.opening}"))

    def expire() -> None:
        error: FedflowError = SiteError(f"killed after {left} ({whose})")
        if left == config.limits.time:  # another attempt would take as long
            error = RecipeRefused(f"{error.reason}; let a round take less, or ask the site's owner")
        try:
            journal.put_failure(failure_of(work, config.name, error))
        finally:
            own = os.getpid()
            (os.killpg if os.getpgrp() == own else os.kill)(own, signal.SIGKILL)  # with what a trainer has started

    with killed_after(left, expire):
        yield


def time_allowed(recipe: Recipe, config: SiteConfig) -> tuple[timedelta, str]:
    """How long a training or an aggregation of `recipe` may take at the site of `config`, and who says so."""
    timeout, limit = recipe.durations.train_timeout, config.limits.time
    assert timeout
    return (timeout, "train_timeout") if limit is None or timeout < limit else (limit, "this site's limits.time")


@contextlib.contextmanager
def killed_after(limit: timedelta, expire: Callable[[], None]) -> Iterator[None]:
    """Have a thread call `expire`, which is to kill this process, if the body outlives `limit`; or the kernel a little later."""
    timer = threading.Timer(max(limit.total_seconds(), 0.1), expire)
    timer.daemon = True
    timer.start()
    with _alarm(timer.interval + ALARM_AFTER):
        try:
            yield
        finally:
            timer.cancel()


ALARM_AFTER = 30.0  # seconds that the timer's thread has to say why, before the kernel ends the process without a word


@contextlib.contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    """SIGALRM, whose default action needs no interpreter: for a body in C that never lets another thread run."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
