"""What a proxy in front of the Prefect API asks about a site's requests: whose is that?

The API has one credential, and whoever holds it may do everything. So sites get credentials of the proxy's: it knows who
asks, lets a short list of routes through (`deployments/nginx.conf`), and asks here whether what a request names is that
site's. What a body could name passes through here itself: logs and events, only of the site's own flow runs.

It believes what the header `X-Fedflow-Site` says, and so may be reached by the proxy alone.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any
from uuid import UUID

import uvicorn
from prefect.client.orchestration import PrefectClient, get_client
from prefect.events import Event
from prefect.events.clients import get_events_client
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings
from pydantic import TypeAdapter, ValidationError
from starlette.applications import Starlette
from starlette.requests import HTTPConnection, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from fedflow.prefect.api import OUTAGE, connect
from fedflow.prefect.dispatch import AGGREGATION_FLOW, SITE_FLOW
from fedflow.types import SiteId

__all__ = ["Owners", "application", "serve"]

SITE = "X-Fedflow-Site"
"""The header in which the proxy says which site it has let in."""

FLOWS = (SITE_FLOW, AGGREGATION_FLOW)
"""The flows of which a site has a deployment, named like the site; a regional aggregator has one of the second alone."""

FRESH = 60.0
"""Seconds for which a site's work pool is taken to be what it was."""

KEPT = 10_000
"""Flow runs of which the owner is remembered; it never changes."""

EVENTS = "prefect.flow-run."
"""How the events begin that a site may send. One about a task would become that task's record, whose ever it is."""

log = logging.getLogger(__name__)


class Owners:
    """What on a Prefect server belongs to which site: a flow run to the site whose deployment it is of, a work pool
    to the site whose deployment uses it. Raises one of `OUTAGE` where the server does not answer."""

    def __init__(self, client: PrefectClient) -> None:
        self._client = client
        self._runs: dict[UUID, SiteId | None] = {}
        self._pools: dict[SiteId, tuple[str | None, float]] = {}
        self._flows: dict[UUID, str] = {}

    async def run(self, run: UUID) -> SiteId | None:
        """Whose flow run that is; None where it is nobody's, or not there."""
        if run not in self._runs:
            try:
                found = await self._client.read_flow_run(run)
            except ObjectNotFound:
                return None  # and not remembered: it may come
            if len(self._runs) >= KEPT:
                self._runs.clear()
            self._runs[run] = await self._deployed(found.deployment_id)
        return self._runs[run]

    async def _deployed(self, deployment: UUID | None) -> SiteId | None:
        if deployment is None:
            return None
        try:
            found = await self._client.read_deployment(deployment)
        except ObjectNotFound:
            return None
        return found.name if await self.flow(found.flow_id) in FLOWS else None

    async def pool(self, site: SiteId) -> str | None:
        """The site's work pool; None where the site has no deployment."""
        found, since = self._pools.get(site, (None, 0.0))
        if found is None or time.monotonic() - since > FRESH:
            found = None
            for flow in FLOWS:
                with suppress(ObjectNotFound):
                    found = found or (await self._client.read_deployment_by_name(f"{flow}/{site}")).work_pool_name
            self._pools[site] = found, time.monotonic()
        return found

    async def flow(self, flow: UUID) -> str | None:
        """The flow's name; None where there is none."""
        if flow not in self._flows:
            try:
                self._flows[flow] = (await self._client.read_flow(flow)).name
            except ObjectNotFound:
                return None
        return self._flows[flow]


# -- what the proxy asks: 204 for yes, 403 for no, 503 where nobody knows ------------------------------------------------
async def _owns_run(request: Request) -> Response:
    return _answer(await _owners(request).run(request.path_params["id"]) == _site(request))


async def _owns_pool(request: Request) -> Response:
    return _answer(await _owners(request).pool(_site(request)) == request.path_params["name"])


async def _runs_flow(request: Request) -> Response:
    return _answer(await _owners(request).flow(request.path_params["id"]) in FLOWS)


def _answer(yes: bool) -> Response:
    return Response(status_code=204 if yes else 403)


