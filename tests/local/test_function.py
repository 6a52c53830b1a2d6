"""A training function: what it is told, what its answer becomes, and what its site evaluates."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from fedflow.algorithm import LocalResult
from fedflow.errors import ResolveError
from fedflow.local import Config, FunctionWorkload, Setup, TensorWorkload, training_of
from fedflow.local.data import DataView
from fedflow.local.function import numbers
from fedflow.local.state import Memory
from fedflow.local.workload import check_workload
from fedflow.memory import tidy_after
from fedflow.recipe import LocalTraining, Numerics, Optimizer
from tests.builders import Tiny, blobs, head, recipe, run
from tests.local.test_preserved import context, start

LOADER = DataLoader(TensorDataset(*blobs(22, seed=1)), batch_size=4)


def step(model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()


def trained(workload: Any, settings: LocalTraining | None = None, **asked: Any) -> LocalResult:
    setup = Setup(Tiny, settings or LocalTraining(), Numerics(), lambda done, planned: None, Memory())
    return training_of(workload, setup).train(start(), context(3), **asked)


def test_it_is_told_what_the_recipe_says_and_where_it_is() -> None:
    seen: list[Config] = []

    def train(model: nn.Module, data: Any, config: Config) -> None:
        seen.append(config)
        step(model)

    settings = LocalTraining(epochs=3, optimizer=Optimizer(lr=0.2), config={"mine": [1], "batch_size": 7})
    trained(FunctionWorkload(train, LOADER, config={"own": True}), settings)
    config = seen[0]
    assert (config["lr"], config.epochs, config.optimizer, config.mine) == (0.2, 3, "sgd", [1])
    assert (config.batch_size, config.own) == (7, True), "the recipe's config and the site's go before"
    assert (config.round, config.site, config.seed, config.steps) == (3, "site-1", 103, None)
    with pytest.raises(AttributeError, match="found no 'learning_rate', expected one of"):
        _ = config.learning_rate
    assert config.get("learning_rate", 0.5) == 0.5


@pytest.mark.parametrize("steps", [None, 1])
def test_a_loader_becomes_a_stream_only_where_steps_are_set(steps: int | None) -> None:
    seen: list[Any] = []

    def train(model: nn.Module, data: Any, config: Config) -> None:
        seen.append(data)
        step(model)

    trained(FunctionWorkload(train, LOADER), steps=steps)
    assert isinstance(seen[0], DataView) if steps else seen[0] is LOADER


def test_other_data_is_handed_over_as_it_is() -> None:
    seen: list[Any] = []
    data = {"train": [1, 2], "test": [3]}
    trained(FunctionWorkload(lambda m, d, c: (seen.append(d), step(m)), data, examples=2), steps=1)
    assert seen == [data]


@pytest.mark.parametrize(
    ("returned", "metrics"),
    [
        ({"loss": 0.5, "hits": 3, "tensor": torch.tensor(2.0)}, {"loss": 0.5, "hits": 3.0, "tensor": 2.0}),
        ({"loss": 0.5, "history": [1, 2], "name": "x"}, {"loss": 0.5}),
        ({"loss": 0.5, "best": np.array(["adam"])[0], "day": np.datetime64("2026-01-01")}, {"loss": 0.5}),
        ({"loss": 0.5, "phase": torch.tensor(1j)}, {"loss": 0.5}),
        (None, {}),
        (Tiny(), {}),
        (0.5, {}),
    ],
)
def test_the_numbers_in_its_answer_are_metrics(returned: Any, metrics: dict[str, float]) -> None:
    assert numbers(returned) == metrics


def test_evaluation_before_and_after_are_kept_apart() -> None:
    """Before: the received model; after: the site's own. Neither changes the training."""

    def train(model: nn.Module, data: Any, config: Config) -> dict[str, float]:
        step(model)
        return {"loss": 1.0}

    def evaluate(model: nn.Module) -> dict[str, float]:
        torch.rand(5)
        assert not model.training and not torch.is_grad_enabled()
        return {"sum": float(sum(p.sum() for p in model.parameters()))}

    work = FunctionWorkload(train, LOADER, evaluate=evaluate)
    found = {when: trained(work, LocalTraining(evaluate=when)) for when in ("never", "before", "after", "both")}
    assert {when: set(result.metrics) for when, result in found.items()} == {
        "never": {"loss"},
        "before": {"loss", "before.sum"},
        "after": {"loss", "sum"},
        "both": {"loss", "sum", "before.sum"},
    }
    received = float(sum(p.detach().sum() for p in start()["params"].values()))
    assert found["both"].metrics["before.sum"] == pytest.approx(received) != found["both"].metrics["sum"]
    assert all(torch.equal(found["never"].params[n], found["both"].params[n]) for n in found["never"].params)


def test_evaluation_before_does_not_move_a_built_in_training() -> None:
    class Evaluated(TensorWorkload):
        def evaluate(self, model: nn.Module) -> dict[str, float]:
            return {"random": float(torch.rand(()))}

    results = [
        trained(Evaluated(*blobs(22, seed=1)), LocalTraining(evaluate=when)).params for when in ("never", "both")
    ]
    assert all(torch.equal(results[0][n], results[1][n]) for n in results[0])


def test_the_payload_holds_the_models_tensors_only() -> None:
    def train(model: nn.Module, data: Any, config: Config) -> None:
        model.register_buffer("scratch", torch.zeros(1), persistent=False)
        model.history = [1, 2, 3]  # type: ignore[assignment]
        step(model)

    found = trained(FunctionWorkload(train, LOADER))
    names = dict(Tiny().named_parameters()).keys(), dict(Tiny().named_buffers()).keys()
    assert (found.params.keys(), found.buffers.keys()) == names


def test_data_without_a_length_has_its_number_of_examples_from_the_site() -> None:
    class Endless(IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter(blobs(4, seed=1))

    data = DataLoader(Endless())
    assert len(FunctionWorkload(lambda m, d, c: None, data, examples=7)) == 7
    with pytest.raises(ResolveError, match="examples: found None, expected their number; give it"):
        FunctionWorkload(lambda m, d, c: None, data)


def test_an_exception_of_the_function_comes_with_its_traceback() -> None:
    def train(model: nn.Module, data: Any, config: Config) -> None:
        raise KeyError("my mistake")

    with pytest.raises(KeyError, match="my mistake") as error:
        trained(FunctionWorkload(train, LOADER))
    assert error.traceback[-1].name == "train"


def test_any_kind_of_workload_is_accepted() -> None:
    work = FunctionWorkload(lambda m, d, c: None, [0])
    assert check_workload(work, "workload") is work
    with pytest.raises(ResolveError, match="expected an object with __len__, batches, loss"):
        check_workload([0], "workload")


def test_every_second_round_is_tidied() -> None:
    class Model:
        pass

    gc.disable()
    try:
        model = Model()
        model.itself = model  # type: ignore[attr-defined]
        left = weakref.ref(model)
        del model
        for round, every in ((0, 0), (1, 0), (2, 2)):
            tidy_after(round, every)
            assert left() is not None
        tidy_after(3, 2)
        assert left() is None
    finally:
        gc.enable()


def test_the_manifest_says_how_much_memory_a_site_took() -> None:
    contributors = head(run(recipe(rounds=1))).contributors
    assert contributors and all(c.peak_rss >= 50 * 2**20 for c in contributors.values())  # torch alone takes more
