"""fedflow's workers: they run only fedflow's own flows, each in a process forked from a warm parent.

A stock process worker starts a fresh interpreter for every flow run, seconds of imports each, and executes whatever
command the API names. These run a flow that is registered here, by name, as it is installed here; command, environment,
entrypoint and pull steps that come over the API are not even read.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from importlib import import_module
from inspect import isawaitable
from multiprocessing import forkserver
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast
from uuid import UUID

import anyio
import anyio.abc
from prefect import Flow
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.exceptions import ObjectNotFound
from prefect.states import Crashed
from prefect.workers.base import BaseJobConfiguration, BaseVariables, BaseWorker, BaseWorkerResult

from fedflow.errors import ResolveError
from fedflow.prefect.api import OUTAGE
from fedflow.recipe import SiteConfig

if TYPE_CHECKING:
    from multiprocessing.context import ForkServerProcess

__all__ = ["CoordinatorWorker", "SiteWorker", "command", "environment", "start"]

POLL = 0.1  # seconds between two looks whether a child ended
LOOK = 1.0  # seconds between two looks whether its flow run is to be cancelled
STOPPED = (StateType.CANCELLING, StateType.CANCELLED)  # of a flow run that is not to run


class FlowWorkerResult(BaseWorkerResult):
    """identifier: the child's process id; status_code: its exit code."""


class FlowWorker(BaseWorker[BaseJobConfiguration, BaseVariables, FlowWorkerResult]):
    """Runs the flows that `flows` names: flow name -> "module:function"."""

    type = "fedflow"
    flows: ClassVar[dict[str, str]] = {}
    preload: ClassVar[str]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([self.preload])

    def registered(self) -> dict[str, str]:
        """What runs here: flow name -> "module:function"."""
        return self.flows

    async def setup(self) -> None:
        """As every worker, and warm: the fork server starts importing now, not when the first round waits for it."""
        await super().setup()
        forkserver.ensure_running()

    async def run(
        self,
        flow_run: FlowRun,
        configuration: BaseJobConfiguration,
        task_status: anyio.abc.TaskStatus[Any] | None = None,
    ) -> FlowWorkerResult:
        """Fork, watch, and stop the child where its flow run is cancelled. Raises ResolveError for a foreign flow."""
        name, flows = (await self.client.read_flow(flow_run.flow_id)).name, self.registered()
        if name not in flows:
            raise ResolveError(f"flow: found {name!r}, expected one of {sorted(flows)}; nothing else runs here")
        process = self._context.Process(target=run_in_child, args=(flows[name], str(flow_run.id)), name=flow_run.name)
        await anyio.to_thread.run_sync(process.start)
        if task_status is not None:
            task_status.started(process.pid)
        try:
            cancelled = await self._watch(process, flow_run.id)  # then killed: SIGTERM is a crash to Prefect's engine
        except anyio.get_cancelled_exc_class():
            with anyio.CancelScope(shield=True):
                kill_group(process)
                await self._propose_crashed_state(flow_run, "its worker was stopped")
            raise
        finally:
            kill_group(process)
        flow = load(flows[name])
        cancelled = cancelled or await self._is_cancelling(flow_run.id)  # it may have ended before anybody looked
        if cancelled:
            try:  # who sees the flow run cancelled finds done what its hooks do
                await self._run_hooks(flow, flow.on_cancellation_hooks, flow_run.id)
            finally:
                await self._mark_flow_run_as_cancelled(flow_run, {"message": "stopped by its worker"})
        elif process.exitcode != 0:
            await self._run_hooks(flow, flow.on_crashed_hooks, flow_run.id)
        return FlowWorkerResult(identifier=str(process.pid), status_code=0 if cancelled else process.exitcode or 0)

    async def _watch(self, process: ForkServerProcess, flow_run: UUID) -> bool:
        """Returns when the child has ended, or its flow run is cancelled; whether it is."""
        since = 0.0
        while process.is_alive():
            await anyio.sleep(POLL)
            since += POLL
            if since >= LOOK:
                since = 0.0
                if await self._is_cancelling(flow_run):
                    return True
        return False

    async def _is_cancelling(self, flow_run: UUID) -> bool:
        try:
            seen = await self.client.read_flow_run(flow_run)
        except ObjectNotFound:
            return True
        except OUTAGE:
            return False  # an API that does not answer cancels nothing
        return seen.state_type in STOPPED

    async def _run_hooks(self, flow: Flow[Any, Any], hooks: Sequence[Any] | None, flow_run: UUID) -> None:
        """The hooks that a killed process cannot run by itself."""
        seen = await self.client.read_flow_run(flow_run)
        state = seen.state if seen.state is not None else Crashed()
        for hook in hooks or ():
            called = await anyio.to_thread.run_sync(partial(cast(Callable[..., object], hook), flow, seen, state))
            if isawaitable(called):
                await cast(Awaitable[object], called)


