"""At a site, or at a regional aggregator: a share of a round's aggregation."""

from __future__ import annotations

from prefect import flow, get_run_logger
from prefect.client.schemas.objects import State
from prefect.states import Completed

from fedflow.engine.elsewhere import ShareWork, aggregation_step, time_limit
from fedflow.engine.logs import passed_on
from fedflow.errors import SiteError
from fedflow.prefect.dispatch import AGGREGATION_FLOW
from fedflow.recipe import SiteConfig


@flow(
    name=AGGREGATION_FLOW,
    description="A share of a round's aggregation.",
    persist_result=False,
    result_serializer="json",
)
def aggregation(run: str, round: int, phase: str, opening: int, share: str, workplace: str) -> State[None]:
    """Reduce the updates that count, as the plan says, and put what comes of it into the store, below this workplace's prefix.

    share: "round" for all of it, or "region-<name>". Returns nothing but a state: what counts is the record in the store.
    """
    log = get_run_logger()
    config = SiteConfig.here()
    if workplace != config.name:
        expected = f"{config.name!r}, who I am"
        raise SiteError(f"workplace: found {workplace!r}, expected {expected}; correct the deployment's work pool")
    work = ShareWork(run, round, phase, opening, share)
    with time_limit(work, config), passed_on(log.log):
        reduced = aggregation_step(work, config)
    for site, reason in reduced.invalid.items():
        log.warning("%s: its update cannot count: %s", site, reason)
    log.info("aggregated in %.1f s", reduced.seconds)
    return Completed(message=f"aggregated {reduced.of}")
