"""SIGKILL anywhere, call again: the same bytes, and nobody trains twice who had finished."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import fsspec
import pytest

from fedflow.engine import rounds, start_run
from fedflow.store.journal import Journal
from fedflow.store.objects import ObjectStore
from fedflow.store.records import utc_now
from fedflow.testing.faults import Fault, Step, When, fail_at
from tests.builders import SITES, head, in_child, keys, outcome, recipe, run, run_with, trainings

FIELDS: Mapping[str, Any] = {
    "algorithm": {"kind": "tests.builders:Leaning"},  # with state at the sites
    "schedule": {"kind": "sampled", "sites_per_round": 2},
    "evaluation": "tests.builders:HeldOut",
    "rounds": 3,
}


def logged(log: Path) -> dict[str, Any]:
    """The recipe's fields, with a line in `log` for every training."""
    return {**FIELDS, "workload": {"path": "tests.builders:Blobs", "args": {"log": str(log)}}}


class Undisturbed:
    """A run that nothing happened to."""

    def __init__(self, folder: Path) -> None:
        self.journal = run(recipe(**logged(folder / "log")), str(folder / "store"))
        self.outcome = without_log(outcome(self.journal))
        self.trainings = trainings(folder / "log")
        plan = self.journal.plan(1, "train")
        assert plan is not None
        self.first, self.second = sorted(plan.tasks)  # of round 1


def without_log(found: dict[str, Any]) -> dict[str, Any]:
    """Updates are named by their plan, and so by the run's nonce; what they hold is in the model and the state."""
    return {k: v for k, v in found.items() if k not in ("updates", "accepted")}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    return Undisturbed(tmp_path_factory.mktemp("undisturbed"))


def killed(fault: Fault, fields: Mapping[str, Any], store: Path, **options: Any) -> None:
    """Start a run in a process of its own that the fault kills."""
    assert in_child(run_with, fault, fields, str(store), options) == -signal.SIGKILL
    assert fault.struck


# -- one process does everything -----------------------------------------------------------------------------------
PLACES: list[tuple[Step, When]] = [  # one between any two writes that follow each other
    ("run", "after"),
    ("initial objects", "after"),
    ("initial manifest", "after"),
    ("plan", "before"),
    ("plan", "after"),
    ("opening", "after"),
    ("training", "after"),
    ("update objects", "before"),
    ("update objects", "after"),
    ("site state", "after"),
    ("update manifest", "after"),
    ("closing", "after"),
    ("manifest", "before"),
    ("manifest", "after"),
    ("evaluation", "after"),
]
BEFORE_THE_UPDATE_COUNTS = {"training", "update objects", "site state"}


@pytest.mark.parametrize(("step", "when"), PLACES)
def test_a_run_killed_at_any_write_ends_with_the_same_bytes(
    tmp_path: Path, undisturbed: Undisturbed, step: Step, when: When
) -> None:
    """In round 1, at its second site: one site is done, one not. Only a training that was cut off is done again."""
    of_the_run = step in ("run", "initial objects", "initial manifest")
    of_a_site = step in ("training", "update objects", "site state", "update manifest")
    fault = fail_at(
        step,
        round=None if of_the_run else 1,
        site=undisturbed.second if of_a_site else None,
        when=when,
        nth=2 if step == "training" else 1,
        token=tmp_path / "token",
    )
    fields = logged(tmp_path / "log")
    killed(fault, fields, tmp_path / "store")
    journal = run(recipe(**fields), str(tmp_path / "store"))
    assert without_log(outcome(journal)) == undisturbed.outcome
    again = Counter({undisturbed.second: step in BEFORE_THE_UPDATE_COUNTS})
    assert trainings(tmp_path / "log") == undisturbed.trainings + again


def test_a_run_killed_between_two_objects_of_an_aggregation_ends_with_the_same_bytes(
    tmp_path: Path, undisturbed: Undisturbed
) -> None:
    fields = logged(tmp_path / "log")
    killed(fail_at("server objects", round=0, nth=2, token=tmp_path / "token"), fields, tmp_path / "store")
    journal = run(recipe(**fields), str(tmp_path / "store"))
    assert without_log(outcome(journal)) == undisturbed.outcome
    assert trainings(tmp_path / "log") == undisturbed.trainings


def test_a_run_killed_in_every_round_ends_with_the_same_bytes(tmp_path: Path, undisturbed: Undisturbed) -> None:
    fields = logged(tmp_path / "log")
    for round, step in enumerate(("closing", "manifest", "plan")):
        killed(fail_at(step, round=round, token=tmp_path / f"token-{round}"), fields, tmp_path / "store")
    journal = run(recipe(**fields), str(tmp_path / "store"))
    assert without_log(outcome(journal)) == undisturbed.outcome
    assert trainings(tmp_path / "log") == undisturbed.trainings


