"""Where cases happen: PostgreSQL, a Prefect server, S3 and fedflow's workers, and one run that is hurt on purpose."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import FlowRun

from fedflow.engine.summary import Status
from fedflow.environments.base import Run
from fedflow.errors import FedflowError, StoreUnavailable, UnreachableError
from fedflow.prefect.api import OUTAGE, cancel, connect, find_runs, run_tag
from fedflow.store.journal import Journal
from fedflow.testing.faults import Fault, fail_at, watching
from tests import builders
from tests.deployed import ROOT, Deployed, awaited
from tests.servers import PostgresServer, PrefectServer, S3Server, postgres_server, prefect_server, s3_server

MINUTES = 900.0  # seconds that anything may take on a busy machine
GONE = 10.0  # seconds after its end within which nothing of a run is left running

ALGORITHMS: dict[str, dict[str, Any]] = {
    "fedavg": {"algorithm": {"kind": "fedavg"}},
    "scaffold": {"algorithm": {"kind": "scaffold"}, "training": {"batch_size": 8, "optimizer": {"lr": 0.1}}},
    "diloco": {"algorithm": {"kind": "diloco", "local_steps_per_round": 4}},
}

Phase = Literal["dispatch", "training", "upload", "closing", "aggregation", "commit", "evaluation"]
PLACES: dict[Phase, tuple[str, str | None]] = {  # step of the journal, and the site whose it is
    "dispatch": ("attempt", None),
    "training": ("training", "site-2"),
    "upload": ("update manifest", "site-2"),
    "closing": ("closing", None),
    "aggregation": ("server objects", None),
    "commit": ("manifest", None),  # between the objects and the manifest
    "evaluation": ("evaluation", None),
}
"""What a round does in turn."""


class Ground:
    """Servers and workers for any number of trials, one at a time. database: "postgres", or "sqlite" for the Prefect server."""

    def __init__(self, database: str = "postgres", sites: int = 3) -> None:
        self.database, self._sites = database, sites
        self.seconds: dict[str, float] = {}  # of an undisturbed run, by algorithm

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._enter(stack)
            self._open = stack.pop_all()
        return self

    def _enter(self, stack: ExitStack) -> None:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fedflow-chaos-")))
        self.home, self.fault_file = home, home / "fault.json"
        self.temporary = home / "tmp"
        self.temporary.mkdir()
        url = None
        self.postgres: PostgresServer | None = None
        if self.database == "postgres":
            self.postgres = stack.enter_context(postgres_server())
            url = self.postgres.new_database()
        self.prefect: PrefectServer = stack.enter_context(prefect_server(url))
        self.s3: S3Server = stack.enter_context(s3_server())
        environment = watching(self.fault_file, {"PYTHONPATH": str(ROOT)}) | {
            "TMPDIR": str(self.temporary),
            "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
        }
        stack.enter_context(_no_prefect_settings(self.prefect))
        deployed = Deployed(home, self.prefect, self.s3, sites=self._sites, environment=environment)
        self.deployed = stack.enter_context(deployed)
        self.env, self.sites, self.coordinator = deployed.env, deployed.sites, deployed.coordinator
        deployed.await_workers()

    def __exit__(self, *_: object) -> None:
        self._open.close()

    @property
    def bucket(self) -> str:
        return str(self.env.federation.store).split("/")[2]

    def heal(self) -> None:
        """Everything runs, and nothing is hurt."""
        self.fault_file.unlink(missing_ok=True)
        if self.postgres is not None and not self.postgres.running:
            self.postgres.start()
        for server in (self.s3, self.prefect):
            if not server.running:
                server.start()
        for worker in self.deployed.workers:
            if not worker.running:
                worker.start()

    def keep_logs(self, folder: Path) -> None:
        """A copy of what servers and workers have said so far."""
        folder.mkdir(parents=True, exist_ok=True)
        for worker in self.deployed.workers:
            shutil.copy(worker.log, folder)
        for name, server in (("prefect", self.prefect), ("s3", self.s3), ("postgres", self.postgres)):
            if server is not None:
                shutil.copy(server.log, folder / f"{name}.log")

    def begin_anew(self) -> None:
        """After a trial of which nobody knows where it stands: nothing of it is left to disturb the next."""
        for worker in self.deployed.workers:
            worker.lose()
        self.heal()
        with connect(self.env.api_url) as client:
            cancel(client, find_runs(client, "fedflow"), "its trial is over", force=True)
        self.deployed.await_workers()


@contextmanager
def _no_prefect_settings(server: PrefectServer) -> Iterator[None]:
    """This process talks to that server, and patiently, whatever its user has configured."""
    before = dict(os.environ)
    for name in [name for name in os.environ if name.startswith("PREFECT_")]:
        del os.environ[name]
    os.environ.update(server.env)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@dataclass
class Verdict:
    """How a trial went. why: what does not hold; retrained: site -> trainings beyond those that count; lost: seconds more
    than an undisturbed run; same: whether the model and the state have the bytes of the reference run."""

    why: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    retrained: Mapping[str, int] = field(default_factory=dict)
    lost: float | None = None
    same: bool | None = None

    @property
    def holds(self) -> bool:
        return not self.why


class Trial:
    """One run of one algorithm, which a case hurts."""

    def __init__(self, ground: Ground, algorithm: str, name: str) -> None:
        self.ground, self.algorithm, self.name = ground, algorithm, f"{name}-{algorithm}"
        self.folder = Path(tempfile.mkdtemp(prefix="trial-", dir=ground.home))
        self.log = self.folder / "trainings"
        self.fields: dict[str, Any] = {"evaluation": "tests.builders:HeldOut", **ALGORITHMS[algorithm]}
        self.verdict = Verdict()
        self.run: Run
        self.fault: Fault | None = None
        self.resumes = 0
        self.ends: Status = "finished"  # as which the run is to end
        self.settles = GONE
        self._started = time.monotonic()

    # -- what a case does
    def start(self, fault: Fault | None = None, **changes: Any) -> Run:
        """Start the run, with `changes` to its recipe; it meets `fault`."""
        self.fields |= changes
        self.fault = fault
        if fault is not None:
            fault.write(self.ground.fault_file)
        workload = {"workload": {"path": "tests.builders:Blobs", "args": {"log": str(self.log)}}}
        self._started = time.monotonic()
        self.run = self.ground.env.execute(builders.recipe(**(workload | self.fields)), run_id=self.name)
        return self.run

    def strike(self, step: str, *, site: str | None = None, when: str = "before", effect: str = "kill") -> Fault:
        """A fault in round 1, once."""
        token = self.folder / "token"
        return fail_at(step, site=site, round=1, when=when, effect=effect, token=token)  # type: ignore[arg-type]

    def hold(self, phase: Phase, **changes: Any) -> Fault:
        """Start the run, and return when it is in that phase of round 1, where it stays until the fault is released."""
        step, site = PLACES[phase]
        fault = self.strike(step, site=site, effect="hold")
        self.start(fault, **changes)
        self.until_struck(fault)
        return fault

    def until_struck(self, fault: Fault) -> None:
        status = self.run.wait(MINUTES, until=lambda: fault.struck, every=0.2)
        if not fault.struck:
            raise FedflowError(f"it is {status}, and its fault did not strike", run=self.name)

    def finish(self, *, resumes: int = 5) -> None:
        """Until the run has ended; one that was interrupted is resumed, as its user would do, so many times at most."""
        while (status := self.run.wait(MINUTES)) in ("interrupted", "failed") and self.resumes < resumes:
            last = self.run.summary().last
            if status == "failed" and last is not None:
                self.note(" ".join(last.message.split())[:200])
            self.resumes += 1
            awaited(self._resumed, f"{self.name} is resumed", MINUTES)
        self.verdict.lost = time.monotonic() - self._started - self.ground.seconds.get(self.algorithm, 0.0)

    def _resumed(self) -> bool:
        with suppress(UnreachableError, StoreUnavailable, *OUTAGE):
            self.run = self.ground.env.resume(self.run.id)
            return True
        return False

    def note(self, text: str) -> None:
        self.verdict.notes.append(text)

    def expect(self, holds: bool, otherwise: str) -> None:
        """What a case promises besides what is judged of all."""
        if not holds:
            self.verdict.why.append(otherwise)

    # -- what it looks at
    @property
    def journal(self) -> Journal:
        return self.run.journal

    @property
    def nonce(self) -> str:
        return self.journal.record().nonce

    def flow_runs(self, client: SyncPrefectClient, *tags: str, **more: Any) -> list[FlowRun]:
        return find_runs(client, run_tag(self.nonce), *tags, **more)

    def contributors(self) -> list[list[str]]:
        """By round."""
        found = (self.journal.manifest(r, p) for r, p in self.journal.committed())
        return [sorted(m.contributors) for m in found if m is not None]

    def excluded(self, round: int) -> Mapping[str, str]:
        return self.run.summary().rounds[round].excluded

    # -- how it went
    def judge(self) -> Verdict:
        """The run ended as asked: to the bytes of a reference run with the same contributors, and left nothing."""
        self.ground.fault_file.unlink(missing_ok=True)
        status = self.run.status()
        self.expect(status == self.ends, f"the run is {status}")
        if self.resumes:
            self.note(f"resumed {self.resumes} times" if self.resumes > 1 else "resumed")
        if status == "finished":
            self._compare()
        self.nothing_left(self.settles)
        return self.verdict

    def _compare(self) -> None:
        rounds = self.contributors()
        if anew := self._began_anew():
            self.note(f"no reference run: {', '.join(anew)} lost what its training had kept, and began anew")
        else:
            self._compare_bytes(rounds)
        counted = Counter(site for sites in rounds for site in sites)
        self.verdict.retrained = dict(builders.trainings(self.log) - counted)

    def _began_anew(self) -> list[str]:
        """Sites that trained before, and went on without what their training had kept."""
        found = [m for r, p in self.journal.committed() if (m := self.journal.manifest(r, p)) is not None]
        notes = {(s, c.training_state or "") for m in found for s, c in m.contributors.items()}
        first = "fresh (first participation)"
        return sorted({s for s, note in notes if note.startswith("fresh") and note != first})

    def _compare_bytes(self, rounds: list[list[str]]) -> None:
        sites = self.ground.env.federation.names
        expected = builders.run(builders.recipe(**self.fields), sites=sites, order=lambda round, _: rounds[round])
        self.verdict.same = builders.bits(self.journal) == builders.bits(expected)
        self.expect(self.verdict.same, "other bytes than the reference run's")

    def nothing_left(self, seconds: float) -> None:
        """Within so many seconds no flow run of this run is active, and no process works on one."""
        began = time.monotonic()
        with connect(self.ground.env.api_url) as client:
            while left := self._left(client):
                if time.monotonic() - began > seconds:
                    self.expect(False, f"left after {seconds:.0f} s: {', '.join(left)}")
                    return
                threading.Event().wait(0.2)
        if (took := time.monotonic() - began) > GONE:
            self.note(f"{took:.0f} s until the API knew of its end")

    def _left(self, client: SyncPrefectClient) -> list[str]:
        at_work = [f"process {p.pid} of {w.name}" for w in self.ground.deployed.workers for p in w.at_work()]
        return at_work + [f"{r.name} ({r.state_name})" for r in self.flow_runs(client)]

    def give_up(self, error: Exception) -> Verdict:
        """The case itself went wrong."""
        told = error.reason if isinstance(error, FedflowError) else f"{type(error).__name__}: {error}"
        self.expect(False, " ".join(told.split())[:500])
        return self.verdict
