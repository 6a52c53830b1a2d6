"""A run's rounds at the coordinator: every function twice, in any process, by two coordinators at once."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import pytest

from fedflow.engine import (
    aggregate_round,
    amend_run,
    close_round,
    commit_round,
    is_finished,
    may_close,
    next_step,
    open_round,
    site_step,
    start_run,
    survey,
)
from fedflow.engine.best import best_round, stops_early
from fedflow.engine.rounds import Survey, quorum_of, recording_outcome
from fedflow.engine.site import SiteWork
from fedflow.errors import (
    OpeningClosed,
    QuorumLost,
    ResolveError,
    RoundAborted,
    RunExists,
    RunMissing,
    SiteError,
    UserError,
)
from fedflow.recipe import Recipe, SiteConfig
from fedflow.store.journal import Journal, list_runs
from fedflow.store.objects import ObjectStore
from fedflow.store.records import Contribution, Manifest, Opening, Plan, UpdateManifest, utc_now
from tests import builders
from tests.builders import SITES, head, in_child, keys, outcome, path_of, recipe, run, trainings


def started(store: str, run_name: str = "run", **fields: Any) -> Journal:
    return start_run(ObjectStore(store), run_name, recipe(**fields), SITES)


def opened(journal: Journal, **options: Any) -> tuple[Plan, Opening]:
    step = next_step(journal, journal.recipe())
    assert step is not None
    return open_round(journal, step, **options)


def answer(journal: Journal, plan: Plan, site: str, opening: int = 1, **options: Any) -> Any:
    config = SiteConfig(
        name=site, store=journal.store.url, state=f"{journal.store.url}-states/{site}", allowed_imports=["*"]
    )
    return site_step(SiteWork("run", plan.round, plan.phase, opening), config, **options)


def answered(store: str, **fields: Any) -> tuple[Journal, Plan, Opening]:
    """Round 0, answered by everybody, not closed."""
    journal = started(store, **fields)
    plan, opening = opened(journal)
    for site in plan.tasks:
        answer(journal, plan, site)
    return journal, plan, opening


def closed(journal: Journal, plan: Plan, opening: Opening) -> Any:
    return close_round(journal, plan, opening, survey(journal, plan), why="every site answered")


def together(*calls: Callable[[], Any]) -> list[Any]:
    """The results of the calls, made at the same instant."""
    barrier = threading.Barrier(len(calls))

    def made(call: Callable[[], Any]) -> Any:
        barrier.wait()
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(made, calls))


# -- the run -----------------------------------------------------------------------------------------------------------
def test_a_run_that_is_begun_twice_is_one_run(tmp_path: Path) -> None:
    first, second = (started(str(tmp_path)) for _ in range(2))
    assert first.record() == second.record() and head(first) == head(second)
    assert list_runs(first.store) == ["run"]


def test_a_run_begun_by_two_at_once_is_one_run(tmp_path: Path) -> None:
    journals = together(*[lambda: started(str(tmp_path))] * 4)
    assert len({j.record().nonce for j in journals}) == len({head(j).digest() for j in journals}) == 1


def test_a_name_that_is_used_in_another_store_is_another_run(tmp_path: Path) -> None:
    a, b = (started(str(tmp_path / name)) for name in "ab")
    assert a.record().nonce != b.record().nonce
    plans = [opened(journal)[0] for journal in (a, b)]
    assert plans[0].digest() != plans[1].digest()


def test_the_states_of_a_run_are_not_those_of_another_run_of_that_name(tmp_path: Path) -> None:
    """A site keeps its states by name and nonce; a new run of the same name begins with fresh ones."""
    leaning, states = recipe(algorithm="tests.builders:Leaning"), str(tmp_path / "states")
    digests = [outcome(run(leaning, str(tmp_path / name), state=states))["model"] for name in "ab"]
    assert digests[0] == digests[1]
    assert len({path.name for path in (tmp_path / "states/site-1").iterdir()}) == 2


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"seed": 6}, "seed: 5 there, 6 here"),
        ({"late": "carry"}, "late: 'drop' there, 'carry' here"),
        ({"model": "tests.builders:blobs"}, "model"),
        (
            {"algorithm": {"kind": "fedavg", "weight_by": "steps"}},
            "algorithm: {.*'examples'.*} there, {.*'steps'.*} here",
        ),
    ],
)
def test_a_name_that_belongs_to_another_recipe_is_refused_naming_the_difference(
    tmp_path: Path, changes: dict[str, Any], told: str
) -> None:
    journal = started(str(tmp_path))
    before = journal.store.list()
    if "model" not in changes:
        with pytest.raises(RunExists, match=rf"run: found 'run' with another recipe \({told}\).*--run-id"):
            started(str(tmp_path), **changes)
    with pytest.raises(
        RunExists, match=f"{told}.*expected no change but in attempts, memory_budget, min_sites, quorum"
    ):
        amend_run(journal, recipe(**changes))
    assert journal.store.list() == before


def test_a_resume_may_change_rounds_timeouts_and_quorum_and_each_change_is_journalled(tmp_path: Path) -> None:
    journal = started(str(tmp_path))
    amend_run(journal, recipe(rounds=9, timeouts={"round_deadline": "5m"}))
    amend_run(journal, quorum=2, min_sites=2)
    amend_run(journal, quorum=2)
    first, second = journal.amendments()
    assert (first.number, sorted(first.recipe)) == (1, ["rounds", "timeouts"])
    assert (second.number, second.recipe, second.sites) == (2, {"quorum": 2, "min_sites": 2}, [])
    now = journal.recipe()
    assert (now.rounds, now.quorum, now.timeouts.round_deadline) == (9, 2, timedelta(minutes=5))
    assert journal.record().recipe["rounds"] == 2


def test_sites_that_join_take_part_from_the_next_round_and_count_among_all(tmp_path: Path) -> None:
    store = str(tmp_path / "store")
    run(recipe(rounds=1), store, sites=SITES[:2])
    journal = run(recipe(rounds=2), store, sites=SITES)
    manifests = [journal.manifest(*step) for step in journal.committed()]
    plans = [journal.plan(*step) for step in journal.committed()]
    assert [sorted(m.contributors) for m in manifests if m] == [list(SITES[:2]), list(SITES)]
    assert [p.num_sites for p in plans if p] == [2, 3]
    assert [a.sites for a in journal.amendments()] == [["site-3"]]


def test_two_resumes_with_different_changes_lose_neither(tmp_path: Path) -> None:
    journal = started(str(tmp_path))
    together(
        lambda: amend_run(journal, rounds=7),
        lambda: amend_run(journal, attempts=1),
        lambda: amend_run(journal, quorum=1),
    )
    now = journal.recipe()
    assert (now.rounds, now.attempts, now.quorum) == (7, 1, 1)


@pytest.mark.parametrize("name", ["", "a/b", "../a", ".hidden", "a b", "x" * 64])
def test_a_run_name_that_is_no_name_is_refused_before_anything_is_written(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="run: found .*choose another --run-id"):
        started(str(tmp_path / "store"), name)
    assert not (tmp_path / "store").exists()


def test_a_run_that_nobody_knows_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunMissing, match=r"run: found no run 'nobody' in file://.*`fedflow runs ls`"):
        Journal(ObjectStore(str(tmp_path)), "nobody").recipe()


@pytest.mark.parametrize(
    ("changes", "error", "told"),
    [
        ({"model": "tests.builders:Nothing"}, ResolveError, "model: found 'tests.builders:Nothing'"),
        ({"required_sites": ["site-9"]}, UserError, "found sites .'site-9'., expected sites among .'site-1'"),
        ({"overrides": {"site-8": {}}}, UserError, "'site-8'"),
    ],
)
def test_a_mistake_is_told_before_anything_is_written(
    tmp_path: Path, changes: dict[str, Any], error: type[Exception], told: str
) -> None:
    with pytest.raises(error, match=told):
        started(str(tmp_path / "store"), **changes)
    assert not (tmp_path / "store").exists()


# -- plan and opening --------------------------------------------------------------------------------------------------
def test_a_plan_is_made_once_and_an_opening_is_continued_without_a_new_deadline(tmp_path: Path) -> None:
    journal = started(str(tmp_path))
    assert opened(journal) == opened(journal, why="retry", absent={"site-1": "gone"})
    plan, second = opened(journal, reopen=True, why="resume")
    assert (second.number, second.why) == (2, "resume")
    assert [o.number for o in journal.openings(plan)] == [1, 2]
    assert opened(journal)[1] == second


def test_two_coordinators_get_one_plan_and_one_opening(tmp_path: Path) -> None:
    journal = started(str(tmp_path))
    found = together(*[lambda: opened(journal, reopen=True)] * 4)
    assert len({plan.digest() for plan, _ in found}) == 1
    assert {o.number for _, o in found} <= {1, 2, 3, 4}
    assert [o.number for o in journal.openings(found[0][0])] == list(range(1, 1 + len(journal.openings(found[0][0]))))


def test_an_opening_says_when_it_ends_and_how_many_close_it(tmp_path: Path) -> None:
    journal = started(str(tmp_path), timeouts={"round_deadline": "5m"}, required_sites=["site-1"])
    _, first = opened(journal)
    amend_run(journal, quorum=2, required_sites=[], timeouts={"round_deadline": "1h"})
    _, second = opened(journal, reopen=True)
    assert (first.deadline - first.opened, first.quorum, first.required) == (timedelta(minutes=5), 3, ["site-1"])
    assert (second.deadline - second.opened, second.quorum, second.required) == (timedelta(hours=1), 2, [])


def test_absent_sites_are_planned_around_and_named(tmp_path: Path) -> None:
    plan, opening = opened(started(str(tmp_path)), absent={"site-2": "no worker"})
    assert (sorted(plan.tasks), plan.absent, opening.quorum) == (["site-1", "site-3"], {"site-2": "no worker"}, 2)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"required_sites": ["site-2"]}, r"required sites are absent: site-2 \(no worker\); start their workers"),
        ({"quorum": 3}, r"found 2 sites to ask, expected at least 3 \(quorum\): site-2 \(no worker\)"),
        ({"min_sites": 3}, r"found 2 sites to ask, expected at least 3 \(min_sites\): site-2 \(no worker\)"),
    ],
)
def test_a_round_does_not_begin_without_the_sites_that_it_needs(
    tmp_path: Path, fields: dict[str, Any], told: str
) -> None:
    journal = started(str(tmp_path), **fields)
    with pytest.raises(QuorumLost, match=told):
        opened(journal, absent={"site-2": "no worker"})
    assert keys(journal.store, "plan") == []
    assert sorted(opened(journal)[0].tasks) == list(SITES)


# -- when a round may close --------------------------------------------------------------------------------------------
NOW = datetime(2030, 1, 1, tzinfo=UTC)
OPENING = Opening(number=1, opened=NOW, deadline=NOW + timedelta(minutes=10), why="", quorum=2, required=["a"])


def found(*accepted: str, rejected: tuple[str, ...] = ()) -> Survey:
    return Survey(
        {s: Contribution(key="k", update="u", base_round=0) for s in accepted}, dict.fromkeys(rejected, "bad")
    )


@pytest.mark.parametrize(
    ("seen", "given_up", "quorum_since", "minutes", "expected"),
    [
        (found("a", "b", "c"), [], None, 0, "every site answered"),
        (found("a", "b", rejected=("c",)), [], None, 0, "every site answered"),
        (found("a"), ["b", "c"], None, 0, "every site answered"),
        (found("a", "b"), [], None, 9, None),
        (found("a", "b"), [], 0, 0.9, None),
        (found("a", "b"), [], 0, 1, "quorum"),
        (found("b", "c"), [], 0, 5, None),  # without the required site it is no quorum
        (found("a"), [], 0, 5, None),
        (found(), [], None, 9.9, None),
        (found(), [], None, 10, "deadline"),
        (found("a", "b"), [], None, 11, "deadline"),
    ],
)
def test_a_round_closes_when_all_answered_or_at_its_deadline_or_a_grace_after_its_quorum(
    seen: Survey, given_up: list[str], quorum_since: float | None, minutes: float, expected: str | None
) -> None:
    since = None if quorum_since is None else NOW + timedelta(minutes=quorum_since)
    at, grace = NOW + timedelta(minutes=minutes), timedelta(minutes=1)
    found = may_close({"a", "b", "c"}, OPENING, seen, given_up=given_up, quorum_since=since, grace=grace, at=at)
    assert found == expected


# -- closing and commit ------------------------------------------------------------------------------------------------
def test_a_closing_stands_whatever_arrives_later(tmp_path: Path) -> None:
    journal = started(str(tmp_path), quorum=2)
    plan, opening = opened(journal)
    for site in SITES[:2]:
        answer(journal, plan, site)
    first = closed(journal, plan, opening)
    with pytest.raises(OpeningClosed, match="opening 1 was closed without this site"):
        answer(journal, plan, "site-3")
    assert closed(journal, plan, opening) == first
    assert commit_round(journal, plan, first).excluded == {"site-3": "no update by the deadline"}


def test_a_round_is_committed_once_however_often_it_is_aggregated(tmp_path: Path) -> None:
    journal, plan, opening = answered(str(tmp_path))
    closing = closed(journal, plan, opening)
    first = commit_round(journal, plan, closing)
    before = journal.store.list()
    assert commit_round(journal, plan, closing) == first == aggregate_round(journal, plan, closing)
    assert journal.store.list() == before


def test_coordinators_that_commit_at_once_agree(tmp_path: Path) -> None:
    journal, plan, opening = answered(str(tmp_path))
    manifests = together(*[lambda: commit_round(journal, plan, closed(journal, plan, opening))] * 4)
    assert len({m.digest() for m in manifests}) == 1 and len(keys(journal.store, "manifest")) == 2


class Late(Journal):
    """The journal of an aggregator that falls asleep before its commit."""

    def __init__(self, journal: Journal, meanwhile: Callable[[], None]) -> None:
        super().__init__(journal.store, journal.run)
        self.meanwhile = meanwhile

    def put_manifest(self, manifest: Manifest) -> Manifest:
        self.meanwhile()
        return super().put_manifest(manifest)


def test_an_aggregator_that_finishes_late_changes_nothing(tmp_path: Path) -> None:
    """While it sleeps, another one commits the round, and the run goes on to its end."""
    store = str(tmp_path / "store")
    journal, plan, opening = answered(store)
    closing = closed(journal, plan, opening)
    end: dict[str, Any] = {}

    def meanwhile() -> None:
        run(recipe(), store)
        end.update(files=journal.store.list(), outcome=outcome(journal), first=journal.manifest(0, "train"))

    assert aggregate_round(Late(journal, meanwhile), plan, closing) == end["first"]
    assert (journal.store.list(), outcome(journal)) == (end["files"], end["outcome"])


def test_an_aggregator_that_begins_late_changes_nothing(tmp_path: Path) -> None:
    store = str(tmp_path / "store")
    journal, plan, opening = answered(store)
    closing = closed(journal, plan, opening)
    run(recipe(), store)
    before = journal.store.list()
    assert aggregate_round(journal, plan, closing) == journal.manifest(0, "train")
    assert journal.store.list() == before


def two_rounds(store: str, log: str) -> None:
    run(recipe(workload={"path": "tests.builders:Blobs", "args": {"log": log}}), store)


def test_two_coordinators_resumed_at_once_give_one_result_and_train_nobody_twice(tmp_path: Path) -> None:
    store, log = str(tmp_path / "store"), str(tmp_path / "log")
    together(*[lambda: in_child(two_rounds, store, log)] * 2)
    journal = Journal(ObjectStore(store), "run")
    assert outcome(journal)["model"] == outcome(run(recipe()))["model"]
    assert trainings(Path(log)) == dict.fromkeys(SITES, 2)
    assert len(keys(journal.store, r"manifest\.json$")) == 3


# -- a site's step -----------------------------------------------------------------------------------------------------
def test_a_site_that_is_asked_twice_trains_once(tmp_path: Path) -> None:
    log = tmp_path / "log"
    journal = started(str(tmp_path / "store"), workload={"path": "tests.builders:Blobs", "args": {"log": str(log)}})
    plan, _ = opened(journal)
    first = answer(journal, plan, "site-1")
    opened(journal, reopen=True)
    assert answer(journal, plan, "site-1", opening=2) == first == answer(journal, plan, "site-1")
    assert trainings(log) == {"site-1": 1}


def test_two_trainers_of_one_site_wait_for_each_other(tmp_path: Path) -> None:
    log = tmp_path / "log"
    journal = started(str(tmp_path / "store"), workload={"path": "tests.builders:Blobs", "args": {"log": str(log)}})
    plan, _ = opened(journal)
    first, second = together(*[lambda: answer(journal, plan, "site-1")] * 2)
    assert first == second and trainings(log) == {"site-1": 1}


def test_a_site_that_does_its_work_on_two_machines_sends_the_same_bytes(tmp_path: Path) -> None:
    """Two machines that know nothing of each other: the second one's writes find the first one's objects there."""
    journal = started(str(tmp_path / "a/store"), algorithm="tests.builders:Leaning")
    plan, _ = opened(journal)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    other = Journal(ObjectStore(str(tmp_path / "b/store")), "run")
    sent = [answer(here, plan, "site-2").update_digest() for here in (journal, other)]
    assert sent[0] == sent[1] and journal.store.list() == other.store.list()
    for key in keys(journal.store, "safetensors$"):
        assert journal.store.get(key) == other.store.get(key)
    assert states(journal, "site-2") == states(other, "site-2")


def test_a_trainer_that_finishes_late_changes_nothing(tmp_path: Path) -> None:
    """Its round is closed and committed without it; its update and its memory of it count nowhere."""
    fields: dict[str, Any] = {"algorithm": "tests.builders:Leaning", "quorum": 2, "rounds": 3}
    journal = run(recipe(**fields | {"rounds": 1}), str(tmp_path / "late/store"))
    amend_run(journal, rounds=3)
    plan, opening = opened(journal)
    for site in SITES[:2]:
        answer(journal, plan, site)

    def meanwhile(done: int, planned: int | None) -> None:
        if done == 1:
            commit_round(journal, plan, closed(journal, plan, opening))
            shutil.copytree(tmp_path / "late", tmp_path / "never")

    answer(journal, plan, "site-3", progress=meanwhile)
    late, never = (outcome(run(recipe(**fields), str(tmp_path / name / "store"))) for name in ("late", "never"))
    assert late == never
    assert journal.manifest(1, "train").excluded.keys() == {"site-3"}  # type: ignore[union-attr]


def test_a_site_outside_the_cohort_and_a_round_that_is_not_open_are_refused(tmp_path: Path) -> None:
    journal = started(str(tmp_path / "store"))
    plan, _ = opened(journal, absent={"site-3": "no worker"})
    with pytest.raises(SiteError, match="round 0, site site-3: this site is not in the round's cohort"):
        answer(journal, plan, "site-3")
    with pytest.raises(SiteError, match="found no plan with opening 2"):
        answer(journal, plan, "site-1", opening=2)


def test_a_training_stops_when_its_round_is_closed_or_its_deadline_is_past(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It looks every heartbeat: here after every step."""
    short = {"round_deadline": "1h", "heartbeat": "1ms", "quorum_grace": "0s"}
    journal = started(str(tmp_path / "store"), timeouts=short, quorum=1)
    plan, opening = opened(journal)
    answer(journal, plan, "site-1")

    def close(done: int, planned: int | None) -> None:
        if done == 1:
            closed(journal, plan, opening)

    with pytest.raises(OpeningClosed, match="closed without this site"):
        answer(journal, plan, "site-2", progress=close)

    def an_hour_passes(done: int, planned: int | None) -> None:
        monkeypatch.setattr("fedflow.engine.site.utc_now", lambda: utc_now() + timedelta(hours=1))

    plan, _ = opened(_committed(journal, plan, opening))
    with pytest.raises(OpeningClosed, match="the deadline of opening 1 passed"):
        answer(journal, plan, "site-2", progress=an_hour_passes)


