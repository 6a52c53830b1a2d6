"""Simulated time: rounds close when the rules of a deployment say so, of a trace's instants; the same again from its seed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from fedflow.engine import close_round, commit_round, next_step, open_round, site_step, start_run, survey
from fedflow.engine import simulate as reference
from fedflow.engine.site import SiteWork
from fedflow.errors import QuorumLost, RoundError, RunExists, UserError
from fedflow.recipe import SiteConfig
from fedflow.schedules import Everyone
from fedflow.simulation.clock import EPOCH
from fedflow.simulation.engine import simulate
from fedflow.simulation.tables import Row, Table
from fedflow.simulation.traces import Generated, LogNormal, Pareto, Trace, UpDown
from fedflow.store.journal import Journal
from fedflow.store.objects import ObjectStore
from fedflow.store.records import Manifest
from fedflow.testing.faults import Fault, fail_at
from fedflow.types import FederationView, RoundPlan
from tests.builders import SITES, bits, head, recipe

GRACE = {"round_deadline": 60, "quorum_grace": 3}
"""Seconds. A site's attempt may take 18 of them: a third of the deadline, less the pause."""
ONCE = {**GRACE, "train_timeout": 59}


def table(*seconds: float, **more: Any) -> Table:
    """Sites 1, 2, 3 … that train for so many seconds."""
    return Table(rows=tuple(Row(site=f"site-{i}", seconds=s, **more) for i, s in enumerate(seconds, start=1)))


def held(trace: Trace, sites: Sequence[str] = SITES, **fields: Any) -> list[Manifest]:
    """The rounds of a simulation in simulated time."""
    options = {"backend": "debug", "trace": trace}
    journal = simulate(recipe(**{"timeouts": GRACE, **fields}), sites, **options)  # type: ignore[arg-type]
    return manifests(journal)


def manifests(journal: Journal) -> list[Manifest]:
    found = [journal.manifest(*step) for step in journal.committed()]
    return [manifest for manifest in found if manifest is not None]


def times(manifests: Sequence[Manifest]) -> list[tuple[float, float]]:
    """(opening, closing) of every round, in seconds."""
    return [((m.opened - EPOCH).total_seconds(), (m.committed - EPOCH).total_seconds()) for m in manifests if m.opened]


# -- when rounds close -------------------------------------------------------------------------------------------------
def test_everyone_is_waited_for_without_a_quorum() -> None:
    rounds = held(table(1, 2, 10))
    assert times(rounds) == [(0, 10), (10, 20)]
    assert {s: c.seconds for s, c in rounds[0].contributors.items()} == {"site-1": 1, "site-2": 2, "site-3": 10}


def test_a_round_closes_a_grace_after_its_quorum() -> None:
    """Two of three have answered after 2 s; 3 s later it closes, before the third answers."""
    rounds = held(table(1, 2, 10), quorum=2)
    assert times(rounds) == [(0, 5), (5, 10)]
    assert rounds[0].excluded == {"site-3": "no update by the closing"}


def test_whoever_answers_within_the_grace_counts() -> None:
    rounds = held(table(1, 2, 4.9), quorum=2)
    assert times(rounds)[0] == (0, 4.9) and len(rounds[0].contributors) == 3


def test_a_required_site_is_waited_for() -> None:
    rounds = held(table(1, 2, 10), quorum=2, required_sites=["site-3"])
    assert times(rounds)[0] == (0, 10) and len(rounds[0].contributors) == 3


def test_below_the_quorum_at_the_deadline_the_run_stops(tmp_path: Path) -> None:
    """The third site goes offline on the way and is not heard of; a quorum of 2 would do, and the run goes on with it."""
    trace = Table(rows=(*table(1, 2).rows, Row(site="site-3", seconds=10, end=5)))
    options: dict[str, Any] = {"backend": "debug", "store": str(tmp_path), "run": "run"}
    with pytest.raises(
        QuorumLost, match="round 0: found 2 valid updates, expected 3; missing: site-3: no update by the d"
    ):
        simulate(recipe(timeouts=GRACE), SITES, trace=trace, **options)
    journal = simulate(recipe(timeouts=GRACE, quorum=2), SITES, **options)
    assert times(manifests(journal)) == [(0, 5), (5, 7)]  # in round 1 site 3 is not asked
    assert head(journal).excluded == {"site-3": "offline in the trace"}


