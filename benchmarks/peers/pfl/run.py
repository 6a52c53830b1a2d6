"""pfl-research: FederatedAveraging over a SimulatedBackend. Two processes: `torchrun --standalone --nproc_per_node=2 run.py`."""

from __future__ import annotations

import logging
import os
import random
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel
from torch import nn
from torch.nn import functional as F

from benchmarks.peers import common
from benchmarks.peers.common import SETTING


def with_loss(model: nn.Module) -> nn.Module:
    """pfl calls two methods of the module itself."""

    def loss(x: Any, y: Any, eval: bool = False) -> Any:
        model.train(not eval)
        return F.cross_entropy(model(x), y)

    @torch.no_grad()
    def metrics(x: Any, y: Any, eval: bool = False) -> Any:
        return {"loss": Weighted(F.cross_entropy(model(x), y, reduction="sum").item(), len(y))}

    model.loss, model.metrics = loss, metrics
    return model


class Cohorts:
    """Names one site a call, without replacement within a round."""

    def __init__(self) -> None:
        self.random, self.left = random.Random(SETTING.seed), []

    def __call__(self) -> int:
        self.left = self.left or self.random.sample(range(SETTING.sites), SETTING.cohort)
        return self.left.pop()


def site_dataset(site: int) -> Dataset:
    """pfl reads a dataset in its order: it is shuffled here."""
    inputs, labels = common.site_data(site)
    order = torch.randperm(len(inputs))
    kinds = {"train_kwargs": {"eval": False}, "eval_kwargs": {"eval": True}}
    return Dataset([inputs[order], labels[order]], user_id=str(site), **kinds)


class Clock(TrainingProcessCallback):
    def __init__(self) -> None:
        self.ends: list[float] = []

    def after_central_iteration(self, aggregate_metrics: Any, model: Any, *, central_iteration: int) -> Any:
        self.ends.append(common.now())
        return False, Metrics()


def main() -> None:
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    np.random.seed(SETTING.seed)
    module = with_loss(common.make_model())
    model = PyTorchModel(
        module,
        local_optimizer_create=torch.optim.SGD,
        central_optimizer=torch.optim.SGD(module.parameters(), lr=1.0),
    )
    data, clock = FederatedDataset(site_dataset, Cohorts()), Clock()
    backend = SimulatedBackend(training_data=data, val_data=data, postprocessors=[WeightByDatapoints()])
    started = common.now()
    FederatedAveraging().run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=SETTING.rounds,
            evaluation_frequency=10**9,
            train_cohort_size=SETTING.cohort,
            val_cohort_size=0,
        ),
        backend=backend,
        model=model,
        model_train_params=NNTrainHyperParams(
            local_learning_rate=SETTING.lr, local_num_epochs=SETTING.epochs, local_batch_size=SETTING.batch
        ),
        model_eval_params=NNEvalHyperParams(local_batch_size=SETTING.batch),
        callbacks=[clock],
    )
    if os.environ.get("RANK", "0") == "0":
        common.report("pfl-research", started, clock.ends, module, version("pfl"))


if __name__ == "__main__":
    main()
