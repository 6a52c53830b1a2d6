"""The training script of script.yaml. By hand, `python train.py` trains once on all of the digits."""

import torch
from function import Net, test
from sites import digits
from torch.utils.data import DataLoader, TensorDataset

from fedflow import client

model = Net()
while client.is_running():
    task = client.receive(model)
    sites = task.config.get("sites", ["site-1"])
    data = TensorDataset(*digits(task.site or "site-1", sites))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    loader = client.data(DataLoader(data, batch_size=32, shuffle=True))
    model.train()
    for _ in range(task.config.get("epochs", 1)):
        for inputs, target in loader:
            optimizer.zero_grad()
            loss = torch.nn.functional.nll_loss(model(inputs), target)
            loss.backward()
            optimizer.step()
    print(f"round {task.round} at {task.site}: loss {loss.item():.4f}")
    client.send(metrics=test(model, DataLoader(data, batch_size=300)))
