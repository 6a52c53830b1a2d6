"""A round: plan, open, dispatch, collect, close, aggregate, evaluate, publish. The truth about it is in the store."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from prefect import flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.runtime import flow_run
from prefect.tasks import Task, exponential_backoff

from fedflow.engine.child import aggregate_in_child, evaluate_in_child
from fedflow.engine.logs import passed_on
from fedflow.engine.rounds import Step, next_step, open_round, survey
from fedflow.engine.summary import summarize_round
from fedflow.errors import QuorumLost, SiteError, StoreUnwritable, UserError
from fedflow.prefect.api import absent_sites, connect
from fedflow.prefect.artifacts import flat, publish_round, shown_if_possible
from fedflow.prefect.dispatch import Collector, Watched, send
from fedflow.recipe import Federation
from fedflow.store.journal import Journal
from fedflow.store.objects import ObjectStore
from fedflow.store.records import Manifest, Opening, Plan

RETRIES = 3


def journal_of(federation: Federation, run: str) -> Journal:
    """The run's journal in the federation's store."""
    if federation.store is None:
        raise UserError("federation.store: missing, expected the URL of the shared object store; give it a value")
    return Journal(ObjectStore(federation.store, federation.store_options), run)


def _name() -> str:
    given: dict[str, Any] = flow_run.parameters
    return f"{given['run']} · round {given['round']:03d}"


@flow(name="fedflow-round", flow_run_name=_name, description="One federated round.", persist_result=False)
def federated_round(
    run: str,
    round: int,
    federation: Federation,
    reopen: bool = False,
    why: str = "start",
    ends: datetime | None = None,
) -> None:
    """Hold `round` of `run` until it is committed; a committed one is left alone.

    reopen: under a new opening with a new deadline, keeping the updates that are there
    ends: when the run ends at the latest
    Raises QuorumLost where it cannot be committed; whatever was committed stays.
    """
    journal, log = journal_of(federation, run), get_run_logger()
    phases = journal.recipe().algorithm.phases
    while (step := next_step(journal, journal.recipe())) and step.round == round:
        plan, opening = plan_and_open(journal, federation, step, reopen=reopen, why=why, ends=ends)
        log.info(
            "%s: %d sites asked, quorum %d, opening %d until %s",
            step.phase,
            len(plan.tasks),
            plan.quorum,
            opening.number,
            f"{opening.deadline:%H:%M:%S} UTC",
        )
        for site, reason in plan.absent.items():
            log.warning("%s is left out: %s", site, reason)
        collect(journal, plan, opening, dispatch_all(journal, plan, opening))
        aggregate(journal, federation, plan, opening)
        reopen = False
    manifest = journal.manifest(round, phases[-1])
    if manifest is not None:
        evaluate(journal, federation, manifest)
        publish(journal, manifest)


# -- the steps, each idempotent ----------------------------------------------------------------------------------------
def _heals(task: Task[Any, Any], run: TaskRun, state: State[Any]) -> bool:
    """Whether trying again may help: not after a lost quorum or a mistake."""
    error = state.result(raise_on_failure=False)
    return not isinstance(error, (QuorumLost, SiteError, UserError, StoreUnwritable))


@task(
    task_run_name="plan {step.phase}",
    cache_policy=NO_CACHE,
    persist_result=False,
    retries=RETRIES,
    retry_delay_seconds=exponential_backoff(2),
    retry_jitter_factor=0.5,
    retry_condition_fn=_heals,
)
def plan_and_open(
    journal: Journal, federation: Federation, step: Step, *, reopen: bool, why: str, ends: datetime | None
) -> tuple[Plan, Opening]:
    """Plan, once; then an opening."""
    with connect() as client:
        absent = absent_sites(client, federation, journal.sites())
        return open_round(journal, step, absent=absent, reopen=reopen, why=why, ends=ends)


def dispatch_all(journal: Journal, plan: Plan, opening: Opening) -> dict[str, Watched]:
    """Send the work to every site whose update is not there, or attach again to what was sent."""
    if journal.closing(plan, opening.number) is not None:
        return {}
    sites = sorted(plan.tasks.keys() - survey(journal, plan).answered())
    sent = {a.site: 1 for a in journal.attempts(plan) if a.opening == opening.number}
    for a in journal.attempts(plan):
        if a.opening == opening.number:
            sent[a.site] = max(sent[a.site], a.attempt)
    return {site: _sent_to(journal, plan, opening, site, sent.get(site, 1)) for site in sites}


def _sent_to(journal: Journal, plan: Plan, opening: Opening, site: str, attempt: int) -> Watched:
    """The site's flow run; or why there is none, which is that site's matter and not the round's."""
    try:
        return Watched(attempt, dispatch(journal, plan, opening, site, attempt))  # type: ignore[arg-type]
    except SiteError as error:
        return Watched(attempt, None, gone=error.reason)