def test_the_deadline_closes_a_round_that_has_its_quorum_and_a_long_grace() -> None:
    rounds = held(table(1, 2, 50), quorum=2, timeouts={**ONCE, "round_deadline": 40, "quorum_grace": 39, "train_timeout": 30}, attempts=1)  # fmt: skip
    assert times(rounds)[0] == (0, 30)  # site 3 is killed then, and given up: nobody is left to wait for
    assert rounds[0].excluded == {"site-3": "killed after 0:00:30 (train_timeout) (attempt 1 of 1)"}


def test_transfers_take_their_bytes_over_the_bandwidth() -> None:
    """seconds = latency + bytes·8/10⁶ / Mbit/s, for each way, besides the steps."""
    trace = Table(rows=(Row(site="*", seconds_per_step=0.5, download_mbit=0.001, upload_mbit=0.002, latency=0.25),))
    (first, _) = held(trace, training={"steps": 4, "batch_size": 8, "optimizer": {"lr": 0.1}})
    for c in first.contributors.values():
        assert c.steps == 4
        expected = 2 + 0.5 + c.received * 8e-6 / 0.001 + c.bytes * 8e-6 / 0.002
        assert c.seconds == pytest.approx(expected) and c.bytes > 0 and c.received > 0


def test_steps_are_the_algorithms_where_it_says_how_many() -> None:
    trace = Table(rows=(Row(site="*", seconds_per_step=2),))
    (first, _) = held(trace, algorithm={"kind": "diloco", "local_steps_per_round": 3})
    assert times([first]) == [(0, 6)]
    compressed = held(
        trace,
        algorithm={"kind": "diloco", "local_steps_per_round": 3},
        transforms=[{"kind": "quantise", "bits": 8, "groups": ["params"]}],
    )
    assert times(compressed)[0] == (0, 6)


def test_a_recipe_by_epochs_needs_seconds_of_whole_trainings() -> None:
    with pytest.raises(UserError, match=r"trace.seconds_per_step: found a recipe that trains by epochs"):
        held(Table(rows=(Row(site="*", seconds_per_step=2),)))


# -- failing -----------------------------------------------------------------------------------------------------------
def test_a_site_that_always_drops_out_is_asked_again_and_given_up() -> None:
    """Three attempts of at most 4 s, each after a pause of at most 2 s; the others are there after 2."""
    trace = Table(rows=(*table(1, 2).rows, Row(site="site-3", seconds=4, drop=1)))
    rounds = held(trace, quorum=2, timeouts={**GRACE, "quorum_grace": 30})
    assert rounds[0].excluded == {"site-3": "dropped out (attempt 3 of 3)"}
    assert 2 < times(rounds)[0][1] < 3 * 4 + 2 * 2
    assert times(rounds)[0][1] != times(rounds)[1][1] - times(rounds)[1][0]  # every attempt draws anew


def test_so_many_attempts_fail_as_the_trace_says() -> None:
    """With one attempt, the share of exclusions is the probability, within five standard deviations."""
    sites = [f"site-{i}" for i in range(1, 21)]
    trace = Generated(seconds=1, drop=0.3)
    rounds = held(trace, sites, quorum=1, attempts=1, rounds=10, training={"steps": 1, "batch_size": 4})
    excluded = sum(len(m.excluded) for m in rounds)
    assert abs(excluded - 60) < 5 * (200 * 0.3 * 0.7) ** 0.5


