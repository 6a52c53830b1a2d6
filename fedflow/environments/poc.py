"""PocEnv: a real Prefect server and one worker a site on this machine, started and stopped for you."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Self

import httpx
import yaml
from prefect.client.schemas.objects import StateType
from prefect.states import Crashed

from fedflow.environments.base import DEFAULT_HOME, Run
from fedflow.environments.guard import Guard
from fedflow.environments.local import child_environment, stop_group
from fedflow.environments.postgres import Postgres
from fedflow.environments.prod import ProdEnv
from fedflow.errors import UnreachableError, UserError, field_error
from fedflow.prefect import worker
from fedflow.prefect.api import connect, find_runs
from fedflow.recipe import Federation, Recipe, SiteConfig
from fedflow.store.objects import ObjectStore

__all__ = ["PocEnv", "Server"]

QUIET = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "PREFECT_CLI_PROMPT": "false",
    "PREFECT_LOGGING_SERVER_LEVEL": "WARNING",
    "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "false",
}
SERVER = {
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_READ_BATCH_SIZE": "100",
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_BATCH_SIZE": "100",
}
CLIENT = {
    "PREFECT_CLIENT_MAX_RETRIES": "8",
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
}

QUESTIONS = 20
"""What all sites' workers together ask in a second where nothing happens, at most; each of them once a second at most."""

STARTED = [StateType.PENDING, StateType.RUNNING, StateType.CANCELLING]


def clean_environment(**more: str) -> dict[str, str]:
    """This process's environment for a child, without the user's own Prefect settings, with `more`."""
    paths = [p for p in (more.pop("PYTHONPATH", None), child_environment()["PYTHONPATH"]) if p]
    found = child_environment(**more, PYTHONPATH=os.pathsep.join(paths))
    return {name: value for name, value in found.items() if not name.startswith("PREFECT_") or name in more}


