"""What fedflow uses of Prefect beyond its public interface: here and nowhere else.

`WRAPPED` says what each part looked like when this was written; a test compares it with the Prefect that is installed, and looks there
for each private attribute that is used below.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import inspect
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID

import anyio
import httpx
import prefect.types._datetime
from prefect import Flow, flow_engine
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import FlowRun, FlowRunPolicy, ServerDefaultResultStorage, StateType
from prefect.context import SyncClientContext
from prefect.engine import handle_engine_signals
from prefect.events.worker import EventsWorker
from prefect.exceptions import Abort, ObjectNotFound, PrefectHTTPStatusError
from prefect.logging.handlers import APILogWorker, set_api_log_sink
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_KEY, PREFECT_API_URL, PREFECT_HOME
from prefect.states import Crashed, Pending
from prefect.utilities.engine import propose_state
from prefect.workers.base import BaseJobConfiguration, BaseVariables, BaseWorker, BaseWorkerResult

from fedflow.prefect.api import OUTAGE, Taker

__all__ = [
    "WRAPPED",
    "FlowWorkerBase",
    "FlowWorkerResult",
    "all_sent",
    "changed",
    "engine",
    "own_engine",
    "run",
    "site_client",
]

T = TypeVar("T")

WRAPPED = {
    "prefect.workers.base:BaseWorker.get_and_submit_flow_runs": "(self)",
    "prefect.workers.base:BaseWorker._get_scheduled_flow_runs": "(self)",
    "prefect.utilities.engine:propose_state": "(client, state, flow_run_id, force)",
    "prefect.workers.base:BaseWorker._mark_flow_run_as_cancelled": "(self, flow_run, state_updates)",
    "prefect.workers.base:BaseWorker._release_limit_slot": "(self, flow_run_id)",
    "prefect.flow_engine:run_flow": "(flow, flow_run, parameters, wait_for, return_type, error_logger, context)",
    "prefect.flow_engine:_send_heartbeats": "(engine, join_on_exit)",
    "prefect.flow_engine:observe_flow_run_suspension": "(flow_run_id, suspension_request, polling_interval)",
    "prefect.engine:handle_engine_signals": "(flow_run_id)",
    "prefect.logging.handlers:set_api_log_sink": "(sink)",
    "prefect.logging.handlers:APILogWorker.drain_all": "(timeout, at_exit)",
    "prefect.events.worker:EventsWorker.drain_all": "(timeout, at_exit)",
    "prefect.context:SyncClientContext.__init__": "(self, httpx_settings)",
    "prefect.client.orchestration:SyncPrefectClient.read_flow_run": "(self, flow_run_id)",
    "prefect.client.orchestration:SyncPrefectClient.update_flow_run": "(self, flow_run_id, flow_version, parameters, "
    "name, tags, empirical_policy, infrastructure_pid, job_variables)",
    "prefect.client.orchestration:SyncPrefectClient.read_server_default_result_storage": "(self)",
    "prefect.client.orchestration:SyncPrefectClient.raise_for_api_version_mismatch_once": "(self)",
    "prefect.client.base:PrefectHttpxSyncClient.__init__": "(self, args, enable_csrf_support, raise_on_all_errors, kwargs)",
}
"""Name -> its parameters."""


def changed() -> dict[str, str]:
    """What of `WRAPPED` the installed Prefect has otherwise: name -> the parameters found, or that it is missing."""
    found = {name: _parameters(name) for name in WRAPPED}
    return {name: parameters for name, parameters in found.items() if parameters != WRAPPED[name]}


def _parameters(name: str) -> str:
    module, _, path = name.partition(":")
    found: Any = import_module(module)
    for part in path.split("."):
        found = getattr(found, part, None)
    return f"({', '.join(inspect.signature(found).parameters)})" if callable(found) else "missing"


# -- a flow run in this process ----------------------------------------------------------------------------------------
def run(flow: Flow[Any, Any], flow_run: FlowRun) -> StateType:
    """Run it as Prefect's own child processes do; how it ended, as the API knows. Ends this process where nobody knows."""
    with handle_engine_signals(flow_run.id):
        state: Any = flow_engine.run_flow(flow, flow_run=flow_run, return_type="state")
        if inspect.isawaitable(state):
            state = asyncio.run(_awaited(state))
        found: StateType = state.type
        return found
    raise AssertionError  # it ends the process


