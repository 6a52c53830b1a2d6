"""A run: rounds until the recipe is done, each a flow run of its own."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any
from uuid import UUID

from prefect import Flow, flow, get_run_logger, runtime, tags
from prefect.client.schemas.objects import FlowRun, State

from fedflow.engine.child import start_in_child, warm_up
from fedflow.engine.logs import passed_on
from fedflow.engine.rounds import amend_run, next_step, record_abort, recording_outcome
from fedflow.engine.starts import publish_federation
from fedflow.engine.summary import summarize
from fedflow.errors import FedflowError, RoundError
from fedflow.flows.round import evaluate, federated_round, journal_of
from fedflow.memory import tidy_after
from fedflow.prefect.api import absent_sites, cancel, connect, connected, find_runs, run_tag, training_tag
from fedflow.prefect.artifacts import Progress, publish_report, shown_if_possible
from fedflow.prefect.deploy import TRAINING_FLOW
from fedflow.prefect.sites import publish_sites
from fedflow.recipe import Federation, Recipe
from fedflow.store.journal import Journal
from fedflow.store.records import utc_now


def _run_id() -> str:
    """The run's name: as given, or the recipe's with the beginning of this flow run's id."""
    return _named(runtime.flow_run.parameters, runtime.flow_run.id)


def _named(parameters: dict[str, Any], flow_run_id: object) -> str:
    recipe = parameters["recipe"]
    name = recipe.name if isinstance(recipe, Recipe) else recipe["name"]
    return str(parameters.get("run_id") or f"{name[:54]}-{str(flow_run_id)[:8]}")


def _stop_children(flow: Flow[Any, Any], flow_run: FlowRun, state: State[Any]) -> None:
    """However this flow run ends: nothing that it started at a site goes on."""
    with connect() as client:
        cancel(client, find_runs(client, training_tag(flow_run.id)), f"its training {flow_run.name} ended {state.name}")


def _record_abort(flow: Flow[Any, Any], flow_run: FlowRun, state: State[Any]) -> None:
    """A person cancelled: say so in the journal too."""
    federation = Federation.model_validate(flow_run.parameters["federation"])
    journal = journal_of(federation, _named(flow_run.parameters, flow_run.id))
    record_abort(journal, state.message or "cancelled")


@flow(
    name=TRAINING_FLOW,
    flow_run_name=_run_id,
    description="A federated training: a recipe over a federation, round by round, from wherever it stands.",
    persist_result=False,
    result_serializer="json",
    on_cancellation=[_stop_children, _record_abort],
    on_crashed=[_stop_children],
    on_failure=[_stop_children],
    on_completion=[_stop_children],  # late updates that no round is left to count
)
def training(recipe: Recipe, federation: Federation, run_id: str | None = None) -> None:
    """Train `recipe` over the sites of `federation`; a run of that id is continued from its last committed round.

    run_id: names the run; default: the recipe's name and a number
    Fails where the recipe cannot be trained as asked; what was committed stays, and the same call goes on from there.
    """
    log = get_run_logger()
    run = _run_id()
    journal = begin(recipe, federation, run)
    mark_as_training(journal)
    with (
        sites_shown(federation),
        recording_outcome(journal),
        tags("fedflow", run_tag(journal.record().nonce), training_tag(runtime.flow_run.id)),
    ):
        resumed = not is_retry()
        ends = end_of(journal.recipe())
        warm_up(*recipe.server_modules())
        sweep_orphans(journal)
        wait_for_sites(journal, federation)
        catch_up(journal, federation)
        progress = Progress(run)
        while step := next_step(journal, journal.recipe()):
            if ends is not None and utc_now() >= ends:
                raise RoundError(
                    f"run_timeout passed before round {step.round}; give the run longer and resume", run=run
                )
            progress.show(journal.recipe(), step.round)
            with tags(f"round:{step.round}"):
                why = "resume" if resumed else "start"
                federated_round(run, step.round, federation, reopen=resumed, why=why, ends=ends)
            resumed = False
            tidy_after(step.round, journal.recipe().training.tidy_every)
        progress.show(journal.recipe(), journal.recipe().rounds)
        summary = summarize(journal)
        with shown_if_possible():
            publish_report(summary)
    log.info("finished after %d rounds: %s", len(summary.rounds), summary.model_digest)


