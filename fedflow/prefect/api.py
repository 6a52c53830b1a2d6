"""The Prefect API as fedflow uses it: a client, tags, who is online, cancelling."""

from __future__ import annotations

import contextlib
import math
import re
import socket
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import httpx
import prefect
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

from fedflow import __version__
from fedflow.errors import UnreachableError
from fedflow.recipe import Federation
from fedflow.store.records import utc_now
from fedflow.types import SiteId

__all__ = [
    "ACTIVE",
    "OUTAGE",
    "Taker",
    "absence",
    "absent_sites",
    "cancel",
    "connect",
    "connected",
    "find_runs",
    "presence",
    "read_runs",
    "run_tag",
    "taker",
    "training_tag",
]

ACTIVE = [StateType.SCHEDULED, StateType.PENDING, StateType.RUNNING, StateType.PAUSED, StateType.CANCELLING]
OUTAGE = (httpx.HTTPError, OSError)
"""What the client raises while the API does not answer."""

WORKER_SILENCE = timedelta(seconds=95)
"""A worker that was silent for so long is offline: three of its heartbeats of 30 s, as the server counts."""


_CLAIM = re.compile(r"taken on (?P<host>\S+) by fedflow (?P<fedflow>\S+), Prefect (?P<prefect>\S+)")


@dataclass(frozen=True)
class Taker:
    """Who took a flow run: its machine, and the versions there. A worker says so in the state that it proposes."""

    host: str
    fedflow: str
    prefect: str

    @classmethod
    def here(cls) -> Taker:
        """This process."""
        return cls(socket.gethostname(), __version__, prefect.__version__)

    @classmethod
    def among(cls, states: Iterable[State[Any]]) -> Taker | None:
        """Who took a flow run with these states last; None where none of fedflow's workers did."""
        found = [match for state in states if (match := _CLAIM.match(state.message or ""))]
        return cls(**found[-1].groupdict()) if found else None

    def __str__(self) -> str:
        return f"taken on {self.host} by fedflow {self.fedflow}, Prefect {self.prefect}"

    def differs(self) -> str | None:
        """What is to be said where this process has another fedflow; None where it has the same."""
        if self.fedflow == __version__:
            return None
        return f"found fedflow {self.fedflow} there and {__version__} here, expected one version everywhere; install the same"


def taker(client: SyncPrefectClient, run: FlowRun) -> Taker | None:
    """Who took that flow run; None where none of fedflow's workers did."""
    return Taker.among(client.read_flow_run_states(run.id))


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
        try:
            client.api_version()  # healthy is also who does not let us in
        except PrefectHTTPStatusError as refusal:
            code = refusal.response.status_code
            fix = "set PREFECT_API_AUTH_STRING" if code in (401, 403) else "see the server's log"
            raise UnreachableError(
                f"Prefect API: found the answer {code} at {where}, expected access; {fix}"
            ) from refusal
        yield client


@contextlib.contextmanager
def connected() -> Iterator[SyncPrefectClient]:
    """The client of the flow that runs here; whether the API answers, the next request shows."""
    with get_client(sync_client=True) as client:
        yield client


def read_runs(
    client: SyncPrefectClient, ids: Iterable[UUID], states: list[StateType] | None = None
) -> dict[UUID, FlowRun]:
    """Those flow runs, in requests of 200; where `states` are given, those in one of them."""
    wanted, found = list(ids), {}
    state = FlowRunFilterState(type=FlowRunFilterStateType(any_=states)) if states else None
    for start in range(0, len(wanted), 200):
        part = FlowRunFilter(id=FlowRunFilterId(any_=wanted[start : start + 200]), state=state)
        for run in client.read_flow_runs(flow_run_filter=part, limit=200):
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


def absent_sites(
    client: SyncPrefectClient, federation: Federation, sites: Iterable[SiteId] = (), regional: Iterable[str] = ()
) -> dict[str, str]:
    """Site, or one of those regional aggregators -> why it cannot be asked: no pool, or no worker of it seen lately.

    sites: others that the run knows
    """
    wanted = set(regional)
    regions = [region for region in federation.regions if region.name in wanted]
    absent = dict.fromkeys(set(sites) - set(federation.names), "not in the federation any more")
    absent |= dict.fromkeys(wanted - {region.name for region in regions}, "not among the federation's regions")
    at = str(client.api_url)
    members = (*federation.sites, *regions)
    unknown = [m for m in members if time.monotonic() - _present.get((at, m.work_pool), -math.inf) >= FRESH]
    with ThreadPoolExecutor(ASKERS) as pool:
        found = pool.map(lambda member: absence(client, member.work_pool), unknown)
        for member, why in zip(unknown, found, strict=True):
            if why:
                absent[member.name] = why
            else:
                _present[at, member.work_pool] = time.monotonic()
    return absent


ASKERS = 4  # requests at a time
FRESH = 10.0  # seconds for which a worker that was there is taken to be there
_present: dict[tuple[str, str], float] = {}
"""API and work pool -> when a worker of it was found there. Short rounds need not ask again and again."""


def absence(client: SyncPrefectClient, pool: str) -> str | None:
    """Why nobody works on that pool; None where somebody does."""
    return presence(client, pool)[1]


def presence(client: SyncPrefectClient, pool: str) -> tuple[datetime | None, str | None]:
    """When a worker of that pool was last seen, and why nobody works on it; None where somebody does."""
    try:
        workers = client.read_workers_for_work_pool(pool)
    except PrefectHTTPStatusError as error:  # the client makes no ObjectNotFound of this one
        if error.response.status_code != 404:
            raise
        return None, f"no work pool {pool!r}"
    seen = [w.last_heartbeat_time for w in workers if w.last_heartbeat_time is not None]
    if not seen:
        return None, f"no worker on work pool {pool!r}"
    last = max(seen)
    if utc_now() - last > WORKER_SILENCE or all(str(w.status).endswith("OFFLINE") for w in workers):
        return last, f"no worker on work pool {pool!r} since {last:%Y-%m-%d %H:%M:%S} UTC"
    return last, None
