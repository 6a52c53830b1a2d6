"""A LightningModule. `fedflow run examples/training/lightning.yaml`; needs fedflow[lightning]."""

from typing import Any

import lightning.pytorch as pl
import torch
from sites import digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fedflow.local.lightning import LightningWorkload


class Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def accuracy(model: nn.Module) -> dict[str, float]:
    inputs, labels = digits()
    return {"accuracy": float((model(inputs).argmax(dim=1) == labels).float().mean())}


def site(site: str, sites: list[str]) -> LightningWorkload:
    data = TensorDataset(*digits(site, sites))
    return LightningWorkload(DataLoader(data, batch_size=32, shuffle=True), trainer={"gradient_clip_val": 1.0})


class HeldOut:
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        return accuracy(model)