class SiteWorker(FlowWorker):
    """A site's worker."""

    type = "fedflow-site"
    flows: ClassVar[dict[str, str]] = {"fedflow-site": "fedflow.flows.site:local_training"}
    preload: ClassVar[str] = "fedflow.prefect.warm_site"
    _description = "Runs fedflow's local training, as installed at this site, and nothing else."

    def registered(self) -> dict[str, str]:
        """The site's own flow, where its configuration names one, in place of fedflow's."""
        own = SiteConfig.here().flow
        return {name: own or target for name, target in self.flows.items()}


class CoordinatorWorker(FlowWorker):
    """The coordinator's worker."""

    type = "fedflow-coordinator"
    flows: ClassVar[dict[str, str]] = {
        "fedflow-training": "fedflow.flows.training:training",
        "fedflow-round": "fedflow.flows.round:federated_round",
    }
    preload: ClassVar[str] = "fedflow.prefect.warm_coordinator"
    _description = "Runs fedflow's trainings and rounds."


# -- in the child ------------------------------------------------------------------------------------------------------
def load(target: str) -> Flow[Any, Any]:
    """The flow at "module:function"."""
    module, _, function = target.partition(":")
    return cast("Flow[Any, Any]", getattr(import_module(module), function))


def run_in_child(target: str, flow_run_id: str) -> None:
    """Run the flow in this process, as the leader of a group of its own."""
    os.setsid()
    os.environ["PREFECT__FLOW_RUN_ID"] = flow_run_id
    from prefect.client.orchestration import get_client
    from prefect.engine import handle_engine_signals
    from prefect.flow_engine import run_flow

    with handle_engine_signals(UUID(flow_run_id)):
        with get_client(sync_client=True) as client:
            flow_run = client.read_flow_run(UUID(flow_run_id))
        if flow_run.state_type not in STOPPED:
            run_flow(load(target), flow_run=flow_run)


def kill_group(process: ForkServerProcess) -> None:
    """Kill the child and all that it started; nothing where they are gone."""
    if process.pid is not None:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            if process.is_alive():  # it has not become a group's leader yet
                process.kill()


# -- starting ----------------------------------------------------------------------------------------------------------
def command(pool: str, name: str, worker: type[FlowWorker]) -> list[str]:
    """The worker's command line."""
    return [sys.executable, "-m", "prefect", "worker", "start", "--pool", pool, "--name", name, "--type", worker.type]


def environment(config: SiteConfig, path: Path) -> dict[str, str]:
    """What a site's worker needs in its environment besides the caller's own."""
    api = {"PREFECT_API_URL": config.api_url} if config.api_url else {}
    return {SiteConfig.environment_variable: str(path.resolve()), **api}


def start(config: SiteConfig, path: Path) -> None:
    """Become the worker of `config`'s site. Does not return."""
    args = command(config.work_pool, config.name, SiteWorker)
    os.execve(args[0], args, {**os.environ, **environment(config, path)})
