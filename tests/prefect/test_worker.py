"""A site's worker on a real server: it runs what its owner registered, within the owner's limits, and asks for work as often
as there is some."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import yaml
from prefect import Flow, flow
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import DeploymentUpdate, WorkPoolCreate
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.states import Cancelling, Crashed, Pending

from fedflow import __version__
from fedflow.engine import close_round, next_step, open_round, site_step, start_run, survey
from fedflow.engine.site import SiteWork
from fedflow.engine.starts import read_start
from fedflow.flows.aggregation import aggregation
from fedflow.flows.site import local_training as training
from fedflow.prefect.api import Taker
from fedflow.prefect.deploy import deploy_federation
from fedflow.prefect.pace import Pace
from fedflow.prefect.sites import LAST, deployed_sites, look
from fedflow.prefect.worker import resident
from fedflow.recipe import DEVICES, Federation, SiteConfig
from fedflow.store.objects import ObjectStore
from fedflow.store.records import FederationRecord, utc_now
from tests.builders import recipe
from tests.deployed import ROOT, Worker, awaited
from tests.servers import PrefectServer

pytestmark = pytest.mark.timeout(600)

SECONDS = 240.0
HERE = "tests.prefect.test_worker"


@flow(name="fedflow-site", persist_result=False)
def local_training(file: str, mebibytes: int = 0, hangs: bool = False, alone: str | None = None) -> None:
    """A site's own flow: writes who runs it, and in what environment; holds memory, hangs; fails where another one is at work in
    the folder `alone`."""
    if alone:
        Path(alone).mkdir()
        threading.Event().wait(2)
        Path(alone).rmdir()
    Path(file).write_text(f"{os.getpid()} {os.getppid()} {os.environ.get(DEVICES)}\n{json.dumps(dict(os.environ))}")
    held = os.urandom(1 << 20) * mebibytes
    if hangs or held:
        threading.Event().wait()


@flow(name="foreign", persist_result=False)
def foreign(file: str) -> None:
    Path(file).write_text("it ran")


@pytest.fixture(scope="module")
def client(prefect_api: PrefectServer) -> Iterator[SyncPrefectClient]:
    with SyncPrefectClient(api=prefect_api.url) as client:
        yield client


@contextmanager
def site(
    name: str, prefect_api: PrefectServer, home: Path, retries: int | None = None, **fields: Any
) -> Iterator[Worker]:
    """A site's worker, started by the documented command. retries: of Prefect's client; default: the tests' own"""
    config = home / f"{name}.yaml"
    given = {
        "name": name,
        "store": str(home / "store"),
        "state": str(home / "state"),
        "flow": f"{HERE}:local_training",
        "allowed_imports": ["*"],
    }
    config.write_text(yaml.safe_dump(given | fields))
    command = [sys.executable, "-m", "fedflow.cli", "site", "start", "--config", str(config)]
    environment = {**os.environ, **prefect_api.env, "PREFECT_WORKER_QUERY_SECONDS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(home)])
    if retries is not None:
        environment["PREFECT_CLIENT_MAX_RETRIES"] = str(retries)
    worker = Worker(name, command, environment, home / f"{name}.log")
    worker.start()
    try:
        yield worker
    finally:
        worker.lose()


def deploy(client: SyncPrefectClient, pool: str, flow: Flow[Any, Any], **hostile: Any) -> Callable[..., FlowRun]:
    """A function that starts `flow` on that pool, with what a holder of the API's credential may add."""
    if pool not in {p.name for p in client.read_work_pools()}:
        client.create_work_pool(WorkPoolCreate(name=pool, type="fedflow-site", base_job_template={}))
    deployment = client.create_deployment(
        client.create_flow(flow), f"{flow.name}-on-{pool}", work_pool_name=pool, parameters={}, **hostile
    )
    variables = hostile.get("job_variables")  # the deployment's, and each flow run's own
    return lambda **parameters: client.create_flow_run_from_deployment(
        deployment, parameters=parameters, job_variables=variables
    )


def ended(client: SyncPrefectClient, run: FlowRun) -> FlowRun:
    until = time.monotonic() + SECONDS
    while not (seen := client.read_flow_run(run.id)).state or not seen.state.is_final():  # type: ignore[union-attr]
        assert time.monotonic() < until, seen.state
        time.sleep(0.1)
    return seen


def test_a_site_runs_its_own_flow_and_nothing_else(
    client: SyncPrefectClient, prefect_api: PrefectServer, tmp_path: Path
) -> None:
    """Entrypoint, pull steps and job variables that came over the API have no effect; another flow does not run at all."""
    mine, stolen, other = (tmp_path / name for name in ("mine", "stolen", "other"))
    hostile = {
        "entrypoint": f"{HERE}:foreign",
        "pull_steps": [{"prefect.deployments.steps.run_shell_script": {"script": f"touch {stolen}"}}],
        "job_variables": {"command": f"touch {stolen}", "env": {"PATH": "/nowhere", "FEDFLOW_HOSTILE": "1"}},
    }
    with site("hospital", prefect_api, tmp_path) as worker:
        run = ended(client, deploy(client, "hospital", local_training, **hostile)(file=str(mine)))
        assert run.state_type == StateType.COMPLETED, worker.log.read_text()
        environment = json.loads(mine.read_text().partition("\n")[2])
        assert environment["PATH"] == os.environ["PATH"] and "FEDFLOW_HOSTILE" not in environment
        run = ended(client, deploy(client, "hospital", foreign)(file=str(other)))
        assert run.state_type == StateType.CRASHED and run.state is not None
        assert (
            "found 'foreign', expected one of ['fedflow-aggregation', 'fedflow-site']; nothing else runs here"
            in str(run.state.message)
        )
        assert not stolen.exists() and not other.exists()


ASKED = {"run": "there", "round": 0, "phase": "train", "opening": 1}
AT_A_SITE = {**ASKED, "attempt": 1, "site": "guarded-1"}
A_SHARE = {**ASKED, "share": "round", "workplace": "guarded-1"}
DECEITFUL: list[tuple[Flow[Any, Any], dict[str, Any], str]] = [
    (training, {**AT_A_SITE, "run": "../sites/other/there"}, "run: found '../sites/other/there', expected"),
    (training, {**AT_A_SITE, "run": "/etc"}, "run: found '/etc', expected"),
    (training, {**AT_A_SITE, "run": "file:///etc"}, "run: found 'file:///etc', expected"),
    (training, {**AT_A_SITE, "run": "there\nforged"}, r"run: found 'there\nforged', expected"),
    (training, {**AT_A_SITE, "phase": "train/../../../../.."}, "phase: found 'train/../../../../..', expected"),
    (training, {**AT_A_SITE, "after": "blake3:../../../other"}, "after: found 'blake3:../../../other', expected"),
    (training, {**AT_A_SITE, "site": "../other"}, "site: found '../other', expected 'guarded-1'"),
    (training, {**AT_A_SITE, "round": "0/../../.."}, "round"),
    (training, {**AT_A_SITE, "run": {"path": "there"}}, "run"),
    (training, {**AT_A_SITE, "workload": "os:system"}, "got an unexpected keyword argument 'workload'; expected run, "),
    (training, ASKED, "missing a required argument: 'attempt'"),
    (training, {**AT_A_SITE, "run": {"$ref": {"block_document_id": str(UUID(int=1))}}}, "a reference to a block"),
    (aggregation, {**A_SHARE, "run": "../public/there"}, "run: found '../public/there', expected"),
    (aggregation, {**A_SHARE, "workplace": "/other"}, "workplace: found '/other', expected 'guarded-1'"),
    (aggregation, {**A_SHARE, "share": "region-../../other"}, "share: found 'region-../../other', expected"),
]


def test_a_site_does_nothing_with_parameters_that_fedflow_would_not_send(
    client: SyncPrefectClient, prefect_api: PrefectServer, tmp_path: Path
) -> None:
    """Names that lead elsewhere, other types, others than there are: each run fails saying which, and no file is read for it, or written."""
    store, log = ObjectStore(str(tmp_path / "store")), tmp_path / "site.log"
    journal = start_run(store, "there", recipe(), ["guarded-1"])
    step = next_step(journal, journal.recipe())
    assert step is not None
    plan, opening = open_round(journal, step)
    state = {"name": "guarded-1", "store": store.url, "state": str(tmp_path / "state"), "allowed_imports": ["*"]}
    site_step(SiteWork("there", 0, "train"), SiteConfig.load(state))
    close_round(journal, plan, opening, survey(journal, plan), why="every site answered")
    before = every_file(tmp_path)
    with site("guarded-1", prefect_api, tmp_path, flow=None, log={"path": str(log)}) as worker:
        starts = {flow.name: deploy(client, "guarded-1", flow) for flow in (training, aggregation)}
        runs = [starts[flow.name](**parameters) for flow, parameters, _ in DECEITFUL]
        for run, (_, parameters, why) in zip(runs, DECEITFUL, strict=True):
            seen = ended(client, run)
            assert seen.state_type in (StateType.FAILED, StateType.CRASHED), (parameters, worker.log.read_text())
            assert seen.state is not None and why in str(seen.state.message), (parameters, seen.state.message)
    own = {"guarded-1.yaml", "guarded-1.log", "site.log", "store/sites/guarded-1/_start.json"}
    assert every_file(tmp_path) - before <= own
    assert not [line for line in log.read_text().splitlines() if line.startswith("forged")]


OUTSIDE = """
from pathlib import Path
from typing import Literal

from tests import builders

Path(__file__).with_name("imported").touch()


class Net(builders.Tiny): ...


class Work(builders.Blobs): ...


class Rule(builders.Leaning):
    kind: Literal["rule"] = "rule"
"""


def test_a_site_imports_nothing_that_its_owner_does_not_allow(
    client: SyncPrefectClient, prefect_api: PrefectServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A module that lies on its import path, which the coordinator's recipe names: the run fails and says so; the next one is trained."""
    at_coordinator, at_site = tmp_path / "coordinator", tmp_path / "site"
    for folder in (at_coordinator, at_site):
        folder.mkdir()
        (folder / "outside.py").write_text(OUTSIDE)
    monkeypatch.syspath_prepend(str(at_coordinator))
    store = ObjectStore(str(at_site / "store"))
    named = {"model": "outside:Net", "workload": "outside:Work", "algorithm": "outside:Rule"}
    runs = {f"names-a-{field}": {field: path} for field, path in named.items()} | {"allowed": {}}
    for run, fields in runs.items():
        journal = start_run(store, run, recipe(**fields), ["careful-1"])
        step = next_step(journal, journal.recipe())
        assert step is not None
        open_round(journal, step)
    with site("careful-1", prefect_api, at_site, flow=None, allowed_imports=["tests.*"]) as worker:
        start = deploy(client, "careful-1", training)
        seen = {run: ended(client, start(**{**AT_A_SITE, "run": run, "site": "careful-1"})) for run in runs}
    assert seen.pop("allowed").state_type == StateType.COMPLETED, worker.log.read_text()
    for run, failed in seen.items():
        assert failed.state_type == StateType.FAILED and failed.state is not None, (run, worker.log.read_text())
        assert "expected a module among ['tests.*']" in str(failed.state.message), run
    assert (at_coordinator / "imported").exists() and not (at_site / "imported").exists()


def every_file(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_a_trainer_that_holds_too_much_memory_is_killed_and_says_why(
    client: SyncPrefectClient, prefect_api: PrefectServer, tmp_path: Path
) -> None:
    """And it sees no more devices than its site's owner lets it."""
    file = tmp_path / "held"
    with site("small", prefect_api, tmp_path, limits={"memory": "900MiB", "gpus": 1}) as worker:
        start = deploy(client, "small", local_training)
        assert ended(client, start(file=str(file))).state_type == StateType.COMPLETED, worker.log.read_text()
        assert file.read_text().split()[2] == os.environ.get(DEVICES, "0").split(",")[0]
        run = ended(client, start(file=str(file), mebibytes=1000))
        assert run.state_type == StateType.CRASHED and run.state is not None, worker.log.read_text()
        assert "expected at most 900 MiB, this site's limits.memory" in str(run.state.message)
        await_end(int(file.read_text().split()[0]))
        assert ended(client, start(file=str(file))).state_type == StateType.COMPLETED  # the worker goes on


def test_no_more_trainings_run_at_a_time_than_the_owner_allows(
    client: SyncPrefectClient, prefect_api: PrefectServer, tmp_path: Path
) -> None:
    start = deploy(client, "narrow", local_training)
    runs = [start(file=str(tmp_path / f"who-{n}"), alone=str(tmp_path / "alone")) for n in range(3)]
    with site("narrow", prefect_api, tmp_path, limits={"at_once": 1}) as worker:
        assert {ended(client, run).state_type for run in runs} == {StateType.COMPLETED}, worker.log.read_text()


def test_the_memory_of_what_a_trainer_started_counts_in_whatever_group() -> None:
    """As a script's processes are in one of their own."""
    held = "import sys; held = bytes(range(256)) * 400_000; print(flush=True); sys.stdin.read()"
    starts = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {held!r}], start_new_session=True)"
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", starts], stdin=pipe, stdout=pipe, start_new_session=True) as trainer:
        assert trainer.stdout is not None and trainer.stdout.readline()
        assert resident(trainer.pid) > 256 * 400_000
        trainer.communicate()
    assert resident(trainer.pid) == 0


@pytest.mark.parametrize("start_by", ["fork", "spawn"])
def test_a_trainer_is_forked_or_spawned_and_ends_when_its_flow_run_is_cancelled(
    start_by: str, client: SyncPrefectClient, prefect_api: PrefectServer, tmp_path: Path
) -> None:
    name, file = f"started-by-{start_by}", tmp_path / "who"
    with site(name, prefect_api, tmp_path, start=start_by):
        run = deploy(client, name, local_training)(file=str(file), hangs=True)
        trainer, server = begun(file)
        command = Path(f"/proc/{trainer}/cmdline").read_bytes()
        assert (command == Path(f"/proc/{server}/cmdline").read_bytes()) == (start_by == "fork")
        cancelling = client.read_flow_run(run.id).state
        assert cancelling is not None and cancelling.is_running()

        client.set_flow_run_state(run.id, Cancelling())
        assert ended(client, run).state_type == StateType.CANCELLED
        await_end(trainer)


LATE = """
import time
from pathlib import Path

HERE = Path(__file__).parent


def __getattr__(name):
    if name != "local_training":
        raise AttributeError(name)
    (HERE / "taken").touch()
    while not (HERE / "goes-on").exists():
        time.sleep(0.05)
    from tests.prefect.test_worker import local_training

    return local_training
"""


def test_a_flow_run_that_is_cancelled_between_its_taking_and_its_beginning_is_cancelled(
    client: SyncPrefectClient, prefect_api: PrefectServer, tmp_path: Path
) -> None:
    """Its process has not got its flow yet, then sees that it may not begin, and ends well: it has no state of its own to tell."""
    (tmp_path / "late.py").write_text(LATE)
    with site("late", prefect_api, tmp_path, flow="late:local_training") as worker:
        run = deploy(client, "late", local_training)(file=str(tmp_path / "who"))
        awaited((tmp_path / "taken").exists, "the flow run is taken")
        client.set_flow_run_state(run.id, Cancelling())
        (tmp_path / "goes-on").touch()
        assert ended(client, run).state_type == StateType.CANCELLED, worker.log.read_text()
    assert not (tmp_path / "who").exists()


def begun(file: Path) -> tuple[int, int]:
    """The process that runs the site's flow, once it does, and its parent."""
    awaited(lambda: file.exists() and bool(file.read_text()), "the site's flow begins")
    trainer, server = (int(n) for n in file.read_text().split()[:2])
    return trainer, server


def test_a_worker_that_is_asked_to_stop_hands_its_flow_run_back(
    client: SyncPrefectClient, prefect_api: PrefectServer, tmp_path: Path
) -> None:
    """Nothing is left running, and nothing `Running`: the coordinator asks anew at once."""
    file = tmp_path / "who"
    with site("stopped", prefect_api, tmp_path) as worker:
        run = deploy(client, "stopped", local_training)(file=str(file), hangs=True)
        trainer, _ = begun(file)
        worker.stop()
        seen = client.read_flow_run(run.id)
        assert seen.state_type == StateType.CRASHED and seen.state is not None, worker.log.read_text()
        assert seen.state.message == "its worker was stopped"
        await_end(trainer)


def test_a_worker_that_comes_back_reports_what_was_lost_with_it(
    client: SyncPrefectClient, prefect_api: PrefectServer, tmp_path: Path
) -> None:
    file = tmp_path / "who"
    with site("lost", prefect_api, tmp_path) as worker:
        run = deploy(client, "lost", local_training)(file=str(file), hangs=True)
        begun(file)
        worker.lose()
        assert client.read_flow_run(run.id).state_type == StateType.RUNNING
        worker.start()
        seen = ended(client, run)
        assert seen.state_type == StateType.CRASHED and seen.state is not None
        assert seen.state.message == "its process was lost"


def test_a_worker_that_comes_back_looks_after_a_trainer_that_outlived_it(
    client: SyncPrefectClient, prefect_api: PrefectServer, tmp_path: Path
) -> None:
    """It is left alone while it trains, and can still be cancelled."""
    file, other = tmp_path / "who", tmp_path / "other"
    with site("outlived", prefect_api, tmp_path) as worker:
        start = deploy(client, "outlived", local_training)
        run = start(file=str(file), hangs=True)
        trainer, _ = begun(file)
        worker.kill()
        worker.start()
        assert ended(client, start(file=str(other))).state_type == StateType.COMPLETED  # the worker is at work again
        assert client.read_flow_run(run.id).state_type == StateType.RUNNING and Path(f"/proc/{trainer}").exists()
        client.set_flow_run_state(run.id, Cancelling())
        assert ended(client, run).state_type == StateType.CANCELLED
        await_end(trainer)


def test_a_trainer_that_outlived_its_worker_is_held_to_the_memory_that_its_owner_allows(
    client: SyncPrefectClient, prefect_api: PrefectServer, tmp_path: Path
) -> None:
    file = tmp_path / "who"
    with site("large", prefect_api, tmp_path) as worker:
        run = deploy(client, "large", local_training)(file=str(file), mebibytes=300)
        trainer, _ = begun(file)
        worker.kill()
        config = tmp_path / "large.yaml"
        config.write_text(yaml.safe_dump(yaml.safe_load(config.read_text()) | {"limits": {"memory": "100MiB"}}))
        worker.start()
        seen = ended(client, run)
        assert seen.state_type == StateType.CRASHED and seen.state is not None, worker.log.read_text()
        assert "expected at most 100 MiB, this site's limits.memory" in str(seen.state.message)
        await_end(trainer)


def test_what_ended_while_the_api_was_away_is_said_once_it_is_back(
    client: SyncPrefectClient, prefect_api: PrefectServer, tmp_path: Path
) -> None:
    """However long it was away: else the server takes the flow run to be running for good."""
    file = tmp_path / "who"
    with site("unheard", prefect_api, tmp_path, retries=0) as worker:
        run = deploy(client, "unheard", local_training)(file=str(file), hangs=True)
        trainer, _ = begun(file)
        prefect_api.kill()
        try:
            os.kill(trainer, signal.SIGKILL)
            awaited(lambda: "the API does not answer, it is asked again" in worker.log.read_text(), "nobody hears it")
        finally:
            prefect_api.start()
        seen = ended(client, run)
        assert seen.state_type == StateType.CRASHED and seen.state is not None, worker.log.read_text()
        assert seen.state.message == "its process was ended by SIGKILL"


def test_sites_are_shown_with_their_worker_version_and_last_rounds(
    client: SyncPrefectClient, prefect_api: PrefectServer, tmp_path: Path
) -> None:
    """`fedflow sites`: one that works, one of which nobody was ever seen, and a region whose aggregation waits for a worker."""
    federation = Federation(sites=["shown", "never-started"], regions=["a-region"])  # type: ignore[list-item]
    deploy_federation(client, federation)
    tags = ["fedflow", "site:shown"]
    deployment = client.read_deployment_by_name("fedflow-site/shown")
    client.update_deployment(deployment.id, DeploymentUpdate(enforce_parameter_schema=False))
    with site("shown", prefect_api, tmp_path):
        for name, parameters in (
            ("r · round 000 · shown", {}),
            ("r · round 001 · shown", {"mebibytes": "not a number"}),
        ):
            given = {"file": str(tmp_path / "file"), **parameters}
            run = client.create_flow_run_from_deployment(deployment.id, parameters=given, name=name, tags=tags)
            ended(client, run)
        region = client.read_deployment_by_name("fedflow-aggregation/a-region")
        given = {"run": "r", "round": 0, "phase": "train", "opening": 1, "share": "a-region", "workplace": "a-region"}
        of = ["fedflow", "workplace:a-region"]
        client.create_flow_run_from_deployment(region.id, parameters=given, name="r · round 000 · a-region", tags=of)
        seen = {status.site: status for status in look(client, federation.workplaces)}
        command = [sys.executable, "-m", "fedflow.cli", "sites", "shown", "--json"]
        environment = {**os.environ, **prefect_api.env, "PYTHONPATH": str(ROOT)}
        printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    deployed = [found.name for found in deployed_sites(client)]
    assert {"shown", "a-region"} <= set(deployed) and len(set(deployed)) == len(deployed)
    assert seen["a-region"].doing == ("r · round 000 · a-region (Scheduled)",)
    assert seen["a-region"].absent == "no worker on work pool 'a-region'"
    shown, never = seen["shown"], seen["never-started"]
    assert shown.absent is None and shown.seen is not None and shown.failures == 1
    assert shown.took == Taker.here()
    assert [line.partition(":")[0] for line in shown.rounds] == ["r · round 001", "r · round 000"]
    assert shown.rounds[1] == "r · round 000: Completed" and shown.rounds[0].startswith("r · round 001: Failed: ")
    assert never.absent == "no worker on work pool 'never-started'" and never.seen is None and never.rounds == ()
    (row,) = json.loads(printed)
    assert (row["site"], row["worker"], row["failures"]) == ("shown", "there", f"1 of the last {LAST}")


FAKETIME = next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)


