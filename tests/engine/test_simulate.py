"""The reference run: the same bytes in any order and with any number of workers."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
from torch import Tensor, nn

from fedflow.algorithm import Algorithm, Training
from fedflow.engine import next_step, open_round, read_model, simulate, site_step, start_run
from fedflow.engine.site import SiteWork
from fedflow.engine.summary import current, summarize
from fedflow.errors import QuorumLost, ResolveError
from fedflow.recipe import SiteConfig
from fedflow.store.journal import Journal
from fedflow.store.objects import ObjectStore
from fedflow.store.records import Manifest
from fedflow.tensors import model_digest
from fedflow.types import Aggregate, Groups, RoundContext, Spec, Tensors, Update, spec_of
from tests.builders import SITES, Blobs, Tiny, head, outcome, recipe, run, trainings

UNEVEN: Mapping[str, Any] = {
    "rounds": 3,
    "schedule": {"kind": "sampled", "sites_per_round": 2},
    "evaluation": "tests.builders:HeldOut",
    "overrides": {"site-1": {"training": {"epochs": 2}}},
}
"""Sampling, uneven sites, BatchNorm, dropout, momentum."""


# -- bits --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("algorithm", ["fedavg", "tests.builders:Leaning", "tests.builders:Bounded"])
def test_neither_order_nor_store_change_a_bit(tmp_path: Path, algorithm: str) -> None:
    fields = {**UNEVEN, "algorithm": algorithm}
    one = outcome(run(recipe(**fields)))
    two = outcome(run(recipe(**fields), str(tmp_path / "store")))
    backwards = outcome(run(recipe(**fields), order=lambda round, sites: sites[::-1]))
    for other in (two, backwards):
        assert {k: v for k, v in other.items() if k not in ("updates", "accepted")} == {
            k: v for k, v in one.items() if k not in ("updates", "accepted")
        }


def test_workloads_given_as_objects_are_those_of_the_recipe() -> None:
    given = simulate(recipe(), {site: Blobs(site) for site in SITES}, model=Tiny)
    assert head(given).model_digest == outcome(run(recipe()))["model"]


def test_the_callers_generator_decides_nothing() -> None:
    digests = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        digests.append(head(simulate(recipe(rounds=1), {site: Blobs(site) for site in SITES}, model=Tiny)).model_digest)
    assert digests[0] == digests[1]


def test_the_seed_decides_everything() -> None:
    assert outcome(run(recipe(seed=5)))["model"] != outcome(run(recipe(seed=6)))["model"]


def test_the_digest_is_of_the_model_that_is_read_back() -> None:
    journal = run(recipe())
    groups = read_model(journal, head(journal))
    model = Tiny()
    model.load_state_dict({name: tensor for tensors in groups.values() for name, tensor in tensors.items()})
    assert model_digest(model.state_dict()) == head(journal).model_digest


def test_it_learns() -> None:
    """From chance to most of three well-separated classes."""
    journal = run(recipe(rounds=8, evaluation="tests.builders:HeldOut"))
    accuracies = [journal.evaluation(r).metrics["accuracy"] for r in range(8)]  # type: ignore[union-attr]
    assert accuracies[-1] is not None and accuracies[-1] >= 0.8


# -- going on ----------------------------------------------------------------------------------------------------------
def test_more_rounds_go_on_from_where_the_run_ended(tmp_path: Path) -> None:
    log = tmp_path / "log"
    work = {"path": "tests.builders:Blobs", "args": {"log": str(log)}}
    run(recipe(rounds=1, workload=work), str(tmp_path / "store"))
    longer = run(recipe(rounds=3, workload=work), str(tmp_path / "store"))
    assert trainings(log) == dict.fromkeys(SITES, 3)
    assert outcome(longer)["model"] == outcome(run(recipe(rounds=3)))["model"]


def test_a_finished_run_is_left_alone(tmp_path: Path) -> None:
    seen: list[int] = []
    journal = run(recipe(), str(tmp_path), on_round=lambda manifest: seen.append(manifest.round))
    before = journal.store.list()
    assert run(recipe(), str(tmp_path), on_round=lambda manifest: seen.append(manifest.round)).store.list() == before
    assert seen == [0, 1]


# -- sites that fail ---------------------------------------------------------------------------------------------------
class Failing(Blobs):
    """Site 2 fails as long as there is a file `broken`."""

    def __init__(self, site: str, broken: str) -> None:
        super().__init__(site)
        self.broken = Path(broken)

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        if self.site == "site-2" and self.broken.exists():
            raise RuntimeError("the disk is on fire")
        return super().loss(model, batch)


def failing(tmp_path: Path, **fields: Any) -> dict[str, Any]:
    return {
        "workload": {"path": "tests.engine.test_simulate:Failing", "args": {"broken": str(tmp_path / "broken")}},
        **fields,
    }


def test_a_site_that_fails_is_excluded_with_its_traceback(tmp_path: Path) -> None:
    (tmp_path / "broken").touch()
    journal = run(recipe(**failing(tmp_path, quorum=2)), str(tmp_path / "store"))
    assert sorted(head(journal).contributors) == ["site-1", "site-3"]
    reason = head(journal).excluded["site-2"]
    assert (
        "training failed" in reason and "RuntimeError: the disk is on fire" in reason and "test_simulate.py" in reason
    )
    assert head(journal).sites["site-2"].failures == 2


def test_below_the_quorum_the_run_stops_and_goes_on_when_the_site_is_back(tmp_path: Path) -> None:
    fields = failing(tmp_path, quorum=3)
    run(recipe(**{**fields, "rounds": 1}), str(tmp_path / "store"))
    (tmp_path / "broken").touch()
    with pytest.raises(
        QuorumLost, match=r"round 1: found 2 valid updates, expected 3; missing: site-2: training failed"
    ):
        run(recipe(**fields), str(tmp_path / "store"))
    (tmp_path / "broken").unlink()
    journal = run(recipe(**fields), str(tmp_path / "store"))
    assert outcome(journal)["model"] == outcome(run(recipe()))["model"]
    plan = journal.plan(1, "train")
    assert plan is not None and [o.number for o in journal.openings(plan)] == [1, 2]
    assert head(journal).sites["site-2"].failures == 0


def test_sites_that_are_not_given_again_are_absent(tmp_path: Path) -> None:
    run(recipe(rounds=1), str(tmp_path))
    journal = run(recipe(rounds=2), str(tmp_path), sites=SITES[:2])
    assert sorted(head(journal).contributors) == list(SITES[:2])
    assert head(journal).excluded == {"site-3": "not among the workloads"}


def test_a_site_whose_imports_are_not_allowed_says_so(tmp_path: Path) -> None:
    """A recipe names code; whether a site runs it is the site's own decision. Nothing of it was trained."""
    journal = start_run(ObjectStore(str(tmp_path / "store")), "run", recipe(), SITES)
    step = next_step(journal, recipe())
    assert step is not None
    plan, _ = open_round(journal, step)
    config = SiteConfig(
        name="site-1", store=journal.store.url, state=str(tmp_path / "state"), allowed_imports=["hospital.*"]
    )
    with pytest.raises(ResolveError, match=r"found 'tests.builders:Blobs', expected a module among \['hospital.\*'\]"):
        site_step(SiteWork("run", 0, plan.phase), config)
    assert journal.store.list("sites") == []


