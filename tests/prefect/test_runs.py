"""Runs on a real server with real workers: the same result as everywhere, seen in the UI's data, without pickle."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey, FlowRunFilter, FlowRunFilterTags
from prefect.client.schemas.objects import StateType
from prefect.states import Cancelling

from fedflow.engine.results import read_result
from fedflow.environments import SimEnv
from fedflow.environments.poc import PocEnv
from fedflow.environments.prod import ProdEnv
from fedflow.errors import RoundError
from fedflow.prefect.api import connect, find_runs, run_tag
from fedflow.recipe import Federation
from fedflow.testing.faults import fail_at, watching
from tests import builders
from tests.prefect.conftest import Poc
from tests.prefect.test_kills import MINUTES

pytestmark = pytest.mark.timeout(1200)

SAMPLED = {"schedule": {"kind": "sampled", "sites_per_round": 2}, "rounds": 3}


def test_a_recipe_gives_one_digest_in_all_three_environments(
    poc: Poc, prod: ProdEnv, undisturbed: Any, tmp_path: Path
) -> None:
    """With sampling, uneven sites, BatchNorm, dropout and momentum; one or two sites at a time, in any order."""
    recipe, expected = builders.recipe(**SAMPLED), undisturbed(**SAMPLED)["model"]
    one_at_a_time = SimEnv(Federation.of(3), home=tmp_path / "one").execute(recipe, run_id="sim")
    assert one_at_a_time.result(MINUTES).model_digest == expected
    two_at_a_time = SimEnv(Federation.of(3), home=tmp_path / "two", workers=2).execute(recipe, run_id="sim")
    assert two_at_a_time.result(MINUTES).model_digest == expected
    assert poc.execute(recipe, "digest").result(MINUTES).model_digest == expected
    run = recipe.execute(prod, run_id="digest")
    assert run.result(MINUTES).model_digest == expected
    assert any("as the hospital does it" in line for line in run.logs("site-3"))  # its owner's copy of the flow
    assert not any("as the hospital does it" in line for line in run.logs("site-1"))


ALGORITHMS: dict[str, Any] = {
    "fedavg": "fedavg",
    "scaffold": "scaffold",
    "fedadam": {"kind": "fedopt", "server_optimizer": "adam"},
    "diloco": {"kind": "diloco", "local_steps_per_round": 3},
}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_what_sites_and_server_remember_gives_the_same_digest_simulated_and_deployed(
    poc: Poc, name: str, tmp_path: Path
) -> None:
    """Control variates, moments at the server, optimizers at the sites: in the second round all of them count."""
    recipe = builders.recipe(algorithm=ALGORITHMS[name])
    simulated = SimEnv(3, home=tmp_path, workers=2).execute(recipe, run_id="sim").result(MINUTES)
    assert poc.execute(recipe, f"remembers-{name}").result(MINUTES).model_digest == simulated.model_digest


@pytest.mark.faults
def test_an_algorithm_from_an_installed_package_runs_in_all_three_environments(
    poc: Poc, prod: ProdEnv, own_algorithm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found by its entry point, at the coordinator and at the sites; its extra state commits with the rounds."""
    monkeypatch.syspath_prepend(str(own_algorithm))
    recipe = builders.recipe(algorithm={"kind": "polyak", "decay": 0.25})
    simulated = recipe.execute(SimEnv(Federation.of(3), home=tmp_path), run_id="own").result(MINUTES)
    plain = builders.head(builders.run(builders.recipe()))
    assert simulated.model_digest != plain.model_digest
    assert poc.execute(recipe, "own").result(MINUTES).model_digest == simulated.model_digest
    assert recipe.execute(prod, run_id="own").result(MINUTES).model_digest == simulated.model_digest


def test_the_ui_shows_every_round_site_and_exclusion(poc: Poc) -> None:
    """Names, tags, a table a round, the progress and the report, as the UI reads them."""
    run = poc.execute(builders.recipe(), "shown")
    summary = run.result(MINUTES)
    with connect(poc.env.api_url) as client:
        runs = client.read_flow_runs(
            flow_run_filter=FlowRunFilter(tags=FlowRunFilterTags(all_=[run_tag(summary.nonce)]))
        )
        names = sorted(r.name for r in runs)
        sites = [f"shown · round {r:03d} · {s}" for r in (0, 1) for s in builders.SITES]
        assert names == sorted(["shown", "shown · round 000", "shown · round 001", *sites])
        assert {r.state_type for r in runs} == {StateType.COMPLETED}
        tables = client.read_artifacts(artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=["shown-round"])))
        rows = json.loads(max(tables, key=lambda a: a.created).data)
        assert [row["site"] for row in rows] == list(builders.SITES)
        assert {"weight", "steps", "loss", "seconds", "bytes", "excluded because"} <= rows[0].keys()
        progress = client.read_artifacts(artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=["shown-progress"])))
        assert max(float(a.data) for a in progress) == 100
        report = client.read_artifacts(artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=["shown-report"])))
        assert summary.model_digest in report[0].data


