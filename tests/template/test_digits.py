"""The project that `fedflow init` lays out: federated training comes close to central training."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from fedflow.engine import simulate
from fedflow.engine.summary import summarize
from fedflow.recipe import Federation, Recipe
from fedflow.template import workload

TEMPLATE = Path(workload.__file__).parent


def recipe() -> Recipe:
    """The template's, with its names as they are found from here."""
    fields = Recipe.load(TEMPLATE / "recipe.yaml").model_dump(mode="json")
    for name in ("model", "workload", "evaluation"):
        fields[name]["path"] = f"{workload.__name__}:{fields[name]['path'].partition(':')[2]}"
    return Recipe.load(fields)


def central_accuracy(recipe: Recipe) -> float:
    """Accuracy on the held-out images of the same CNN, trained by plain torch on all sites' images for as many passes."""
    torch.manual_seed(recipe.seed)
    model, length = workload.DigitsCNN(), recipe.training
    images, labels = workload.digits()
    test, train = (images[: workload.TEST_EXAMPLES], labels[: workload.TEST_EXAMPLES]), workload.TEST_EXAMPLES
    optimizer = torch.optim.SGD(model.parameters(), lr=length.optimizer.lr, momentum=length.optimizer.momentum)
    for _ in range(recipe.rounds * (length.epochs or 1)):
        for rows in (torch.randperm(len(images) - train) + train).split(length.batch_size):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[rows]), labels[rows]).backward()
            optimizer.step()
    with torch.no_grad():
        return float((model(test[0]).argmax(dim=1) == test[1]).float().mean())


def test_four_very_different_sites_come_close_to_central_training() -> None:
    """At least 0.95 on held-out images, and within 0.02 of the same CNN trained on everything for as many passes."""
    federation = Federation.load(TEMPLATE / "federation.yaml")
    summary = summarize(simulate(recipe(), federation.names))
    accuracy = summary.metrics["accuracy"]
    assert accuracy is not None and accuracy >= 0.95
    assert abs(central_accuracy(recipe()) - accuracy) <= 0.02


def test_the_sites_shares_are_disjoint_and_complete() -> None:
    images, _ = workload.digits()
    names = Federation.load(TEMPLATE / "federation.yaml").names
    shares = [workload.Digits(name, names).inputs for name in names]
    rows = torch.cat(shares).flatten(1)
    expected = images[workload.TEST_EXAMPLES :].flatten(1)
    assert sorted(map(tuple, rows.tolist())) == sorted(map(tuple, expected.tolist()))