class Server:
    """A Prefect server on a free port of this machine, with a home of its own; one a home, whoever starts it first.

    database: "postgres" (needs the extra `poc`), "sqlite" (loses writes when many talk at once), or an SQLAlchemy URL;
              default: postgres where it is installed
    """

    def __init__(self, home: Path, *, port: int | None = None, database: str | None = None) -> None:
        self.home = home
        self._database = database or ("postgres" if Postgres.available() else "sqlite")
        self._postgres = Postgres(home / "postgres") if self._database == "postgres" else None
        self._url: str | None = None if self._database in ("postgres", "sqlite") else self._database
        self._process: subprocess.Popen[bytes] | None = None
        self._lock: IO[str] | None = None
        self._guard: Guard | None = None
        self.port = port or free_port()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/api"

    @property
    def ours(self) -> bool:
        """Whether this process started it."""
        return self._lock is not None

    def start(self, timeout: float = 120.0) -> None:
        """Returns when it answers; one that another process runs in this home is used. Nothing where that is done.

        Raises UnreachableError, with the end of its log, where nothing answers.
        """
        until = time.monotonic() + timeout
        while not self.ours and not self._lock_home():
            if self._found_running():
                return
            if time.monotonic() > until:
                raise UnreachableError(
                    f"Prefect server: found {self.home} in use by a process that does not answer, expected a server; end it, or give another --home"
                )
            time.sleep(0.1)
        if self._process is None:
            self._launch(until)

    def _lock_home(self) -> bool:
        """Take the home for this process and its guard; False where another has it."""
        self.home.mkdir(parents=True, exist_ok=True)
        file = (self.home / "server.lock").open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return False
        self._lock, self._guard = file, Guard(hold=[file.fileno()])
        return True

    def _found_running(self) -> bool:
        """Whether the process that has the home runs a server that answers; then that is this one."""
        with contextlib.suppress(OSError, ValueError, httpx.HTTPError):
            owner = json.loads((self.home / "server.json").read_text())
            os.kill(owner["pid"], 0)  # a dead one's guard still has the home for a moment
            self.port = owner["port"]
            return httpx.get(f"{self.url}/health", timeout=2).status_code == 200
        return False

    def _launch(self, until: float) -> None:
        log = self.home / "server.log"
        args = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(self.port)]
        if self._postgres is not None and self._url is None:
            self._url = self._postgres.start()
            assert self._postgres.process is not None
            self.watch(self._postgres.process, signal.SIGINT)
        url = {"PREFECT_SERVER_DATABASE_CONNECTION_URL": self._url} if self._url else {}
        self._process = _spawn(args, log, clean_environment(**self.environment(), **SERVER, **url))
        self.watch(self._process)
        (self.home / "server.json").write_text(json.dumps({"pid": os.getpid(), "port": self.port}))
        while time.monotonic() < until and self._process.poll() is None:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{self.url}/health", timeout=2).status_code == 200:
                    return
            time.sleep(0.1)
        self.stop()
        raise UnreachableError(
            f"Prefect server: found no answer at {self.url}, expected one in time; its log ends:\n{_tail(log)}"
        )

    def watch(self, process: subprocess.Popen[bytes], how: signal.Signals = signal.SIGKILL) -> None:
        """Have `process` stopped should this process die."""
        assert self._guard is not None
        self._guard.watch(process, how)

    def forget(self, process: subprocess.Popen[bytes]) -> None:
        """`process` has ended."""
        assert self._guard is not None
        self._guard.forget(process)

    def environment(self) -> dict[str, str]:
        """Settings of everything that talks to this server."""
        return {"PREFECT_HOME": str(self.home), "PREFECT_API_URL": self.url, **QUIET, **CLIENT}

    def kill(self) -> None:
        """SIGKILL, as a crash would; `start` brings it back on the same port, with what it had recorded."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()
        self.forget(self._process)
        self._process = None

    def stop(self) -> None:
        """End it; nothing where it does not run, or is another process's."""
        if self._process is not None:
            _stop(self._process)
            self.forget(self._process)
            self._process = None
        if self._postgres is not None and self._postgres.process is not None:
            postmaster = self._postgres.process
            self._postgres.stop()
            self.forget(postmaster)
            self._url = None
        if self._guard is not None and self._lock is not None:
            self._guard.close()
            self._lock.close()
            self._guard = self._lock = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()


