"""SimEnv: every site on this machine, no workflow engine."""

from __future__ import annotations

import fcntl
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from fedflow.engine import amend_run, start_run
from fedflow.environments.base import DEFAULT_HOME, Run
from fedflow.environments.local import child_environment, new_run_id, read_log, remember, stop_group
from fedflow.errors import UserError, field_error
from fedflow.recipe import Federation, Recipe
from fedflow.registry import resolve
from fedflow.simulation.engine import BACKENDS, Backend
from fedflow.store.journal import Journal
from fedflow.store.objects import ObjectStore

__all__ = ["SimEnv"]


class SimEnv:
    """Simulates the sites of `federation` in the background.

    store:   URL; default `<home>/store`. home: folder of store, what the sites remember, and logs
    workers: processes that train; default: one a processor
    backend: "processes", or "debug": sites train in the coordinating process, one after the other
    """

    kind = "sim"

    def __init__(
        self,
        federation: Federation | int = 4,
        *,
        store: str | None = None,
        home: str | Path = DEFAULT_HOME,
        workers: int | None = None,
        backend: Backend = "processes",
    ) -> None:
        self.federation = Federation.of(federation) if isinstance(federation, int) else federation
        self.home = Path(home).resolve()
        if workers is not None and workers < 1:
            raise UserError(
                field_error("workers", workers, "a count of at least 1", "leave it out for one a processor")
            )
        if backend not in BACKENDS:
            raise UserError(field_error("backend", backend, f"one of {', '.join(BACKENDS)}", "choose one of them"))
        self.workers, self.backend = workers, backend
        self.store = ObjectStore(
            store or self.federation.store or str(self.home / "store"), self.federation.store_options
        )

    def execute(self, recipe: Recipe, *, run_id: str | None = None) -> Run:
        """Start `recipe`; a run of that id with this recipe is resumed. Raises before anything is trained."""
        resolve("workloads", recipe.workload.path, field="workload")
        run = run_id or new_run_id(self.store, recipe)
        journal = start_run(self.store, run, recipe, self.federation.names)
        amend_run(journal, recipe, sites=self.federation.names)
        return self.resume(run)

    def resume(self, run_id: str) -> Run:
        Journal(self.store, run_id).record()
        handle = self.attach(run_id)
        if not handle.backend.alive():
            remember(self, run_id)
            _start(self, run_id)
        return handle

    def attach(self, run_id: str) -> Run:
        Journal(self.store, run_id).record()
        return Run(run_id, self.store, _Process(self.home, run_id))

    def ui_command(self, run: Run) -> str | None:
        """There is no UI without a server."""
        return None

    def options(self) -> dict[str, Any]:
        """What `remember` keeps."""
        return {"workers": self.workers, "backend": self.backend}

    def close(self) -> None:
        """Nothing is kept open; runs go on."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _start(env: SimEnv, run: str) -> None:
    """A process that simulates; it holds the run's lock for as long as it lives."""
    files = _Process(env.home, run)
    files.log.parent.mkdir(parents=True, exist_ok=True)
    spec = {
        "run": run,
        "store": env.store.url,
        "store_options": env.federation.store_options,
        "book": str(env.home / "sites" / f"{run}.sqlite"),
        "workers": env.workers,
        "backend": env.backend,
    }
    with files.lock.open("w") as lock, files.log.open("a") as log:
        fcntl.flock(lock, fcntl.LOCK_EX)
        process = subprocess.Popen(
            [sys.executable, "-m", "fedflow.simulation", json.dumps(spec)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=child_environment(OPENBLAS_NUM_THREADS="1"),  # whose threads would keep it from forking
            pass_fds=[lock.fileno()],
            start_new_session=True,
        )
        lock.write(str(process.pid))


class _Process:
    """One simulating process, known by the lock that it holds."""

    def __init__(self, home: Path, run: str) -> None:
        self.lock, self.log = home / "runs" / f"{run}.lock", home / "logs" / f"{run}.log"

    def alive(self) -> bool:
        if not self.lock.exists():
            return False
        _reap()
        with self.lock.open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    def abort(self) -> None:
        if self.alive():
            stop_group(int(self.lock.read_text()), signal.SIGTERM, gone=lambda: not self.alive())

    def logs(self, site: str | None) -> Iterator[str]:
        return read_log(self.log, site)

    def ui(self) -> str | None:
        return None


def _reap() -> None:
    """Collect finished children, so that none is left as a zombie."""
    subprocess._cleanup()  # type: ignore[attr-defined]