@task(
    task_run_name="dispatch {site}",
    cache_policy=NO_CACHE,
    persist_result=False,
    retries=2,
    retry_delay_seconds=exponential_backoff(2),
    retry_jitter_factor=0.5,
    retry_condition_fn=_heals,
)
def dispatch(journal: Journal, plan: Plan, opening: Opening, site: str, attempt: int) -> Any:
    """Start the site's flow run; returns its id at once."""
    return send(journal, plan, opening, site, attempt, training=flow_run.root_flow_run_id)


@task(task_run_name="collect", cache_policy=NO_CACHE, persist_result=False)
def collect(journal: Journal, plan: Plan, opening: Opening, sites: dict[str, Watched]) -> None:
    """Wait for updates until the round may close; freeze what counts; stop the rest."""
    log = get_run_logger()
    if (closing := journal.closing(plan, opening.number)) is None:
        with connect() as client:
            collector = Collector(
                journal, plan, opening, journal.recipe(), client, log, sites, training=flow_run.root_flow_run_id
            )
            try:
                closing = collector.run()
            finally:
                for name in collector.stop_stragglers():
                    log.warning("cancelled: %s", name)
    log.info("closed (%s) with %d updates", closing.why, len(closing.contributors))
    for site, reason in closing.excluded.items():
        log.warning("%s does not count: %s", site, reason)


@task(
    cache_policy=NO_CACHE,
    persist_result=False,
    retries=RETRIES,
    retry_delay_seconds=exponential_backoff(2),
    retry_jitter_factor=0.5,
    retry_condition_fn=_heals,
)
def aggregate(journal: Journal, federation: Federation, plan: Plan, opening: Opening) -> None:
    """Reduce, step the server's state, commit: in a child process that the timeout kills."""
    timeout = journal.recipe().timeouts.round_deadline.total_seconds()
    with passed_on(get_run_logger().log):
        aggregate_in_child(
            journal.store.url,
            dict(federation.store_options),
            journal.run,
            plan.round,
            plan.phase,
            opening.number,
            timeout=timeout,
        )


@task(
    cache_policy=NO_CACHE,
    persist_result=False,
    retries=RETRIES,
    retry_delay_seconds=exponential_backoff(2),
    retry_jitter_factor=0.5,
    retry_condition_fn=_heals,
)
def evaluate(journal: Journal, federation: Federation, manifest: Manifest) -> None:
    """The server's evaluation of the committed model, where the recipe has one."""
    recipe = journal.recipe()
    if recipe.evaluation is not None and journal.evaluation(manifest.round) is None:
        timeout = recipe.timeouts.round_deadline.total_seconds()
        evaluate_in_child(
            journal.store.url,
            dict(federation.store_options),
            journal.run,
            manifest.round,
            manifest.phase,
            timeout=timeout,
        )


@task(cache_policy=NO_CACHE, persist_result=False)
def publish(journal: Journal, manifest: Manifest) -> None:
    """The round's table in the UI, and a line in the log."""
    summary, plan = (
        summarize_round(journal, manifest.round, manifest.phase),
        journal.plan(manifest.round, manifest.phase),
    )
    with shown_if_possible():
        publish_round(journal.run, journal.recipe(), summary, asked=len(plan.tasks) if plan else 0)
    get_run_logger().info("committed %s: %s", manifest.model_digest, flat(summary.shown))
