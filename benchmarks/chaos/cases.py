"""The fault matrix: what happens to a run, case by case. Every case ends with the run finished, unless it says otherwise."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from prefect.client.schemas.objects import StateType
from prefect.states import Cancelling, Crashed

from benchmarks.chaos.ground import GONE, MINUTES, PLACES, Phase, Trial
from fedflow.prefect.api import ACTIVE, connect
from fedflow.prefect.deploy import training_deployment
from fedflow.testing.faults import fail_at
from tests import builders
from tests.deployed import ROOT, Worker, awaited

__all__ = ["CASES", "Case"]


@dataclass(frozen=True)
class Case:
    """what: what is hurt; retrains: sites that may train more than once for a round; needs: database ->
    why it cannot be tried here."""

    name: str
    what: str
    act: Callable[[Trial], None]
    retrains: Collection[str] = ()
    needs: Callable[[str], str | None] = lambda database: None


def pause(seconds: float) -> None:
    threading.Event().wait(seconds)


# -- a site's processes ------------------------------------------------------------------------------------------------
def trainer_killed(step: str, when: str = "before") -> Callable[[Trial], None]:
    def act(t: Trial) -> None:
        fault = t.strike(step, site="site-2", when="after" if step == "training" else when)
        t.start(fault)
        t.finish(resumes=0)
        t.expect(fault.struck, "nothing was killed")

    return act


def worker_hurt(hurt: Callable[[Worker], None]) -> Callable[[Trial], None]:
    """At site-2, in the middle of its training; its worker is started again at once, as systemd does."""

    def act(t: Trial) -> None:
        fault = t.hold("training")
        worker = t.ground.sites["site-2"]
        hurt(worker)
        fault.release()
        worker.start()
        t.finish(resumes=0)

    return act


def killed_with_trainer(worker: Worker) -> None:
    worker.kill()
    worker.kill_at_work()


# -- the coordinator's -------------------------------------------------------------------------------------------------
def coordinator_killed(phase: Phase, hurt: Callable[[Worker], None] = Worker.kill_at_work) -> Callable[[Trial], None]:
    def act(t: Trial) -> None:
        fault = t.hold(phase)
        hurt(t.ground.coordinator)
        fault.release()
        if not t.ground.coordinator.running:
            t.ground.coordinator.start()
        t.finish()

    return act


def killed_after_commit(t: Trial) -> None:
    """Right after the manifest, before anything else."""
    fault = t.strike("plan", effect="hold")
    t.start(fault)
    t.until_struck(fault)
    t.ground.coordinator.kill_at_work()
    fault.release()
    t.finish()


def killed_between_results(t: Trial) -> None:
    """site-1's update has come, site-2 still trains."""
    fault = t.hold("training")
    (phase,) = t.journal.recipe().phases
    inbox = t.journal.inbox("site-1", 1, phase)
    awaited(lambda: any(key.endswith(".json") for key in t.journal.store.list(inbox)), "site-1's update", MINUTES)
    t.ground.coordinator.kill_at_work()
    fault.release()
    t.finish()


def two_coordinators(t: Trial) -> None:
    fault = t.hold("training")
    env = t.ground.env
    parameters: dict[str, Any] = {
        "recipe": t.journal.recipe().model_dump(mode="json"),
        "federation": env.federation.model_dump(mode="json"),
        "run_id": t.run.id,
    }
    with connect(env.api_url) as client:
        deployment = client.read_deployment_by_name(training_deployment(env.federation))
        client.create_flow_run_from_deployment(deployment.id, parameters=parameters, name=f"{t.run.id}, again")
        awaited(
            lambda: len([r for r in t.flow_runs(client, "training") if r.state_type == StateType.RUNNING]) == 2, "two"
        )
        fault.release()
        t.finish(resumes=0)


# -- the servers -------------------------------------------------------------------------------------------------------
def down(server: Literal["prefect", "s3"], phase: Phase, seconds: float) -> Callable[[Trial], None]:
    def act(t: Trial) -> None:
        fault, killed = t.hold(phase), getattr(t.ground, server)
        killed.kill()
        fault.release()
        pause(seconds)
        killed.start()
        if server == "prefect":  # its clients' pauses double: the last one may end that much later
            t.settles += seconds
        t.finish(resumes=0)

    return act