def _committed(journal: Journal, plan: Plan, opening: Opening) -> Journal:
    commit_round(journal, plan, closed(journal, plan, opening))
    return journal


# -- memory at the sites -----------------------------------------------------------------------------------------------
LEANING = {"algorithm": "tests.builders:Leaning", "rounds": 4}


def states(journal: Journal, site: str) -> list[str]:
    return ObjectStore(f"{journal.store.url}-states/{site}").list()


def test_a_sites_memory_stays_at_the_site_and_only_as_long_as_it_is_needed(tmp_path: Path) -> None:
    """The accepted state, which the next plan will name, and the one before it, until a plan has named the newer one."""
    journal = run(recipe(**LEANING), str(tmp_path / "store"))
    for site in SITES:
        records = [key for key in states(journal, site) if key.endswith(".json")]
        accepted = head(journal).sites[site].accepted
        assert accepted is not None and len(records) == 2
        assert any(accepted.partition(":")[2] in key for key in records)
        assert len(states(journal, site)) == 4  # a record and its tensors, each
    sent = {ref.key for ref in _sent(journal)}
    assert {key for key in journal.store.list("sites") if key.endswith(".safetensors")} == sent


def _sent(journal: Journal) -> list[Any]:
    found = [UpdateManifest.from_bytes(journal.store.get(key)) for key in keys(journal.store, r"^sites/.*\.json$")]
    return [ref for update in found for ref in update.groups.values()]


