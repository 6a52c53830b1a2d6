"""Kill anything at any instant: the resumed run ends with the bytes of an undisturbed one."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from fedflow.testing.faults import fail_at
from tests import builders
from tests.prefect.conftest import Poc

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]

MINUTES = 600.0  # seconds that a run may take on a busy machine


def logged(log: Path, **changes: Any) -> dict[str, Any]:
    """Fields of a recipe whose trainings are counted in `log`."""
    return {
        "workload": {"path": "tests.builders:Blobs", "args": {"log": str(log)}},
        "evaluation": "tests.builders:HeldOut",
        **changes,
    }


def reference(undisturbed: Any, **changes: Any) -> dict[str, Any]:
    outcome: dict[str, Any] = undisturbed(evaluation="tests.builders:HeldOut", **changes)
    return outcome


def comparable(outcome: dict[str, Any]) -> dict[str, Any]:
    """Without update digests: they name the plan, and so the run's nonce."""
    return {k: v for k, v in outcome.items() if k not in ("updates", "accepted")}


COORDINATOR = [
    ("plan", "before"),  # right after the manifest of the round before
    ("opening", "after"),
    ("attempt", "before"),
    ("attempt", "after"),
    ("closing", "before"),
    ("closing", "after"),
]


@pytest.mark.parametrize(("step", "when"), COORDINATOR)
def test_a_killed_coordinator_resumes_to_the_same_bytes(
    poc: Poc, undisturbed: Any, tmp_path: Path, step: Any, when: Any
) -> None:
    """No site that had finished is trained again."""
    log, token = tmp_path / "trainings", tmp_path / "struck"
    fault = fail_at(step, round=1, when=when, token=token)
    run = poc.execute(builders.recipe(**logged(log)), f"kill-{step}-{when}", fault)
    assert run.wait(MINUTES) == "interrupted"
    assert fault.struck
    poc.env.resume(run.id).result(MINUTES)
    assert comparable(builders.outcome(run.journal)) == comparable(reference(undisturbed))
    assert builders.trainings(log) == Counter(dict.fromkeys(builders.SITES, 2))


AGGREGATION = [("server objects", "before"), ("manifest", "before"), ("manifest", "after"), ("evaluation", "before")]


@pytest.mark.parametrize(("step", "when"), AGGREGATION)
def test_a_killed_aggregation_is_tried_again_by_itself(
    poc: Poc, undisturbed: Any, tmp_path: Path, step: Any, when: Any
) -> None:
    """In aggregation, between its objects and the manifest, after the manifest, and in the evaluation."""
    log, token = tmp_path / "trainings", tmp_path / "struck"
    fault = fail_at(step, round=1, when=when, token=token)
    run = poc.execute(builders.recipe(**logged(log)), f"kill-{step.replace(' ', '-')}-{when}", fault)
    run.result(MINUTES)
    assert fault.struck
    assert comparable(builders.outcome(run.journal)) == comparable(reference(undisturbed))
    assert builders.trainings(log) == Counter(dict.fromkeys(builders.SITES, 2))


@pytest.mark.parametrize("step", ["training", "update manifest"])
def test_a_killed_trainer_is_asked_again(poc: Poc, undisturbed: Any, tmp_path: Path, step: Any) -> None:
    """In the middle of its training, and between upload and manifest. Only that site trains again."""
    log, token = tmp_path / "trainings", tmp_path / "struck"
    fault = fail_at(step, site="site-2", round=1, token=token)
    run = poc.execute(builders.recipe(**logged(log)), f"kill-{step.replace(' ', '-')}", fault)
    run.result(MINUTES)
    assert fault.struck
    assert comparable(builders.outcome(run.journal)) == comparable(reference(undisturbed))
    assert builders.trainings(log) == Counter({"site-1": 2, "site-2": 3, "site-3": 2})
    attempts = {a.site: a.attempt for a in run.journal.attempts(run.journal.plan(1, "train"))}
    assert attempts == {"site-1": 1, "site-2": 2, "site-3": 1}


def test_sites_that_grow_trees_together_meet_again_after_one_was_killed(poc: Poc, tmp_path: Path) -> None:
    """After its trees have grown, before they are sent: those of the others are the same, and one answer is enough."""
    algorithm = {"kind": "xgboost", "mode": "histogram", "params": {"objective": "binary:logistic"}}
    recipe = builders.recipe(algorithm=algorithm, workload="tests.builders:labelled", timeouts={"quorum_grace": "2s"})
    expected = builders.head(builders.run(recipe)).model_digest
    fault = fail_at("update objects", site="site-2", round=1, token=tmp_path / "struck")
    fault = replace(fault, at=r"sites/site-2/[^/]+/00001/boost/[0-9a-f]{64}\.safetensors$")
    run = poc.execute(recipe, "trees", fault)
    assert run.result(MINUTES).model_digest == expected
    assert fault.struck


def test_a_run_survives_an_api_that_is_gone_for_100_seconds(poc: Poc, undisturbed: Any, tmp_path: Path) -> None:
    """The server is killed while the sites train, and comes back 100 s later."""
    log = tmp_path / "trainings"
    reached = tmp_path / "training"
    fault = fail_at("training", site="site-2", round=0, effect="slow", seconds=20, token=reached)
    run = poc.execute(builders.recipe(**logged(log)), "outage", fault)
    run.wait(MINUTES, until=reached.exists)
    poc.env.server.kill()
    threading.Event().wait(timedelta(seconds=100).total_seconds())
    poc.env.server.start()
    run.result(MINUTES)
    assert comparable(builders.outcome(run.journal)) == comparable(reference(undisturbed))
    assert builders.trainings(log) == Counter(dict.fromkeys(builders.SITES, 2))
