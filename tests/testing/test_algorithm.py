"""The suite for algorithms: those with memory and phases pass it, and those that break a promise don't."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
from pydantic import PrivateAttr

from fedflow.algorithm import Algorithm
from fedflow.algorithms.fedavg import FedAvg
from fedflow.recipe import Recipe
from fedflow.testing.algorithm import AlgorithmConformance
from fedflow.types import Aggregate, RoundContext, Update
from tests.builders import Bounded, Leaning, recipe


class TestLeaning(AlgorithmConformance):
    @pytest.fixture
    def algorithm(self) -> Algorithm:
        return Leaning()


class TestBounded(AlgorithmConformance):
    @pytest.fixture
    def algorithm(self) -> Algorithm:
        return Bounded()


# -- what it finds -----------------------------------------------------------------------------------------------------
class Meddling(FedAvg):
    """Changes the state that it is given."""

    kind: Any = "meddling"

    def server_update(self, state: Any, aggregate: Aggregate, ctx: RoundContext) -> Any:
        for tensor in state.params.values():
            tensor += 1
        return super().server_update(state, aggregate, ctx)


class Dividing(FedAvg):
    """Divides by the number of names that it sees."""

    kind: Any = "dividing"

    def server_update(self, state: Any, aggregate: Aggregate, ctx: RoundContext) -> Any:
        new = super().server_update(state, aggregate, ctx)
        return replace(new, params={name: x / len(new.params) for name, x in new.params.items()})


class Unseeded(FedAvg):
    """Draws from a generator of the machine."""

    kind: Any = "unseeded"

    def site_update(self, broadcast: Any, site_state: Any, work: Any, ctx: RoundContext) -> tuple[Update, Any]:
        update, state = super().site_update(broadcast, site_state, work, ctx)
        noise = random.SystemRandom().random()
        noisy = {name: x + noise for name, x in update.tensors["params"].items()}
        return replace(update, tensors={**update.tensors, "params": noisy}), state


class Remembering(FedAvg):
    """Has a memory of its own."""

    kind: Any = "remembering"
    _rounds: int = PrivateAttr(default=0)


class Weightless(FedAvg):
    """Nobody weighs anything at site-2."""

    kind: Any = "weightless"

    def weight(self, update: Update) -> float:
        return 0.0 if update.site == "site-2" else 1.0


SUITE = AlgorithmConformance()


@pytest.mark.parametrize(
    ("algorithm", "test"),
    [
        (Meddling(), SUITE.test_the_servers_part_is_pure),
        (Dividing(), SUITE.test_no_bit_depends_on_how_the_names_are_partitioned),
        (Unseeded(), SUITE.test_the_sites_part_is_pure),
        (Unseeded(), SUITE.test_no_bit_depends_on_the_order_of_arrival),
        (Unseeded(), SUITE.test_a_run_that_is_extended_equals_one_that_was_that_long),
        (Weightless(), SUITE.test_every_update_is_valid_and_weighs_something),
    ],
    ids=lambda value: getattr(value, "kind", getattr(value, "__name__", "")),
)
def test_a_broken_promise_is_found(algorithm: Algorithm, test: Any) -> None:
    with pytest.raises(AssertionError):
        test(of(algorithm))


def test_a_memory_of_its_own_is_found() -> None:
    with pytest.raises(AssertionError, match="no private attributes"):
        SUITE.test_it_holds_hyperparameters_only(Remembering())


def of(algorithm: Algorithm) -> Recipe:
    """A short recipe with the algorithm; Weightless needs a quorum that it can meet."""
    return recipe(algorithm=algorithm, quorum=2)