def test_a_plan_names_the_state_that_goes_with_the_last_accepted_update(tmp_path: Path) -> None:
    journal = run(recipe(**LEANING), str(tmp_path / "store"))
    for number in range(1, 4):
        before, plan = journal.manifest(number - 1, "train"), journal.plan(number, "train")
        assert before is not None and plan is not None
        assert {s: t.state_base for s, t in plan.tasks.items()} == {s: c.update for s, c in before.contributors.items()}


@pytest.mark.parametrize("loss", ["deleted", "damaged record", "damaged tensors"])
def test_a_site_that_lost_its_memory_is_excluded_and_the_state_is_named(tmp_path: Path, loss: str) -> None:
    journal = run(recipe(**LEANING | {"rounds": 1}), str(tmp_path / "store"))
    folder = ObjectStore(f"{journal.store.url}-states/site-2")
    accepted = head(journal).sites["site-2"].accepted
    assert accepted is not None
    (record,) = keys(folder, r"state/.*json$")
    (tensors,) = keys(folder, "safetensors$")
    if loss == "deleted":
        folder.delete(record)
    else:
        path = path_of(folder, record if loss == "damaged record" else tensors)
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    journal = run(recipe(**LEANING | {"rounds": 2, "quorum": 2}), str(tmp_path / "store"))
    reason = head(journal).excluded["site-2"]
    assert "site state lost" in reason and accepted in reason and "restore it" in reason
    if loss != "deleted":
        assert (record if loss == "damaged record" else tensors) in reason