@pytest.mark.skipif(FAKETIME is None, reason="needs Debian's faketime")
def test_a_site_whose_clock_or_version_is_wrong_says_so(prefect_api: PrefectServer, tmp_path: Path) -> None:
    """And another version of fedflow than the coordinator's: neither keeps it from starting, both reach the coordinator."""
    store, said = ObjectStore(str(tmp_path / "store")), "s behind the Prefect server's"
    record = FederationRecord(name="f", at=utc_now(), fedflow="0.0.0", sites=["early"])
    store.put("public/_federation/f.json", record.to_bytes())
    with site("early", prefect_api, tmp_path) as worker:
        worker.lose()
        worker.start(LD_PRELOAD=str(FAKETIME), FAKETIME="-1h", FAKETIME_DONT_FAKE_MONOTONIC="1")
        awaited(lambda: said in read_start(store, "early"), worker.log.read_text())
        awaited(lambda: said.encode() in worker.log.read_bytes(), worker.log.read_text())
    told = read_start(store, "early")
    assert told.startswith("started ") and "expected 0.0.0, the coordinator's" in told


def test_another_version_is_said() -> None:
    """As the worker says it when it takes a flow run, and the coordinator reads it where that fails."""
    other = Taker("here", "0.0.1", "3.9")
    assert Taker.among([Pending(message=str(other)), Crashed(message="-9")]) == other
    assert (
        other.differs()
        == f"found fedflow 0.0.1 there and {__version__} here, expected one version everywhere; install the same"
    )
    assert Taker.here().differs() is None
    assert Taker.among([Pending(), Crashed(message="-9")]) is None