def test_an_offline_site_is_not_asked_and_its_failures_are_counted() -> None:
    trace = Table(rows=(*table(1, 2).rows, Row(site="site-3", seconds=1, start=3)))
    rounds = held(trace, rounds=3)
    assert [sorted(m.contributors) for m in rounds] == [list(SITES[:2]), list(SITES[:2]), list(SITES)]
    assert rounds[0].excluded == {"site-3": "offline in the trace"}


def test_a_round_waits_for_sites_as_long_as_the_recipe_says() -> None:
    """Everybody comes after 100 s, which is less than wait_for_sites, or more."""
    late = Table(rows=(Row(site="*", start=100, seconds=1),))
    assert times(held(late, rounds=1)) == [(100, 101)]
    with pytest.raises(QuorumLost, match=r"found a quorum of 0, expected at least the 1 updates.*offline in the trace"):
        held(late, wait_for_sites=99)


def test_the_runs_time_is_up() -> None:
    with pytest.raises(RoundError, match="run_timeout passed before round 7; give the run longer and resume"):
        held(table(10, 10, 10), rounds=9, timeouts={**GRACE, "run_timeout": 70})


# -- who counts, and to which bits -------------------------------------------------------------------------------------
def test_the_bits_are_those_of_a_run_of_the_sites_that_count() -> None:
    """FedAvg of sites 1 and 2, whose training does not depend on who else is there."""
    fields: dict[str, Any] = {"timeouts": GRACE, "quorum": 2, "evaluation": "tests.builders:HeldOut"}
    found = simulate(recipe(**fields), SITES, backend="debug", trace=table(1, 2, 10))
    assert bits(found) == bits(reference(recipe(**fields), SITES[:2]))


def test_with_a_trace_in_which_all_answer_nothing_changes() -> None:
    assert bits(simulate(recipe(), SITES, backend="debug", trace=table(1, 2, 3))) == bits(reference(recipe(), SITES))


def deployed(rounds: Sequence[Sequence[tuple[str, int]]], folder: Path, **fields: Any) -> Journal:
    """What the coordinator's own functions make of updates that come in this order. rounds: of each, (site, base round)."""
    store = ObjectStore(str(folder / "store"))
    journal = start_run(store, "run", recipe(rounds=len(rounds), timeouts=GRACE, **fields), SITES)
    for arriving in rounds:
        step = next_step(journal, journal.recipe())
        assert step
        plan, opening = open_round(journal, step)
        for site, base in arriving:
            config = SiteConfig(name=site, store=store.url, state=str(folder / site), allowed_imports=["*"])
            site_step(SiteWork("run", base, step.phase), config, unhurried=True)
        commit_round(journal, plan, close_round(journal, plan, opening, survey(journal, plan), why="as told"))
    return journal


LATE: dict[str, dict[str, Any]] = {
    "fedavg": {},
    "differences": {"algorithm": {"kind": "fedavg", "transfer": "delta"}},
    "a site's own state": {"algorithm": "tests.builders:Leaning"},
    "scaffold": {"algorithm": "scaffold"},
    "diloco": {"algorithm": {"kind": "diloco", "local_steps_per_round": 3}},
    "geometric median": {"algorithm": {"kind": "fedavg", "reduction": {"kind": "geometric_median"}}},
}


@pytest.mark.parametrize("fields", LATE.values(), ids=LATE)
def test_a_late_update_is_carried_into_the_next_round(fields: dict[str, Any], tmp_path: Path) -> None:
    """Site 3 takes 9 s, rounds close 3 s after the quorum at 2 s: its update of round 0 counts in round 1, that of 2 in 3."""
    terms: dict[str, Any] = {**fields, "quorum": 2, "late": "carry", "rounds": 4}
    found = simulate(recipe(timeouts=GRACE, **terms), SITES, backend="debug", trace=table(1, 2, 9))
    bases = [{site: c.base_round for site, c in m.contributors.items()} for m in manifests(found)]
    assert bases == [
        {"site-1": 0, "site-2": 0},
        {"site-1": 1, "site-2": 1, "site-3": 0},
        {"site-1": 2, "site-2": 2},
        {"site-1": 3, "site-2": 3, "site-3": 2},
    ]
    assert times(manifests(found)) == [(0, 5), (5, 9), (9, 14), (14, 18)]
    del terms["rounds"]
    order = [sorted(round.items()) for round in bases]
    assert bits(found) == bits(deployed(order, tmp_path, **terms))


