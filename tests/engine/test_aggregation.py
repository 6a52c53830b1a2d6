"""Aggregation: a pure function of the committed state and the closing, a bucket of names at a time."""

from __future__ import annotations

import gc
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedflow.algorithm import weighted_metrics
from fedflow.algorithms.averaging import ModelState
from fedflow.algorithms.fedavg import FedAvg
from fedflow.engine import (
    aggregate_round,
    close_round,
    evaluate_model,
    next_step,
    open_round,
    site_step,
    start_run,
    survey,
)
from fedflow.engine.aggregation import commit_initial, read_model
from fedflow.engine.site import SiteWork
from fedflow.errors import FedflowError
from fedflow.recipe import SiteConfig
from fedflow.store.journal import Journal
from fedflow.store.objects import ObjectStore
from fedflow.store.records import Closing, Plan, RunRecord, UpdateManifest, utc_now
from fedflow.types import Aggregate, Groups, RoundContext, Tensors, Update
from tests.builders import SITES, head, keys, recipe, run


def closed(folder: Path, number: int = 0, **fields: Any) -> tuple[Journal, Plan, Closing]:
    """A run whose round `number` is closed, and those before it are committed."""
    store = ObjectStore(str(folder / "store"))
    journal = start_run(store, "run", recipe(**fields), SITES)
    while True:
        step = next_step(journal, journal.recipe())
        assert step is not None
        plan, opening = open_round(journal, step)
        for site in SITES:
            work = SiteWork("run", step.round, plan.phase)
            site_step(work, SiteConfig(name=site, store=store.url, state=str(folder / site), allowed_imports=["*"]))
        closing = close_round(journal, plan, opening, survey(journal, plan), why="every site answered")
        if step.round == number:
            return journal, plan, closing
        aggregate_round(journal, plan, closing)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("closed")
    closed(folder)
    return folder


ALGORITHMS: list[dict[str, Any]] = [
    {"kind": "fedavg", "server_learning_rate": 0.7},
    {"kind": "scaffold"},
    {"kind": "fedopt", "server_optimizer": "adam"},
    {"kind": "diloco", "apply_outer_optimizer_to": "all_floating"},
    {"kind": "streaming_diloco", "fragments": 3, "local_steps_per_round": 2},
    {"kind": "fedavg", "reduction": {"kind": "geometric_median"}},
    {"kind": "fedavg", "transfer": "delta", "reduction": {"kind": "norm_clip", "max_norm": 0.1}},
]


@pytest.mark.parametrize("number", [0, 1])  # moments come into being, and are read again
@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda fields: str(fields.get("reduction", fields)["kind"]))
def test_no_byte_depends_on_the_memory_or_on_the_threads(
    algorithm: dict[str, Any], number: int, tmp_path: Path
) -> None:
    """From a row at a time to everything at once."""
    _, plan, closing = closed(tmp_path, number, algorithm=algorithm)

    def found(budget: int, threads: int) -> Any:
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        shutil.copytree(tmp_path / "store", tmp_path / "copy")
        journal = Journal(ObjectStore(str(tmp_path / "copy")), "run")
        manifest = aggregate_round(journal, plan, closing, memory_budget=budget, threads=threads)
        objects = {key: journal.store.get(key) for key in journal.store.list() if key.endswith(".safetensors")}
        return manifest.model_digest, manifest.state, manifest.broadcast, manifest.model, objects

    expected = found(sys.maxsize, 1)

    @settings(max_examples=8)
    @given(st.sampled_from([1024, 4096]) | st.integers(1, 30_000), st.sampled_from([1, 8]))
    def holds(memory_budget: int, threads: int) -> None:
        assert found(memory_budget, threads) == expected

    holds()


def test_an_algorithm_that_sees_whole_names_only_is_given_them(tmp_path: Path) -> None:
    _, plan, closing = closed(tmp_path, algorithm="tests.engine.test_aggregation:Normalised")
    copies = []
    for budget in (1, sys.maxsize):
        shutil.copytree(tmp_path / "store", tmp_path / str(budget))
        copy = Journal(ObjectStore(str(tmp_path / str(budget))), "run")
        copies.append(aggregate_round(copy, plan, closing, memory_budget=budget).model_digest)
    assert copies[0] == copies[1]


class Normalised(FedAvg):
    """Its step has the same length for every tensor."""

    kind: Any = "normalised"
    by_rows: ClassVar[bool] = False

    def server_update(self, state: Any, aggregate: Aggregate, ctx: RoundContext) -> Any:
        new = super().server_update(state, aggregate, ctx)
        steps = {name: x - state.params[name] for name, x in new.params.items()}
        return replace(new, params={name: state.params[name] + d / (1 + d.norm()) for name, d in steps.items()})


