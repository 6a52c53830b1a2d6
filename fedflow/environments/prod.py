"""ProdEnv: your Prefect server, your store, your work pools."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Self
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterTags, LogFilter, LogFilterFlowRunId
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.sorting import FlowRunSort, LogSort
from prefect.exceptions import ObjectNotFound
from prefect.states import Crashed

from fedflow.engine import amend_run, start_run
from fedflow.engine.starts import publish_federation
from fedflow.environments.base import DEFAULT_HOME, Run
from fedflow.environments.local import new_run_id, remember
from fedflow.errors import UnreachableError, UserError
from fedflow.prefect.api import ACTIVE, OUTAGE, absence, cancel, connect, find_runs, run_tag
from fedflow.prefect.deploy import deploy_federation, training_deployment
from fedflow.recipe import Federation, Recipe
from fedflow.store.journal import Journal
from fedflow.store.objects import ObjectStore
from fedflow.store.signing import Keys

__all__ = ["ProdEnv"]

STOPPING = (
    60.0  # seconds that workers have to stop what is aborted; a trainer whose worker is gone ends at its deadline
)


class ProdEnv:
    """Runs over `federation` on the Prefect server at `api_url` (default: the one that Prefect's settings name).

    store: URL of the shared object store; default: the federation's. home: where started runs are remembered.
    """

    kind = "prod"
    site_type = "fedflow-site"
    """Of the work pools that `deploy` makes for the sites."""

    def __init__(
        self,
        federation: Federation,
        *,
        store: str | None = None,
        home: str | Path = DEFAULT_HOME,
        api_url: str | None = None,
    ) -> None:
        self.federation = federation.model_copy(update={"store": store or federation.store})
        self.home, self.api_url = Path(home).resolve(), api_url
        if self.federation.store is None:
            raise UserError(
                "federation.store: missing, expected the URL of the shared object store; give it, or --store"
            )
        self.store = ObjectStore(self.federation.store, self.federation.store_options)

    def deploy(self, recipe: Recipe | None = None) -> list[str]:
        """Create or update the federation's pools and deployments; their names. Lets the sites know whom it pins."""
        publish_federation(self.store, self.federation)
        with connect(self.api_url) as client:
            return deploy_federation(client, self.federation, recipe=recipe, site_type=self.site_type)

    def execute(self, recipe: Recipe, *, run_id: str | None = None) -> Run:
        """Start `recipe`; a run of that id with this recipe is resumed. Raises before anything is trained; UserError too, where
        the federation has a coordinator's key that is not here."""
        run = run_id or new_run_id(self.store, recipe)
        Keys.here(self.federation.coordinator_key)
        journal = start_run(self.store, run, recipe, self.federation.names, self.federation.public_keys)
        amend_run(journal, recipe, sites=self.federation.names, keys=self.federation.public_keys)
        return self._launch(journal)

    def resume(self, run_id: str) -> Run:
        return self._launch(Journal(self.store, run_id))

    def attach(self, run_id: str) -> Run:
        record = Journal(self.store, run_id).record()
        return Run(run_id, self.store, _FlowRuns(self.api_url, record.nonce))

    def _launch(self, journal: Journal) -> Run:
        """A flow run of the training's deployment, unless one works on the run."""
        nonce = journal.record().nonce
        backend = _FlowRuns(self.api_url, nonce)
        handle = Run(journal.run, self.store, backend)
        remember(self, journal.run)
        self._await_coordinator(backend)
        if backend.trainings(ACTIVE):
            return handle
        name = training_deployment(self.federation)
        try:
            deployment = backend.client.read_deployment_by_name(name)
        except ObjectNotFound as error:
            raise UnreachableError(
                f"Prefect: found no deployment {name!r}, expected one; run `fedflow deploy` with the federation file"
            ) from error
        parameters: dict[str, Any] = {
            "recipe": journal.recipe().model_dump(mode="json"),
            "federation": self.federation.model_dump(mode="json"),
            "run_id": journal.run,
        }
        backend.client.create_flow_run_from_deployment(
            deployment.id, parameters=parameters, name=journal.run, tags=["fedflow", "training", run_tag(nonce)]
        )
        return handle

    def _await_coordinator(self, backend: _FlowRuns) -> None:
        """Raises UnreachableError where no coordinator's worker is there; then a training that seems to run does not."""
        pool = self.federation.coordinator_pool
        if why := absence(backend.client, pool):
            for run in backend.trainings([StateType.RUNNING, StateType.PENDING]):
                backend.client.set_flow_run_state(run.id, Crashed(message=why), force=True)
            start = f"prefect worker start --pool {pool} --type fedflow-coordinator"
            raise UnreachableError(f"Prefect: found {why}, expected the coordinator's; start it: `{start}`")

    def ui_command(self, run: Run) -> str | None:
        """The server is running: its URL is enough (`run.backend.ui()`)."""
        return None

    def options(self) -> dict[str, Any]:
        """What `remember` keeps."""
        return {}

    def close(self) -> None:
        """Nothing here was started by this environment."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class _FlowRuns:
    """The flow runs of one run: its trainings (one a start), and what they started."""

    def __init__(self, api_url: str | None, nonce: str) -> None:
        self.api_url, self.nonce = api_url, nonce
        self._open = ExitStack()
        self._client: SyncPrefectClient | None = None

    @property
    def client(self) -> SyncPrefectClient:
        """One client for as long as this handle lives: making one takes longer than asking. Raises UnreachableError."""
        if self._client is None:
            self._client = self._open.enter_context(connect(self.api_url))
        return self._client

    def trainings(self, states: list[StateType]) -> list[FlowRun]:
        return find_runs(self.client, run_tag(self.nonce), "training", states=states)

    def alive(self) -> bool:
        try:
            return bool(self.trainings(ACTIVE))
        except (UnreachableError, *OUTAGE):
            return True  # an API that does not answer says nothing about the coordinator

    def abort(self) -> None:
        until = time.monotonic() + STOPPING
        while runs := find_runs(self.client, run_tag(self.nonce)):
            late = time.monotonic() > until
            cancel(self.client, runs, "aborted; its worker did not answer" if late else "aborted", force=late)
            time.sleep(0.5)

    def logs(self, site: str | None) -> Iterator[str]:
        wanted = FlowRunFilter(tags=FlowRunFilterTags(all_=[run_tag(self.nonce), *([f"site:{site}"] if site else [])]))
        runs = _pages(partial(self.client.read_flow_runs, flow_run_filter=wanted, sort=FlowRunSort.START_TIME_ASC))
        names: dict[UUID | None, str] = {run.id: run.name for run in runs}
        which = LogFilter(flow_run_id=LogFilterFlowRunId(any_=[i for i in names if i]))
        for line in _pages(partial(self.client.read_logs, which, sort=LogSort.TIMESTAMP_ASC)):
            yield f"{line.timestamp:%Y-%m-%d %H:%M:%S} [{names.get(line.flow_run_id, '')}] {line.message}"

    def ui(self) -> str | None:
        runs = self.trainings(list(StateType))
        base = str(self.client.api_url).rstrip("/").removesuffix("/api")
        return f"{base}/runs/flow-run/{runs[-1].id}" if runs else base


def _pages(read: Callable[..., list[Any]]) -> Iterator[Any]:
    """Everything that `read(limit=…, offset=…)` gives, page by page."""
    offset = 0
    while page := read(limit=200, offset=offset):
        yield from page
        offset += len(page)
