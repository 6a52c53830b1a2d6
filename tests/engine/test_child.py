"""Work in processes of their own: their errors come back as they were, and time limits really end them."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest
from torch import Tensor, nn

from fedflow.algorithms.fedavg import FedAvg
from fedflow.engine import close_round, next_step, open_round, site_step, start_run, survey
from fedflow.engine.child import aggregate_in_child, evaluate_in_child, start_in_child
from fedflow.engine.site import SiteWork, failure_of, hard_deadline
from fedflow.errors import (
    OpeningClosed,
    QuorumLost,
    ResolveError,
    RoundError,
    RunExists,
    SiteStateLost,
    StoreUnavailable,
)
from fedflow.recipe import SiteConfig
from fedflow.store.journal import Journal
from fedflow.store.objects import ObjectStore
from fedflow.store.records import Plan
from tests.builders import SITES, Blobs, head, in_child, outcome, recipe, run

WARM = 250.0  # seconds, for a child that must not be killed


def closed(
    folder: Path, sites: tuple[str, ...] = SITES, missing: dict[str, str] | None = None, **fields: Any
) -> tuple[Journal, Plan]:
    """Round 0, closed with the updates of these sites."""
    store = ObjectStore(str(folder / "store"))
    journal = start_run(store, "run", recipe(**fields), SITES)
    step = next_step(journal, journal.recipe())
    assert step is not None
    plan, opening = open_round(journal, step)
    for site in sites:
        site_step(
            SiteWork("run", 0, plan.phase),
            SiteConfig(name=site, store=store.url, state=str(folder / site), allowed_imports=["*"]),
        )
    try:
        close_round(journal, plan, opening, survey(journal, plan), why="deadline", missing=missing)
    except QuorumLost:
        assert len(sites) < len(SITES)
    return journal, plan


def aggregate(journal: Journal, timeout: float = WARM) -> None:
    aggregate_in_child(journal.store.url, {}, "run", 0, "train", 1, timeout=timeout)


# -- aggregation and evaluation ----------------------------------------------------------------------------------------
def test_a_child_commits_what_this_process_would(tmp_path: Path) -> None:
    journal, _ = closed(tmp_path, rounds=1, evaluation="tests.builders:HeldOut")
    for _ in range(2):
        aggregate(journal)
        evaluate_in_child(journal.store.url, {}, "run", 0, "train", timeout=WARM)
    here = run(recipe(rounds=1, evaluation="tests.builders:HeldOut"))
    assert head(journal).model_digest == head(here).model_digest
    assert outcome(journal)["evaluations"] == outcome(here)["evaluations"]


def test_a_child_begins_the_run_that_this_process_would(tmp_path: Path) -> None:
    store = ObjectStore(str(tmp_path))
    for _ in range(2):
        start_in_child(store.url, {}, "run", recipe(), list(SITES), {}, timeout=WARM)
    here = start_run(ObjectStore("memory://here"), "run", recipe(), SITES)
    assert head(Journal(store, "run")).model_digest == head(here).model_digest
    with pytest.raises(RunExists, match="seed: 5 there, 6 here"):
        start_in_child(store.url, {}, "run", recipe(seed=6), list(SITES), {}, timeout=WARM)
    with pytest.raises(ResolveError, match="model: found 'tests.builders:Nothing'"):
        start_in_child(store.url, {}, "other", recipe(model="tests.builders:Nothing"), list(SITES), {}, timeout=WARM)


def test_what_a_child_says_is_said_here(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    journal, _ = closed(tmp_path, rounds=1, algorithm={"kind": "diloco"})
    with caplog.at_level(logging.INFO, logger="fedflow"):
        aggregate(journal)
    assert "run run, round 0: outer step: nesterov, learning rate 0.7, momentum 0.9" in caplog.text


def test_a_childs_error_comes_back_as_it_was(tmp_path: Path) -> None:
    """Also one longer than a pipe holds: every site may have sent a traceback."""
    why = "x" * 300_000
    journal, _ = closed(tmp_path, sites=SITES[:2], missing={"site-3": why})
    with pytest.raises(QuorumLost, match="found 2 valid updates, expected 3; missing: site-3: xxx") as caught:
        aggregate(journal)
    assert (caught.value.run, caught.value.round) == ("run", 0) and why in caught.value.reason


def test_an_error_that_nobody_foresaw_comes_back_with_its_traceback(tmp_path: Path) -> None:
    journal, _ = closed(tmp_path, algorithm="tests.engine.test_child:Stumbling")
    with pytest.raises(RoundError, match=r"(?s)aggregate failed:.*test_child\.py.*ZeroDivisionError"):
        aggregate(journal)
    with pytest.raises(ResolveError, match="evaluation: found 'tests.builders:Nothing'"):
        other, _ = closed(tmp_path / "other", evaluation="tests.builders:Nothing")
        aggregate(other)
        evaluate_in_child(other.store.url, {}, "run", 0, "train", timeout=WARM)


class Stumbling(FedAvg):
    kind: Any = "stumbling"

    def server_update(self, state: Any, aggregate: Any, ctx: Any) -> Any:
        return 1 / 0


class Dying(FedAvg):
    """Its process is killed from outside, as by a machine without memory."""

    kind: Any = "dying"

    def server_update(self, state: Any, aggregate: Any, ctx: Any) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)


class Endless(FedAvg):
    """Never comes back. It says who it is in the file that `whose` names, if it does."""

    kind: Any = "endless"
    whose: str = ""

    def server_update(self, state: Any, aggregate: Any, ctx: Any) -> Any:
        if self.whose:
            Path(self.whose).write_text(str(os.getpid()))
        threading.Event().wait()


def test_a_child_that_dies_is_told_with_its_exit_code(tmp_path: Path) -> None:
    journal, _ = closed(tmp_path, algorithm="tests.engine.test_child:Dying")
    with pytest.raises(RoundError, match="died with exit code -9"):
        aggregate(journal)
    assert journal.committed() == []


def test_a_child_that_takes_too_long_is_killed(tmp_path: Path) -> None:
    whose = tmp_path / "whose"
    journal, _ = closed(tmp_path, algorithm={"kind": "tests.engine.test_child:Endless", "whose": str(whose)})
    with pytest.raises(RoundError, match=r"aggregate: killed after 2 s; give it longer \(round_deadline\)"):
        aggregate(journal, timeout=2)
    assert not psutil.pid_exists(int(whose.read_text()))
    assert journal.committed() == []


# -- a site's hard deadline --------------------------------------------------------------------------------------------
class Stuck(Blobs):
    """Never comes back from its first step, and listens to no signal that can be listened to."""

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        threading.Event().wait()
        raise AssertionError


def stuck_site(store: str, state: str, limits: dict[str, Any]) -> None:
    """For `in_child`."""
    config = SiteConfig.load(
        {"name": "site-1", "store": store, "state": state, "limits": limits, "allowed_imports": ["*"]}
    )
    work = SiteWork("run", 0, "train")
    with hard_deadline(work, config):
        site_step(work, config)


def aggregating_for_ever(folder: Path, fifo: Path) -> None:
    journal, _ = closed(folder, algorithm={"kind": "tests.engine.test_child:Endless", "whose": str(fifo)})
    aggregate(journal)


def test_a_child_ends_with_its_caller(tmp_path: Path) -> None:
    fifo = tmp_path / "whose"
    os.mkfifo(fifo)
    caller = multiprocessing.get_context("spawn").Process(target=aggregating_for_ever, args=(tmp_path, fifo))
    caller.start()
    child = psutil.Process(int(fifo.read_text()))  # waits until it has begun
    caller.kill()
    child.wait(WARM)


@pytest.mark.parametrize(
    ("timeout", "limits", "whose"),
    [("1s", {"time": "1m"}, "train_timeout"), ("20m", {"time": "1s"}, "this site's limits.time")],
)
def test_a_training_that_outlives_its_time_is_killed_after_saying_so(
    tmp_path: Path, timeout: str, limits: dict[str, Any], whose: str
) -> None:
    """The recipe's, after which another attempt may be quicker, or the site's, which the recipe has to fit."""
    timeouts = {"train_timeout": timeout, "round_deadline": "2h"}
    journal = start_run(
        ObjectStore(str(tmp_path / "store")),
        "run",
        recipe(workload="tests.engine.test_child:Stuck", timeouts=timeouts),
        SITES,
    )
    step = next_step(journal, journal.recipe())
    assert step is not None
    plan, opening = open_round(journal, step)
    assert in_child(stuck_site, journal.store.url, str(tmp_path / "state"), limits) == -signal.SIGKILL
    failure = journal.failure(plan, "site-1", opening.number, 1)
    assert failure is not None and failure.heals == (whose == "train_timeout")
    assert failure.reason.startswith(f"killed after 0:00:01 ({whose})")


@pytest.mark.parametrize(
    ("error", "reason", "foreseen", "heals"),
    [
        (StoreUnavailable("no answer"), "no answer", True, True),
        (ResolveError("no such workload"), "no such workload", True, False),
        (SiteStateLost("gone"), "gone", True, False),
        (OpeningClosed("closed"), "closed", True, False),
        (MemoryError("1 GB"), "MemoryError: 1 GB", False, True),
    ],
)
def test_a_site_says_why_it_failed_and_whether_another_try_may_help(
    error: Exception, reason: str, foreseen: bool, heals: bool
) -> None:
    try:
        raise error
    except Exception as caught:
        found = failure_of(SiteWork("run", 3, "train", 2, 4), "site-1", caught)
    assert (found.reason, found.heals) == (reason, heals)
    assert (found.round, found.opening, found.attempt) == (3, 2, 4)
    assert ("Traceback" in found.traceback) is not foreseen