def test_an_algorithm_without_memory_keeps_nothing_at_a_site(tmp_path: Path) -> None:
    journal = run(recipe(), str(tmp_path / "store"))
    assert all(states(journal, site) == [] for site in SITES)


# -- when a run ends ---------------------------------------------------------------------------------------------------
def stopping(**early_stop: Any) -> Recipe:
    return recipe(early_stop=early_stop, key_metric={"name": "m", "mode": early_stop.pop("mode", "max")})


@pytest.mark.parametrize(
    ("values", "stop", "expected"),
    [
        ([0.5, 0.6, 0.6], {"patience": 2}, False),
        ([0.5, 0.6, 0.6, 0.6], {"patience": 2}, True),
        ([0.5, 0.6, None, None], {"patience": 2}, True),
        ([None, None], {"patience": 2}, True),
        ([0.5, 0.54, 0.58], {"patience": 2, "min_delta": 0.05}, False),
        ([0.5, 0.54, 0.54], {"patience": 2, "min_delta": 0.05}, True),
        ([0.5, 0.4, 0.3], {"patience": 1, "mode": "min"}, False),
        ([0.3, 0.4], {"patience": 1, "mode": "min"}, True),
        ([0.5, 0.91], {"target": 0.9}, True),
        ([0.91, 0.5], {"target": 0.9}, True),
        ([0.5, 0.1], {"target": 0.2, "mode": "min"}, True),
        ([0.5, 0.3], {"target": 0.2, "mode": "min"}, False),
        ([], {"patience": 1, "target": 0.1}, False),
    ],
    ids=str,
)
def test_a_run_stops_after_rounds_without_improvement_or_at_its_target(
    values: list[float | None], stop: dict[str, Any], expected: bool
) -> None:
    assert stops_early(values, stopping(**stop)) is expected