def test_twice_the_same_aggregation_writes_the_same_objects(folder: Path, tmp_path: Path) -> None:
    """Only times may differ, and they are in the manifest alone."""
    lists = []
    for name in "ab":
        shutil.copytree(folder / "store", tmp_path / name)
        journal = Journal(ObjectStore(str(tmp_path / name)), "run")
        plan = journal.plan(0, "train")
        closing = journal.closing(plan, 1) if plan else None
        assert plan is not None and closing is not None
        aggregate_round(journal, plan, closing)
        lists.append({key: journal.store.get(key) for key in journal.store.list() if not key.endswith("manifest.json")})
    assert lists[0] == lists[1]


def test_a_manifest_names_everything_that_it_rests_on(tmp_path: Path) -> None:
    journal = run(recipe(algorithm="tests.builders:Leaning"), str(tmp_path / "store"))
    for number in (0, 1):
        manifest, parent = (
            journal.manifest(number, "train"),
            journal.manifest(number - 1, "train" if number else "initial"),
        )
        plan = journal.plan(number, "train")
        assert manifest is not None and parent is not None and plan is not None
        assert manifest.parent == parent.digest() == plan.parent and plan.broadcast == parent.broadcast
        closing = journal.closing(plan, 1)
        assert closing is not None and manifest.closing_digest == closing.digest()
        assert manifest.closing == journal.closing_key(plan, closing) and journal.store.exists(manifest.closing)
        for ref in manifest.objects():
            journal.store.read(ref)
        for site, contribution in closing.contributors.items():
            update = UpdateManifest.from_bytes(journal.store.get(contribution.key))
            assert update.update_digest() == contribution.update == manifest.contributors[site].update
            for ref in update.groups.values():
                journal.store.read(ref)
        assert (manifest.run, manifest.nonce) == ("run", journal.record().nonce)


def test_an_object_that_does_not_change_is_stored_once(tmp_path: Path) -> None:
    """The model is state and broadcast at once; frozen parameters stay what they were."""
    journal = run(recipe(), str(tmp_path / "store"))
    manifest = head(journal)
    assert manifest.model == manifest.broadcast == manifest.state.tensors
    initial = journal.manifest(-1, "initial")
    assert initial is not None and initial.model["frozen"] == manifest.model["frozen"]
    assert keys(journal.store, "^server/.*/objects/") == []


def test_a_plan_that_does_not_continue_the_newest_commit_is_not_aggregated(tmp_path: Path) -> None:
    journal, plan, closing = closed(tmp_path)
    with pytest.raises(
        FedflowError, match="run run, round 1: the plan continues blake3:.*, but the newest commit is blake3:"
    ):
        aggregate_round(journal, plan.model_copy(update={"round": 1, "parent": plan.digest()}), closing)


# -- algorithms that get it wrong --------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Counting(ModelState):
    names: int = 0


class CountsNames(FedAvg):
    """Its scalar depends on the part of the names that it sees."""

    kind: Any = "counts-names"
    State: ClassVar[type[Any]] = Counting

    def init(self, model: Groups) -> Counting:
        return Counting(model["params"], model["frozen"], model["buffers"])

    def server_update(self, state: Any, aggregate: Aggregate, ctx: RoundContext) -> Any:
        new = super().server_update(state, aggregate, ctx)
        return Counting(new.params, new.frozen, new.buffers, names=len(new.params))


def test_scalars_that_differ_between_parts_of_the_names_are_found(tmp_path: Path) -> None:
    journal, plan, closing = closed(tmp_path, algorithm="tests.engine.test_aggregation:CountsNames")
    with pytest.raises(
        FedflowError,
        match=r"Counting\.names: found 0 and 1 from two parts of the names.*compute scalars from the context",
    ):
        aggregate_round(journal, plan, closing, memory_budget=1)
    assert journal.manifest(0, "train") is None


class Totals(FedAvg):
    """It makes a number of every tensor."""

    kind: Any = "totals"

    def server_update(self, state: Any, aggregate: Aggregate, ctx: RoundContext) -> Any:
        new = super().server_update(state, aggregate, ctx)
        return replace(new, params={name: tensor.sum() for name, tensor in new.params.items()})


class Namer(FedAvg):
    """It gives a tensor a name of its own."""

    kind: Any = "namer"

    def server_update(self, state: Any, aggregate: Aggregate, ctx: RoundContext) -> Any:
        new = super().server_update(state, aggregate, ctx)
        return replace(new, params={("zz" if name == "0.bias" else name): t for name, t in new.params.items()})


@pytest.mark.parametrize(
    ("algorithm", "reason"),
    [
        ("Totals", r"0\.bias: found float32\[\] and float32\[\] made of its rows.*by_rows = False"),
        ("Namer", r"zz: found it made of two parts of the names.*make no names of your own"),
    ],
)
def test_an_algorithm_that_does_not_fit_into_parts_is_told_what_to_say(
    algorithm: str, reason: str, tmp_path: Path
) -> None:
    journal, plan, closing = closed(tmp_path, algorithm=f"tests.engine.test_aggregation:{algorithm}")
    with pytest.raises(FedflowError, match=reason):
        aggregate_round(journal, plan, closing, memory_budget=1)
    assert journal.manifest(0, "train") is None


