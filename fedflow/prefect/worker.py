"""fedflow's workers: they run only fedflow's own flows, each in a process forked from a warm parent.

A stock process worker starts a fresh interpreter for every flow run, seconds of imports each, and executes whatever
command the API names. These run a flow that is registered here, by name, as it is installed here; command, environment,
entrypoint and pull steps that come over the API are not even read. They ask for work often while there is some, and use
no event stream: whoever reads it sees other sites' events too.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import logging
import math
import os
import re
import signal
import sys
import time
from base64 import b64encode
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, cast
from uuid import UUID

import anyio
import anyio.to_thread
import prefect
from prefect import Flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import TERMINAL_STATES, FlowRun, StateType
from prefect.events import emit_event
from prefect.exceptions import ObjectNotFound
from prefect.settings import (
    PREFECT_API_AUTH_STRING,
    PREFECT_API_URL,
    PREFECT_CLIENT_CSRF_SUPPORT_ENABLED,
    PREFECT_CLIENT_CUSTOM_HEADERS,
    PREFECT_FLOWS_HEARTBEAT_FREQUENCY,
    PREFECT_WORKER_QUERY_SECONDS,
    temporary_settings,
)
from prefect.states import Crashed

from fedflow.engine.forks import Child, ForkServer, Line
from fedflow.engine.locks import held, holder, remove
from fedflow.engine.logs import LogFile
from fedflow.engine.starts import report_start
from fedflow.errors import FedflowError, ResolveError, UserError
from fedflow.prefect import private
from fedflow.prefect.api import OUTAGE
from fedflow.prefect.pace import CROWDED, IDLE, Pace
from fedflow.prefect.starting import clock_problem, examine, worker_lock, worker_name
from fedflow.recipe import SiteConfig

__all__ = ["CoordinatorWorker", "SiteWorker", "command", "credential", "environment", "start"]

BUSY = 1.0  # seconds between two questions for more work, at least, while there is some
LOOK = (1.0, 3.0)  # seconds between two looks whether a flow run is to be cancelled: at its beginning, later
TICK = 0.5  # seconds between two looks how much memory a child holds
STOPPED = (StateType.CANCELLING, StateType.CANCELLED)  # of a flow run that is not to run
CANCELLED = "cancelled"


class FlowWorker(private.FlowWorkerBase):
    """Runs the flows that `flows` names: flow name -> "module:function"."""

    type = "fedflow"
    flows: ClassVar[dict[str, str]] = {}
    preload: ClassVar[str]
    runs: ClassVar[str] = "fedflow.prefect.worker:run_in_child"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.pace = Pace(float(PREFECT_WORKER_QUERY_SECONDS.value()), crowded=CROWDED)
        self._server = self.fork_server()
        self._names: dict[UUID, str] = {}
        self._inherited = False
        self._at_work = 0

    def fork_server(self) -> ForkServer:
        """What starts this worker's children."""
        return ForkServer([self.preload])

    def registered(self) -> dict[str, str]:
        """What runs here: flow name -> "module:function"."""
        return self.flows

    def too_large(self, group: int) -> str | None:
        """Why that group of processes may not go on; None where it may."""
        return None

    async def setup(self) -> None:
        """As every worker, and warm: the fork server starts importing now, not when the first round waits for it."""
        self._server.start()
        await super().setup()

    async def get_and_submit_flow_runs(self) -> list[FlowRun]:
        """Take what there is. Returns when nothing comes for long: then Prefect's own loop asks, every `pace.longest` seconds."""
        if self.synced and not self._inherited:
            await self._compare_clocks()
            await self._inherit()
        taken: list[FlowRun] = []
        while True:
            asked = time.monotonic()
            new = await self.take()
            self.pace.answered(time.monotonic() - asked)
            if new:
                self.pace.worked()
                taken += new
            if self.pace.mean() == self.pace.longest:  # more: Prefect's loop would give a busy API no time
                return taken
            await anyio.sleep(max(self.pace.wait(), BUSY if self._at_work else 0.0))

    async def _inherit(self) -> None:
        """Look after what a worker of this machine had taken that was killed: the server still takes it to be running."""
        for flow_run in await self.taken_before():
            self.meanwhile(self._look_after, flow_run)
        self._inherited = True

    async def _look_after(self, flow_run: FlowRun) -> None:
        """Stop its process where it is cancelled; once there is none, say that it has ended, unless it did so itself."""
        lock = str(flow_run.id)
        pid: int | None = None
        why: str | None = None
        try:
            while (pid := await anyio.to_thread.run_sync(holder, lock)) is not None:
                if why := self.too_large(pid) or (CANCELLED if await self._is_cancelling(flow_run.id) else None):
                    stop(pid)
                await anyio.sleep(LOOK[0])
        except anyio.get_cancelled_exc_class():
            stop(pid)
            with anyio.move_on_after(private.LAST_WORD, shield=True):
                await self.crashed(flow_run, private.STOPPED_TOO)
            raise
        remove(lock)
        seen = await self.patiently(lambda: self.client.read_flow_run(flow_run.id))
        if seen.state is None or not seen.state.is_final():
            name, flows = await self._name(flow_run), self.registered()
            if name in flows:
                await self._ended(load(flows[name]), seen, None, why)
            else:
                await self.crashed(seen, "its process was lost")
        self.forget(flow_run)

    async def _compare_clocks(self) -> None:
        """Say where this machine's clock is wrong: a store refuses its requests, and work seems to lie in the future."""
        try:
            told = (await self.client.hello()).headers.get("date")
        except OUTAGE:
            return
        if why := clock_problem(told):
            self._logger.error("%s", why)

    async def work_on(self, flow_run: FlowRun) -> int:
        """Fork, watch, and stop the child where its flow run is cancelled. Raises ResolveError for a foreign flow."""
        name, flows = await self._name(flow_run), self.registered()
        if name not in flows:
            raise ResolveError(f"flow: found {name!r}, expected one of {sorted(flows)}; nothing else runs here")
        asked = {"flow": flows[name], "flow_run": flow_run.model_dump(mode="json"), "csrf": self.csrf}
        child = await anyio.to_thread.run_sync(self._server.fork, self.runs, asked)
        self._at_work += 1
        try:
            why = await self._watch(child, flow_run)  # then killed: SIGTERM is a crash to Prefect's engine
        finally:
            self._at_work -= 1
            code = child.exit
            child.kill()
            remove(str(flow_run.id))
        await anyio.to_thread.run_sync(child.end)
        self.pace.worked()
        if child.last is not None and (refused := child.last.get("refused")):
            await self.crashed(flow_run, refused)
        elif child.last is None:  # it did not say how its flow run ended
            await self._ended(load(flows[name]), flow_run, code, why)
        return code or 0

    async def _name(self, flow_run: FlowRun) -> str:
        """Of the flow."""
        if flow_run.flow_id not in self._names:
            flow = await self.patiently(lambda: self.client.read_flow(flow_run.flow_id))
            self._names[flow_run.flow_id] = flow.name
        return self._names[flow_run.flow_id]

    async def _watch(self, child: Child, flow_run: FlowRun) -> str | None:
        """Returns when the child has ended, or must not go on: then why."""
        looks, frequency = Pace(LOOK[1], LOOK[0], time.monotonic()), PREFECT_FLOWS_HEARTBEAT_FREQUENCY.value()
        look, beat = time.monotonic() + looks.wait(), time.monotonic() + (frequency or math.inf)
        while not child.ended:
            await anyio.to_thread.run_sync(child.receive, max(min(look - time.monotonic(), TICK), 0.0))
            if (why := self.too_large(child.pid)) is not None:
                return why
            if time.monotonic() >= look and not child.ended:
                look = time.monotonic() + looks.wait()
                if await self._is_cancelling(flow_run.id):
                    return CANCELLED
            if frequency and time.monotonic() >= beat:
                beat += frequency
                show_life(flow_run)
        return None

    async def _is_cancelling(self, flow_run: UUID) -> bool:
        try:
            seen = await self.client.read_flow_run(flow_run)
        except ObjectNotFound:
            return True
        except OUTAGE:
            return False  # an API that does not answer cancels nothing
        return seen.state_type in STOPPED

    async def _ended(self, flow: Flow[Any, Any], flow_run: FlowRun, code: int | None, why: str | None) -> None:
        """What Prefect is told of a child that could not do so itself. It may have ended before anybody looked why."""
        if why == CANCELLED or (why is None and await self._is_cancelling(flow_run.id)):
            try:  # who sees the flow run cancelled finds done what its hooks do
                await self._run_hooks(flow, flow.on_cancellation_hooks, flow_run.id)
            finally:
                await self.cancelled(flow_run, "stopped by its worker")
        elif why is not None or code != 0:
            await self._run_hooks(flow, flow.on_crashed_hooks, flow_run.id)
            await self.crashed(flow_run, why or f"its process {_how(code)}")

    async def _run_hooks(self, flow: Flow[Any, Any], hooks: Sequence[Any] | None, flow_run: UUID) -> None:
        """The hooks that a killed process cannot run by itself."""
        if not hooks:
            return
        seen = await self.patiently(lambda: self.client.read_flow_run(flow_run))
        state = seen.state if seen.state is not None else Crashed()
        for hook in hooks:
            called = await anyio.to_thread.run_sync(partial(cast(Callable[..., object], hook), flow, seen, state))
            if inspect.isawaitable(called):
                await cast(Awaitable[object], called)


