"""What an algorithm promises to the engine, as tests that anybody's algorithm can be put through.

class TestMine(AlgorithmConformance):
    @pytest.fixture
    def algorithm(self) -> Algorithm:
        return Mine(mu=0.1)

They run real rounds in memory, of a small model with frozen parameters, BatchNorm and dropout, at three sites of uneven
size. An algorithm whose payload is no such model overrides `recipe`.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable, Iterator
from typing import Any
from uuid import uuid4

import fsspec
import pytest
import torch
from torch import nn

from fedflow.algorithm import Algorithm
from fedflow.engine import aggregate_round, close_round, open_round, simulate, site_step, start_run, survey
from fedflow.engine.rounds import next_step
from fedflow.engine.site import SiteWork
from fedflow.engine.updates import Contributor
from fedflow.local import TensorWorkload
from fedflow.recipe import Recipe, SiteConfig
from fedflow.store.journal import Journal
from fedflow.store.objects import ObjectStore
from fedflow.store.records import Closing, Manifest, Plan, UpdateManifest
from fedflow.store.state import read_state, tensor_fields, write_state
from fedflow.tensors import model_digest
from fedflow.types import Groups, RoundContext

__all__ = ["AlgorithmConformance", "SmallNet", "SmallWork"]

SITES = ["site-1", "site-2", "site-3"]
_STORES = "conformance-"


class SmallNet(nn.Sequential):
    """Four numbers in, two out; the first layer is frozen."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.2), nn.Linear(5, 2))
        self[0].requires_grad_(False)


class SmallWork(TensorWorkload):
    """10, 14 or 18 examples, by the last digit of the site's name."""

    def __init__(self, site: str) -> None:
        number = int(site[-1])
        generator = torch.Generator().manual_seed(number)
        inputs = torch.randn(6 + 4 * number, 4, generator=generator)
        super().__init__(inputs, (inputs.sum(dim=1) > 0).long())


class AlgorithmConformance:
    """Inherit and provide `algorithm`."""

    @pytest.fixture
    def algorithm(self) -> Algorithm:
        raise NotImplementedError("provide the algorithm")

    @pytest.fixture
    def recipe(self, algorithm: Algorithm) -> Recipe:
        """Two rounds of it."""
        return Recipe.load(
            {
                "name": "conformance",
                "model": f"{__name__}:SmallNet",
                "workload": f"{__name__}:SmallWork",
                "rounds": 2,
                "algorithm": algorithm,
                "training": {"batch_size": 4, "optimizer": {"lr": 0.1, "momentum": 0.5}},
            }
        )

    @pytest.fixture(autouse=True)
    def _tidy(self) -> Iterator[None]:
        """Memory is searched from end to end for every object: keep little there."""
        yield
        objects = fsspec.filesystem("memory").store
        for path in [path for path in objects if path.startswith(f"/{_STORES}")]:
            del objects[path]

    # -- what it is
    def test_it_comes_back_from_json_as_it_was(self, algorithm: Algorithm, recipe: Recipe) -> None:
        again = Recipe.model_validate_json(recipe.model_dump_json()).algorithm
        assert again == algorithm and type(again) is type(algorithm)

    def test_it_holds_hyperparameters_only(self, algorithm: Algorithm) -> None:
        assert algorithm.model_config.get("frozen"), "set model_config frozen: state belongs into S and C"
        assert not algorithm.__private_attributes__, "no private attributes: state belongs into S and C"
        for state in (algorithm.State, algorithm.SiteState):
            assert dataclasses.is_dataclass(state) and state.__dataclass_params__.frozen, f"{state}: freeze it"  # type: ignore[attr-defined]

    # -- bits
    def test_no_bit_depends_on_the_order_of_arrival(self, recipe: Recipe) -> None:
        forwards = _finished(recipe)
        backwards = _finished(recipe, order=lambda round, sites: sites[::-1])
        assert _digests(forwards) == _digests(backwards)

    def test_no_bit_depends_on_how_the_names_are_partitioned(self, recipe: Recipe) -> None:
        for journal, plan, closing in _phases(recipe) if recipe.computation.partitionable else ():
            found = []
            for budget in (sys.maxsize, 1, 1024, 4096):
                copy = _copy(journal)
                aggregate_round(copy, plan, closing, memory_budget=budget)
                found.append(_digests(copy))
            assert all(digests == found[0] for digests in found)

    def test_a_run_that_is_extended_equals_one_that_was_that_long(self, recipe: Recipe) -> None:
        longer = recipe.model_copy(update={"rounds": recipe.rounds + 1})
        extended = _finished(longer, store=_finished(recipe).store.url)
        assert _digests(extended) == _digests(_finished(longer))

    # -- purity
    def test_states_come_back_from_the_store_to_the_bit(self, recipe: Recipe) -> None:
        store = ObjectStore(_fresh_url())
        for state in self._states(recipe):
            record = write_state(store, "objects", state)
            again = read_state(store, type(state), record)
            assert _state_digests(again) == _state_digests(state)

    def test_the_servers_part_is_pure(self, recipe: Recipe) -> None:
        """Twice the same bits, and what it is given stays as it is."""
        for journal, plan, closing in _phases(recipe):
            algorithm, head = recipe.computation, _head(journal, recipe)
            updates = [Contributor(journal, plan, c) for _, c in sorted(closing.contributors.items())]
            names = dict.fromkeys(name for update in updates for name in update.names)
            state = read_state(journal.store, algorithm.State, head.state)
            context = RoundContext(plan.run, plan.round, plan.phase, None, plan.num_sites, seed=1)
            before, results = _state_digests(state), []
            for _ in range(2):
                measured = algorithm.measure(
                    (algorithm.decode(u.load(names), state, plan.phase) for u in updates), context
                )
                known = dataclasses.replace(context, measured=measured)
                aggregate = algorithm.aggregate(
                    (algorithm.decode(u.load(names), state, plan.phase) for u in updates), known
                )
                reduced = _group_digests(aggregate.tensors)
                results.append(_state_digests(algorithm.server_update(state, aggregate, known)))
                assert _group_digests(aggregate.tensors) == reduced, "server_update changed the aggregate"
            assert results[0] == results[1], "server_update gave other bits the second time"
            assert _state_digests(state) == before, "server_update changed the state that it was given"

    def test_the_sites_part_is_pure(self, recipe: Recipe) -> None:
        """Two sites of the same name, data and past send the same update."""
        journals = [_started(recipe), _started(recipe)]
        while step := next_step(journals[0], recipe):
            closings = []
            for journal in journals:
                plan, closing = _closed(journal, step)
                closings.append({site: _sent(journal, c.key) for site, c in closing.contributors.items()})
                aggregate_round(journal, plan, closing)
            assert closings[0] == closings[1]

    # -- contracts with the engine
    def test_every_update_is_valid_and_weighs_something(self, recipe: Recipe) -> None:
        journal = _finished(recipe)
        for round, phase in journal.committed():
            manifest = journal.manifest(round, phase)
            assert manifest is not None
            assert sorted(manifest.contributors) == SITES and not manifest.excluded
            assert all(c.weight > 0 for c in manifest.contributors.values())

    def test_sites_can_see_the_broadcast_and_nothing_else_of_the_state(self, recipe: Recipe) -> None:
        journal = _finished(recipe)
        steps = [journal.manifest(-1, "initial"), *(journal.manifest(*step) for step in journal.committed())]
        broadcast = {ref.key for manifest in steps if manifest for ref in manifest.broadcast.values()}
        assert set(journal.store.list(f"{journal.public}/objects")) == broadcast

    def test_no_state_of_a_site_is_in_the_shared_store(self, recipe: Recipe) -> None:
        journal = _finished(recipe)
        sent = {key for update in _sent_keys(journal) for key in update}
        there = {key for site in SITES for key in journal.store.list(f"sites/{site}")}
        assert there == sent

    def _states(self, recipe: Recipe) -> Iterator[Any]:
        """The server's state before round 0 and after every phase."""
        for journal, plan, closing in _phases(recipe):
            yield read_state(journal.store, recipe.algorithm.State, _head(journal, recipe).state)
            manifest = aggregate_round(journal, plan, closing)
            yield read_state(journal.store, recipe.algorithm.State, manifest.state)


