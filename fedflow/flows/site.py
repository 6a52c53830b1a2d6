"""At a site: local training for one phase of one round."""

from __future__ import annotations

import time

from prefect import flow, get_run_logger
from prefect.client.schemas.objects import State
from prefect.states import Cancelled, Completed

from fedflow.engine.logs import passed_on
from fedflow.engine.site import SiteWork, failure_of, hard_deadline, site_journal, site_step
from fedflow.errors import OpeningClosed, SiteError
from fedflow.prefect.artifacts import flat
from fedflow.prefect.dispatch import SITE_FLOW
from fedflow.recipe import SiteConfig


@flow(
    name=SITE_FLOW,
    description="Local training at a site, for one round.",
    persist_result=False,
    result_serializer="json",
)
def local_training(
    run: str, round: int, phase: str, opening: int, attempt: int, site: str, after: str | None = None
) -> State[None]:
    """Train as the plan says and put the update into the store. The site's own configuration decides where and on what.

    after: the site's update of this round that counts; another one is asked for

    Returns nothing but a state: what counts is the update's manifest. A failure is written into the store with its
    traceback before the flow run fails.
    """
    log = get_run_logger()
    config = SiteConfig.here()
    if site != config.name:
        raise SiteError(f"site: found {site!r}, expected {config.name!r}, who I am; correct the deployment's work pool")
    work = SiteWork(run, round, phase, opening, attempt, after)
    reported = time.monotonic()

    def progress(done: int, planned: int | None) -> None:
        nonlocal reported
        if time.monotonic() - reported >= 10:
            reported = time.monotonic()
            log.info("step %d%s", done, f" of {planned}" if planned else "")

    try:
        with hard_deadline(work, config), passed_on(log.log):
            update = site_step(work, config, progress=progress)
    except OpeningClosed as error:
        return Cancelled(message=str(error))
    except BaseException as error:
        site_journal(config, work).put_failure(failure_of(work, site, error))
        raise
    log.info(
        "%d steps on %d examples in %.1f s: %s", update.steps, update.examples, update.seconds, flat(update.metrics)
    )
    return Completed(message=f"update {update.update_digest()}")
