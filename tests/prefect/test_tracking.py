"""A tracked simulation is one flow run on a real Prefect server: what it shows, how it ends, and that it fails no run."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId
from prefect.client.schemas.objects import Artifact, FlowRun, StateType
from prefect.client.schemas.sorting import ArtifactSort
from prefect.states import Cancelling

from fedflow.prefect.api import connect, find_runs, run_tag
from fedflow.store.journal import Journal
from fedflow.store.objects import ObjectStore
from tests.cli.project import Project, Result, command, environment
from tests.servers import PrefectServer, prefect_server

T = TypeVar("T")

MINUTES = 300.0
ENDED = {StateType.COMPLETED, StateType.FAILED, StateType.CANCELLED, StateType.CRASHED}


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


def journal(project: Project) -> Journal:
    return Journal(ObjectStore(str(project.folder / "fedflow-runs" / "store")), "points-1")


def awaited(found: Callable[[], T | None]) -> T:
    """What `found` gives as soon as it gives something."""
    until = time.monotonic() + MINUTES
    while time.monotonic() < until:
        if (value := found()) is not None:
            return value
        threading.Event().wait(0.2)
    raise AssertionError("it never came")


def flow_runs(api: PrefectServer, project: Project) -> list[FlowRun]:
    """Every flow run of the run, the oldest first."""
    tag = run_tag(journal(project).record().nonce)
    with connect(api.url) as client:
        return sorted(find_runs(client, tag, states=list(StateType)), key=lambda run: run.created)


def ended(api: PrefectServer, project: Project, count: int = 1) -> FlowRun:
    """The newest of the run's `count` flow runs, which all have ended."""

    def found() -> FlowRun | None:
        runs = flow_runs(api, project)
        return runs[-1] if len(runs) == count and all(run.state_type in ENDED for run in runs) else None

    return awaited(found)


def artifacts(api: PrefectServer, run: FlowRun) -> dict[str, Artifact]:
    """Key -> its newest version."""
    of = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run.id]))
    with connect(api.url) as client:
        found = client.read_artifacts(artifact_filter=of, sort=ArtifactSort.CREATED_DESC)
    return {str(a.key): a for a in reversed(found)}


