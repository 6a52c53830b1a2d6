"""What every contender shares: setting, data, models, local training, and the line that it prints.

The setting is JSON in the variable BENCH, for some contenders' processes inherit nothing else. Imports nothing but NumPy and PyTorch.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

CLASSES = 10


@dataclass(frozen=True)
class Setting:
    """One federated run. samples: of each site; workers: processes, actors or threads that train, a thread each;
    seed: of everything but the data."""

    model: str = "cnn"
    sites: int = 100
    cohort: int = 20
    samples: int = 320
    batch: int = 32
    rounds: int = 10
    epochs: int = 1
    lr: float = 0.05
    workers: int = 2
    seed: int = 0
    held_out: int = 2000
    data: str = str(Path(tempfile.gettempdir()) / "fedflow-benchmark-data")


SETTING = Setting(**json.loads(os.environ.get("BENCH", "{}")))


class CNN(nn.Module):
    """28,938 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.c2 = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1)
        self.f1, self.f2 = nn.Linear(32 * 7 * 7, 15), nn.Linear(15, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.c1(x)), 2)
        x = F.max_pool2d(F.relu(self.c2(x)), 2)
        return self.f2(F.relu(self.f1(x.flatten(1))))


class MLP(nn.Module):
    """50,890 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.f1, self.f2 = nn.Linear(28 * 28, 64), nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.f2(F.relu(self.f1(x.flatten(1))))


def make_model() -> nn.Module:
    """The same weights for the same seed, whoever calls."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SETTING.seed)
        return {"cnn": CNN, "mlp": MLP}[SETTING.model]()


# -- data --------------------------------------------------------------------------------------------------------------
def data_folder(setting: Setting) -> Path:
    """The sites' images: a prototype a class and noise, classes mixed by Dirichlet(1). Drawn when first asked for."""
    folder = Path(setting.data) / f"{setting.sites}x{setting.samples}-{setting.held_out}"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        drawn = Path(tempfile.mkdtemp(dir=folder.parent))
        _draw(drawn, setting)
        with suppress(OSError):  # another process was quicker
            drawn.rename(folder)
    return folder


def _draw(folder: Path, setting: Setting) -> None:
    rng = np.random.default_rng(0)
    prototypes = rng.standard_normal((CLASSES, 1, 28, 28), dtype=np.float32)

    def images(labels: np.ndarray) -> np.ndarray:
        return 2 * rng.standard_normal((len(labels), 1, 28, 28), dtype=np.float32) + prototypes[labels]

    shape = setting.sites, setting.samples, 1, 28, 28
    inputs = np.lib.format.open_memmap(folder / "x.npy", mode="w+", dtype=np.float32, shape=shape)
    labels = np.empty((setting.sites, setting.samples), dtype=np.int64)
    for site in range(setting.sites):
        labels[site] = rng.choice(CLASSES, setting.samples, p=rng.dirichlet(np.ones(CLASSES)))
        inputs[site] = images(labels[site])
    held_out = rng.integers(0, CLASSES, setting.held_out)
    inputs.flush()
    for name, array in (("y", labels), ("held-out-x", images(held_out)), ("held-out-y", held_out)):
        np.save(folder / f"{name}.npy", array)


@cache
def _mapped(name: str) -> np.ndarray:
    return np.load(data_folder(SETTING) / f"{name}.npy", mmap_mode="r")


def site_data(site: int) -> tuple[Tensor, Tensor]:
    """(samples, 1, 28, 28) images and (samples,) labels, copied from the mapped files."""
    return torch.from_numpy(np.array(_mapped("x")[site])), torch.from_numpy(np.array(_mapped("y")[site]))


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    """On the images held out."""
    model.eval()
    inputs, labels = (torch.from_numpy(np.array(_mapped(f"held-out-{name}"))) for name in "xy")
    return float((model(inputs).argmax(1) == labels).float().mean())


# -- training ----------------------------------------------------------------------------------------------------------
def local_training(model: nn.Module, site: int, round: int) -> float:
    """The epochs of one site in one round, in place. Returns the mean loss."""
    inputs, labels = site_data(site)
    generator = torch.Generator().manual_seed(round * 100_003 + site)
    optimizer = torch.optim.SGD(model.parameters(), lr=SETTING.lr)
    model.train()
    losses = []
    for _ in range(SETTING.epochs):
        for rows in torch.randperm(len(inputs), generator=generator).split(SETTING.batch):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(inputs[rows]), labels[rows])
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
    return float(torch.stack(losses).mean())


# -- what is told ------------------------------------------------------------------------------------------------------
def report(name: str, started: float, ends: Sequence[float], model: nn.Module, version: str) -> None:
    """Print the line that `benchmarks.simulation` reads. started, ends: seconds of one clock, of the loop's start and of each round's end."""
    rounds = [b - a for a, b in zip([started, *ends], ends, strict=False)]
    found = {
        "name": name,
        "version": version,
        "rounds": rounds,
        "accuracy": accuracy(model),
        "setting": asdict(SETTING),
    }
    print("BENCH " + json.dumps(found), flush=True)


def now() -> float:
    return time.perf_counter()
