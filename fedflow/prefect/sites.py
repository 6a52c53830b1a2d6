"""How the sites and regional aggregators of a federation are: who is there, what each runs, what became of its last rounds. As the Prefect API knows."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime

from prefect.artifacts import create_table_artifact
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import FlowFilter, FlowFilterName, FlowRunFilter, FlowRunFilterTags
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.responses import DeploymentResponse
from prefect.client.schemas.sorting import FlowRunSort

from fedflow.engine.starts import read_start
from fedflow.prefect.api import Taker, presence, taker
from fedflow.prefect.artifacts import artifact_key
from fedflow.prefect.dispatch import AGGREGATION_FLOW, SITE_FLOW
from fedflow.recipe import Federation, FederationSite
from fedflow.store.objects import ObjectStore
from fedflow.types import SiteId

__all__ = ["SiteStatus", "deployed_sites", "look", "publish_sites"]

LAST = 10
"""Flow runs of a site that are looked at."""
EVERY = 60.0
"""Seconds at least between two tables in the UI."""
PER_SITE = 3.0
"""And for each site: a table takes three requests a site, so that is one a second."""
LOOKERS = 4
"""Requests at a time."""

_FAILED = (StateType.FAILED, StateType.CRASHED)
_OVER = (StateType.COMPLETED, StateType.CANCELLED, *_FAILED)


@dataclass(frozen=True)
class SiteStatus:
    """One site, or regional aggregator.

    seen: its worker's last heartbeat; absent: why it cannot be asked, None where it can
    took: the newest of its flow runs that a worker took
    start: what its worker found wrong at its last start
    doing: the flow runs that it has now; rounds: how the last ones ended, the newest first; failures: how many failed of them
    """

    site: SiteId
    seen: datetime | None
    absent: str | None
    took: Taker | None
    start: str
    doing: tuple[str, ...]
    rounds: tuple[str, ...]
    failures: int

    def row(self) -> dict[str, str]:
        """Column -> what it shows."""
        return {
            "site": self.site,
            "worker": "there" if self.absent is None else self.absent,
            "last seen": f"{self.seen:%Y-%m-%d %H:%M:%S} UTC" if self.seen else "never",
            "runs": "; ".join(self.doing),
            "failures": f"{self.failures} of the last {LAST}" if self.failures else "",
            "last rounds": "; ".join(self.rounds),
            "at its start": self.start,
            "version": f"fedflow {self.took.fedflow}, Prefect {self.took.prefect}" if self.took else "",
            "machine": self.took.host if self.took else "",
        }


def deployed_sites(client: SyncPrefectClient) -> list[FederationSite]:
    """Every site and every regional aggregator that has a deployment on the server."""
    flow = FlowFilter(name=FlowFilterName(any_=[SITE_FLOW, AGGREGATION_FLOW]))
    found: list[DeploymentResponse] = []
    while page := client.read_deployments(flow_filter=flow, limit=200, offset=len(found)):
        found += page
    pools = {deployment.name: deployment.work_pool_name for deployment in found}
    return [FederationSite(name=name, pool=pool) for name, pool in sorted(pools.items())]


def look(
    client: SyncPrefectClient, sites: Sequence[FederationSite], store: ObjectStore | None = None
) -> list[SiteStatus]:
    """Each site, in three requests. store: where the sites leave word of their starts"""
    with ThreadPoolExecutor(LOOKERS) as pool:
        return list(pool.map(lambda site: _look(client, site, store), sites))


def _look(client: SyncPrefectClient, site: FederationSite, store: ObjectStore | None) -> SiteStatus:
    newest_first = FlowRunSort.EXPECTED_START_TIME_DESC
    ours = FlowRunFilter(tags=FlowRunFilterTags(all_=["fedflow"], any_=[f"site:{site.name}", f"workplace:{site.name}"]))
    runs = client.read_flow_runs(flow_run_filter=ours, sort=newest_first, limit=LAST)
    over = [run for run in runs if run.state_type in _OVER]
    took = next(
        (found for run in runs if run.state_type != StateType.SCHEDULED and (found := taker(client, run))), None
    )
    seen, absent = presence(client, site.work_pool)
    return SiteStatus(
        site=site.name,
        seen=seen,
        absent=absent,
        took=took,
        start=read_start(store, site.name) if store else "",
        doing=tuple(f"{run.name} ({run.state_name})" for run in runs if run.state_type not in _OVER),
        rounds=tuple(f"{run.name.removesuffix(f' · {site.name}')}: {_ended(run)}" for run in over[:3]),
        failures=sum(run.state_type in _FAILED for run in over),
    )


def _ended(run: FlowRun) -> str:
    message = " ".join((run.state.message or "").split()) if run.state and run.state_type in _FAILED else ""
    return f"{run.state_name}: {message[:120]}" if message else str(run.state_name)


_published: dict[str, float] = {}
"""Federation -> when its table was published, or first asked for."""


def publish_sites(client: SyncPrefectClient, federation: Federation, *, last: bool = False) -> None:
    """The table in the UI: once a minute, in a large federation less often, and at the end of a run."""
    since = time.monotonic() - _published.setdefault(federation.name, time.monotonic())
    if not last and since < max(EVERY, PER_SITE * len(federation.workplaces)):
        return
    _published[federation.name] = time.monotonic()
    store = ObjectStore(federation.store, federation.store_options) if federation.store else None
    rows = [status.row() for status in look(client, federation.workplaces, store)]
    absent = sum(row["worker"] != "there" for row in rows)
    counted = {"site": len(federation.sites), "region": len(federation.regions)}
    who = " and ".join(f"{n} {what}{'s' if n > 1 else ''}" for what, n in counted.items() if n)
    described = f"{federation.name}: {who}, {absent} absent"
    create_table_artifact(table=rows, key=artifact_key(federation.name, "sites"), description=described)