def start(project: Project, *args: str, **env: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command("run", "recipe.yaml", *args),
        cwd=project.folder,
        env=environment(**env),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def result_of(process: subprocess.Popen[str]) -> Result:
    out, err = process.communicate()
    return Result(process.returncode, out, err)


def test_one_flow_run_with_progress_rounds_and_report(project: Project, prefect_api: PrefectServer) -> None:
    project.break_site("site-3")
    result = project.shell("run", project.recipe(rounds=5), "--tracking", **prefect_api.env)
    assert result.code == 0, result
    assert re.search(r"look at it +fedflow ui points-1", result.out)
    run = ended(prefect_api, project)
    assert (run.name, run.state_type, set(run.tags) >= {"fedflow", "simulation"}) == (
        "points-1",
        StateType.COMPLETED,
        True,
    )
    assert run.parameters["recipe"]["rounds"] == 5
    shown = artifacts(prefect_api, run)
    assert shown["points-1-progress"].data == 100
    rounds: Any = json.loads(str(shown["points-1-rounds"].data))
    assert [row["round"] for row in rounds] == list(range(5))
    assert {(row["sites"], row["excluded"]) for row in rounds} == {(2, "site-3")}
    newest = json.loads(str(shown["points-1-round"].data))
    assert {row["site"]: row["counts"] for row in newest} == {"site-1": "yes", "site-2": "yes", "site-3": "no"}
    assert "Best accuracy" in str(shown["points-1-report"].data)
    url = project.shell("ui", "points-1", **prefect_api.env)
    assert str(run.id) in url.out and url.code == 0


def test_it_fails_with_the_run_and_the_next_start_is_another_one(project: Project, prefect_api: PrefectServer) -> None:
    project.break_site("site-2")
    assert project.shell("run", project.recipe(quorum=3), "--tracking", **prefect_api.env).code == 1
    run = ended(prefect_api, project)
    assert run.state is not None
    assert (run.state_type, "found 2 valid updates, expected 3" in str(run.state.message)) == (StateType.FAILED, True)
    project.mend_site("site-2")
    assert project.shell("resume", "points-1", **prefect_api.env).code == 0
    assert ended(prefect_api, project, 2).state_type == StateType.COMPLETED


def running(api: PrefectServer, project: Project) -> FlowRun:
    """Its flow run, of which the first round was told."""

    def found() -> FlowRun | None:
        if not journal(project).committed():
            return None
        runs = [r for r in flow_runs(api, project) if r.state_type == StateType.RUNNING]
        return runs[-1] if runs and "points-1-round" in artifacts(api, runs[-1]) else None

    return awaited(found)


def test_cancelled_in_the_ui_the_run_stops(project: Project, prefect_api: PrefectServer) -> None:
    project.recipe(rounds=10_000)
    process = start(project, "--tracking", **prefect_api.env)
    run = running(prefect_api, project)
    with connect(prefect_api.url) as client:
        client.set_flow_run_state(run.id, Cancelling())
    stopped = result_of(process)
    assert stopped.code == 1 and "aborted after" in stopped.problem
    assert ended(prefect_api, project).state_type == StateType.CANCELLED


def test_a_simulation_that_is_killed_crashed(project: Project, prefect_api: PrefectServer) -> None:
    project.recipe(rounds=10_000)
    process = start(project, "--tracking", **prefect_api.env)
    running(prefect_api, project)
    os.killpg(int((project.folder / "fedflow-runs" / "runs" / "points-1.lock").read_text()), signal.SIGKILL)
    assert result_of(process).code == 1
    assert ended(prefect_api, project).state_type == StateType.CRASHED


@pytest.mark.faults
def test_an_outage_costs_nothing_that_is_shown_in_the_end(project: Project, postgres: str) -> None:
    """The server is gone from the middle of the run until after its end."""
    with prefect_server(postgres) as api:
        project.recipe(rounds=300)
        process = start(project, "--tracking", **api.env)
        running(api, project)
        api.kill()
        finished = result_of(process)
        assert finished.code == 0, finished
        api.start()
        run = ended(api, project)
        assert run.state_type == StateType.COMPLETED
        rounds = json.loads(str(artifacts(api, run)["points-1-rounds"].data))
        assert [row["round"] for row in rounds] == list(range(300))


@pytest.mark.faults
def test_without_an_api_that_answers_a_run_is_only_warned(project: Project) -> None:
    result = project.shell("run", "recipe.yaml", "--tracking", "--quiet", PREFECT_API_URL="http://127.0.0.1:1/api")
    assert (result.code, result.out.splitlines()[0]) == (0, "points-1 finished: 3 rounds")
    assert "found no answer at http://127.0.0.1:1/api" in result.err and "the run goes on" in result.err
    beside = project.folder / "fedflow-runs" / "runs" / "points-1.tracking"
    os.kill(
        awaited(lambda: int(beside.read_text()) if beside.exists() and beside.read_text() else None), signal.SIGKILL
    )
    resumed = project.shell("resume", "points-1", "--rounds", "4", "--quiet")
    assert (resumed.code, resumed.out.splitlines()[0]) == (0, "points-1 finished: 4 rounds")
    assert "PREFECT_API_URL: found None" in resumed.err and "the run goes on, and is not shown" in resumed.err


def test_mistakes(project: Project) -> None:
    assert "PREFECT_API_URL: found None" in project.shell("run", "recipe.yaml", "--tracking").mistake
    assert "--tracking: found 'poc'" in project.call("run", "recipe.yaml", "--env", "poc", "--tracking").mistake
    assert not list(project.folder.glob("fedflow-runs/**/run.json"))
