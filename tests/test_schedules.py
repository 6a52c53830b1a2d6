"""Schedules: seeded, pure, and indifferent to who answered before."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from fedflow.errors import QuorumLost
from fedflow.schedules import Buffered, Cyclic, Everyone, Sampled, Swarm, Tree
from fedflow.types import SiteView, derive_seed

NAMES = [f"site-{i}" for i in range(20)]
properties = settings(max_examples=60)


def view(sites: list[str], offline: set[str] = frozenset()) -> dict[str, SiteView]:  # type: ignore[assignment]
    return {site: SiteView(online=site not in offline) for site in sites}


def test_everyone_is_everyone_who_is_online() -> None:
    plan = Everyone().plan(0, view(["b", "c", "a"], offline={"c"}), seed=1)
    assert (list(plan.tasks), plan.quorum) == (["a", "b"], 2)


@pytest.mark.parametrize("wanted", [4, 20])
def test_a_sample_is_the_first_sites_of_a_shuffle(wanted: int) -> None:
    """Whoever reads a plan can draw the cohort again: place i is swapped with i + derive_seed("cohort", seed, round, i) mod (N − i)."""
    for round in range(50):
        order = sorted(NAMES)
        for place in range(len(order)):
            drawn = place + derive_seed("cohort", 7, round, place) % (len(order) - place)
            order[place], order[drawn] = order[drawn], order[place]
        plan = Sampled(sites_per_round=wanted).plan(round, view(NAMES, set(order[:3])), seed=7)
        assert list(plan.tasks) == sorted(order[3 : 3 + wanted]) and plan.quorum == min(wanted, 17)


@properties
@given(st.integers(0, 2**53 - 1), st.integers(0, 1000), st.integers(1, 25), st.sets(st.sampled_from(NAMES)))
def test_a_sample_passes_over_sites_that_are_offline(seed: int, round: int, wanted: int, offline: set[str]) -> None:
    schedule = Sampled(sites_per_round=wanted)
    everyone = [s for s in schedule.plan(round, view(NAMES), seed).tasks if s not in offline]
    found = schedule.plan(round, view(NAMES, offline), seed)
    assert set(everyone) <= found.tasks.keys() <= set(NAMES) - offline
    assert len(found.tasks) == found.quorum == min(wanted, len(NAMES) - len(offline))


@properties
@given(st.permutations(NAMES), st.integers(0, 100))
def test_the_order_in_which_sites_are_known_is_nothing(names: list[str], round: int) -> None:
    schedule = Sampled(fraction=0.3)
    assert schedule.plan(round, view(names), 3) == schedule.plan(round, view(NAMES), 3)


def test_every_site_gets_its_share_of_the_rounds() -> None:
    """400 draws of 5 of 20: each site's count is binomial with mean 100 and standard deviation 8.7; five of these allowed."""
    counts = Counter(site for round in range(400) for site in Sampled(fraction=0.25).plan(round, view(NAMES), 11).tasks)
    assert all(abs(counts[site] - 100) < 44 for site in NAMES)


@pytest.mark.parametrize(
    ("fraction", "federation", "expected"), [(0.1, 20, 2), (0.1, 4, 1), (0.001, 20, 1), (0.5, 5, 3), (1.0, 7, 7)]
)
def test_a_fraction_is_of_all_sites_and_at_least_one(fraction: float, federation: int, expected: int) -> None:
    """The paper's max(C·N, 1); halves up."""
    plan = Sampled(fraction=fraction).plan(0, view(NAMES[:federation]), 0)
    assert (len(plan.tasks), plan.quorum) == (expected, expected)


@pytest.mark.parametrize(("factor", "asked"), [(1.0, 10), (1.3, 13), (1.05, 11), (3.0, 20)])
def test_more_sites_are_asked_than_close_the_round(factor: float, asked: int) -> None:
    plan = Sampled(sites_per_round=10, over_selection=factor).plan(0, view(NAMES), 0)
    assert (len(plan.tasks), plan.quorum) == (asked, 10)
    assert Sampled(sites_per_round=10).plan(0, view(NAMES), 0).tasks.keys() <= plan.tasks.keys()