@pytest.mark.parametrize(
    ("values", "mode", "best"), [([0.1, 0.3, 0.3], "max", 1), ([0.1, None, 0.05], "min", 2), ([None], "max", None)]
)
def test_the_best_round_is_the_earliest_of_the_best(values: list[float | None], mode: str, best: int | None) -> None:
    assert best_round(values, stopping(mode=mode)) == best


def test_an_early_stop_is_the_same_after_a_resume(tmp_path: Path) -> None:
    """Accuracy reaches its target before the last round; asked again, the run is over, and nothing is trained."""
    fields: dict[str, Any] = {"rounds": 30, "evaluation": "tests.builders:HeldOut", "early_stop": {"target": 0.6}}
    journal = run(recipe(**fields), str(tmp_path / "store"))
    done = len(journal.committed())
    assert 0 < done < 30 and is_finished(journal, journal.recipe())
    before = journal.store.list()
    assert run(recipe(**fields), str(tmp_path / "store")).store.list() == before
    assert journal.evaluation(done - 1).metrics["accuracy"] >= 0.6  # type: ignore[union-attr,operator]


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (None, "finished", ""),
        (RoundAborted("a person"), "aborted", "a person"),
        (QuorumLost("two of three", run="run"), "failed", "run run: two of three"),
        (ZeroDivisionError("oops"), "failed", "unexpected ZeroDivisionError: oops"),
    ],
)
def test_how_a_start_ended_is_in_the_journal(error: Exception | None, status: str, message: str) -> None:
    journal = started("memory://outcomes-" + status + message[:3].strip().replace(" ", "-"))
    for number in (1, 2):
        try:
            with recording_outcome(journal):
                if error is not None:
                    raise error
        except Exception as raised:
            assert raised is error
        last = journal.outcomes()[-1]
        assert (last.number, last.status, last.message) == (number, status, message)