@dataclass(frozen=True)
class Secretive(ModelState):
    memory: Any = None


class KeepsObjects(FedAvg):
    """Its state holds something that is neither tensors nor JSON."""

    kind: Any = "keeps-objects"
    State: ClassVar[type[Any]] = Secretive

    def init(self, model: Groups) -> Secretive:
        return Secretive(model["params"], model["frozen"], model["buffers"], memory=object())


def test_a_state_of_something_else_than_tensors_and_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        FedflowError, match=r"Secretive\.memory: found object, expected tensors by name or a JSON value"
    ):
        run(recipe(algorithm="tests.engine.test_aggregation:KeepsObjects"), str(tmp_path))


# -- what the manifest says of the sites -------------------------------------------------------------------------------
class Ragged(FedAvg):
    """Sites may leave tensors out: site-1 sends no bias of the last layer."""

    kind: Literal["ragged"] = "ragged"
    partial_updates: ClassVar[bool] = True

    def site_update(self, broadcast: Groups, site_state: Any, work: Any, ctx: RoundContext) -> tuple[Update, Any]:
        update, state = super().site_update(broadcast, site_state, work, ctx)
        groups: dict[str, Tensors] = dict(update.tensors)
        if ctx.site == "site-1":
            groups["params"] = {n: t for n, t in groups["params"].items() if n != "4.bias"}
        return replace(update, tensors=groups), state


def test_the_manifest_says_which_tensors_only_some_sites_sent(tmp_path: Path) -> None:
    journal = run(recipe(algorithm="tests.engine.test_aggregation:Ragged", rounds=1), str(tmp_path))
    assert head(journal).partial == {"4.bias": ["site-2", "site-3"]}


class SaysItsMachine(FedAvg):
    """Site 3 records another processor."""

    kind: Literal["says"] = "says"

    def site_update(self, broadcast: Groups, site_state: Any, work: Any, ctx: RoundContext) -> tuple[Update, Any]:
        update, state = super().site_update(broadcast, site_state, work, ctx)
        return replace(
            update, numerics={**update.numerics, "cpu": "another"} if ctx.site == "site-3" else update.numerics
        ), state


def test_sites_with_other_numerics_than_the_first_are_flagged(tmp_path: Path) -> None:
    journal = run(recipe(algorithm="tests.engine.test_aggregation:SaysItsMachine", rounds=1), str(tmp_path))
    assert head(journal).numerics_differ == ["site-3"]
    assert head(run(recipe(rounds=1))).numerics_differ == []


def test_metrics_are_weighted_over_the_sites_that_have_them() -> None:
    found = weighted_metrics([(1.0, {"x": 1.0, "y": None}), (3.0, {"x": 5.0}), (2.0, {"y": None})])
    assert found == {"x": 4.0, "y": None}  # (1·1 + 3·5)/4; nobody knows y


def test_a_recipe_without_evaluation_has_none() -> None:
    assert evaluate_model(recipe(), {}) == {}


class Names(dict[str, Any]):
    """Of a size of its own, so that one lies where another one was."""

    __slots__ = ("other",)


class Anew(FedAvg):
    """What sites and what people see is put together when it is asked for, in memory that was something else's if it can be."""

    def broadcast(self, state: ModelState, phase: str) -> Groups:
        found = {
            group: Names({f"seen.{n}": t for n, t in tensors.items()}) for group, tensors in self.model(state).items()
        }
        places[:] = [id(names) for names in found.values()]
        return found

    def model(self, state: ModelState) -> Groups:
        gc.collect()
        groups, kept = super().model(state), [Names() for _ in range(100)]
        free = [names for names in kept if id(names) in places]
        found = {group: free.pop() if free else Names() for group in groups}
        for group, tensors in groups.items():
            found[group].update(tensors)
        return found


places: list[int] = []


def test_an_object_is_not_taken_for_another_that_lay_at_its_place_in_memory(tmp_path: Path) -> None:
    journal = Journal(ObjectStore(str(tmp_path)), "run")
    fields = recipe().model_dump(mode="json")
    journal.create(RunRecord(fedflow="", run="run", nonce="1", created=utc_now(), recipe=fields, sites=SITES))
    model = {"params": {"w": torch.ones(2)}, "frozen": {"f": torch.zeros(2)}, "buffers": {"b": torch.zeros(1)}}
    committed = commit_initial(journal, Anew(), model)
    assert {group: list(tensors) for group, tensors in read_model(journal, committed).items()} == {
        "params": ["w"],
        "frozen": ["f"],
        "buffers": ["b"],
    }
