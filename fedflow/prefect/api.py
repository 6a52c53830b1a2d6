"""The Prefect API as fedflow uses it: a client, tags, who is online, cancelling."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import Any
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterId,
    FlowRunFilterState,
    FlowRunFilterStateType,
    FlowRunFilterTags,
)
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.states import Cancelled, Cancelling

from fedflow.errors import UnreachableError
from fedflow.recipe import Federation
from fedflow.store.records import utc_now
from fedflow.types import SiteId

__all__ = ["ACTIVE", "OUTAGE", "absent_sites", "cancel", "connect", "find_runs", "read_runs", "run_tag", "training_tag"]

ACTIVE = [StateType.SCHEDULED, StateType.PENDING, StateType.RUNNING, StateType.PAUSED, StateType.CANCELLING]
OUTAGE = (httpx.HTTPError, OSError)
"""What the client raises while the API does not answer."""

WORKER_SILENCE = timedelta(seconds=95)
"""A worker that was silent for so long is offline: three of its heartbeats of 30 s, as the server counts."""


def run_tag(nonce: str) -> str:
    return f"run:{nonce}"


def training_tag(flow_run_id: UUID | str | None) -> str:
    return f"training:{flow_run_id}"


@contextlib.contextmanager
def connect(api_url: str | None = None, *, auth: str | None = None) -> Iterator[SyncPrefectClient]:
    """A client of that API, or of the one in the environment. Raises UnreachableError where nothing answers."""
    client = SyncPrefectClient(api=api_url, auth_string=auth) if api_url else get_client(sync_client=True)
    where = api_url or str(client.api_url)
    with client:
        if error := client.api_healthcheck():
            raise UnreachableError(
                f"Prefect API: found no answer at {where} ({error}), expected a server; start it, or correct PREFECT_API_URL"
            )
        yield client


def read_runs(client: SyncPrefectClient, ids: Iterable[UUID]) -> dict[UUID, FlowRun]:
    """Those flow runs, in requests of 200."""
    wanted, found = list(ids), {}
    for start in range(0, len(wanted), 200):
        part = wanted[start : start + 200]
        for run in client.read_flow_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=part)), limit=200):
            found[run.id] = run
    return found


def find_runs(client: SyncPrefectClient, *tags: str, states: list[StateType] = ACTIVE) -> list[FlowRun]:
    """Flow runs with all of `tags` in one of `states`."""
    wanted = FlowRunFilter(
        tags=FlowRunFilterTags(all_=list(tags)), state=FlowRunFilterState(type=FlowRunFilterStateType(any_=states))
    )
    found: list[FlowRun] = []
    while page := client.read_flow_runs(flow_run_filter=wanted, limit=200, offset=len(found)):
        found += page
    return found


def cancel(client: SyncPrefectClient, runs: Iterable[FlowRun], why: str, *, force: bool = False) -> list[str]:
    """Ask for every active run of `runs` to stop; names of those asked. One that has not started is cancelled at once.

    A round's own flow run lives in its coordinator's process: if that is gone nobody else ends it, so it ends here.
    force: end the others here too: their workers did not answer
    """
    names = []
    for run in runs:
        here = force or run.deployment_id is None
        if run.state_type in ACTIVE and (here or run.state_type != StateType.CANCELLING):
            with contextlib.suppress(ObjectNotFound):
                state: State[Any] = Cancelled(message=why) if here else Cancelling(message=why)
                client.set_flow_run_state(run.id, state, force=here)
                names.append(run.name)
    return names


def absent_sites(client: SyncPrefectClient, federation: Federation) -> dict[SiteId, str]:
    """Site -> why it cannot be asked: no pool, or no worker of it seen lately."""
    absent = {}
    for site in federation.sites:
        try:
            workers = client.read_workers_for_work_pool(site.work_pool)
        except PrefectHTTPStatusError as error:  # the client makes no ObjectNotFound of this one
            if error.response.status_code != 404:
                raise
            absent[site.name] = f"no work pool {site.work_pool!r}"
            continue
        seen = [w.last_heartbeat_time for w in workers if w.last_heartbeat_time is not None]
        if not seen:
            absent[site.name] = f"no worker on work pool {site.work_pool!r}"
        elif utc_now() - max(seen) > WORKER_SILENCE or all(str(w.status).endswith("OFFLINE") for w in workers):
            absent[site.name] = f"no worker on work pool {site.work_pool!r} since {max(seen):%Y-%m-%d %H:%M:%S} UTC"
    return absent