def test_a_late_update_that_no_round_accepts_any_more_is_begun_anew() -> None:
    """Site 3 takes 17 s, rounds 5: its update of round 0 would come in round 3, which accepts those of 2 and 3 only."""
    rounds = held(table(1, 2, 17), quorum=2, late="carry", rounds=8)
    assert all("site-3" not in m.contributors for m in rounds)


# -- asynchronous schedules --------------------------------------------------------------------------------------------
class Buffer(Everyone):
    """Whoever is not at work is asked; every two updates are a round, however old (as FedBuff, arXiv:2106.06639)."""

    def plan(self, round: int, view: FederationView, seed: int) -> RoundPlan:
        return RoundPlan(super().plan(round, view, seed).tasks, quorum=2, accept_bases=100, late="carry")


def test_the_clock_drives_an_asynchronous_schedule() -> None:
    """Without grace, sites that take 1, 1.5 and 4 s, and begin anew with the round after the one that they count in.

    Round 0 is over when 1 and 2 have answered (1.5), round 1 (3), and round 2 with site 1 at 4 and site 3 at 4.
    """
    fields = {"schedule": "tests.simulation.test_clock:Buffer", "timeouts": {"round_deadline": 60, "quorum_grace": 0}}
    rounds = held(table(1, 1.5, 4), rounds=4, **fields)
    assert times(rounds) == [(0, 1.5), (1.5, 3), (3, 4), (4, 5)]
    bases = [{site: c.base_round for site, c in m.contributors.items()} for m in rounds]
    assert bases == [
        {"site-1": 0, "site-2": 0},
        {"site-1": 1, "site-2": 1},
        {"site-1": 2, "site-3": 0},
        {"site-1": 3, "site-2": 2},
    ]


class Watching(Everyone):
    """Asks who is not at work, and every time writes down what it sees."""

    seen: str

    def plan(self, round: int, view: FederationView, seed: int) -> RoundPlan:
        with Path(self.seen).open("a") as file:
            print(round, *(f"{s}:{v.in_flight}:{v.seconds}" for s, v in sorted(view.items())), file=file)
        return super().plan(round, view, seed)


def test_a_schedule_sees_who_is_at_work_and_how_long_it_took(tmp_path: Path) -> None:
    schedule = {"kind": "tests.simulation.test_clock:Watching", "seen": str(tmp_path / "seen")}
    held(table(1, 2, 9), quorum=2, late="carry", schedule=schedule)
    assert (tmp_path / "seen").read_text().splitlines() == [
        "0 site-1:None:None site-2:None:None site-3:None:None",
        "1 site-1:None:1.0 site-2:None:2.0 site-3:0:None",
    ]


# -- the same again ----------------------------------------------------------------------------------------------------
SEVEN = [f"site-{i}" for i in range(1, 8)]
WILD = Generated(
    seconds=Pareto(least=2, alpha=1.2),
    upload_mbit=LogNormal(median=0.01, sigma=1),
    drop=0.2,
    availability=UpDown.model_validate({"up": "60s", "down": "20s"}),
)
TERMS: Mapping[str, Any] = {
    "quorum": 3,
    "late": "carry",
    "rounds": 6,
    "timeouts": {**GRACE, "quorum_grace": 1},
    "algorithm": "tests.builders:Leaning",
    "evaluation": "tests.builders:HeldOut",
    "training": {"steps": 2, "batch_size": 4, "optimizer": {"lr": 0.1}},
}


def record(journal: Journal) -> list[Any]:
    """All that the manifests say, but what names the run or is measured."""
    left_out = {"run", "nonce", "parent", "broadcast", "model", "state"}
    found = [m.model_dump(mode="json", exclude=left_out) for m in manifests(journal)]
    return [found, bits(journal), [e.metrics if (e := journal.evaluation(r)) else None for r in range(len(found))]]