def _fresh_url() -> str:
    return f"memory://{_STORES}{uuid4().hex}"


def _finished(recipe: Recipe, **options: Any) -> Journal:
    return simulate(recipe, SITES, run="run", **{"store": _fresh_url(), **options})


def _copy(journal: Journal) -> Journal:
    store = ObjectStore(_fresh_url())
    for key in journal.store.list():
        store.put(key, journal.store.get(key))
    return Journal(store, journal.run)


def _started(recipe: Recipe) -> Journal:
    return start_run(ObjectStore(_fresh_url()), "run", recipe, SITES)


def _closed(journal: Journal, step: Any) -> tuple[Plan, Closing]:
    """A phase that every site has answered."""
    plan, opening = open_round(journal, step)
    for site in plan.tasks:
        state = f"{journal.store.url}-states/{site}"
        config = SiteConfig(name=site, store=journal.store.url, state=state, allowed_imports=["*"])
        site_step(SiteWork(plan.run, plan.round, plan.phase, opening.number), config, store=journal.store)
    return plan, close_round(journal, plan, opening, survey(journal, plan), why="every site answered")


def _phases(recipe: Recipe) -> Iterator[tuple[Journal, Plan, Closing]]:
    """Every phase of a run, closed and about to be aggregated."""
    journal = _started(recipe)
    while step := next_step(journal, recipe):
        plan, closing = _closed(journal, step)
        yield journal, plan, closing
        aggregate_round(journal, plan, closing)


def _head(journal: Journal, recipe: Recipe) -> Manifest:
    found = journal.head(recipe.phases)
    assert found is not None
    return found


def _sent(journal: Journal, key: str) -> dict[str, Any]:
    """What a site's manifest says that decides bits; the plan's digest stands for the run and is left out."""
    found = UpdateManifest.from_bytes(journal.store.get(key))
    groups = {group: ref.digest for group, ref in found.groups.items()}
    return {"groups": groups, "scalars": found.scalars, "steps": found.steps, "examples": found.examples}


def _sent_keys(journal: Journal) -> Iterator[Iterable[str]]:
    """For every update: the keys of its manifest and of its objects."""
    for key in journal.store.list("sites"):
        if key.endswith(".json"):
            found = UpdateManifest.from_bytes(journal.store.get(key))
            yield [key, *(ref.key for ref in found.groups.values())]


def _digests(journal: Journal) -> list[tuple[Any, ...]]:
    """Of every commit: the model, and every part of the state."""
    found = []
    for round, phase in journal.committed():
        manifest = journal.manifest(round, phase)
        assert manifest is not None
        parts = {field: ref.digest for field, ref in manifest.state.tensors.items()}
        found.append((round, phase, manifest.model_digest, parts, manifest.state.scalars))
    return found


def _group_digests(groups: Groups) -> dict[str, str]:
    return {group: model_digest(tensors) for group, tensors in groups.items()}


def _state_digests(state: Any) -> dict[str, Any]:
    tensors = tensor_fields(state)
    scalars = {f.name: getattr(state, f.name) for f in dataclasses.fields(state) if f.name not in tensors}
    return _group_digests(tensors) | scalars