def await_end(pid: int) -> None:
    """Until no such process is left."""
    until = time.monotonic() + SECONDS
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_work_is_asked_for_often_while_there_is_some_and_seldom_later() -> None:
    """0.3 s after the last work; a twentieth of the time since; 5 s at most: of 100 s on."""
    now = time.monotonic()
    expected = {0: 0.3, 5: 0.3, 20: 1.0, 60: 3.0, 100: 5.0, 10_000: 5.0}
    found = {ago: Pace(longest=5, since=now - ago).mean() for ago in expected}
    assert found == pytest.approx(expected, rel=0.05)
    assert Pace(longest=5).mean() == 5  # there was none yet
    pace = Pace(longest=5)
    pace.worked()
    waits = [pace.wait() for _ in range(100)]
    assert all(0.2 <= wait <= 0.45 for wait in waits) and len(set(waits)) > 1  # not everybody at once


def test_who_asks_gives_a_busy_api_time() -> None:
    """A second where two answers in a row took 0.1 s longer than the quickest, four where 0.2 s; one that is late tells nothing."""
    pace = Pace(longest=5)
    pace.worked()
    for seconds, wait in (
        (0.25, 0.3),
        (0.35, 0.3),
        (0.36, 1.0),
        (0.40, 1.21),
        (0.45, 2.25),
        (9.25, 4.0),
        (9.0, 5.0),
        (0.25, 0.3),
    ):
        pace.answered(seconds)
        assert pace.mean() == pytest.approx(wait)
    # a worker, of maybe a hundred: it waits longer than it does where there is nothing to do
    crowd = Pace(longest=5, crowded=15)
    for seconds, wait in ((0.25, 5.0), (0.55, 5.0), (0.55, 9.0), (9.0, 9.0), (9.0, 15.0), (0.25, 5.0)):
        crowd.answered(seconds)
        assert crowd.mean() == pytest.approx(wait)
