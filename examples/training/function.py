"""A training function as anybody has one: with its own optimizer, schedule, evaluation and prints, and no word of fedflow.

`fedflow run examples/training/function.yaml`
"""

from typing import Any

import torch
import torch.nn.functional as F
from sites import digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fedflow.local import FunctionWorkload


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3)
        self.dropout = nn.Dropout(0.25)
        self.dense = nn.Linear(72, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(F.relu(self.conv(x.view(-1, 1, 8, 8))), 2)
        return F.log_softmax(self.dense(self.dropout(torch.flatten(x, 1))), dim=1)


# -- from here on it is the code that was there before -----------------------------------------------------------------
def test(model: nn.Module, loader: Any) -> dict[str, float]:
    model.eval()
    loss, correct = 0.0, 0
    with torch.no_grad():
        for data, target in loader:
            output = model(data)
            loss += F.nll_loss(output, target, reduction="sum").item()
            correct += int((output.argmax(dim=1) == target).sum())
    return {"loss": loss / len(loader.dataset), "accuracy": correct / len(loader.dataset)}


def train(model: nn.Module, data: Any, config: Any) -> dict[str, float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=config["lr"])
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.7)
    for epoch in range(config["epochs"]):
        model.train()
        for batch_idx, (inputs, target) in enumerate(data):
            optimizer.zero_grad()
            loss = F.nll_loss(model(inputs), target)
            loss.backward()
            optimizer.step()
            if batch_idx % 10 == 0:
                print(f"epoch {epoch} [{batch_idx * len(inputs)}/{len(data.dataset)}] loss: {loss.item():.4f}")
        scheduler.step()
    return test(model, data)


# -- and this is what a site adds --------------------------------------------------------------------------------------
def site(site: str, sites: list[str]) -> FunctionWorkload:
    data = TensorDataset(*digits(site, sites))
    return FunctionWorkload(train, DataLoader(data, batch_size=32, shuffle=True))


class HeldOut:
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        return test(model, DataLoader(TensorDataset(*digits()), batch_size=300))
