"""A federation as users deploy it, whose workers can be hurt: for the tests, and for `benchmarks.chaos`."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import psutil
import yaml

from fedflow.environments.prod import ProdEnv
from fedflow.prefect.api import absence, connect
from fedflow.prefect.worker import CoordinatorWorker, command
from fedflow.recipe import Federation, FederationSite
from fedflow.store.signing import COORDINATOR_KEY, PrivateKey
from tests.servers import PrefectServer, S3Server

ROOT = Path(__file__).parents[1]
MARK = "FEDFLOW_TEST_WORKER"
"""In the environment of a worker and of all below it, whoever is their parent by now: which worker."""


def awaited(done: Callable[[], bool], what: str, seconds: float = 600.0) -> None:
    """Return once `done()`. Raises TimeoutError."""
    until = time.monotonic() + seconds
    while not done():
        if time.monotonic() > until:
            raise TimeoutError(f"{what}: not within {seconds:.0f} s")
        time.sleep(0.05)


class Worker:
    """A worker in a session of its own, and what it starts."""

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self.name, self.log = name, log
        self._command, self._mark = command, f"{name}-{uuid.uuid4().hex}"
        self._environment = {**environment, MARK: self._mark}
        self._process: subprocess.Popen[bytes] | None = None
        self._groups: set[int] = set()  # of every start

    def start(self, **more: str) -> None:
        """more: variables of this start only"""
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                env={**self._environment, **more},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._groups.add(self._process.pid)

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int | None:
        """Of its newest start."""
        return self._process.pid if self._process is not None else None

    def processes(self) -> list[psutil.Process]:
        """It and everything that any start of it has left, its trainers' own children too."""
        return [p for p in psutil.process_iter() if _alive(p) and _environ(p).get(MARK) == self._mark]

    def at_work(self) -> list[psutil.Process]:
        """The processes of its flow runs: they are in groups of their own; a worker's tools are in its group."""
        return [p for p in self.processes() if _group(p) not in (None, *self._groups)]

    def resting(self) -> list[psutil.Process]:
        """Its newest start and its tools, without what works on a flow run."""
        return [p for p in self.processes() if _group(p) == self.pid]

    def kill_at_work(self) -> None:
        """SIGKILL to all that works on a flow run."""
        _kill(self.at_work())

    def kill(self) -> None:
        """SIGKILL to the worker alone: what it has started goes on, if it can."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def lose(self) -> None:
        """SIGKILL to it and to everything that it has started, at once: its machine is gone."""
        _kill(self.processes())
        if self._process is not None:
            self._process.wait()

    def stop(self) -> None:
        """SIGTERM, and wait."""
        assert self._process is not None
        self._process.terminate()
        self._process.wait(600)


def _group(process: psutil.Process) -> int | None:
    with suppress(ProcessLookupError):
        return os.getpgid(process.pid)
    return None


def _environ(process: psutil.Process) -> dict[str, str]:
    with suppress(psutil.Error, OSError):
        found: dict[str, str] = process.environ()
        return found
    return {}


def _alive(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    return False


def _kill(processes: Sequence[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    awaited(lambda: not any(map(_alive, processes)), "processes that were killed end")


def _enrolled(home: Path, federation: Federation) -> tuple[Federation, dict[str, dict[str, str]]]:
    """The federation with keys that are made in `home`; site -> what its configuration says about them."""
    coordinator = PrivateKey.create(home / "coordinator.key").public
    made = {name: home / f"{name}.key" for name in federation.names}
    sites = [FederationSite(name=name, key=PrivateKey.create(path).public) for name, path in made.items()]
    identity = {name: {"key": str(path), "coordinator_key": coordinator} for name, path in made.items()}
    return federation.model_copy(update={"sites": sites, "coordinator_key": coordinator}), identity


class Deployed:
    """ProdEnv over a Prefect server and an S3 store, the workers started by the documented commands, as `with` begins.

    fields: site -> more fields of its configuration; environment: more variables of every worker
    keys: the coordinator and every site have one, and sign; name: of the federation, its pools and sites, where the server has others
    It puts the store's credentials into this process's environment, since the coordinator's side here reads it too.
    """

    def __init__(
        self,
        home: Path,
        prefect: PrefectServer,
        s3: S3Server,
        *,
        sites: int = 3,
        environment: Mapping[str, str] | None = None,
        fields: Mapping[str, Mapping[str, Any]] | None = None,
        keys: bool = False,
        name: str | None = None,
    ) -> None:
        self.home, self._before = home, dict(os.environ)
        os.environ |= s3.env
        store = f"s3://{s3.new_bucket()}/federation"
        federation = Federation.of(sites, store=store)
        if name is not None:
            members = [FederationSite(name=f"{name}-{i + 1}") for i in range(sites)]
            federation = Federation(name=name, sites=members, store=store, coordinator_pool=f"{name}-coordinator")
        identity: dict[str, dict[str, str]] = {}
        if keys:
            federation, identity = _enrolled(home, federation)
            os.environ[COORDINATOR_KEY] = str(home / "coordinator.key")
        variables = {**os.environ, **prefect.env, "PREFECT_WORKER_QUERY_SECONDS": "1", **(environment or {})}
        self.env = ProdEnv(federation, home=home, api_url=prefect.url)
        self.coordinator = Worker(
            "coordinator",
            command(federation.coordinator_pool, "coordinator", CoordinatorWorker.type),
            variables,
            home / "coordinator.log",
        )
        self.sites: dict[str, Worker] = {}
        for name in federation.names:
            config = home / f"{name}.yaml"
            given = {
                "name": name,
                "store": store,
                "state": str(home / name),
                "allowed_imports": ["*"],
                **identity.get(name, {}),
            }
            given |= (fields or {}).get(name, {})
            config.write_text(yaml.safe_dump(given))
            start = [sys.executable, "-m", "fedflow.cli", "site", "start", "--config", str(config)]
            self.sites[name] = Worker(name, start, variables, home / f"{name}.log")

    @property
    def workers(self) -> list[Worker]:
        return [self.coordinator, *self.sites.values()]

    def __enter__(self) -> Self:
        self.env.deploy()
        for worker in self.workers:
            worker.start()
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.workers:
            worker.lose()
        os.environ.clear()
        os.environ.update(self._before)

    def await_workers(self) -> None:
        """Until the server has seen every one of them."""
        pools = [self.env.federation.coordinator_pool, *(s.work_pool for s in self.env.federation.sites)]
        with connect(self.env.api_url) as client:
            for pool in pools:
                awaited(lambda pool=pool: absence(client, pool) is None, f"a worker on {pool}")  # type: ignore[misc]