@pytest.mark.parametrize(
    "bad",
    [
        {},
        {"sites_per_round": 3, "fraction": 0.5},
        {"sites_per_round": 0},
        {"fraction": 0.0},
        {"fraction": 1.5},
        {"fraction": 0.5, "over_selection": 0.9},
        {"fraction": 0.5, "over_selection": float("inf")},
        {"fraction": 0.5, "seed": 1},
    ],
    ids=str,
)
def test_a_sample_that_says_nothing_or_too_much_is_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        Sampled(**bad)


# -- cyclic ------------------------------------------------------------------------------------------------------------
def visited(
    schedule: Cyclic, rounds: int, offline: Callable[[int], set[str]] = lambda round: set()
) -> list[str | None]:
    """Who is asked, round by round, when everyone who is asked answers."""
    last: dict[str, int] = {}
    found: list[str | None] = []
    for round in range(rounds):
        seen = {site: SiteView(online=site not in offline(round), last_round=last.get(site)) for site in NAMES[:4]}
        plan = schedule.plan(round, seen, seed=3)
        found.append(next(iter(plan.tasks), None))
        assert len(plan.tasks) <= 1 and plan.quorum == 1
        last |= dict.fromkeys(plan.tasks, round)
    return found


def test_a_fixed_cycle_visits_the_sites_in_order_and_begins_again() -> None:
    assert visited(Cyclic(), 9) == [*NAMES[:4], *NAMES[:4], NAMES[0]]
    assert visited(Cyclic(sites=["site-2", "site-0"]), 5) == ["site-2", "site-0", "site-2", "site-0", "site-2"]


def test_a_fixed_cycle_passes_over_sites_that_are_offline() -> None:
    """site-1 is away in round 1: site-2 has its turn, and site-1 waits for the next lap."""
    found = visited(Cyclic(), 8, lambda round: {"site-1"} if round == 1 else set())
    assert found == ["site-0", "site-2", "site-3", "site-0", "site-1", "site-2", "site-3", "site-0"]
    assert visited(Cyclic(), 2, lambda round: set(NAMES)) == [None, None]


def test_a_random_cycle_visits_all_and_may_visit_one_twice_in_a_row() -> None:
    found = visited(Cyclic(order="random"), 400)
    assert set(found) == set(NAMES[:4]) and any(a == b for a, b in itertools.pairwise(found))


@properties
@given(st.integers(0, 30), st.integers(0, 3))
def test_a_random_cycle_without_repeats_visits_everyone_once_a_lap(laps: int, away: int) -> None:
    found = visited(Cyclic(order="random_without_repeat"), 4 * laps)
    assert all(set(found[4 * lap : 4 * lap + 4]) == set(NAMES[:4]) for lap in range(laps))
    found = visited(Cyclic(order="random_without_repeat"), 4 * laps, lambda round: {NAMES[away]})
    others = {*NAMES[:4]} - {NAMES[away]}
    assert all(set(found[4 * lap : 4 * lap + 3]) == others == set(found[4 * lap : 4 * lap + 4]) for lap in range(laps))


def test_laps_have_orders_of_their_own() -> None:
    found = visited(Cyclic(order="random_without_repeat"), 40)
    assert len({tuple(found[i : i + 4]) for i in range(0, 40, 4)}) > 3


def test_a_cycle_with_a_site_twice_is_refused() -> None:
    with pytest.raises(ValidationError, match="expected each once"):
        Cyclic(sites=["a", "b", "a"])


# -- buffered ----------------------------------------------------------------------------------------------------------
def at_work(round: int, **bases: int | None) -> dict[str, SiteView]:
    return {site.replace("_", "-"): SiteView(in_flight=base) for site, base in bases.items()}