def postgres_restarted(phase: Phase) -> Callable[[Trial], None]:
    def act(t: Trial) -> None:
        assert t.ground.postgres is not None
        fault = t.hold(phase)
        t.ground.postgres.restart()
        fault.release()
        t.finish(resumes=0)

    return act


def on_postgres(database: str) -> str | None:
    return None if database == "postgres" else "the server is on SQLite"


def store_slow(t: Trial) -> None:
    """It stops answering for 5 s, again and again, from round 1 on until the run has ended."""
    fault = t.hold("dispatch")
    over = threading.Event()

    def stall() -> None:
        while not over.wait(2):
            t.ground.s3.freeze()
            over.wait(5)
            t.ground.s3.thaw()

    stalls = threading.Thread(target=stall)
    stalls.start()
    try:
        fault.release()
        t.finish(resumes=0)
    finally:
        over.set()
        stalls.join()


def store_full(t: Trial) -> None:
    """The run fails at its deadline and names the object; with room again it is resumed."""
    fault = t.hold("upload", attempts=1, timeouts={"round_deadline": 90, "transfer_timeout": 20})
    t.ground.s3.fill(t.ground.bucket)
    try:
        fault.release()
        status = t.run.wait(MINUTES)
        t.expect(status in ("failed", "interrupted"), f"with a full store the run is {status}")
        with connect(t.ground.env.api_url) as client:
            (training,) = t.flow_runs(client, "training", states=[StateType.FAILED])
        said = training.state.message or "" if training.state else ""
        t.expect("cannot create" in said and "rounds/00001" in said, f"it does not say which object: {said!r}")
    finally:
        t.ground.s3.empty(t.ground.bucket)
    t.finish()


# -- clocks ------------------------------------------------------------------------------------------------------------
FAKETIME = next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)


def needs_faketime(database: str) -> str | None:
    return None if FAKETIME is not None else "no libfaketime: apt-get install faketime"


def clock_wrong(offset: str, says: str) -> Callable[[Trial], None]:
    """site-2's; the run's deadline is nearer than the hour. The store refuses its word too: its worker says in its own log what is wrong.

    says: part of why no round counts that site
    """

    def act(t: Trial) -> None:
        worker = t.ground.sites["site-2"]
        worker.stop()
        logged = worker.log.stat().st_size
        worker.start(LD_PRELOAD=str(FAKETIME), FAKETIME=offset, FAKETIME_DONT_FAKE_MONOTONIC="1")
        try:
            t.start(quorum=2, timeouts={"round_deadline": "10m", "quorum_grace": "60s"})
            t.finish(resumes=0)
            excluded = [r.excluded for r in t.run.summary().rounds]
            t.note("; ".join(sorted({why for of_round in excluded for why in of_round.values()}))[:300])
            for number, of_round in enumerate(excluded):
                so = of_round.keys() == {"site-2"} and says in of_round["site-2"]
                t.expect(so, f"round {number} excluded {of_round}, expected site-2 alone with {says!r}")
            t.expect(b"clock: found" in worker.log.read_bytes()[logged:], "its worker's log does not name the clock")
        finally:
            worker.lose()
            worker.start()

    return act


# -- sites that come, go, and forget -----------------------------------------------------------------------------------
def machine_lost(t: Trial) -> None:
    """site-2's, in training; back a minute later."""
    fault = t.hold("training")
    worker = t.ground.sites["site-2"]
    worker.lose()
    fault.release()
    pause(60)
    worker.start()
    t.finish(resumes=0)


