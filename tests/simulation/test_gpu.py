"""Simulations on a CUDA device: trained there, together and one after the other, they come to the model of the CPU within rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fedflow.simulation.engine import simulate
from fedflow.store.journal import Journal
from fedflow.store.tensors import read_tensors
from tests.builders import head, recipe

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
SITES = [f"site-{number:02}" for number in range(1, 17)]
TOGETHER = {"deterministic": "fast"}
ALONE = {"deterministic": "bitwise"}


class Net(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


class Convolving(nn.Sequential):
    """Four numbers as an image."""

    def __init__(self) -> None:
        super().__init__(nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 3, 2), nn.Flatten())


def model_of(journal: Journal) -> dict[str, torch.Tensor]:
    return {n: t for ref in head(journal).model.values() for n, t in read_tensors(journal.store, ref).items()}


def simulated(device: str, numerics: dict[str, Any], workers: int = 1, **changes: Any) -> Journal:
    fields = {"model": f"{__name__}:Net", "rounds": 3, **changes}
    return simulate(recipe(**fields, numerics={"device": device, **numerics}), SITES, workers=workers)


@pytest.mark.parametrize("numerics", [TOGETHER, ALONE], ids=["together", "alone"])
@pytest.mark.parametrize("algorithm", ["fedavg", "scaffold", {"kind": "fedprox", "mu": 0.1}, "diloco"], ids=str)
def test_it_comes_to_the_model_of_the_cpu(algorithm: Any, numerics: dict[str, Any]) -> None:
    there, here = (simulated(device, numerics, algorithm=algorithm) for device in (DEVICE, "cpu"))
    torch.testing.assert_close(model_of(there), model_of(here), rtol=1e-3, atol=1e-4)
    assert {c.numerics["device"] for c in head(there).contributors.values()} == {torch.cuda.get_device_name()}


def test_convolutions_are_trained_there_too() -> None:
    there, here = (simulated(d, TOGETHER, model=f"{__name__}:Convolving") for d in (DEVICE, "cpu"))
    torch.testing.assert_close(model_of(there), model_of(here), rtol=1e-3, atol=1e-4)


def test_several_workers_share_a_card_and_have_the_bits_of_one() -> None:
    one, three = (simulated(DEVICE, ALONE, workers=workers) for workers in (1, 3))
    assert head(three).model_digest == head(one).model_digest


def test_models_are_evaluated_there_on_data_that_are_not() -> None:
    data = "tests.builders:HeldOut"
    journal = simulated(DEVICE, ALONE, workload=data, evaluation=data, training={"steps": 3, "evaluate": "both"})
    evaluation = journal.evaluation(2)
    assert evaluation is not None and evaluation.metrics["accuracy"] is not None
    assert {"accuracy", "before.accuracy"} <= set(head(journal).metrics)