def stop(group: int | None) -> None:
    """Kill that group of processes; nothing where it is gone."""
    if group is not None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)


def show_life(flow_run: FlowRun) -> None:
    """The event that an automation can miss where a machine is lost."""
    resource = {"prefect.resource.id": f"prefect.flow-run.{flow_run.id}", "prefect.resource.name": flow_run.name}
    emit_event("prefect.flow-run.heartbeat", resource=resource | {"prefect.version": prefect.__version__})


def _how(code: int | None) -> str:
    if code is None:
        return "was lost"
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


class SiteWorker(FlowWorker):
    """A site's worker."""

    type = "fedflow-site"
    flows: ClassVar[dict[str, str]] = {
        "fedflow-site": "fedflow.flows.site:local_training",
        "fedflow-aggregation": "fedflow.flows.aggregation:aggregation",
    }
    preload: ClassVar[str] = "fedflow.prefect.warm_site"
    runs: ClassVar[str] = "fedflow.prefect.worker:run_at_site"
    _description = "Runs fedflow's local training and aggregation, as installed at this site, and nothing else."

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.config = SiteConfig.here()
        log_to_file(self.config)
        self._lock = worker_lock(PREFECT_API_URL.value() or "", self.config.work_pool)
        self._alone = held(self._lock)
        given = [most for most in (kwargs.pop("limit", None), self.config.limits.at_once) if most is not None]
        super().__init__(*args, limit=min(given, default=None), **kwargs)

    async def setup(self) -> None:
        """As every one of ours; and holds this machine's lock of its work pool, which ends with its process."""
        if (process := holder(self._lock)) is not None:
            self._logger.error("%s has another worker on this machine, process %d: waiting", self.config.name, process)
        await anyio.to_thread.run_sync(self._alone.__enter__)
        await super().setup()

    def fork_server(self) -> ForkServer:
        return ForkServer([self.preload], self.config.start, later=["torch._dynamo"])  # what torch.optim imports

    def registered(self) -> dict[str, str]:
        """The site's own flow, where its configuration names one, in place of fedflow's training."""
        return self.flows | ({"fedflow-site": self.config.flow} if self.config.flow else {})

    def too_large(self, group: int) -> str | None:
        limit = self.config.limits.memory
        if limit is None or (held := resident(group)) <= limit:
            return None
        return f"killed: found {held >> 20} MiB in its processes, expected at most {limit >> 20} MiB, this site's limits.memory"