async def _awaited(state: Awaitable[Any]) -> Any:
    return await state


@contextlib.contextmanager
def all_sent() -> Iterator[None]:
    """Afterwards nothing is left in Prefect's own queues, which a forked process would end without sending."""
    try:
        yield
    finally:
        APILogWorker.drain_all(timeout=10)
        EventsWorker.drain_all(timeout=10)


@contextlib.contextmanager
def engine(*, suspends: bool) -> Iterator[None]:
    """Without the engine's heartbeats: its thread takes up to a second to end, and the worker sends them itself.

    suspends: whether a flow run listens for being suspended, which opens a connection to the server's event stream
    """
    before = flow_engine._send_heartbeats, flow_engine.observe_flow_run_suspension  # type: ignore[attr-defined]
    flow_engine._send_heartbeats = _nothing
    if not suspends:
        flow_engine.observe_flow_run_suspension = _nothing  # type: ignore[attr-defined]
    try:
        yield
    finally:
        flow_engine._send_heartbeats, flow_engine.observe_flow_run_suspension = before  # type: ignore[attr-defined]


@contextlib.contextmanager
def _nothing(*_: Any, **__: Any) -> Iterator[None]:
    yield


class SiteClient(SyncPrefectClient):
    """Of one flow run, which its worker has read a moment ago: the engine, which reads it again, is answered from that."""

    known: FlowRun | None = None

    def read_flow_run(self, flow_run_id: UUID) -> FlowRun:
        known, self.known = self.known, None
        return known if known is not None and known.id == flow_run_id else super().read_flow_run(flow_run_id)

    def update_flow_run(
        self, flow_run_id: UUID, *args: Any, empirical_policy: FlowRunPolicy | None = None, **fields: Any
    ) -> httpx.Response:
        """Without a request where all that is to be said is that the flow has no retries."""
        if self.known is not None and empirical_policy is not None and not empirical_policy.retries:
            return httpx.Response(204)
        return super().update_flow_run(flow_run_id, *args, empirical_policy=empirical_policy, **fields)  # type: ignore[misc]

    def read_server_default_result_storage(self) -> ServerDefaultResultStorage:
        """A site keeps no result anywhere but in the store."""
        return ServerDefaultResultStorage()

    def raise_for_api_version_mismatch_once(self) -> None:
        """Its worker has compared the versions."""


class _Context(SyncClientContext):
    """Everything in Prefect that asks for a client gets this one."""

    def __init__(self, client: SyncPrefectClient) -> None:
        super(SyncClientContext, self).__init__(client=client)


@cache
def site_client() -> SiteClient:
    """This process's; it has no connection yet, and so may be made before a fork."""
    auth, key = PREFECT_API_AUTH_STRING.value(), PREFECT_API_KEY.value()
    return SiteClient(PREFECT_API_URL.value() or "", auth_string=auth, api_key=key)


@contextlib.contextmanager
def own_engine(client: SiteClient, flow_run: FlowRun, *, csrf: bool) -> Iterator[None]:
    """For a flow run that was given to a worker: three requests besides what the flow itself asks for.

    csrf: whether the server wants its token; the worker knows
    """
    client.known = flow_run
    client._client.enable_csrf_support = csrf  # type: ignore[attr-defined]
    with engine(suspends=False), _Context(client), _logs_sent_by(client):
        yield


