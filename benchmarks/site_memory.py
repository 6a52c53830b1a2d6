"""Resident memory of a site over many rounds of a model of 50 MB, in one process.

    python benchmarks/site_memory.py [--rounds 100] [--megabytes 50] [--plot rss.png]

Prints the slope over the second half in KB a round, with its standard error: a leak is a slope that is not zero.
"""

import argparse
import tempfile

import numpy as np
import psutil
import torch
from torch import nn

from fedflow.engine import simulate
from fedflow.local import FunctionWorkload
from fedflow.recipe import Recipe


class Net(nn.Module):
    def __init__(self, megabytes: int) -> None:
        super().__init__()
        side = int((megabytes * 2**20 / 4) ** 0.5)
        self.weight = nn.Parameter(torch.zeros(side, side))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight[:4]


def train(model: nn.Module, data: list[torch.Tensor], config: dict[str, float]) -> dict[str, float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for batch in data:
        optimizer.zero_grad()
        loss = (model(batch) - 1).square().mean()
        loss.backward()
        optimizer.step()
    return {"loss": float(loss.detach())}


def site() -> FunctionWorkload:
    return FunctionWorkload(train, [torch.ones(8, 4)] * 2, examples=16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--megabytes", type=int, default=50)
    parser.add_argument("--plot")
    options = parser.parse_args()
    recipe = Recipe.load(
        {
            "name": "memory",
            "model": {"path": f"{__name__}:Net", "args": {"megabytes": options.megabytes}},
            "workload": f"{__name__}:site",
            "rounds": options.rounds,
            "training": {"tidy_every": 1},
        }
    )
    process, found = psutil.Process(), []
    with tempfile.TemporaryDirectory() as folder:
        simulate(
            recipe,
            ["site-1", "site-2"],
            store=folder,
            on_round=lambda manifest: found.append(process.memory_info().rss / 2**10),
        )
    rounds, rss = np.arange(options.rounds), np.array(found)
    half = options.rounds // 2
    (slope, base), covariance = np.polyfit(rounds[half:], rss[half:], 1, cov=True)
    print(f"resident: {rss[half:].mean() / 2**10:.0f} MB; slope {slope:.1f} ± {covariance[0, 0] ** 0.5:.1f} KB a round")
    if options.plot:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 3), layout="constrained")
        axes = figure.subplots()
        axes.plot(rounds, rss / 2**10)
        axes.plot(rounds[half:], (slope * rounds[half:] + base) / 2**10, linestyle="--")
        axes.set(xlabel="round", ylabel="resident MB", ylim=(0, None))
        figure.savefig(options.plot)


if __name__ == "__main__":
    main()