def resident(group: int) -> int:
    """Bytes in memory of a group of processes and of all that they started, whose group may be another (a script's).

    Shared ones are counted with each; 0 where the system does not say.
    """
    parents, groups, pages = dict[int, int](), dict[int, int](), dict[int, int]()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended
            fields, pid = stat.read_text().rpartition(")")[2].split(), int(stat.parent.name)
            parents[pid], groups[pid], pages[pid] = int(fields[1]), int(fields[2]), int(fields[21])
    counted = {pid for pid in groups if groups[pid] == group}
    while started := {pid for pid in parents if parents[pid] in counted} - counted:
        counted |= started
    return sum(pages[pid] for pid in counted) * os.sysconf("SC_PAGE_SIZE")


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


def refusal(flow: Flow[Any, Any], parameters: Mapping[str, Any]) -> str | None:
    """Why these cannot be the flow's parameters, before Prefect looks at them; None where they can.

    It would end the process without a word for a name too many, and load a block from the API for a reference to one.
    """
    try:
        inspect.signature(flow.fn).bind(**parameters)
    except TypeError as error:
        return f"parameters: {error}; expected {', '.join(inspect.signature(flow.fn).parameters)}"
    if '"$ref":' in json.dumps(dict(parameters)):
        return "parameters: found a reference to a block, expected the values themselves"
    return None


def run_in_child(asked: dict[str, Any], line: Line) -> None:
    """Run the flow in this process, as Prefect's own child processes do; say how it ended."""
    flow, given = load(asked["flow"]), asked["flow_run"]["parameters"]
    if why := refusal(flow, given):
        return tell(line, {"refused": why})
    os.environ["PREFECT__FLOW_RUN_ID"] = asked["flow_run"]["id"]
    with get_client(sync_client=True) as client:
        flow_run = client.read_flow_run(UUID(asked["flow_run"]["id"]))
    settings = {} if asked["csrf"] else {PREFECT_CLIENT_CSRF_SUPPORT_ENABLED: False}  # every new client would ask
    if flow_run.state_type not in STOPPED:
        with held(str(flow_run.id)), temporary_settings(settings), private.engine(suspends=True), private.all_sent():
            ended = private.run(flow, flow_run)
        tell_end(line, ended)


