"""The floor: FedAvg as a loop in plain PyTorch, one process. `run.py vmap`: all sites of a cohort at once by torch.func."""

from __future__ import annotations

import random
import sys

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from benchmarks.peers import common
from benchmarks.peers.common import SETTING


def cohort(round: int) -> list[int]:
    return random.Random(SETTING.seed * 1000 + round).sample(range(SETTING.sites), SETTING.cohort)


def one_by_one() -> None:
    torch.set_num_threads(1)
    model = common.make_model()
    start = {name: value.clone() for name, value in model.state_dict().items()}
    started, ends = common.now(), []
    for round in range(SETTING.rounds):
        mean = {name: torch.zeros_like(value) for name, value in start.items()}
        for site in cohort(round):
            model.load_state_dict(start)
            common.local_training(model, site, round)
            for name, value in model.state_dict().items():
                mean[name].add_(value, alpha=1 / SETTING.cohort)
        start = mean
        ends.append(common.now())
    model.load_state_dict(start)
    common.report("bare", started, ends, model, torch.__version__)


def all_at_once() -> None:
    """Samples that fill no batch are left out: the sites' batches are stacked."""
    torch.set_num_threads(SETTING.workers)
    model = common.make_model()
    start = {name: value.detach().clone() for name, value in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], inputs: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, parameters, (inputs,)), labels)

    gradients = vmap(grad(loss))
    started, ends = common.now(), []
    for round in range(SETTING.rounds):
        sites = cohort(round)
        inputs, labels = (torch.stack(parts) for parts in zip(*map(common.site_data, sites), strict=True))
        parameters = {name: value.expand(len(sites), *value.shape).clone() for name, value in start.items()}
        sites_rows = torch.arange(len(sites))[:, None]
        generators = [torch.Generator().manual_seed(round * 100_003 + site) for site in sites]
        for _ in range(SETTING.epochs):
            orders = torch.stack([torch.randperm(SETTING.samples, generator=g) for g in generators])
            for rows in orders.split(SETTING.batch, dim=1):
                found = gradients(parameters, inputs[sites_rows, rows], labels[sites_rows, rows])
                for name, value in parameters.items():
                    value.sub_(found[name], alpha=SETTING.lr)
        start = {name: value.mean(0) for name, value in parameters.items()}
        ends.append(common.now())
    model.load_state_dict(start)
    common.report("bare, vmap", started, ends, model, torch.__version__)


if __name__ == "__main__":
    all_at_once() if sys.argv[1:] == ["vmap"] else one_by_one()
