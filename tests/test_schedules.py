"""Schedules: seeded, pure, and indifferent to who answered before."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from fedflow.schedules import Everyone, Sampled
from fedflow.types import SiteView, derive_seed

NAMES = [f"site-{i}" for i in range(20)]
properties = settings(max_examples=60)


def view(sites: list[str], offline: set[str] = frozenset()) -> dict[str, SiteView]:  # type: ignore[assignment]
    return {site: SiteView(online=site not in offline) for site in sites}


def test_everyone_is_everyone_who_is_online() -> None:
    plan = Everyone().plan(0, view(["b", "c", "a"], offline={"c"}), seed=1)
    assert (list(plan.tasks), plan.quorum) == (["a", "b"], 2)


def test_a_sample_is_the_first_sites_in_the_order_of_their_derived_seeds() -> None:
    """Whoever reads a plan can draw the cohort again: sites sorted by derive_seed("cohort", seed, round, site)."""
    for round in range(5):
        order = sorted(NAMES, key=lambda site: derive_seed("cohort", 7, round, site))
        plan = Sampled(sites_per_round=4).plan(round, view(NAMES), seed=7)
        assert list(plan.tasks) == sorted(order[:4]) and plan.quorum == 4


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