@contextlib.contextmanager
def _logs_sent_by(client: SyncPrefectClient, every: float = 2.0) -> Iterator[None]:
    """The flow run's log goes to the API over the client's own connection: every two seconds, and at the end."""
    kept: list[dict[str, Any]] = []
    over = threading.Event()

    def send() -> None:
        waiting = [kept.pop(0) for _ in range(len(kept))]
        for log in waiting:
            log.pop("__payload_size__", None)
        for start in range(0, len(waiting), _LOGS):
            try:
                client.create_logs(waiting[start : start + _LOGS])
            except Exception as error:  # as Prefect does: a log that is lost fails nothing
                print(f"the log could not be sent: {error!r}", file=sys.stderr)

    def send_meanwhile() -> None:
        while not over.wait(every):
            send()

    thread = threading.Thread(target=send_meanwhile, daemon=True)
    set_api_log_sink(kept.append)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        send()
        set_api_log_sink(None)


_LOGS = 200  # lines in a request


# -- a worker ----------------------------------------------------------------------------------------------------------
class FlowWorkerResult(BaseWorkerResult):
    """identifier: the child's process id; status_code: its exit code."""


AGAIN = 5.0  # seconds until an API that did not answer is asked again
LAST_WORD = 30.0  # seconds that a worker which is stopped has to say so
STOPPED_TOO = "its worker was stopped"
_TAKEN = (StateType.PENDING, StateType.RUNNING, StateType.CANCELLING)