def test_a_round_that_was_killed_goes_on_a_day_later_under_a_new_opening(
    tmp_path: Path, undisturbed: Undisturbed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock is moved for coordinator and sites; the first opening's deadline lies far in the past."""
    fields = logged(tmp_path / "log")
    fault = fail_at("update manifest", round=1, site=undisturbed.first, when="after", token=tmp_path / "token")
    killed(fault, fields, tmp_path / "store")
    before = trainings(tmp_path / "log")
    for module in ("rounds", "site"):
        monkeypatch.setattr(f"fedflow.engine.{module}.utc_now", lambda: utc_now() + timedelta(days=1))
    journal = run(recipe(**fields), str(tmp_path / "store"))
    assert without_log(outcome(journal)) == undisturbed.outcome
    assert trainings(tmp_path / "log") == undisturbed.trainings
    assert before[undisturbed.first] == trainings(tmp_path / "log")[undisturbed.first] - _later(undisturbed)
    plan = journal.plan(1, "train")
    assert plan is not None
    first, second = journal.openings(plan)
    assert first.deadline < utc_now() + timedelta(days=1) < second.deadline
    closing = journal.closing(plan, 2)
    assert closing is not None and closing.quorate and journal.closing(plan, 1) is None


def _later(undisturbed: Undisturbed) -> int:
    """How often the first site of round 1 trains in round 2."""
    plan = undisturbed.journal.plan(2, "train")
    assert plan is not None
    return int(undisturbed.first in plan.tasks)


# -- every prefix of the writes ----------------------------------------------------------------------------------------
Operation = tuple[str, str, str, bytes]


@pytest.fixture
def history(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Operation]]:
    """Every write and deletion of this process, in order: (what, URL of the store, key, data)."""
    operations: list[Operation] = []
    put, write_stream, delete = ObjectStore.put, ObjectStore.write_stream, ObjectStore.delete

    def remembered_put(store: ObjectStore, key: str, data: bytes, **options: Any) -> None:
        put(store, key, data, **options)
        operations.append(("put", store.url, key, bytes(data)))

    def remembered_write_stream(store: ObjectStore, key: str, parts: Any, **options: Any) -> Any:
        data = b"".join(bytes(part) for part in parts)
        ref = write_stream(store, key, [data], **options)
        operations.append(("put", store.url, key, data))
        return ref

    def remembered_delete(store: ObjectStore, key: str) -> None:
        delete(store, key)
        operations.append(("delete", store.url, key, b""))

    with monkeypatch.context() as patch:
        patch.setattr(ObjectStore, "put", remembered_put)
        patch.setattr(ObjectStore, "write_stream", remembered_write_stream)
        patch.setattr(ObjectStore, "delete", remembered_delete)
        yield operations


def replay(operations: list[Operation], old: str, new: str) -> None:
    """Stores as they were after these operations, with URLs that begin with `new`."""
    for what, url, key, data in operations:
        store = ObjectStore(url.replace(old, new, 1))
        if what == "put":
            store.put(key, data, mode="overwrite")
        else:
            store.delete(key)


@pytest.mark.parametrize(("algorithm", "rounds"), [("tests.builders:Leaning", 2), ("tests.builders:Bounded", 1)])
def test_the_journal_goes_on_from_every_prefix_of_its_writes(
    history: list[Operation], algorithm: str, rounds: int
) -> None:
    """A machine that loses power after any write: what is there is enough to end with the same bytes."""
    small = recipe(
        algorithm=algorithm,
        rounds=rounds,
        evaluation="tests.builders:HeldOut",
        training={"steps": 1, "batch_size": 8},
    )
    sites = ["site-1", "site-2"]
    journal = run(small, "memory://prefix", sites=sites)
    expected = without_log(outcome(journal))
    operations = list(history)
    assert len(keys(journal.store, "manifest")) == len(journal.committed()) + 1
    for length in range(len(operations) + 1):
        replay(operations[:length], "memory://prefix", "memory://replayed")
        found = run(small, "memory://replayed", sites=sites)
        assert without_log(outcome(found)) == expected, operations[:length][-1:]
        forget("replayed")
    forget("prefix")


def forget(name: str) -> None:
    objects = fsspec.filesystem("memory").store
    for path in [path for path in objects if path.startswith(f"/{name}")]:
        del objects[path]


# -- processes that others start ---------------------------------------------------------------------------------------
def test_a_fault_reaches_grandchildren_through_the_environment_and_strikes_once(tmp_path: Path) -> None:
    """What a Prefect worker does: it starts a process that starts a process that runs the code."""
    code = (
        "import subprocess, sys\n"
        "if sys.argv[1:]:\n"
        "    raise SystemExit(subprocess.run([sys.executable, __file__]).returncode)\n"
        "from fedflow.engine import start_run\n"
        "from fedflow.store.objects import ObjectStore\n"
        "from tests.builders import SITES, recipe\n"
        f"start_run(ObjectStore({str(tmp_path / 'store')!r}), 'run', recipe(), SITES)\n"
    )
    (tmp_path / "grandchild.py").write_text(code)
    paths = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    fault = fail_at("initial manifest", token=tmp_path / "token")
    environment = {**paths, **fault.environment(paths)}
    command = [sys.executable, str(tmp_path / "grandchild.py"), "start another"]
    first = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert first.returncode == -signal.SIGKILL % 256 or first.returncode == -signal.SIGKILL, first.stderr
    assert fault.struck
    second = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert second.returncode == 0, second.stderr
    started = Journal(ObjectStore(str(tmp_path / "store")), "run")
    assert (
        head(started).model_digest == head(start_run(ObjectStore("memory://here"), "run", recipe(), SITES)).model_digest
    )


def test_a_process_that_does_not_use_the_engine_is_not_touched(tmp_path: Path) -> None:
    fault = fail_at("closing", token=tmp_path / "token")
    code = "import sys, fedflow.errors; print('torch' in sys.modules, 'fedflow.testing' in sys.modules)"
    paths = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    environment = {**paths, **fault.environment(paths)}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout == "False False\n"


def test_a_step_that_nobody_knows_is_refused() -> None:
    unknown: Any = "coffee"
    with pytest.raises(ValueError, match="step: found 'coffee'"):
        fail_at(unknown)


def test_the_clock_of_the_rounds_is_the_one_that_the_tests_move() -> None:
    assert rounds.utc_now is utc_now
