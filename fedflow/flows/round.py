"""A round: plan, open, dispatch, collect, close, aggregate, evaluate, publish. The truth about it is in the store."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import Any
from uuid import UUID

from prefect import flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.context import TagsContext
from prefect.runtime import flow_run
from prefect.tasks import Task, exponential_backoff

from fedflow.engine.child import aggregate_in_child, evaluate_in_child
from fedflow.engine.logs import passed_on
from fedflow.engine.results import excluded_in, outlined, result_of
from fedflow.engine.rounds import Step, next_step, open_round, survey
from fedflow.engine.rounds import delegate as engine_delegate
from fedflow.engine.starts import with_start
from fedflow.engine.summary import summarize_round
from fedflow.errors import QuorumLost, SiteError, StoreUnwritable, UserError
from fedflow.prefect.api import absent_sites, cancel, connected
from fedflow.prefect.artifacts import flat, publish_result, publish_round, shown_if_possible
from fedflow.prefect.delegation import Delegation
from fedflow.prefect.dispatch import Collector, Origin, Watched, at_work, send
from fedflow.prefect.sites import publish_sites
from fedflow.recipe import Federation
from fedflow.store.journal import Journal
from fedflow.store.objects import ObjectStore
from fedflow.store.records import Manifest, Opening, Plan
from fedflow.store.signing import Keys

RETRIES = 3
SENDERS = 4  # requests at a time


def journal_of(federation: Federation, run: str) -> Journal:
    """The run's journal in the federation's store. Raises UserError where the coordinator's key is not the federation's."""
    if federation.store is None:
        raise UserError("federation.store: missing, expected the URL of the shared object store; give it a value")
    keys = Keys.here(federation.coordinator_key)
    return Journal(ObjectStore(federation.store, federation.store_options), run, keys)


def _name() -> str:
    given: dict[str, Any] = flow_run.parameters
    return f"{given['run']} · round {given['round']:03d}"


@flow(
    name="fedflow-round",
    flow_run_name=_name,
    description="One federated round.",
    persist_result=False,
    result_serializer="json",
)
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
    with TagsContext(current_tags=set()):  # tags are the flow run's: a task with tags asks the API whether it may run
        _hold(run, round, federation, reopen, why, ends)


def _hold(run: str, round: int, federation: Federation, reopen: bool, why: str, ends: datetime | None) -> None:
    journal, log = journal_of(federation, run), get_run_logger()
    phases = journal.recipe().phases
    while (step := next_step(journal, journal.recipe())) and step.round == round:
        plan, opening, late = plan_and_open(journal, federation, step, reopen=reopen, why=why, ends=ends)
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
        collect(journal, plan, opening, dispatch(journal, plan, opening, late))
        if plan.aggregators or plan.regions:
            delegate(journal, federation, plan, opening)
        aggregate(journal, federation, plan, opening)
        reopen = False
    manifest = journal.manifest(round, phases[-1])
    if manifest is not None:
        if journal.recipe().evaluation is not None:
            evaluate(journal, federation, manifest)
        publish(journal, federation, manifest)


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
) -> tuple[Plan, Opening, dict[str, UUID]]:
    """Plan, once; then an opening; and the flow runs of sites that still make an update of an earlier round, which counts.

    Those of sites whose update would not count any more are cancelled.
    """
    before = journal.plan(step.round - 1, step.phase) if step.round else None
    with connected() as client:
        absent = absent_sites(client, federation, journal.sites(), journal.recipe().schedule.regional)
        absent = {site: with_start(reason, journal.store, site) for site, reason in absent.items()}
        late = at_work(client, journal.record().nonce, step.round) if before and before.late == "carry" else {}
        asked_again = journal.attempts(before) if before and before.again else []
        bases = {a.site: step.round - 1 for a in asked_again if a.attempt == 0}
        bases |= {site: base for site, (base, _) in late.items()}
        plan, opening = open_round(journal, step, absent=absent, at_work=bases, reopen=reopen, why=why, ends=ends)
        outdated = [run for base, run in late.values() if base not in plan.accept_bases]
        cancel(client, outdated, f"round {step.round} does not count updates that are so old")
    return plan, opening, {site: run.id for site, (base, run) in late.items() if base in plan.accept_bases}


@task(
    cache_policy=NO_CACHE,
    persist_result=False,
    retries=2,
    retry_delay_seconds=exponential_backoff(2),
    retry_jitter_factor=0.5,
    retry_condition_fn=_heals,
)
def dispatch(journal: Journal, plan: Plan, opening: Opening, late: dict[str, UUID]) -> dict[str, Watched]:
    """Start a flow run at every site whose update is not there, or attach again to what was sent; at once.

    late: to what is under way for earlier rounds
    """
    if journal.closing(plan, opening.number) is not None:
        return {}
    sites = sorted(plan.tasks.keys() - survey(journal, plan).answered())
    sent: dict[str, int] = {}
    for a in journal.attempts(plan):
        if a.opening == opening.number and a.attempt:
            sent[a.site] = max(sent.get(a.site, 1), a.attempt)
    origin = Origin.here()
    with connected() as client:

        def send_to(site: str) -> Watched:
            attempt = sent.get(site, 1)
            if site in late and site not in sent:
                return Watched(0, late[site])
            try:
                return Watched(attempt, send(client, journal, plan, opening, site, attempt, origin))
            except SiteError as error:  # that site's matter, and not the round's
                return Watched(attempt, None, gone=error.reason)

        with ThreadPoolExecutor(SENDERS) as pool:
            return dict(zip(sites, pool.map(send_to, sites), strict=True))


@task(task_run_name="collect", cache_policy=NO_CACHE, persist_result=False)
def collect(journal: Journal, plan: Plan, opening: Opening, sites: dict[str, Watched]) -> None:
    """Wait for updates until the round may close; freeze what counts; stop the rest, unless it may still count later."""
    log = get_run_logger()
    if (closing := journal.closing(plan, opening.number)) is None:
        with connected() as client:
            collector = Collector(journal, plan, opening, journal.recipe(), client, log, sites, Origin.here())
            stop = True
            try:
                closing = collector.run()
                stop = plan.late == "drop"
            finally:
                for name in collector.stop_stragglers() if stop else ():
                    log.warning("cancelled: %s", name)
    log.info("closed (%s) with %d updates", closing.why, len(closing.contributors))
    for site, reason in closing.excluded.items():
        log.warning("%s does not count: %s", site, reason)


@task(cache_policy=NO_CACHE, persist_result=False)
def delegate(journal: Journal, federation: Federation, plan: Plan, opening: Opening) -> None:
    """Have sites and regional aggregators do what of the aggregation is theirs."""
    closing = journal.closing(plan, opening.number)
    assert closing is not None
    with connected() as client:
        delegation = Delegation(journal, plan, journal.recipe(), federation, client, get_run_logger(), Origin.here())
        engine_delegate(journal, plan, closing, delegation.have_done)


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
    """The server's evaluation of the committed model."""
    recipe = journal.recipe()
    if journal.evaluation(manifest.round) is None:
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
def publish(journal: Journal, federation: Federation, manifest: Manifest) -> None:
    """The round's table in the UI, that of the sites, and a line in the log."""
    summary, plan = (
        summarize_round(journal, journal.recipe(), manifest.round),
        journal.plan(manifest.round, manifest.phase),
    )
    with shown_if_possible():
        publish_round(journal.run, journal.recipe(), summary, asked=len(plan.tasks) if plan else 0)
        if found := result_of(journal, manifest):
            page = journal.recipe().algorithm.page(found, journal.sites(), excluded_in(journal))
            publish_result(journal.run, manifest.round, page, outlined(found))
    with shown_if_possible(), connected() as client:
        publish_sites(client, federation)
    where = f", aggregated at {manifest.aggregator}" if manifest.aggregator else ""
    get_run_logger().info("committed %s%s: %s", manifest.model_digest, where, flat(summary.shown))