# -- what passes through -----------------------------------------------------------------------------------------------
_LOGS: TypeAdapter[list[dict[str, Any]]] = TypeAdapter(list[dict[str, Any]])
_LINE = ("name", "level", "message", "timestamp", "flow_run_id")
"""What a line of a log has here. What else it may name is left out: a task run, a worker."""


async def _logs(request: Request) -> Response:
    """Lines of a log: all of them, or none where one is not about a flow run of the site."""
    try:
        lines = [{key: line[key] for key in _LINE} for line in _LOGS.validate_json(await request.body())]
        named = {UUID(line["flow_run_id"]) for line in lines}
    except (KeyError, TypeError, ValueError, AttributeError):
        return PlainTextResponse("expected lines of the log of a flow run", status_code=422)
    for run in named:
        if await _owners(request).run(run) != _site(request):
            return _answer(False)
    await _client(request).create_logs(lines)
    return Response(status_code=201)


async def _events(socket: WebSocket) -> None:
    """A site's events, for as long as it sends some: those about its flow runs are passed on, the others are not."""
    await socket.accept(subprotocol="prefect")
    await socket.receive_json()  # Prefect's own greeting; the proxy knows who it is
    await socket.send_json({"type": "auth_success"})
    try:
        async with get_events_client() as server:
            async for text in socket.iter_text():
                event = Event.model_validate_json(text)
                if await _about_own(event, _owners(socket), _site(socket)):
                    await server.emit(event.model_copy(update={"related": []}))
    except ValidationError as error:
        await socket.close(1008, str(error)[:100])
    except OUTAGE as error:
        log.warning("events of %s are lost: %r", _site(socket), error)
        await socket.close(1011)


async def _about_own(event: Event, owners: Owners, site: SiteId) -> bool:
    kind, _, run = event.resource.id.rpartition(".")
    if not event.event.startswith(EVENTS) or kind != EVENTS.rstrip("."):
        return False
    try:
        return await owners.run(UUID(run)) == site
    except ValueError:
        return False


# -- the service -------------------------------------------------------------------------------------------------------
def _site(request: HTTPConnection) -> SiteId:
    return request.headers.get(SITE, "")


def _owners(request: HTTPConnection) -> Owners:
    owners: Owners = request.state.owners
    return owners


def _client(request: HTTPConnection) -> PrefectClient:
    client: PrefectClient = request.state.client
    return client


async def _unavailable(_: Request, error: Exception) -> Response:
    log.warning("the Prefect API does not answer: %r", error)
    return PlainTextResponse("the Prefect API does not answer", status_code=503)


async def _refused(request: Request, error: Exception) -> Response:
    """The API's own answer, where it is about what the site sent."""
    assert isinstance(error, PrefectHTTPStatusError)
    if error.response.status_code in (401, 403) or error.response.is_server_error:
        return await _unavailable(request, error)
    return Response(error.response.content, error.response.status_code)


async def _health(_: Request) -> Response:
    return PlainTextResponse("ok")


@asynccontextmanager
async def _connected(_: Starlette) -> AsyncIterator[Mapping[str, Any]]:
    async with get_client() as client:
        yield {"client": client, "owners": Owners(client)}


def application() -> Starlette:
    """The service, of the Prefect API that Prefect's settings name."""
    return Starlette(
        routes=[
            Route("/owns/run/{id:uuid}", _owns_run),
            Route("/owns/pool/{name}", _owns_pool),
            Route("/runs/flow/{id:uuid}", _runs_flow),
            Route("/logs", _logs, methods=["POST"]),
            WebSocketRoute("/events", _events),
            Route("/health", _health),
        ],
        exception_handlers={
            PrefectHTTPStatusError: _refused,
            **dict.fromkeys(OUTAGE, _unavailable),
        },
        lifespan=_connected,
    )


def serve(host: str, port: int) -> None:
    """Answer until stopped. Raises UnreachableError where the API does not let us in.

    A request is not repeated here: the site's own client does that, and knows for how long.
    """
    with connect():
        pass
    with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}):
        uvicorn.run(application(), host=host, port=port, log_level="warning", server_header=False)
