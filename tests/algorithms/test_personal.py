"""Personal tensors: they stay at their site, in its state, whatever the averaging algorithm (FedBN, FedPer, FedRep)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedflow.algorithm import Algorithm
from fedflow.algorithms import DiLoCo, FedAvg, FedDyn, FedNova, FedOpt, FedProx, QFedAvg, Scaffold, StreamingDiLoCo
from fedflow.engine.aggregation import read_model
from fedflow.errors import RecipeError
from fedflow.store.objects import ObjectStore
from fedflow.store.records import SiteStateRecord, UpdateManifest
from fedflow.store.state import read_state
from fedflow.store.tensors import read_spec
from fedflow.testing.algorithm import AlgorithmConformance
from fedflow.types import RoundContext
from tests.algorithms.playing import Returns, same_bits
from tests.builders import SITES, head, keys, recipe, run

BATCHNORM = ["1.*"]  # of tests.builders.Tiny: weight, bias, running mean and variance, number of batches
ALL: dict[str, Algorithm] = {
    "fedavg": FedAvg(personal=BATCHNORM),
    "fedprox": FedProx(personal=BATCHNORM),
    "fedopt": FedOpt(personal=BATCHNORM),
    "scaffold": Scaffold(personal=BATCHNORM),
    "diloco": DiLoCo(personal=BATCHNORM),
    "streaming diloco": StreamingDiLoCo(personal=BATCHNORM),
    "fednova": FedNova(personal=BATCHNORM),
    "feddyn": FedDyn(personal=BATCHNORM),
    "qfedavg": QFedAvg(personal=BATCHNORM),
}


@pytest.mark.parametrize("name", ALL)
def test_they_are_never_sent_and_go_on_from_round_to_round(name: str) -> None:
    algorithm, store = ALL[name], f"memory://personal-{name}"
    training = {"batch_size": 8, "optimizer": {"lr": 0.05}}
    batches = []
    for rounds in (1, 2):
        journal = run(recipe(algorithm=algorithm, rounds=rounds, training=training), store)
        states = {site: _state(journal, store, site, algorithm) for site in SITES}
        batches.append({site: int(state.personal["1.num_batches_tracked"]) for site, state in states.items()})
    for key in keys(journal.store, r"^sites/.*\.json$"):
        groups = UpdateManifest.from_bytes(journal.store.get(key)).groups
        assert not {n for ref in groups.values() for n in read_spec(journal.store, ref) if n.startswith("1.")}
    assert batches[0] == {"site-1": 2, "site-2": 3, "site-3": 4}  # 12, 20, 28 examples in batches of 8
    assert batches[1] == {site: 2 * count for site, count in batches[0].items()}
    assert len({tuple(state.personal["1.running_mean"].tolist()) for state in states.values()}) == 3


def _state(journal: Any, store: str, site: str, algorithm: Algorithm) -> Any:
    accepted = head(journal).sites[site].accepted
    assert accepted is not None
    states = ObjectStore(f"{store}-states/{site}")
    (key,) = [key for key in states.list() if accepted.partition(":")[2] in key]
    return read_state(states, algorithm.SiteState, SiteStateRecord.from_bytes(states.get(key)).state)


def test_a_round_by_hand() -> None:
    """The head h is personal: of x and h only x is averaged, and each site goes on from its own h."""
    algorithm = FedAvg(personal=["h"])
    state = algorithm.init({"params": {"x": torch.zeros(1), "h": torch.zeros(1)}, "frozen": {}, "buffers": {}})
    updates, kept = [], {}
    for site, y in (("a", 2.0), ("b", 4.0)):
        context = RoundContext("run", 0, "train", site, 2, 0)
        broadcast, work = (
            algorithm.broadcast(state, "train"),
            Returns({"x": torch.tensor([y]), "h": torch.tensor([-y])}),
        )
        before = algorithm.init_site(broadcast, work, context)
        update, kept[site] = algorithm.site_update(broadcast, before, work, context)
        updates.append(update)
    server = RoundContext("run", 0, "train", None, 2, 0)
    new = algorithm.server_update(state, algorithm.aggregate(iter(updates), server), server)
    assert (new.params["x"].item(), new.params["h"].item()) == (3.0, 0.0)
    start = algorithm.start(algorithm.broadcast(new, "train"), kept["b"])
    assert (start["params"]["x"].item(), start["params"]["h"].item()) == (3.0, -4.0)


def test_without_patterns_no_state_is_kept_at_a_site() -> None:
    run(recipe(algorithm="fedavg"), "memory://stateless")
    for site in SITES:
        assert not keys(ObjectStore(f"memory://stateless-states/{site}"), "/state/")


def test_a_pattern_that_fits_nothing_is_refused_before_any_training() -> None:
    with pytest.raises(RecipeError, match=r"algorithm\.personal: found 'head\.\*'"):
        run(recipe(algorithm={"kind": "fedprox", "personal": ["1.*", "head.*"]}))
    with pytest.raises(RecipeError, match="something left to share"):
        run(recipe(algorithm={"kind": "fedavg", "personal": ["*"]}))


def test_with_one_site_the_shared_tensors_are_those_of_fedavg() -> None:
    """It goes on from the same values, whether they were kept or sent."""
    found, expected = (run(recipe(algorithm=FedAvg(personal=p)), sites=["site-1"]) for p in (["4.bias"], []))
    ours, theirs = (read_model(journal, head(journal)) for journal in (found, expected))
    assert all(same_bits(t, theirs["params"][n]) for n, t in ours["params"].items() if n != "4.bias")


class TestConformance(AlgorithmConformance):
    @pytest.fixture(params=["fedavg", "scaffold", "fedopt"])
    def algorithm(self, request: pytest.FixtureRequest) -> Algorithm:
        return ALL[request.param]

    @pytest.fixture
    def recipe(self, algorithm: Algorithm) -> Any:
        return recipe(algorithm=algorithm, training={"batch_size": 8, "optimizer": {"lr": 0.1}})