@pytest.fixture(scope="module")
def undisturbed() -> Journal:
    """It has exclusions of several kinds, and late updates."""
    journal = simulate(recipe(**TERMS), SEVEN, trace=WILD, backend="debug")
    reasons = {why for m in manifests(journal) for why in m.excluded.values()}
    assert {"offline in the trace", "no update by the closing"} <= reasons
    assert any(c.base_round < m.round for m in manifests(journal) for c in m.contributors.values())
    return journal


@pytest.mark.parametrize("workers", [1, 2])
def test_it_is_the_same_again_with_any_number_of_processes(workers: int, undisturbed: Journal) -> None:
    assert record(simulate(recipe(**TERMS), SEVEN, trace=WILD, workers=workers)) == record(undisturbed)


def test_another_seed_is_another_course(undisturbed: Journal) -> None:
    other = WILD.model_copy(update={"seed": 4})
    assert record(simulate(recipe(**TERMS), SEVEN, trace=other, backend="debug"))[0] != record(undisturbed)[0]


SCRIPT = """
import sys
from pathlib import Path
from fedflow.simulation.engine import simulate
from tests.builders import recipe
from tests.simulation.test_clock import SEVEN, TERMS, WILD

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    options = {"store": str(folder / "store"), "run": "run", "book": folder / "book.sqlite", "backend": "debug"}
    simulate(recipe(**TERMS), SEVEN, trace=WILD, **options)
"""


def simulated(folder: Path, fault: Fault | None = None) -> int:
    """The exit code of a simulation in a process of its own."""
    (folder / "simulated.py").write_text(SCRIPT)
    python_path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": python_path}
    if fault:
        environment |= fault.environment(environment)
    return subprocess.run(
        [sys.executable, folder / "simulated.py", str(folder)], env=environment, check=False
    ).returncode


@pytest.mark.parametrize("round", [1, 3, 4])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_killed_simulation_goes_on_in_the_same_time(
    round: int, when: Any, undisturbed: Journal, tmp_path: Path
) -> None:
    assert simulated(tmp_path, fail_at("manifest", round=round, when=when)) == -signal.SIGKILL
    assert simulated(tmp_path) == 0
    assert record(Journal(ObjectStore(str(tmp_path / "store")), "run")) == record(undisturbed)


# -- the run's trace ---------------------------------------------------------------------------------------------------
def test_a_run_keeps_to_its_trace(tmp_path: Path) -> None:
    options: dict[str, Any] = {"backend": "debug", "store": str(tmp_path), "run": "run"}
    simulate(recipe(rounds=1), SITES, trace=table(1, 2, 3), **options)
    with pytest.raises(
        RunExists, match="trace: found run 'run' with another trace, expected this one; leave it out, or"
    ):
        simulate(recipe(rounds=2), SITES, trace=table(1, 2, 4), **options)
    assert times(manifests(simulate(recipe(rounds=2), SITES, **options))) == [(0, 3), (3, 6)]


def test_a_run_that_began_without_a_trace_gets_none(tmp_path: Path) -> None:
    options: dict[str, Any] = {"backend": "debug", "store": str(tmp_path), "run": "run"}
    simulate(recipe(rounds=1), SITES, **options)
    with pytest.raises(RunExists, match="trace: found run 'run' without a trace, expected this one"):
        simulate(recipe(rounds=2), SITES, trace=table(1, 2, 3), **options)


def test_two_phases_are_held_one_after_the_other() -> None:
    rounds = held(table(1, 2, 3), algorithm="tests.builders:Bounded", rounds=1)
    assert sorted(times(rounds)) == [(0, 3), (3, 6)]


def test_simulated_time_is_recorded_to_the_microsecond() -> None:
    (only,) = held(Table(rows=(Row(site="*", seconds=1 / 3),)), rounds=1)
    assert only.committed - EPOCH == timedelta(microseconds=333_334)
