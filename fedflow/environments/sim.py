"""SimEnv: every site on this machine, no workflow engine."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self, TextIO

from fedflow.engine import amend_run, start_run
from fedflow.engine.rounds import record_abort, recording_outcome
from fedflow.environments.base import DEFAULT_HOME, Run
from fedflow.environments.local import child_environment, new_run_id, read_log, remember, stop_group
from fedflow.errors import UserError, field_error
from fedflow.recipe import Federation, Recipe
from fedflow.registry import resolve
from fedflow.simulation.clock import noted_trace
from fedflow.simulation.engine import Backend, check_options, simulate
from fedflow.simulation.trace_files import read_trace
from fedflow.simulation.traces import Trace
from fedflow.store.journal import Journal
from fedflow.store.objects import ObjectStore

__all__ = ["SimEnv"]

log = logging.getLogger(__name__)


class SimEnv:
    """Simulates the sites of `federation` in the background; with backend "debug" in this process.

    store:   URL; default `<home>/store`. home: folder of store, what the sites remember, and logs
    workers: processes that train; default: one a processor
    backend: "processes"; "ray": actors of the Ray cluster that RAY_ADDRESS names, or of one on this machine; "debug": sites
             train one after the other in the process that calls `execute` or `resume`, which return when the run has ended, or
             failed; breakpoints work, and a KeyboardInterrupt stops the run and goes on to the caller
    tracking: show each start of a run as one flow run on the Prefect server of the settings (PREFECT_API_URL)
    trace:   how the sites fare over simulated time, or the file that says it; noted with each run at its start, which keeps to it.
             Default: everyone answers, and no time is simulated
    journal_every: every so many rounds, and after the last, the model is written; a run that is killed does the rounds since again
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
        tracking: bool = False,
        trace: Trace | str | Path | None = None,
        journal_every: int = 1,
    ) -> None:
        self.federation = Federation.of(federation) if isinstance(federation, int) else federation
        self.home = Path(home).resolve()
        self.trace = read_trace(trace) if isinstance(trace, (str, Path)) else trace
        check_options(backend, workers, journal_every=journal_every, trace=self.trace)
        self.workers, self.backend, self.tracking, self.journal_every = workers, backend, tracking, journal_every
        self._checked = False
        self.store = ObjectStore(
            store or self.federation.store or str(self.home / "store"), self.federation.store_options
        )

    def execute(self, recipe: Recipe, *, run_id: str | None = None) -> Run:
        """Start `recipe`; a run of that id with this recipe is resumed. Raises before anything is trained."""
        resolve("workloads", recipe.workload.path, field="workload")
        self._check_tracking()
        run = run_id or new_run_id(self.store, recipe)
        journal = start_run(self.store, run, recipe, self.federation.names)
        amend_run(journal, recipe, sites=self.federation.names)
        noted_trace(journal, self.trace)
        return self.resume(run)

    def resume(self, run_id: str) -> Run:
        Journal(self.store, run_id).record()
        handle = self.attach(run_id)
        if not handle.backend.alive():
            tracked = self.tracking and self._can_track()
            remember(self, run_id)
            with _locked(self, run_id) as lock:
                if self.backend != "debug":
                    _start(self, run_id, lock)
                if tracked:
                    _track(self, run_id)
                if self.backend == "debug":
                    _simulate_here(self, run_id)
        return handle

    def _check_tracking(self) -> None:
        """Raises UserError where no Prefect API is configured that could show runs."""
        if self.tracking and not self._checked:
            from fedflow.environments.tracking import check_api

            check_api()
            self._checked = True

    def _can_track(self) -> bool:
        """A run that was begun goes on without an API, too."""
        try:
            self._check_tracking()
        except UserError as error:
            log.warning("%s; the run goes on, and is not shown", error)
            return False
        return True

    def attach(self, run_id: str) -> Run:
        Journal(self.store, run_id).record()
        return Run(run_id, self.store, _Process(self.home, run_id))

    def ui_command(self, run: Run) -> str | None:
        """There is no UI without a server."""
        if not self.tracking:
            return None
        return f"fedflow ui {run.id}" + ("" if self.home == DEFAULT_HOME.resolve() else f" --home {self.home}")

    def options(self) -> dict[str, Any]:
        """What `remember` keeps."""
        found = {"workers": self.workers, "backend": self.backend, "tracking": self.tracking}
        return found | ({"journal_every": self.journal_every} if self.journal_every > 1 else {})

    def close(self) -> None:
        """Nothing is kept open; runs go on."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


@contextlib.contextmanager
def _locked(env: SimEnv, run: str) -> Iterator[TextIO]:
    """The run's lock, held until the body ends and by whoever was handed it; it is to say which process group stops the run."""
    files = _Process(env.home, run)
    files.log.parent.mkdir(parents=True, exist_ok=True)
    with files.lock.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock


def _start(env: SimEnv, run: str, lock: TextIO) -> None:
    """A process that simulates; it holds the run's lock for as long as it lives."""
    spec = {
        "run": run,
        "store": env.store.url,
        "store_options": env.federation.store_options,
        "book": str(_book(env, run)),
        "workers": env.workers,
        "backend": env.backend,
        "journal_every": env.journal_every,
    }
    with _Process(env.home, run).log.open("a") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "fedflow.simulation", run],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=child_environment(OPENBLAS_NUM_THREADS="1"),  # whose threads would keep it from forking
            pass_fds=[lock.fileno()],
            start_new_session=True,
        )
    assert process.stdin
    with process.stdin as stdin:  # other users see a command line, and a store's options may be credentials
        stdin.write(json.dumps(spec).encode())
    print(process.pid, file=lock, flush=True)


def _simulate_here(env: SimEnv, run: str) -> None:
    """In this process, to the run's end. What it failed by is in the journal, and in the log with its traceback."""
    journal = Journal(env.store, run)
    with _logged(_Process(env.home, run).log):
        try:
            with recording_outcome(journal):
                simulate(
                    journal.recipe(),
                    journal.sites(),
                    store=env.store.url,
                    store_options=env.federation.store_options,
                    run=run,
                    book=_book(env, run),
                    backend="debug",
                    journal_every=env.journal_every,
                )
        except Exception:
            log.exception("the run has failed")
        except KeyboardInterrupt:
            record_abort(journal, "stopped")
            raise


def _book(env: SimEnv, run: str) -> Path:
    return env.home / "sites" / f"{run}.sqlite"


@contextlib.contextmanager
def _logged(path: Path) -> Iterator[None]:
    """What this process logs goes into that file, too."""
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()


def _track(env: SimEnv, run: str) -> None:
    """A process beside it that tells the Prefect server of it; it outlives the run for as long as it has something to tell."""
    with _Process(env.home, run).log.open("a") as log:
        subprocess.Popen(
            [sys.executable, "-m", "fedflow.environments.tracking", json.dumps({"run": run, "home": str(env.home)})],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=child_environment(DO_NOT_TRACK="1"),
            start_new_session=True,
        )


class _Process:
    """One simulating process, known by the lock that it holds."""

    def __init__(self, home: Path, run: str) -> None:
        self.lock, self.log = home / "runs" / f"{run}.lock", home / "logs" / f"{run}.log"
        self.url = home / "runs" / f"{run}.url"

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
        if not self.alive():
            return
        if not (group := self.lock.read_text()):
            fix = "stop it where it was started, with Ctrl-C"
            raise UserError(field_error("backend", "debug", "a run in a process of its own, which can be stopped", fix))
        stop_group(int(group), signal.SIGTERM, gone=lambda: not self.alive())

    def logs(self, site: str | None) -> Iterator[str]:
        return read_log(self.log, site)

    def ui(self) -> str | None:
        """Of the newest start that was tracked."""
        return (self.url.read_text() or None) if self.url.exists() else None


def _reap() -> None:
    """Collect finished children, so that none is left as a zombie."""
    subprocess._cleanup()  # type: ignore[attr-defined]