def rejoins(t: Trial) -> None:
    """site-3 is away for rounds 0 to 2, and counts again in round 3."""
    worker = t.ground.sites["site-3"]
    worker.lose()
    fault = fail_at("plan", round=3, effect="hold", token=t.folder / "token")
    t.start(fault, rounds=5, quorum=2, timeouts={"round_deadline": "10m", "quorum_grace": "5s"})
    t.until_struck(fault)
    logged = worker.log.stat().st_size
    worker.start()
    awaited(lambda: b"started" in worker.log.read_bytes()[logged:], "site-3's worker")
    fault.release()
    t.finish(resumes=0)
    t.expect(all("site-3" not in sites for sites in t.contributors()[:3]), "site-3 was there")
    t.expect("site-3" in t.contributors()[-1], "site-3 is not asked again")


def state_lost(t: Trial) -> None:
    """All that site-2 remembers, between rounds 0 and 1. An algorithm that needs it goes on without the site."""
    fault = t.strike("plan", effect="hold")
    t.start(fault, quorum=2, timeouts={"round_deadline": "10m", "quorum_grace": "60s"})
    t.until_struck(fault)
    shutil.rmtree(t.ground.home / "site-2", ignore_errors=True)
    fault.release()
    t.finish(resumes=0)
    why = t.excluded(1).get("site-2")
    t.note(f"site-2: {why}" if why else "site-2 goes on")
    keeps = bool(t.journal.recipe().computation.SiteState.__dataclass_fields__)
    t.expect(not keeps or (why is not None and "site state lost" in why), f"found {why!r}, expected `site state lost`")


def straggler(t: Trial) -> None:
    """site-3 hangs past the deadline of round 1."""
    fault = fail_at("training", site="site-3", round=1, effect="hang", token=t.folder / "token")
    t.start(fault, quorum=2, attempts=1, timeouts={"round_deadline": 90, "quorum_grace": 89, "train_timeout": 89})
    t.finish(resumes=0)
    t.expect(list(t.excluded(1)) == ["site-3"], "site-3 counts")


def quorum_lost(t: Trial) -> None:
    """site-3 is needed, and hangs in round 1: the run fails; with the site back it is resumed."""
    fault = fail_at("training", site="site-3", round=1, effect="hang", token=t.folder / "token")
    t.start(fault, quorum=3, attempts=1, timeouts={"round_deadline": 90, "train_timeout": 60})
    status = t.run.wait(MINUTES)
    t.expect(status == "failed", f"without its quorum the run is {status}")
    t.ground.fault_file.unlink()
    t.finish()


def zombie(t: Trial) -> None:
    """site-2's flow run is taken for dead while it trains: a second one is sent, and both are there at once."""
    fault = t.hold("training")
    with connect(t.ground.env.api_url) as client:
        (first,) = [r for r in t.flow_runs(client, "site:site-2") if r.state_type == StateType.RUNNING]
        client.set_flow_run_state(first.id, Crashed(message="no heartbeat"), force=True)
        active = [StateType.RUNNING, StateType.PENDING]
        awaited(
            lambda: any(r.id != first.id for r in t.flow_runs(client, "site:site-2", states=active)), "a retry", MINUTES
        )
        fault.release()
        t.finish(resumes=0)


def all_fail(t: Trial) -> None:
    """Every site's training raises: `fedflow run` fails, and its exit code says so."""
    recipe = builders.recipe(**t.fields, attempts=1).model_dump(mode="json")
    recipe["workload"] = {"path": "tests.builders:Blobs", "args": {"no_such_argument": 1}}
    federation = t.ground.env.federation.model_dump(mode="json", exclude_defaults=True)
    for name, content in (("recipe.json", recipe), ("federation.yaml", federation)):
        (t.folder / name).write_text(json.dumps(content))
    command = [sys.executable, "-m", "fedflow.cli", "run", str(t.folder / "recipe.json"), "--env", "prod"]
    command += ["--run-id", t.name, "--home", str(t.ground.home), "--quiet"]
    variables = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=MINUTES, check=False)
    t.expect(done.returncode == 1, f"exit code {done.returncode}")
    t.note(done.stderr.strip().splitlines()[-1][:200] if done.stderr.strip() else "it says nothing")
    t.run = t.ground.env.attach(t.name)
    t.ends = "failed"