# -- algorithms of all kinds -------------------------------------------------------------------------------------------
def test_phases_follow_each_other_and_each_is_committed(tmp_path: Path) -> None:
    """The bound is the mean of the sites' wishes (1 + 2 + 3)/3 hundredths; no parameter moves further in a round."""
    journal = run(recipe(algorithm="tests.builders:Bounded", evaluation="tests.builders:HeldOut"), str(tmp_path))
    assert sorted(journal.committed()) == sorted((r, p) for r in (0, 1) for p in ("bound", "train"))
    models = [read_model(journal, m) for m in _manifests(journal)]
    for before, after in itertools.pairwise(models):
        for name, x in before["params"].items():
            assert (after["params"][name] - x).abs().max() <= 0.02 + 1e-6
    assert head(journal).state.scalars == {"phases_done": 4}
    evaluated = [journal.evaluation(r) for r in (0, 1)]
    assert [e.model_digest for e in evaluated if e] == [journal.manifest(r, "train").model_digest for r in (0, 1)]  # type: ignore[union-attr]


def _manifests(journal: Journal) -> list[Manifest]:
    steps = [(-1, "initial"), (0, "bound"), (0, "train"), (1, "bound"), (1, "train")]
    return [found for step in steps if (found := journal.manifest(*step))]