class FlowWorkerBase(BaseWorker[BaseJobConfiguration, BaseVariables, FlowWorkerResult]):
    """A worker that takes a flow run with one request, where Prefect's takes nine."""

    type = "fedflow-base"

    @property
    def synced(self) -> bool:
        """Whether the server has answered, and this worker knows its work pool."""
        return bool(self._has_successfully_synced)

    async def take(self) -> list[FlowRun]:
        """Ask the work pool for work; what this worker has not taken yet is taken now, up to its limit."""
        if not self.synced:
            return []
        scheduled = [entry.flow_run for entry in await self._get_scheduled_flow_runs()]
        self._last_polled_time = prefect.types._datetime.now("UTC")
        taken = []
        for flow_run in scheduled:
            if flow_run.id in self._submitting_flow_run_ids:
                continue
            if self._limiter is not None:
                if self._limiter.available_tokens < 1:
                    break
                self._limiter.acquire_on_behalf_of_nowait(flow_run.id)
            self._submitting_flow_run_ids.add(flow_run.id)
            assert self._runs_task_group is not None
            self._runs_task_group.start_soon(self._hold, flow_run)
            taken.append(flow_run)
        return taken

    async def _hold(self, flow_run: FlowRun) -> None:
        """One flow run, from its claim to its end. What goes wrong before it runs crashes it."""
        try:
            (self._notes() / str(flow_run.id)).touch()
            if await self._claim(flow_run):
                await self._see_through(flow_run)
            self.forget(flow_run)
        finally:
            self._submitting_flow_run_ids.discard(flow_run.id)
            self._release_limit_slot(flow_run.id)

    async def _claim(self, flow_run: FlowRun) -> bool:
        """Take it, saying who does; False where somebody else has, or it is cancelled."""
        try:
            with anyio.CancelScope(shield=True):  # else it might be taken, and nobody's
                state = await propose_state(self.client, Pending(message=str(Taker.here())), flow_run_id=flow_run.id)
            taken = state.is_pending()
        except Abort as abort:
            self._logger.info("%s is not taken: %s", flow_run.name, abort)
            return False
        except OUTAGE as error:
            self._logger.warning("whether %s is taken is not known: %r", flow_run.name, error)
            taken = await self._was_claimed(flow_run)
        flow_run.state = Pending()
        return taken

    async def _was_claimed(self, flow_run: FlowRun) -> bool:
        """Whether the server has taken note of a claim that it did not answer."""
        try:
            seen = await self.patiently(lambda: self.client.read_flow_run(flow_run.id))
            return seen.state_type == StateType.PENDING and await self.patiently(lambda: self._taken_here(seen))
        except (ObjectNotFound, PrefectHTTPStatusError):
            return False

    async def _see_through(self, flow_run: FlowRun) -> None:
        """Work on it; whatever prevents that crashes it."""
        try:
            await self.work_on(flow_run)
        except anyio.get_cancelled_exc_class():
            with anyio.move_on_after(LAST_WORD, shield=True):
                await self.crashed(flow_run, STOPPED_TOO)
            raise
        except Exception as error:
            self._logger.exception("%s", flow_run.name)
            await self.crashed(flow_run, f"its worker could not run it: {error}")

    async def patiently(self, ask: Callable[[], Awaitable[T]]) -> T:
        """What `ask` returns, as soon as the API answers. Raises what the API answers."""
        while True:
            try:
                return await ask()
            except OUTAGE as error:
                if isinstance(error, httpx.HTTPStatusError) and error.response.status_code < 500:
                    raise
                self._logger.warning("the API does not answer, it is asked again: %r", error)
                await anyio.sleep(AGAIN)

    async def taken_before(self) -> list[FlowRun]:
        """Flow runs that are active, and that a worker of this work pool and machine has taken, as it noted down."""
        found = []
        for noted in list(self._notes().iterdir()):
            try:
                run = await self.client.read_flow_run(UUID(noted.name))
                ours = run.state_type in _TAKEN and await self._taken_here(run)
            except ObjectNotFound:
                ours = False
            except PrefectHTTPStatusError as refusal:
                if refusal.response.status_code != 403:
                    raise
                ours = False  # a proxy's answer about what is not there
            if ours:
                found.append(run)
            else:
                noted.unlink(missing_ok=True)
        return found

    def _notes(self) -> Path:
        """A folder with a file for each flow run that this worker has: asking the server would be asking about all."""
        whose = f"{PREFECT_API_URL.value()} {self._work_pool_name}".encode()
        folder = Path(PREFECT_HOME.value()) / "fedflow" / hashlib.blake2b(whose, digest_size=8).hexdigest()
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def forget(self, flow_run: FlowRun) -> None:
        """It is over."""
        (self._notes() / str(flow_run.id)).unlink(missing_ok=True)

    async def _taken_here(self, flow_run: FlowRun) -> bool:
        took = Taker.among(await self.client.read_flow_run_states(flow_run.id))
        return took is not None and took.host == Taker.here().host

    def meanwhile(self, work: Callable[[FlowRun], Awaitable[None]], flow_run: FlowRun) -> None:
        """Have `work(flow_run)` done for as long as this worker runs; what goes wrong there is logged."""

        async def done() -> None:
            try:
                await work(flow_run)
            except Exception:
                self._logger.exception("%s", flow_run.name)

        assert self._runs_task_group is not None
        self._runs_task_group.start_soon(done)

    async def work_on(self, flow_run: FlowRun) -> int:
        """Run it to its end; its exit code."""
        raise NotImplementedError

    async def run(
        self, flow_run: FlowRun, configuration: BaseJobConfiguration, task_status: Any = None
    ) -> FlowWorkerResult:
        """As Prefect calls it. What the configuration says has no effect."""
        if task_status is not None:
            task_status.started(str(flow_run.id))
        return FlowWorkerResult(identifier=str(flow_run.id), status_code=await self.work_on(flow_run))

    async def crashed(self, flow_run: FlowRun, why: str) -> None:
        """Say that it has ended without a word of its own, as soon as the API answers: the server takes it to be running."""

        async def say() -> None:
            with contextlib.suppress(Abort, ObjectNotFound):  # it has ended, or is gone
                if (await propose_state(self.client, Crashed(message=why), flow_run_id=flow_run.id)).is_crashed():
                    self.get_flow_run_logger(flow_run).info("Crashed: %s", why)

        try:
            await self.patiently(say)
        except PrefectHTTPStatusError:
            self._logger.exception("%s: it could not be reported that it crashed: %s", flow_run.name, why)

    async def cancelled(self, flow_run: FlowRun, why: str) -> None:
        """Say that it has been stopped, as soon as the API answers."""
        await self.patiently(lambda: self._mark_flow_run_as_cancelled(flow_run, {"message": why}))

    @property
    def csrf(self) -> bool:
        """Whether the server wants a token with each request, as this worker's own client has found."""
        return bool(self.client._client.enable_csrf_support)  # type: ignore[attr-defined]