def run_at_site(asked: dict[str, Any], line: Line) -> None:
    """The same, with as few requests as it can be done with."""
    flow_run = FlowRun.model_validate(asked["flow_run"])
    os.environ["PREFECT__FLOW_RUN_ID"] = str(flow_run.id)
    log_to_file(SiteConfig.here(), flow_run.parameters)
    flow = load(asked["flow"])
    if why := refusal(flow, flow_run.parameters):
        return tell(line, {"refused": why})
    with (
        held(str(flow_run.id)),
        private.all_sent(),
        private.own_engine(private.site_client(), flow_run, csrf=asked["csrf"]),
    ):
        tell_end(line, private.run(flow, flow_run))


def tell_end(line: Line, ended: StateType) -> None:
    """Say to the worker how the flow run ended, if it did: one that is cancelled before it begins is the worker's to end."""
    if ended in TERMINAL_STATES:
        tell(line, {"state": str(ended)})


def tell(line: Line, how: Mapping[str, str]) -> None:
    """Say something to the worker; to nobody, where it was killed meanwhile."""
    with contextlib.suppress(ConnectionError):
        line.send(how)


def log_to_file(config: SiteConfig, parameters: Mapping[str, Any] | None = None) -> None:
    """Have what Prefect and flow runs log from now on written into the site's own file too, where it has one."""
    if config.log is not None:
        log = logging.getLogger("prefect")  # whose flow runs' logger is below it, and gets what fedflow says
        for before in [h for h in log.handlers if isinstance(h, LogFile)]:  # the worker's, in a process forked from it
            log.removeHandler(before)
        given = parameters or {}
        about = {"site": config.name, "run": given.get("run"), "round": given.get("round"), "phase": given.get("phase")}
        log.addHandler(LogFile(Path(config.log.path), config.log.format, config.log.size, config.log.keep, about))


# -- starting ----------------------------------------------------------------------------------------------------------
def command(pool: str, name: str, worker_type: str) -> list[str]:
    """The command line of a worker of that type."""
    return [sys.executable, "-m", "prefect", "worker", "start", "--pool", pool, "--name", name, "--type", worker_type]


def environment(config: SiteConfig, path: Path) -> dict[str, str]:
    """What a site's worker needs in its environment besides the caller's own."""
    api = {"PREFECT_API_URL": config.api_url} if config.api_url else {}
    return {SiteConfig.environment_variable: str(path.resolve()), **api}


def credential() -> dict[str, str]:
    """And for a proxy: the API's credential with websockets too, where Prefect's client tells it to the API alone."""
    given = PREFECT_API_AUTH_STRING.value()
    if not given:
        return {}
    headers = {"Authorization": f"Basic {b64encode(given.encode()).decode()}", **PREFECT_CLIENT_CUSTOM_HEADERS.value()}
    return {"PREFECT_CLIENT_CUSTOM_HEADERS": json.dumps(headers)}


def start(config: SiteConfig, path: Path, *, patience: float = 0.0, say: Callable[[str], None]) -> None:
    """Become the worker of `config`'s site. Does not return.

    What is wrong is told to `say`, and left in the store for the coordinator; `patience`: seconds that a server, or another worker
    of this name, is waited for. Raises UserError where the worker cannot start.
    """
    _examine(config, patience, say)
    args = command(config.work_pool, worker_name(config.name), SiteWorker.type)
    own = {**credential(), **environment(config, path)}
    os.execve(args[0], args, {"PREFECT_WORKER_QUERY_SECONDS": str(IDLE), **os.environ, **own})


def _examine(config: SiteConfig, patience: float, say: Callable[[str], None]) -> None:
    """Returns when the worker may start. Raises UserError with what hinders it, and does not pass."""
    until, told = time.monotonic() + patience, set[str]()
    while True:
        problems = examine(config)
        hinders = [p for p in problems if p.then != "starts"]
        over = time.monotonic() >= until
        stops = [p for p in hinders if p.then == "stops" or over]
        new = [p for p in problems if _alike(p.text) not in told]
        told |= {_alike(p.text) for p in new}
        if new or not hinders:
            try:
                report_start(config, [p.text for p in problems], starts=not hinders)
            except FedflowError as error:
                say(f"the coordinator cannot be told: {error}")
        if stops:
            raise UserError("; ".join(p.text for p in stops))
        for problem in new:
            say(problem.text if problem.then == "starts" else f"{problem.text}; waiting for it to pass")
        if not hinders:
            return
        time.sleep(min(WAIT, max(until - time.monotonic(), 0.0)))


def _alike(text: str) -> str:
    """The text without its numbers: seconds go by."""
    return re.sub(r"\d+", "", text)


WAIT = 3.0  # seconds between two looks at what may pass