@dataclass(frozen=True)
class Count:
    """How many examples there are."""

    examples: int = 0


class Census(Algorithm):
    """No tensor travels: sites say how many examples they have, as a scalar."""

    kind: Literal["census"] = "census"
    State: ClassVar[type[Any]] = Count

    def init(self, model: Groups) -> Count:
        return Count()

    def model(self, state: Count) -> Groups:
        return {}

    def expects(self, state: Count, phase: str) -> Spec:
        return {}

    def weight(self, update: Update) -> float:
        return 1.0

    def aggregate(self, updates: Any, ctx: RoundContext) -> Aggregate:
        found = list(updates)
        return Aggregate({}, sum(u.scalars["examples"] for u in found), len(found), {})

    def server_update(self, state: Count, aggregate: Aggregate, ctx: RoundContext) -> Count:
        return Count(int(aggregate.weight))

    def site_update(self, broadcast: Groups, site_state: Any, work: Any, ctx: RoundContext) -> tuple[Update, Any]:
        assert ctx.site is not None
        scalars = {"examples": float(len(work.workload))}
        return Update(ctx.site, ctx.round, examples=1, steps=0, lr_sum=0.0, tensors={}, scalars=scalars), site_state


def test_an_algorithm_needs_no_tensors() -> None:
    """12 + 20 + 28 examples."""
    journal = run(recipe(algorithm="tests.engine.test_simulate:Census", rounds=1))
    assert head(journal).state.scalars == {"examples": 60}


@dataclass(frozen=True)
class Sum:
    total: Tensors


class Clipped(Algorithm):
    """The sum of updates, each scaled to norm 1 over all its tensors: needs a figure over everything first."""

    kind: Literal["clipped"] = "clipped"
    State: ClassVar[type[Any]] = Sum

    def init(self, model: Groups) -> Sum:
        return Sum({name: torch.zeros_like(x) for name, x in model["params"].items()})

    def model(self, state: Sum) -> Groups:
        return {"params": state.total}

    def broadcast(self, state: Sum, phase: str) -> Groups:
        return {"params": state.total}

    def expects(self, state: Sum, phase: str) -> Spec:
        return spec_of({"params": state.total})

    def weight(self, update: Update) -> float:
        return 1.0

    def measure(self, updates: Any, ctx: RoundContext) -> Tensors:
        squares = {
            u.site: sum(((t.double() ** 2).sum() for t in u.tensors["params"].values()), torch.zeros(()))
            for u in updates
        }
        return {site: torch.as_tensor(value, dtype=torch.float64) for site, value in squares.items()}

    def aggregate(self, updates: Any, ctx: RoundContext) -> Aggregate:
        total: dict[str, Tensor] = {}
        for update in updates:
            for name, t in update.tensors["params"].items():
                unit = t.double() / ctx.measured[update.site].sqrt()
                total[name] = total.get(name, torch.zeros_like(unit)) + unit
        return Aggregate({"params": total}, 1.0, 1, {})

    def server_update(self, state: Sum, aggregate: Aggregate, ctx: RoundContext) -> Sum:
        return Sum({name: aggregate.tensors["params"][name].float() for name in state.total})

    def site_update(self, broadcast: Groups, site_state: Any, work: Training, ctx: RoundContext) -> tuple[Update, Any]:
        assert ctx.site is not None
        number = int(ctx.site[-1])
        tensors = {
            n: torch.arange(x.numel(), dtype=x.dtype).reshape(x.shape) + number for n, x in broadcast["params"].items()
        }
        return Update(ctx.site, ctx.round, examples=1, steps=0, lr_sum=0.0, tensors={"params": tensors}), site_state