def cancelled(phase: Phase) -> Callable[[Trial], None]:
    """By the button in the UI; nothing of the run is left within 10 s; then it is resumed."""

    def act(t: Trial) -> None:
        fault = t.hold(phase)
        with connect(t.ground.env.api_url) as client:
            (training,) = t.flow_runs(client, "training", states=ACTIVE)
            client.set_flow_run_state(training.id, Cancelling())
        began = time.monotonic()
        t.nothing_left(GONE)
        t.note(f"gone after {time.monotonic() - began:.1f} s")
        fault.release()
        status = t.run.status()
        wanted = (
            "finished" if phase == "evaluation" else "aborted"
        )  # the last round is committed before it is evaluated
        t.expect(status == wanted, f"cancelled, the run is {status}")
        t.run = t.ground.env.resume(t.run.id)
        t.finish(resumes=0)

    return act


def undisturbed(t: Trial) -> None:
    t.start()
    t.finish(resumes=0)


# -- all of them -------------------------------------------------------------------------------------------------------
def _cases() -> list[Case]:
    other = ("site-2",)
    found = [
        Case("undisturbed", "nothing happens", undisturbed),
        Case("trainer-in-training", "kill -9 of a trainer that trains", trainer_killed("training"), other),
        Case(
            "trainer-in-upload",
            "kill -9 of a trainer between update and manifest",
            trainer_killed("update manifest"),
            other,
        ),
        Case(
            "trainer-after-upload",
            "kill -9 of a trainer whose update is there",
            trainer_killed("update manifest", "after"),
        ),
        Case("worker", "kill -9 of a worker; its trainer goes on", worker_hurt(Worker.kill)),
        Case("worker-and-trainer", "kill -9 of both", worker_hurt(killed_with_trainer), other),
        Case("worker-sigterm", "SIGTERM to a worker whose trainer trains", worker_hurt(Worker.stop), other),
        Case("machine-lost", "worker and trainer at once, back after 60 s", machine_lost, other),
        Case("coordinator-after-commit", "kill -9 of the coordinator after a manifest", killed_after_commit),
        Case(
            "coordinator-between-results",
            "kill -9 of the coordinator when one update has come and another has not",
            killed_between_results,
            other,
        ),
        Case(
            "coordinator-machine-lost",
            "its worker and all below, in training",
            coordinator_killed("training", Worker.lose),
            other,
        ),
        Case("two-coordinators", "a second flow run of the same run", two_coordinators),
        Case("postgres-restarted", "PostgreSQL restarted in training", postgres_restarted("training"), (), on_postgres),
        Case("store-slow", "the store stalls 5 s, again and again", store_slow),
        Case("store-full", "no room for an update: the run fails, and is resumed", store_full, builders.SITES),
        Case("clock-ahead", "a site's clock an hour ahead", clock_wrong("+1h", "cannot create"), (), needs_faketime),
        Case("clock-behind", "a site's clock an hour behind", clock_wrong("-1h", "no update by"), (), needs_faketime),
        Case("rejoin", "a site comes back after three rounds", rejoins),
        Case("state-lost", "a site lost what it remembers", state_lost),
        Case("zombie", "a live trainer taken for dead: two at once", zombie),
        Case("straggler", "a site past the deadline", straggler, ("site-3",)),
        Case("quorum-lost", "the quorum is lost, and regained", quorum_lost, ("site-3",)),
        Case("all-fail", "every site fails: so does the run", all_fail),
    ]
    for phase in PLACES:
        killed, killed_in = coordinator_killed(phase), () if phase not in ("training", "upload") else other
        found.append(Case(f"coordinator-in-{phase}", f"kill -9 of the coordinator, {phase}", killed, killed_in))
        for seconds in (30, 100):
            name, what = f"api-down-{seconds}-in-{phase}", f"the API is gone for {seconds} s, {phase}"
            found.append(Case(name, what, down("prefect", phase, seconds)))
        found.append(Case(f"store-down-in-{phase}", f"the store is gone for 30 s, {phase}", down("s3", phase, 30)))
        found.append(Case(f"cancel-in-{phase}", f"cancelled in the UI, {phase}", cancelled(phase), builders.SITES))
    return found


CASES = {case.name: case for case in _cases()}
"""By name."""