FOUND: dict[str, dict[str, Any]] = {
    "task": {"algorithm": {"kind": "task", "function": "tests.builders:summed", "reduction": "sum", "shared": ["sum"]}},
    "statistics": {"algorithm": "statistics", "workload": "tests.builders:table", "rounds": 1},
    "psi": {"algorithm": "psi", "workload": "tests.builders:named", "rounds": 1},
    "evaluation": {
        "algorithm": {"kind": "evaluation", "cross_site": True},
        "workload": "tests.builders:HeldOut",
        "rounds": 1,
    },
}


@pytest.mark.parametrize("name", FOUND)
def test_what_a_run_finds_besides_a_model_is_the_same_deployed_and_is_shown(poc: Poc, name: str) -> None:
    """In one phase or two; the round's artifact has it, for people and as JSON."""
    recipe = builders.recipe(**FOUND[name])
    expected = read_result(builders.run(recipe, name=name))
    run = poc.execute(recipe, name)
    run.result(MINUTES)
    found = read_result(run.journal)
    assert found.values == expected.values and found.tensors.keys() == expected.tensors.keys()
    assert all(torch.equal(tensor, found.tensors[n]) for n, tensor in expected.tensors.items())
    with connect(poc.env.api_url) as client:
        shown = client.read_artifacts(artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=[f"{name}-result"])))
    page = max(shown, key=lambda a: a.created).data
    told = {
        "task": '"sum": "float64[4]"',
        "statistics": "| data / x | 60 |",
        "psi": "| **in all** | 12 |",
        "evaluation": "| server:last |",
    }
    assert told[name] in page and "```json" in page


def test_nothing_that_prefect_keeps_is_pickled(poc: Poc) -> None:
    """Parameters are JSON; no task or flow leaves a result behind. What one that fails leaves: see the lost quorum."""
    run = poc.execute(builders.recipe(rounds=1), "plain")
    nonce = run.result(MINUTES).nonce
    with connect(poc.env.api_url) as client:
        runs = client.read_flow_runs(flow_run_filter=FlowRunFilter(tags=FlowRunFilterTags(all_=[run_tag(nonce)])))
        assert all(json.loads(json.dumps(r.parameters)) == r.parameters for r in runs)
        assert not [a for a in client.read_artifacts() if a.type == "result"]
    assert not list(Path(poc.env.server.home).glob("storage/*"))


def kept_results(poc: Poc) -> list[dict[str, Any]]:
    """What Prefect itself stored of flows and tasks: of those that fail, always the exception. Raises where it is not JSON."""
    return [json.loads(path.read_text()) for path in Path(poc.env.server.home).glob("storage/*")]


def test_a_round_closes_without_a_site_that_never_answers(poc: Poc, tmp_path: Path) -> None:
    """Quorum two of three: manifest and UI say why, its flow run is cancelled, no process is left."""
    fields = {
        "quorum": 2,
        "rounds": 1,
        "attempts": 1,
        "timeouts": {"round_deadline": 30, "quorum_grace": 29.9, "train_timeout": 29},
    }
    stopped = fail_at(
        "training", site="site-3", effect="stop"
    )  # its own time limit does not end it before the deadline
    run = poc.execute(builders.recipe(**fields), "straggler", stopped)
    summary = run.result(MINUTES)
    (held,) = summary.rounds
    assert sorted(held.sites) == ["site-1", "site-2"]
    assert list(held.excluded) == ["site-3"]
    closing = run.journal.closing(run.journal.plan(0, "train"), 1)
    assert closing is not None and closing.why == "deadline"
    await_no_children(poc.env)
    with connect(poc.env.api_url) as client:
        (straggler,) = find_runs(client, run_tag(summary.nonce), "site:site-3", states=list(StateType))
        until = time.monotonic() + MINUTES
        while client.read_flow_run(straggler.id).state_type == StateType.CANCELLING and time.monotonic() < until:
            threading.Event().wait(0.1)
        assert client.read_flow_run(straggler.id).state_type == StateType.CANCELLED
        tables = client.read_artifacts(artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=["straggler-round"])))
        (row,) = (row for row in json.loads(tables[0].data) if row["counts"] == "no")
        assert row["site"] == "site-3" and row["excluded because"] == held.excluded["site-3"]
    poc.heal()
    poc.execute(builders.recipe(rounds=1), "after-straggler").result(MINUTES)  # the site's worker is free again