def test_what_ended_a_start_is_raised_also_where_the_store_takes_no_record_of_it(tmp_path: Path) -> None:
    journal = started(str(tmp_path))
    (tmp_path / "server" / "run" / "outcomes").write_bytes(b"")
    with pytest.raises(QuorumLost, match="two of three"), recording_outcome(journal):
        raise QuorumLost("two of three", run="run")


class Once(builders.Bounded):
    """The bound is everybody's to say; what comes of the training, any one site's."""

    kind: Literal["once"] = "once"  # type: ignore[assignment]

    def enough(self, phase: str, quorum: int) -> int:
        return 1


def test_fewer_answers_are_enough_in_a_later_phase_with_the_recipes_quorum_too(tmp_path: Path) -> None:
    """In a round of three sites with a quorum of two: one answer closes its second phase, at the coordinator and in simulation."""
    fields: dict[str, Any] = {"algorithm": "tests.engine.test_rounds:Once", "quorum": 2, "rounds": 1}
    journal = started(str(tmp_path), **fields)
    plan, opening = opened(journal)
    assert (plan.phase, opening.quorum) == ("bound", 2)
    for site in plan.tasks:
        answer(journal, plan, site)
    commit_round(journal, plan, closed(journal, plan, opening))
    plan, opening = opened(journal)
    assert (plan.phase, plan.quorum, opening.quorum) == ("train", 1, 1)
    answer(journal, plan, "site-2")
    assert list(commit_round(journal, plan, closed(journal, plan, opening)).contributors) == ["site-2"]
    assert quorum_of(journal.recipe(), "bound", 3) == 2 and quorum_of(journal.recipe(), "train", 3) == 1