def test_a_buffer_asks_who_is_idle_and_counts_on_who_is_at_work() -> None:
    plan = Buffered(size=2, max_staleness=3).plan(5, at_work(5, a=None, b=4, c=None), seed=1)
    assert (list(plan.tasks), plan.quorum, plan.accept_bases, plan.late) == (["a", "b", "c"], 2, 3, "carry")
    assert Buffered(size=10).plan(0, view(["a", "b"]), seed=1).quorum == 2


def test_no_more_than_so_many_are_at_work() -> None:
    sites = {f"s{i}": None for i in range(8)} | {"x": 3, "y": 4}
    seen = [set(Buffered(size=2, concurrency=5).plan(r, at_work(r, **sites), seed=1).tasks) for r in (4, 5)]
    assert all(len(cohort) == 5 and {"x", "y"} <= cohort for cohort in seen) and seen[0] != seen[1]


def test_a_site_that_is_at_work_for_too_long_is_asked_anew() -> None:
    plan = Buffered(size=1, max_staleness=2, concurrency=1).plan(5, at_work(5, a=2), seed=1)
    assert list(plan.tasks) == ["a"]


def test_pythons_hash_seed_changes_no_cohort_and_no_seed() -> None:
    code = (
        "from fedflow.schedules import Sampled; from fedflow.types import SiteView, derive_seed;"
        "view = {f'site-{i}': SiteView() for i in range(20)};"
        "print(derive_seed(1, 'a', None), [sorted(Sampled(fraction=.3).plan(r, view, 5).tasks) for r in range(9)])"
    )
    paths = os.pathsep.join(path for path in sys.path if path)
    children = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": paths},
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in ("1", "2")
    ]
    answers = [child.communicate()[0] for child in children]
    here = [sorted(Sampled(fraction=0.3).plan(r, view(NAMES), 5).tasks) for r in range(9)]
    assert answers == [f"{derive_seed(1, 'a', None)} {here}\n"] * 2


# -- where it is aggregated --------------------------------------------------------------------------------------------
def test_the_aggregating_role_goes_round_and_passes_over_who_is_offline() -> None:
    swarm = Swarm(cohort={"kind": "sampled", "sites_per_round": 1})
    orders = [list(swarm.plan(round, view(["a", "b", "c"], offline={"b"}), seed=1).aggregators) for round in range(4)]
    assert orders == [["a", "c"], ["c", "a"], ["c", "a"], ["a", "c"]]
    assert len(swarm.plan(0, view(NAMES), seed=1).tasks) == 1
    assert swarm.closing == ("schedule.cohort.sites_per_round", 1)
    assert list(Swarm(aggregators=["b", "a"]).plan(1, view(["a", "b", "c"]), seed=1).aggregators) == ["b", "a"]
    with pytest.raises(QuorumLost, match=r"found none of \['b'\]"):
        Swarm(aggregators=["b"]).plan(0, view(["a", "b"], offline={"b"}), seed=1)


def test_a_tree_has_the_cohort_of_its_schedule_by_region() -> None:
    tree = Tree(regions={"south": ["c"], "north": ["b", "a"]}, cohort={"kind": "everyone", "sites": ["a", "b", "d"]})
    plan = tree.plan(0, view(["a", "b", "c", "d"]), seed=1)
    assert list(plan.tasks) == ["a", "b", "d"] and plan.regions == {"north": ["a", "b"]}
    assert tree.absences({"north": "gone", "d": "ill"}) == {
        "b": "region north: gone",
        "a": "region north: gone",
        "d": "ill",
    }


def test_dynamic_steps_follow_the_speed_of_the_last_contribution() -> None:
    """2, 1 and 1/8 steps a second, H = 10: 10, 5 and, of 0.625, the least: 1; who has not contributed is asked for H."""
    seen = {
        "a": SiteView(steps=20, seconds=10.0),
        "b": SiteView(steps=5, seconds=5.0),
        "c": SiteView(steps=1, seconds=8.0),
    }
    plan = Buffered(size=1, dynamic_steps=10).plan(3, seen | {"d": SiteView()}, seed=1)
    assert {site: task.steps for site, task in plan.tasks.items()} == {"a": 10, "b": 5, "c": 1, "d": 10}