def test_a_figure_over_all_tensors_is_measured_before_the_reduction() -> None:
    """Three unit vectors; their sum, computed here in one piece."""
    journal = run(recipe(algorithm="tests.engine.test_simulate:Clipped", rounds=1))
    shapes = {n: p.shape for n, p in Tiny().named_parameters()}
    expected = {n: torch.zeros(shape, dtype=torch.float64) for n, shape in shapes.items()}
    for number in (1, 2, 3):
        vector = {
            n: torch.arange(shape.numel(), dtype=torch.float64).reshape(shape) + number for n, shape in shapes.items()
        }
        norm = sum(float((t**2).sum()) for t in vector.values()) ** 0.5
        expected = {n: expected[n] + t / norm for n, t in vector.items()}
    found = read_model(journal, head(journal))["params"]
    for name in expected:
        torch.testing.assert_close(found[name].double(), expected[name], rtol=1e-6, atol=0)


# -- what people see ---------------------------------------------------------------------------------------------------
def test_the_summary_says_what_was_committed(tmp_path: Path) -> None:
    journal = run(recipe(**failing(tmp_path, quorum=2, evaluation="tests.builders:HeldOut")), str(tmp_path / "store"))
    found = summarize(journal)
    assert (found.status, found.finished, len(found.rounds), found.sites) == ("finished", True, 2, list(SITES))
    assert found.model_digest == head(journal).model_digest
    accuracies = [r.evaluation["accuracy"] for r in found.rounds if r.evaluation]
    assert found.best == accuracies.index(max(accuracies)) and found.metrics == found.rounds[-1].evaluation  # type: ignore[type-var]
    assert found.as_json()["rounds"] == 2 and current(journal) is None
    first = found.rounds[0]
    assert {s: c.examples for s, c in first.sites.items()} == {"site-1": 12, "site-2": 20, "site-3": 28}
    losses = {s: c.metrics["loss"] for s, c in first.sites.items()}
    assert first.metrics["loss"] == pytest.approx(sum(losses[s] * first.sites[s].examples for s in SITES) / 60)  # type: ignore[operator]


def test_an_unfinished_run_says_where_it_stands(tmp_path: Path) -> None:
    (tmp_path / "broken").touch()
    fields = failing(tmp_path, quorum=3)
    with pytest.raises(QuorumLost):
        run(recipe(**fields), str(tmp_path / "store"))
    journal = Journal(ObjectStore(str(tmp_path / "store")), "run")
    now = current(journal)
    assert now is not None
    assert (now.round, now.phase, now.opening, now.asked, now.answered) == (
        0,
        "train",
        1,
        list(SITES),
        ["site-1", "site-3"],
    )
    assert (summarize(journal).status, summarize(journal).model_digest) == ("interrupted", None)


def test_metrics_that_are_no_numbers_are_told_as_missing() -> None:
    """JSON has no NaN; a mean is over the sites that have a number."""
    journal = simulate(recipe(rounds=1), {site: Odd(site) for site in SITES})
    assert {s: c.metrics["odd"] for s, c in head(journal).contributors.items()} == {
        "site-1": None,
        "site-2": 2.0,
        "site-3": 3.0,
    }
    assert head(journal).metrics["odd"] == pytest.approx((20 * 2 + 28 * 3) / 48)


class Odd(Blobs):
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        return {"odd": float("nan") if self.site == "site-1" else float(self.site[-1])}


@pytest.mark.parametrize("algorithm", ["fedavg", "scaffold", "diloco", "feddyn"])
def test_a_model_larger_than_the_memory_budget_ends_with_the_same_bytes(algorithm: str, tmp_path: Path) -> None:
    """Sites read the broadcast out of the store while they copy it, and the server aggregates it row by row."""
    large, small = (
        outcome(run(recipe(algorithm=algorithm))),
        outcome(run(recipe(algorithm=algorithm, memory_budget=1024), str(tmp_path))),
    )
    assert (small["model"], small["state"]) == (large["model"], large["state"])
