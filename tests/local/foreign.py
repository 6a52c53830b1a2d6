"""Training code as others have it, on scikit-learn's digits: nobody who wrote it had heard of federated learning."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn, optim
from torch.utils.data import DataLoader, TensorDataset


class Net(nn.Module):
    """Dropout, and batch normalisation with its float and integer buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(64, 16)
        self.norm = nn.BatchNorm1d(16)
        self.dropout = nn.Dropout(0.25)
        self.fc2 = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.dropout(torch.tanh(self.norm(self.fc1(x))))
        return F.log_softmax(self.fc2(x), dim=1)


def digits(site: str) -> tuple[TensorDataset, TensorDataset]:
    """A site's own digits, (training, test): 60 of the smaller ones at site-1, 44 of the larger ones at site-2."""
    inputs, classes = load_digits(return_X_y=True)
    of_site, examples = {"site-1": (classes < 6, 60), "site-2": (classes > 3, 44)}[site]
    x = torch.from_numpy((inputs[of_site] / 16).astype(np.float32))
    y = torch.from_numpy(classes[of_site].astype(np.int64))
    return TensorDataset(x[:examples], y[:examples]), TensorDataset(x[examples:][:40], y[examples:][:40])


# -- as PyTorch's basic MNIST example: its own loaders, a schedule by epochs, an evaluation, prints, an early return -----
def test(model: nn.Module, test_loader: Any) -> float:
    model.eval()
    test_loss, correct = 0.0, 0
    with torch.no_grad():
        for data, target in test_loader:
            output = model(data)
            test_loss += F.nll_loss(output, target, reduction="sum").item()
            pred = output.argmax(dim=1, keepdim=True)
            correct += int(pred.eq(target.view_as(pred)).sum().item())
    print(f"Test set: Average loss: {test_loss / len(test_loader.dataset):.4f}, Accuracy: {correct}")
    return correct / len(test_loader.dataset)


def mnist(model: nn.Module, datasets: Any, args: Any) -> Any:
    train_loader = DataLoader(datasets[0], batch_size=args.batch_size, shuffle=True)
    test_loader = DataLoader(datasets[1], batch_size=100)
    optimizer = optim.SGD(model.parameters(), lr=args.lr)
    scheduler = optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=args.gamma)
    for epoch in range(1, args.epochs + 1):
        model.train()
        for batch_idx, (data, target) in enumerate(train_loader):
            optimizer.zero_grad()
            output = model(data)
            loss = F.nll_loss(output, target)
            loss.backward()
            optimizer.step()
            if batch_idx % args.log_interval == 0:
                print(f"Train Epoch: {epoch} [{batch_idx * len(data)}]\tLoss: {loss.item():.6f}")
        accuracy = test(model, test_loader)
        if accuracy > args.enough:
            return {"accuracy": accuracy, "epochs": epoch}
        scheduler.step()
    return {"accuracy": accuracy, "epochs": args.epochs}


# -- as the client loop of NVFlare's CIFAR-10 example ------------------------------------------------------------------
def cifar(net: nn.Module, trainloader: Any, config: Any) -> dict[str, float]:
    device = "cpu"
    net.to(device)
    criterion = nn.NLLLoss()
    optimizer = optim.SGD(net.parameters(), lr=config["lr"], momentum=0.9)
    last = 0.0
    for epoch in range(config["epochs"]):
        running_loss = 0.0
        for i, data in enumerate(trainloader, 0):
            inputs, labels = data[0].to(device), data[1].to(device)
            optimizer.zero_grad()
            outputs = net(inputs)
            loss = criterion(outputs, labels)
            loss.backward()
            optimizer.step()
            running_loss += loss.item()
            if i % 2 == 1:
                print(f"[{epoch + 1}, {i + 1:5d}] loss: {running_loss / 2:.3f}")
                last, running_loss = running_loss / 2, 0.0
    print("Finished Training")
    return {"loss": last}