class PocEnv(ProdEnv):
    """`federation` on this machine: everything that a deployment has but keys, on free ports, in folders below `home`.

    It never touches the user's own Prefect configuration. Servers and workers start with the first run and stop with
    `close()`, or at the end of a `with` block; what they recorded stays in `home` and is there again the next time.

    database: of the Prefect server: "postgres", "sqlite" or a URL; default: postgres with the extra `poc`, else sqlite
    environment: more variables for the workers and what they start
    site_type: of the sites' workers: fedflow's own, or "process", which is Prefect's and starts an interpreter a flow run
    """

    kind = "poc"

    def __init__(
        self,
        federation: Federation | int = 4,
        *,
        store: str | None = None,
        home: str | Path = DEFAULT_HOME,
        database: str | None = None,
        environment: Mapping[str, str] | None = None,
        site_type: str = worker.SiteWorker.type,
    ) -> None:
        self.home = Path(home).resolve()
        wanted = Federation.of(federation) if isinstance(federation, int) else federation
        placed = wanted.without_keys().model_copy(update={"store": store or wanted.store or str(self.home / "store")})
        self.server = Server(self.home / "prefect", database=database)
        self.environment = dict(environment or {})
        self._workers: dict[str, subprocess.Popen[bytes]] = {}
        self.site_type = site_type
        super().__init__(placed, home=self.home, api_url=self.server.url)

    def execute(self, recipe: Recipe, *, run_id: str | None = None) -> Run:
        self.start(recipe)
        return super().execute(recipe, run_id=run_id)

    def resume(self, run_id: str) -> Run:
        handle = self.attach(run_id)
        if not self.server.ours and handle.backend.alive():
            return handle  # another process holds it
        self.start(handle.journal.recipe())
        return super().resume(run_id)

    def attach(self, run_id: str) -> Run:
        self.start_server()
        return super().attach(run_id)

    def start_server(self) -> None:
        """The server alone: enough to look at runs. One that another process runs in this home is used."""
        self.server.start()
        self.api_url = self.server.url

    def start(self, recipe: Recipe) -> None:
        """Server, deployments, one worker a site, a regional aggregator of the recipe, and the coordinator's; nothing where they run.

        Raises UserError where another process runs a federation in this home.
        """
        self.start_server()
        if not self.server.ours:
            expected, fix = (
                "a folder in which no other process runs a federation",
                "wait for it, or give another --home",
            )
            raise UserError(field_error("--home", str(self.home), expected, fix))
        self.federation = self.federation.with_regions(recipe.schedule.regional)
        self.deploy(recipe)
        if not self._workers:
            self._bury()
        idle = max(1.0, len(self.federation.workplaces) / QUESTIONS)
        common = self.server.environment() | {"PREFECT_WORKER_QUERY_SECONDS": str(idle)} | self.environment
        self._spawn_worker(
            "coordinator",
            worker.command(self.federation.coordinator_pool, "coordinator", worker.CoordinatorWorker.type),
            common,
        )
        for site in self.federation.workplaces:
            config, path = self._site_config(site.name, recipe)
            args = worker.command(config.work_pool, site.name, self.site_type)
            self._spawn_worker(site.name, args, common | worker.environment(config, path))

    def _await_coordinator(self, backend: object) -> None:
        """Its worker was started a moment ago."""

    def _bury(self) -> None:
        """No worker runs, so no flow run does, whatever the server remembers of an earlier process that was killed."""
        with connect(self.api_url) as client:
            for run in find_runs(client, "fedflow", states=STARTED):
                client.set_flow_run_state(run.id, Crashed(message="its federation was killed"), force=True)

    def _spawn_worker(self, name: str, args: list[str], env: dict[str, str]) -> None:
        if name in self._workers:
            return
        process = _spawn(args, self.home / "logs" / f"worker-{name}.log", clean_environment(**env))
        self.server.watch(process)
        self._workers[name] = process

    def _site_config(self, name: str, recipe: Recipe) -> tuple[SiteConfig, Path]:
        site = next(s for s in self.federation.workplaces if s.name == name)
        folder = self.home / "sites" / name
        folder.mkdir(parents=True, exist_ok=True)
        assert self.federation.store is not None
        config = SiteConfig(
            name=name,
            pool=site.work_pool,
            store=self.federation.store,
            store_options=self.federation.store_options,
            state=ObjectStore(site.state or str(folder / "state")).url,
            allowed_imports=["*"],  # its sites are their coordinator's user
            preload=sorted({r.path.partition(":")[0] for r in (recipe.workload, recipe.model) if ":" in r.path}),
        )
        path = folder / "site.yaml"
        path.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_defaults=True), sort_keys=False))
        return config, path

    def processes(self) -> list[subprocess.Popen[bytes]]:
        """The workers that run now."""
        return list(self._workers.values())

    def ui_command(self, run: Run) -> str | None:
        return f"fedflow ui {run.id}" + ("" if self.home == DEFAULT_HOME.resolve() else f" --home {self.home}")

    def close(self) -> None:
        """Stop workers and server, and all that they started."""
        for process in self._workers.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGINT)
        for process in self._workers.values():
            _stop(process)
            self.server.forget(process)
        self._workers = {}
        self.server.stop()


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _spawn(args: list[str], log: Path, env: dict[str, str]) -> subprocess.Popen[bytes]:
    """A background process in a group of its own, its output appended to `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        return subprocess.Popen(
            args, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=env, start_new_session=True
        )


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End a process and its group; it is gone when this returns."""
    if process.poll() is None:
        stop_group(process.pid, signal.SIGTERM, gone=lambda: process.poll() is not None)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _tail(path: Path, lines: int = 10) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])