@contextmanager
def sites_shown(federation: Federation) -> Iterator[None]:
    """The UI has the sites as they are when the body ends, also where it fails."""

    def show() -> None:
        with shown_if_possible(), connected() as client:
            publish_sites(client, federation, last=True)

    try:
        yield
    except FedflowError:
        show()
        raise
    show()


def begin(recipe: Recipe, federation: Federation, run: str) -> Journal:
    """The run's journal: begun, or found and amended. A retry of this very flow run asks for nothing new."""
    place = journal_of(federation, run)
    if is_retry():
        return place
    warm_up(*recipe.server_modules())
    options, timeout = dict(federation.store_options), recipe.timeouts.round_deadline.total_seconds()
    with passed_on(get_run_logger().log):
        start_in_child(place.store.url, options, run, recipe, federation.names, federation.public_keys, timeout=timeout)
    publish_federation(place.store, federation)
    amend_run(place, recipe, sites=federation.names, keys=federation.public_keys)
    return place


def is_retry() -> bool:
    """Whether this flow run was started before: by its own retries, or by the button in the UI."""
    return bool(runtime.flow_run.run_count > 1)


def end_of(recipe: Recipe) -> datetime | None:
    """When this start of the run ends at the latest."""
    return utc_now() + recipe.timeouts.run_timeout if recipe.timeouts.run_timeout else None


def catch_up(journal: Journal, federation: Federation) -> None:
    """Evaluate the newest round, where a coordinator was killed right after its commit."""
    phases = journal.recipe().phases
    head = journal.head(phases)
    if head is not None and head.phase == phases[-1] and journal.recipe().evaluation is not None:
        evaluate(journal, federation, head)


def mark_as_training(journal: Journal) -> None:
    """Tag this flow run as others look for it: one that a schedule or a form started has no tags yet."""
    wanted = {"fedflow", "training", run_tag(journal.record().nonce)}
    if not wanted <= set(runtime.flow_run.tags):
        with connected() as client:
            client.update_flow_run(UUID(runtime.flow_run.id), tags=sorted({*runtime.flow_run.tags, *wanted}))


def sweep_orphans(journal: Journal) -> None:
    """Stop what earlier coordinators of this run, which have ended, left running for rounds that are over."""
    step = next_step(journal, journal.recipe())
    current = f"round:{step.round}" if step else ""
    with connected() as client:
        ours = find_runs(client, run_tag(journal.record().nonce))
        alive = {training_tag(r.id) for r in ours if "training" in r.tags} - {training_tag(runtime.flow_run.id)}
        rounds = [r for r in ours if any(tag.startswith("round:") for tag in r.tags)]
        dead = [r for r in rounds if r.deployment_id is None or current not in r.tags]
        cancel(client, [r for r in dead if not alive & set(r.tags)], "left over from an earlier start")


def wait_for_sites(journal: Journal, federation: Federation) -> None:
    """Give the sites' workers `wait_for_sites` to appear. Who is absent then is the round's matter."""
    log = get_run_logger()
    until = time.monotonic() + journal.recipe().wait_for_sites.total_seconds()
    told: set[str] = set()
    regional = journal.recipe().schedule.regional
    with connected() as client:
        while (absent := absent_sites(client, federation, journal.sites(), regional)) and time.monotonic() < until:
            for site in sorted(absent.keys() - told):
                log.info("waiting for %s: %s", site, absent[site])
            told |= absent.keys()
            time.sleep(1)