@pytest.mark.faults
def test_a_lost_quorum_fails_the_run_and_a_resume_goes_on(poc: Poc, undisturbed: Any) -> None:
    """Quorum three of three: the run fails naming the site; with the site back it ends with the undisturbed bytes."""
    fields = {"quorum": 3, "attempts": 1, "timeouts": {"round_deadline": 120, "train_timeout": 20}}
    run = poc.execute(builders.recipe(**fields), "quorum", fail_at("training", site="site-3", round=1, effect="hang"))
    with pytest.raises(RoundError, match=r"site-3"):
        run.result(MINUTES)
    assert run.status() == "failed"
    assert [r.round for r in run.summary().rounds] == [0]
    assert "fedflow.errors.QuorumLost" in {kept["__exc_type__"] for kept in kept_results(poc)}
    poc.heal()
    assert poc.env.resume(run.id).result(MINUTES).model_digest == undisturbed()["model"]


@pytest.mark.faults
def test_a_failing_site_shows_its_traceback_in_the_rounds_log(poc: Poc) -> None:
    """Two of three sites count; the third's exception is where the round's log is."""
    fields = {
        "quorum": 2,
        "rounds": 1,
        "attempts": 1,
        "overrides": {"site-2": {"workload_args": {"site": "site-none"}}},
    }
    run = poc.execute(builders.recipe(**fields), "traceback")
    summary = run.result(MINUTES)
    assert "ValueError" in summary.rounds[0].excluded["site-2"]
    log = "\n".join(run.logs())
    assert "Traceback" in log and "builders.py" in log


@pytest.mark.faults
def test_an_aborted_run_leaves_no_process_and_can_be_resumed(poc: Poc, undisturbed: Any, tmp_path: Path) -> None:
    reached = tmp_path / "training"
    run = poc.execute(builders.recipe(), "aborted", fail_at("training", round=1, effect="hang", token=reached))
    run.wait(MINUTES, until=reached.exists)
    run.abort()
    poc.heal()
    assert run.status() == "aborted"
    await_no_children(poc.env)
    assert poc.env.resume(run.id).result(MINUTES).model_digest == undisturbed()["model"]


@pytest.mark.faults
def test_a_run_cancelled_in_the_ui_stops_its_sites_also_on_sqlite(undisturbed: Any, tmp_path: Path) -> None:
    """On SQLite the engine itself loses the cancellation of children."""
    reached = tmp_path / "training"
    fault = fail_at("training", round=1, effect="hang", token=reached)
    fault.write(tmp_path / "fault.json")
    variables = watching(tmp_path / "fault.json", {})
    with PocEnv(Federation.of(3), home=tmp_path / "home", database="sqlite", environment=variables) as env:
        run = env.execute(builders.recipe(), run_id="cancelled")
        run.wait(MINUTES, until=reached.exists)
        with connect(env.api_url) as client:
            (training,) = find_runs(client, run_tag(run.journal.record().nonce), "training")
            client.set_flow_run_state(training.id, Cancelling())  # as its button in the UI does
        assert run.wait(MINUTES) == "aborted"
        await_no_children(env)
        (tmp_path / "fault.json").unlink()
        assert env.resume(run.id).result(MINUTES).model_digest == undisturbed()["model"]


def await_no_children(env: PocEnv) -> None:
    """Until no process works on a flow run any more."""
    until = time.monotonic() + MINUTES
    while children_working_on(env) and time.monotonic() < until:
        threading.Event().wait(0.1)
    assert not children_working_on(env)


def children_working_on(env: PocEnv) -> list[psutil.Process]:
    """Processes that the workers forked for a flow run: each leads a group of its own, the workers' tools do not."""
    workers = {p.pid for p in env.processes()}
    below = [c for p in env.processes() for c in psutil.Process(p.pid).children(recursive=True)]
    return [
        c
        for c in below
        if c.is_running() and c.status() != psutil.STATUS_ZOMBIE and os.getpgid(c.pid) == c.pid and c.pid not in workers
    ]
